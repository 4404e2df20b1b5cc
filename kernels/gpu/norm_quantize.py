"""Layer norm and RMS norm over rows, with the residual addition before and the quantization after.

    t = x + residual;  y = (t - mean(t)) / sqrt(var(t) + eps) * weight + bias;  q = round(y / s),  s[r] = max_c |y[r, c]| / 127

``x``, ``residual`` [*, c] and ``weight``, ``bias`` [c] float16, bfloat16 or float32, ``c`` up to 16384; gives ``t`` and ``y`` where
they are wanted, ``q`` [*, c] int8 and ``s`` [*, 1] float32 (``norm_quantize_rows``), or ``q`` uint8 or int8 under one scale that is
known before (``norm_quantize``). Rows stay in registers from the one load to the one store, all sums are float32; weight and
bias come from the L1 cache, or stay in registers for several turns. Bound by memory: 7 bytes per half-precision element
with a residual and its sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.kernel import Cost, Sample
from graphwright.kernels.common import pieces, rows_of
from graphwright.kernels.gpu.language import row_scales, to_int8, to_levels
from graphwright.kernels.gpu.launch import Config, Estimate, Family, Launch, Plan, bucket, cdiv, power_of_two

#: ROWS go through together, TURNS times one after the other.
CONFIGS = (
    *(Config.of(ROWS=1, TURNS=1, warps=warps, stages=1) for warps in (1, 4, 8, 16)),
    *(Config.of(ROWS=rows, TURNS=1, warps=4, stages=1) for rows in (4, 16)),
    *(Config.of(ROWS=1, TURNS=4, warps=warps, stages=1) for warps in (4, 8)),
)

#: The longest row that one program holds in registers.
WIDEST = 16384

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def norm_kernel(x, residual, weight, bias, total, normed, q, s, rows, x_step, r_step, eps, inverse, zero_point, low, high,
                COLUMNS: tl.constexpr, ROWS: tl.constexpr, TURNS: tl.constexpr, BLOCK: tl.constexpr, RMS: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    c = tl.arange(0, BLOCK)
    real = c < COLUMNS
    if weight is not None:
        w = tl.load(weight + c[None, :], real[None, :], other=0.0, eviction_policy="evict_last").to(tl.float32)
    if bias is not None:
        b = tl.load(bias + c[None, :], real[None, :], other=0.0, eviction_policy="evict_last").to(tl.float32)
    for turn in range(TURNS):
        r = (tl.program_id(0) * TURNS + turn) * ROWS + tl.arange(0, ROWS)
        inside = (r < rows)[:, None] & real[None, :]
        at = r.to(tl.int64)[:, None] * COLUMNS + c[None, :]
        t = tl.load(x + r.to(tl.int64)[:, None] * x_step + c[None, :], inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if residual is not None:
            t += tl.load(residual + r.to(tl.int64)[:, None] * r_step + c[None, :], inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if total is not None:
            tl.store(total + at, t.to(total.dtype.element_ty), inside)
        if not RMS:
            t = tl.where(real[None, :], t - (tl.sum(t, 1) / COLUMNS)[:, None], 0.0)
        y = t * tl.rsqrt(tl.sum(t * t, 1) / COLUMNS + eps)[:, None]
        if weight is not None:
            y *= w
        if bias is not None:
            y += b
        if normed is not None:
            tl.store(normed + at, y.to(normed.dtype.element_ty), inside)
        if s is not None:
            factors, scales = row_scales(y)
            tl.store(q + at, to_int8(y * factors[:, None], PTX), inside)
            tl.store(s + r, scales, r < rows)
        elif q is not None:
            tl.store(q + at, to_levels(y, inverse, zero_point, low, high).to(q.dtype.element_ty), inside)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, total: Tensor | None,
            normed: Tensor | None, q: Tensor | None, s: Tensor | None, points: tuple[float, int, int, int], config: Config) -> Launch:  # fmt: skip
    columns = x.shape[-1]
    flat, other = rows_of(x), None if residual is None else rows_of(residual)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    args = (flat, other, weight, bias, total, normed, q, s, flat.shape[0], flat.stride(0), 0 if other is None else other.stride(0), float(eps), *points)
    constants = {"COLUMNS": columns, "BLOCK": power_of_two(columns), "RMS": bool(rms)}
    return Launch(norm_kernel, (cdiv(flat.shape[0], config["ROWS"] * config["TURNS"]),), args, constants, config)


def _new(x: Tensor, dtype: torch.dtype | None, columns: int | None = None) -> Tensor | None:
    shape = (*x.shape[:-1], x.shape[-1] if columns is None else columns)
    return None if dtype is None else torch.empty(shape, dtype=dtype, device=x.device)


def plan_rows(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool,
              want_sum: bool, want_float: bool, *, config: Config) -> Plan:  # fmt: skip
    narrow = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total, normed = _new(x, narrow if want_sum else None), _new(x, narrow if want_float else None)
    q, s = _new(x, torch.int8), _new(x, torch.float32, 1)
    launch = _launch(x, residual, weight, bias, eps, rms, total, normed, q, s, (1.0, 0, 0, 0), config)
    return Plan([t for t in (total, normed, q, s) if t is not None], (launch,))


def plan(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, want_sum: bool, want_float: bool,
         scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None, *, config: Config) -> Plan:  # fmt: skip
    wide = torch.float32
    total, normed, q = _new(x, wide if want_sum else None), _new(x, wide if want_float else None), _new(x, dtype)
    launch = _launch(x, residual, weight, bias, eps, rms, total, normed, q, None, (1.0 / scale, zero_point, low, high), config)
    return Plan([t for t in (total, normed, q) if t is not None], (launch,))


def _unfit(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> str | None:
    for name, t in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if t is not None and t.dtype not in _FLOATS:
            return f"{name} is {t.dtype}; wanted float16, bfloat16 or float32"
    if not x.ndim or not 0 < x.shape[-1] <= WIDEST:
        return f"x has shape {tuple(x.shape)}; rows of 1 to {WIDEST} numbers are supported"
    if residual is not None and residual.shape != x.shape:
        return f"residual of shape {tuple(residual.shape)} beside x {tuple(x.shape)}: it is not broadcast"
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.shape != x.shape[-1:]:
            return f"{name} has shape {tuple(t.shape)}; wanted ({x.shape[-1]},)"
    return None


def supports_rows(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> str | None:
    return _unfit(x, residual, weight, bias)


def supports(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, want_sum: bool,
             want_float: bool, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None) -> str | None:  # fmt: skip
    if dtype not in (None, torch.uint8, torch.int8):
        return f"result of {dtype}; uint8 and int8 are supported"
    return _unfit(x, residual, weight, bias)


def fits(config: Config, x: Tensor, *rest: Any) -> str | None:
    held = config["ROWS"] * power_of_two(x.shape[-1]) / (32 * config.warps)
    most = 64 if config["TURNS"] == 1 else 32
    if held > most:
        return f"{held:.0f} numbers are too many for a thread's registers"
    if held < 4 and config["ROWS"] < 16:
        return f"{held:.2f} numbers a thread are too few"
    few = x.numel() // x.shape[-1] < 1024 * config["TURNS"] if config["TURNS"] > 1 else False
    return "too few rows to go through several in turn" if few else None


def _moved(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, out: int) -> int:
    return pieces(x, residual, weight, bias) + out * x.numel()


def _rows_out(x: Tensor, residual: Tensor | None, want_sum: bool, want_float: bool) -> int:
    narrow = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return 1 + narrow.itemsize * (want_sum + want_float)


def cost_rows(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool,
              want_sum: bool, want_float: bool) -> Cost:  # fmt: skip
    out = _rows_out(x, residual, want_sum, want_float)
    return Cost(_moved(x, residual, weight, bias, out) + 4 * (x.numel() // max(x.shape[-1], 1)), 10 * x.numel())


def cost(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, want_sum: bool,
         want_float: bool, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None) -> Cost:  # fmt: skip
    return Cost(_moved(x, residual, weight, bias, 4 * want_sum + 4 * want_float + (dtype is not None)), 10 * x.numel())


def _estimated(config: Config, least: Cost, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Estimate:
    programs = cdiv(x.numel() // x.shape[-1], config["ROWS"] * config["TURNS"])
    return Estimate(least.flops, "f32", least.bytes, least.bytes + programs * pieces(weight, bias), programs, steps=config["TURNS"])


def estimate_rows(config: Config, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> Estimate:
    return _estimated(config, cost_rows(x, residual, weight, bias, *rest), x, weight, bias)


def estimate(config: Config, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> Estimate:
    return _estimated(config, cost(x, residual, weight, bias, *rest), x, weight, bias)


def _bucket(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, *rest: Any) -> tuple[Any, ...]:
    kinds = tuple(None if t is None else str(t.dtype) for t in (x, residual, weight, bias))
    return (bucket(x.numel() // x.shape[-1]), x.shape[-1], kinds, bool(rms), *map(str, (*rest[:2], *rest[6:])))


def _tensors(g: torch.Generator, shape: tuple[int, ...], kind: torch.dtype, residual: bool, affine: str, offset: float, step: int) -> tuple[Any, ...]:
    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    columns = shape[-1]
    x = (normal(*shape[:-1], columns * step) + offset).to(kind)[..., ::step]
    other = normal(*shape[:-1], columns + 8).to(kind)[..., :columns] if residual else None
    weight = (1 + 0.1 * normal(columns)).to(kind) if affine else None
    return x, other, weight, (0.1 * normal(columns)).to(kind) if affine == "both" else None


def _sample(name: str, shape: tuple[int, ...], *rest: Any, kind: torch.dtype = torch.float16, residual: bool = False, rms: bool = False,
            affine: str = "both", offset: float = 0.0, eps: float = 1e-5, step: int = 1, bench: bool = False) -> Sample:  # fmt: skip
    return Sample(name, lambda g: (*_tensors(g, shape, kind, residual, affine, offset, step), eps, rms, *rest), bench)


def samples_rows() -> Iterator[Sample]:
    bf16, f32 = torch.bfloat16, torch.float32
    yield _sample("16384x4096 rms, residual, sum", (16384, 4096), True, False, residual=True, rms=True, affine="weight", bench=True)
    yield _sample("16384x4096 rms", (16384, 4096), False, False, rms=True, affine="weight", bench=True)
    yield _sample("8x512x768 layer norm, residual, all", (8, 512, 768), True, True, kind=bf16, residual=True, bench=True)
    yield _sample("3x5x33 all", (3, 5, 33), True, True, residual=True)
    yield _sample("7x1000 float32", (7, 1000), False, True, kind=f32)
    yield _sample("9x48 strided bf16", (9, 48), True, False, kind=bf16, residual=True, step=2, rms=True, affine="weight")
    yield _sample("2x16384 rms", (2, 16384), False, False, rms=True, affine="")
    yield _sample("1x1", (1, 1), True, True, kind=f32, affine="")
    yield _sample("empty", (0, 64), True, True)
    yield _sample("33x100 far from zero", (33, 100), False, True, kind=f32, offset=1000.0)
    yield _sample("4500x16", (4500, 16), False, False, kind=bf16)

    def odd(g: torch.Generator) -> tuple[Any, ...]:
        x, other, weight, bias = _tensors(g, (6, 40), f32, True, "both", 0.0, 1)
        x[1, 3], x[2, 5], x[4] = torch.nan, torch.inf, -other[4]
        bias[7] = torch.nan
        return x, other, weight, bias, 1e-5, False, True, True

    yield Sample("NaN, infinity, zeros", odd, False)


def samples() -> Iterator[Sample]:
    bf16, f32, u8, i8 = torch.bfloat16, torch.float32, torch.uint8, torch.int8
    yield _sample("16384x4096 rms to int8", (16384, 4096), False, False, 0.03, 0, -127, 127, i8, rms=True, affine="weight", bench=True)
    yield _sample("8x512x768 residual, sum", (8, 512, 768), True, False, 0.03, 121, 0, 255, u8, kind=bf16, residual=True, bench=True)
    yield _sample("3x5x33 all", (3, 5, 33), True, True, 0.03, 121, 0, 255, u8, residual=True)
    yield _sample("7x1000 float32", (7, 1000), False, False, 0.002, -3, -128, 127, i8, kind=f32)
    yield _sample("9x48 strided bf16", (9, 48), True, False, 0.03, 0, -7, 7, i8, kind=bf16, residual=True, step=2, rms=True, affine="weight")
    yield _sample("5x130 no quantization", (5, 130), True, True, 1.0, 0, 0, 0, None, kind=f32, residual=True)
    yield _sample("empty", (0, 64), True, True, 0.03, 0, -127, 127, i8)

    def odd(g: torch.Generator) -> tuple[Any, ...]:
        x, *rest = _tensors(g, (4, 40), f32, False, "both", 0.0, 1)
        x[1, 3], x[2, 5] = torch.nan, torch.inf
        return x, *rest, 1e-5, False, False, True, 0.03, 9, 0, 255, u8

    yield Sample("NaN, infinity", odd, False)


def _meta(width: int, kind: torch.dtype, residual: bool, affine: str) -> tuple[Tensor | None, ...]:
    x, row = torch.empty(4096, width, dtype=kind, device="meta"), torch.empty(width, dtype=kind, device="meta")
    return x, x if residual else None, row if affine else None, row if affine == "both" else None


def ahead_rows() -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "4096 float16 rms residual sum", (*_meta(4096, torch.float16, True, "weight"), 1e-5, True, True, False)
    yield "768 bfloat16 residual all", (*_meta(768, torch.bfloat16, True, "both"), 1e-5, False, True, True)
    yield "16384 float16 residual sum", (*_meta(16384, torch.float16, True, "both"), 1e-5, False, True, False)


def ahead() -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "4096 float16 rms", (*_meta(4096, torch.float16, False, "weight"), 1e-5, True, False, False, 0.03, 0, -127, 127, torch.int8)
    yield "768 float32 residual sum", (*_meta(768, torch.float32, True, "both"), 1e-5, False, True, False, 0.03, 121, 0, 255, torch.uint8)


FAMILIES = (
    Family("graphwright.norm_quantize_rows", plan_rows, CONFIGS, supports_rows, estimate_rows, _bucket, cost_rows, samples_rows, ahead_rows, fits),
    Family("graphwright.norm_quantize", plan, CONFIGS, supports, estimate, _bucket, cost, samples, ahead, fits),
)
