"""Linear layers of 8-bit floats with everything around the product fused: for up to 128 rows.

The math and the tensors are those of ``linear_fp8``. All the work here is to read the weight [N, K] once, at the speed of memory. A
program takes BN of its rows; where that makes too few programs, SPLIT of them share a tile, each with a piece of K. Their float32
sums [SPLIT, M, N] are added by a second launch, always in the same order, which then does the rest: results repeat.

The product is made transposed, w8 @ x8^T: Hopper's instruction wants 64 rows on its left and is content with 8 columns on its right, so
that the weight fills it however few rows x has, and stays fp8 (with x on the left the compiler makes half floats of both).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from graphwright.kernel import Sample
from graphwright.kernels.gpu import linear_fp8
from graphwright.kernels.gpu.int8_parts import aligned_weight, finish, flat
from graphwright.kernels.gpu.language import CODE
from graphwright.kernels.gpu.launch import Config, Estimate, Family, Launch, Plan, cdiv
from graphwright.kernels.gpu.linear_fp8 import Arguments, bucket_of, cost, make, odd_samples, round_rows, tail_of

#: The most rows that it takes.
MOST = 128

CONFIGS = (
    Config.of(BM=16, BN=64, BK=256, SPLIT=1, warps=4, stages=4),
    Config.of(BM=16, BN=64, BK=256, SPLIT=4, warps=4, stages=4),
    Config.of(BM=16, BN=128, BK=128, SPLIT=8, warps=4, stages=4),
    Config.of(BM=32, BN=64, BK=256, SPLIT=2, warps=4, stages=4),
    Config.of(BM=64, BN=128, BK=128, SPLIT=1, warps=4, stages=4),
    Config.of(BM=64, BN=64, BK=128, SPLIT=4, warps=4, stages=5),
    Config.of(BM=128, BN=64, BK=128, SPLIT=2, warps=4, stages=4),
)

_JOIN = Config.of(ROWS=1, BLOCK=512, warps=4, stages=1)


@triton.jit
def linear_fp8_few_kernel(
    x, w, parts, rows, columns, width, x_step, w_step, piece, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step,
    a, b, scale, zero_point, low, high,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, ACT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    j, i, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r, c, k = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN), tl.arange(0, BK)
    begin = part * piece
    # Rows past the end are read from the beginning again: what comes of them is not stored.
    x += (r % rows).to(tl.int64)[:, None] * x_step + (begin + k)[None, :]
    w += (c % columns).to(tl.int64)[:, None] * w_step + (begin + k)[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for done in range(begin, min(begin + piece, width), BK):
        if EVEN:
            u, v = tl.load(x), tl.load(w)
        else:
            u, v = tl.load(x, k[None, :] < width - done, other=0.0), tl.load(w, k[None, :] < width - done, other=0.0)
        acc = tl.dot(v, tl.trans(u), acc)
        x += BK
        w += BK
    if SPLIT == 1:
        finish(tl.trans(acc), r, c, rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step,
               a, b, scale, zero_point, low, high, ACT, 0)  # fmt: skip
    else:
        to = parts + (part * rows + r).to(tl.int64)[None, :] * columns + c[:, None]
        tl.store(to, acc, (r < rows)[None, :] & (c < columns)[:, None])


@triton.jit
def join_fp8_kernel(
    parts, rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step, a, b, scale, zero_point, low, high,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    r, c = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    at = parts + r.to(tl.int64)[:, None] * columns + c[None, :]
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(at + (part * rows).to(tl.int64) * columns, inside, other=0.0)
    finish(acc, r, c, rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step,
           a, b, scale, zero_point, low, high, ACT, 0)  # fmt: skip


def plan(*args: Any, config: Config) -> Plan:
    a = Arguments(*args)
    rows, out, _ = a.sizes
    weight = aligned_weight(a.weight)
    width, split = weight.shape[1], config["SPLIT"]
    q, scales, before = round_rows(flat(a.x), a.by_row, a.kind, width)
    tail, act = tail_of(a, scales), {"ACT": CODE[a.activation]}
    piece = cdiv(cdiv(width, config["BK"]), split) * config["BK"]
    parts = torch.empty((split, rows, out), dtype=torch.float32, device=a.x.device) if split > 1 else None
    given = (q, weight, parts, rows, out, width, q.stride(0), weight.stride(0), piece, *tail)
    grid = (cdiv(out, config["BN"]), cdiv(rows, config["BM"]), split)
    launches = [*before, Launch(linear_fp8_few_kernel, grid, given, {**act, "EVEN": width % config["BK"] == 0}, config)]
    if parts is not None:
        launches.append(Launch(join_fp8_kernel, (cdiv(out, _JOIN["BLOCK"]), cdiv(rows, _JOIN["ROWS"])), (parts, rows, out, *tail),
                               {**act, "SPLIT": split}, _JOIN))  # fmt: skip
    return Plan(tail.y, tuple(launches))


def _few(*args: Any) -> str | None:
    rows = Arguments(*args).sizes[0]
    return None if rows <= MOST else f"{rows} rows; up to {MOST} are supported"


def supports(*args: Any) -> str | None:
    return linear_fp8.supports(*args) or _few(*args)


def _supports_fnuz(*args: Any) -> str | None:
    return linear_fp8.supports_fnuz(*args) or _few(*args)


def fits(config: Config, *args: Any) -> str | None:
    rows, _, width = Arguments(*args).sizes
    if config["BM"] > 16 and config["BM"] >= 2 * rows or config["BM"] < 64 and rows > 2 * config["BM"]:
        return f"tiles of {config['BM']} rows do not suit {rows}"
    if config["SPLIT"] > max(1, width // (2 * config["BK"])) and config["SPLIT"] > 2:
        return f"{width} inputs are too few for {config['SPLIT']} programs"
    return None


def estimate(config: Config, *args: Any) -> Estimate:
    rows, out, width = Arguments(*args).sizes
    tall, wide, split = cdiv(rows, config["BM"]), cdiv(out, config["BN"]), config["SPLIT"]
    deep = cdiv(cdiv(width, config["BK"]), split)
    moved = cost(*args).bytes
    read = tall * wide * split * deep * (config["BM"] + config["BN"]) * config["BK"]
    joined = 8 * split * rows * out if split > 1 else 0  # the sums, written and read: they stay in the L2 cache
    ops = 2 * tall * config["BM"] * wide * config["BN"] * split * deep * config["BK"]
    shared = config.stages * (config["BM"] + config["BN"]) * config["BK"]
    return Estimate(ops, "fp8", moved, read + joined + moved, tall * wide * split, shared, deep + (3 if split > 1 else 0))


def matrix(config: Config, *args: Any) -> str:
    return "v_mfma_f32" if args[-1] == "gfx942" else "QGMMA"


def samples() -> Iterator[Sample]:
    for rows in (1, 16, 64):
        yield make(f"{rows}x8192x28672", (rows,), 8192, 28672, bias=None, bench=True)
    yield make("1x4096x4096", (1,), 4096, 4096, bench=True)
    yield make("8x14336x4096 residual, one scale", (8,), 14336, 4096, by_row=False, other=torch.bfloat16, bench=True)
    yield from _odd(torch.float8_e4m3fn)


def _odd(kind: torch.dtype) -> Iterator[Sample]:
    yield from odd_samples(kind)
    yield make("1x2100x40", (1,), 2100, 40, other=torch.float32, x=torch.float32, dtype=torch.float32, kind=kind)
    yield make("5x4096x24, one scale", (5,), 4096, 24, by_row=False, dtype=torch.float16, kind=kind)
    yield make("17x1100x72 silu", (17,), 1100, 72, activation="silu", kind=kind)
    yield make("100x600x70", (100,), 600, 70, activation="relu", kind=kind)


def _ahead(kind: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "4 rows bf16, residual", linear_fp8.meta(4, 4096, 4096, True, kind, torch.bfloat16, "silu")
    yield "60 rows half, ragged, one scale", linear_fp8.meta(60, 4100, 4100, False, kind, torch.float16)
    yield "100 rows bf16", linear_fp8.meta(100, 4096, 4096, True, kind, torch.bfloat16)


FAMILY = Family("graphwright.linear_fp8", plan, CONFIGS, supports, estimate, bucket_of, cost, samples, lambda: _ahead(torch.float8_e4m3fn), fits, matrix,
                targets=("sm_90",), tolerance=(3e-3, 1), precision="fp8", name="linear_fp8_few")  # fmt: skip

FAMILIES = (
    replace(FAMILY, supports=_supports_fnuz, samples=lambda: _odd(torch.float8_e4m3fnuz), ahead=lambda: _ahead(torch.float8_e4m3fnuz),
            targets=("gfx942",), name="linear_fp8_few_fnuz"),
)  # fmt: skip
