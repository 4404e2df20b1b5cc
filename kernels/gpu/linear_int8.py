"""Linear layers of int8 numbers with everything behind the product fused: for many rows.

    y = activation((x8 - x_point) @ w8^T * x_scale * w_scale + bias + other)

``x`` [*, K] int8 or uint8 (or float, quantized row by row first) under one scale and zero point or with one for each row;
``weight`` [N, K] int8 with a float scale per row; ``bias`` [N]; ``other`` [*, N]; y [*, N] float16, bfloat16, float32, or int8 and
uint8 under a grid. A program makes one BM x BN tile; GROUP rows of tiles are made together, so that their weights stay in the L2
cache. Bound by arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from graphwright.kernel import Sample
from graphwright.kernels.gpu.int8_parts import (
    Arguments,
    bucket_of,
    cost,
    finish_tile,
    make,
    meta,
    moved,
    odd_samples,
    prologue,
    supports,
)
from graphwright.kernels.gpu.language import tile_of
from graphwright.kernels.gpu.launch import Config, Estimate, Family, Launch, Plan, cdiv

CONFIGS = (
    Config.of(BM=128, BN=256, BK=128, GROUP=8, PARTS=4, warps=8, stages=3),
    Config.of(BM=128, BN=256, BK=64, GROUP=8, PARTS=4, warps=8, stages=3),
    Config.of(BM=128, BN=128, BK=128, GROUP=8, PARTS=2, warps=8, stages=3),
    Config.of(BM=128, BN=128, BK=64, GROUP=8, PARTS=4, warps=4, stages=2),
    Config.of(BM=64, BN=128, BK=128, GROUP=8, PARTS=2, warps=4, stages=4),
    Config.of(BM=64, BN=64, BK=128, GROUP=8, PARTS=1, warps=4, stages=2),
    Config.of(BM=32, BN=64, BK=64, GROUP=4, PARTS=1, warps=4, stages=3),
)


@triton.jit
def linear_int8_kernel(
    x, w, rows, columns, width, x_step, w_step, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step,
    a, b, inverse, zero_point, low, high,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, ACT: tl.constexpr, SHIFT: tl.constexpr, EVEN: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    i, j = tile_of(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(columns, BN), GROUP)
    r, c, k = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows past the end are read from the beginning again: what comes of them is not stored.
    x += (r % rows).to(tl.int64)[:, None] * x_step + k[None, :]
    w += (c % columns).to(tl.int64)[:, None] * w_step + k[None, :]
    acc = tl.zeros((BM, BN), tl.int32)
    for done in range(0, width, BK):
        if EVEN:
            u, v = tl.load(x), tl.load(w)
        else:
            u, v = tl.load(x, k[None, :] < width - done, other=0), tl.load(w, k[None, :] < width - done, other=0)
        if SHIFT:
            u = u ^ -128
        acc = tl.dot(u, tl.trans(v), acc, out_dtype=tl.int32)
        x += BK
        w += BK
    finish_tile(acc, r, j * BN, rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step,
           a, b, inverse, zero_point, low, high, ACT, SHIFT, PARTS)  # fmt: skip


def plan(*args: Any, config: Config) -> Plan:
    a = Arguments(*args)
    rows, out, _ = a.sizes
    x, weight, tail, constants, before = prologue(a)
    width = weight.shape[1]
    grid = (cdiv(rows, config["BM"]) * cdiv(out, config["BN"]),)
    constants["EVEN"] = width % config["BK"] == 0
    given = (x, weight, rows, out, width, x.stride(0), weight.stride(0), *tail)
    return Plan(tail.y, (*before, Launch(linear_int8_kernel, grid, given, constants, config)))


def fits(config: Config, *args: Any) -> str | None:
    rows, out, width = Arguments(*args).sizes
    if config["BM"] > 32 and config["BM"] >= 2 * max(rows, 1):
        return f"{config['BM']} rows at a time are too many for {rows}"
    if config["BN"] > 64 and config["BN"] >= 2 * max(out, 1):
        return f"{config['BN']} columns at a time are too many for {out}"
    if config["BK"] > 64 and config["BK"] >= 2 * width:
        return f"sums of {config['BK']} at a time are too long for {width}"
    return None


def estimate(config: Config, *args: Any) -> Estimate:
    rows, out, width = Arguments(*args).sizes
    tall, wide, deep = cdiv(rows, config["BM"]), cdiv(out, config["BN"]), cdiv(width, config["BK"])
    ops = 2 * tall * config["BM"] * wide * config["BN"] * deep * config["BK"]
    read = tall * wide * deep * (config["BM"] + config["BN"]) * config["BK"]
    shared = config.stages * (config["BM"] + config["BN"]) * config["BK"]
    return Estimate(ops, "int8", moved(args), read + moved(args), tall * wide, shared, deep)


def matrix(config: Config, *args: Any) -> str:
    target = args[-1]
    return "v_mfma_i32" if target == "gfx942" else "IGMMA" if target == "sm_90" and config["BM"] >= 64 else "IMMA"


def samples() -> Iterator[Sample]:
    yield make("4096x4096x4096", (4096,), 4096, 4096, bench=True)
    yield make("8192x8192x8192 bf16", (8192,), 8192, 8192, bias=None, dtype=torch.bfloat16, bench=True)
    yield make("4096x4096x14336 silu", (4096,), 4096, 14336, activation="silu", bias=None, bench=True)
    yield make("4096x14336x4096 residual", (4096,), 14336, 4096, bias=None, other=torch.float16, bench=True)
    yield make("512x4096x6144", (512,), 4096, 6144, bias=None, bench=True)
    yield make("4096x768x3072 gelu uint8 to uint8", (32, 128), 768, 3072, x=torch.uint8, per_row="", activation="gelu", dtype=torch.uint8, bench=True)
    yield make("4096x3072x768 residual uint8", (32, 128), 3072, 768, x=torch.uint8, per_row="", other=torch.float16, bench=True)
    yield from odd_samples()
    yield make("70x130x140", (70,), 130, 140, activation="relu")
    yield make("130x128x260 uint8 to float32", (130,), 128, 260, x=torch.uint8, per_row="", dtype=None)


def ahead() -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "4096 half", meta(4096, 4096, 4096, torch.int8, torch.float16)
    yield "bert gelu uint8 to uint8", meta(4096, 3072, 768, torch.uint8, torch.uint8, "gelu")
    yield "ragged rows of bf16", meta(60, 100, 100, torch.bfloat16, torch.bfloat16)


FAMILY = Family("graphwright.linear_int8", plan, CONFIGS, supports, estimate, bucket_of, cost, samples, ahead, fits, matrix)
