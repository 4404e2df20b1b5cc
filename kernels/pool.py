# ruff: noqa: FURB136  min() and max() treat NaN otherwise than the conditional expressions here do
"""Max pooling over windows and mean pooling over the whole plane, on channels_last tensors.

    y[n, oh, ow, c] = max over taps of x[n, oh * sh - ph + kh * dh, ow * sw - pw + kw * dw, c]
    m[n, c] = mean over h, w of real(x[n, h, w, c]);   q = clamp(round(m / scale) + zero_point, low, high)

``x`` [n, c, h, w] uint8, int8 or float32, channels_last in memory (copied so where it is not). Max pooling first takes the
largest of the rows under a window into one long row, then of that row's columns. Bound by memory, or by the L2 cache.
NaN wins in max pooling, as in ATen's.

A kernel for a convolution and the pooling behind it is not worth writing: behind ResNet-50's first convolution, the largest pooling of common
networks, this one took 0.09 ms for bytes and 0.33 ms for floats on two threads of a Cascade Lake, half a percent of the whole network's time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.kernels.common import GRID, grid, not_cpu, pieces
from graphwright.kernels.native import Native, openmp, threads_for, unavailable
from graphwright.kernels.tile import (
    BYTES,
    KIND,
    add,
    call,
    device,
    f32,
    f64,
    i8,
    i64,
    load,
    real,
    scratch,
    share,
    store,
    total,
    u8,
    u16,
    widened,
)  # fmt: skip

_STORABLE = (torch.uint8, torch.int8, torch.float32)

# -- max -------------------------------------------------------------------------------------------------------------


@device
def greater_of(kind, source, n, to):
    """``to = max(to, source)``, n elements each."""
    if kind == 0:
        x, y = f32(source), f32(to)
        for i in range(n):
            y[i] = x[i] if (x[i] > y[i] or x[i] != x[i]) else y[i]
    elif kind == 2:
        b, c = u8(source), u8(to)
        for i in range(n):
            c[i] = b[i] if b[i] > c[i] else c[i]
    else:
        e, f = i8(source), i8(to)
        for i in range(n):
            f[i] = e[i] if e[i] > f[i] else f[i]


@device
def lowest_into(kind, n, to):
    """n elements that every other is greater than."""
    if kind == 0:
        y = f32(to)
        for i in range(n):
            y[i] = -real(np.inf)
    else:
        b, value = u8(to), np.uint8(0 if kind == 2 else 128)
        for i in range(n):
            b[i] = value


@device
def copy(source, n, to):
    """n bytes."""
    x, y = u8(source), u8(to)
    for i in range(n):
        y[i] = x[i]


def _max_pool(params):  # device code
    """Slots: 2 x, 3 out, 4 kind, 5 element bytes, 6 n c h w, 10 oh ow, 12 kernel, 14 stride, 16 padding, 18 dilation,
    20 scratch (two padded rows of x per thread), 21 pixels of a padded row."""
    p = i64(params)
    kind, size, c, h, oh, ow, wide = p[4], p[5], p[7], p[8], p[10], p[11], p[21]
    pixel, row_bytes = c * size, p[9] * c * size
    row = p[20] + (call(p[0]) if p[0] != 0 else np.int64(0)) * 2 * wide * pixel
    tops = row + wide * pixel
    inside = row + p[17] * pixel
    span = (ow - 1) * p[15] + 1  # outputs at stride 1, of which every p[15]-th is kept
    first, end = share(params, p[6] * oh)
    for line in range(first, end):
        image = p[2] + line // oh * h * row_bytes
        top = line % oh * p[14] - p[16]
        lowest_into(kind, wide * c, row)
        for k in range(p[12]):
            at = top + k * p[18]
            if 0 <= at < h:
                greater_of(kind, image + at * row_bytes, p[9] * c, inside)
        out = p[3] + line * ow * pixel
        to = out if p[15] == 1 else tops
        copy(row, span * pixel, to)
        for k in range(1, p[13]):
            greater_of(kind, row + k * p[19] * pixel, span * c, to)
        if p[15] != 1:
            for o in range(ow):
                copy(tops + o * p[15] * pixel, pixel, out + o * pixel)


_MAX = Native(_max_pool, "q" * 20)


def _pooled(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """PyTorch's rule: with ceil_mode the last window must start inside the input or its left padding."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count


def max_pool2d(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:  # fmt: skip
    """See ``graphwright.ops.lowered.max_pool2d``."""
    n, c, h, w = x.shape
    oh = _pooled(h, kernel[0], stride[0], padding[0], dilation[0], ceil_mode)
    ow = _pooled(w, kernel[1], stride[1], padding[1], dilation[1], ceil_mode)
    out = torch.empty((n, c, oh, ow), dtype=x.dtype, memory_format=torch.channels_last)
    if not out.numel():
        return out
    x = x.contiguous(memory_format=torch.channels_last)
    kind = KIND[x.dtype]
    threads = threads_for(x.numel() * BYTES[kind]) if openmp() is not None else 1
    wide = max(w + padding[1], (ow - 1) * stride[1] + dilation[1] * (kernel[1] - 1) + 1)
    rows = torch.empty(threads * 2 * wide * c, dtype=x.dtype)
    _MAX(threads, x.data_ptr(), out.data_ptr(), kind, BYTES[kind], n, c, h, w, oh, ow, *kernel, *stride, *padding,
         *dilation, rows.data_ptr(), wide)  # fmt: skip
    return out


def _max_supports(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
                  dilation: Sequence[int], ceil_mode: bool) -> str | None:  # fmt: skip
    if x.dtype not in _STORABLE or x.ndim != 4:
        return f"input of {x.dtype} with {x.ndim} axes; uint8, int8 and float32 with 4 are supported"
    for size, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True):
        if min(k, s, d) < 1 or not 0 <= 2 * p <= k:
            return f"window of {k}, stride {s}, padding {p}, dilation {d} is not one that PyTorch accepts"
        if _pooled(size, k, s, p, d, ceil_mode) < 1:
            return f"a window of {k} (dilation {d}) does not fit into {size}"
    return unavailable() or not_cpu(x)


def _max_cost(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
              dilation: Sequence[int], ceil_mode: bool) -> Cost:  # fmt: skip
    oh, ow = (_pooled(*v, ceil_mode) for v in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True))
    count = x.shape[0] * x.shape[1] * oh * ow
    return Cost(pieces(x) + count * x.element_size(), count * kernel[0] * kernel[1])


def _plane(g: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    x = 50 * torch.randn(*shape, generator=g)
    x = x + 128 if dtype == torch.uint8 else x
    x = x if dtype.is_floating_point else x.clamp(*((0, 255) if dtype == torch.uint8 else (-128, 127)))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def _max_samples() -> Iterator[Sample]:
    def make(name: str, shape: tuple[int, ...], dtype: torch.dtype, kernel: int = 3, stride: int = 2, padding: int = 1,
             dilation: int = 1, ceil: bool = False, bench: bool = False) -> Sample:  # fmt: skip
        pairs = [[v, v] for v in (kernel, stride, padding, dilation)]
        return Sample(name, lambda g: (_plane(g, dtype, *shape), *pairs, ceil), bench)

    yield make("1x64x112x112 u8", (1, 64, 112, 112), torch.uint8, bench=True)
    yield make("1x64x112x112 f32", (1, 64, 112, 112), torch.float32, bench=True)
    yield make("1x256x28x28 u8, 5 by 1", (1, 256, 28, 28), torch.uint8, 5, 1, 2, bench=True)
    yield make("2x5x9x7 i8, ceil", (2, 5, 9, 7), torch.int8, 2, 2, 0, ceil=True)
    yield make("1x3x13x11 u8, dilated", (1, 3, 13, 11), torch.uint8, 3, 2, 1, 2)
    yield make("1x7x6x6 f32, stride 3", (1, 7, 6, 6), torch.float32, 2, 3, 1, ceil=True)
    yield Sample("2x3x8x5 uneven window, contiguous", lambda g: (
        torch.randn(2, 3, 8, 5, generator=g), [3, 2], [1, 2], [1, 0], [1, 2], False), False)  # fmt: skip


# -- mean ------------------------------------------------------------------------------------------------------------

#: Channels per unit of work.
_WIDTH = np.int64(256)
_ZERO, _NEXT = np.int64(0), np.int64(1)


@device
def add_four(kind, address, step, n, to):
    """``to += `` the sum of four pixels, ``step`` elements apart, n channels each."""
    y = f32(to)
    if kind == 0:
        a = f32(address)
        for i in range(n):
            y[i] += (a[i] + a[step + i]) + (a[2 * step + i] + a[3 * step + i])
    elif kind == 1:
        h = u16(address)
        for i in range(n):
            y[i] += (widened(h[i]) + widened(h[step + i])) + (widened(h[2 * step + i]) + widened(h[3 * step + i]))
    elif kind == 2:
        b = u8(address)
        for i in range(n):
            y[i] += real(np.int32(b[i]) + np.int32(b[step + i]) + np.int32(b[2 * step + i]) + np.int32(b[3 * step + i]))
    else:
        e = i8(address)
        for i in range(n):
            y[i] += real(np.int32(e[i]) + np.int32(e[step + i]) + np.int32(e[2 * step + i]) + np.int32(e[3 * step + i]))


def _mean_pool(params):  # device code
    """Slots: 2 x, 3 kind, 4 element bytes, 5 n c h w, 9 channels_last, 10 out, 11 its kind, 12 its bytes, 13 scale, 14 zero,
    15 grid."""
    p, d = i64(params), f64(params)
    kind, size, c, h, w = p[3], p[4], p[6], p[7], p[8]
    one, line, sums = scratch(), scratch(), scratch()
    f_sums = f32(sums)
    count, scale, zero = real(h * w), real(d[13]), real(d[14])
    parts = (c + _WIDTH - 1) // _WIDTH
    first, end = share(params, p[5] * parts)
    for task in range(first, end):
        image, begin = task // parts, task % parts * _WIDTH
        m = min(_WIDTH, c - begin)
        for i in range(m):
            f_sums[i] = real(0)
        if p[9] != 0:
            for y in range(h):  # one row of the image at a time: a sum of sums rounds less than one long sum
                at = p[2] + ((image * h + y) * w * c + begin) * size
                load(kind, at, _NEXT, m, real(1), real(0), line)
                for x in range(1, w - 3, 4):
                    add_four(kind, at + x * c * size, c, m, line)
                for x in range(1 + (w - 1) // 4 * 4, w):
                    load(kind, at + x * c * size, _NEXT, m, real(1), real(0), one)
                    add(line, one, m, line)
                add(sums, line, m, sums)
        else:
            for i in range(m):
                at, left, sum_ = p[2] + (image * c + begin + i) * h * w * size, h * w, real(0)
                while left > 0:
                    n = min(left, np.int64(1024))
                    load(kind, at, _NEXT, n, real(1), real(0), one)
                    sum_ += total(one, n)
                    at += n * size
                    left -= n
                f_sums[i] = sum_
        for i in range(m):
            f_sums[i] = (f_sums[i] / count - zero) * scale
        store(p[11], p[10] + (image * c + begin) * p[12], m, sums, real(d[15]), p[16], real(d[17]), real(d[18]))


_MEAN = Native(_mean_pool, "q" * 11 + "dd" + GRID)


def mean_pool(x: Tensor, x_scale: float, x_zero_point: int, keep: bool, scale: float, zero_point: int, low: int,
              high: int, dtype: torch.dtype | None) -> Tensor:  # fmt: skip
    """See ``graphwright.ops.lowered.mean_pool``."""
    n, c, h, w = x.shape
    out = torch.empty((n, c, 1, 1) if keep else (n, c), dtype=dtype or torch.float32)
    if not out.numel():
        return out
    plain = x.is_contiguous()
    if not plain:
        x = x.contiguous(memory_format=torch.channels_last)
    if x.is_floating_point():
        x_scale, x_zero_point = 1.0, 0
    kind, target = KIND[x.dtype], KIND[out.dtype]
    _MEAN(threads_for(x.numel()), x.data_ptr(), kind, BYTES[kind], n, c, h, w, not plain, out.data_ptr(), target,
          BYTES[target], x_scale, x_zero_point, *grid(scale, zero_point, low, high))  # fmt: skip
    return out


def _mean_supports(x: Tensor, x_scale: float, x_zero_point: int, keep: bool, scale: float, zero_point: int, low: int,
                   high: int, dtype: torch.dtype | None) -> str | None:  # fmt: skip
    if x.dtype not in KIND or x.ndim != 4:
        return f"input of {x.dtype} with {x.ndim} axes; {', '.join(map(str, KIND))} with 4 are supported"
    if (dtype or torch.float32) not in KIND:
        return f"result of {dtype}; there are {', '.join(map(str, KIND))}"
    if not x.shape[2] * x.shape[3]:
        return "an empty plane has no mean"
    return unavailable() or not_cpu(x)


def _mean_cost(x: Tensor, x_scale: float, x_zero_point: int, keep: bool, scale: float, zero_point: int, low: int,
               high: int, dtype: torch.dtype | None) -> Cost:  # fmt: skip
    return Cost(pieces(x) + x.shape[0] * x.shape[1] * (dtype or torch.float32).itemsize, x.numel())


def _mean_samples() -> Iterator[Sample]:
    floats, bytes_ = (1.0, 0, 0, 0, None), (0.01, 3, 0, 255, torch.uint8)

    def make(name: str, shape: tuple[int, ...], dtype: torch.dtype, out: Any, *, keep: bool = False, last: bool = True,
             bench: bool = False) -> Sample:  # fmt: skip
        def args(g: torch.Generator) -> tuple[Any, ...]:
            x = _plane(g, dtype, *shape)
            return x if last else x.contiguous(), 0.02, 100, keep, *out

        return Sample(name, args, bench)

    yield make("1x2048x7x7 u8 to f32", (1, 2048, 7, 7), torch.uint8, floats, bench=True)
    yield make("8x512x14x14 f32", (8, 512, 14, 14), torch.float32, floats, bench=True)
    yield make("3x17x5x9 u8 to u8", (3, 17, 5, 9), torch.uint8, bytes_, keep=True)
    yield make("2x300x31x33 contiguous", (2, 300, 31, 33), torch.float32, floats, last=False)
    yield make("2x5x7x3 i8 contiguous", (2, 5, 7, 3), torch.int8, bytes_, last=False)
    yield make("1x1x1x1", (1, 1, 1, 1), torch.uint8, floats)


KERNELS = (
    Kernel("graphwright.max_pool2d", "cpu", "llvm", max_pool2d, _max_supports, _max_cost, _max_samples),
    Kernel("graphwright.mean_pool", "cpu", "llvm", mean_pool, _mean_supports, _mean_cost, _mean_samples),
)
