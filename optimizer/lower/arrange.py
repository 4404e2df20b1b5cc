"""Steps in another order, some of them run again: what an order must keep to, and what follows from it.

A *sequence* is a list of positions among the steps in program order. Every step stands in it once; a cheap one may stand in it
again, and from there on its readers read what it gives then: the first value need not be held meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from graphwright.ops import CAST, ELEMENTWISE, QUANT, RANDOM, VIEW

if TYPE_CHECKING:
    from graphwright.lower.runner import Base, Step


def arranged(base: Base, sequence: Sequence[int] | None = None) -> tuple[list[Step], int, set[int]]:
    """The steps of a sequence, the number of registers, and those that may share memory; every run of a step writes registers of its own.

    Raises:
        ValueError: the sequence is not one of these steps; says why.
    """
    shared, count = set(base.shared), base.count
    if sequence is None:
        return [replace(s) for s in base.steps], count, shared
    _check(base, sequence)
    now: dict[int, int] = {}  # register → the one that holds its newest value
    seen: set[int] = set()
    steps: list[Step] = []
    for k in sequence:
        step = base.steps[k]
        reads, shares = (tuple(now.get(r, r) for r in slots) for slots in (step.reads, step.shares))
        writes = step.writes
        if k in seen:
            writes = tuple(range(count, count + len(writes)))
            count += len(writes)
            now.update(zip(step.writes, writes, strict=True))
            shared.update(new for old, new in zip(step.writes, writes, strict=True) if old in base.shared)
        seen.add(k)
        steps.append(replace(step, reads=reads, writes=writes, shares=shares, clobbers=None if step.clobbers is None else now.get(step.clobbers, step.clobbers)))
    return steps, count, shared


def _check(base: Base, sequence: Sequence[int]) -> None:
    """Each step reads what was made before it, what is not a function of its inputs keeps its turn, only cheap steps run again."""
    known = {*base.inputs, *(slot for slot, _ in base.buffers)}
    seen: set[int] = set()
    turn = -1
    for k in sequence:
        if type(k) is not int or not 0 <= k < len(base.steps):
            raise ValueError(f"there is no step {k!r}")
        step = base.steps[k]
        if not known.issuperset(step.reads):
            raise ValueError(f"step {k} reads what is not there yet")
        if k in seen and not cheap(step, base.returned):
            raise ValueError(f"step {k} can't run again")
        if fixed(step):
            if k < turn:
                raise ValueError(f"step {k} has lost its turn")
            turn = k
        known.update(step.writes)
        seen.add(k)
    if len(seen) < len(base.steps):
        raise ValueError(f"step {min(set(range(len(base.steps))) - seen)} is left out")


def fixed(step: Step) -> bool:
    """Whether a step may do more than compute from what it reads: random numbers, ops that the table does not know."""
    work = step.work
    return work is not None and (work.has(RANDOM) or work.row is None and isinstance(work.target, torch._ops.OpOverload))


def cheap(step: Step, returned: Collection[int]) -> bool:
    """Whether a step may run again: elementwise, a cast or a view, with a result that is not the user's."""
    work = step.work
    if step.clobbers is not None or step.resident or fixed(step) or any(w in returned for w in step.writes):
        return False
    if work is None:
        return step.name.startswith("convert")
    return not step.name.partition(".")[2].startswith("region") and any(map(work.has, (ELEMENTWISE, CAST, VIEW, QUANT)))


def protected(steps: Sequence[Step], count: int, shared: Collection[int], returned: Collection[int]) -> tuple[list[Step], int]:
    """The steps, and the number of registers, with a copy for a step that overwrites what somebody else still looks at."""
    safe: list[Step] = []
    last = {slot: k for k, s in enumerate(steps) for slot in s.reads}
    for index, step in enumerate(steps):
        slot = step.clobbers
        if slot is not None and (slot in shared or slot in returned or last.get(slot, -1) > index):
            from graphwright.lower.runner import Step

            fresh, count = count, count + 1
            safe.append(Step(torch.clone, (slot,), (fresh,), (), step.site, "copy"))
            step = replace(step, reads=tuple(fresh if r == slot else r for r in step.reads), clobbers=fresh)
        safe.append(step)
    return safe, count


def freed(steps: Sequence[Step], returned: Collection[int]) -> list[Step]:
    """The steps, each register freed after its last reader, or where nothing reads it."""
    last: dict[int, int] = {}
    for k, step in enumerate(steps):
        for slot in (*step.reads, *step.writes):
            last[slot] = k
    frees: dict[int, list[int]] = {}
    for slot, k in last.items():
        if slot not in returned:
            frees.setdefault(k, []).append(slot)
    return [replace(step, frees=tuple(frees.get(k, ()))) for k, step in enumerate(steps)]
