"""Two-dimensional convolution of int8 numbers, channels last, with bias, residual, activation and quantization fused.

    y = activation(x_scale (x8 - x_zero) * (w8 * w_scale) + bias + other);   q = clamp(round(y / scale) + zero_point, low, high)

``x`` [n, c, h, w] uint8 under one scale and zero point; ``weight`` [o, c, kh, kw] int8 with a scale per output channel, packed
ahead (``pack``); ``other`` uint8, int8 or float32 of the result's shape; out [n, o, h', w'] float32, uint8 or int8; all channels last.
An implicit matrix product: one row is the window of one pixel, which lies in kh pieces of kw * c bytes, so nothing is
unfolded; only where there is padding (or c is no multiple of 4), x is first copied into a frame of zero points. A task is some 48 to 64
pixels by 64 channels: its strip of the weight stays in the L2 cache, its int32 sums (16 KiB) go through all the rest in the L1 cache.
Bound by arithmetic; by memory (the weight, once) for small pictures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.kernel import Kernel, Sample
from graphwright.kernels.activations import CODE, SMOOTH, scalars_of, simple, smooth, unfit_epilogue
from graphwright.kernels.common import GRID, grid, not_cpu, per_channel
from graphwright.kernels.conv2d_samples import cost, sample
from graphwright.kernels.linear_int8 import real_rows, store_row
from graphwright.kernels.native import Native, specialized, threads_for
from graphwright.kernels.tile import F32, KIND, SHIFT, U8, device, f32, f64, i32, i64, real, scratch_of, share, u8
from graphwright.kernels.vector import (
    LANES,
    add,
    bits_of,
    floats,
    fma,
    larger,
    load_f,
    load_i,
    load_i8,
    load_u8,
    smaller,
    splat_f,
    store_bytes,
    store_f,
    sub_i,
)  # fmt: skip
from graphwright.kernels.vnni import DEPTH, products, unfit, unfit_depth
from graphwright.kernels.vnni import pack as pack_columns

#: Pixels of one task at most, in one line of all pixels, and blocks of 16 output channels.
PIXELS, LINE, BLOCKS = 64, 48, 4
_BLOCKS, _ZERO, _ONE, _F32, _U8 = (np.int64(n) for n in (BLOCKS, 0, 1, F32, U8))
_sums, _more = (scratch_of(PIXELS * BLOCKS * LANES) for _ in range(2))


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the kernel reads it; output channels padded to whole blocks of 16 with zeros.

    Attributes:
        shape: ``(o, c, kh, kw)``.
        channels: c rounded up to a multiple of 4.
        weight: ``[blocks, kh * kw * channels / 4, 16, 4]`` int8.
        sums: of the integers of each output channel, int32.
    """

    shape: tuple[int, int, int, int]
    channels: int
    weight: Tensor
    sums: Tensor
    scales: Tensor
    bias: Tensor


def pack(weight: Tensor, scales: Tensor, bias: Tensor | None) -> Packed:
    """Pack ``weight [o, c, kh, kw]`` int8 with ``scales`` [o] (or one for all) and ``bias`` [o]."""
    out, channels, high, wide = weight.shape
    pad, behind = torch.nn.functional.pad, (0, -out % LANES)
    last = pad(weight.detach().permute(2, 3, 1, 0), (0, 0, 0, -channels % DEPTH))
    return Packed(
        (out, channels, high, wide), last.shape[2], pack_columns(last.reshape(-1, out)),
        pad(weight.sum((1, 2, 3), dtype=torch.int32), behind), *per_channel(scales, bias, out, LANES),
    )  # fmt: skip


# -- the frame -------------------------------------------------------------------------------------------------------


def _frame(params):  # device code
    """Slots: 2 x, 3 pictures, 4 height, 5 width, 6 channels, 7 out, 8 its height, 9 its width, 10 its channels, 11 rows above,
    12 pixels to the left, 13 what fills the frame. Both channels last."""
    p = i64(params)
    fill, row_bytes, line = np.uint8(p[13]), p[5] * p[6], p[9] * p[10]
    first, end = share(params, p[3] * p[8])
    for task in range(first, end):
        picture, y = task // p[8], task % p[8] - p[11]
        to = u8(p[7] + task * line)
        if y < 0 or y >= p[4]:
            for k in range(line):
                to[k] = fill
            continue
        for k in range(p[12] * p[10]):
            to[k] = fill
        for k in range((p[12] + p[5]) * p[10], line):
            to[k] = fill
        source = p[2] + (picture * p[4] + y) * row_bytes
        start = p[12] * p[10]
        if p[6] == p[10]:
            x = u8(source)
            for k in range(row_bytes):
                to[start + k] = x[k]
        elif p[6] == 3 and p[5] > 0:  # colours: four bytes at once, but for the last pixel, behind which nothing need follow
            words, top = i32(p[7] + task * line + start), np.int32(np.int32(fill) << np.int32(24))
            for pixel in range(p[5] - 1):
                words[pixel] = np.int32(np.int32(i32(source + pixel * 3)[0] & np.int32(0xFFFFFF)) | top)
            for c in range(3):
                to[start + (p[5] - 1) * 4 + c] = u8(source + (p[5] - 1) * 3)[c]
            to[start + (p[5] - 1) * 4 + 3] = fill
        else:
            for pixel in range(p[5]):
                x = u8(source + pixel * p[6])
                for c in range(p[6]):
                    to[start + pixel * p[10] + c] = x[c]
                for c in range(p[6], p[10]):
                    to[start + pixel * p[10] + c] = fill


_FRAME = Native(_frame, "q" * 12)


# -- the convolution -------------------------------------------------------------------------------------------------


@device
def round_columns(sums, rows, step, shift, scale, bias, other, kind, other_step, other_scale, low, high, point, out, out_step):
    """16 columns of int32 sums to bytes: ``clamp(round((sum - shift) * scale + bias + other * other_scale)) + point``.

    ``low`` and ``high`` are bounds before the zero point is added; everything is in steps of the result.
    """
    shift_, scale_, bias_, factor = load_i(shift), load_f(scale), load_f(bias), splat_f(other_scale)
    low_, high_, point_ = splat_f(low), splat_f(high), splat_f(SHIFT + real(point))
    for r in range(rows):
        y = fma(floats(sub_i(load_i(sums + r * step), shift_)), scale_, bias_)
        if other != 0:
            at = other + r * other_step
            if kind == _U8:
                y = fma(floats(load_u8(at)), factor, y)
            elif kind == _F32:
                y = fma(load_f(at), factor, y)
            else:
                y = fma(floats(load_i8(at)), factor, y)
        store_bytes(bits_of(add(smaller(larger(y, low_), high_), point_)), out + r * out_step)


@device
def add_other(row, n, other, kind, scale, zero):
    """Add ``n`` numbers of the residual, as real ones."""
    to = f32(row)
    if n % 16 == 0:
        s, offset = splat_f(scale), splat_f(-zero * scale)
        for c in range(0, n, 16):
            at = other + (c * 4 if kind == _F32 else c)
            x = load_f(at) if kind == _F32 else (floats(load_u8(at)) if kind == _U8 else floats(load_i8(at)))
            store_f(add(load_f(row + c * 4), fma(x, s, offset)), row + c * 4)
    elif kind == _F32:
        r = f32(other)
        for c in range(n):
            to[c] += (r[c] - zero) * scale
    else:
        b = u8(other)
        for c in range(n):
            v = np.int32(b[c])
            v = np.int32(v - np.int32(256)) if kind != _U8 and v > 127 else v
            to[c] += (real(v) - zero) * scale


def _conv(params):  # device code, with ``activate`` put in by ``specialized``
    """Slots: 2 x, 3 bytes of a pixel, of a line, of a picture, 6 pictures, 7 height and width of the result, 9 columns, 10 weight,
    11 lines of a window, 12 groups of four in each, 13 stride down and right, 15 shift, 16 scales, 17 bias, 18 other or 0,
    19 its kind, 20 its scale, 21 its zero point, 22 out, 23 kind, 24 code, 25 a, 26 b, 27 grid, 31 rows and pixels of a task,
    33 whether 16 and 17 are in steps of the result, 34 bytes from line to line of a window, 35 columns of a pixel of the result and other."""
    p, d = i64(params), f64(params)
    columns, taps, steps, kind, code, pitch = p[9], p[11], p[12], p[23], p[24], p[35]
    high, wide, rows, pixels = p[7], p[8], p[31], p[32]
    a, b, inverse, low, top = real(d[25]), real(d[26]), real(d[27]), real(d[29]), real(d[30])
    other_scale, other_zero, other_size = real(d[20]), real(d[21]), 4 if p[19] == _F32 else 1
    size, blocks = 4 if kind == 0 else 1, (columns + 15) // 16
    down, across = (high + rows - 1) // rows, (wide + pixels - 1) // pixels
    bands = p[6] * down * across
    sums = _sums()
    first, end = share(params, (blocks + _BLOCKS - 1) // _BLOCKS * bands)
    for task in range(first, end):
        block, band = task // bands * _BLOCKS, task % bands
        x0, y0, picture = band % across * pixels, band // across % down * rows, band // (across * down)
        n, count, lines = min(pixels, wide - x0), min(_BLOCKS, blocks - block), min(rows, high - y0)
        at, width = block * 16, count * 16
        real_columns = min(width, columns - at)
        for y in range(lines):
            source = p[2] + picture * p[5] + (y0 + y) * p[13] * p[4] + x0 * p[14] * p[3]
            products(source, p[14] * p[3], n, taps, p[34], p[10] + block * taps * steps * 64, taps * steps * 64, count, steps,
                     sums + y * n * width * 4, width * 4, p[10], _ZERO, _ZERO)  # fmt: skip
        for y in range(lines):
            line, pixel = sums + y * n * width * 4, (picture * high + y0 + y) * wide + x0
            out = p[22] + (pixel * pitch + at) * size
            other = p[18] + (pixel * pitch + at) * other_size if p[18] != 0 else p[18]
            if p[33] != 0 and real_columns == width:
                for c in range(0, width, 16):
                    round_columns(line + c * 4, n, width * 4, p[15] + (at + c) * 4, p[16] + (at + c) * 4, p[17] + (at + c) * 4,
                                  other + c * other_size if other != 0 else other, p[19], pitch * other_size,
                                  other_scale * inverse, low, top, p[28], out + c, pitch)  # fmt: skip
                continue
            # in steps of the result, the bias has the residual's zero point in it already
            real_rows(line, n, width * 4, width, p[15] + at * 4, np.int32(1), real(1), p[16] + at * 4, p[17] + at * 4, _ZERO, _ZERO, line, width * 4)
            for r in range(n):
                row = line + r * width * 4
                if other != 0:
                    if p[33] != 0:
                        add_other(row, real_columns, other + r * pitch * other_size, p[19], other_scale * inverse, real(0))
                    else:
                        add_other(row, real_columns, other + r * pitch * other_size, p[19], other_scale, other_zero)
            y_ = line if p[33] != 0 else activate(code, line, n * width, a, b, _more())  # noqa: F821
            for r in range(n):
                store_row(kind, y_ + r * width * 4, real_columns, real(1) if p[33] != 0 else inverse, p[28], low, top,
                          out + r * pitch * size)  # fmt: skip


_SLOTS = "q" * 18 + "dd" + "qqq" + "dd" + GRID + "qqqqq"
_SIMPLE = Native(specialized(_conv, "conv2d_int8_simple", activate=simple), _SLOTS)
_SMOOTH = Native(specialized(_conv, "conv2d_int8_smooth", activate=smooth), _SLOTS)


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
    made = Convolution(
        pack(weight, weight_scales, bias), x_scale, x_zero_point, stride, padding, other_scale, other_zero_point, activation, scalars,
        scale, zero_point, low, high, dtype, other is not None,
    )  # fmt: skip
    return functools.partial(made, x, other)


class Convolution:
    """A convolution with all that is constant worked out; called with x and the residual.

    ``deep`` is the dilation downwards. With ``out`` it writes the channels from ``at`` on of a larger result, of whose shape the
    residual is.
    """

    def __init__(
        self, packed: Packed, x_scale: float, x_zero_point: int, stride: Sequence[int], padding: Sequence[int], other_scale: float,
        other_zero_point: int, activation: str, scalars: Sequence[float], scale: float, zero_point: int, low: int, high: int,
        dtype: torch.dtype | None, residual: bool, deep: int = 1,
    ):  # fmt: skip
        self.packed, self.dtype, self.deep = packed, dtype or torch.float32, deep
        self.stride, self.padding, self.zero = tuple(stride), tuple(padding), x_zero_point
        bounds = list(grid(scale, zero_point, low, high))
        quantizes = self.dtype != torch.float32
        if quantizes and activation == "relu":  # a bound like any other
            activation, bounds[2] = "none", max(bounds[2], 0.0)
        self.steps = quantizes and activation == "none"  # the whole epilogue in steps of the result
        scales, offset = packed.scales.double() * x_scale, packed.bias.double()
        self.other = other_scale, float(other_zero_point)
        if self.steps:
            offset = offset - (other_scale * other_zero_point if residual else 0.0)
            scales, offset = scales / scale, offset / scale
        self.shift, self.scales, self.offset = packed.sums * x_zero_point, scales.float(), offset.float()
        self.native = _SMOOTH if activation in SMOOTH else _SIMPLE
        self.tail = CODE[activation], *scalars_of(activation, scalars), *bounds
        self._plans: dict[Any, tuple[Any, ...]] = {}

    def __call__(self, x: Tensor, other: Tensor | None = None, out: Tensor | None = None, at: int = 0) -> Tensor:
        shape = x.shape
        plan = self._plans.get(shape)
        if plan is None:
            plan = self._plans[shape] = self._planned(*shape)
        size, steps, work, framed, before, after = plan
        if out is None:
            out = torch.empty_strided(size, steps, dtype=self.dtype)
        if not work:
            return out
        x = x.contiguous(memory_format=torch.channels_last)
        if framed is not None:
            x = frame(x, *framed, self.packed.channels, *self.padding, self.zero)
        residual, kind = 0, F32
        if other is not None:
            other = other.contiguous(memory_format=torch.channels_last)
            residual, kind = other.data_ptr() + at * other.element_size(), KIND[other.dtype]
        self.native(threads_for(work), x.data_ptr(), *before, residual, kind, *self.other, out.data_ptr() + at * out.element_size(), *after, out.shape[1])
        return out

    def _planned(self, n: int, c: int, h: int, w: int) -> tuple[Any, ...]:
        """All that follows from a shape: size and strides of the result, work (0: none), size of the frame, slots."""
        packed, (down, right), (above, left) = self.packed, self.stride, self.padding
        columns, _, kh, kw = packed.shape
        high, wide = (h + 2 * above - self.deep * (kh - 1) - 1) // down + 1, (w + 2 * left - kw) // right + 1
        size, steps = (n, columns, high, wide), (high * wide * columns, 1, wide * columns, columns)
        count = n * columns * high * wide
        if not count:
            return size, steps, 0, None, (), ()
        framed = None
        work = max(1, count * kh * kw * c // 16)
        if above or left or packed.channels != c:
            h, w, c = h + 2 * above, w + 2 * left, packed.channels
            framed = h, w
        if kh == kw == down == right == 1:  # every pixel by itself: one long line of them
            n, high, wide = 1, 1, n * high * wide
        pixels = -(-wide // -(-wide // (PIXELS if high > 1 else LINE)))
        before = (c, w * c, h * w * c, n, high, wide, columns, packed.weight.data_ptr(), kh, kw * c // DEPTH, down, right,
                  self.shift.data_ptr(), self.scales.data_ptr(), self.offset.data_ptr())  # fmt: skip
        return size, steps, work, framed, before, (KIND[self.dtype], *self.tail, max(1, PIXELS // pixels), pixels, self.steps, w * c * self.deep)


def frame(x: Tensor, height: int, width: int, channels: int, above: int, left: int, fill: int) -> Tensor:
    """``x [n, c, h, w]`` of bytes, channels last, as it stands in a larger picture full of ``fill``.

    Gives ``[n, channels, height, width]``, channels last, x's dtype, with x from row ``above`` and column ``left`` on.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    steps = (height * width * channels, 1, width * channels, channels)
    framed = torch.empty_strided((n, channels, height, width), steps, dtype=x.dtype)
    if framed.numel():
        _FRAME(threads_for(framed.numel() // 8), x.data_ptr(), n, h, w, c, framed.data_ptr(), height, width, channels, above, left, fill & 255)
    return framed


def supports(
    x: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scales: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, other: Tensor | None, other_scale: float,
    other_zero_point: int, activation: str, scalars: Sequence[float], scale: float, zero_point: int, low: int, high: int,
    dtype: torch.dtype | None,
) -> str | None:  # fmt: skip
    if (reason := unfit() or not_cpu(x, weight, weight_scales, bias, other)) is not None:
        return reason
    if x.dtype != torch.uint8 or x.ndim != 4 or weight.dtype != torch.int8 or weight.ndim != 4:
        return f"x is {x.dtype} with {x.ndim} axes, the weight {weight.dtype} with {weight.ndim}; wanted uint8 and int8 with 4"
    if groups != 1 or x.shape[1] != weight.shape[1]:
        return f"{x.shape[1]} input channels against {weight.shape[1]} of the weight, {groups} groups; one group is supported"
    if any(d != 1 and k != 1 for d, k in zip(dilation, weight.shape[2:], strict=True)):
        return f"dilation {tuple(dilation)}; windows of neighbouring pixels are supported"
    return unfit_rest(tuple(weight.shape), activation, None if other is None else other.dtype, dtype)


def unfit_rest(shape: tuple[int, ...], activation: str, other: torch.dtype | None, dtype: torch.dtype | None) -> str | None:
    """None, or why a convolution with this weight and epilogue can't be served."""
    return unfit_depth(shape[1] * shape[2] * shape[3]) or unfit_epilogue(activation, other, dtype, integers=True)


def samples() -> Iterator[Sample]:
    byte, signed = torch.uint8, torch.int8
    yield sample("1x64x56x56 3x3 relu to u8", 1, 64, 56, 56, 64, (3, 3), padding=(1, 1), activation="relu", dtype=byte, bench=True)
    yield sample("1x64x56x56 1x1 residual relu to u8", 1, 64, 56, 56, 256, (1, 1), other=byte, activation="relu", dtype=byte, bench=True)
    yield sample("1x512x7x7 3x3 relu to u8", 1, 512, 7, 7, 512, (3, 3), padding=(1, 1), activation="relu", dtype=byte, bench=True)
    yield sample("1x1024x14x14 1x1 stride 2 to u8", 1, 1024, 14, 14, 2048, (1, 1), stride=(2, 2), dtype=byte, bench=True)
    yield sample("1x3x224x224 7x7 stride 2 relu to u8", 1, 3, 224, 224, 64, (7, 7), stride=(2, 2), padding=(3, 3), activation="relu",
               dtype=byte, bench=True)  # fmt: skip
    yield sample("2x5x9x11 3x2 to f32", 2, 5, 9, 11, 7, (3, 2), padding=(2, 1), stride=(1, 2), bias=False)
    yield sample("3x8x4x70 1x3 residual f32 silu", 3, 8, 4, 70, 33, (1, 3), padding=(0, 1), other=torch.float32, activation="silu")
    yield sample("1x16x6x5 3x3 residual i8 hardswish to i8", 1, 16, 6, 5, 32, (3, 3), padding=(1, 1), other=signed, activation="hardswish",
               dtype=signed)  # fmt: skip
    yield sample("2x12x5x5 3x3 residual u8 to i8, ragged", 2, 12, 5, 5, 19, (3, 3), other=byte, dtype=signed)
    yield sample("1x4x3x3 residual f32 to u8", 1, 4, 3, 3, 16, (1, 1), other=torch.float32, activation="relu", dtype=byte)
    yield sample("1x1x1x1", 1, 1, 1, 1, 1, (1, 1))
    yield sample("0x4x5x5", 0, 4, 5, 5, 16, (3, 3))


KERNEL = Kernel("graphwright.conv2d_int8", "cpu", "llvm", run, supports, cost, samples, tolerance=(1e-5, 1), ready=ready)
