"""Our own kernels for float32 convolutions: 3x3 windows by Winograd's minimal filtering, and channels by themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from graphwright.backends import llvm
from graphwright.backends.base import NATIVE, NATIVE_LAST, Candidate, Work, hint
from graphwright.backends.onednn import Matrix, int8_reason, matrix
from graphwright.measure import machine
from graphwright.ops.axes import same

#: Channels below which blocks of 16 are mostly padding, and how many times fewer multiplications there must at least be.
_CHANNELS, _SAVED = 16, 1.25


#: its kernels are for tensors there
DEVICES = ("cpu",)


@functools.cache
def reason() -> str | None:
    """None, or why the kernels can't run here, or never pay."""
    if llvm.reason():
        return None  # said once, by the module beside
    return None if "avx512f" in machine().get("flags", ()) else "the processor has no AVX-512: our float products would be no faster"


def candidates(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Two-dimensional convolutions: with 3x3 windows, one pixel from window to window, and of each channel by itself."""
    m = None if reason() or llvm.kernel("graphwright.conv2d_winograd") is None else matrix(work)
    if m is None or not m.conv or not work.is_float:
        return
    if alone(work, m):
        yield Candidate("llvm.depthwise-last", (NATIVE_LAST,), (NATIVE_LAST,), "f32", functools.partial(_build_alone, m))
    if not _fits(work, m):
        return
    if "int8" in allowed and m.int_weight is not None and work.reads[m.x].quantized and int8_reason() is None:
        return  # int8 products do four times as much at once: not worth the time to try
    needs = tuple(NATIVE_LAST if k in (m.x, m.other) else NATIVE for k in range(len(work.reads)))
    yield Candidate("llvm.winograd-last", needs, (NATIVE_LAST,), "f32", functools.partial(_build, m))


def _fits(work: Work, m: Matrix) -> bool:
    from graphwright.kernels.conv2d_winograd import unfit_rest

    x, other = work.val(m.x), None if m.other is None else work.val(m.other)
    if any(v.dtype != torch.float32 for v in (x, m.weight)) or unfit_rest(tuple(m.weight.shape), m.padding, m.activation, None if other is None else other.dtype):
        return False
    if x.dim() != 4 or m.groups != 1 or {*m.stride, *m.dilation} != {1} or min(m.weight.shape[:2]) < _CHANNELS:
        return False
    if other is not None and not (other.dim() == 4 and all(same(a, b) for a, b in zip(other.shape, work.out.shape, strict=True))):
        return False
    high, wide = (hint(s) for s in work.out.shape[2:])
    tiles = -(-high // 2) * -(-wide // 2)
    return 9 * high * wide >= _SAVED * 16 * tiles > 0


def _build(m: Matrix) -> Callable[..., Tensor]:
    from graphwright.kernels.conv2d_winograd import Convolution, pack

    run = Convolution(pack(m.weight, m.bias), m.padding, m.activation, m.scalars)
    x, other = m.x, m.other
    return (lambda *r: run(r[x])) if other is None else (lambda *r: run(r[x], r[other]))


def alone(work: Work, m: Matrix) -> bool:
    """Whether the kernel for channels by themselves serves this convolution."""
    from graphwright.kernels.conv2d_depthwise import unfit_rest

    x = work.val(m.x)
    if x.dim() != 4 or any(v.dtype != torch.float32 for v in (x, m.weight)) or m.other is not None or len(work.reads) != 1:
        return False
    return m.groups == m.weight.shape[0] and same(x.shape[1], m.groups) and unfit_rest(tuple(m.weight.shape), m.padding, m.activation) is None


def _build_alone(m: Matrix) -> Callable[..., Tensor]:
    from graphwright.kernels.conv2d_depthwise import Convolution, pack

    return Convolution(pack(m.weight, m.bias), m.weight.shape[2:], m.stride, m.padding, m.dilation, m.activation, m.scalars)
