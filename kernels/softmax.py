"""Softmax over the last axis, with scale, mask and causal cut.

    s = x * scale + mask;  p = exp(s - max(s)) / sum(exp(s - max(s)))

``x`` [n0, n1, r, c] float32 or bfloat16 (fewer axes count as 1), rows of any even stride; ``mask`` float32 or bool, broadcast
(bool: False is -inf); out float32 [n0, n1, r, c], contiguous; ``run`` may write over ``x``. A row is kept in the L1 cache
between its passes: bound by memory, or by the exponential where scores come from a cache.
A row of -inf alone, or with NaN in it, gives NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.kernels.common import not_cpu, pieces, rows_of
from graphwright.kernels.native import Native, threads_for, unavailable
from graphwright.kernels.tile import (
    BYTES,
    KIND,
    device,
    exp,
    f32,
    f64,
    fetch,
    i64,
    largest,
    real,
    reducing,
    share,
    u8,
    wide_scratch,
)  # fmt: skip

MAX_COLUMNS = 16384
_NEXT, _INFINITY = np.int64(1), real(np.inf)

#: Slots that describe a mask: address (0: none), whether it is bool, and four strides.
MASK = "qqqqqq"
NO_MASK = (0, 0, 0, 0, 0, 0)


@device
def apply_mask(row, n, mask, is_bool, step):
    """Add a float mask to ``n`` scores, or put -inf where a bool mask is False; in place. ``mask``: address of the row."""
    s = f32(row)
    if is_bool != 0:
        keep = u8(mask)
        for i in range(n):
            s[i] = s[i] if keep[i * step] != 0 else -_INFINITY
    else:
        add = f32(mask)
        for i in range(n):
            s[i] = s[i] + add[i * step]


@reducing
def exponentials(row, n, top):
    """``exp(s - top)`` in place; gives the sum."""
    s, sum_ = f32(row), real(0)
    for i in range(n):
        e = exp(s[i] - top)
        s[i] = e
        sum_ += e
    return sum_


@device
def scale_into(row, n, factor, to):
    x, y = f32(row), f32(to)
    for i in range(n):
        y[i] = x[i] * factor


@device
def fill(row, first, n, value):
    s = f32(row)
    for i in range(first, n):
        s[i] = value


@device
def mask_row(params, slot, i0, i1, i2):
    """Address of the mask's row; ``slot`` is where MASK begins."""
    p = i64(params)
    size = 1 if p[slot + 1] != 0 else 4
    return p[slot] + (i0 * p[slot + 2] + i1 * p[slot + 3] + i2 * p[slot + 4]) * size


_MASK_AT = np.int64(11)


def _softmax(params):  # device code
    p, d = i64(params), f64(params)
    x, kind, step, out = p[2], p[3], p[4], p[5]
    n1, r, columns, scale, causal = p[7], p[8], p[9], real(d[10]), p[17] != 0
    buffer, other = wide_scratch(), wide_scratch()
    first, end = share(params, p[6] * n1 * r)
    line, i2 = first // r, first % r
    for row in range(first, end):
        n = min(i2 + 1, columns) if causal else columns
        scale_into(fetch(kind, x + row * step, _NEXT, n, real(1), real(0), other), n, scale, buffer)
        if p[11] != 0:
            apply_mask(buffer, n, mask_row(params, _MASK_AT, line // n1, line % n1, i2), p[12], p[16])
        sum_ = exponentials(buffer, n, largest(buffer, n))
        to = out + row * columns * 4
        scale_into(buffer, n, real(1) / sum_, to)
        if n < columns:
            fill(to, n, columns, real(0) * sum_)  # NaN beside NaN
        i2 += 1
        if i2 == r:
            line, i2 = line + 1, np.int64(0)


_NATIVE = Native(_softmax, "qqqq" + "qqqq" + "d" + MASK + "q")


def mask_slots(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The slots of a mask broadcast to a 4-D shape."""
    if mask is None:
        return NO_MASK
    return (mask.data_ptr(), mask.dtype == torch.bool, *mask.expand(shape).stride())


def run(x: Tensor, mask: Tensor | None, scale: float, causal: bool, out: Tensor | None = None) -> Tensor:
    """See ``graphwright.ops.lowered.softmax``. ``out``: contiguous float32 tensor to write to; x itself is allowed."""
    if out is None:
        out = torch.empty(x.shape, dtype=torch.float32)
    if not x.numel():
        return out
    shape = (1,) * (4 - x.ndim) + tuple(x.shape)
    rows = rows_of(x)
    kind = KIND[rows.dtype]
    _NATIVE(
        threads_for(x.numel()), rows.data_ptr(), kind, rows.stride(0) * BYTES[kind], out.data_ptr(), *shape, scale,
        *mask_slots(mask, shape), causal,
    )  # fmt: skip
    return out


def mask_unfit(mask: Tensor | None, shape: tuple[int, ...]) -> str | None:
    """None, or why a mask cannot be used with scores of this shape."""
    if mask is None:
        return None
    if mask.dtype not in (torch.float32, torch.bool):
        return f"mask of {mask.dtype}; float32 and bool are supported"
    fits = mask.ndim <= len(shape) and all(n in (1, m) for n, m in zip(mask.shape[::-1], shape[::-1], strict=False))
    return None if fits else f"mask of shape {tuple(mask.shape)} does not broadcast to {shape}"


def supports(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> str | None:
    if (reason := unavailable() or not_cpu(x, mask) or mask_unfit(mask, tuple(x.shape))) is not None:
        return reason
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"input of {x.dtype}; float32 and bfloat16 are supported"
    if not 1 <= x.ndim <= 4 or x.shape[-1] > MAX_COLUMNS:
        return f"shape {tuple(x.shape)}; 1 to 4 axes and rows of up to {MAX_COLUMNS} elements are supported"
    return "causal softmax needs two axes" if causal and x.ndim < 2 else None


def cost(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Cost:
    return Cost(pieces(x, mask) + 4 * x.numel(), 14 * x.numel())


def samples() -> Iterator[Sample]:
    def make(name: str, shape: tuple[int, ...], *, mask: Any = None, scale: float = 1.0, causal: bool = False,
             kind: torch.dtype = torch.float32, bench: bool = False) -> Sample:  # fmt: skip
        def args(g: torch.Generator) -> tuple[Any, ...]:
            x = (5 * torch.randn(*shape, generator=g)).to(kind)
            return x, None if mask is None else mask(g), scale, causal

        return Sample(name, args, bench)

    def added(*shape: int) -> Any:
        return lambda g: torch.where(torch.rand(*shape, generator=g) < 0.3, torch.finfo(torch.float32).min, 0.0)

    def kept(*shape: int) -> Any:
        return lambda g: torch.rand(*shape, generator=g) < 0.6

    yield make("8x12x128x128 padding mask", (8, 12, 128, 128), mask=added(8, 1, 1, 128), scale=32**-0.5, bench=True)
    yield make("1x6x197x197", (1, 6, 197, 197), scale=0.125, bench=True)
    yield make("64x1000", (64, 1000), bench=True)
    yield make("1x12x512x512 causal", (1, 12, 512, 512), causal=True, bench=True)
    yield make("2x3x7x9 bool mask, empty rows", (2, 3, 7, 9), mask=lambda g: kept(7, 9)(g) & (torch.arange(7) > 2)[:, None])
    yield make("2x3x7x9 bool per row", (2, 3, 7, 9), mask=lambda g: (torch.arange(7) > 2)[:, None])
    yield make("3x5x11 causal, mask", (3, 5, 11), mask=added(5, 11), causal=True)
    yield make("4x9x5 causal, bf16", (4, 9, 5), causal=True, kind=torch.bfloat16)
    yield make("17", (17,), scale=-2.0)
    yield make("5x1", (5, 1))
    yield make("1x16384", (1, 16384))
    yield Sample("NaN and infinities", lambda g: (torch.tensor([
        [1.0, torch.nan, 2.0], [torch.inf, 0.0, 1.0], [-torch.inf, 0.0, 1.0], [-torch.inf] * 3, [100.0, -100.0, 0.0],
    ]), None, 1.0, False), False)  # fmt: skip


KERNEL = Kernel("graphwright.softmax", "cpu", "llvm", run, supports, cost, samples)
