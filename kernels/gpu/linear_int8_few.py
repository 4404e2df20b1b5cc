"""Linear layers of int8 numbers with everything behind the product fused: for up to 256 rows.

The math and the tensors are those of ``linear_int8``. All the work here is to read the weight [N, K] once, at the speed of memory. A
program takes BN of its rows; where that makes too few programs, SPLIT of them share a tile, each with a piece of K. Their int32 sums
[SPLIT, M, N] are added by a second launch, which then does the rest: integers add up to the same in any order, so results repeat.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from graphwright.kernel import Sample
from graphwright.kernels.gpu import int8_parts
from graphwright.kernels.gpu.int8_parts import (
    Arguments,
    bucket_of,
    cost,
    finish,
    make,
    meta,
    moved,
    odd_samples,
    prologue,
)
from graphwright.kernels.gpu.launch import Config, Estimate, Family, Launch, Plan, cdiv

#: The most rows that it takes.
MOST = 256

CONFIGS = (
    Config.of(BM=16, BN=32, BK=256, SPLIT=1, warps=4, stages=4),
    Config.of(BM=16, BN=64, BK=256, SPLIT=4, warps=4, stages=3),
    Config.of(BM=16, BN=128, BK=128, SPLIT=8, warps=4, stages=4),
    Config.of(BM=32, BN=64, BK=128, SPLIT=2, warps=4, stages=5),
    Config.of(BM=64, BN=32, BK=256, SPLIT=1, warps=4, stages=3),
    Config.of(BM=64, BN=64, BK=128, SPLIT=4, warps=4, stages=5),
    Config.of(BM=128, BN=64, BK=128, SPLIT=2, warps=4, stages=4),
)

_JOIN = Config.of(ROWS=4, BLOCK=256, warps=4, stages=1)


@triton.jit
def linear_int8_few_kernel(
    x, w, parts, rows, columns, width, x_step, w_step, piece, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step,
    a, b, inverse, zero_point, low, high,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, ACT: tl.constexpr, SHIFT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    j, i, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r, c, k = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN), tl.arange(0, BK)
    begin = part * piece
    here = (r < rows)[:, None]
    x += r.to(tl.int64)[:, None] * x_step + (begin + k)[None, :]
    w += (c % columns).to(tl.int64)[:, None] * w_step + (begin + k)[None, :]
    acc = tl.zeros((BM, BN), tl.int32)
    for done in range(begin, min(begin + piece, width), BK):
        if EVEN:
            u, v = tl.load(x, here, other=0), tl.load(w)
        else:
            u = tl.load(x, here & (k[None, :] < width - done), other=0)
            v = tl.load(w, k[None, :] < width - done, other=0)
        if SHIFT:
            u = u ^ -128
        acc = tl.dot(u, tl.trans(v), acc, out_dtype=tl.int32)
        x += BK
        w += BK
    if SPLIT == 1:
        finish(acc, r, c, rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step,
               a, b, inverse, zero_point, low, high, ACT, SHIFT)  # fmt: skip
    else:
        to = parts + (part * rows + r).to(tl.int64)[:, None] * columns + c[None, :]
        tl.store(to, acc, here & (c < columns)[None, :])


@triton.jit
def join_kernel(
    parts, rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step, a, b, inverse, zero_point, low, high,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, ACT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    r, c = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    at = parts + r.to(tl.int64)[:, None] * columns + c[None, :]
    acc = tl.zeros((ROWS, BLOCK), tl.int32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(at + (part * rows).to(tl.int64) * columns, inside, other=0)
    finish(acc, r, c, rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step,
           a, b, inverse, zero_point, low, high, ACT, SHIFT)  # fmt: skip


def plan(*args: Any, config: Config) -> Plan:
    a = Arguments(*args)
    rows, out, _ = a.sizes
    x, weight, tail, constants, before = prologue(a)
    width, split = weight.shape[1], config["SPLIT"]
    piece = cdiv(cdiv(width, config["BK"]), split) * config["BK"]
    parts = torch.empty((split, rows, out), dtype=torch.int32, device=x.device) if split > 1 else None
    given = (x, weight, parts, rows, out, width, x.stride(0), weight.stride(0), piece, *tail)
    grid = (cdiv(out, config["BN"]), cdiv(rows, config["BM"]), split)
    launches = [*before, Launch(linear_int8_few_kernel, grid, given, {**constants, "EVEN": width % config["BK"] == 0}, config)]
    if parts is not None:
        launches.append(Launch(join_kernel, (cdiv(out, _JOIN["BLOCK"]), cdiv(rows, _JOIN["ROWS"])), (parts, rows, out, *tail),
                               {**constants, "SPLIT": split}, _JOIN))  # fmt: skip
    return Plan(tail.y, tuple(launches))


def supports(*args: Any) -> str | None:
    if (reason := int8_parts.supports(*args)) is not None:
        return reason
    rows = Arguments(*args).sizes[0]
    return None if rows <= MOST else f"{rows} rows; up to {MOST} are supported"


def fits(config: Config, *args: Any) -> str | None:
    rows, _, width = Arguments(*args).sizes
    if config["BM"] > 16 and config["BM"] >= 2 * rows or config["BM"] < 128 and rows > 2 * config["BM"]:
        return f"tiles of {config['BM']} rows do not suit {rows}"
    if config["SPLIT"] > max(1, width // (2 * config["BK"])) and config["SPLIT"] > 2:
        return f"{width} inputs are too few for {config['SPLIT']} programs"
    return None


def estimate(config: Config, *args: Any) -> Estimate:
    rows, out, width = Arguments(*args).sizes
    tall, wide, split = cdiv(rows, config["BM"]), cdiv(out, config["BN"]), config["SPLIT"]
    deep = cdiv(cdiv(width, config["BK"]), split)
    read = tall * wide * split * deep * (config["BM"] + config["BN"]) * config["BK"]
    joined = 8 * split * rows * out if split > 1 else 0  # the sums, written and read: they stay in the L2 cache
    ops = 2 * tall * config["BM"] * wide * config["BN"] * split * deep * config["BK"]
    shared = config.stages * (config["BM"] + config["BN"]) * config["BK"]
    return Estimate(ops, "int8", moved(args), read + joined + moved(args), tall * wide * split, shared, deep + (3 if split > 1 else 0))


def matrix(config: Config, *args: Any) -> str:
    target = args[-1]
    return "v_mfma_i32" if target == "gfx942" else "IGMMA" if target == "sm_90" and config["BM"] >= 64 else "IMMA"


def samples() -> Iterator[Sample]:
    for rows in (1, 16, 64):
        yield make(f"{rows}x8192x28672", (rows,), 8192, 28672, bias=None, bench=True)
    yield make("1x4096x4096", (1,), 4096, 4096, bias=None, bench=True)
    yield make("32x4096x14336 silu", (32,), 4096, 14336, bias=None, activation="silu", bench=True)
    yield make("128x14336x4096 residual", (128,), 14336, 4096, bias=None, other=torch.float16, bench=True)
    yield make("128x768x3072 gelu uint8 to uint8", (1, 128), 768, 3072, x=torch.uint8, per_row="", activation="gelu", dtype=torch.uint8, bench=True)
    yield from odd_samples()
    yield make("1x1100x40", (1,), 1100, 40, other=torch.float32, dtype=torch.float32)
    yield make("17x2064x24 uint8 with zero points", (17,), 2064, 24, x=torch.uint8, per_row="both", activation="gelu_tanh", dtype=torch.uint8)
    yield make("70x600x70", (70,), 600, 70, activation="relu")


def ahead() -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "4 rows half", meta(4, 4096, 4096, torch.int8, torch.float16)
    yield "64 rows uint8 to uint8", meta(64, 3072, 4100, torch.uint8, torch.uint8, "relu")
    yield "200 rows bf16", meta(200, 4096, 4096, torch.int8, torch.bfloat16)


FAMILY = Family("graphwright.linear_int8", plan, CONFIGS, supports, estimate, bucket_of, cost, samples, ahead, fits, matrix, name="linear_int8_few")
