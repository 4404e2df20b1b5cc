"""Kernels that were registered from outside: candidates wherever their op stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright import kernel_registry
from graphwright.backends import aten
from graphwright.backends.base import NATIVE, Candidate, Refused, Work, filler, hint
from graphwright.kernel import Kernel

#: what it offers runs wherever its tensors lie
DEVICES = ("cpu", "cuda")


def reason() -> str | None:
    """Registered kernels say for themselves where they can't serve."""
    return None


def candidates(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """A candidate per kernel of the op; what its ``supports`` refuses can't be built, with its reason."""
    if work.row is None:
        return
    for kernel in kernel_registry.registered(*{work.op, work.row.name}):
        if kernel.device == _device(work.out):
            floor = -20 * math.log10(kernel.tolerance[0]) if kernel.tolerance[0] and kernel.precision != "f32" else None
            yield Candidate(kernel.label, (NATIVE,) * len(work.reads), (NATIVE,), kernel.precision,
                            lambda kernel=kernel: _build(kernel, work), aliases=True, floor_db=floor, foreign=True)  # fmt: skip


def _device(value: Any) -> str:
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    return first.device.type if isinstance(first, Tensor) else ""


def _build(kernel: Kernel, work: Work) -> Callable[..., Any]:
    """The kernel on the work's reads, constants filled in.

    Raises:
        Refused: it does not serve this work.
    """
    fill = filler(tuple(map(_detached, work.args)), {k: _detached(v) for k, v in work.kwargs.items()})

    def arguments(reads: tuple[Any, ...]) -> list[Any]:
        args, kwargs = fill(*reads)
        return [*args, *kwargs.values()]

    why = kernel.supports(*arguments(tuple(_outline(work.val(k)) for k in range(len(work.reads)))))
    if why is not None:
        raise Refused(str(why))
    if not work.static:
        return _asking(kernel, work, arguments)
    strides = [tuple(v.stride()) if isinstance(v := work.val(k), Tensor) else None for k in range(len(work.reads))]

    def run(*reads: Any) -> Any:
        return kernel.run(*arguments(tuple(map(_as_told, reads, strides))))

    return run


def _asking(kernel: Kernel, work: Work, arguments: Callable[[tuple[Any, ...]], list[Any]]) -> Callable[..., Any]:
    """Where sizes vary, the kernel is asked at each call, and the op itself serves where it refuses."""
    native = aten.implementation(work)

    def run(*reads: Any) -> Any:
        args = arguments(tuple(_as_told(x, None) for x in reads))
        return kernel.run(*args) if kernel.supports(*args) is None else native(*reads)

    return run


def _as_told(x: Any, strides: tuple[int, ...] | None) -> Any:
    """A read in the strides that ``supports`` was shown, without a gradient."""
    if not isinstance(x, Tensor):
        return x
    if strides is not None and x.stride() != strides and 0 not in strides:
        x = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
    return x.detach() if x.requires_grad else x


def _detached(value: Any) -> Any:
    """Constants without gradients: NumPy would not take them."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return type(value)(map(_detached, value))
    return value


def _outline(value: Any) -> Any:
    """A fake value at the example's sizes: asking about a symbolic one would fix it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not isinstance(value, Tensor):
        return hint(value) if isinstance(value, (int, torch.SymInt)) else value
    if all(isinstance(s, int) for s in (*value.shape, *value.stride())):
        return value
    with FakeTensorMode():
        return torch.empty_strided([hint(s) for s in value.shape], [hint(s) for s in value.stride()], dtype=value.dtype, device=value.device)
