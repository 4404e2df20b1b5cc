"""Linear layers of int8 rows and 4-bit weights with a scale per group, multiplied as integers.

    y = activation((x * x_scale) @ ((q - zero_point) * scale)^T + bias + other)

``x`` [*, i] int8 with ``x_scales`` [*, 1]; ``weight`` [o, i / 2] uint8 (two numbers a byte); ``scales`` and ``zero_points``
[o, ceil(i / group)], groups of 32, 64, 128 (or a multiple) or the whole row; ``bias`` [o]; ``other`` [*, o]; out [*, o] float16,
bfloat16 or float32. The weight is read as ``weight_tiles`` packs it, widened to int8 in registers (three instructions for eight
numbers where there are no zero points: a nibble at the top of a byte is 16 times itself) and multiplied transposed, as in
``linear_narrow``. Sums of a group are exact int32; they become float32 and are scaled group by group. Bound by the bytes of the
weight up to some 64 rows of x, by the int8 matrix units and the scaling beyond.
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
    _W4A8,
    _W4A8_ZERO,
    TURN,
    Packed,
    beside,
    by_lane,
    finishing,
    of_group,
    packed,
)

#: The longest row under one scale: beyond, int32 sums could overflow.
WIDEST = 131072


@triton.jit
def widen_w4a8(w, z, ZERO: tl.constexpr, PTX: tl.constexpr):
    """Chunks ``w [A, cells] uint8`` as int8 ``[16 A, C]``: less whole numbers ``z [16 A] int8`` if ZERO, else 16 times what they are less 8."""
    A: tl.constexpr = w.shape[0]
    DEEP: tl.constexpr = w.shape[1] // 256
    w = tl.reshape(w, (A, 8, 4 * DEEP, 2, 4))
    if PTX:
        if ZERO:
            z = tl.broadcast_to(by_lane((z.to(tl.int32) + 112).to(tl.uint8), A), (A, 8, 4 * DEEP, 2, 4))
            low, high = tl.inline_asm_elementwise(_W4A8_ZERO, "=&r,=&r,r,r", [w, z], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
        else:
            low, high = tl.inline_asm_elementwise(_W4A8, "=&r,=&r,r", [w], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        v = w.to(tl.int32) ^ 0x88
        if ZERO:
            y = tl.broadcast_to(by_lane(z.to(tl.int32), A), (A, 8, 4 * DEEP, 2, 4))
            low, high = ((v & 15) - y).to(tl.int8), ((v >> 4) - y).to(tl.int8)
        else:
            low, high = ((v & 15) * 16 - 128).to(tl.int8), ((v >> 4) * 16 - 128).to(tl.int8)
    q = tl.reshape(tl.join(low, high), (A, 8, 4, DEEP, 2, 4, 2))  # a g t d r p h
    return tl.reshape(tl.permute(q, (0, 4, 1, 3, 6, 2, 5)), (A * 16, DEEP * 32))


@triton.jit
def load_w4a8(at, z, CELLS: tl.constexpr, COUNT: tl.constexpr, ZERO: tl.constexpr, PTX: tl.constexpr):
    """COUNT (1 or 2) chunks of CELLS that follow each other, widened: ``[16 A, COUNT C]``."""
    q = widen_w4a8(tl.load(at), z, ZERO, PTX)
    if COUNT > 1:
        q = beside(q, widen_w4a8(tl.load(at + CELLS), z, ZERO, PTX))
    return q


@triton.jit
def w4a8_kernel(
    x, x_scales, w, scales, whole, rest, bias, other, out, rows, columns, width, turns, x_step, w_step, padded, other_row, other_column, a, b,
    GROUP: tl.constexpr, ODD: tl.constexpr, ACT: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = BN // 16
    PART: tl.constexpr = 128 if GROUP == 0 else min(GROUP, 128)  # columns of a product
    U: tl.constexpr = 1 if GROUP == 0 else 128 // PART
    DEEP: tl.constexpr = 1 if GROUP == 32 else 2  # of a chunk, in 32 columns
    CHUNK: tl.constexpr = 256 * DEEP
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
    acc = tl.zeros((BN, BM), tl.float32)
    exact = tl.zeros((BN, BM), tl.int32)
    sums = tl.zeros((BM,), tl.int32)
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
            if whole is not None:
                z = of_group(point, j % U)
            else:
                z = 0
            q = load_w4a8(w_at + k * 8, z, CHUNK, PART // (32 * DEEP), whole is not None, PTX)
            if rest is not None:
                total = tl.sum(v.to(tl.int32), 1)
            if GROUP == 0:
                exact = tl.dot(q, tl.trans(v), exact, out_dtype=tl.int32)
                if rest is not None:
                    sums += total
            else:
                # |sum| < 2^22: added to the bits of 1.5 * 2^23 it makes the float of that sum
                d = tl.dot(q, tl.trans(v), tl.full((BN, BM), 0x4B400000, tl.int32), out_dtype=tl.int32)
                y = d.to(tl.float32, bitcast=True) - 12582912.0
                if rest is not None:
                    y -= of_group(left, j)[:, None] * total.to(tl.float32)[None, :]
                acc += y * of_group(scale, j).to(tl.float32)[:, None]
    if GROUP == 0:
        acc = exact.to(tl.float32)
        if rest is not None:
            acc -= of_group(next_rest, 0)[:, None] * sums.to(tl.float32)[None, :]
        acc *= of_group(next_scale, 0).to(tl.float32)[:, None]
    factor = tl.load(x_scales + m, m < rows, other=0.0).to(tl.float32)
    if whole is None:
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
    Config.of(BM=128, BN=64, SPLIT=1, warps=4, stages=3),
    Config.of(BM=128, BN=128, SPLIT=1, warps=8, stages=3),
)


def plan(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None, *, config: Config,
) -> Plan:  # fmt: skip
    return plan_packed(x, x_scales, packed(weight, scales, zero_points, group, "w4a8"), bias, other, activation, scalars, dtype, config)


def plan_packed(
    x: Tensor, x_scales: Tensor, weight: Packed, bias: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float],
    dtype: torch.dtype | None, config: Config,
) -> Plan:  # fmt: skip
    """The plan for a weight packed ahead."""
    flat = x.reshape(-1, weight.width)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows, out = flat.shape[0], torch.empty((*x.shape[:-1], weight.out), dtype=dtype or torch.float32, device=x.device)
    split = config["SPLIT"]
    target = torch.empty((split, rows, weight.out), dtype=torch.float32, device=x.device) if split > 1 else out
    residual = None if other is None else other.expand(out.shape).reshape(-1, weight.out)
    steps = (0, 0) if residual is None else residual.stride()
    a, b = (*map(float, scalars), 0.0, 0.0)[:2]
    args = (flat, x_scales.reshape(-1).contiguous(), weight.weight, weight.scales, weight.whole, weight.rest, None if split > 1 else bias,
            None if split > 1 else residual, target, rows, weight.out, weight.width, cdiv(weight.width, TURN), flat.stride(0),
            weight.weight.stride(0), weight.weight.shape[0] * 16, *steps, a, b)  # fmt: skip
    constants = {"GROUP": 0 if weight.group >= weight.width else weight.group, "ODD": weight.width % TURN != 0, "ACT": CODE[activation]}
    grid = (cdiv(weight.out, config["BN"]) * cdiv(rows, config["BM"]), split)
    launches = [Launch(w4a8_kernel, grid, args, constants, config)]
    if split > 1:
        launches.append(finishing(target, bias, residual, out, a, b, activation, config))
    return Plan(out, tuple(launches))


def supports(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None,
) -> str | None:  # fmt: skip
    if x.dtype != torch.int8 or weight.dtype != torch.uint8:
        return f"x is {x.dtype}, the weight {weight.dtype}; wanted int8 and uint8"
    if x_scales.dtype not in FLOATS or tuple(x_scales.shape) != (*x.shape[:-1], 1):
        return f"the scales of x are {x_scales.dtype} {tuple(x_scales.shape)}; wanted floats, one a row: {(*x.shape[:-1], 1)}"
    if group >= x.shape[-1] > WIDEST:
        return f"rows of {x.shape[-1]} under one scale; at most {WIDEST} are supported"
    return unfit(x, weight, scales, zero_points, bias, other, activation, group, dtype)


def fits(config: Config, x: Tensor, x_scales: Tensor, weight: Tensor, *rest: Any) -> str | None:
    return unfit_tiles(config, x.numel() // max(x.shape[-1], 1), weight.shape[0], x.shape[-1], rest[1])


def matrix(config: Config, *args: Any) -> str:
    return {"sm_80": "IMMA", "sm_90": "IGMMA"}.get(args[-1], "v_mfma_i32")


def estimate(config: Config, x: Tensor, x_scales: Tensor, weight: Tensor, *rest: Any) -> Estimate:
    return estimate_of(config, x, weight, 4, 1, "int8", 1)


def bucket_of(x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, zero_points: Any, bias: Any, other: Any, activation: str, scalars: Any,
              group: int, dtype: Any) -> tuple[Any, ...]:  # fmt: skip
    width = x.shape[-1]
    return (bucket(x.numel() // max(width, 1)), weight.shape[0], width, scales.dtype, zero_points is None, activation, min(group, width), dtype)


def cost(x: Tensor, x_scales: Tensor, weight: Tensor, *rest: Any) -> Cost:
    return cost_of(x, (x, x_scales, weight, *rest[:4]), weight.shape[0], rest[-1])


def samples() -> Iterator[Sample]:
    yield from small_samples(4, floats=False)
    for rows, width, out in ((1, 4096, 14336), (16, 4096, 14336), (64, 4096, 4096), (4096, 4096, 4096)):
        yield sample(f"{rows}x{width}x{out} group 128", (rows,), width, out, 4, group=128, int8=True, bench=True)


def ahead() -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "16x4096x4096 fp16 128", on_meta(16, 4096, 4096, 4, 128, torch.float16, points=False, int8=True)
    yield "4096x4096x4096 bf16 64 zero points", on_meta(4096, 4096, 4096, 4, 64, torch.bfloat16, points=True, int8=True)


FAMILY = Family("graphwright.linear_w4a8", plan, CONFIGS, supports, estimate, bucket_of, cost, samples, ahead, fits, matrix)
