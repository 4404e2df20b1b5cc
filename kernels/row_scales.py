# ruff: noqa: FURB136  max() treats NaN otherwise than the conditional expressions here do
"""Rows of floats to int8, each under its own scale: as they are, after a norm, or after an activation.

    s[r] = max_c |y[r, c]| / 127;   q[r, c] = round(y[r, c] / s[r]);   y = x, norm(x + residual) or activation(x) * gate

``x``, ``residual``, ``gate`` [rows, c] float32 or bfloat16; ``q`` [rows, c] int8 and ``s`` [rows, 1] float32. A row stays in the L1 or L2
cache while its scale is found. Bound by memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.kernels.activations import ARITHMETIC, CODE, SMOOTH, scalars_of, simple, smooth
from graphwright.kernels.common import not_cpu, pieces, rows_of, vectors
from graphwright.kernels.linear_int8 import store_row
from graphwright.kernels.native import Native, specialized, threads_for, unavailable
from graphwright.kernels.norm import finish_row, unfit
from graphwright.kernels.tile import (
    BYTES,
    I8,
    KIND,
    TILE,
    add,
    device,
    f32,
    f64,
    fetch,
    from_bits,
    i32,
    i64,
    load,
    multiply,
    real,
    scratch,
    scratch_of,
    share,
    store,
    wide_scratch,
)  # fmt: skip

#: The longest row.
MAX_COLUMNS = 32768
_line = scratch_of(MAX_COLUMNS)
_ZERO, _NEXT, _INT8 = np.int64(0), np.int64(1), np.int64(I8)
_POSITIVE, _INFINITY, _NAN = np.int32(0x7FFFFFFF), np.int32(0x7F800000), np.int32(0x7FC00000)


# -- device code -----------------------------------------------------------------------------------------------------


@device
def _most(x, n, bound):
    """Bits of the largest magnitude of ``n`` floats, of those whose bits are not above the bound. As integers NaN is above all."""
    a, best = i32(x), np.int32(0)
    for i in range(n):
        key = np.int32(a[i] & _POSITIVE)
        key = np.int32(0) if key > bound else key
        best = key if key > best else best
    return best


@device
def round_row(x, n, to):
    """``n`` floats as int8 under their own scale, which it gives: NaN where there is one among them."""
    best = _most(x, n, _POSITIVE)
    odd = best > _INFINITY
    if odd:
        best = _most(x, n, _INFINITY)
    scale = from_bits(best) * real(1 / 127)
    scale = scale if scale > real(1.1754944e-38) else real(1)
    store_row(_INT8, x, n, real(1) / scale, _ZERO, real(-127), real(127), to)
    return from_bits(_NAN) if odd else scale


def _quantize_rows(params):  # device code
    """Slots: 2 x, 3 its kind, 4 step between its rows in bytes, 5 rows, 6 columns, 7 q, 8 scales."""
    p = i64(params)
    columns, scales, line = p[6], f32(p[8]), _line()
    first, end = share(params, p[5])
    for row in range(first, end):
        x = fetch(p[3], p[2] + row * p[4], _NEXT, columns, real(1), real(0), line)
        scales[row] = round_row(x, columns, p[7] + row * columns)


def _norm_quantize_rows(params):  # device code
    """Slots: 2 x, 3 its kind, 4 its step, 5 residual or 0, 6, 7 the same of it, 8 weight, 9 bias, 10 rows, 11 columns, 12 rms,
    13 sums or 0, 14 normed or 0, 15 the kind of both, 16 q, 17 scales, 18 eps."""
    p, d = i64(params), f64(params)
    columns, rms, sums, floats, kind, scales = p[11], p[12] != 0, p[13], p[14], p[15], f32(p[17])
    size = 4 if kind == 0 else 2
    a, b, c = wide_scratch(), wide_scratch(), wide_scratch()
    first, end = share(params, p[10])
    for row in range(first, end):
        source = fetch(p[3], p[2] + row * p[4], _NEXT, columns, real(1), real(0), a)
        at = row * columns * size
        if p[5] != 0:
            other = fetch(p[6], p[5] + row * p[7], _NEXT, columns, real(1), real(0), b)
            add(source, other, columns, c)
            source = c
        if sums != 0:
            store(kind, sums + at, columns, source, real(1), _ZERO, real(0), real(0))
        finish_row(source, columns, rms, real(d[18]), p[8], p[9], b, _ZERO, _INT8, real(1), _ZERO, real(0), real(0))
        if floats != 0:
            store(kind, floats + at, columns, b, real(1), _ZERO, real(0), real(0))
        scales[row] = round_row(b, columns, p[16] + row * columns)


def _activate_quantize_rows(params):  # device code, with ``activate`` put in by ``specialized``
    """Slots: 2 x, 3 its kind, 4 its step, 5 gate or 0, 6, 7 the same of it, 8 rows, 9 columns, 10 q, 11 scales, 12 code, 13 a, 14 b."""
    p, d = i64(params), f64(params)
    columns, scales, line = p[9], f32(p[11]), _line()
    x_size, g_size = 4 if p[3] == 0 else 2, 4 if p[6] == 0 else 2
    one, two = scratch(), scratch()
    first, end = share(params, p[8])
    for row in range(first, end):
        for at in range(0, columns, TILE):
            n, to = min(TILE, columns - at), line + at * 4
            x = fetch(p[3], p[2] + row * p[4] + at * x_size, _NEXT, n, real(1), real(0), one)
            y = activate(p[12], x, n, real(d[13]), real(d[14]), to)  # noqa: F821
            if p[5] != 0:
                multiply(y, fetch(p[6], p[5] + row * p[7] + at * g_size, _NEXT, n, real(1), real(0), two), n, to)
            elif y != to:
                load(_ZERO, y, _NEXT, n, real(1), real(0), to)
        scales[row] = round_row(line, columns, p[10] + row * columns)


_PLAIN = Native(_quantize_rows, "q" * 7)
_NORM = Native(_norm_quantize_rows, "q" * 16 + "d")
_SIMPLE = Native(specialized(_activate_quantize_rows, "activate_quantize_rows_simple", activate=simple), "q" * 11 + "dd")
_SMOOTH = Native(specialized(_activate_quantize_rows, "activate_quantize_rows_smooth", activate=smooth), "q" * 11 + "dd")


# -- host ------------------------------------------------------------------------------------------------------------


def _results(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=torch.int8), torch.empty((*x.shape[:-1], 1))


def _operand(x: Tensor | None) -> tuple[Tensor | None, int, int, int]:
    """Rows of x (which must stay alive), their address, kind and step in bytes; zeros for None."""
    if x is None:
        return None, 0, 0, 0
    x = rows_of(x)
    return x, x.data_ptr(), KIND[x.dtype], x.stride(0) * x.element_size()


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``graphwright.ops.row_scales.quantize_rows``."""
    q, scales = _results(x)
    if x.numel():
        _rows, *slots = _operand(x)
        _PLAIN(threads_for(x.numel()), *slots, scales.numel(), x.shape[-1], q.data_ptr(), scales.data_ptr())
    return q, scales


def norm_quantize_rows(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool,
                       want_sum: bool, want_float: bool) -> list[Tensor]:  # fmt: skip
    """See ``graphwright.ops.row_scales.norm_quantize_rows``."""
    narrow, columns = _narrow(x, residual), x.shape[-1]
    floats = [torch.empty(x.shape, dtype=narrow) if wanted else None for wanted in (want_sum, want_float)]
    q, scales = _results(x)
    if x.numel():
        _rows, *slots = _operand(x)
        _others, *more = _operand(residual)
        _NORM(threads_for(x.numel()), *slots, *more, *vectors(weight, bias, columns), scales.numel(), columns, rms,
              *(0 if t is None else t.data_ptr() for t in floats), KIND[narrow], q.data_ptr(), scales.data_ptr(), eps)  # fmt: skip
    return [*(t for t in floats if t is not None), q, scales]


def _narrow(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def activate_quantize_rows(x: Tensor, gate: Tensor | None, activation: str, scalars: Sequence[float]) -> tuple[Tensor, Tensor]:
    """See ``graphwright.ops.row_scales.activate_quantize_rows``."""
    q, scales = _results(x)
    if x.numel():
        _rows, *slots = _operand(x)
        _gates, *more = _operand(gate)
        native = _SMOOTH if activation in SMOOTH else _SIMPLE
        native(threads_for(x.numel()), *slots, *more, scales.numel(), x.shape[-1], q.data_ptr(), scales.data_ptr(), CODE[activation],
               *scalars_of(activation, scalars))  # fmt: skip
    return q, scales


def _unfit(x: Tensor, *others: Tensor | None) -> str | None:
    for t in (x, *others):
        if t is not None and t.dtype not in (torch.float32, torch.bfloat16):
            return f"input of {t.dtype}; float32 and bfloat16 are supported"
        if t is not None and t.shape != x.shape:
            return f"an operand of shape {tuple(t.shape)} beside x {tuple(x.shape)}: it is not broadcast"
    if not x.ndim or not 1 <= x.shape[-1] <= MAX_COLUMNS:
        return f"x has shape {tuple(x.shape)}; rows of 1 to {MAX_COLUMNS} numbers are supported"
    return unavailable() or not_cpu(x, *others)


def _supports_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> str | None:
    return _unfit(x, residual) or not_cpu(weight, bias) or unfit(x.shape[-1], weight, bias, 0, 0, None)


def _supports_activate(x: Tensor, gate: Tensor | None, activation: str, scalars: Sequence[float]) -> str | None:
    if activation not in CODE:
        return f"activation {activation!r} has no vector form; there are {', '.join(CODE)}"
    return _unfit(x, gate)


def _out(x: Tensor) -> int:
    return x.numel() + 4 * (x.numel() // max(x.shape[-1], 1))


def _norm_cost(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, want_sum: bool,
               want_float: bool) -> Cost:  # fmt: skip
    floats = BYTES[KIND[_narrow(x, residual)]] * (want_sum + want_float) * x.numel()
    return Cost(pieces(x, residual, weight, bias) + floats + _out(x), 10 * x.numel())


def _activate_cost(x: Tensor, gate: Tensor | None, activation: str, scalars: Sequence[float]) -> Cost:
    return Cost(pieces(x, gate) + _out(x), x.numel() * (4 + (gate is not None) + ARITHMETIC.get(activation, 30)))


def _normal(g: torch.Generator, *shape: int, kind: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=g) * scale).to(kind)


def _odd(g: torch.Generator) -> Tensor:
    x = _normal(g, 5, 40)
    x[1, 3], x[2, 5], x[3] = torch.nan, torch.inf, 0.0
    return x


def _samples() -> Iterator[Sample]:
    bf16 = torch.bfloat16
    yield Sample("512x4096", lambda g: (_normal(g, 512, 4096),))
    yield Sample("128x768 bf16", lambda g: (_normal(g, 128, 768, kind=bf16),))
    yield Sample("3x5x33 bf16, every other", lambda g: (_normal(g, 3, 5, 66, kind=bf16)[..., ::2],), False)
    yield Sample("2x32768", lambda g: (_normal(g, 2, 32768, kind=bf16),), False)
    yield Sample("4x64 tiny", lambda g: (_normal(g, 4, 64, scale=1e-37),), False)
    yield Sample("4x64 huge", lambda g: (_normal(g, 4, 64, scale=1e37),), False)
    yield Sample("NaN, infinity, zeros", lambda g: (_odd(g),), False)
    yield Sample("1x1", lambda g: (_normal(g, 1, 1),), False)
    yield Sample("0x7", lambda g: (_normal(g, 0, 7),), False)


def _norm_samples() -> Iterator[Sample]:
    def make(name: str, shape: tuple[int, ...], rms: bool, sums: bool, floats: bool, kind: torch.dtype = torch.float32, residual: bool = True,
             affine: bool = True, bench: bool = False) -> Sample:  # fmt: skip
        def args(g: torch.Generator) -> tuple[Any, ...]:
            weight, bias = 1 + 0.1 * _normal(g, shape[-1]), 0.1 * _normal(g, shape[-1])
            return (_normal(g, *shape, kind=kind), _normal(g, *shape, kind=kind) if residual else None, weight if affine else None,
                    bias if affine and not rms else None, 1e-6, rms, sums, floats)  # fmt: skip

        return Sample(name, args, bench)

    bf16 = torch.bfloat16
    yield make("512x2048 rms, sum", (512, 2048), True, True, False, bench=True)
    yield make("1x128x768 all", (1, 128, 768), False, True, True, bench=True)
    yield make("3x5x17 bf16 all", (3, 5, 17), False, True, True, kind=bf16)
    yield make("7x1023 no residual, sum", (7, 1023), False, True, False, residual=False)
    yield make("2x16384 rms bf16", (2, 16384), True, False, True, kind=bf16, affine=False)
    yield make("1x1", (1, 1), False, False, True)
    yield make("0x8", (0, 8), False, True, True)
    yield Sample("NaN, infinity, zeros", lambda g: (_odd(g), None, None, None, 1e-5, True, True, True), False)


def _activate_samples() -> Iterator[Sample]:
    def make(name: str, shape: tuple[int, ...], activation: str, gate: bool = False, kind: torch.dtype = torch.float32, bench: bool = False,
             scalars: Sequence[float] = ()) -> Sample:  # fmt: skip
        def args(g: torch.Generator) -> tuple[Any, ...]:
            both = _normal(g, *shape[:-1], 2 * shape[-1], kind=kind, scale=2.0)
            return both[..., : shape[-1]], both[..., shape[-1] :] if gate else None, activation, list(scalars)

        return Sample(name, args, bench)

    bf16 = torch.bfloat16
    yield make("512x5632 silu * gate", (512, 5632), "silu", True, bench=True)
    yield make("128x3072 gelu", (128, 3072), "gelu", bench=True)
    yield make("3x5x33 silu * gate bf16", (3, 5, 33), "silu", True, bf16)
    yield make("2x32768 none", (2, 32768), "none", kind=bf16)
    yield make("9x1030 none * gate", (9, 1030), "none", True)
    yield make("9x50 hardtanh", (9, 50), "hardtanh", scalars=(-0.5, 1.25))
    yield make("1x1 sigmoid", (1, 1), "sigmoid")
    yield make("0x8", (0, 8), "relu", True)
    yield Sample("NaN, infinity, zeros", lambda g: (_odd(g), None, "relu", []), False)


KERNELS = (
    Kernel("graphwright.quantize_rows", "cpu", "llvm", quantize_rows, _unfit, lambda x: Cost(pieces(x) + _out(x), 4 * x.numel()), _samples),
    Kernel("graphwright.norm_quantize_rows", "cpu", "llvm", norm_quantize_rows, _supports_norm, _norm_cost, _norm_samples),
    Kernel("graphwright.activate_quantize_rows", "cpu", "llvm", activate_quantize_rows, _supports_activate, _activate_cost, _activate_samples),
)
