"""Fused ops that only lowering emits: what the CPU kernels beside the matrix ops compute. References in plain torch.

Conventions. ``real = (q - zero_point) * scale`` for quantized inputs; float tensors carry scale 1.0 and zero point 0.
``dtype`` says what comes out: ``torch.uint8`` or ``torch.int8`` is quantized with ``scale, zero_point, low, high`` as
``graphwright.quantize`` does it; a floating dtype (None: float32) is the real value, and those four are ignored.
Arithmetic is float32 whatever float dtype comes in (float64 for float64, which is how the oracle runs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.errors import InternalError
from graphwright.ops.dynamic import quantize_dynamic
from graphwright.ops.fused import activate, quantize
from graphwright.ops.registry import CONTRACTION, ELEMENTWISE, NORM, POOL, QUANT, SOFTMAX, op


def _work(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _linear_axes(**args: Any) -> str:
    rows = sum(args.get(name) is not None for name in ("x_scales", "x_zero_points"))
    return "* i, o i, o" + (", o" if args["bias"] is not None else "") + (", * o" if args["other"] is not None else "") + ", * 1" * rows + " -> * o"


def _real(x: Tensor, scale: float, zero_point: int, work: torch.dtype) -> Tensor:
    """The float tensor behind x: itself, widened, where it is floating."""
    return x.to(work) if x.is_floating_point() else (x.to(work) - zero_point) * scale


def _emit(y: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None) -> Tensor:
    """y as the caller wants it; see the module's docstring. May be y itself."""
    if dtype is None or dtype.is_floating_point:
        # float64 stays: it only comes from float64 inputs, where the caller wants the oracle's precision
        return y if y.dtype == torch.float64 else y.to(dtype or torch.float32)
    return quantize(y, scale, zero_point, low, high, dtype)


def _own(y: Tensor, *inputs: Tensor | None) -> Tensor:
    """y, or a copy where it may share memory with an input (a custom op must not return its input)."""
    shared = y._base is not None or any(y is x for x in inputs)
    return y.clone() if shared else y


def _laid_out(y: Tensor, like: Tensor) -> Tensor:
    """y in ``output_format(like)``, down to the strides of axes of size 1, which ``contiguous`` leaves as they are."""
    layout = output_format(like)
    y = y.contiguous(memory_format=layout)
    return y.clone(memory_format=layout) if 1 in y.shape else y


def output_format(x: Tensor) -> torch.memory_format:
    """Layout of an elementwise result: channels_last for 4-D inputs that are exactly that, else contiguous."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


# -- normalization ---------------------------------------------------------------------------------------------------


def normalized(total: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """Layer norm (or RMS norm) over the last axis, in the dtype of ``total``."""
    centred = total if rms else total - total.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


@op("graphwright.norm_quantize", traits={NORM, QUANT})
def norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool,
    want_sum: bool, want_float: bool, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    """Layer norm (or RMS norm) of ``x + residual`` over the last axis, as float, quantized, or both.

    ``x [*, c]`` float, ``residual`` the same shape or None, ``weight [c]``, ``bias [c]``. Gives those wanted of
    ``[x + residual, normed, quantize(normed)]``, in this order, each ``[*, c]``, contiguous: the first two float32; the
    last where ``dtype`` is uint8 or int8.
    """
    total = x.to(_work(x))
    if residual is not None:
        total = total + residual.to(total.dtype)
    normed = normalized(total, weight, bias, eps, rms)
    out = [_own(total, x).contiguous()] if want_sum else []
    if want_float:
        out.append(normed.contiguous())
    if dtype is not None:
        out.append(quantize(normed, scale, zero_point, low, high, dtype).contiguous())
    return out


@op("graphwright.embed_norm_quantize", traits={NORM, QUANT})
def embed_norm_quantize(
    indices: Sequence[Tensor], tables: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None, eps: float,
    rms: bool, want_sum: bool, want_float: bool, scale: float, zero_point: int, low: int, high: int,
    dtype: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    """Sum of embedding rows, then ``norm_quantize``: ``sum_k tables[k][indices[k]]``.

    ``indices[k]`` integer, broadcastable with each other to ``[*]``; ``tables[k] [rows_k, c]``. Results ``[*, c]``.

    Raises:
        IndexError: an index lies outside its table.
    """
    total = F.embedding(indices[0], tables[0])
    for index, table in zip(indices[1:], tables[1:], strict=True):
        total = total + F.embedding(index, table)
    return norm_quantize(
        total, None, weight, bias, eps, rms, want_sum, want_float, scale, zero_point, low, high, dtype
    )  # fmt: skip


# -- elementwise -----------------------------------------------------------------------------------------------------


@op("graphwright.activate_quantize", traits={ELEMENTWISE, QUANT})
def activate_quantize(
    x: Tensor, other: Tensor | None, gate: Tensor | None, activation: str, scalars: Sequence[float],
    scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """``activation(x + other, *scalars) * gate``, quantized or as float.

    ``x`` float of any strides; ``other`` and ``gate`` float, broadcastable to x's shape. The result has x's shape and is
    contiguous, or channels_last where x is (``output_format``).
    """
    y = x.to(_work(x))
    if other is not None:
        y = y + other.to(y.dtype)
    y = activate(y, activation, scalars)
    if gate is not None:
        y = y * gate.to(y.dtype)
    return _own(_laid_out(_emit(y, scale, zero_point, low, high, dtype), x), x, other, gate)


@op("graphwright.add_quantize", traits={ELEMENTWISE, QUANT})
def add_quantize(
    x: Tensor, x_scale: float, x_zero_point: int, other: Tensor, other_scale: float, other_zero_point: int,
    activation: str, scalars: Sequence[float], scale: float, zero_point: int, low: int, high: int,
    dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """``activation(real(x) + real(other))``, quantized or as float: a residual addition between quantized tensors.

    Each input is uint8, int8 or float; ``other`` is broadcastable to x's shape. Layout as in ``activate_quantize``.
    """
    work = torch.float64 if torch.float64 in (x.dtype, other.dtype) else torch.float32
    y = _real(x, x_scale, x_zero_point, work) + _real(other, other_scale, other_zero_point, work)
    y = activate(y, activation, scalars)
    return _laid_out(_emit(y, scale, zero_point, low, high, dtype), x)


# -- linear ----------------------------------------------------------------------------------------------------------


@op("graphwright.linear_int8", axes=_linear_axes, traits={CONTRACTION, QUANT})
def linear_int8(
    x: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scales: Tensor, bias: Tensor | None,
    other: Tensor | None, activation: str, scalars: Sequence[float],
    scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None,
    x_scales: Tensor | None, x_zero_points: Tensor | None,
) -> Tensor:  # fmt: skip
    """``activation(real(x) @ (weight * weight_scales).T + bias + other)``, quantized or as float.

    ``x [*, i]`` comes in one of three forms (a form's arguments are ignored in the others):
    uint8 or int8 under one scale and zero point, ``x_scale`` and ``x_zero_point``;
    uint8 or int8 with ``x_scales [*, 1]`` floating and ``x_zero_points [*, 1]`` int32 (None: 0), as ``quantize_rows`` and ``quantize_dynamic`` give them;
    or float, which is quantized row by row first, as ``quantize_dynamic`` does it from 0 to 255.

    ``weight [o, i]`` int8, ``weight_scales [o]``, ``bias [o]``, ``other [*, o]`` float; gives ``[*, o]``, contiguous.
    """
    work = torch.float64 if weight_scales.dtype == torch.float64 else torch.float32
    if x.is_floating_point():
        x, x_scales, x_zero_points = quantize_dynamic(x, True, False, 0, 255, torch.uint8)
    rows = _real(x, x_scale, x_zero_point, work) if x_scales is None else _real_rows(x, x_scales, x_zero_points, work)
    y = F.linear(rows, weight.to(work) * weight_scales.to(work)[:, None], None if bias is None else bias.to(work))
    if other is not None:
        y = y + other.to(work)
    return _own(_emit(activate(y, activation, scalars), scale, zero_point, low, high, dtype).contiguous())


def _real_rows(q: Tensor, scales: Tensor, zero_points: Tensor | None, work: torch.dtype) -> Tensor:
    """The float tensor behind integers with a scale per row."""
    return (q.to(work) if zero_points is None else q.to(work) - zero_points.to(work)) * scales.to(work)


@op("graphwright.linear_w8", axes=_linear_axes, traits={CONTRACTION, QUANT})
def linear_w8(
    x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float],
) -> Tensor:  # fmt: skip
    """``activation(x @ (weight * weight_scales).T + bias + other)`` with ``weight [o, i]`` int8, all else float; gives ``[*, o]``."""
    work = _work(x)
    y = F.linear(x.to(work), weight.to(work) * weight_scales.to(work)[:, None], None if bias is None else bias.to(work))
    return _own(activate(y if other is None else y + other.to(work), activation, scalars).contiguous())


def _conv_axes(**args: Any) -> str:
    i, o = ("(g i)", "(g o)") if args.get("groups", 1) != 1 else ("i", "o")
    scales = f", {o}" if "weight_scales" in args else ""
    spelled = f"n {i} h w, {o} i kh kw{scales}" + (f", {o}" if args["bias"] is not None else "") + (f", n {o} y x" if args["other"] is not None else "")
    return f"{spelled} -> n {o} y x"


@op("graphwright.conv2d_int8", axes=_conv_axes, traits={CONTRACTION, QUANT})
def conv2d_int8(
    x: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scales: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, other: Tensor | None, other_scale: float,
    other_zero_point: int, activation: str, scalars: Sequence[float], scale: float, zero_point: int, low: int, high: int,
    dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """``activation(conv2d(real(x), weight * weight_scales) + bias + real(other))``, quantized or as float.

    ``x [n, groups * i, h, w]`` uint8 or int8, ``weight [o, i, kh, kw]`` int8, ``weight_scales [o]``, ``bias [o]``; ``other`` uint8,
    int8 or float, ``(other - other_zero_point) * other_scale``, in the shape of the result ``[n, o, h', w']``, which is channels_last.
    Zeros are padded on both sides.
    """
    work = torch.float64 if weight_scales.dtype == torch.float64 else torch.float32
    real_weight = weight.to(work) * weight_scales.to(work)[:, None, None, None]
    rows, offset = _real(x, x_scale, x_zero_point, work), None if bias is None else bias.to(work)
    y = F.conv2d(rows, real_weight, offset, list(stride), list(padding), list(dilation), groups)
    if other is not None:
        y = y + (other.to(work) - other_zero_point) * other_scale
    return _emit(activate(y, activation, scalars), scale, zero_point, low, high, dtype).clone(memory_format=torch.channels_last)


@op("graphwright.conv2d_winograd", axes=_conv_axes, traits={CONTRACTION})
def conv2d_winograd(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], other: Tensor | None, activation: str, scalars: Sequence[float],
) -> Tensor:  # fmt: skip
    """``activation(conv2d(x, weight) + bias + other)`` with windows of 3x3 and steps of one pixel, all float.

    ``x [n, i, h, w]``, ``weight [o, i, 3, 3]``, ``bias [o]``; ``other`` in the shape of the result ``[n, o, h', w']``, which is
    channels_last. Zeros are padded on both sides.
    """
    work = _work(x)
    y = F.conv2d(x.to(work), weight.to(work), None if bias is None else bias.to(work), 1, list(padding))
    y = activate(y if other is None else y + other.to(work), activation, scalars)
    return y.clone(memory_format=torch.channels_last)


@op("graphwright.conv2d_depthwise", axes=lambda **a: f"n c h w, c _ kh kw{'' if a['bias'] is None else ', c'} -> n c y x", traits={CONTRACTION})
def conv2d_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    activation: str, scalars: Sequence[float],
) -> Tensor:  # fmt: skip
    """``activation(conv2d(x, weight) + bias)`` of each channel by itself, all float.

    ``x [n, c, h, w]``, ``weight [c, 1, k, l]``, ``bias [c]``; the result ``[n, c, h', w']`` is channels_last. Zeros are padded on both sides.
    """
    work = _work(x)
    offset = None if bias is None else bias.to(work)
    y = F.conv2d(x.to(work), weight.to(work), offset, list(stride), list(padding), list(dilation), groups=weight.shape[0])
    return activate(y, activation, scalars).clone(memory_format=torch.channels_last)


@op("graphwright.conv2d_separable", traits={CONTRACTION}, axes=lambda **a:
    f"n c h w, c _ kh kw{'' if a['bias'] is None else ', c'}, o c _ _{'' if a['second_bias'] is None else ', o'}{'' if a['other'] is None else ', n o y x'} -> n o y x")
def conv2d_separable(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], inner: str,
    inner_scalars: Sequence[float], second: Tensor, second_bias: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float],
) -> Tensor:  # fmt: skip
    """``conv2d_depthwise`` with the activation ``inner``, then ``activation(conv2d(·, second) + second_bias + other)``, all float.

    ``x [n, c, h, w]``, ``weight [c, 1, k, l]``, ``bias [c]``, ``second [o, c, 1, 1]``, ``second_bias [o]``, ``other [n, o, h', w']``; the result
    ``[n, o, h', w']`` is channels_last. Zeros are padded on both sides.
    """
    work = _work(x)
    z = conv2d_depthwise(x.to(work), weight, bias, stride, padding, dilation, inner, inner_scalars)
    y = F.conv2d(z, second.to(work), None if second_bias is None else second_bias.to(work))
    return activate(y if other is None else y + other.to(work), activation, scalars).clone(memory_format=torch.channels_last)


# -- softmax and attention -------------------------------------------------------------------------------------------


def _scores(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    if causal:
        rows, columns = scores.shape[-2:]
        later = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril().logical_not()
        scores = scores.masked_fill(later, -torch.inf)
    return scores


@op("graphwright.softmax", axes="* -> *", traits={SOFTMAX})
def softmax(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Softmax over the last axis of ``x * scale + mask``.

    ``x [*, r, c]`` float; ``mask`` float (added) or bool (False: left out), broadcastable to x's shape; ``causal``
    leaves out columns after the row's own number (``column > row``). Gives float32, contiguous. A row in which
    everything is -inf gives NaN, as ``torch.softmax`` does.
    """
    return torch.softmax(_scores(x.to(_work(x)) * scale, mask, causal), -1).contiguous()


@op("graphwright.attention", traits={SOFTMAX, QUANT})
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention_scale: float | None, causal: bool,
    merge: bool, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """Scaled dot product attention, quantized or as float.

    ``query [b, h, s, d]``, ``key [b, h, t, d]``, ``value [b, h, t, e]``, any strides (views of a merged buffer);
    key and value may have fewer heads, h a multiple of theirs. ``mask`` bool or float, broadcastable to ``[b, h, s, t]``;
    ``attention_scale`` None: ``d ** -0.5``. ``merge``: ``[b, s, h * e]`` instead of ``[b, h, s, e]``; contiguous. Rows with
    every key masked out are zeros, as ``scaled_dot_product_attention`` has them.
    """
    work = _work(query)
    query, key, value = query.to(work), key.to(work), value.to(work)
    if key.shape[1] != query.shape[1]:
        if query.shape[1] % key.shape[1]:
            raise InternalError(f"{query.shape[1]} query heads are no multiple of {key.shape[1]} key heads")
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
    factor = query.shape[-1] ** -0.5 if attention_scale is None else attention_scale
    scores = _scores(query @ key.transpose(-2, -1) * factor, mask, causal)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    y = torch.softmax(scores, -1).masked_fill(empty, 0.0) @ value
    y = y.transpose(1, 2).flatten(2) if merge else y
    return _own(_emit(y, scale, zero_point, low, high, dtype).contiguous())


#: Integers of the int8 products: symmetric, so that a scale is all that a row or column needs.
_LEVELS = 127


def _rounded(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """x as whole numbers from -127 to 127 (floating) with a scale along ``dim``, and that scale."""
    most = x.abs().amax(dim, keepdim=True)
    inverse = torch.where(most < 1e-30, 0.0, _LEVELS / most)
    return torch.round(x * inverse), most / _LEVELS


@op("graphwright.attention_int8", traits={SOFTMAX, QUANT})
def attention_int8(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention_scale: float | None, causal: bool,
    merge: bool, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """``attention`` whose products are those of 8-bit integers, with scales found at run time.

    Queries are rounded with a scale per row, keys (less their mean over the head, which softmax does not see) with one
    per row, values with one per column; the exponentials of the scores, from 0 to 1, to multiples of 1/255, by
    whose sum the result is divided. Arguments and result as for ``attention``.
    """
    work = _work(query)
    query, key, value = query.to(work), key.to(work), value.to(work)
    if key.shape[1] != query.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
    factor = query.shape[-1] ** -0.5 if attention_scale is None else attention_scale
    if not key.shape[2] or not query.numel():
        return attention(query, key, value, mask, factor, causal, merge, scale, zero_point, low, high, dtype)
    q, q_scale = _rounded(query, -1)
    k, k_scale = _rounded(key - key.mean(-2, keepdim=True), -1)
    v, v_scale = _rounded(value, -2)
    scores = _scores((q @ k.transpose(-2, -1)) * (q_scale * k_scale.transpose(-2, -1) * factor), mask, causal)
    top = scores.amax(-1, keepdim=True)
    p = torch.round(torch.exp(scores - top) * 255)
    y = (p @ v) * v_scale / p.sum(-1, keepdim=True)
    y = y.masked_fill(top == -torch.inf, 0.0)
    y = y.transpose(1, 2).flatten(2) if merge else y
    return _own(_emit(y, scale, zero_point, low, high, dtype).contiguous())


# -- pooling ---------------------------------------------------------------------------------------------------------


@op("graphwright.max_pool2d", traits={POOL, QUANT})
def max_pool2d(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:  # fmt: skip
    """Max pooling over windows of ``x [n, c, h, w]``: uint8, int8 or float; gives channels_last of x's dtype.

    All of ``kernel``, ``stride``, ``padding`` and ``dilation`` are pairs. Padding never wins.
    """
    wide = x if x.is_floating_point() else x.to(torch.float32)
    y = F.max_pool2d(wide, list(kernel), list(stride), list(padding), list(dilation), ceil_mode)
    return y.to(x.dtype).clone(memory_format=torch.channels_last)  # clone: these strides even where an axis is 1


@op("graphwright.mean_pool", traits={POOL, QUANT})
def mean_pool(
    x: Tensor, x_scale: float, x_zero_point: int, keep: bool,
    scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """Mean over height and width of ``x [n, c, h, w]`` (uint8, int8 or float): ``[n, c, 1, 1]``, or ``[n, c]`` unless ``keep``.

    Quantized or as float, contiguous.
    """
    y = _real(x, x_scale, x_zero_point, _work(x)).mean((-2, -1), keepdim=keep)
    return _emit(y, scale, zero_point, low, high, dtype).contiguous()
