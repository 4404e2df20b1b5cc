"""Less memory at the peak: another order of the steps, and cheap values made again instead of held.

Orders are tried by list scheduling (of the steps that could run, the one that frees most or takes least comes next) and depth first
from the results. Then, at the peak, the largest values that are only waited for, and that cheap ops make, are made again before
their next reader. Regions that need several values at once may stand in the way of both: they run op by op where nothing else
helps. Sizes are those of a run on the example; whether anything is gained, the allocator says.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphwright.accelerator import random_devices
from graphwright.lower import Lowered
from graphwright.lower.arrange import cheap, fixed
from graphwright.lower.liveness import place, tensors
from graphwright.lower.regions import without
from graphwright.lower.runner import Base, Runner, settle
from graphwright.memory import peak

#: values made again at the most, steps in a row that one may take, and seconds for looking
_ROUNDS, _DEPTH, _SECONDS = 200, 8, 20.0

#: how every note of this module begins that speaks of the peak
NOTE = "memory goal"


@dataclass(frozen=True)
class _Facts:
    """What each step in program order took in a run on the example, in bytes.

    Attributes:
        takes: memory under its results that it has taken.
        looks: registers in whose memory its results lie.
        passing: memory that it takes and gives back itself.
    """

    takes: list[int]
    looks: list[tuple[int, ...]]
    passing: list[int]


@dataclass(frozen=True)
class _Blob:
    """Memory as a runner holds it: from step ``first`` to ``last``, made by step ``maker``, used at ``used``."""

    nbytes: int
    first: int
    last: int
    used: tuple[int, ...]


def economize(lowered: Lowered, example: Sequence[Tensor], limit_mb: float, say: Callable[[str], None] = lambda text: None) -> Lowered:
    """``lowered`` with a lower peak where it lies above ``limit_mb``; a note says what came of it.

    Args:
        example: flat inputs, on which memory is measured.
    """
    program = lowered.analysis.program
    if lowered.runner.cuda is not None:
        return _noted(lowered, f"{NOTE} {limit_mb:.3g} MB: the order of the steps is searched on the CPU alone; on a GPU the peak stays as it is")
    with program.preserved(example):
        before = peak(lambda: lowered.runner(*example))
        if before is None or before.mb <= limit_mb:
            return lowered
        say(f"lowering the peak of {before.mb:.3g} MB to {limit_mb:.3g} MB")
        found: list[_Found] = []
        for variant, how in _variants(lowered):
            found.append(_lowest(variant, how, example, limit_mb))
            if found[-1].mb <= limit_mb:
                break
    best = min(found, key=lambda f: f.mb)
    if best.mb >= before.mb:
        return _noted(lowered, f"{NOTE} {limit_mb:.3g} MB: no other order of the steps and nothing made again lowers the peak of {before.mb:.3g} MB")
    met = "met" if best.mb <= limit_mb else "not met"
    return _noted(best.lowered, f"{NOTE} {limit_mb:.3g} MB {met}: {' and '.join(best.how)} brings the peak from {before.mb:.3g} to {best.mb:.3g} MB")


@dataclass(frozen=True)
class _Found:
    """A form of the program, what was done to get it, and its peak."""

    lowered: Lowered
    how: tuple[str, ...]
    mb: float


def _variants(lowered: Lowered) -> Iterator[tuple[Lowered, tuple[str, ...]]]:
    """The program as it is; without the regions that wait for several values at once; without any."""
    yield lowered, ()
    gathers = [f for f in lowered.fused if len(f.region.reads) > 1]
    if gathers:
        yield without(lowered, lambda f: f in gathers), (f"{len(gathers)} of {len(lowered.fused)} regions run op by op",)
    if len(gathers) < len(lowered.fused):
        yield without(lowered, lambda f: True), ("no regions",)


def _lowest(lowered: Lowered, how: tuple[str, ...], example: Sequence[Tensor], limit_mb: float) -> _Found:
    """The program in the order with the lowest peak that is found, if that is right and lower when it runs."""
    base = lowered.runner.base
    plain = _Found(lowered, how, _peak(lowered.runner, example))
    if base is None or how and plain.mb <= limit_mb:
        return plain
    search = _Search(base, _measure(lowered.runner, base, example))
    sequence = search.run(int(limit_mb * 2**20))
    if sequence is None:
        return plain
    runner = settle(base, sequence)
    mb = _peak(runner, example)
    if mb >= plain.mb or not all(map(_equal, _answer(lowered.runner, example), _answer(runner, example))):
        return plain
    again = len(sequence) - len(base.steps)
    how = (*how, *["another order of the steps"] * search.reordered, *[f"{again} steps run again"] * bool(again))
    return _Found(dataclasses.replace(lowered, runner=runner, sequence=sequence), how, mb)


def _peak(runner: Runner, example: Sequence[Tensor]) -> float:
    found = peak(lambda: runner(*example))
    return math.inf if found is None else found.mb


def restored(lowered: Lowered, sequence: Any) -> Lowered:
    """``lowered`` in the order that a file names; program order, with a note, where that does not fit."""
    base = lowered.runner.base
    if not sequence or base is None:
        return lowered
    try:
        return dataclasses.replace(lowered, runner=settle(base, sequence), sequence=list(sequence))
    except (ValueError, TypeError) as error:
        return _noted(lowered, f"the saved order of the steps does not fit here ({error}): they run in program order, which takes more memory")


def _noted(lowered: Lowered, note: str) -> Lowered:
    return dataclasses.replace(lowered, notes=[*lowered.notes, note])


def _answer(runner: Runner, example: Sequence[Tensor]) -> list[Tensor]:
    with torch.random.fork_rng(devices=random_devices()):
        torch.manual_seed(0)
        return [t.clone() for t in runner(*example)]


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _measure(runner: Runner, base: Base, example: Sequence[Tensor]) -> _Facts:
    """Run the steps in program order, none over what it reads, and look at the memory that each takes."""
    count = len(base.steps)
    facts = _Facts([0] * count, [()] * count, [0] * count)
    plain = settle(base, apart=True)
    held: dict[int, set[int]] = {}
    with torch.random.fork_rng(devices=random_devices()):
        registers = plain._start(example)
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for step in plain.steps:
                args, results = [registers[r] for r in step.reads], []
                seen = peak(lambda step=step, args=args, results=results: results.append(step.call(*args)))
                values = results if len(step.writes) == 1 else results[0]
                before = {place(t): slot for slot in step.reads for t in tensors(registers[slot])}
                made = {place(t): t.untyped_storage().nbytes() for t in tensors(tuple(values)) if place(t) and place(t) not in before}
                for slot, value in zip(step.writes, values, strict=True):
                    registers[slot] = value
                    held[slot] = {place(t) for t in tensors(value)}
                if step.origin >= 0:
                    facts.takes[step.origin] = sum(made.values())
                    facts.looks[step.origin] = tuple({before[p] for w in step.writes for p in held[w] if p in before})
                    facts.passing[step.origin] = max(0, int((seen.mb if seen else 0.0) * 2**20) - sum(made.values()))
                for slot in step.frees:
                    registers[slot] = None
    return facts


class _Search:
    """Sequences over ``base``, the best so far, judged by a simulation of the runner that they give."""

    def __init__(self, base: Base, facts: _Facts):
        self.base, self.facts = base, facts
        self.maker = {w: k for k, step in enumerate(base.steps) for w in step.writes}
        self.reordered = False
        self.deadline = time.perf_counter() + _SECONDS

    def run(self, limit: int) -> list[int] | None:
        """The sequence with the lowest peak that was found, none below ``limit`` looked for; None where program order is as low."""
        plain = list(range(len(self.base.steps)))
        best, (score, blobs, runner) = plain, self.judge(plain)
        for order in (self._greedy, self._depth_first):
            found = order()
            if found is not None and found != plain:
                judged = self.judge(found)
                if judged[0] < score:
                    best, (score, blobs, runner), self.reordered = found, judged, True
        for _ in range(_ROUNDS):
            if score[0] <= limit or time.perf_counter() > self.deadline:
                break
            for trial in self._again(best, blobs, runner, score):
                judged = self.judge(trial)
                if judged[0] < score:
                    best, (score, blobs, runner) = trial, judged
                    break
            else:
                break
        return None if best == plain else best

    def judge(self, sequence: Sequence[int]) -> tuple[tuple[int, int], list[_Blob], Runner]:
        """``(peak in bytes, steps at which it is reached)``, the memory held, and the runner."""
        runner = settle(self.base, sequence)
        blobs = self._blobs(runner)
        level = [0] * (len(runner.steps) + 1)
        for blob in blobs:
            level[blob.first] += blob.nbytes
            if blob.last + 1 < len(level):
                level[blob.last + 1] -= blob.nbytes
        total, held = 0, []
        for k, step in enumerate(runner.steps):
            total += level[k]
            held.append(total + (self.facts.passing[step.origin] if step.origin >= 0 else 0))
        top = max(held, default=0)
        return (top, held.count(top)), blobs, runner

    def _blobs(self, runner: Runner) -> list[_Blob]:
        under: dict[int, set[int]] = {}  # register → blobs in which it lies
        nbytes: list[int] = []
        used: list[list[int]] = []
        for k, step in enumerate(runner.steps):
            base = self.base.steps[step.origin] if step.origin >= 0 else None
            lies: set[int] = set()
            if base is None:  # a copy
                room = sum(nbytes[b] for r in step.reads for b in under.get(r, ()))
            elif step.clobbers is not None:
                lies, room = set(under.get(step.clobbers, ())), 0
            else:
                room = self.facts.takes[step.origin]
                looks = {r for r, old in zip(step.reads, base.reads, strict=True) if old in self.facts.looks[step.origin]}
                lies = {b for r in looks for b in under.get(r, ())}
            if room:
                lies.add(len(nbytes))
                nbytes.append(room)
                used.append([])
            for slot in step.writes:
                under[slot] = lies
            for b in lies.union(*(under.get(r, ()) for r in step.reads)):
                used[b].append(k)
        end = len(runner.steps) - 1
        final = {b for slot in self.base.returned for b in under.get(slot, ())}
        return [_Blob(n, u[0], end if b in final else u[-1], tuple(u)) for b, (n, u) in enumerate(zip(nbytes, used, strict=True))]

    # -- making again --------------------------------------------------------------------------------------------

    def _again(self, sequence: Sequence[int], blobs: Sequence[_Blob], runner: Runner, score: tuple[int, int]) -> Iterator[list[int]]:
        """Sequences in which a value that is only waited for at the peak is made again before its next reader."""
        top = self._top(blobs, runner, score[0])
        waiting = [b for b in blobs if b.first < top < b.last and top not in b.used and any(u > top for u in b.used)]
        position = self._positions(runner)
        for blob in sorted(waiting, key=lambda b: -b.nbytes):
            reader = next(u for u in blob.used if u > top)
            if position.get(reader) is None or position.get(blob.first) is None:
                continue
            wanted = [w for r in self.base.steps[runner.steps[reader].origin].reads if (w := self.maker.get(r)) is not None]
            chains = [c for w in wanted if (c := self._chain(w, blob, runner, reader, _DEPTH)) is not None]
            for chain in chains:
                if runner.steps[blob.first].origin in chain:
                    spot = position[reader]
                    yield [*sequence[:spot], *chain, *sequence[spot:]]

    def _top(self, blobs: Sequence[_Blob], runner: Runner, peak_bytes: int) -> int:
        for k, step in enumerate(runner.steps):
            passing = self.facts.passing[step.origin] if step.origin >= 0 else 0
            if sum(b.nbytes for b in blobs if b.first <= k <= b.last) + passing == peak_bytes:
                return k
        return 0

    @staticmethod
    def _positions(runner: Runner) -> dict[int, int]:
        """Place in the sequence of each step of the runner that is no copy."""
        return {k: n for n, k in enumerate(k for k, s in enumerate(runner.steps) if s.origin >= 0)}

    def _chain(self, k: int, blob: _Blob, runner: Runner, reader: int, depth: int) -> list[int] | None:
        """Steps that make what step ``k`` gives again from what is there at ``reader`` anyway; None where they would not be cheap."""
        step = self.base.steps[k]
        if depth == 0 or not cheap(step, self.base.returned):
            return None
        resident = {*self.base.inputs, *(slot for slot, _ in self.base.buffers)}
        found: list[int] = []
        for slot in step.reads:
            if slot in resident or self._living(slot, runner, reader, blob):
                continue
            before = self._chain(self.maker[slot], blob, runner, reader, depth - 1)
            if before is None:
                return None
            found += [x for x in before if x not in found]
        return [*found, k]

    def _living(self, slot: int, runner: Runner, reader: int, blob: _Blob) -> bool:
        """Whether a register's newest value before ``reader`` is held until then for another's sake."""
        maker = max((k for k, s in enumerate(runner.steps[:reader]) if s.origin == self.maker[slot]), default=None)
        if maker is None or maker == blob.first:
            return False
        register = runner.steps[maker].writes[self.base.steps[self.maker[slot]].writes.index(slot)]
        return register in self.base.returned or any(register in s.reads for s in runner.steps[reader:])

    # -- orders --------------------------------------------------------------------------------------------------

    def _before(self) -> list[set[int]]:
        """For each step, those that must come before it."""
        steps = self.base.steps
        found = [{self.maker[r] for r in step.reads if r in self.maker} for step in steps]
        turn: int | None = None
        for k, step in enumerate(steps):
            if fixed(step):
                if turn is not None:
                    found[k].add(turn)
                turn = k
            if step.clobbers is not None:  # it would need a copy before the others have read
                found[k].update(j for j in range(k) if step.clobbers in steps[j].reads)
        return found

    def _greedy(self) -> list[int] | None:
        """List scheduling: of the steps that could run, the one after which least is held; program order among equals."""
        steps, facts = self.base.steps, self.facts
        if len(steps) > 3000:
            return None
        before = self._before()
        readers: dict[int, int] = {}
        for step in steps:
            for slot in set(step.reads):
                readers[slot] = readers.get(slot, 0) + 1
        kept = self.base.returned | {s for step, looks in zip(steps, facts.looks, strict=True) for s in looks if step.writes}
        size = {w: facts.takes[k] // len(step.writes) for k, step in enumerate(steps) for w in step.writes}
        waits, after = [len(b) for b in before], [[] for _ in steps]
        for k, firsts in enumerate(before):
            for first in firsts:
                after[first].append(k)
        ready, order = {k for k, n in enumerate(waits) if not n}, []
        while ready:
            def grows(k: int) -> tuple[int, int]:
                gone = sum(size.get(r, 0) for r in set(steps[k].reads) if readers[r] == 1 and r not in kept)
                return facts.takes[k] - gone, k

            k = min(ready, key=grows)
            ready.remove(k)
            order.append(k)
            for slot in set(steps[k].reads):
                readers[slot] -= 1
            for then in after[k]:
                waits[then] -= 1
                if not waits[then]:
                    ready.add(then)
        return order if len(order) == len(steps) else None

    def _depth_first(self) -> list[int] | None:
        """Each step just before its first reader, what takes most first."""
        steps, before = self.base.steps, self._before()
        done: set[int] = set()
        order: list[int] = []
        ends = [self.maker[s] for s in sorted(self.base.returned) if s in self.maker]
        for root in [*ends, *range(len(steps))]:
            stack = [(root, False)]
            while stack:
                k, ripe = stack.pop()
                if k in done:
                    continue
                if ripe:
                    done.add(k)
                    order.append(k)
                    continue
                stack.append((k, True))
                stack += [(j, False) for j in sorted(before[k] - done, key=lambda j: (self.facts.takes[j] + self.facts.passing[j], -j))]
        return order
