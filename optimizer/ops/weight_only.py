"""Weights stored in 8 or 4 bits with a scale for each group of inputs, and linear layers that read them. References in plain torch.

Conventions. ``real = (q - zero_point) * scale``. A group is ``group`` neighbouring inputs of one output channel, the last of a row
perhaps shorter; ``scales [o, ceil(i / group)]`` float, ``zero_points`` of the same shape and of any dtype. A group of ``i`` or more is
a scale per output channel. Four-bit numbers are unsigned, 0 to 15, two a byte: the lower half holds the even input.
``dtype`` is that of the result, None: float32. Arithmetic is float32 (float64 for float64 inputs, which is how the oracle runs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ops.fused import activate
from graphwright.ops.lowered import _own, _work
from graphwright.ops.registry import CAST, CONTRACTION, QUANT, op


def unpack(weight: Tensor) -> Tensor:
    """``[..., n]`` bytes as the ``[..., 2 n]`` 4-bit numbers in them, uint8."""
    return torch.stack((weight & 15, weight >> 4), -1).flatten(-2)


def pack(numbers: Tensor) -> Tensor:
    """``[..., 2 n]`` numbers from 0 to 15 as ``[..., n]`` bytes, the other way round."""
    pairs = numbers.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def by_group(values: Tensor, group: int, width: int) -> Tensor:
    """``[..., ceil(width / group)]`` scales or zero points, one for each input: ``[..., width]``."""
    if group >= width:
        return values.expand(*values.shape[:-1], width)
    return values.repeat_interleave(group, -1)[..., :width]


def real_weight(q: Tensor, scales: Tensor, zero_points: Tensor | None, middle: int, group: int, work: torch.dtype) -> Tensor:
    """``[..., i]`` integers as the numbers that they stand for; ``middle`` stands for 0 where there are no zero points."""
    width = q.shape[-1]
    points: Any = middle if zero_points is None else by_group(zero_points.to(work), group, width)
    return (q.to(work) - points) * by_group(scales.to(work), group, width)


@op("graphwright.dequantize_packed", axes="* i, * g, * g -> * (i two)", traits={QUANT, CAST})
def dequantize_packed(q: Tensor, scales: Tensor, zero_points: Tensor | None, group: int, dtype: torch.dtype) -> Tensor:
    """4-bit numbers as floats: ``q [..., i / 2]`` uint8, ``scales`` and ``zero_points`` (None: 8) ``[..., ceil(i / group)]``; gives ``[..., i]``."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return real_weight(unpack(q), scales, zero_points, 8, group, work).to(dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float],
            dtype: torch.dtype | None) -> Tensor:  # fmt: skip
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    y = activate(y if other is None else y + other.to(x.dtype), activation, scalars).contiguous()
    # float64 stays: it only comes from float64 inputs, where the caller wants the oracle's precision
    return _own(y if y.dtype == torch.float64 else y.to(dtype or torch.float32))


def _axes(**args: Any) -> str:
    """``g`` groups need not divide the inputs: no axis ties the two. Four bits make those ``(i two)``."""
    inputs = "i" if args["weight"].dtype == torch.int8 else "(i two)"
    return f"* {inputs}, " + "* 1, " * ("x_scales" in args) + "o i, o g, o g, o, * o -> * o"


def _flops(args: Mapping[str, Any], out: Tensor) -> Any:
    return 2 * args["x"].shape[-1] * out.numel()


@op("graphwright.linear_w8_groups", axes=_axes, traits={CONTRACTION, QUANT}, flops=_flops)
def linear_w8_groups(
    x: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """``activation(x @ real(weight).T + bias + other)`` with ``weight [o, i]`` int8 (no zero points: 0); gives ``[*, o]``."""
    work = _work(x)
    return _linear(x.to(work), real_weight(weight, scales, zero_points, 0, group, work), bias, other, activation, scalars, dtype)


@op("graphwright.linear_w4", axes=_axes, traits={CONTRACTION, QUANT}, flops=_flops)
def linear_w4(
    x: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """``activation(x @ real(weight).T + bias + other)`` with ``weight [o, i / 2]`` uint8 (no zero points: 8); gives ``[*, o]``."""
    work = _work(x)
    return _linear(x.to(work), real_weight(unpack(weight), scales, zero_points, 8, group, work), bias, other, activation, scalars, dtype)


@op("graphwright.linear_w4a8", axes=_axes, traits={CONTRACTION, QUANT}, flops=_flops)
def linear_w4a8(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """The same for ``x [*, i]`` int8 with ``x_scales [*, 1]``: ``activation((x * x_scales) @ real(weight).T + bias + other)``."""
    work = _work(x_scales)
    return _linear(x.to(work) * x_scales.to(work), real_weight(unpack(weight), scales, zero_points, 8, group, work), bias, other, activation, scalars, dtype)
