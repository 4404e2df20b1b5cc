"""How little memory a runner's values could lie in: their sizes and lifetimes as observed, and offsets in one arena.

Two assignments are made and the better one counts, compared with what no assignment can go below: greedy by size
(Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020) and best fit in the order of time.

No run takes its memory from such an arena: the runner frees each value after its last reader, so that it never holds more than the
least an arena could be. The figures stand in the report, so that this can be seen of any model: where they part, something is held too
long. Nor would it save time where blocks are small: ResNet-50 and MobileNetV2 on one image and MiniLM on 8x128 tokens, exact and int8, map
no page at all in a call (eager 0 to 8), since the C library's heap hands the same blocks out again (``memory.keep_heap``). It would where they are large: glibc maps
each block of 32 MiB and more anew, at 1.3 µs for 4 KiB here, which makes MobileNetV2 on 16 images 1.3 times as slow or worse, ResNet-50 1.1
times. But all those blocks are results of oneDNN's convolutions, which write into no memory but their own; so the report says what
mapping costs where it is more than a hundredth of a call, and which setting of the C library keeps the blocks.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphwright.lower.liveness import place, tensors

if TYPE_CHECKING:
    from graphwright.lower.runner import Runner, Step

#: bytes to which offsets are rounded: a cache line, and the widest vector
ALIGNMENT = 64
#: values up to which offsets are also assigned by size, which takes time with the square of their number
_BY_SIZE = 4000


@dataclass(frozen=True)
class Value:
    """Memory that a run takes and gives up.

    Attributes:
        nbytes: of its storage.
        first, last: steps during which it is held, both included.
        returned: it lies under a result, which is the user's: it never goes into an arena.
        site, name: of the step that made it.
    """

    nbytes: int
    first: int
    last: int
    returned: bool = False
    site: str = ""
    name: str = ""

    @property
    def room(self) -> int:
        """Bytes that it takes in an arena."""
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Plan:
    """Offsets for values in one arena, in bytes.

    Attributes:
        by: the assignment that was better: ``"size"`` or ``"time"``.
        least: the largest sum of the values that are held at a time: no arena can be smaller.
        without_reuse: the sum of all values.
    """

    offsets: tuple[int, ...]
    size: int
    by: str
    least: int
    without_reuse: int


@dataclass(frozen=True)
class Figures:
    """A plan for a report, in MiB: values within a run; results lie elsewhere.

    Attributes:
        values: how many there are.
        arena, least, without_reuse: see ``Plan``.
        results: memory under the results.
    """

    values: int
    arena: float
    by: str
    least: float
    without_reuse: float
    results: float


def figures(runner: Runner, leaves: Sequence[Tensor]) -> Figures:
    """What the values of a run on these inputs take, planned."""
    found = observe(runner, leaves)
    plan = assign([v for v in found if not v.returned])
    mib = 2.0**20
    return Figures(len(plan.offsets), plan.size / mib, plan.by, plan.least / mib, plan.without_reuse / mib,
                   sum(v.nbytes for v in found if v.returned) / mib)  # fmt: skip


@dataclass
class _Held:
    nbytes: int
    first: int
    step: Step
    registers: set[int] = field(default_factory=set)


def observe(runner: Runner, leaves: Sequence[Tensor]) -> list[Value]:
    """Every storage that one run on these inputs takes, from the step that makes it to the one after which no register holds it.

    Views share the storage of what they look at; memory of inputs and of the program's tensors is not counted. Mutations
    are not applied.
    """
    foreign = {place(t) for t in (*leaves, *runner.program.tensors().values())}
    held: dict[int, _Held] = {}  # by address
    where: dict[int, set[int]] = {}  # register → addresses
    found: list[Value] = []
    position = -1

    def look(step: Step, args: list[Any]) -> Any:
        nonlocal position
        position += 1
        result = step.call(*args)
        for slot, value in zip(step.writes, (result,) if len(step.writes) == 1 else result, strict=True):
            for t in tensors(value):
                at = place(t)
                if at and at not in foreign:
                    held.setdefault(at, _Held(t.untyped_storage().nbytes(), position, step)).registers.add(slot)
                    where.setdefault(slot, set()).add(at)
        for slot in step.frees:
            for at in where.pop(slot, ()):
                held[at].registers.discard(slot)
                if not held[at].registers:
                    gone = held.pop(at)
                    found.append(Value(gone.nbytes, gone.first, position, False, gone.step.site, gone.step.name))
        return result

    with torch._C._AutoDispatchBelowAutograd():
        runner.step_through(leaves, look)
    found += [Value(h.nbytes, h.first, position, True, h.step.site, h.step.name) for h in held.values()]
    return sorted(found, key=lambda v: (v.first, v.last))


def most(values: Sequence[Value], *, aligned: bool = False) -> tuple[int, int]:
    """The largest number of bytes held at a time, and the first step at which they are."""
    change: dict[int, int] = {}
    for v in values:
        room = v.room if aligned else v.nbytes
        change[v.first] = change.get(v.first, 0) + room
        change[v.last + 1] = change.get(v.last + 1, 0) - room
    now = top = at = 0
    for step, more in sorted(change.items()):
        now += more
        if now > top:
            top, at = now, step
    return top, at


def assign(values: Sequence[Value]) -> Plan:
    """Offsets at which no two values that are held at a time overlap."""
    least, total = most(values, aligned=True)[0], sum(v.room for v in values)
    tried = {"time": _by_time(values)}
    if len(values) <= _BY_SIZE:
        tried["size"] = _by_size(values)
    sizes = {by: max((o + v.room for o, v in zip(offsets, values, strict=True)), default=0) for by, offsets in tried.items()}
    by = min(sizes, key=lambda k: (sizes[k], k))
    return Plan(tuple(tried[by]), sizes[by], by, least, total)


def _by_size(values: Sequence[Value]) -> list[int]:
    """The largest first, each at the lowest offset that is free as long as it is held."""
    offsets = [0] * len(values)
    placed: list[int] = []
    for k in sorted(range(len(values)), key=lambda k: (-values[k].nbytes, values[k].first)):
        v = values[k]
        taken = sorted((offsets[j], offsets[j] + values[j].room) for j in placed if values[j].first <= v.last and v.first <= values[j].last)
        at = 0
        for low, high in taken:
            if at + v.room <= low:
                break
            at = max(at, high)
        offsets[k] = at
        placed.append(k)
    return offsets


def _by_time(values: Sequence[Value]) -> list[int]:
    """In the order in which they are made, each into the smallest gap that holds it, else behind all others."""
    offsets = [0] * len(values)
    living: list[tuple[int, int, int]] = []  # offset, end, last step
    for k in sorted(range(len(values)), key=lambda k: (values[k].first, -values[k].nbytes)):
        v = values[k]
        living = [x for x in living if x[2] >= v.first]
        ends = [0, *(high for _, high, _ in living)]
        gaps = [(low - high, high) for high, (low, _, _) in zip(ends, living, strict=False) if low - high >= v.room]
        offsets[k] = min(gaps)[1] if gaps else ends[-1]
        bisect.insort(living, (offsets[k], offsets[k] + v.room, v.last))
    return offsets
