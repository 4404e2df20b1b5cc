"""Linear layers of int8 numbers with everything that follows fused: bias, residual, activation, quantization.

    y = activation(x_scale (x8 - x_zero) @ (w8 * w_scale)^T + bias + other);   q = clamp(round(y / scale) + zero_point, low, high)

``x`` [*, i] uint8 or int8 under one scale and zero point or with one for each row, or float, which is quantized row by row first;
``weight`` [o, i] int8 with a scale per row, packed ahead (``pack``); out [*, o] float32, float16, bfloat16, uint8 or int8. A task is 48 rows by 64 columns: its strip of
the weight (64 i bytes) stays in the L1 or L2 cache, its int32 sums (12 KiB) go through all the rest in the L1 cache. Bound by
arithmetic; by memory (the weight, once) for few rows.
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
from graphwright.kernels.common import GRID, grid, not_cpu, per_channel, pieces, rows_of
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
    quantized,
    smaller,
    splat_f,
    splat_i,
    store_bytes,
    store_f,
    sub_i,
    total_f,
)  # fmt: skip
from graphwright.kernels.vnni import DEPTH, products, unfit
from graphwright.kernels.vnni import pack as pack_columns

#: Rows and blocks of 16 columns of one task.
ROWS, BLOCKS = 48, 4
_ROWS, _BLOCKS, _ZERO, _ONE = np.int64(ROWS), np.int64(BLOCKS), np.int64(0), np.int64(1)
_HALVES = (torch.float16, torch.bfloat16)
_INPUTS = (torch.uint8, torch.int8, torch.float32, *_HALVES)
_sums, _more = (scratch_of(ROWS * BLOCKS * LANES) for _ in range(2))


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
def real_row(sums, n, shift, point, scale, scales, bias, to):
    """``n`` int32 sums less ``point * shift``, scaled, plus bias: floats."""
    point_, scale_ = splat_i(point), splat_f(scale)
    for c in range(0, n, 16):
        x = floats(sub_i(load_i(sums + c * 4), mul_i(load_i(shift + c * 4), point_)))
        store_f(fma(mul(x, scale_), load_f(scales + c * 4), load_f(bias + c * 4)), to + c * 4)


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
    or 0, 12 zero points of rows, 13 scale, 14 zero point, 15 other or 0, 16 its row in bytes, 17 out, 18 kind, 19 its row in
    bytes, 20 code, 21 a, 22 b, 23 grid."""
    p, d = i64(params), f64(params)
    columns, steps, kind, code = p[5], p[7], p[18], p[20]
    a, b, inverse, low, high = real(d[21]), real(d[22]), real(d[23]), real(d[25]), real(d[26])
    scale, point = real(d[13]), np.int32(p[14])
    size = 4 if kind == 0 else 1
    blocks, bands = (columns + 15) // 16, (p[4] + _ROWS - 1) // _ROWS
    sums = _sums()
    first, end = share(params, (blocks + _BLOCKS - 1) // _BLOCKS * bands)
    for task in range(first, end):
        block, row = task // bands * _BLOCKS, task % bands * _ROWS
        rows, wide = min(_ROWS, p[4] - row), min(_BLOCKS, blocks - block)
        at, width = block * 16, wide * 16
        n = min(width, columns - at)
        products(p[2] + row * p[3], p[3], rows, _ONE, _ZERO, p[6] + block * steps * 64, steps * 64, wide, steps, sums, width * 4)
        out = p[17] + row * p[19] + at * size
        whole = kind == 0 and code == NOTHING and n == width and p[15] == 0  # noqa: F821
        for r in range(rows):
            if p[11] != 0:
                scale, point = f32(p[11])[row + r], np.int32(i32(p[12])[row + r])
            line = sums + r * width * 4
            real_row(line, width, p[8] + at * 4, point, scale, p[9] + at * 4, p[10] + at * 4, out + r * p[19] if whole else line)
            if p[15] != 0:
                add_rows(line, p[15] + (row + r) * p[16] + at * 4, n, line)
        if not whole:
            y = activate(code, sums, rows * width, a, b, _more())  # noqa: F821  in place LLVM would not vectorize
            for r in range(rows):
                store_row(kind, y + r * width * 4, n, inverse, p[24], low, high, out + r * p[19])


_SLOTS = "q" * 11 + "d" + "q" * 7 + "dd" + GRID
_SIMPLE = Native(specialized(_linear, "linear_int8_simple", activate=simple, NOTHING=np.int64(0)), _SLOTS)
_SMOOTH = Native(specialized(_linear, "linear_int8_smooth", activate=smooth, NOTHING=np.int64(-1)), _SLOTS)


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
    rows, kept = rows_of(x), ()
    threads = threads_for(rows.shape[0] * packed.out * max(packed.width, 1) // 16)
    if x.is_floating_point():
        rows, *kept = round_rows(rows.float(), threads)
    else:
        signed = x.dtype == torch.int8
        if signed:  # the products want unsigned bytes: flipping the top bit adds 128
            rows, x_zero_point = rows.view(torch.uint8) ^ 128, x_zero_point + 128
        if x_scales is not None:
            kept = _of_rows(x_scales, x_zero_points, rows.shape[0], signed)
        if packed.width % DEPTH or rows.stride(0) < packed.width:
            rows = torch.nn.functional.pad(rows, (0, -packed.width % DEPTH)).contiguous()
    scales, points = (t.data_ptr() for t in kept) if kept else (0, 0)
    kind = KIND[out.dtype]
    residual, step = 0, 0
    if other is not None:
        other = rows_of(other.float().expand(out.shape))
        residual, step = other.data_ptr(), other.stride(0) * 4
    native = _SMOOTH if activation in SMOOTH else _SIMPLE
    code = CODE[activation]
    native(
        threads, rows.data_ptr(), rows.stride(0), rows.shape[0], packed.out, packed.weight.data_ptr(), packed.weight.shape[1],
        packed.sums.data_ptr(), packed.scales.data_ptr(), packed.bias.data_ptr(), scales, points, x_scale, x_zero_point,
        residual, step, out.data_ptr(), kind, packed.out * out.element_size(), code, *scalars_of(activation, scalars),
        *grid(scale, zero_point, low, high),
    )  # fmt: skip
    return out.to(dtype) if narrow else out


def _of_rows(scales: Tensor, zero_points: Tensor | None, rows: int, signed: bool) -> tuple[Tensor, Tensor]:
    """A float32 scale and an int32 zero point for each row; 128 more for integers that were signed."""
    ahead = 128 if signed else 0
    points = torch.full((rows,), ahead, dtype=torch.int32) if zero_points is None else zero_points.reshape(-1).to(torch.int32) + ahead
    return scales.reshape(-1).float().contiguous(), points.contiguous()


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
    if not 0 < width <= 65536:
        return f"{width} inputs; 1 to 65536 are supported"
    return unfit_epilogue(activation, None if other is None else other.dtype, dtype)


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
    yield make("49x20x65 relu to i8", (49,), 20, 65, activation="relu", dtype=i8)
    yield make("2x3x33x17 residual silu", (2, 3), 33, 17, other=f32, activation="silu")
    yield make("50x70x130 rows hardtanh to u8", (50,), 70, 130, x=f32, activation="hardtanh", scalars=(-1.0, 2.5), dtype=u8)
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
