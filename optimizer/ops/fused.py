"""Graphwright's own ops: contractions with what follows them, and the quantize / dequantize pairs.

The bodies are the reference in plain torch; kernels are measured against them. None of them ever returns an alias of
an input (``torch.library.custom_op`` forbids it).

Number format of quantized tensors: ``real = (q - zero_point) * scale``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from graphwright.errors import InternalError
from graphwright.ops.axes import names, same
from graphwright.ops.matrix import conv_axes
from graphwright.ops.registry import CAST, CONTRACTION, ELEMENTWISE, QUANT, op, resolve

Args = Mapping[str, Any]


@dataclass(frozen=True)
class Activation:
    """An elementwise function that may follow a contraction.

    Attributes:
        compute: ``(x, *scalars) -> Tensor``, always a fresh tensor.
        calls: the ATen ops that compute it, by name, each with ``(arguments by schema name) -> scalars``, or None
            where those arguments mean another function. The first is how it is spelled when it is taken apart again.
        arguments: ``(*scalars) -> keyword arguments`` of the first call.
    """

    compute: Callable[..., Tensor]
    calls: Mapping[str, Callable[[Args], tuple[float, ...] | None]]
    arguments: Callable[..., dict[str, Any]] = dict


def _plain(args: Args) -> tuple[float, ...]:
    return ()


def _when(**wanted: Any) -> Callable[[Args], tuple[float, ...] | None]:
    return lambda args: () if all(args.get(k, v) == v for k, v in wanted.items()) else None


def _numbers(*names: str, **wanted: Any) -> Callable[[Args], tuple[float, ...] | None]:
    """The named arguments as floats, provided that they are numbers and the ``wanted`` ones have these values."""

    def take(args: Args) -> tuple[float, ...] | None:
        found = [args.get(name) for name in names]
        plain = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in found)
        fits = plain and _when(**wanted)(args) is not None
        return tuple(map(float, found)) if fits else None  # type: ignore[arg-type]

    return take


_SELU = (1.6732632423543772, 1.0507009873554805)

#: Every activation that fused ops know, by name.
ACTIVATIONS: dict[str, Activation] = {
    "none": Activation(torch.clone, {"aten.clone": _when(memory_format=None)}),
    "relu": Activation(torch.relu, {
        "aten.relu": _plain,
        "aten.clamp_min": _when(min=0),
        "aten.clamp": lambda a: () if a.get("min") == 0 and a.get("max") is None else None,
    }),
    "gelu": Activation(F.gelu, {"aten.gelu": _when(approximate="none")}, lambda: {"approximate": "none"}),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"),
        {"aten.gelu": lambda a: () if a.get("approximate") == "tanh" else None},
        lambda: {"approximate": "tanh"},
    ),
    "silu": Activation(F.silu, {"aten.silu": _plain}),
    "sigmoid": Activation(torch.sigmoid, {"aten.sigmoid": _plain}),
    "tanh": Activation(torch.tanh, {"aten.tanh": _plain}),
    "hardswish": Activation(F.hardswish, {"aten.hardswish": _plain}),
    "hardsigmoid": Activation(F.hardsigmoid, {"aten.hardsigmoid": _plain}),
    "hardtanh": Activation(
        lambda x, low, high: torch.clamp(x, low, high),
        {"aten.hardtanh": _numbers("min_val", "max_val"), "aten.relu6": lambda a: (0.0, 6.0),
         "aten.clamp": _numbers("min", "max")},
        lambda low, high: {"min_val": low, "max_val": high},
    ),
    "leaky_relu": Activation(
        F.leaky_relu, {"aten.leaky_relu": _numbers("negative_slope")}, lambda slope: {"negative_slope": slope},
    ),
    "elu": Activation(F.elu, {"aten.elu": _numbers("alpha", scale=1, input_scale=1)}, lambda alpha: {"alpha": alpha}),
    "selu": Activation(F.selu, {
        "aten.selu": _plain,
        "aten.elu": _when(alpha=_SELU[0], scale=_SELU[1], input_scale=1),
    }),
    "mish": Activation(F.mish, {"aten.mish": _plain}),
    "softplus": Activation(
        lambda x, beta, threshold: F.softplus(x, beta, threshold),  # type: ignore[arg-type]
        {"aten.softplus": _numbers("beta", "threshold")},
        lambda beta, threshold: {"beta": beta, "threshold": threshold},
    ),
}  # fmt: skip


def activate(x: Tensor, activation: str, scalars: Sequence[float] = ()) -> Tensor:
    """``activation(x, *scalars)``: same shape and dtype; with ``"none"``, x itself.

    Raises:
        InternalError: there is no such activation.
    """
    if activation == "none":
        return x
    if activation not in ACTIVATIONS:
        raise InternalError(f"there is no activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation].compute(x, *scalars)


def activation_of(target: Any, args: Args) -> tuple[str, tuple[float, ...]] | None:
    """Name and scalars of the activation that an ATen call computes, or None.

    ``args`` are the call's arguments by schema name, complete.
    """
    for name, activation in ACTIVATIONS.items():
        for spelled, scalars in activation.calls.items():
            if name != "none" and resolve(spelled) is target and (found := scalars(args)) is not None:
                return name, found
    return None


def activation_call(activation: str, scalars: Sequence[float] = ()) -> tuple[OpOverload, dict[str, Any]]:
    """The ATen op and the keyword arguments (beside the input) that compute an activation on its own."""
    entry = ACTIVATIONS[activation]
    target = resolve(next(iter(entry.calls)))
    assert target is not None
    return target, entry.arguments(*scalars)


def _finish(y: Tensor, other: Tensor | None, activation: str, scalars: Sequence[float]) -> Tensor:
    return activate(y if other is None else y + other, activation, scalars)


@op("graphwright.linear", axes="* i, o i, o, * o -> * o", traits={CONTRACTION})
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float]
) -> Tensor:
    """Linear with bias, residual and activation: ``activation(x @ weight.T + bias + other)``.

    ``x [*, i]``, ``weight [o, i]``, ``bias [o]``, ``other`` broadcastable to ``[*, o]``; gives ``[*, o]``.
    """
    return _finish(F.linear(x, weight, bias), other, activation, scalars)


def _conv_axes(**args: Any) -> str:
    spatial = args["weight"].ndim - 2
    plain = conv_axes(spatial, args["x"].ndim == spatial + 2, args["groups"] != 1)
    left, result = plain.split(" -> ")
    words = re.findall(r"\(.*?\)|\S+", result)
    other = args["other"]
    return f"{left}, {' '.join(words[len(words) - (0 if other is None else other.ndim) :])} -> {result}"


@op("graphwright.conv", axes=_conv_axes, traits={CONTRACTION})
def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, other: Tensor | None, activation: str, scalars: Sequence[float],
) -> Tensor:  # fmt: skip
    """Convolution (1-d to 3-d, by ``weight.ndim``) with bias, residual and activation.

    ``x [n, g*i, *spatial]`` or ``[g*i, *spatial]``, ``weight [g*o, i, *kernel]``, ``bias [g*o]``; ``other`` is
    broadcastable to the result ``[n, g*o, *spatial']``. Padding is symmetric, with zeros, one number per spatial axis.
    """
    by_rank = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
    if weight.ndim not in by_rank:
        raise InternalError(f"graphwright.conv: the weight has {weight.ndim} axes, wanted 3, 4 or 5")
    y = by_rank[weight.ndim](x, weight, bias, stride, padding, dilation, groups)  # type: ignore[operator]
    return _finish(y, other, activation, scalars)


# -- quantize / dequantize -------------------------------------------------------------------------------------------


def _to_grid(real: Tensor, zero_point: Any, low: int, high: int, dtype: torch.dtype) -> Tensor:
    """Round, shift, saturate, cast. Re-run for a gradient, rounding passes it straight through."""
    near = torch.round(real)
    if real.requires_grad:
        near = near.detach() + (real - real.detach())
    shifted = torch.nan_to_num(near, nan=0.0) + (0 if zero_point is None else zero_point)
    return torch.clamp(shifted, low, high).to(dtype)


def _work_dtype(x: Tensor, low: int, high: int) -> torch.dtype:
    """float32, or float64 where float32 cannot hold every point of the grid."""
    return torch.float64 if x.dtype == torch.float64 or max(abs(low), abs(high)) > 1 << 24 else torch.float32


def _real_dtype(q: Tensor, dtype: torch.dtype) -> torch.dtype:
    wide = q.dtype in (torch.int32, torch.int64, torch.float64)
    return torch.float64 if wide or dtype == torch.float64 else torch.float32


def _spread(values: Tensor, like: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    """Scales or zero points in a shape that broadcasts with ``like``: one per channel, or one per block."""
    values = values.to(dtype)
    if values.ndim == 1:
        shape = [1] * like.ndim
        shape[axis] = values.shape[0]
        return values.reshape(shape)
    if values.ndim != like.ndim:
        raise InternalError(f"scales have {values.ndim} axes: wanted 1, or the tensor's {like.ndim} (one per block)")
    for k, (size, count) in enumerate(zip(like.shape, values.shape, strict=True)):
        if count not in (1, size):
            values = values.repeat_interleave(size // count, dim=k)
    return values


def _channel_axes(**args: Any) -> str:
    """One scale per index of an axis; or blocks: an axis of w is then (which block, where in it)."""
    x, scales = args["w"] if "w" in args else args["q"], args["scales"]
    axes = names(x.ndim)
    if scales.ndim == 1:
        return f"{' '.join(axes)}, {axes[args['axis']]}, {axes[args['axis']]} -> {' '.join(axes)}"
    scaled = ["1" if same(n, 1) else a for a, n in zip(axes, scales.shape, strict=True)]
    whole = [a if s != a or same(n, m) else f"({a} {a}_in)"
             for a, s, n, m in zip(axes, scaled, x.shape, scales.shape, strict=True)]  # fmt: skip
    return f"{' '.join(whole)}, {' '.join(scaled)}, {' '.join(scaled)} -> {' '.join(whole)}"


@op("graphwright.quantize", axes="* -> *", traits={QUANT, ELEMENTWISE, CAST},
    fake=lambda x, scale, zero_point, low, high, dtype: torch.empty_like(x, dtype=dtype))  # fmt: skip
def quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
    """Quantize with one scale: ``clamp(round_half_even(x / scale) + zero_point, low, high)`` as ``dtype``.

    Same shape as x. Infinities and everything else out of range saturate to ``low`` / ``high``; NaN becomes the
    zero point, which stands for 0.0. Arithmetic is float32 (float64 for float64 inputs and grids past 2^24).

    Gradient: straight through the rounding, zero where it saturates, provided that ``dtype`` is a floating one (the
    same grid, held in floats): PyTorch gives integer tensors no gradient. A program to be trained therefore carries
    its pairs with a floating ``dtype``, which changes no number that comes out of ``dequantize``.
    """
    return _to_grid(x.to(_work_dtype(x, low, high)) / scale, zero_point, low, high, dtype)


@op("graphwright.dequantize", axes="* -> *", traits={QUANT, ELEMENTWISE, CAST},
    fake=lambda q, scale, zero_point, dtype: torch.empty_like(q, dtype=dtype))  # fmt: skip
def dequantize(q: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """Back from one scale: ``(q - zero_point) * scale`` as ``dtype``, same shape; differentiable for floating q."""
    return ((q.to(_real_dtype(q, dtype)) - zero_point) * scale).to(dtype)


@op("graphwright.quantize_channel", axes=_channel_axes, traits={QUANT, CAST})
def quantize_channel(
    w: Tensor, scales: Tensor, zero_points: Tensor | None, axis: int, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    """Quantize with a scale per channel: as ``quantize`` with the scale and zero point of each index along ``axis``.

    ``scales [w.shape[axis]]``; or, for blocks, as many axes as w, each size dividing w's (``axis`` is ignored).
    ``zero_points`` (any dtype) has the same shape; None stands for zeros. Where ``dtype`` is floating, x and the scales
    both get their gradient (the scales' is that of learned step sizes).
    """
    work = _work_dtype(w, low, high)
    points = None if zero_points is None else _spread(zero_points, w, axis, work)
    return _to_grid(w.to(work) / _spread(scales, w, axis, work), points, low, high, dtype)


@op("graphwright.dequantize_channel", axes=_channel_axes, traits={QUANT, CAST})
def dequantize_channel(q: Tensor, scales: Tensor, zero_points: Tensor | None, axis: int, dtype: torch.dtype) -> Tensor:
    """Back from a scale per channel: ``(q - zero_points) * scales`` along ``axis`` as ``dtype``, same shape."""
    work = _real_dtype(q, dtype)
    shifted = q.to(work)
    if zero_points is not None:
        shifted = shifted - _spread(zero_points, q, axis, work)
    return (shifted * _spread(scales, q, axis, work)).to(dtype)
