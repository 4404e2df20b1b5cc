"""Linear layers of int8 numbers with everything that follows fused: bias, residual, activation, quantization.

    y = activation(x_scale (x8 - x_zero) @ (w8 * w_scale)^T + bias + other);   q = clamp(round(y / scale) + zero_point, low, high)

``x`` [*, i] uint8 or int8 under one scale and zero point or with one for each row, or float, which is quantized row by row first;
``weight`` [o, i] int8 with a scale per row, packed ahead (``pack``); out [*, o] float32, float16, bfloat16, uint8 or int8. A task is 48 rows by 64 or 128 columns: its strip
of the weight (64 i bytes for each 64) stays in the L2 cache; six rows at a time, the int32 sums go through all the rest in the L1 cache.
Bound by arithmetic; by memory (the weight, once) for few rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.kernels.activations import ARITHMETIC, CODE, SMOOTH, scalars_of, simple, smooth, unfit_epilogue
from graphwright.kernels.common import GRID, address, as_rows, grid, not_cpu, per_channel, pieces, rows_of
from graphwright.kernels.native import Native, specialized, threads_for
from graphwright.kernels.tile import KIND, SHIFT, device, f32, f64, i32, i64, real, scratch_of, share, store
from graphwright.kernels.tile import add as add_rows
from graphwright.kernels.vector import (
    LANES,
    floats,
    fma,
    larger,
    least,
    load_f,
    load_i,
    most,
    mul,
    mul_i,
    prefetch_to_write,
    quantized,
    smaller,
    splat_f,
    splat_i,
    store_bytes,
    store_f,
    sub_i,
    total_f,
)  # fmt: skip
from graphwright.kernels.vnni import DEPTH, products, unfit, unfit_depth
from graphwright.kernels.vnni import pack as pack_columns

#: Rows of one task, those of one whose strip passes in pieces, and groups of four of such a piece: 256 KiB of the strip.
ROWS, TALL, PIECE = 48, 144, 1024
_ZERO, _ONE = np.int64(0), np.int64(1)
_HALVES = (torch.float16, torch.bfloat16)
_INPUTS = (torch.uint8, torch.int8, torch.float32, *_HALVES)
_sums, _more = scratch_of(TALL * 4 * LANES), scratch_of(6 * 8 * LANES)


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the kernel reads it. All padded to whole blocks of 16 output channels, with zeros.

    Attributes:
        out, width: output channels, input channels.
        weight: ``[blocks, ceil(width / 4), 16, 4]`` int8.
        sums: of the integers of each output channel, int32.
    """

    out: int
    width: int
    weight: Tensor
    sums: Tensor
    scales: Tensor
    bias: Tensor


def pack(weight: Tensor, scales: Tensor, bias: Tensor | None) -> Packed:
    """Pack ``weight [o, i]`` int8 with ``scales`` [o] (or one for all) and ``bias`` [o]."""
    out, width = weight.shape
    behind = (0, -out % LANES)
    pad = torch.nn.functional.pad
    return Packed(
        out, width, pack_columns(weight.detach().t()), pad(weight.sum(1, dtype=torch.int32), behind),
        *per_channel(scales, bias, out, LANES),
    )  # fmt: skip


# -- rows of floats to uint8 -----------------------------------------------------------------------------------------


def _round_rows(params):  # device code
    """Slots: 2 x, 3 step between its rows in bytes, 4 rows, 5 columns (a multiple of 16), 6 out, 7 scales, 8 zero points."""
    p = i64(params)
    columns, scales, points = p[5], f32(p[7]), i32(p[8])
    first, end = share(params, p[4])
    for r in range(first, end):
        x, to = p[2] + r * p[3], p[6] + r * columns
        top, bottom, odd = splat_f(real(0)), splat_f(real(0)), splat_f(real(0))
        for c in range(0, columns, 16):
            v = load_f(x + c * 4)
            top, bottom, odd = larger(v, top), smaller(v, bottom), fma(v, splat_f(real(0)), odd)
        low = least(bottom)
        scale = (most(top) - low) * real(1 / 255)
        scale = scale if scale > real(1.1754944e-38) else real(1)
        point = (-low / scale + SHIFT) - SHIFT  # rounded half to even
        point_, inverse = splat_f(point), splat_f(real(1) / scale)
        under, over = splat_f(-point), splat_f(real(255) - point)
        for c in range(0, columns, 16):
            store_bytes(quantized(load_f(x + c * 4), inverse, under, over, point_), to + c)
        scales[r] = scale + total_f(odd)  # NaN in, NaN out: 0 times NaN or infinity
        points[r] = np.int32(point)


_ROUND_ROWS = Native(_round_rows, "q" * 7)


# -- the product -----------------------------------------------------------------------------------------------------


@device
def real_rows(sums, rows, step, n, shift, point, scale, scales, bias, points, factors, to, to_step):
    """Rows of ``n`` int32 sums less ``point * shift``, scaled, plus bias: floats; steps in bytes.

    ``points`` and ``factors`` are addresses of a zero point and a scale for each row, or 0: ``point`` and ``scale`` are those of all. Points of
    rows come with factors of rows.
    """
    for c in range(0, n, 16):
        shift_, scale_, bias_ = load_i(shift + c * 4), load_f(scales + c * 4), load_f(bias + c * 4)
        less, factor = mul_i(shift_, splat_i(point)), mul(scale_, splat_f(scale))
        if points != 0:
            for r in range(rows):
                x = floats(sub_i(load_i(sums + r * step + c * 4), mul_i(shift_, splat_i(i32(points)[r]))))
                store_f(fma(mul(x, splat_f(f32(factors)[r])), scale_, bias_), to + r * to_step + c * 4)
        elif factors != 0:
            for r in range(rows):
                x = floats(sub_i(load_i(sums + r * step + c * 4), less))
                store_f(fma(mul(x, splat_f(f32(factors)[r])), scale_, bias_), to + r * to_step + c * 4)
        else:
            for r in range(rows):
                store_f(fma(floats(sub_i(load_i(sums + r * step + c * 4), less)), factor, bias_), to + r * to_step + c * 4)


@device
def store_row(kind, row, n, inverse, zero, low, high, to):
    """``n`` floats as what the result is made of."""
    if kind == 0 or n % 16 != 0:
        store(kind, to, n, row, inverse, zero, low, high)
    else:
        inverse_, point, low_, high_ = splat_f(inverse), splat_f(real(zero)), splat_f(low), splat_f(high)
        for c in range(0, n, 16):
            store_bytes(quantized(load_f(row + c * 4), inverse_, low_, high_, point), to + c)


def _linear(params):  # device code, with ``activate`` put in by ``specialized``
    """Slots: 2 x, 3 its row in bytes, 4 rows, 5 columns, 6 weight, 7 groups of four, 8 sums, 9 scales, 10 bias, 11 scales of rows
    or 0, 12 zero points of rows or 0, 13 scale, 14 zero point, 15 other or 0, 16 its row in bytes, 17 out, 18 kind, 19 its row in
    bytes, 20 code, 21 a, 22 b, 23 grid, 27 rows and blocks of a task, 29 groups of four of a piece."""
    p, d = i64(params), f64(params)
    columns, steps, kind, code = p[5], p[7], p[18], p[20]
    a, b, inverse, low, high_ = real(d[21]), real(d[22]), real(d[23]), real(d[25]), real(d[26])
    scale, point = real(d[13]), np.int32(p[14])
    size = 4 if kind == 0 else 1
    blocks, bands = (columns + 15) // 16, (p[4] + p[27] - 1) // p[27]
    sums, band, piece = _sums(), p[27], p[29]
    tiles, group = bands * (band // 6), p[28]
    pace = min(np.int64(16), (group * 64 + tiles - 1) // tiles)  # of the next strip for each step, so that it is there in time
    first, end = share(params, (blocks + group - 1) // group * bands)
    for task in range(first, end):
        block, row = task // bands * group, task % bands * band
        rows, wide = min(band, p[4] - row), min(group, blocks - block)
        at, width = block * 16, wide * 16
        n, step, strip = min(width, columns - at), width * 4, p[6] + block * steps * 64
        ahead = strip + group * steps * 64 if block + group < blocks else strip
        whole = kind == 0 and code == NOTHING and n == width and p[15] == 0  # noqa: F821
        pieces = (rows + 5) // 6
        low_, over = rows // pieces, rows - rows // pieces * pieces
        start = np.int64(0)
        while start < steps:  # a piece of the strip stays near while the rows of the task pass by
            some, r0, taller, coming = min(piece, steps - start), np.int64(0), over, ahead + (row // 6 * steps + start) * pace
            while r0 < rows:  # six rows at a time go through all the rest, so that the result drains while the next six are multiplied
                high = low_ + 1 if taller > 0 else low_
                taller -= 1
                line, out = sums + r0 * step if some < steps else sums, p[17] + (row + r0) * p[19] + at * size
                if start + some == steps:
                    for r in range(high):
                        for c in range(0, n * size, 64):
                            prefetch_to_write(out + r * p[19] + c)
                products(p[2] + (row + r0) * p[3] + start * 4, p[3], high, _ONE, _ZERO, strip + start * 64, steps * 64, wide, some, line, step,
                         coming, pace, start)  # fmt: skip
                if start + some == steps:
                    points = p[12] + (row + r0) * 4 if p[12] != 0 else _ZERO
                    factors = p[11] + (row + r0) * 4 if p[11] != 0 else _ZERO
                    real_rows(line, high, step, width, p[8] + at * 4, point, scale, p[9] + at * 4, p[10] + at * 4, points, factors,
                              out if whole else line, p[19] if whole else step)  # fmt: skip
                    if p[15] != 0:
                        for r in range(high):
                            add_rows(line + r * step, p[15] + (row + r0 + r) * p[16] + at * 4, n, line + r * step)
                    if not whole:
                        y = activate(code, line, high * width, a, b, _more())  # noqa: F821  in place LLVM would not vectorize
                        for r in range(high):
                            store_row(kind, y + r * step, n, inverse, p[24], low, high_, out + r * p[19])
                coming += steps * pace
                r0 += high
            start += some


_SLOTS = "q" * 11 + "d" + "q" * 7 + "dd" + GRID + "qqq"
_SIMPLE = Native(specialized(_linear, "linear_int8_simple", activate=simple, NOTHING=np.int64(0)), _SLOTS)
_SMOOTH = Native(specialized(_linear, "linear_int8_smooth", activate=smooth, NOTHING=np.int64(-1)), _SLOTS)


@functools.lru_cache(1024)
def _task(rows: int, blocks: int, steps: int, threads: int) -> tuple[int, int, int]:
    """Rows and blocks of a task, and groups of four of a piece of its strip.

    A strip that would crowd the L2 cache passes in pieces, each by as many rows as have sums; where there are tasks enough, two strips
    that fit are one task, which touches each page of the result half as often.
    """
    if steps > PIECE:
        return TALL, 4, PIECE
    pairs = blocks % 8 == 0 and 8 * steps * 64 <= 2**18 and blocks // 8 * -(-rows // ROWS) >= 32 * threads
    return ROWS, 8 if pairs else 4, steps


def run(
    x: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scales: Tensor, bias: Tensor | None,
    other: Tensor | None, activation: str, scalars: Sequence[float],
    scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None,
    x_scales: Tensor | None, x_zero_points: Tensor | None,
) -> Tensor:  # fmt: skip
    """See ``graphwright.ops.lowered.linear_int8``."""
    packed = pack(weight, weight_scales, bias)
    return apply(x, x_scale, x_zero_point, packed, other, activation, scalars, scale, zero_point, low, high, dtype, x_scales, x_zero_points)


def apply(
    x: Tensor, x_scale: float, x_zero_point: int, packed: Packed, other: Tensor | None, activation: str, scalars: Sequence[float],
    scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None,
    x_scales: Tensor | None = None, x_zero_points: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``run`` with a weight packed ahead."""
    narrow = dtype in _HALVES  # sums are stored as float32 and rounded afterwards
    out = torch.empty((*x.shape[:-1], packed.out), dtype=torch.float32 if narrow or dtype is None else dtype)
    if not out.numel():
        return out.to(dtype or torch.float32)
    rows, scales, points = rows_of(x), None, None
    threads = threads_for(rows.shape[0] * packed.out * max(packed.width, 1) // 16)
    if x.is_floating_point():
        rows, scales, points = round_rows(rows.float(), threads)
    else:
        ahead = 128 if x.dtype == torch.int8 else 0
        if ahead:  # the products want unsigned bytes: flipping the top bit adds 128
            rows = rows.view(torch.uint8) ^ 128
        x_zero_point = x_zero_point + ahead if x_scales is None else ahead
        if x_scales is not None:
            scales = x_scales.reshape(-1).float().contiguous()
            points = None if x_zero_points is None else (x_zero_points.reshape(-1).to(torch.int32) + ahead).contiguous()
        if packed.width % DEPTH or rows.stride(0) < packed.width:
            rows = torch.nn.functional.pad(rows, (0, -packed.width % DEPTH)).contiguous()
    kind = KIND[out.dtype]
    other, step = as_rows(other, out.shape)
    native = _SMOOTH if activation in SMOOTH else _SIMPLE
    code = CODE[activation]
    native(
        threads, rows.data_ptr(), rows.stride(0), rows.shape[0], packed.out, packed.weight.data_ptr(), packed.weight.shape[1],
        packed.sums.data_ptr(), packed.scales.data_ptr(), packed.bias.data_ptr(), address(scales), address(points), x_scale, x_zero_point,
        address(other), step, out.data_ptr(), kind, packed.out * out.element_size(), code, *scalars_of(activation, scalars),
        *grid(scale, zero_point, low, high), *_task(rows.shape[0], packed.weight.shape[0], packed.weight.shape[1], threads),
    )  # fmt: skip
    return out.to(dtype) if narrow else out


def round_rows(x: Tensor, threads: int) -> tuple[Tensor, Tensor, Tensor]:
    """``x [rows, columns]`` float32 as uint8, columns padded to a multiple of 16, with a scale and an int32 zero point per row."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % LANES)) if x.shape[1] % LANES else x
    rows, columns = x.shape
    q, scales, points = torch.empty((rows, columns), dtype=torch.uint8), torch.empty(rows), torch.empty(rows, dtype=torch.int32)
    _ROUND_ROWS(threads, x.data_ptr(), x.stride(0) * 4, rows, columns, q.data_ptr(), scales.data_ptr(), points.data_ptr())
    return q, scales, points


def supports(
    x: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scales: Tensor, bias: Tensor | None,
    other: Tensor | None, activation: str, scalars: Sequence[float],
    scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None,
    x_scales: Tensor | None, x_zero_points: Tensor | None,
) -> str | None:  # fmt: skip
    if (reason := unfit() or not_cpu(x, weight, weight_scales, bias, other, x_scales, x_zero_points)) is not None:
        return reason
    if x.dtype not in _INPUTS or weight.dtype != torch.int8 or weight.ndim != 2:
        return f"x is {x.dtype}, the weight {weight.dtype} with {weight.ndim} axes; wanted uint8, int8 or float, and int8 with 2"
    if not x.ndim or x.shape[-1] != weight.shape[1]:
        return f"shapes {tuple(x.shape)} and {tuple(weight.shape)} do not belong together"
    for name, per_row in (("x_scales", x_scales), ("x_zero_points", x_zero_points)):
        if per_row is not None and per_row.shape != (*x.shape[:-1], 1):
            return f"{name} has shape {tuple(per_row.shape)}; wanted {(*x.shape[:-1], 1)}"
    # halves are widened on the way in and rounded on the way out
    wide = None if other is None or other.dtype in _HALVES else other
    return unfit_rest(activation, weight.shape[1], wide, None if dtype in _HALVES else dtype)


def unfit_rest(activation: str, width: int, other: Tensor | None, dtype: torch.dtype | None) -> str | None:
    """None, or why a product over ``width`` inputs with this epilogue can't be served."""
    return unfit_depth(width) or unfit_epilogue(activation, None if other is None else other.dtype, dtype)


def cost(
    x: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scales: Tensor, bias: Tensor | None,
    other: Tensor | None, activation: str, scalars: Sequence[float],
    scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None,
    x_scales: Tensor | None, x_zero_points: Tensor | None,
) -> Cost:  # fmt: skip
    rows, (out, width) = x.numel() // max(x.shape[-1], 1), weight.shape
    moved = pieces(x, weight, weight_scales, bias, other, x_scales, x_zero_points) + rows * out * (dtype or torch.float32).itemsize
    return Cost(moved, rows * out * (2 * width + 3 + ARITHMETIC.get(activation, 30)))


def samples() -> Iterator[Sample]:
    def make(name: str, rows: tuple[int, ...], width: int, out: int, *, x: torch.dtype = torch.uint8, bias: bool = True, other: Any = None,
             activation: str = "none", scalars: tuple[float, ...] = (), dtype: Any = None, per_row: str = "", bench: bool = False) -> Sample:  # fmt: skip
        def args(g: torch.Generator) -> tuple[Any, ...]:
            given = (torch.randn(*rows, width, generator=g) * 3).to(x) if x.is_floating_point else \
                torch.randint(0, 256, (*rows, width), generator=g, dtype=torch.uint8).view(x)  # fmt: skip
            x_scales = torch.rand(*rows, 1, generator=g) * 0.05 if per_row else None
            x_points = torch.randint(-20, 21, (*rows, 1), generator=g, dtype=torch.int32) if per_row == "both" else None
            weight = torch.randint(-127, 128, (out, width), generator=g).to(torch.int8)
            scales = torch.rand(out, generator=g) * 0.001 + 0.0005
            points = (0.05, 128, 0, 255) if dtype == torch.uint8 else (0.05, 0, -128, 127)
            return (given, 0.02, 121, weight, scales, torch.randn(out, generator=g) if bias else None,
                    torch.randn(*rows, out, generator=g).to(other) if other else None, activation, scalars, *points, dtype, x_scales, x_points)  # fmt: skip

        return Sample(name, args, bench)

    u8, i8, f16, bf16, f32 = torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32
    yield make("1024x384x1152", (8, 128), 384, 1152, bench=True)
    yield make("1024x384x1536 gelu to u8", (8, 128), 384, 1536, activation="gelu", dtype=u8, bench=True)
    yield make("1024x1536x384 residual", (1024,), 1536, 384, other=f32, bench=True)
    yield make("128x768x3072 gelu to u8", (1, 128), 768, 3072, activation="gelu", dtype=u8, bench=True)
    yield make("1x4096x4096 rows", (1,), 4096, 4096, x=f32, bench=True)
    yield make("1024x384x1536 rows", (8, 128), 384, 1536, x=f32, bench=True)
    yield make("3x5x7", (3,), 5, 7, bias=False)
    yield make("769x20x1024 rows", (769,), 20, 1024, x=f32)
    yield make("49x20x65 relu to i8", (49,), 20, 65, activation="relu", dtype=i8)
    yield make("2x3x33x17 residual silu", (2, 3), 33, 17, other=f32, activation="silu")
    yield make("50x70x130 rows hardtanh to u8", (50,), 70, 130, x=f32, activation="hardtanh", scalars=(-1.0, 2.5), dtype=u8)
    yield make("149x4200x70 relu to u8", (149,), 4200, 70, activation="relu", dtype=u8)
    yield make("1x1x1 rows", (1,), 1, 1, x=f32)
    yield make("0x8x16", (0,), 8, 16)
    yield make("0x8x16 to bf16", (0,), 8, 16, dtype=bf16)
    yield make("7x40x24 i8", (7,), 40, 24, x=i8)
    yield make("5x4x33x50 i8, scales of rows, to bf16", (5, 4), 33, 50, x=i8, per_row="scales", dtype=bf16)
    yield make("13x64x31 i8, scales and zero points of rows, half residual", (13,), 64, 31, x=i8, per_row="both", other=f16, activation="gelu", dtype=f16)
    yield make("9x30x16 u8, scales and zero points of rows, to i8", (9,), 30, 16, per_row="both", dtype=i8)
    yield make("6x20x12 rows bf16", (6,), 20, 12, x=bf16, other=bf16, dtype=bf16)


# A row's numbers may fall to either side of a rounding boundary, where float32 and float64 differ.
def ready(x: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, *rest: Any) -> Callable[[], Tensor]:
    """See ``Kernel.ready``."""
    return functools.partial(apply, x, x_scale, x_zero_point, pack(weight, weight_scales, bias), *rest)


KERNEL = Kernel("graphwright.linear_int8", "cpu", "llvm", run, supports, cost, samples, tolerance=(1e-3, 1), ready=ready)
