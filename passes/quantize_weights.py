"""Weights as int8, or in 8 or 4 bits by groups: scales, integers, and the bias that takes back the mean error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.ops.weight_only import pack, real_weight, unpack

#: elements of a weight that are looked at together
_AT_A_TIME = 1 << 16


@dataclass(frozen=True)
class Int8Weight:
    """A weight in [-127, 127] with zero point 0: ``real ≈ values * scales`` along ``axis``.

    Attributes:
        values: int8, the weight's shape; scales: float32, one per index of ``axis``, or one number (axis None).
    """

    values: Tensor
    scales: Tensor
    axis: int | None

    def real(self) -> Tensor:
        """The weight that the integers stand for, float32."""
        return self.values.float() * _along(self.scales, self.values, self.axis)

    def part(self, some: slice) -> Int8Weight:
        """Some indices of axis 0."""
        return Int8Weight(self.values[some], self.scales[some] if self.axis == 0 else self.scales, self.axis)


def _along(scales: Tensor, like: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return scales
    shape = [1] * like.ndim
    shape[axis] = -1
    return scales.reshape(shape)


def quantize_weight(weight: Tensor, axis: int | None) -> Int8Weight:
    """Symmetric int8: the largest weight becomes 127.

    A search for the scale of least squared error was tried: at 8 bits it hardly ever leaves the largest weight.

    Args:
        axis: output channels, each with a scale; None: one scale.
    """
    wide = weight.detach().float()
    over = [k for k in range(wide.ndim) if k != axis]
    scales = (wide.abs().amax(over) if over else wide.abs()) / 127
    # A channel of zeros has no scale of its own: 1 keeps it exact and finite.
    scales = torch.where(scales > torch.finfo(torch.float32).tiny, scales, torch.ones_like(scales))
    values = (wide / _along(scales, wide, axis)).round_().clamp_(-127, 127).to(torch.int8)
    return Int8Weight(values, scales, axis)


@dataclass(frozen=True)
class GroupedWeight:
    """A weight ``[o, i]`` with a scale for each group of inputs: ``real ≈ (values - zero_points) * scales``.

    Attributes:
        values: int8 ``[o, i]``; of 4 bits uint8 ``[o, i / 2]``, two a byte.
        scales: float32 ``[o, ceil(i / group)]``; zero_points: of the same shape and of the dtype of the values; None: 0, of 4 bits 8.
        group: inputs of a group; bits: 8 or 4.
    """

    values: Tensor
    scales: Tensor
    zero_points: Tensor | None
    group: int
    bits: int

    def real(self) -> Tensor:
        """The weight that the integers stand for, float32."""
        numbers = unpack(self.values) if self.bits == 4 else self.values
        return real_weight(numbers, self.scales, self.zero_points, 8 if self.bits == 4 else 0, self.group, torch.float32)

    def part(self, some: slice) -> GroupedWeight:
        """Some rows."""
        points = None if self.zero_points is None else self.zero_points[some]
        return GroupedWeight(self.values[some], self.scales[some], points, self.group, self.bits)


def quantize_groups(weight: Tensor, bits: int, group: int, symmetric: bool) -> GroupedWeight:
    """Round to the nearest of 2^bits numbers between the least and the largest weight of each group, 0 among them.

    Args:
        weight: ``[o, i]``; i even where there are 4 bits.
        group: inputs that share a scale; the last group of a row may be shorter.
        symmetric: 0 lies in the middle, and the largest magnitude becomes 2^(bits - 1) - 1: no zero points.
    """
    out, width = weight.shape
    step = max(1, _AT_A_TIME * 4 // max(1, width))  # rows at a time: a large table is not to be held several times over
    parts = [_rounded(weight[k : k + step].detach().float(), bits, min(group, width), symmetric) for k in range(0, out, step)]
    values, scales, points = (torch.cat(p) for p in zip(*parts, strict=True))
    return GroupedWeight(values, scales, None if symmetric else points, group, bits)


def _rounded(w: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Values as they are stored, scales and zero points of some rows."""
    width, low, high = w.shape[1], -(1 << bits - 1), (1 << bits - 1) - 1
    grouped = torch.nn.functional.pad(w, (0, -width % group)).unflatten(1, (-1, group))
    if symmetric:
        scales = grouped.abs().amax(2) / high
    else:
        bottom, top = grouped.amin(2).clamp_(max=0), grouped.amax(2).clamp_(min=0)
        scales = top / (high - low) - bottom / (high - low)  # apart: their difference may lie beyond float32
    # A group of zeros has no scale of its own: 1 keeps it exact and finite.
    scales = torch.where(scales > torch.finfo(torch.float32).tiny, scales, torch.ones_like(scales))
    points = torch.zeros_like(scales) if symmetric else (low - bottom / scales).round_().clamp_(low, high)
    least = -high if symmetric else low
    q = (grouped / scales[..., None]).round_().add_(points[..., None]).clamp_(least, high).flatten(1)[:, :width]
    if bits == 4:  # unsigned
        return pack(q + 8), scales, (points + 8).to(torch.uint8)
    return q.to(torch.int8), scales, points.to(torch.int8)


@dataclass
class ChannelMean:
    """Running mean of a value per channel.

    Args:
        axis: the channels.
    """

    axis: int
    total: Tensor | None = None
    count: int = 0

    def update(self, x: Tensor) -> None:
        axis = self.axis % x.ndim
        others = [k for k in range(x.ndim) if k != axis]
        wide = x if x.dtype == torch.float64 else x.float()
        summed = (wide.sum(others) if others else wide).double()  # torch sums over everything where no axis is named
        self.total = summed if self.total is None else self.total + summed
        self.count += x.numel() // max(1, x.shape[axis])

    @property
    def mean(self) -> Tensor:
        """float64 [channels]."""
        assert self.total is not None and self.count
        return self.total / self.count


def mean_error(weight: Tensor, quantized: Int8Weight | GroupedWeight, mean: Tensor, groups: int) -> Tensor:
    """What quantizing the weight adds to the mean of each output channel, float64 [o].

    Args:
        weight: ``[o, i, *kernel]``; mean: of the input per channel, ``[groups * i]``.
    """
    per_group = mean.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    step, found = max(1, _AT_A_TIME // max(1, weight[:1].numel())), []
    for k in range(0, weight.shape[0], step):  # float64 copies of whole weights would be several times what the model takes
        some = slice(k, k + step)
        error = quantized.part(some).real() - weight[some].float()
        error = error.flatten(2).sum(2).double() if weight.ndim > 2 else error.double()
        found.append((error * per_group[some]).sum(1))
    return torch.cat(found) if found else per_group.sum(1)
