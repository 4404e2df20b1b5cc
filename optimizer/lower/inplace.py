"""Elementwise ops that write over what they alone still read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphwright.backends.aten import may_share
from graphwright.backends.base import Slot, Work, filler
from graphwright.ops import ELEMENTWISE
from graphwright.ops.axes import same

if TYPE_CHECKING:
    from graphwright.lower.runner import Step


def reuse(steps: Sequence[Step], shared: Collection[int], results: Collection[int]) -> list[Step]:
    """The steps, elementwise ops of ATen writing into an argument that nothing reads later.

    Numbers are the same to the bit. An argument may be written where a step has made it in memory of its own, it has the result's
    shape, strides and dtype, and this step reads it last.

    Args:
        shared: registers that may share memory with another, an input or a buffer.
        results: registers that are returned.
    """
    last = {slot: k for k, step in enumerate(steps) for slot in step.reads}
    fresh = {w for step in steps if _makes(step) for w in step.writes}
    found: list[Step] = []
    for k, step in enumerate(steps):
        spot = next((i for i, slot in enumerate(step.reads) if last[slot] == k and slot in fresh and slot not in shared
                     and slot not in results and _alike(step.work, i) and _writer(step.work, i)), None) if _may_write(step) else None  # fmt: skip
        if spot is not None:
            step = replace(step, call=_into(step.work, spot), clobbers=step.reads[spot])
        found.append(step)
    return found


def _makes(step: Step) -> bool:
    """Whether a step's results lie in memory that it has just taken."""
    if step.shares or step.resident:
        return False
    return step.work is None or not step.name.startswith("aten.") or not may_share(step.work)


def _may_write(step: Step) -> bool:
    work = step.work
    if work is None or step.name not in ("aten.native", "aten.last") or step.clobbers is not None or len(step.writes) != 1 or step.shares:
        return False
    if work.weights or not isinstance(work.out, Tensor) or not work.has(ELEMENTWISE) or may_share(work):
        return False
    return len(step.reads) == len(work.reads)


def _alike(work: Work | None, index: int) -> bool:
    """Whether the index-th read has the result's shape, strides and dtype."""
    assert work is not None
    x, y = work.val(index), work.out
    if not isinstance(x, Tensor) or x.dtype != y.dtype or x.dim() != y.dim() or x.device.type != "cpu" or y.device.type != "cpu":
        return False
    return all(same(a, b) for a, b in zip((*x.shape, *x.stride()), (*y.shape, *y.stride()), strict=True))


@functools.cache
def _writing(target: Any) -> Any:
    """The overload that writes into ``out``, where it has a kernel of its own: others compute elsewhere and copy."""
    wanted = [(a.name, str(a.type)) for a in target._schema.arguments]
    packet = target.overloadpacket
    for name in packet.overloads():
        overload = getattr(packet, name)
        arguments = overload._schema.arguments
        outs = [a for a in arguments if a.is_out]
        if len(outs) == 1 and outs[0].name == "out" and [(a.name, str(a.type)) for a in arguments if not a.is_out] == wanted:
            return overload if torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CPU") else None
    return None


@functools.cache
def _upon(target: Any) -> Any:
    """The overload that writes over its first argument (``relu_``), where it has a kernel of its own."""
    packet = getattr(torch.ops.aten, f"{target._schema.name.removeprefix('aten::')}_", None)
    overload = getattr(packet, target._overloadname, None)
    if overload is None or [a.name for a in overload._schema.arguments] != [a.name for a in target._schema.arguments]:
        return None
    return overload if torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CPU") else None


def _writer(work: Work | None, index: int) -> Any:
    """The overload with which a work can write over its index-th read, or None."""
    assert work is not None
    if not isinstance(work.target, torch._ops.OpOverload) or work.target.namespace != "aten":
        return None
    first = bool(work.args) and work.args[0] == Slot(index)
    return _writing(work.target) or (_upon(work.target) if first else None)


def _into(work: Work | None, index: int) -> Callable[..., Any]:
    assert work is not None
    target, fill, first = _writing(work.target), filler(work.args, work.kwargs), _upon(work.target)
    if target is None:
        if len(work.args) == 1 and not work.kwargs:
            return first

        def over(*reads: Any) -> Any:
            args, kwargs = fill(*reads)
            return first(*args, **kwargs)

        return over

    def run(*reads: Any) -> Any:
        args, kwargs = fill(*reads)
        return target(*args, **kwargs, out=reads[index])

    return run
