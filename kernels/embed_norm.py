"""Sum of embedding rows, layer norm, quantization: the whole input stage of a transformer in one pass.

    s = sum_k tables[k][indices[k]];  then y and q as in ``norm``

``indices[k]`` int64 or int32, broadcast to [*]; up to 4 ``tables[k]`` [rows_k, c] float32; out [*, c]. Bound by memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.kernels.common import GRID, grid, not_cpu, pieces, vectors
from graphwright.kernels.native import Native, threads_for, unavailable
from graphwright.kernels.norm import finish_row, unfit, wanted
from graphwright.kernels.tile import KIND, add, f64, i32, i64, load, real, share, wide_scratch

MAX_TABLES = 4
_F32, _NEXT = np.int64(KIND[torch.float32]), np.int64(1)
_FIRST, _TABLE = 21, 6


def _embed_norm(params):  # device code
    """Slots: 2 tables, 3 rows, 4 rows per line, 5 columns, 6 weight, 7 bias, 8 rms, 9 sums, 10 floats, 11 quantized,
    12 its kind, 13 address of the flag for bad indices, 14 eps, 15 grid, 19 and 20 unused; from 21 on each table's six: index address, whether
    int64, strides along lines and in one, table address, its rows."""
    p, d = i64(params), f64(params)
    columns, rms, sums, floats, quantized = p[5], p[8] != 0, p[9], p[10], p[11]
    eps, inverse, low, high = real(d[14]), real(d[15]), real(d[17]), real(d[18])
    bad = i64(p[13])
    a, b = wide_scratch(), wide_scratch()
    first, end = share(params, p[3])
    for row in range(first, end):
        source = sums + row * columns * 4 if sums != 0 else a
        for k in range(p[2]):
            t = _FIRST + k * _TABLE
            at = row // p[4] * p[t + 2] + row % p[4] * p[t + 3]
            index = i64(p[t])[at] if p[t + 1] != 0 else np.int64(i32(p[t])[at])
            if index < 0 or index >= p[t + 5]:
                bad[0], bad[1], bad[2] = k + 1, index, p[t + 5]
                index = np.int64(0)
            line = p[t + 4] + index * columns * 4
            if k == 0:
                load(_F32, line, _NEXT, columns, real(1), real(0), source)
            else:
                add(source, line, columns, source)
        normed = floats + row * columns * 4 if floats != 0 else b
        q = quantized + row * columns if quantized != 0 else quantized
        finish_row(source, columns, rms, eps, p[6], p[7], normed, q, p[12], inverse, p[16], low, high)


_NATIVE = Native(_embed_norm, "q" * 12 + "d" + GRID + "qq" + "qqqqqq" * MAX_TABLES)


def run(
    indices: Sequence[Tensor], tables: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None, eps: float,
    rms: bool, want_sum: bool, want_float: bool, scale: float, zero_point: int, low: int, high: int,
    dtype: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    """See ``graphwright.ops.lowered.embed_norm_quantize``."""
    shape = torch.broadcast_shapes(*(i.shape for i in indices))
    columns = tables[0].shape[1]
    outs, addresses = wanted((*shape, columns), want_sum, want_float, dtype)
    per_line = shape[-1] if shape else 1
    flat = [i.expand(shape).reshape(-1, per_line) if i.ndim != 2 or i.shape != shape else i for i in indices]
    rows = flat[0].numel()
    if not rows:
        return outs
    each: list[int] = []
    for index, table in zip(flat, tables, strict=True):
        each += (index.data_ptr(), index.dtype == torch.int64, *index.stride(), table.data_ptr(), table.shape[0])
    each += [0] * (6 * (MAX_TABLES - len(flat)))
    bad = torch.zeros(3, dtype=torch.int64)
    _NATIVE(
        threads_for(rows * columns), len(flat), rows, per_line, columns, *vectors(weight, bias, columns), rms, *addresses,
        0 if dtype is None else KIND[dtype], bad.data_ptr(), eps, *grid(scale, zero_point, low, high), 0, 0, *each,
    )  # fmt: skip
    which, index, size = bad.tolist()
    if which:
        raise IndexError(f"embedding {which - 1}: index {index} is out of range for a table of {size} rows")
    return outs


def supports(
    indices: Sequence[Tensor], tables: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None, eps: float,
    rms: bool, want_sum: bool, want_float: bool, scale: float, zero_point: int, low: int, high: int,
    dtype: torch.dtype | None,
) -> str | None:  # fmt: skip
    if (reason := unavailable() or not_cpu(*indices, *tables, weight, bias)) is not None:
        return reason
    if not 1 <= len(tables) <= MAX_TABLES or len(indices) != len(tables):
        return f"{len(indices)} indices and {len(tables)} tables; 1 to {MAX_TABLES} pairs are supported"
    columns = tables[0].shape[-1]
    for k, (index, table) in enumerate(zip(indices, tables, strict=True)):
        if index.dtype not in (torch.int64, torch.int32):
            return f"index {k} is {index.dtype}; int64 and int32 are supported"
        if table.dtype != torch.float32 or table.ndim != 2 or table.shape[1] != columns or not table.is_contiguous():
            return f"table {k} is {table.dtype} {tuple(table.shape)}, wanted contiguous float32 (*, {columns})"
        if not table.shape[0]:
            return f"table {k} has no rows"
    return unfit(columns, weight, bias, low, high, dtype)


def cost(
    indices: Sequence[Tensor], tables: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None, eps: float,
    rms: bool, want_sum: bool, want_float: bool, scale: float, zero_point: int, low: int, high: int,
    dtype: torch.dtype | None,
) -> Cost:  # fmt: skip
    count = torch.broadcast_shapes(*(i.shape for i in indices)).numel() * tables[0].shape[1]
    read = sum(min(4 * count, pieces(table)) for table in tables) + pieces(*indices, weight, bias)
    written = count * (4 * want_sum + 4 * want_float + (dtype is not None))
    return Cost(read + written, count * (8 + len(tables)))


def samples() -> Iterator[Sample]:
    def make(name: str, b: int, s: int, columns: int, *, sums: bool = False, rms: bool = False, index: Any = torch.int64,
             dtype: Any = torch.uint8, tables: int = 3, bench: bool = False) -> Sample:  # fmt: skip
        def args(g: torch.Generator) -> tuple[Any, ...]:
            def table(rows: int) -> Tensor:
                return 0.1 * torch.randn(rows, columns, generator=g)

            def index_to(rows: int) -> Tensor:
                return torch.randint(0, rows, (b, s), generator=g).to(index)

            pairs = [(index_to(3000), table(3000)), (torch.arange(s)[None].to(index), table(s + 2)), (index_to(2), table(2))]
            scales = 1 + 0.1 * torch.randn(columns, generator=g), 0.1 * torch.randn(columns, generator=g)
            return ([i for i, _ in pairs[:tables]], [t for _, t in pairs[:tables]], *scales, 1e-12, rms, sums, True,
                    0.03, 121, 0, 255, dtype)  # fmt: skip

        return Sample(name, args, bench)

    yield make("8x128x384", 8, 128, 384, bench=True)
    yield make("1x128x768 sum", 1, 128, 768, sums=True, bench=True)
    yield make("3x5x33 int32", 3, 5, 33, index=torch.int32, dtype=None, sums=True)
    yield make("2x1x7 two tables", 2, 1, 7, tables=2, rms=True)
    yield make("1x9x16 one table", 1, 9, 16, tables=1)


KERNEL = Kernel("graphwright.embed_norm_quantize", "cpu", "llvm", run, supports, cost, samples)
