"""Two-dimensional int8 convolution of each channel by itself, channels last, with bias, residual, activation and quantization fused.

    y[n, i, j, c] = activation(x_scale w_scale[c] sum_{k, l} (x[n, i s - p + k d, j s' - p' + l d', c] - x_zero) w[k, l, c] + bias[c] + other);   q as in conv2d_int8

``x`` [n, c, h, w] uint8 under one scale and zero point, channels last; ``weight`` [c, 1, k, l] int8 with a scale per channel, packed to
[k, l, c] float32; out [n, c, h', w'] float32, uint8 or int8, channels last; ``other`` uint8, int8 or float32 of its shape. Sixteen channels are
one vector. Sums are those of float32 multiply-adds, twice as many at a time as of 32-bit integers, and exact: below 2^24. Four
neighbouring windows share each load of the weight, and with steps of one pixel each pixel's conversion; their zero point is taken off
ahead, by sums of the weight's lines. A strip of channels of four pixels stays in the L1 cache for all that follows.
Bound by conversions and multiply-adds; a quarter of the float kernel's bytes.
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
from graphwright.kernels.conv2d_depthwise import begin
from graphwright.kernels.conv2d_int8 import add_other
from graphwright.kernels.conv2d_samples import cost, sample
from graphwright.kernels.linear_int8 import store_row
from graphwright.kernels.native import Native, specialized, threads_for, unavailable
from graphwright.kernels.tile import F32, KIND, SHIFT, U8, apart, device, f64, i64, real, scratch_of, share
from graphwright.kernels.vector import (
    LANES,
    add,
    bits_of,
    floats,
    fma,
    larger,
    load_f,
    load_i8,
    load_u8,
    smaller,
    splat_f,
    store_bytes,
    store_f,
    sub,
)  # fmt: skip

#: Channels of a strip, and taps up to which sums are exact.
STRIP, MOST = 256, 500
TAPS, DENSE = np.int64(0), False
_ZERO, _ONE, _FOUR, _STRIP, _F32, _U8 = np.int64(0), np.int64(1), np.int64(4), np.int64(STRIP), np.int64(F32), np.int64(U8)
_sums, _more = (scratch_of(4 * STRIP) for _ in range(2))

# -- the sums --------------------------------------------------------------------------------------------------------


def four(x, stride, line, tap, w, start, width, row, first, last, taps, to):
    """Sums of four neighbouring windows over ``width`` channels into ``to`` [4, width]: addresses, steps in bytes (``row``: from tap to tap of
    the weight), the window's rows from ``first`` to ``last``; ``start``: what each row of the window adds to begin with."""
    apart()
    step = tap if DENSE else stride
    for block in range(0, width, 16):
        c = min(block, width - 16)  # the last block may begin within the one before
        a0 = splat_f(real(0))
        for k in range(first, last):
            a0 = add(a0, load_f(start + k * row + c * 4))
        a1, a2, a3 = a0, a0, a0
        for k in range(first, last):
            source, factor = x + k * line + c, w + k * taps * row + c * 4
            for _ in range(TAPS if TAPS > 0 else taps):
                f = load_f(factor)
                a0 = fma(floats(load_u8(source)), f, a0)
                a1 = fma(floats(load_u8(source + step)), f, a1)
                a2 = fma(floats(load_u8(source + step * 2)), f, a2)
                a3 = fma(floats(load_u8(source + step * 3)), f, a3)
                source += tap
                factor += row
        at = to + c * 4
        store_f(a0, at)
        store_f(a1, at + width * 4)
        store_f(a2, at + width * 8)
        store_f(a3, at + width * 12)


#: The same with the length of a window's rows put in (0: any), so that LLVM unrolls them, and with steps of one pixel.
four_any = device(specialized(four, "four_any", TAPS=np.int64(0), DENSE=False))
four_of_3 = device(specialized(four, "four_of_3", TAPS=np.int64(3), DENSE=False))
four_of_5 = device(specialized(four, "four_of_5", TAPS=np.int64(5), DENSE=False))
dense_of_3 = device(specialized(four, "dense_of_3", TAPS=np.int64(3), DENSE=True))
dense_of_5 = device(specialized(four, "dense_of_5", TAPS=np.int64(5), DENSE=True))


@device
def one(x, line, tap, w, width, row, first, last, left, right, taps, zero, to):
    """Sums of one window, of whose columns those from ``left`` to ``right`` lie in the picture."""
    apart()
    point = splat_f(zero)
    for block in range(0, width, 16):
        c = min(block, width - 16)
        sum_ = splat_f(real(0))
        for k in range(first, last):
            for m in range(left, right):
                sum_ = fma(sub(floats(load_u8(x + k * line + m * tap + c)), point), load_f(w + (k * taps + m) * row + c * 4), sum_)
        store_f(sum_, to + c * 4)


# -- what follows ----------------------------------------------------------------------------------------------------


@device
def round_strip(sums, count, width, scale, bias, other, kind, other_scale, low, high, point, out, pitch):
    """``count`` rows of sums to bytes: ``clamp(round(sum * scale + bias + other * other_scale)) + point``; all in steps of the result."""
    low_, high_, point_, factor = splat_f(low), splat_f(high), splat_f(real(point)), splat_f(other_scale)
    for block in range(0, width, 16):
        c = min(block, width - 16)
        scale_, bias_ = load_f(scale + c * 4), load_f(bias + c * 4)
        for r in range(count):
            y = fma(load_f(sums + (r * width + c) * 4), scale_, bias_)
            if other != 0:
                if kind == _U8:
                    y = fma(floats(load_u8(other + r * pitch + c)), factor, y)
                elif kind == _F32:
                    y = fma(load_f(other + (r * pitch + c) * 4), factor, y)
                else:
                    y = fma(floats(load_i8(other + r * pitch + c)), factor, y)
            y = add(smaller(larger(y, low_), high_), splat_f(SHIFT))
            store_bytes(bits_of(add(y, point_)), out + r * pitch + c)


@device
def real_strip(sums, count, width, scale, bias, to):
    """``count`` rows of sums as real numbers."""
    for r in range(count):
        for block in range(0, width, 16):
            c = min(block, width - 16)
            at = (r * width + c) * 4
            store_f(fma(load_f(sums + at), load_f(scale + c * 4), load_f(bias + c * 4)), to + at)


def _depthwise(params):  # device code, with ``activate`` put in by ``specialized``
    """Slots: 2-5 x, its height, width and channels; 6-8 out, its height and width; 9 weight, 10 starts, 11, 12 window; 13, 14 steps;
    15, 16 padding; 17, 18 dilation; 19 pictures; 20 scales, 21 bias, 22 other or 0, 23 its kind, 24 its scale, 25 its zero point, 26 zero point
    of x, 27 kind of out, 28 code, 29 a, 30 b, 31 grid, 35 whether 20, 21 are in steps of the result."""
    p, d = i64(params), f64(params)
    h, w, channels, high, wide = p[3], p[4], p[5], p[7], p[8]
    rows, taps, down, across, deep, broad = p[11], p[12], p[13], p[14], p[17], p[18]
    zero, inverse, low, top = real(d[26]), real(d[31]), real(d[33]), real(d[34])
    a, b, other_scale, other_zero = real(d[29]), real(d[30]), real(d[24]), real(d[25])
    size, other_size, row = 4 if p[27] == 0 else 1, 4 if p[23] == _F32 else 1, channels * 4
    line, tap, step = w * channels * deep, channels * broad, channels * across
    inner = (p[16] + across - 1) // across  # windows from here on begin within the picture
    outer = (w - 1 - (taps - 1) * broad + p[16]) // across + 1  # and up to here end within it
    sums, more = _sums(), _more()
    start, end = share(params, p[19] * high)
    for unit in range(start, end):
        n, i = unit // high, unit % high
        y = i * down - p[15]
        first = begin(y, deep)
        last = max(first, min(rows, (h - y + deep - 1) // deep))
        source = p[2] + (n * h + y) * w * channels
        j = _ZERO
        while j < wide:
            x = j * across - p[16]
            inside = j >= inner and j + 4 <= outer
            count = _FOUR if inside else _ONE
            left = begin(x, broad)
            right = max(left, min(taps, (w - x + broad - 1) // broad))
            for strip in range(0, channels, _STRIP):
                c = max(_ZERO, min(strip, channels - _STRIP))
                width, from_, weight, begins = min(_STRIP, channels), source + x * channels + c, p[9] + c * 4, p[10] + c * 4
                if not inside:
                    one(from_, line, tap, weight, width, row, first, last, left, right, taps, zero, sums)
                elif taps == 3 and step == tap:
                    dense_of_3(from_, step, line, tap, weight, begins, width, row, first, last, taps, sums)
                elif taps == 5 and step == tap:
                    dense_of_5(from_, step, line, tap, weight, begins, width, row, first, last, taps, sums)
                elif taps == 3:
                    four_of_3(from_, step, line, tap, weight, begins, width, row, first, last, taps, sums)
                elif taps == 5:
                    four_of_5(from_, step, line, tap, weight, begins, width, row, first, last, taps, sums)
                else:
                    four_any(from_, step, line, tap, weight, begins, width, row, first, last, taps, sums)
                pixel = (unit * wide + j) * channels + c
                out, other = p[6] + pixel * size, p[22] + pixel * other_size if p[22] != 0 else p[22]
                if p[35] != 0:
                    round_strip(sums, count, width, p[20] + c * 4, p[21] + c * 4, other, p[23], other_scale * inverse, low, top, p[32], out, channels)
                    continue
                real_strip(sums, count, width, p[20] + c * 4, p[21] + c * 4, more)
                if other != 0:
                    for r in range(count):
                        add_other(more + r * width * 4, width, other + r * channels * other_size, p[23], other_scale, other_zero)
                y_ = activate(p[28], more, count * width, a, b, sums)  # noqa: F821
                for r in range(count):
                    store_row(p[27], y_ + r * width * 4, width, inverse, p[32], low, top, out + r * channels * size)
            j += count


_SLOTS = "q" * 22 + "ddd" + "qq" + "dd" + GRID + "q"
_SIMPLE = Native(specialized(_depthwise, "conv2d_int8_depthwise_simple", activate=simple), _SLOTS)
_SMOOTH = Native(specialized(_depthwise, "conv2d_int8_depthwise_smooth", activate=smooth), _SLOTS)

# -- host side -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the kernel reads it: ``weight`` [k, l, c], ``scales`` and ``bias`` [c], all float32."""

    weight: Tensor
    scales: Tensor
    bias: Tensor


def pack(weight: Tensor, scales: Tensor, bias: Tensor | None) -> Packed:
    """Pack ``weight [c, 1, k, l]`` int8 with ``scales`` [c] (or one for all) and ``bias`` [c]."""
    last = weight.detach()[:, 0].permute(1, 2, 0).float().contiguous()
    return Packed(last, *(t.contiguous() for t in per_channel(scales, bias, weight.shape[0], 1)))


class Convolution:
    """A convolution with all that is constant worked out; called with x and the residual."""

    def __init__(
        self, packed: Packed, x_scale: float, x_zero_point: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
        other_scale: float, other_zero_point: int, activation: str, scalars: Sequence[float], scale: float, zero_point: int, low: int, high: int,
        dtype: torch.dtype | None, residual: bool,
    ):  # fmt: skip
        self.packed, self.dtype = packed, dtype or torch.float32
        self.stride, self.padding, self.dilation = tuple(stride), tuple(padding), tuple(dilation)
        self.reach = [2 * p - d * (k - 1) - 1 for p, d, k in zip(padding, dilation, packed.weight.shape[:2], strict=True)]
        bounds = list(grid(scale, zero_point, low, high))
        quantizes = self.dtype != torch.float32
        if quantizes and activation == "relu":  # a bound like any other
            activation, bounds[2] = "none", max(bounds[2], 0.0)
        steps = quantizes and activation == "none"  # the whole epilogue in steps of the result
        scales, offset = packed.scales.double() * x_scale, packed.bias.double()
        if steps:
            offset = offset - (other_scale * other_zero_point if residual else 0.0)
            scales, offset = scales / scale, offset / scale
        self.starts = (packed.weight.sum(1) * -float(x_zero_point)).contiguous()
        self.scales, self.offset = scales.float(), offset.float()
        self.native = _SMOOTH if activation in SMOOTH else _SIMPLE
        self.other = other_scale, float(other_zero_point), float(x_zero_point)
        self.tail = KIND[self.dtype], CODE[activation], *scalars_of(activation, scalars), *bounds, steps

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        n, c, h, w = x.shape
        high, wide = ((s + r) // step + 1 for s, r, step in zip((h, w), self.reach, self.stride, strict=True))
        out = torch.empty_strided((n, c, high, wide), (high * wide * c, 1, wide * c, c), dtype=self.dtype)
        if out.numel():
            x = x.contiguous(memory_format=torch.channels_last)
            residual, kind = 0, F32
            if other is not None:
                other = other.contiguous(memory_format=torch.channels_last)
                residual, kind = other.data_ptr(), KIND[other.dtype]
            weight = self.packed.weight
            self.native(threads_for(out.numel() * 2), x.data_ptr(), h, w, c, out.data_ptr(), high, wide, weight.data_ptr(), self.starts.data_ptr(),
                        *weight.shape[:2], *self.stride, *self.padding, *self.dilation, n, self.scales.data_ptr(), self.offset.data_ptr(), residual, kind,
                        *self.other, *self.tail)  # fmt: skip
        return out


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
    made = Convolution(pack(weight, weight_scales, bias), x_scale, x_zero_point, stride, padding, dilation, other_scale, other_zero_point,
                       activation, scalars, scale, zero_point, low, high, dtype, other is not None)  # fmt: skip
    return functools.partial(made, x, other)


def supports(*args: Any) -> str | None:
    x, weight, bias, padding, dilation, groups, other = (args[k] for k in (0, 3, 5, 7, 8, 9, 10))
    if (reason := unavailable() or not_cpu(x, weight, args[4], bias, other)) is not None:
        return reason
    if x.dtype != torch.uint8 or weight.dtype != torch.int8 or x.ndim != 4:
        return f"x is {x.dtype} with {x.ndim} axes, the weight {weight.dtype}; wanted uint8 with 4, and int8"
    if x.shape[1] != groups:
        return f"{x.shape[1]} channels in {groups} groups; wanted each by itself"
    if any(s + 2 * p < d * (k - 1) + 1 for s, p, d, k in zip(x.shape[2:], padding, dilation, weight.shape[2:], strict=True)):
        return f"pictures of {tuple(x.shape[2:])} with {tuple(padding)} padded are smaller than the windows"
    return unfit_rest(tuple(weight.shape), groups, padding, args[13], None if other is None else other.dtype, args[-1])


def unfit_rest(
    shape: tuple[int, ...], groups: int, padding: Sequence[int], activation: str, other: torch.dtype | None, dtype: torch.dtype | None
) -> str | None:
    """None, or why a convolution with a weight of this shape and this epilogue can't be served."""
    if len(shape) != 4 or shape[1] != 1 or shape[0] != groups or not min(shape):
        return f"weight of shape {shape} in {groups} groups; wanted [c, 1, k, l] in c"
    if shape[0] < LANES or shape[2] * shape[3] > MOST:
        return f"{shape[0]} channels, windows of {shape[2] * shape[3]}; at least {LANES} and at most {MOST} are supported"
    if min(padding) < 0:
        return f"padding {tuple(padding)} is negative"
    return unfit_epilogue(activation, other, dtype, integers=True)


def samples() -> Iterator[Sample]:
    def make(name: str, n: int, c: int, h: int, w: int, k: tuple[int, int] = (3, 3), **options: Any) -> Sample:
        return sample(name, n, c, h, w, c, k, groups=c, **{"padding": (1, 1), "dtype": torch.uint8, **options})

    yield make("1x96x112x112 stride 2 relu6", 1, 96, 112, 112, stride=(2, 2), zero=0, activation="hardtanh", scalars=(0.0, 6.0), bench=True)
    yield make("1x144x56x56 relu", 1, 144, 56, 56, zero=0, activation="relu", bench=True)
    yield make("1x240x28x28 5x5 hardswish", 1, 240, 28, 28, (5, 5), padding=(2, 2), activation="hardswish", bench=True)
    yield make("1x960x7x7", 1, 960, 7, 7, bench=True)
    yield make("2x17x9x11 4x2 to f32", 2, 17, 9, 11, (4, 2), padding=(0, 1), bias=False, activation="gelu", dtype=None)
    yield make("1x33x13x8 stride 2 residual i8 to i8", 1, 33, 13, 8, (4, 4), stride=(2, 2), other=torch.int8, activation="hardswish", dtype=torch.int8)
    yield make("3x16x5x4 dilated, far padding", 3, 16, 5, 4, padding=(4, 3), dilation=(2, 3), stride=(3, 1))
    yield make("1x300x4x9 residual u8", 1, 300, 4, 9, other=torch.uint8, activation="relu")
    yield make("1x272x3x8 residual f32 silu to f32", 1, 272, 3, 8, other=torch.float32, activation="silu", dtype=None)
    yield make("1x20x1x1", 1, 20, 1, 1)
    yield make("0x16x5x5", 0, 16, 5, 5)


KERNEL = Kernel("graphwright.conv2d_int8", "cpu", "llvm", run, supports, cost, samples, tolerance=(1e-5, 1), name="conv2d_int8_depthwise", ready=ready)
