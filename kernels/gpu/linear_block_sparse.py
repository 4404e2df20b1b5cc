"""Linear layers whose weight is stored in blocks, absent ones skipped.

    y = activation(x @ W^T + bias + other), or x @ W where it is transposed

``x`` [*, i] float16, bfloat16 or float32 and ``values`` [n, b, b] of the same dtype, or both int8 with ``x_scales`` [*, 1] and
``weight_scales`` [o]; ``columns`` int32 [n] and ``starts`` int32 (``graphwright.ops.sparse.to_blocks``), b 16, 32 or 64; out [*, o] float32, float16
or bfloat16. A program takes the outputs of one row of blocks and walks it, several blocks at a time where they are small: each brings
its own piece of x. A transposed weight is walked by columns, in an order that is worked out on the device (``prepare`` does it once).
Bound by the matrix units, at the share of blocks that are there; by memory for few rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.kernel import Cost, Sample
from graphwright.kernels import linear_block_sparse as cpu
from graphwright.kernels.gpu import sparse_parts
from graphwright.kernels.gpu.int8_parts import flat
from graphwright.kernels.gpu.launch import Config, Estimate, Family, Launch, Plan, bucket, cdiv
from graphwright.kernels.gpu.sparse_parts import finish, tail
from graphwright.ops.sparse import by_column

CONFIGS = (
    Config.of(BM=16, BK=128, warps=2, stages=4),
    Config.of(BM=16, BK=128, warps=2, stages=7),
    Config.of(BM=32, BK=64, warps=4, stages=4),
    Config.of(BM=64, BK=64, warps=4, stages=4),
    Config.of(BM=128, BK=64, warps=4, stages=3),
    Config.of(BM=128, BK=128, warps=8, stages=3),
)


class Arguments(NamedTuple):
    """Those of ``graphwright.linear_block_sparse``, in order."""

    x: Tensor
    x_scales: Tensor | None
    values: Tensor
    columns: Tensor
    starts: Tensor
    out: int
    transposed: bool
    weight_scales: Tensor | None
    bias: Tensor | None
    other: Tensor | None
    activation: str
    scalars: Any
    dtype: torch.dtype | None

    @property
    def rows(self) -> int:
        return self.x.numel() // max(self.x.shape[-1], 1)

    @property
    def side(self) -> int:
        return self.values.shape[1]


# -- device code -------------------------------------------------------------------------------------------------------


@triton.jit
def linear_block_sparse_kernel(
    x, values, columns, order, starts, rows, out, x_step, y, x_scales, scales, bias, other, other_step, a, b,
    BM: tl.constexpr, BK: tl.constexpr, SIDE: tl.constexpr, TRANSPOSED: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """``columns``: the block of inputs that each block meets; ``order``: its number in ``values``, None: it stands in order."""
    block = tl.program_id(1)
    r, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, SIDE)
    k = tl.arange(0, BK)
    which, within = k // SIDE, k % SIDE
    here = (r < rows)[:, None]
    x += r.to(tl.int64)[:, None] * x_step
    INTEGERS: tl.constexpr = x.dtype.element_ty.is_int()
    acc = tl.zeros((BM, SIDE), tl.int32 if INTEGERS else tl.float32)
    end = tl.load(starts + block + 1)
    for first in range(tl.load(starts + block), end, BK // SIDE):
        number = first + which
        there = number < end
        at = tl.load(columns + number, there, other=0) * SIDE + within
        u = tl.load(x + at[None, :], here & there[None, :], other=0)
        if order is not None:
            number = tl.load(order + number, there, other=0)
        place = number.to(tl.int64) * (SIDE * SIDE)
        if TRANSPOSED:
            v = tl.load(values + (place + within * SIDE)[:, None] + n[None, :], there[:, None], other=0)
        else:
            v = tl.trans(tl.load(values + (place + within)[None, :] + n[:, None] * SIDE, there[None, :], other=0))
        if INTEGERS:
            acc = tl.dot(u, v, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(u, v, acc, input_precision="ieee")
    finish(acc, r, block * SIDE + n, rows, out, y, x_scales, scales, bias, other, other_step, a, b, ACT)


# -- the order of a transposed weight ------------------------------------------------------------------------------------

_Order = tuple[Tensor, Tensor, Tensor]
_ahead: dict[tuple[int, int], tuple[weakref.ref[Tensor], weakref.ref[Tensor], tuple[int, int], _Order]] = {}


def prepare(columns: Tensor, starts: Tensor, out: int, side: int) -> _Order:
    """Sort the blocks of a weight by columns once: calls with ``transposed`` that get these very tensors need not do it again.

    Forgotten with the tensors, and no longer used once they are changed in place.
    """
    key, found = (id(columns), id(starts)), by_column(columns, starts, out // side)
    _ahead[key] = (weakref.ref(columns, lambda _: _ahead.pop(key, None)), weakref.ref(starts, lambda _: _ahead.pop(key, None)), _versions(columns, starts), found)
    return found


def _versions(*tensors: Tensor) -> Any:
    return tuple(-1 if t.is_inference() else t._version for t in tensors)


def _order(a: Arguments) -> _Order:
    found = _ahead.get((id(a.columns), id(a.starts)))
    if found is not None and found[0]() is a.columns and found[1]() is a.starts and found[2] == _versions(a.columns, a.starts) and len(found[3][2]) == a.out // a.side + 1:
        return found[3]
    return by_column(a.columns, a.starts, a.out // a.side)


# -- host code ---------------------------------------------------------------------------------------------------------


def plan(*args: Any, config: Config) -> Plan:
    a = Arguments(*args)
    last, constants = tail(a.x, a.x_scales, a.out, a.weight_scales, a.bias, a.other, a.activation, a.scalars, a.dtype)
    x, order, columns, starts = flat(a.x), None, a.columns.contiguous(), a.starts.contiguous()
    if a.transposed:
        order, columns, starts = _order(a)
    given = (x, a.values.contiguous(), columns, order, starts, a.rows, a.out, x.stride(0), *last)
    sizes = {"SIDE": a.side, "TRANSPOSED": a.transposed, "BK": max(config["BK"], a.side)}
    grid = (cdiv(a.rows, config["BM"]), a.out // a.side)
    return Plan(last[0], (Launch(linear_block_sparse_kernel, grid, given, {**constants, **sizes}, config),))


def supports(*args: Any) -> str | None:
    a = Arguments(*args)
    if (reason := cpu.unfit_layer(a.x, a.x_scales, a.values, a.columns, a.starts, a.out, a.transposed, a.weight_scales, a.other, a.dtype)) is not None:
        return reason
    if a.out // a.side > 65535:
        return f"{a.out} outputs in blocks of {a.side}; 65535 rows of blocks are supported"
    return sparse_parts.unfit(a.values, a.x, a.x_scales, a.weight_scales, a.out, a.bias, a.other, a.activation, a.dtype)


def _held(config: Config) -> int:
    """Tiles that are in shared memory at once: where x is read is read first, which takes every other stage of the pipeline."""
    return (config.stages - 1) // 2 + 1


def fits(config: Config, *args: Any) -> str | None:
    a = Arguments(*args)
    if config["BM"] > 16 and config["BM"] >= 2 * a.rows:
        return f"tiles of {config['BM']} rows do not suit {a.rows}"
    if a.x.dtype == torch.float32 and config["BM"] * a.side > 2048:
        return "float32 products take no matrix unit: so large a tile fills the registers"
    if config["BM"] == 16 and a.rows > 256:
        return f"tiles of 16 rows do not suit {a.rows}"
    held = _held(config) * config["BK"] * a.x.element_size() * (config["BM"] + a.side)
    return None if held <= 160 * 1024 else f"{held} bytes of shared memory"


def estimate(config: Config, *args: Any) -> Estimate:
    a = Arguments(*args)
    size, group = a.x.element_size(), config["BK"] // a.side
    tall, wide = cdiv(a.rows, config["BM"]), a.out // a.side
    deep = cdiv(cdiv(len(a.values), max(wide, 1)), group)  # turns of an average row
    each = config["BK"] * (config["BM"] + a.side) * size
    moved = cost(*args).bytes
    unit = "int8" if a.x.dtype == torch.int8 else "f32" if a.x.dtype == torch.float32 else "fp16"
    return Estimate(2 * tall * config["BM"] * wide * deep * config["BK"] * a.side, unit, moved, tall * wide * deep * each + moved, tall * wide,
                    _held(config) * each, max(deep, 1))  # fmt: skip


def cost(*args: Any) -> Cost:
    a = Arguments(*args)
    held = sum(t.numel() * t.element_size() for t in args if isinstance(t, Tensor))
    return Cost(held + a.rows * a.out * (a.dtype or torch.float32).itemsize, 2 * a.rows * a.values.numel())


def bucket_of(*args: Any) -> tuple[Any, ...]:
    a = Arguments(*args)
    return (bucket(a.rows), a.out, a.x.shape[-1], a.side, bucket(len(a.values)), a.transposed, a.x.dtype, a.dtype, a.other is not None, a.activation != "none")


def samples() -> Iterator[Sample]:
    half, i8 = torch.float16, torch.int8
    for kind, name in ((half, ""), (i8, " int8")):
        yield cpu.make(f"4096x768x3072 by 32, gelu{name}", (32, 128), 768, 3072, 32, kind=kind, activation="gelu", dtype=half, bench=True)
        yield cpu.make(f"2048x4096x11008 by 64{name}", (2048,), 4096, 11008, 64, kind=kind, bias=False, dtype=half, bench=True)
        yield cpu.make(f"16x4096x4096 by 64{name}", (16,), 4096, 4096, 64, kind=kind, bias=False, dtype=half, bench=True)
    yield cpu.make("2048x11008x4096 by 64, transposed", (2048,), 11008, 4096, 64, kind=half, transposed=True, bias=False, dtype=half, bench=True)
    yield from cpu.odd_samples()
    yield cpu.make("70x320x64 by 16, int8", (70,), 320, 64, 16, kind=i8, dtype=half)
    yield cpu.make("130x192x64 by 32, f16 transposed", (130,), 192, 64, 32, kind=half, transposed=True)


def ahead() -> Iterator[tuple[str, tuple[Any, ...]]]:
    half, i8 = torch.float16, torch.int8
    yield "16 rows half by 64", _meta(16, 64, half)
    yield "16 rows int8 by 16", _meta(16, 16, i8)
    yield "2048 rows half by 64", _meta(2048, 64, half)
    yield "2048 rows bf16 by 32 transposed", _meta(2048, 32, torch.bfloat16, True)
    yield "2048 rows int8 by 64", _meta(2048, 64, i8)
    yield "2048 rows int8 by 32 transposed", _meta(2048, 32, i8, True)


def _meta(rows: int, side: int, kind: torch.dtype, transposed: bool = False, width: int = 4096) -> tuple[Any, ...]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    blocks = (width // side) ** 2 // 2
    by = (empty(rows, 1), empty(width)) if kind == torch.int8 else (None, None)
    return (empty(rows, width, dtype=kind), by[0], empty(blocks, side, side, dtype=kind), empty(blocks, dtype=torch.int32),
            empty(width // side + 1, dtype=torch.int32), width, transposed, by[1], empty(width), empty(rows, width, dtype=torch.float16), "none", (),
            torch.float16)  # fmt: skip


def matrix(config: Config, *args: Any) -> str:
    return sparse_parts.matrix(config, args[0].dtype, args[-1])


FAMILY = Family("graphwright.linear_block_sparse", plan, CONFIGS, supports, estimate, bucket_of, cost, samples, ahead, fits, matrix)
