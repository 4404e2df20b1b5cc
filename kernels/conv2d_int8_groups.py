"""Int8 convolutions with groups, and with windows of pixels that lie apart: ``conv2d_int8`` on inputs that are laid out for it first.

The product reads a line of a window as one piece of memory. Where its pixels lie apart (dilation across), or hold other groups' channels
too, they are brought together: for each group [n, h, w, channels], or, with dilation, [n, h, w', kw, channels]: the pixels of each window side
by side, zero points outside of the picture. Narrow groups are made one by zeros in the weight, until they fill a vector of output channels.
Bound by arithmetic, as ``conv2d_int8``; the copy by memory (twice x, kw times with dilation).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright.kernel import Kernel, Sample
from graphwright.kernels.common import not_cpu
from graphwright.kernels.conv2d_int8 import Convolution, pack, unfit_rest
from graphwright.kernels.conv2d_samples import cost, sample
from graphwright.kernels.native import Native, threads_for
from graphwright.kernels.tile import i64, share, u8
from graphwright.kernels.vector import LANES
from graphwright.kernels.vnni import DEPTH, unfit


def _gather(params):  # device code
    """Slots: 2 x, 3 pictures, 4 height, 5 width, 6 bytes of a pixel, 7 channels taken, 8 out, 9 its height, 10 its width, 11 taps of each of
    its pixels, 12 channels of each tap, 13 rows above, 14 pixels to the left, 15 pixels of x from one to the next, 16 from tap to tap, 17 what
    stands outside."""
    p = i64(params)
    fill = p[17]
    first, end = share(params, p[3] * p[9])
    for task in range(first, end):
        picture, y = task // p[9], task % p[9] - p[13]
        to = p[8] + task * p[10] * p[11] * p[12]
        line = p[2] + (picture * p[4] + y) * p[5] * p[6]
        for j in range(p[10]):
            for tap in range(p[11]):
                x = j * p[15] + tap * p[16] - p[14]
                out, source = u8(to), u8(line + x * p[6])
                inside = y >= 0 and y < p[4] and x >= 0 and x < p[5]
                count = p[7] if inside else p[7] - p[7]
                for c in range(count):
                    out[c] = source[c]
                for c in range(count, p[12]):
                    out[c] = fill
                to += p[12]


_GATHER = Native(_gather, "q" * 16)


def merged(groups: int, out: int) -> int:
    """How many groups of ``out`` output channels are made one: the fewest that fill a vector, or all."""
    return next(m for m in range(1, groups + 1) if groups % m == 0 and (m == groups or m * out >= LANES))


class Grouped:
    """A convolution with all that is constant worked out; called with x and the residual.

    ``weight`` [o, c / groups, kh, kw] int8, ``scales`` [o] or [1], ``bias`` [o]; the rest as for ``Convolution``.
    """

    def __init__(
        self, weight: Tensor, scales: Tensor, bias: Tensor | None, x_scale: float, x_zero_point: int, stride: Sequence[int], padding: Sequence[int],
        dilation: Sequence[int], groups: int, *rest: Any,
    ):  # fmt: skip
        weight = weight.detach()
        out, channels, kh, kw = weight.shape
        self.stride, self.padding, self.dilation, self.window = tuple(stride), tuple(padding), tuple(dilation), (kh, kw)
        self.zero, self.out, self.unfolds = x_zero_point, out, dilation[1] != 1 and kw != 1
        together = merged(groups, out // groups)
        self.taken, own = channels * together, out // groups * together
        self.channels = -(-self.taken // DEPTH) * DEPTH
        self.parts: list[Convolution] = []
        for first in range(0, out, own):
            piece = weight.new_zeros(own, self.channels, kh, kw)
            for k in range(together):
                rows = slice(k * (own // together), (k + 1) * (own // together))
                piece[rows, k * channels : (k + 1) * channels] = weight[first : first + own][rows]
            if self.unfolds:  # a pixel holds the window's line
                piece = piece.permute(0, 3, 1, 2).reshape(own, kw * self.channels, kh, 1)
            strip = slice(first, first + own)
            ready = pack(piece, scales if scales.numel() == 1 else scales[strip], None if bias is None else bias[strip])
            self.parts.append(Convolution(ready, x_scale, x_zero_point, (stride[0], 1 if self.unfolds else stride[1]), (0, 0), *rest, deep=dilation[0]))

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        n, _, h, w = x.shape
        high, wide = ((s + 2 * p - d * (k - 1) - 1) // t + 1
                      for s, p, d, k, t in zip((h, w), self.padding, self.dilation, self.window, self.stride, strict=True))  # fmt: skip
        steps = (high * wide * self.out, 1, wide * self.out, self.out)
        out = torch.empty_strided((n, self.out, high, wide), steps, dtype=self.parts[0].dtype)
        if not out.numel():
            return out
        x = x.contiguous(memory_format=torch.channels_last)
        if other is not None:
            other = other.contiguous(memory_format=torch.channels_last)
        for k, part in enumerate(self.parts):
            part(self._laid_out(x, k * self.taken, wide), other, out, k * part.packed.shape[0])
        return out

    def _laid_out(self, x: Tensor, first: int, wide: int) -> Tensor:
        """What a part reads: ``taken`` channels of x from ``first`` on."""
        n, c, h, w = x.shape
        (above, left), taps = self.padding, self.window[1] if self.unfolds else 1
        columns, across, broad = (wide, self.stride[1], self.dilation[1]) if self.unfolds else (w + 2 * left, 1, 1)
        height, channels = h + 2 * above, taps * self.channels
        to = torch.empty_strided((n, channels, height, columns), (height * columns * channels, 1, columns * channels, channels), dtype=x.dtype)
        _GATHER(threads_for(to.numel() // 8), x.data_ptr() + first, n, h, w, c, self.taken, to.data_ptr(), height, columns, taps, self.channels,
                above, left, across, broad, self.zero & 255)  # fmt: skip
        return to


def run(*args: Any) -> Tensor:
    """See ``graphwright.ops.lowered.conv2d_int8``."""
    return ready(*args)()


def ready(
    x: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scales: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, other: Tensor | None, other_scale: float,
    other_zero_point: int, activation: str, scalars: Sequence[float], scale: float, zero_point: int, low: int, high: int,
    dtype: torch.dtype | None,
) -> Callable[[], Tensor]:  # fmt: skip
    """See ``Kernel.ready``."""
    made = Grouped(weight, weight_scales, bias, x_scale, x_zero_point, stride, padding, dilation, groups, other_scale, other_zero_point,
                   activation, scalars, scale, zero_point, low, high, dtype, other is not None)  # fmt: skip
    return functools.partial(made, x, other)


def supports(*args: Any) -> str | None:
    x, weight, groups, other = args[0], args[3], args[9], args[10]
    if (reason := unfit() or not_cpu(x, weight, args[4], args[5], other)) is not None:
        return reason
    if x.dtype != torch.uint8 or x.ndim != 4 or weight.dtype != torch.int8 or weight.ndim != 4:
        return f"x is {x.dtype} with {x.ndim} axes, the weight {weight.dtype} with {weight.ndim}; wanted uint8 and int8 with 4"
    if groups < 1 or weight.shape[0] % groups or x.shape[1] != weight.shape[1] * groups:
        return f"{x.shape[1]} channels, {groups} groups, and a weight of shape {tuple(weight.shape)} don't go together"
    spans = [d * (k - 1) + 1 for d, k in zip(args[8], weight.shape[2:], strict=True)]
    if any(s + 2 * p < span for s, p, span in zip(x.shape[2:], args[7], spans, strict=True)):
        return f"pictures of {tuple(x.shape[2:])} with {tuple(args[7])} padded are smaller than the windows"
    return unfit_groups(tuple(weight.shape), groups, args[13], None if other is None else other.dtype, args[-1])


def unfit_groups(shape: tuple[int, ...], groups: int, activation: str, other: torch.dtype | None, dtype: torch.dtype | None) -> str | None:
    """None, or why a convolution with a weight of this shape in so many groups and this epilogue can't be served."""
    if not min(shape):
        return f"weight of shape {shape}"
    return unfit_rest((shape[0], shape[1] * merged(groups, shape[0] // groups), *shape[2:]), activation, other, dtype)


def samples() -> Iterator[Sample]:
    def make(name: str, n: int, c: int, h: int, w: int, o: int, k: tuple[int, int] = (3, 3), **options: Any) -> Sample:
        return sample(name, n, c, h, w, o, k, **{"padding": (1, 1), "dtype": torch.uint8, "activation": "relu", **options})

    yield make("1x128x56x56 3x3 in 32 groups", 1, 128, 56, 56, 128, groups=32, bench=True)
    yield make("1x256x28x28 3x3 dilated", 1, 256, 28, 28, 256, padding=(2, 2), dilation=(2, 2), bench=True)
    yield make("2x24x9x7 3x3 in 6 groups, residual, ragged", 2, 24, 9, 7, 30, groups=6, stride=(2, 1), other=torch.uint8)
    yield make("1x40x8x9 3x2 in 2 groups, dilated, to f32", 1, 40, 8, 9, 34, (3, 2), groups=2, padding=(0, 3), dilation=(2, 3), stride=(1, 2),
               activation="silu", dtype=None)  # fmt: skip
    yield make("2x5x11x10 3x3 dilated down only, residual f32", 2, 5, 11, 10, 7, dilation=(3, 1), padding=(3, 1), other=torch.float32, dtype=torch.int8)
    yield make("1x32x5x5 1x1 in 2 groups", 1, 32, 5, 5, 64, (1, 1), groups=2, padding=(0, 0), other=torch.int8)
    yield make("1x14x4x5 each channel by itself, twice", 1, 14, 4, 5, 28, groups=14)
    yield make("0x8x5x5 in 2 groups", 0, 8, 5, 5, 16, groups=2)


KERNEL = Kernel("graphwright.conv2d_int8", "cpu", "llvm", run, supports, cost, samples, tolerance=(1e-5, 1), name="conv2d_int8_groups", ready=ready)
