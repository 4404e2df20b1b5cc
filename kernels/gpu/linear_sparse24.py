"""Linear layers whose weight has two of every four inputs: read in compressed form, expanded in registers.

    y = activation(x @ expand(weight, indices)^T + bias + other)

``x`` [*, i] float16, bfloat16 or float32 and ``weight`` [o, i / 2] of the same dtype, or both int8 with ``x_scales`` [*, 1] and ``weight_scales``
[o]; ``indices`` uint8 [o, i / 8] (``graphwright.ops.sparse.compress``); out [*, o] float32, float16 or bfloat16. Bound by memory for few rows:
9/16 of the bytes of a dense half-precision weight, 5/8 of an int8 one. Two families: ``linear_sparse24`` makes dense tiles for the
matrix units, for any number of rows; ``linear_sparse24_row`` multiplies what is stored with the inputs picked by its places, for up to 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.kernel import Cost, Sample
from graphwright.kernels import linear_sparse24 as cpu
from graphwright.kernels.gpu import sparse_parts
from graphwright.kernels.gpu.int8_parts import flat
from graphwright.kernels.gpu.launch import Config, Estimate, Family, Launch, Plan, bucket, cdiv
from graphwright.kernels.gpu.sparse_parts import finish, tail

#: The most rows of ``linear_sparse24_row``.
FEW = 4

CONFIGS = (
    Config.of(BM=16, BN=32, BK=128, warps=4, stages=4),
    Config.of(BM=16, BN=64, BK=128, warps=4, stages=3),
    Config.of(BM=32, BN=64, BK=64, warps=4, stages=4),
    Config.of(BM=64, BN=64, BK=64, warps=4, stages=3),
    Config.of(BM=128, BN=64, BK=64, warps=8, stages=3),
)
ROW_CONFIGS = (
    Config.of(BN=4, BK=1024, warps=4, stages=3),
    Config.of(BN=8, BK=512, warps=4, stages=3),
    Config.of(BN=16, BK=512, warps=4, stages=2),
)


class Arguments(NamedTuple):
    """Those of ``graphwright.linear_sparse24``, in order."""

    x: Tensor
    x_scales: Tensor | None
    weight: Tensor
    indices: Tensor
    weight_scales: Tensor | None
    bias: Tensor | None
    other: Tensor | None
    activation: str
    scalars: Any
    dtype: torch.dtype | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, K."""
        width = 2 * self.weight.shape[1]
        return self.x.numel() // max(width, 1), self.weight.shape[0], width


# -- device code -------------------------------------------------------------------------------------------------------


@triton.jit
def expanded(v, codes):
    """Stored values [BN, BK / 2] and their places [BN, BK / 8] as the dense tile [BN, BK]."""
    BN: tl.constexpr = v.shape[0]
    FOURS: tl.constexpr = v.shape[1] // 2
    first, second = tl.split(v.reshape(BN, FOURS, 2))
    both = tl.join(codes & 15, codes >> 4).reshape(BN, FOURS)
    p, q = both & 3, both >> 2
    zero = tl.zeros_like(first)
    d0 = tl.where(p == 0, first, zero)
    d1 = tl.where(p == 1, first, tl.where(q == 1, second, zero))
    d2 = tl.where(p == 2, first, tl.where(q == 2, second, zero))
    d3 = tl.where(q == 3, second, zero)
    return tl.join(tl.join(d0, d2), tl.join(d1, d3)).reshape(BN, 4 * FOURS)


@triton.jit
def linear_sparse24_kernel(
    x, w, codes, rows, columns, width, x_step, y, x_scales, scales, bias, other, other_step, a, b,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    r, c = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    k, h, e = tl.arange(0, BK), tl.arange(0, BK // 2), tl.arange(0, BK // 8)
    here, row = (r < rows)[:, None], (c % columns).to(tl.int64)[:, None]
    x += r.to(tl.int64)[:, None] * x_step + k[None, :]
    w += row * (width // 2) + h[None, :]
    codes += row * (width // 8) + e[None, :]
    INTEGERS: tl.constexpr = x.dtype.element_ty.is_int()
    acc = tl.zeros((BM, BN), tl.int32 if INTEGERS else tl.float32)
    for done in range(0, width, BK):
        left = width - done
        if EVEN:
            u, v, n = tl.load(x, here, other=0), tl.load(w), tl.load(codes)
        else:
            u = tl.load(x, here & (k < left)[None, :], other=0)
            v, n = tl.load(w, (2 * h < left)[None, :], other=0), tl.load(codes, (8 * e < left)[None, :], other=0)
        d = tl.trans(expanded(v, n))
        if INTEGERS:
            acc = tl.dot(u, d, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(u, d, acc, input_precision="ieee")
        x += BK
        w += BK // 2
        codes += BK // 8
    finish(acc, r, c, rows, columns, y, x_scales, scales, bias, other, other_step, a, b, ACT)


@triton.jit
def picked(p, x0, x1, x2, x3):
    """Of four inputs the one at place p."""
    return tl.where(p < 2, tl.where(p == 0, x0, x1), tl.where(p == 2, x2, x3))


@triton.jit
def spread_code(n):
    """A byte's four places as four halves of bytes that number eight inputs: 0 to 3 twice, then 4 to 7 twice."""
    n = (n | (n << 4)) & 0x0F0F
    return ((n | (n << 2)) & 0x3333) + 0x4400


@triton.jit
def four_products(acc, word, low, high, n, PTX: tl.constexpr):
    """``acc`` plus the products of the four bytes of ``word`` with those of the eight in ``low`` and ``high`` that the code n names."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $2, $3, $4; dp4a.s32.s32 $0, t, $1, $5; }", "=r,r,r,r,r,r", [word, low, high, spread_code(n), acc],
            dtype=tl.int32, is_pure=True, pack=1)  # fmt: skip
    else:
        for j in tl.static_range(4):
            inputs = low if j < 2 else high
            at = 8 * ((n >> (2 * j)) & 3)
            acc += (((inputs >> at) << 24) >> 24) * ((word << (24 - 8 * j)) >> 24)
        return acc


@triton.jit
def linear_sparse24_row_kernel(
    x, w, codes, rows, columns, width, x_step, y, x_scales, scales, bias, other, other_step, a, b,
    BN: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr, WORDS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """WORDS: x and w are int32, of four int8 each."""
    c, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    row = (c % columns).to(tl.int64)[:, None]
    x += m.to(tl.int64) * x_step
    if WORDS:
        e = tl.arange(0, BK // 8)
        w += row * (width // 8) + e[None, :]
        codes += row * (width // 8) + e[None, :]
        sums = tl.zeros((BN, BK // 8), tl.int32)
        for done in range(0, width // 8, BK // 8):
            there = done + e < width // 8
            at = x + 2 * (done + e)
            low = tl.broadcast_to(tl.load(at, there, other=0)[None, :], (BN, BK // 8))
            high = tl.broadcast_to(tl.load(at + 1, there, other=0)[None, :], (BN, BK // 8))
            word, n = tl.load(w + done, there[None, :], other=0), tl.load(codes + done, there[None, :], other=0).to(tl.int32)
            sums = four_products(sums, word, low, high, n, PTX)
    else:
        e = tl.arange(0, BK // 8)
        h = tl.arange(0, BK // 2)
        w += row * (width // 2) + h[None, :]
        codes += row * (width // 8) + e[None, :]
        sums = tl.zeros((BN, BK // 8), tl.float32)
        for done in range(0, width, BK):
            there = done + 8 * e < width
            v = tl.load(w + done // 2, (done + 2 * h < width)[None, :], other=0.0)
            n = tl.load(codes + done // 8, there[None, :], other=0).to(tl.int32)
            evens, odds = tl.split(v.reshape(BN, BK // 8, 2, 2))
            v0, v2 = tl.split(evens)
            v1, v3 = tl.split(odds)
            at = x + done + 8 * e
            x0, x1 = tl.load(at, there, other=0.0).to(tl.float32)[None, :], tl.load(at + 1, there, other=0.0).to(tl.float32)[None, :]
            x2, x3 = tl.load(at + 2, there, other=0.0).to(tl.float32)[None, :], tl.load(at + 3, there, other=0.0).to(tl.float32)[None, :]
            sums += v0.to(tl.float32) * picked(n & 3, x0, x1, x2, x3)
            sums += v1.to(tl.float32) * picked((n >> 2) & 3, x0, x1, x2, x3)
            x0, x1 = tl.load(at + 4, there, other=0.0).to(tl.float32)[None, :], tl.load(at + 5, there, other=0.0).to(tl.float32)[None, :]
            x2, x3 = tl.load(at + 6, there, other=0.0).to(tl.float32)[None, :], tl.load(at + 7, there, other=0.0).to(tl.float32)[None, :]
            sums += v2.to(tl.float32) * picked((n >> 4) & 3, x0, x1, x2, x3)
            sums += v3.to(tl.float32) * picked((n >> 6) & 3, x0, x1, x2, x3)
    finish(tl.sum(sums, 1)[None, :], m + tl.arange(0, 1), c, rows, columns, y, x_scales, scales, bias, other, other_step, a, b, ACT)


# -- host code ---------------------------------------------------------------------------------------------------------


def plan(*args: Any, config: Config) -> Plan:
    a = Arguments(*args)
    rows, out, width = a.sizes
    x, last, constants = flat(a.x), *tail(a.x, a.x_scales, out, a.weight_scales, a.bias, a.other, a.activation, a.scalars, a.dtype)
    given = (x, a.weight.contiguous(), a.indices.contiguous(), rows, out, width, x.stride(0), *last)
    grid = (cdiv(out, config["BN"]), cdiv(rows, config["BM"]))
    return Plan(last[0], (Launch(linear_sparse24_kernel, grid, given, {**constants, "EVEN": width % config["BK"] == 0}, config),))


def row_plan(*args: Any, config: Config) -> Plan:
    a = Arguments(*args)
    rows, out, width = a.sizes
    last, constants = tail(a.x, a.x_scales, out, a.weight_scales, a.bias, a.other, a.activation, a.scalars, a.dtype)
    x, w, words = flat(a.x), a.weight.contiguous(), a.x.dtype == torch.int8
    if words:
        x, w = _words(x), _words(w)
    given = (x, w, a.indices.contiguous(), rows, out, width, x.stride(0), *last)
    return Plan(last[0], (Launch(linear_sparse24_row_kernel, (cdiv(out, config["BN"]), rows), given, {**constants, "WORDS": words}, config),))


def _words(x: Tensor) -> Tensor:
    """int8 [rows, columns] as int32 [rows, columns / 4], copied where it does not lie so."""
    fits_ = x.stride(1) == 1 and x.stride(0) % 4 == 0 and x.storage_offset() % 4 == 0
    return (x if fits_ else x.clone(memory_format=torch.contiguous_format)).view(torch.int32)


def supports(*args: Any) -> str | None:
    a = Arguments(*args)
    return cpu.unfit_compressed(a.x, a.weight, a.indices) or sparse_parts.unfit(
        a.weight, a.x, a.x_scales, a.weight_scales, a.weight.shape[0], a.bias, a.other, a.activation, a.dtype)  # fmt: skip


def row_supports(*args: Any) -> str | None:
    if (reason := supports(*args)) is not None:
        return reason
    rows = Arguments(*args).sizes[0]
    return None if rows <= FEW else f"{rows} rows; up to {FEW} are supported"


def fits(config: Config, *args: Any) -> str | None:
    a = Arguments(*args)
    rows, held = a.sizes[0], config.stages * config["BK"] * a.x.element_size() * (config["BM"] + config["BN"])
    if config["BM"] > 16 and config["BM"] >= 2 * rows:
        return f"tiles of {config['BM']} rows do not suit {rows}"
    if a.x.dtype == torch.float32 and config["BM"] * config["BN"] > 2048:
        return "float32 products take no matrix unit: so large a tile fills the registers"
    return None if held <= 160 * 1024 else f"{held} bytes of shared memory"


def estimate(config: Config, *args: Any) -> Estimate:
    a = Arguments(*args)
    rows, out, width = a.sizes
    tall, wide, deep, size = cdiv(rows, config["BM"]), cdiv(out, config["BN"]), cdiv(width, config["BK"]), a.x.element_size()
    each = config["BM"] * config["BK"] * size + config["BN"] * config["BK"] * (4 * size + 1) // 8
    moved = cost(*args).bytes
    unit = "int8" if a.x.dtype == torch.int8 else "f32" if a.x.dtype == torch.float32 else "fp16"
    ops = 2 * tall * config["BM"] * wide * config["BN"] * deep * config["BK"]
    return Estimate(ops, unit, moved, tall * wide * deep * each + moved, tall * wide, config.stages * each + config["BN"] * config["BK"] * size, deep)


def row_estimate(config: Config, *args: Any) -> Estimate:
    a = Arguments(*args)
    rows, out, width = a.sizes
    wide, deep, moved = cdiv(out, config["BN"]), cdiv(width, config["BK"]), cost(*args).bytes
    read = rows * (a.weight.numel() * a.weight.element_size() + a.indices.numel() + wide * width * a.x.element_size())
    # picking and converting cost about as much again as multiplying, for floats
    return Estimate(rows * out * width * (1 if a.x.dtype == torch.int8 else 4), "f32", moved, read, wide * rows, 0, deep)


def cost(*args: Any) -> Cost:
    a = Arguments(*args)
    rows, out, width = a.sizes
    held = sum(t.numel() * t.element_size() for t in args if isinstance(t, Tensor))
    return Cost(held + rows * out * (a.dtype or torch.float32).itemsize, rows * out * width)


def bucket_of(*args: Any) -> tuple[Any, ...]:
    a = Arguments(*args)
    rows, out, width = a.sizes
    return bucket(rows), out, width, a.x.dtype, a.dtype, a.other is not None, a.activation != "none"


def _benches(*rows: int) -> Iterator[Sample]:
    half, i8 = torch.float16, torch.int8
    for m in rows:
        yield cpu.make(f"{m}x4096x14336", (m,), 4096, 14336, kind=half, bias=False, dtype=half, bench=True)
        yield cpu.make(f"{m}x4096x14336 int8", (m,), 4096, 14336, kind=i8, bias=False, dtype=half, bench=True)


def samples() -> Iterator[Sample]:
    yield from _benches(1, 16, 64)
    yield cpu.make("128x768x3072 gelu", (1, 128), 768, 3072, kind=torch.float16, activation="gelu", dtype=torch.float16, bench=True)
    yield from cpu.odd_samples()
    yield cpu.make("70x264x72 int8", (70,), 264, 72, kind=torch.int8, dtype=torch.float16)
    yield cpu.make("33x136x40 f16", (33,), 136, 40, kind=torch.float16)


def row_samples() -> Iterator[Sample]:
    yield from _benches(1, 4)
    small = torch.Generator()
    yield from (s for s in cpu.odd_samples() if row_supports(*s.args(small)) is None)


def ahead(rows: int = 0) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Cases for compilation: few or many rows."""
    for m, kind, name in ((16, torch.float16, "half"), (16, torch.int8, "int8"), (256, torch.bfloat16, "bf16"), (256, torch.int8, "int8")):
        if not rows or m == 16:
            yield f"{rows or m} rows {name}", _meta(rows or m, 4096, 4096, kind)


def _meta(rows: int, out: int, width: int, kind: torch.dtype) -> tuple[Any, ...]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    by = (empty(rows, 1), empty(out)) if kind == torch.int8 else (None, None)
    return (empty(rows, width, dtype=kind), by[0], empty(out, width // 2, dtype=kind), empty(out, width // 8, dtype=torch.uint8), by[1], empty(out),
            empty(rows, out, dtype=torch.float16), "none", (), torch.float16)  # fmt: skip


def matrix(config: Config, *args: Any) -> str:
    return sparse_parts.matrix(config, args[0].dtype, args[-1])


_OP = "graphwright.linear_sparse24"
FAMILIES = (
    Family(_OP, plan, CONFIGS, supports, estimate, bucket_of, cost, samples, ahead, fits, matrix),
    Family(_OP, row_plan, ROW_CONFIGS, row_supports, row_estimate, bucket_of, cost, row_samples, lambda: ahead(1), name="linear_sparse24_row"),
)
