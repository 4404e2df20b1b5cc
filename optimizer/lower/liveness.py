"""Which registers share memory, when that memory is read for the last time, and a run that proves it.

Set ``GRAPHWRIGHT_POISON=1`` before results are made or loaded, and every call of theirs is such a run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphwright.errors import InternalError

if TYPE_CHECKING:
    from graphwright.lower.runner import Runner, Step

#: written into memory that nothing should read: NaN in every float type, -1 or the largest number in integer types
_POISON = 0xFF


def groups(steps: Sequence[Step]) -> dict[int, int]:
    """For each register, one that stands for all those that may share memory with it."""
    above: dict[int, int] = {}

    def top(slot: int) -> int:
        while above.setdefault(slot, slot) != slot:
            above[slot] = above[above[slot]]
            slot = above[slot]
        return slot

    for step in steps:
        shared = step.shares if step.clobbers is None else (*step.shares, step.clobbers)
        for slot in (*step.reads, *step.writes):
            top(slot)
        if shared:  # what comes of it may be several views of one tensor
            for slot in (*shared, *step.writes):
                above[top(slot)] = top(step.writes[0])
    return {slot: top(slot) for slot in above}


def deaths(steps: Sequence[Step], resident: set[int]) -> dict[int, set[int]]:
    """For each step, the groups (see ``groups``) that it, or a step before it, reads for the last time.

    Args:
        resident: registers whose memory outlives the steps: inputs, buffers, results.
    """
    group = groups(steps)
    immortal = {group[s] for s in resident if s in group} | {group[w] for step in steps if step.resident for w in step.writes}
    last = {group[slot]: k for k, step in enumerate(steps) for slot in (*step.reads, *step.writes)}
    found: dict[int, set[int]] = {}
    for one, k in last.items():
        if one not in immortal:
            found.setdefault(k, set()).add(one)
    return found


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors with memory of their own kind in a register: one, none, or those of a tuple."""
    if isinstance(value, Tensor):
        if value.layout is torch.strided and value.device.type in ("cpu", "cuda"):
            yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)


def place(tensor: Tensor) -> int:
    """The address of a tensor's storage; 0 where it has none."""
    return tensor.untyped_storage().data_ptr()


def run_poisoned(runner: Runner, leaves: Sequence[Tensor]) -> tuple[Any, ...]:
    """What ``runner(*leaves)`` gives, every value's memory overwritten as soon as the steps say that nothing reads it any more.

    A step that reads a dead value then gives NaN instead of an answer that is right by luck.

    Raises:
        InternalError: memory that is said to be dead is that of a weight, an input, a result or a living value.
    """
    dying = deaths(runner.steps, runner.resident)
    group = groups(runner.steps)
    memory: dict[int, dict[int, torch.UntypedStorage]] = {}
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        registers = runner._start(leaves)
        kept = {place(t) for t in (*runner.program.tensors().values(), *tensors(registers))}
        for k, step in enumerate(runner.steps):
            if step.clobbers is not None:
                others = (value for slot, value in enumerate(registers) if slot != step.clobbers)
                _check(k, step, {place(t) for t in tensors(registers[step.clobbers])}, kept, others)
            result = step.call(*[registers[r] for r in step.reads])
            for slot, value in zip(step.writes, (result,) if len(step.writes) == 1 else result, strict=True):
                registers[slot] = value
                for t in tensors(value):
                    memory.setdefault(group[slot], {})[place(t)] = t.untyped_storage()
            for slot in step.frees:
                registers[slot] = None
            dead = {at: storage for one in dying.get(k, ()) for at, storage in memory.pop(one, {}).items() if at}
            if dead:
                _check(k, step, dead, kept, registers)
            for storage in dead.values():
                torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).fill_(_POISON)
        return runner._finish(registers, leaves)


def _check(k: int, step: Step, written: Collection[int], kept: set[int], others: Iterable[Any]) -> None:
    """Memory that is to be overwritten belongs to nothing that outlives the call, nor to what the other registers hold."""
    for what, held in (("a weight, a buffer or an input", kept), ("a value that is still to be read", {place(t) for t in tensors(tuple(others))})):
        if any(at and at in held for at in written):
            raise InternalError(f"step {k} ({step.name}): memory that nothing should read after it belongs to {what}", where=step.site)
