"""Layer norm and RMS norm over the last axis, with the residual addition before and the quantization after.

    s = x + residual;  y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias;  q = clamp(round(y / scale) + zero_point)

``x``, ``residual`` [rows, c] float32 or bfloat16; ``weight``, ``bias`` [c] float32; out of ``s``, ``y`` float32 and ``q``
uint8 / int8 those wanted, [rows, c]. Mean and variance are two passes over a row that stays in the L1 cache, so memory is
read once: bound by memory, by the L2 cache where the rows come from the op before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.kernels.common import GRID, grid, not_cpu, pieces, rows_of, vectors
from graphwright.kernels.native import Native, threads_for, unavailable
from graphwright.kernels.tile import (
    BYTES,
    KIND,
    add,
    device,
    f32,
    f64,
    fetch,
    i64,
    load,
    real,
    root,
    share,
    squares,
    store,
    total,
    wide_scratch,
)  # fmt: skip

MAX_COLUMNS = 16384
_NEXT = np.int64(1)
_PLAIN = torch.contiguous_format


@device
def scale_row(source, columns, mean, factor, weight, bias, to):
    """``to = (source - mean) * factor * weight + bias``; addresses of ``columns`` floats."""
    x, w, b, y = f32(source), f32(weight), f32(bias), f32(to)
    for i in range(columns):
        y[i] = (x[i] - mean) * factor * w[i] + b[i]


@device
def finish_row(source, columns, rms, eps, weight, bias, normed, quantized, kind, inverse, zero, low, high):
    """Normalize one row of floats into ``normed`` and, where its address is not 0, quantize that."""
    count = real(columns)
    mean = real(0) if rms else total(source, columns) / count
    factor = real(1) / root(squares(source, columns, mean) / count + eps)
    scale_row(source, columns, mean, factor, weight, bias, normed)
    if quantized != 0:
        store(kind, quantized, columns, normed, inverse, zero, low, high)


def _norm(params):  # device code
    p, d = i64(params), f64(params)
    x, x_kind, x_step, residual, r_kind, r_step = p[2], p[3], p[4], p[5], p[6], p[7]
    weight, bias, columns, rms = p[8], p[9], p[11], p[12] != 0
    sums, floats, quantized, q_kind = p[13], p[14], p[15], p[16]
    eps, inverse, low, high = real(d[17]), real(d[18]), real(d[20]), real(d[21])
    zero = p[19]
    a, b, c = wide_scratch(), wide_scratch(), wide_scratch()
    first, end = share(params, p[10])
    for row in range(first, end):
        source = fetch(x_kind, x + row * x_step, _NEXT, columns, real(1), real(0), a)
        if residual != 0:
            other = fetch(r_kind, residual + row * r_step, _NEXT, columns, real(1), real(0), b)
            to = sums + row * columns * 4 if sums != 0 else c
            add(source, other, columns, to)
            source = to
        elif sums != 0:
            load(x_kind, x + row * x_step, _NEXT, columns, real(1), real(0), sums + row * columns * 4)
        normed = floats + row * columns * 4 if floats != 0 else b
        q = quantized + row * columns if quantized != 0 else quantized
        finish_row(source, columns, rms, eps, weight, bias, normed, q, q_kind, inverse, zero, low, high)


_NATIVE = Native(_norm, "q" * 15 + "d" + GRID)


def run(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool,
    want_sum: bool, want_float: bool, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    """See ``graphwright.ops.lowered.norm_quantize``."""
    columns = x.shape[-1]
    outs, addresses = wanted(x.shape, want_sum, want_float, dtype, x)
    rows = x.numel() // columns if columns else 0
    if not rows:
        return outs
    x = rows_of(x)
    other, other_kind, other_step = 0, 0, 0
    if residual is not None:
        residual = rows_of(residual)
        other, other_kind = residual.data_ptr(), KIND[residual.dtype]
        other_step = residual.stride(0) * BYTES[other_kind]
    kind = KIND[x.dtype]
    _NATIVE(
        threads_for(x.numel()), x.data_ptr(), kind, x.stride(0) * BYTES[kind], other, other_kind, other_step,
        *vectors(weight, bias, columns), rows, columns, rms, *addresses, 0 if dtype is None else KIND[dtype],
        eps, *grid(scale, zero_point, low, high),
    )  # fmt: skip
    return outs


def wanted(
    shape: Any, want_sum: bool, want_float: bool, dtype: torch.dtype | None, like: Tensor | None = None
) -> tuple[list[Tensor], tuple[int, int, int]]:
    """New tensors for the results asked for, and the three addresses (0: not wanted)."""
    outs = []
    plain = like is not None and like.is_contiguous()  # empty_like takes half the time of empty
    addresses = [0, 0, 0]
    for slot, kind in enumerate((torch.float32 if want_sum else None, torch.float32 if want_float else None, dtype)):
        if kind is not None:
            out = torch.empty_like(like, dtype=kind, memory_format=_PLAIN) if plain else torch.empty(shape, dtype=kind)
            outs.append(out)
            addresses[slot] = out.data_ptr()
    return outs, tuple(addresses)  # type: ignore[return-value]


def unfit(columns: int, weight: Tensor | None, bias: Tensor | None, low: int, high: int,
          dtype: torch.dtype | None) -> str | None:  # fmt: skip
    """Why these affine parameters or results cannot be served; shared by the norms of this folder."""
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and (vector.dtype != torch.float32 or vector.shape != (columns,)):
            return f"{name} is {vector.dtype} {tuple(vector.shape)}, wanted float32 ({columns},)"
    if not 1 <= columns <= MAX_COLUMNS:
        return f"rows of {columns} elements; 1 to {MAX_COLUMNS} are supported"
    if dtype not in (None, torch.uint8, torch.int8):
        return f"result of {dtype}; uint8 and int8 are supported"
    return None


def supports(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool,
             want_sum: bool, want_float: bool, scale: float, zero_point: int, low: int, high: int,
             dtype: torch.dtype | None) -> str | None:  # fmt: skip
    for t in (x, residual):
        if t is not None and t.dtype not in (torch.float32, torch.bfloat16):
            return f"input of {t.dtype}; float32 and bfloat16 are supported"
    if residual is not None and residual.shape != x.shape:
        return f"residual of shape {tuple(residual.shape)} beside x {tuple(x.shape)}: it is not broadcast"
    return unavailable() or not_cpu(x, residual, weight, bias) or unfit(x.shape[-1], weight, bias, low, high, dtype)


def cost(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool,
         want_sum: bool, want_float: bool, scale: float, zero_point: int, low: int, high: int,
         dtype: torch.dtype | None) -> Cost:  # fmt: skip
    out = 4 * want_sum + 4 * want_float + (dtype is not None)
    return Cost(pieces(x, residual, weight, bias) + x.numel() * out, 8 * x.numel())


def samples() -> Iterator[Sample]:
    def make(name: str, shape: tuple[int, ...], *, residual: bool = True, rms: bool = False, sums: bool = False,
             floats: bool = True, dtype: Any = torch.uint8, kind: Any = torch.float32, affine: bool = True,
             offset: float = 0.0, bench: bool = False) -> Sample:  # fmt: skip
        def args(g: torch.Generator) -> tuple[Any, ...]:
            def normal(*s: int) -> Tensor:
                return torch.randn(*s, generator=g)

            columns = shape[-1]
            low, high, zero = (0, 255, 121) if dtype == torch.uint8 else (-127, 127, 0)
            return (
                (normal(*shape) + offset).to(kind), normal(*shape).to(kind) if residual else None,
                1 + 0.1 * normal(columns) if affine else None, 0.1 * normal(columns) if affine and not rms else None,
                1e-12 if offset == 0 else 1e-5, rms, sums, floats, 0.03, zero, low, high, dtype,
            )  # fmt: skip

        return Sample(name, args, bench)

    yield make("1024x384", (1024, 384), bench=True)
    yield make("1x197x384 all", (1, 197, 384), sums=True, bench=True)
    yield make("128x768", (128, 768), bench=True)
    yield make("512x1024 rms", (512, 1024), rms=True, residual=False, floats=False, dtype=torch.int8, bench=True)
    yield make("1x1x1", (1, 1, 1), affine=False)
    yield make("3x5x17 bf16", (3, 5, 17), kind=torch.bfloat16, sums=True)
    yield make("7x1023 no residual, sum", (7, 1023), residual=False, sums=True, dtype=None)
    yield make("2x16384", (2, 16384), dtype=torch.int8)
    yield make("33x100 far from zero", (33, 100), offset=1000.0, dtype=None)
    yield make("65x768 quantized only", (65, 768), floats=False, affine=False, residual=False)


KERNEL = Kernel("graphwright.norm_quantize", "cpu", "llvm", run, supports, cost, samples)
