"""oneDNN through PyTorch: convolutions and linears with packed weights, fused activation and residual add."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphwright import ops
from graphwright.backends import llvm
from graphwright.backends.base import (
    HALF,
    NATIVE,
    NATIVE_LAST,
    Q_LAST,
    Candidate,
    Format,
    IntWeight,
    Q,
    QParams,
    Slot,
    Work,
    hint,
)  # fmt: skip
from graphwright.backends.packs import packed
from graphwright.measure import machine
from graphwright.ops.fused import activate

#: our activation names → oneDNN's (name, algorithm); what one of the three kinds of op does not take is left out below
_POST = {"none": ("none", ""), "relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", ""),
         "hardswish": ("hardswish", ""), "hardtanh": ("hardtanh", ""), "leaky_relu": ("leaky_relu", ""), "tanh": ("tanh", ""),
         "sigmoid": ("sigmoid", ""), "hardsigmoid": ("hardsigmoid", "")}  # fmt: skip
_QLINEAR_POST = {"none", "relu", "gelu", "gelu_tanh", "silu", "hardswish", "hardtanh", "leaky_relu", "tanh"}
_QCONV_POST = {"none", "relu", "silu", "hardswish", "hardtanh"}


#: its kernels are for tensors there
DEVICES = ("cpu",)


@functools.cache
def reason() -> str | None:
    """None, or why oneDNN can't be used."""
    return None if torch.backends.mkldnn.is_available() else "this build of torch has no oneDNN"


@functools.cache
def no_float16() -> str | None:
    """None, or why products of float16 are no match for float32's: ATen then has loops of scalars for them, oneDNN nothing."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    if reason() is None and supported is not None and supported():
        return None
    return "this processor multiplies no float16 (that takes AVX512-FP16 or AMX): products would be loops over scalars"


def _halves(allowed: frozenset[str]) -> list[str]:
    """The half precisions that are allowed, and that oneDNN multiplies here."""
    return [k for k in HALF if k in allowed and (k != "fp16" or no_float16() is None)]


@functools.cache
def int8_reason() -> str | None:
    """None, or why int8 products would be slow or wrong: without VNNI, u8·s8 pairs saturate in 16 bits."""
    if reason():
        return reason()
    if not any(f in machine().get("flags", ()) for f in ("avx512_vnni", "avx_vnni", "amx_int8")):
        return "the processor has no VNNI: int8 products saturate"
    return None


@dataclass(frozen=True)
class Matrix:
    """A linear or convolution with constant weight, whichever op spells it."""

    conv: bool
    x: int
    weight: Tensor
    int_weight: IntWeight | None
    bias: Tensor | None
    other: int | None
    activation: str
    scalars: tuple[float, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def rank(self) -> int:
        return self.weight.dim() - 2


def matrix(work: Work) -> Matrix | None:
    """The work as a matrix op, or None where it is none or its weight is no constant."""
    if work.op not in ("graphwright.linear", "graphwright.conv", "aten.linear", "aten.conv1d", "aten.conv2d", "aten.conv3d"):
        return None
    a = work.named
    x, weight, bias = a.get("x", a.get("input")), a["weight"], a["bias"]
    if not isinstance(x, Slot) or not isinstance(weight, Tensor) or isinstance(bias, Slot):
        return None
    other = a.get("other")
    if isinstance(other, Tensor):
        return None
    conv = "conv" in work.op
    rank = weight.dim() - 2
    spread = lambda v: tuple(int(i) for i in (v if len(v) == rank else list(v) * rank)) if conv else ()
    return Matrix(conv, x.index, weight, work.weights.get("weight"), bias, other.index if isinstance(other, Slot) else None,
                  a.get("activation", "none"), tuple(float(s) for s in a.get("scalars", ())),
                  *((spread(a["stride"]), spread(a["padding"]), spread(a["dilation"]), int(a["groups"])) if conv else ()))  # fmt: skip


def candidates(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Packed float32, half precision and int8 forms of one linear or convolution."""
    m = None if reason() else matrix(work)
    if m is None or not work.is_float or m.weight.numel() == 0 or not _float32(work, m):
        return
    if m.conv and m.rank in (1, 2, 3):
        yield from _float_conv(work, m, allowed)
        if "int8" in allowed and m.rank == 2:
            yield from _int8_conv(work, m)
    elif not m.conv:
        yield from _float_linear(work, m, allowed)
        if "int8" in allowed:
            yield from _int8_linear(work, m)


def _float32(work: Work, m: Matrix) -> bool:
    values = [work.val(m.x), *([work.val(m.other)] if m.other is not None else [])]
    return m.weight.dtype == torch.float32 and all(v.dtype == torch.float32 for v in values)


def _needs(work: Work, m: Matrix, x: Format, other: Format) -> tuple[Format, ...]:
    return tuple(x if k == m.x else other if k == m.other else NATIVE for k in range(len(work.reads)))


def _batch(work: Work, m: Matrix) -> int:
    """Rows of the product at the example inputs."""
    return max(1, math.prod(hint(s) for s in work.val(m.x).shape[:-1]))


def _shape(work: Work, m: Matrix) -> list[int]:
    return [hint(s) for s in work.val(m.x).shape]


def _finish(m: Matrix, fused: bool) -> Callable[[Tensor], Tensor]:
    """The activation, where the kernel did not fuse it."""
    if fused or m.activation == "none":
        return lambda y: y
    name, scalars = m.activation, m.scalars  # not m itself: it holds the weight
    return lambda y: activate(y, name, scalars)


# -- float ------------------------------------------------------------------------------------------------------------


def _float_conv(work: Work, m: Matrix, allowed: frozenset[str]) -> Iterator[Candidate]:
    for precision in ("f32", *_halves(allowed)):
        kind = "native" if precision == "f32" else precision
        plain, last = Format(kind), Format(kind, "last")
        build = functools.partial(_build_float_conv, work, m, HALF.get(precision, torch.float32))
        if m.rank in (2, 3):
            sums = _last_reader(work, m)
            yield Candidate(f"onednn.{precision}-sum-last" if sums else f"onednn.{precision}-last", _needs(work, m, last, last), (last,),
                            precision, functools.partial(build, in_place=sums), clobbers=m.other if sums else None)  # fmt: skip
        yield Candidate(f"onednn.{precision}", _needs(work, m, plain, plain), (plain,), precision, build)


def _last_reader(work: Work, m: Matrix) -> bool:
    """Whether the residual is made by the program, of the result's shape, and read by nothing after this work."""
    if m.other in (None, m.x) or m.activation not in ("none", "relu"):
        return False
    value = work.reads[m.other].value
    row = ops.row(value.target) if value.op == "call_function" else None
    return (row is not None and ops.VIEW not in row.traits and work.static and value.meta["val"].shape == work.out.shape
            and all(user is work.node or user < work.node for user in value.users))  # fmt: skip


def _build_float_conv(work: Work, m: Matrix, dtype: torch.dtype, in_place: bool = False) -> Callable[..., Tensor]:
    shape = _shape(work, m)
    if m.rank == 1:  # a picture one row high: what it gives is channels last, and what follows reads it so
        flat = replace(m, weight=m.weight.unsqueeze(2), stride=(1, *m.stride), padding=(0, *m.padding), dilation=(1, *m.dilation))
        run, tensors = _build_packed_conv(flat, dtype, in_place, [*shape[:-1], 1, shape[-1]]), (m.x, m.other)
        return lambda *r: run(*[v.unsqueeze(-2) if k in tensors else v for k, v in enumerate(r)]).squeeze(-2)
    return _build_packed_conv(m, dtype, in_place, shape)


def _build_packed_conv(m: Matrix, dtype: torch.dtype, in_place: bool, shape: list[int]) -> Callable[..., Tensor]:
    weight = torch.ops.mkldnn._reorder_convolution_weight(
        m.weight.detach().to(dtype).contiguous(), list(m.padding), list(m.stride), list(m.dilation), m.groups, shape)  # fmt: skip
    bias = None if m.bias is None else m.bias.to(dtype)
    pad, stride, dilation, groups, x, other = list(m.padding), list(m.stride), list(m.dilation), m.groups, m.x, m.other
    name, algorithm = _POST.get(m.activation, ("none", ""))
    scalars: list[float | None] = list(m.scalars)
    if other is None:
        fused = m.activation in _POST
        finish, call = _finish(m, fused), torch.ops.mkldnn._convolution_pointwise.default
        post = name if fused else "none"
        if fused or m.activation == "none":
            return lambda *r: call(r[x], weight, bias, pad, stride, dilation, groups, post, scalars, algorithm)
        return lambda *r: finish(call(r[x], weight, bias, pad, stride, dilation, groups, "none", [], ""))
    fused = m.activation in ("none", "relu")
    unary = "relu" if m.activation == "relu" else None
    if in_place:  # the sums start from the residual, which spares a pass over a third tensor
        add = torch.ops.mkldnn._convolution_pointwise_.binary
        return lambda *r: add(r[other], r[x], weight, bias, pad, stride, dilation, groups, "add", 1.0, unary, [], "")
    finish, binary = _finish(m, fused), torch.ops.mkldnn._convolution_pointwise.binary
    return lambda *r: finish(binary(r[x], r[other], weight, bias, pad, stride, dilation, groups, "add", 1.0, unary, [], ""))


def _float_linear(work: Work, m: Matrix, allowed: frozenset[str]) -> Iterator[Candidate]:
    needs = _needs(work, m, NATIVE, NATIVE)
    yield Candidate("onednn.f32", needs, (NATIVE,), "f32", functools.partial(_build_float_linear, work, m, torch.float32))
    if torch.backends.mkl.is_available() and work.static:
        yield Candidate("mkl.f32", needs, (NATIVE,), "f32", functools.partial(_build_mkl_linear, work, m))
        if _more_than_product(m) and llvm.reason() is None:
            yield Candidate("mkl.f32-finish", needs, (NATIVE,), "f32", functools.partial(_build_finished_linear, work, m))
    elif not work.static:  # packed for one number of rows the weight serves no other: as it is it serves all alike
        yield Candidate("aten.linear", needs, (NATIVE,), "f32", functools.partial(_build_plain_linear, m))
    for kind in _halves(allowed):
        yield Candidate(f"onednn.{kind}", _needs(work, m, Format(kind), Format(kind)), (Format(kind),), kind,
                        functools.partial(_build_float_linear, work, m, HALF[kind]))  # fmt: skip


def _build_float_linear(work: Work, m: Matrix, dtype: torch.dtype) -> Callable[..., Tensor]:
    # the number of rows only steers which blocked layout oneDNN picks
    weight = packed(lambda: torch.ops.mkldnn._reorder_linear_weight(m.weight.detach().to(dtype).contiguous(), _batch(work, m)), f"onednn {dtype}", m.weight)
    bias = None if m.bias is None else m.bias.to(dtype)
    x, other = m.x, m.other
    if other is None:
        fused = m.activation in _POST
        name, algorithm = _POST[m.activation] if fused else ("none", "")
        scalars: list[float | None] = list(m.scalars) if fused else []
        finish, call = _finish(m, fused), torch.ops.mkldnn._linear_pointwise.default
        if fused:
            return lambda *r: call(r[x], weight, bias, name, scalars, algorithm)
        return lambda *r: finish(call(r[x], weight, bias, "none", [], ""))
    finish, binary = _finish(m, False), torch.ops.mkldnn._linear_pointwise.binary
    return lambda *r: finish(binary(r[x], r[other].contiguous(), weight, bias, "add"))


def _build_plain_linear(m: Matrix) -> Callable[..., Tensor]:
    call, weight, bias, x, other = torch._C._nn.linear, m.weight.detach(), m.bias, m.x, m.other
    finish = _finish(m, False)
    if other is None:
        return (lambda *r: call(r[x], weight, bias)) if m.activation == "none" else (lambda *r: finish(call(r[x], weight, bias)))
    return lambda *r: finish(call(r[x], weight, bias).add_(r[other]))


def _build_mkl_linear(work: Work, m: Matrix) -> Callable[..., Tensor]:
    product, other, finish = _mkl_product(work, m, m.bias), m.other, _finish(m, False)
    if other is None:
        return lambda *r: finish(product(*r))
    return lambda *r: finish(product(*r).add_(r[other]))


def _mkl_product(work: Work, m: Matrix, bias: Tensor | None) -> Callable[..., Tensor]:
    batch, x = _batch(work, m), m.x
    weight = m.weight.detach().contiguous()
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, batch)
    call = torch.ops.mkl._mkl_linear.default
    return lambda *r: call(r[x], packed, weight, bias, batch)


def _more_than_product(m: Matrix) -> bool:
    """Whether there is a bias, a residual or an activation, in float32 and known to our kernels."""
    from graphwright.kernels.finish import unfit

    plain = m.bias is None and m.other is None and m.activation == "none"
    return not plain and unfit(m.activation) is None and (m.bias is None or m.bias.dtype == torch.float32)


def _build_finished_linear(work: Work, m: Matrix) -> Callable[..., Tensor]:
    """The bare product, and all that follows it in one pass over its memory: MKL would write a bias to every row first."""
    from graphwright.kernels.finish import Finish

    product, finish, other = _mkl_product(work, m, None), Finish(m.bias, m.activation, m.scalars), m.other
    if other is None:
        return lambda *r: finish(product(*r))
    return lambda *r: finish(product(*r), r[other])


# -- int8 -------------------------------------------------------------------------------------------------------------


def _quantized(work: Work, m: Matrix) -> QParams | None:
    """The parameters of the input where an int8 product is possible: quantized input, symmetric per-channel weight."""
    if int8_reason() or m.int_weight is None or not work.reads[m.x].quantized:
        return None
    if not m.int_weight.plain:
        return None
    return work.read_qparams[m.x]


def _channel_scales(m: Matrix) -> tuple[Tensor, Tensor]:
    assert m.int_weight is not None
    scales = m.int_weight.scales.detach().float().contiguous()
    if scales.numel() == 1 and m.weight.shape[0] != 1:
        scales = scales.expand(m.weight.shape[0]).contiguous()
    return scales, torch.zeros(scales.numel(), dtype=torch.int32)


def _targets(work: Work, last: bool) -> Iterator[tuple[Format, float, int, torch.dtype]]:
    """Result forms: float, and the value's own integers where it has them (unsigned ones: oneDNN's post-ops want those)."""
    yield (NATIVE_LAST if last else NATIVE), 1.0, 0, torch.float32
    q = work.qparams
    if q is not None and q.dtype in (torch.uint8, torch.int8) and (q.low, q.high) == ((0, 255) if q.dtype == torch.uint8 else (-128, 127)):
        yield (Q_LAST if last else Q), q.scale, q.zero_point, q.dtype


def _int8_linear(work: Work, m: Matrix) -> Iterator[Candidate]:
    q = _quantized(work, m)
    if q is None:
        return
    for fmt, scale, zero, dtype in _targets(work, last=False):
        if m.other is not None and m.activation not in ("none", "relu"):
            continue
        if m.activation not in _QLINEAR_POST and fmt != NATIVE:
            continue
        build = functools.partial(_build_int8_linear, work, m, q, scale, zero, dtype)
        yield Candidate(f"onednn.int8-{'q' if fmt == Q else 'f32'}", _needs(work, m, Q, NATIVE), (fmt,), "int8", build)
    finish = llvm.kernel("graphwright.activate_quantize")
    if finish is not None and work.qparams is not None and m.activation != "none" and m.other is None:
        # a product with a plain epilogue, then activation and rounding in one pass: oneDNN's own GELU is slow
        build = functools.partial(_build_split_linear, work, m, q, work.qparams, finish)
        yield Candidate("onednn.int8-split-q", _needs(work, m, Q, NATIVE), (Q,), "int8", build)


def _build_split_linear(work: Work, m: Matrix, q: QParams, out: QParams, finish: Callable[..., Tensor]) -> Callable[..., Tensor]:
    product = _build_int8_linear(work, replace(m, activation="none", scalars=()), q, 1.0, 0, torch.float32)
    name, scalars = m.activation, m.scalars
    return lambda *r: finish(product(*r), None, None, name, scalars, out.scale, out.zero_point, out.low, out.high, out.dtype)


def _build_int8_linear(work: Work, m: Matrix, q: QParams, scale: float, zero: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    assert m.int_weight is not None
    # the shape only steers which blocked layout oneDNN picks
    values = m.int_weight.values
    prepacked = packed(lambda: torch.ops.onednn.qlinear_prepack(values.detach().contiguous(), [_batch(work, m), m.weight.shape[1]]), "onednn int8", values)
    scales, zeros = _channel_scales(m)
    x, other, bias, xs, xz = m.x, m.other, m.bias, q.scale, q.zero_point
    if other is not None:
        call, unary = torch.ops.onednn.qlinear_pointwise.binary, m.activation
        return lambda *r: call(r[x], xs, xz, prepacked, scales, zeros, r[other].contiguous(), bias, scale, zero, dtype, 1.0, 0,
                               "add", 1.0, unary, [], "")  # fmt: skip
    fused = m.activation in _QLINEAR_POST
    name, algorithm = _POST[m.activation] if fused else ("none", "")
    post_scalars: list[float | None] = list(m.scalars) if fused else []
    call, finish = torch.ops.onednn.qlinear_pointwise.default, _finish(m, fused)
    if fused:
        return lambda *r: call(r[x], xs, xz, prepacked, scales, zeros, bias, scale, zero, dtype, name, post_scalars, algorithm)
    return lambda *r: finish(call(r[x], xs, xz, prepacked, scales, zeros, bias, 1.0, 0, torch.float32, "none", [], ""))


def _int8_conv(work: Work, m: Matrix) -> Iterator[Candidate]:
    q = _quantized(work, m)
    if q is None or q.dtype != torch.uint8:
        return
    for fmt, scale, zero, dtype in _targets(work, last=True):
        tag = "q" if fmt == Q_LAST else "f32"
        if m.other is None:
            if m.activation not in _QCONV_POST and fmt == Q_LAST:
                continue
            build = functools.partial(_build_int8_conv, work, m, q, scale, zero, dtype, None)
            yield Candidate(f"onednn.int8-{tag}", _needs(work, m, Q_LAST, NATIVE), (fmt,), "int8", build)
            continue
        if m.activation not in ("none", "relu") or m.other == m.x:
            continue
        # the residual is accumulated in place, in the dtype of the result
        other = work.read_qparams[m.other] if work.reads[m.other].quantized else None
        if fmt == Q_LAST and other is not None and other.dtype == dtype:
            build = functools.partial(_build_int8_conv, work, m, q, scale, zero, dtype, other)
            yield Candidate(f"onednn.int8-{tag}", _needs(work, m, Q_LAST, Q_LAST), (fmt,), "int8", build, clobbers=m.other)
        if fmt == NATIVE_LAST:
            build = functools.partial(_build_int8_conv, work, m, q, scale, zero, dtype, QParams(1.0, 0, 0, 0, torch.float32))
            yield Candidate(f"onednn.int8-{tag}", _needs(work, m, Q_LAST, NATIVE_LAST), (fmt,), "int8", build, clobbers=m.other)


def _build_int8_conv(work: Work, m: Matrix, q: QParams, scale: float, zero: int, dtype: torch.dtype,
                     accumulator: QParams | None) -> Callable[..., Tensor]:  # fmt: skip
    assert m.int_weight is not None
    scales, zeros = _channel_scales(m)
    pad, stride, dilation, groups = list(m.padding), list(m.stride), list(m.dilation), m.groups
    packed = torch.ops.onednn.qconv_prepack(
        m.int_weight.values.detach().contiguous(), scales, q.scale, q.zero_point, stride, pad, dilation, groups, _shape(work, m))  # fmt: skip
    x, other, bias, xs, xz = m.x, m.other, m.bias, q.scale, q.zero_point
    if accumulator is not None:
        call, unary = torch.ops.onednn.qconv2d_pointwise.binary, "relu" if m.activation == "relu" else "none"
        os, oz = accumulator.scale, accumulator.zero_point
        return lambda *r: call(r[x], xs, xz, packed, scales, zeros, r[other], bias, stride, pad, dilation, groups, scale, zero,
                               dtype, os, oz, "sum", 1.0, unary, [], "")  # fmt: skip
    fused = m.activation in _QCONV_POST
    name, algorithm = _POST[m.activation] if fused else ("none", "")
    post_scalars: list[float | None] = list(m.scalars) if fused else []
    call, finish = torch.ops.onednn.qconv_pointwise.default, _finish(m, fused)
    if fused:
        return lambda *r: call(r[x], xs, xz, packed, scales, zeros, bias, stride, pad, dilation, groups, scale, zero, dtype,
                               name, post_scalars, algorithm)  # fmt: skip
    return lambda *r: finish(call(r[x], xs, xz, packed, scales, zeros, bias, stride, pad, dilation, groups, 1.0, 0,
                                  torch.float32, "none", [], ""))  # fmt: skip


__all__ = ["Matrix", "candidates", "int8_reason", "matrix", "reason"]
