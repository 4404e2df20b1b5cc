"""Our own kernels for int8 weights: linears and convolutions with everything behind them fused.

Products of integers where the input is read quantized, ahead or row by row at run time; else the weight is read as integers
and multiplied as float, which pays where reading it is the work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from graphwright.backends import llvm
from graphwright.backends.base import NATIVE, NATIVE_LAST, Q_LAST, Candidate, Format, Q, QParams, Work, alike
from graphwright.backends.onednn import Matrix, matrix
from graphwright.backends.packs import packed

_BYTES = (torch.uint8, torch.int8)


#: its kernels are for tensors there
DEVICES = ("cpu",)


@functools.cache
def reason() -> str | None:
    """None, or why the kernels can't run here."""
    if llvm.reason():
        return None  # said once, by the module beside
    from graphwright.kernels.vnni import unfit

    return unfit()


def candidates(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Matrix ops with a symmetric int8 weight."""
    if "int8" not in allowed or llvm.kernel("graphwright.linear_int8") is None:
        return
    m = matrix(work)
    if m is None or m.int_weight is None or not work.is_float or work.val(m.x).dtype != torch.float32:
        return
    if not m.int_weight.plain or not whole_residual(work, m):
        return
    if not m.conv and not work.reads[m.x].quantized and not work.reads[m.x].rows:
        yield from _weight_only(work, m)
    elif not reason():
        yield from _convolution(work, m) if m.conv else _linear(work, m)


def whole_residual(work: Work, m: Matrix) -> bool:
    """Whether the residual, where there is one, has the shape of the result, symbolic sizes by name."""
    return m.other is None or alike(work.val(m.other), work.out)


def _outs(work: Work, last: bool) -> Iterator[tuple[Format, str, QParams | None]]:
    """Result forms: float, and the value's own integers where it has them."""
    yield (NATIVE_LAST if last else NATIVE), "f32", None
    if work.qparams is not None and work.qparams.dtype in _BYTES:
        yield (Q_LAST if last else Q), "q", work.qparams


def _grid(out: QParams | None) -> tuple[float, int, int, int, torch.dtype | None]:
    return (1.0, 0, 0, 0, None) if out is None else (out.scale, out.zero_point, out.low, out.high, out.dtype)


# -- linear ------------------------------------------------------------------------------------------------------------


def _linear(work: Work, m: Matrix) -> Iterator[Candidate]:
    """From uint8, or from float rows that are to be quantized at run time."""
    from graphwright.kernels.linear_int8 import unfit_rest

    read = work.reads[m.x]
    if unfit_rest(m.activation, m.weight.shape[1], None if m.other is None else work.val(m.other), None):
        return
    q = work.read_qparams[m.x] if read.quantized else None
    for form, tag, out in _outs(work, last=False):
        if q is not None and q.dtype == torch.uint8:
            needs = tuple(Q if k == m.x else NATIVE for k in range(len(work.reads)))
            yield Candidate(f"llvm.int8-{tag}", needs, (form,), "int8", functools.partial(_build_linear, m, q, out))
        elif read.rows:
            yield Candidate(f"llvm.int8-rows-{tag}", (NATIVE,) * len(work.reads), (form,), "int8",
                            functools.partial(_build_linear, m, None, out), floor_db=20.0)  # fmt: skip


def _build_linear(m: Matrix, q: QParams | None, out: QParams | None) -> Callable[..., Tensor]:
    from graphwright.kernels.linear_int8 import apply, pack

    assert m.int_weight is not None
    weight = m.int_weight
    ready = packed(lambda: pack(weight.values, weight.scales, m.bias), "llvm int8", weight.values, weight.scales, m.bias)
    scale, zero = (1.0, 0) if q is None else (q.scale, q.zero_point)
    x, other, name, scalars, grid = m.x, m.other, m.activation, m.scalars, _grid(out)
    if other is None:
        return lambda *r: apply(r[x], scale, zero, ready, None, name, scalars, *grid)
    return lambda *r: apply(r[x], scale, zero, ready, r[other], name, scalars, *grid)


def _weight_only(work: Work, m: Matrix) -> Iterator[Candidate]:
    from graphwright.kernels.activations import unfit_epilogue
    from graphwright.kernels.linear_w8 import apply, pack

    if unfit_epilogue(m.activation, None if m.other is None else work.val(m.other).dtype):
        return

    def build() -> Callable[..., Tensor]:
        assert m.int_weight is not None
        weight = m.int_weight
        ready = packed(lambda: pack(weight.values, weight.scales, m.bias), "llvm w8", weight.values, weight.scales, m.bias)
        x, other, name, scalars = m.x, m.other, m.activation, m.scalars
        return lambda *r: apply(r[x], ready, None if other is None else r[other], name, scalars)

    yield Candidate("llvm.w8", (NATIVE,) * len(work.reads), (NATIVE,), "int8", build, floor_db=90.0)


# -- convolution -------------------------------------------------------------------------------------------------------


def _convolution(work: Work, m: Matrix) -> Iterator[Candidate]:
    """Two-dimensional ones, from uint8; the residual as integers where it is read so."""
    q = work.read_qparams[m.x] if work.reads[m.x].quantized else None
    if q is None or q.dtype != torch.uint8 or m.rank != 2 or work.val(m.x).dim() != 4:
        return
    other, form, dtype = None, NATIVE_LAST, None
    if m.other is not None:
        dtype = work.val(m.other).dtype
        if work.reads[m.other].quantized and work.read_qparams[m.other].dtype in _BYTES:  # type: ignore[union-attr]
            other, form = work.read_qparams[m.other], Q_LAST
    build = _builder(m, dtype)
    if build is None:
        return
    needs = tuple(Q_LAST if k == m.x else form if k == m.other else NATIVE for k in range(len(work.reads)))
    for given, tag, out in _outs(work, last=True):
        yield Candidate(f"llvm.int8-{tag}", needs, (given,), "int8", functools.partial(_build_convolution, build, m, q, other, out))


def _builder(m: Matrix, other: torch.dtype | None) -> Callable[..., Callable[..., Tensor]] | None:
    """What makes the convolution that serves this one: ``(x_scale, x_zero_point, *the arguments from other's scale on)``. None: none serves it."""
    from graphwright.kernels import conv2d_int8, conv2d_int8_depthwise, conv2d_int8_groups

    assert m.int_weight is not None
    held, shape = (m.int_weight.values, m.int_weight.scales, m.bias), tuple(m.weight.shape)
    if conv2d_int8_depthwise.unfit_rest(shape, m.groups, m.padding, m.activation, other, None) is None:
        return lambda scale, zero, *rest: conv2d_int8_depthwise.Convolution(conv2d_int8_depthwise.pack(*held), scale, zero, m.stride, m.padding, m.dilation, *rest)
    if m.groups == 1 and all(d == 1 or k == 1 for d, k in zip(m.dilation, shape[2:], strict=True)):
        if conv2d_int8.unfit_rest(shape, m.activation, other, None):
            return None
        return lambda scale, zero, *rest: conv2d_int8.Convolution(conv2d_int8.pack(*held), scale, zero, m.stride, m.padding, *rest)
    if conv2d_int8_groups.unfit_groups(shape, m.groups, m.activation, other, None):
        return None
    return lambda scale, zero, *rest: conv2d_int8_groups.Grouped(*held, scale, zero, m.stride, m.padding, m.dilation, m.groups, *rest)


def _build_convolution(
    build: Callable[..., Callable[..., Tensor]], m: Matrix, q: QParams, other: QParams | None, out: QParams | None
) -> Callable[..., Tensor]:
    residual = (1.0, 0) if other is None else (other.scale, other.zero_point)
    run = build(q.scale, q.zero_point, *residual, m.activation, m.scalars, *_grid(out), m.other is not None)
    x, o = m.x, m.other
    return (lambda *r: run(r[x])) if o is None else (lambda *r: run(r[x], r[o]))
