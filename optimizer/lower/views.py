"""Chains of views as one call each.

A view costs no more than a call, but after a large kernel has emptied the caches that call takes some 20 to 100 µs, and the heads of
an attention stand behind seven of them. Where all sizes are fixed, what a chain gives is known beforehand: sizes, strides
and offset over the memory of the value that it starts from.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphwright.backends.base import is_static
from graphwright.ops import VIEW

if TYPE_CHECKING:
    from graphwright.lower.runner import Step

_PLAIN = ("aten.native", "aten.q")


@dataclass(frozen=True)
class _Chain:
    """Where a register's value comes from by views alone: the register it starts at, the calls, and what they do to a tensor."""

    base: int
    start: Tensor
    calls: tuple[Callable[..., Any], ...]
    value: Any


def collapse(steps: Sequence[Step], kept: Collection[int]) -> list[Step]:
    """The steps with every chain of views read from its start; views that nobody reads any more are left out.

    Args:
        kept: registers that are returned.
    """
    chains: dict[int, _Chain] = {}
    result: list[Step] = []
    for step in steps:
        chain = _follow(step, chains)
        if chain is not None:
            chains[step.writes[0]] = chain
            if len(chain.calls) > 1 and isinstance(chain.value, Tensor):
                step = replace(step, call=_strided(chain), reads=(chain.base,), shares=(chain.base,))
        result.append(step)
    wanted, alive = set(kept), []
    for step in reversed(result):
        if step.writes[0] not in chains or wanted.intersection(step.writes):
            wanted.update(step.reads)
            alive.append(step)
    return alive[::-1]


def _follow(step: Step, chains: dict[int, _Chain]) -> _Chain | None:
    """The chain that ends in this step, or None where it is no view of fixed sizes."""
    work = step.work
    if work is None or step.name not in _PLAIN or len(step.reads) != 1 or len(step.writes) != 1:
        return None
    if not (work.has(VIEW) or work.target is operator.getitem):
        return None
    before = chains.get(step.reads[0])
    if before is None:
        val = work.val(0)
        if not isinstance(val, Tensor) or not is_static(val):
            return None
        # memory that nothing touches; on the meta device some views would import PyTorch's compiler, which takes two seconds
        start = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype)
        before = _Chain(step.reads[0], start, (), start)
    with torch.no_grad():
        try:
            value = step.call(before.value)
        except Exception:  # noqa: BLE001  an op without a meta kernel, or one that wants numbers: it runs as it stands
            return None
    parts = value if isinstance(value, (tuple, list)) else (value,)
    plain = all(isinstance(p, Tensor) and p._base is before.start and p.dtype == before.start.dtype for p in parts)
    if not plain or any(p.is_conj() or p.is_neg() for p in parts):
        return None
    return _Chain(before.base, before.start, (*before.calls, step.call), value)


def _strided(chain: _Chain) -> Callable[[Tensor], Any]:
    """The chain as one call; step by step where the value has other strides than the program says."""
    expected, value, calls = chain.start.stride(), chain.value, chain.calls
    size, stride, offset = tuple(value.shape), value.stride(), value.storage_offset()

    def view(x: Tensor) -> Any:
        if x.stride() == expected:
            return x.as_strided(size, stride, x.storage_offset() + offset)
        y: Any = x
        for call in calls:
            y = call(y)
        return y

    return view
