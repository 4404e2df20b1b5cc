"""Linear layers whose weight has 8 or 4 bits with a scale per group, multiplied as half-precision floats.

    y = activation(x @ ((q - zero_point) * scale)^T + bias + other)

``x`` [*, i] float16, bfloat16 or float32; ``weight`` [o, i] int8 or [o, i / 2] uint8 (two numbers a byte); ``scales`` and
``zero_points`` [o, ceil(i / group)], groups of 32, 64, 128 (or a multiple) or the whole row; ``bias`` [o]; ``other`` [*, o];
out [*, o] float16, bfloat16 or float32. Kernels read the weight as ``weight_tiles`` packs it.

The product is made transposed, ``W x^T``: the weight is the first operand of the matrix instruction, which on every GPU may
come from registers, so that it goes there straight from its own widening, and a few rows of x fill the short side of the
instruction. Float32 x are three bfloat16 whose sum they are: exact, at three products. Bound by the bytes of the weight up to
some 64 rows of x, by the matrix units beyond; where the weight has too few rows to fill the GPU its columns are split, and a
second launch adds up the parts in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.kernel import Cost, Sample
from graphwright.kernels.gpu.language import CODE, activate, tile_of
from graphwright.kernels.gpu.launch import Config, Estimate, Family, Launch, Plan, bucket, cdiv
from graphwright.kernels.gpu.narrow_cases import (
    FLOATS,
    cost_of,
    estimate_of,
    on_meta,
    sample,
    small_samples,
    unfit,
    unfit_tiles,
)
from graphwright.kernels.gpu.weight_tiles import (
    TURN,
    Packed,
    finishing,
    load_w4a8,
    load_weight,
    of_group,
    packed,
)


@triton.jit
def part_of(x, half: tl.constexpr):
    """The leading half of float32 numbers as bfloat16, and what is left; infinities leave 0."""
    lead = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return lead.to(half), tl.where(tl.abs(x) == float("inf"), 0.0, x - lead)


@triton.jit
def narrow_kernel(
    x, x_scales, w, scales, whole, rest, bias, other, out, rows, columns, width, turns, x_step, w_step, padded, other_row, other_column, a, b,
    BITS: tl.constexpr, GROUP: tl.constexpr, ODD: tl.constexpr, ACT: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = BN // 16
    PART: tl.constexpr = 128 if GROUP == 0 else min(GROUP, 128)  # columns of a product
    U: tl.constexpr = 1 if GROUP == 0 else 128 // PART
    WHOLE: tl.constexpr = x_scales is not None  # int8 rows: sums are exact in int32
    DEEP: tl.constexpr = 1 if BITS == 8 or GROUP == 32 else 2  # of a chunk, in 32 columns
    CELLS: tl.constexpr = 8 if WHOLE else 4 if BITS == 4 else 16  # of a row of chunks per column of the weight
    CHUNK: tl.constexpr = 32 * DEEP * CELLS
    half: tl.constexpr = tl.bfloat16 if x.dtype.element_ty == tl.float32 else x.dtype.element_ty
    tile_n, tile_m = tile_of(tl.program_id(0), tl.cdiv(columns, BN), tl.cdiv(rows, BM), 8)
    piece = tl.program_id(1)
    first, last = turns * piece // SPLIT, turns * (piece + 1) // SPLIT
    n = tile_n * BN + tl.arange(0, BN)
    m = tile_m * BM + tl.arange(0, BM)
    band = tl.minimum(tile_n * A + tl.arange(0, A), padded // 16 - 1)  # the last tile may reach past the weight: it reads some row again
    row = tl.minimum(n, padded - 1)
    w_at = w + band[:, None].to(tl.int64) * w_step + tl.arange(0, CHUNK)[None, :]
    x_at = x + m[:, None].to(tl.int64) * x_step + tl.arange(0, PART)[None, :]
    here = (m < rows)[:, None]
    group = row[:, None] * U + tl.arange(0, U)[None, :]  # in a turn's scales
    acc = tl.zeros((BN, BM), tl.int32 if WHOLE and GROUP == 0 else tl.float32)
    sums = tl.zeros((BM,), tl.int32 if WHOLE else tl.float32)
    next_scale = tl.load(scales + (0 if GROUP == 0 else first * padded * U) + group)
    if whole is not None:
        next_whole = tl.load(whole + (0 if GROUP == 0 else first * padded * U) + group)
    if rest is not None:
        next_rest = tl.load(rest + (0 if GROUP == 0 else first * padded * U) + group)
    for turn in range(first, last):
        scale = next_scale
        after = tl.minimum(turn + 1, turns - 1) * padded * U
        if whole is not None:
            point = next_whole
        if rest is not None:
            left = next_rest
        if GROUP != 0:  # a turn ahead of their use
            next_scale = tl.load(scales + after + group)
            if whole is not None:
                next_whole = tl.load(whole + after + group)
            if rest is not None:
                next_rest = tl.load(rest + after + group)
        for j in tl.static_range(128 // PART):
            k = turn * 128 + j * PART
            if ODD:
                v = tl.load(x_at + k, here & (k + tl.arange(0, PART) < width)[None, :], other=0)
            else:
                v = tl.load(x_at + k, here, other=0)
            if WHOLE:
                q = load_w4a8(w_at + k * CELLS, of_group(point, j % U) if whole is not None else 0, CHUNK, PART // (32 * DEEP), whole is not None, PTX)
            else:
                if whole is not None:
                    z = of_group(point, j % U).to(tl.float32).to(half)
                else:
                    z = tl.full((BN,), 8.0 if BITS == 4 else 0.0, tl.float32).to(half)
                q = load_weight(w_at + k * CELLS, z, BITS, CHUNK, PART // (32 * DEEP), half, PTX)
            if GROUP == 0:
                d = acc
            elif WHOLE:  # |sum| < 2^22: added to the bits of 1.5 * 2^23 it makes the float of that sum
                d = tl.full((BN, BM), 0x4B400000, tl.int32)
            else:
                d = tl.zeros((BN, BM), tl.float32)
            if WHOLE:
                d = tl.dot(q, tl.trans(v), d, out_dtype=tl.int32)
                if GROUP != 0:
                    d = d.to(tl.float32, bitcast=True) - 12582912.0
            elif x.dtype.element_ty == tl.float32:
                lead, less = part_of(v, half)
                d = tl.dot(q, tl.trans(lead), d)
                lead, less = part_of(less, half)
                d = tl.dot(q, tl.trans(lead), d)
                d = tl.dot(q, tl.trans(less.to(half)), d)
            else:
                d = tl.dot(q, tl.trans(v), d)
            if rest is not None:
                total = tl.sum(v.to(sums.dtype), 1)
                if GROUP == 0:
                    sums += total
                else:
                    d -= of_group(left, j)[:, None] * total.to(tl.float32)[None, :]
            if GROUP == 0:
                acc = d
            else:
                acc += d * of_group(scale, j).to(tl.float32)[:, None]
    if GROUP == 0:
        acc = acc.to(tl.float32)
        if rest is not None:
            acc -= of_group(next_rest, 0)[:, None] * sums.to(tl.float32)[None, :]
        acc *= of_group(next_scale, 0).to(tl.float32)[:, None]
    if WHOLE:
        factor = tl.load(x_scales + m, m < rows, other=0.0).to(tl.float32)
        if whole is None:  # the numbers are 16 times what they stand for
            factor *= 0.0625
        acc *= factor[None, :]
    inside = (n < columns)[:, None] & (m < rows)[None, :]
    to = m[None, :].to(tl.int64) * columns + n[:, None]
    if SPLIT > 1:
        tl.store(out + piece.to(tl.int64) * rows * columns + to, acc, inside)
    else:
        if bias is not None:
            acc += tl.load(bias + n, n < columns, other=0.0).to(tl.float32)[:, None]
        if other is not None:
            acc += tl.load(other + m[None, :].to(tl.int64) * other_row + n[:, None] * other_column, inside, other=0.0).to(tl.float32)
        tl.store(out + to, activate(acc, a, b, ACT).to(out.dtype.element_ty), inside)


CONFIGS = (
    Config.of(BM=16, BN=64, SPLIT=1, warps=4, stages=4),
    Config.of(BM=16, BN=64, SPLIT=4, warps=4, stages=4),
    Config.of(BM=16, BN=128, SPLIT=1, warps=4, stages=4),
    Config.of(BM=16, BN=128, SPLIT=4, warps=4, stages=4),
    Config.of(BM=64, BN=64, SPLIT=1, warps=4, stages=3),
    Config.of(BM=64, BN=128, SPLIT=4, warps=8, stages=3),
    Config.of(BM=128, BN=128, SPLIT=1, warps=8, stages=3),
)


def _plan(bits: int) -> Any:
    form = f"w{bits}"

    def plan(
        x: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
        activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None, *, config: Config,
    ) -> Plan:  # fmt: skip
        made = packed(weight, scales, zero_points, group, form)
        return plan_packed(x, None, made, bias, other, activation, scalars, dtype, bits, config)

    return plan


def plan_packed(
    x: Tensor, x_scales: Tensor | None, weight: Packed, bias: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float],
    dtype: torch.dtype | None, bits: int, config: Config,
) -> Plan:  # fmt: skip
    """The plan for a weight packed ahead; ``x_scales`` [*, 1] where x is int8, and the weight packed as ``"w4a8"``."""
    flat = x.reshape(-1, weight.width)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows, out = flat.shape[0], torch.empty((*x.shape[:-1], weight.out), dtype=dtype or torch.float32, device=x.device)
    split = config["SPLIT"]
    target = torch.empty((split, rows, weight.out), dtype=torch.float32, device=x.device) if split > 1 else out
    residual = None if other is None else other.expand(out.shape).reshape(-1, weight.out)
    steps = (0, 0) if residual is None else residual.stride()
    a, b = (*map(float, scalars), 0.0, 0.0)[:2]
    whole_row = weight.group >= weight.width
    args = (flat, None if x_scales is None else x_scales.reshape(-1).contiguous(), weight.weight, weight.scales, weight.whole, weight.rest, None if split > 1 else bias, None if split > 1 else residual, target,
            rows, weight.out, weight.width, cdiv(weight.width, TURN), flat.stride(0), weight.weight.stride(0), weight.weight.shape[0] * 16,
            *steps, a, b)  # fmt: skip
    constants = {"BITS": bits, "GROUP": 0 if whole_row else weight.group, "ODD": weight.width % TURN != 0, "ACT": CODE[activation]}
    grid = (cdiv(weight.out, config["BN"]) * cdiv(rows, config["BM"]), split)
    launches = [Launch(narrow_kernel, grid, args, constants, config)]
    if split > 1:
        launches.append(finishing(target, bias, residual, out, a, b, activation, config))
    return Plan(out, tuple(launches))


def supports(
    x: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None,
) -> str | None:  # fmt: skip
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}; wanted float16, bfloat16 or float32"
    return unfit(x, weight, scales, zero_points, bias, other, activation, group, dtype)


def fits(config: Config, x: Tensor, weight: Tensor, *rest: Any) -> str | None:
    return unfit_tiles(config, x.numel() // max(x.shape[-1], 1), weight.shape[0], x.shape[-1], rest[1])


def _matrix(config: Config, x: Tensor, *rest: Any) -> str:
    target = rest[-1]
    return {"sm_80": "HMMA", "sm_90": "HGMMA"}.get(target, "v_mfma_f32")


def _estimate(bits: int) -> Any:
    def estimate(config: Config, x: Tensor, weight: Tensor, *rest: Any) -> Estimate:
        return estimate_of(config, x, weight, bits, x.element_size(), "fp16", 3 if x.dtype == torch.float32 else 1)

    return estimate


def _bucket(x: Tensor, weight: Tensor, scales: Tensor, zero_points: Any, bias: Any, other: Any, activation: str, scalars: Any, group: int,
            dtype: Any) -> tuple[Any, ...]:  # fmt: skip
    width = x.shape[-1]
    return (bucket(x.numel() // max(width, 1)), weight.shape[0], width, x.dtype, scales.dtype, zero_points is None, activation, min(group, width), dtype)


def _cost(x: Tensor, weight: Tensor, *rest: Any) -> Cost:
    return cost_of(x, (x, weight, *rest[:4]), weight.shape[0], rest[-1])


def _samples(bits: int) -> Any:
    def samples() -> Iterator[Sample]:
        yield from small_samples(bits, floats=True)
        for rows, width, out in ((1, 4096, 14336), (1, 4096, 4096), (16, 4096, 14336), (64, 4096, 4096), (4096, 4096, 4096)):
            yield sample(f"{rows}x{width}x{out} fp16 group 128", (rows,), width, out, bits, group=128, bench=True)

    return samples


def _ahead(bits: int) -> Any:
    def ahead() -> Iterator[tuple[str, tuple[Any, ...]]]:
        yield "16x4096x4096 fp16 128", on_meta(16, 4096, 4096, bits, 128, torch.float16, points=False)
        yield "4096x4096x4096 bf16 64 zero points", on_meta(4096, 4096, 4096, bits, 64, torch.bfloat16, points=True)

    return ahead


FAMILIES = tuple(
    Family(op, _plan(bits), CONFIGS, supports, _estimate(bits), _bucket, _cost, _samples(bits), _ahead(bits), fits, _matrix,
           precision=precision)
    for op, bits, precision in (("graphwright.linear_w8_groups", 8, "int8"), ("graphwright.linear_w4", 4, "int8"))
)
