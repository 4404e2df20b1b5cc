"""Activations, gated or not, quantized in the same pass.

    y = activation(x + other) * gate;   q = clamp(round(y / scale) + zero_point, low, high)               (``activate_quantize``)
    y = activation(x) * gate;   q = round(y / s),  s[r] = max_c |y[r, c]| / 127                          (``activate_quantize_rows``)

The first: ``x`` float16, bfloat16 or float32 of any strides, ``other`` and ``gate`` broadcast to it; gives uint8, int8 or floats,
contiguous or channels_last as x is. Axes that all operands walk through evenly are merged; programs take lines of what is
left. The second: ``gate`` of x's shape; gives int8 [*, c] and ``s`` [*, 1] float32; rows of up to 16384 numbers stay in
registers, longer ones are read from the L2 cache a second time. Both bound by memory: 5 bytes per half-precision element with a gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.kernel import Cost, Sample
from graphwright.kernels.common import broadcast_strides, merged_axes, pieces, rows_of
from graphwright.kernels.gpu.language import CODE, activate, row_scales, to_int8, to_levels
from graphwright.kernels.gpu.launch import Config, Estimate, Family, Launch, Plan, bucket, cdiv, power_of_two
from graphwright.ops.lowered import output_format

#: Elements of a program.
CONFIGS = tuple(Config.of(TILE=tile, warps=warps, stages=1) for tile, warps in ((1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8)))

ROW_CONFIGS = tuple(Config.of(ROWS=rows, warps=warps, stages=1) for rows, warps in ((1, 1), (1, 4), (1, 8), (1, 16), (4, 4), (16, 4)))

#: The longest row that one program holds in registers; longer ones it goes through twice.
WIDEST = 16384

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_RESULTS = (None, *_FLOATS, torch.uint8, torch.int8)


@triton.jit
def activate_kernel(x, other, gate, out, lines, s1, s2, columns, x0, x1, x2, x3, o0, o1, o2, o3, g0, g1, g2, g3, a, b, inverse, zero_point, low, high,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr, QUANTIZE: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(columns, BLOCK)
    r = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    c = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (r < lines)[:, None] & (c < columns)
    i2, i1, i0 = (r % s2).to(tl.int64), (r // s2 % s1).to(tl.int64), (r // s2 // s1).to(tl.int64)
    y = tl.load(x + (i0 * x0 + i1 * x1 + i2 * x2)[:, None] + c * x3, inside, other=0.0).to(tl.float32)
    if other is not None:
        y += tl.load(other + (i0 * o0 + i1 * o1 + i2 * o2)[:, None] + c * o3, inside, other=0.0).to(tl.float32)
    y = activate(y, a, b, ACT)
    if gate is not None:
        y *= tl.load(gate + (i0 * g0 + i1 * g1 + i2 * g2)[:, None] + c * g3, inside, other=0.0).to(tl.float32)
    if QUANTIZE:
        y = to_levels(y, inverse, zero_point, low, high)
    tl.store(out + r.to(tl.int64)[:, None] * columns + c, y.to(out.dtype.element_ty), inside)


@triton.jit
def _gated(x, gate, at, x_step, g_step, c, inside, a, b, ACT: tl.constexpr):
    """``activation(x) * gate`` of some columns, zeros outside."""
    y = activate(tl.load(x + at * x_step + c[None, :], inside, other=0.0).to(tl.float32), a, b, ACT)
    if gate is not None:
        return y * tl.load(gate + at * g_step + c[None, :], inside, other=0.0).to(tl.float32)
    else:
        return tl.where(inside, y, 0.0)


@triton.jit
def activate_rows_kernel(x, gate, q, s, rows, x_step, g_step, a, b,
                         COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    at = r.to(tl.int64)[:, None]
    if BLOCK >= COLUMNS:
        inside = (r < rows)[:, None] & (c < COLUMNS)[None, :]
        y = _gated(x, gate, at, x_step, g_step, c, inside, a, b, ACT)
        factors, scales = row_scales(y)
        tl.store(q + at * COLUMNS + c[None, :], to_int8(y * factors[:, None], PTX), inside)
    else:  # twice through the row, the second time out of a cache
        most, odd = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, COLUMNS, BLOCK):
            inside = (r < rows)[:, None] & (start + c < COLUMNS)[None, :]
            y = _gated(x, gate, at, x_step, g_step, start + c, inside, a, b, ACT)
            most = tl.maximum(most, tl.where(y == y, tl.abs(y), 0.0))
            odd = tl.where(y == y, odd, y)
        factors, scales = row_scales(most)
        scales += tl.sum(odd, 1)
        for start in range(0, COLUMNS, BLOCK):
            inside = (r < rows)[:, None] & (start + c < COLUMNS)[None, :]
            y = _gated(x, gate, at, x_step, g_step, start + c, inside, a, b, ACT)
            tl.store(q + at * COLUMNS + start + c[None, :], to_int8(y * factors[:, None], PTX), inside)
    tl.store(s + r, scales, r < rows)


def _block(columns: int) -> int:
    return power_of_two(columns) if columns <= WIDEST else 4096


def _two(scalars: Sequence[float]) -> tuple[float, float]:
    a, b = (*map(float, scalars), 0.0, 0.0)[:2]
    return a, b


def plan(x: Tensor, other: Tensor | None, gate: Tensor | None, activation: str, scalars: Sequence[float],
         scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None, *, config: Config) -> Plan:  # fmt: skip
    out = torch.empty(x.shape, dtype=dtype or torch.float32, device=x.device, memory_format=output_format(x))
    sizes, steps = _walk(x, other, gate)
    walks = iter(steps)
    x_walk, o_walk, g_walk = (next(walks) if t is not None else (0, 0, 0, 0) for t in (x, other, gate))
    lines, columns = sizes[0] * sizes[1] * sizes[2], sizes[3]
    block = min(config["TILE"], power_of_two(columns))
    rows = config["TILE"] // block
    points = (1.0 / scale, zero_point, low, high) if not out.is_floating_point() else (1.0, 0, 0, 0)
    args = (x, other, gate, out, lines, sizes[1], sizes[2], columns, *x_walk, *o_walk, *g_walk, *_two(scalars), *points)
    constants = {"ROWS": rows, "BLOCK": block, "ACT": CODE[activation], "QUANTIZE": not out.is_floating_point()}
    programs = cdiv(lines, rows) * cdiv(columns, block) if x.numel() else 0
    return Plan(out, (Launch(activate_kernel, (programs,), args, constants, config),))


def _walk(*inputs: Tensor | None) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Four sizes and, for each operand that there is, four strides."""
    x = inputs[0]
    assert x is not None
    if not x.numel():
        return (1, 1, 1, 1), ((0, 0, 0, 0),) * 3
    out = torch.empty(x.shape, device="meta", memory_format=output_format(x))
    found = merged_axes(tuple(x.shape), out.stride(), *(broadcast_strides(t, x) for t in inputs if t is not None))
    assert found is not None
    return found


def plan_rows(x: Tensor, gate: Tensor | None, activation: str, scalars: Sequence[float], *, config: Config) -> Plan:
    flat, gates = rows_of(x), None if gate is None else rows_of(gate)
    rows, columns = flat.shape
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    s = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    args = (flat, gates, q, s, rows, flat.stride(0), 0 if gates is None else gates.stride(0), *_two(scalars))
    constants = {"COLUMNS": columns, "BLOCK": _block(columns), "ACT": CODE[activation]}
    return Plan((q, s), (Launch(activate_rows_kernel, (cdiv(rows, config["ROWS"]),), args, constants, config),))


def _unfit(activation: str, **inputs: Tensor | None) -> str | None:
    for name, t in inputs.items():
        if t is not None and t.dtype not in _FLOATS:
            return f"{name} is {t.dtype}; wanted float16, bfloat16 or float32"
    return None if activation in CODE else f"activation {activation!r} is not known; there are {', '.join(CODE)}"


def supports(x: Tensor, other: Tensor | None, gate: Tensor | None, activation: str, scalars: Sequence[float],
             scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None) -> str | None:  # fmt: skip
    if (reason := _unfit(activation, x=x, other=other, gate=gate)) is not None:
        return reason
    if dtype not in _RESULTS:
        return f"result of {dtype}; there are {', '.join(map(str, _RESULTS[1:]))}"
    if dtype is not None and not dtype.is_floating_point and max(abs(v) for v in (zero_point, low, high)) > 255:
        return f"a grid from {low} to {high} around {zero_point}; bounds up to 255 are supported"
    for name, t in (("other", other), ("gate", gate)):
        if t is not None and (t.ndim > x.ndim or any(n not in (1, m) for n, m in zip(t.shape[::-1], x.shape[::-1], strict=False))):
            return f"{name} of shape {tuple(t.shape)} does not broadcast to x's {tuple(x.shape)}"
    shape, inputs = tuple(map(int, x.shape)), [tuple(map(int, broadcast_strides(t, x))) for t in (x, other, gate) if t is not None]
    out = torch.empty(shape, device="meta").to(memory_format=output_format(x)).stride()
    if x.numel() and merged_axes(shape, out, *inputs) is None:
        return "strides that need more than four axes"
    return None


def supports_rows(x: Tensor, gate: Tensor | None, activation: str, scalars: Sequence[float]) -> str | None:
    if not x.ndim or not 0 < x.shape[-1] < 2**30:
        return f"x has shape {tuple(x.shape)}; rows of 1 to 2^30 numbers are supported"
    if gate is not None and gate.shape != x.shape:
        return f"gate of shape {tuple(gate.shape)} beside x {tuple(x.shape)}: it is not broadcast"
    return _unfit(activation, x=x, gate=gate)


def fits_rows(config: Config, x: Tensor, gate: Tensor | None, *rest: Any) -> str | None:
    held = config["ROWS"] * _block(x.shape[-1]) / (32 * config.warps)
    if held > (64 if gate is None else 48):
        return f"{held:.0f} numbers are too many for a thread's registers"
    return f"{held:.2f} numbers a thread are too few" if held < 4 and config["ROWS"] < 16 else None


def cost(x: Tensor, other: Tensor | None, gate: Tensor | None, activation: str, scalars: Sequence[float],
         scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None) -> Cost:  # fmt: skip
    return Cost(pieces(x, other, gate) + x.numel() * (dtype or torch.float32).itemsize, x.numel() * 16)


def cost_rows(x: Tensor, gate: Tensor | None, activation: str, scalars: Sequence[float]) -> Cost:
    return Cost(pieces(x, gate) + x.numel() + 4 * (x.numel() // max(x.shape[-1], 1)), x.numel() * 18)


def estimate(config: Config, x: Tensor, *rest: Any) -> Estimate:
    least = cost(x, *rest)
    return Estimate(least.flops, "f32", least.bytes, least.bytes, cdiv(x.numel(), config["TILE"]))


def estimate_rows(config: Config, x: Tensor, *rest: Any) -> Estimate:
    least = cost_rows(x, *rest)
    return Estimate(least.flops, "f32", least.bytes, least.bytes, cdiv(x.numel() // x.shape[-1], config["ROWS"]))


def _kinds(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else str(t.dtype) for t in tensors)


def _bucket(x: Tensor, other: Tensor | None, gate: Tensor | None, activation: str, scalars: Sequence[float], *rest: Any) -> tuple[Any, ...]:
    walked = _walk(x, other, gate)
    return (power_of_two(max(x.numel(), 1)), *_kinds(x, other, gate), activation, str(rest[-1]), power_of_two(walked[0][3]), *(w[3] == 1 for w in walked[1]))


def _bucket_rows(x: Tensor, gate: Tensor | None, activation: str, scalars: Sequence[float]) -> tuple[Any, ...]:
    return bucket(x.numel() // x.shape[-1]), x.shape[-1], *_kinds(x, gate), activation


_SCALARS = {"hardtanh": [-0.5, 1.25], "leaky_relu": [0.1], "elu": [0.7], "softplus": [1.5, 4.0]}


def samples() -> Iterator[Sample]:
    u8, floats = (0.021, 117, 0, 255, torch.uint8), (1.0, 0, 0, 0)
    half, bf16 = torch.float16, torch.bfloat16

    def normal(g: torch.Generator, *shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return (2 * torch.randn(shape, generator=g)).to(kind)

    def merged(g: torch.Generator, rows: int, width: int, kind: torch.dtype) -> tuple[Tensor, None, Tensor]:
        """Both halves of one product: what a merged gate and up projection gives."""
        both = normal(g, rows, 2 * width, kind=kind)
        return both[:, :width], None, both[:, width:]

    yield Sample("16384x4096 gelu fp16", lambda g: (normal(g, 16384, 4096, kind=half), None, None, "gelu", [], *u8))
    yield Sample("4096x11008 silu * gate bf16", lambda g: (*merged(g, 4096, 11008, bf16), "silu", [], *u8))
    for name in CODE:
        yield Sample(f"3x103 {name}", lambda g, n=name: (normal(g, 3, 103), None, None, n, _SCALARS.get(n, []), *floats, None), False)
    yield Sample("5x70 silu * gate, halves, bf16", lambda g: (*merged(g, 5, 70, bf16), "silu", [], *u8), False)
    yield Sample("residual to fp16", lambda g: (normal(g, 7, 33, kind=half), normal(g, 7, 33), None, "relu", [], *floats, half), False)
    yield Sample("bias over channels, channels_last", lambda g: (
        normal(g, 2, 6, 5, 4).to(memory_format=torch.channels_last), normal(g, 1, 6, 1, 1), normal(g, 2, 6, 1, 1), "sigmoid", [], *floats, None), False)  # fmt: skip
    yield Sample("row broadcast", lambda g: (normal(g, 9, 40, kind=half), normal(g, 40, kind=half), None, "none", [], 0.02, 0, -128, 127, torch.int8), False)
    yield Sample("every other column", lambda g: (normal(g, 9, 64)[:, ::2], None, None, "relu", [], 0.02, 0, -128, 127, torch.int8), False)
    yield Sample("4-D, all axes permuted", lambda g: (normal(g, 3, 4, 5, 6).permute(3, 1, 0, 2), None, None, "none", [], *u8), False)
    yield Sample("one number", lambda g: (normal(g), None, None, "silu", [], *u8), False)
    yield Sample("empty", lambda g: (normal(g, 0, 8), normal(g, 8), None, "silu", [], *u8), False)

    def odd(g: torch.Generator) -> tuple[Any, ...]:
        x = 40 * normal(g, 257)
        x[:5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -0.0])
        return x, None, None, "none", [], 0.11, 7, 0, 255, torch.uint8

    yield Sample("NaN and infinities", odd, False)


def samples_rows() -> Iterator[Sample]:
    def make(name: str, shape: tuple[int, ...], activation: str, kind: torch.dtype, gate: bool = False, bench: bool = False, scale: float = 2.0) -> Sample:
        def args(g: torch.Generator) -> tuple[Any, ...]:
            both = (scale * torch.randn(*shape[:-1], 2 * shape[-1], generator=g)).to(kind)
            return both[..., : shape[-1]], both[..., shape[-1] :] if gate else None, activation, _SCALARS.get(activation, [])

        return Sample(name, args, bench)

    half, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
    yield make("4096x11008 silu * gate bf16", (4096, 11008), "silu", bf16, True, bench=True)
    yield make("4096x16384 gelu fp16", (4096, 16384), "gelu", half, bench=True)
    yield make("3x5x33 silu * gate", (3, 5, 33), "silu", half, True)
    yield make("7x1000 gelu float32", (7, 1000), "gelu", f32)
    yield make("2x20000 relu", (2, 20000), "relu", bf16)
    yield make("9x48 softplus", (9, 48), "softplus", bf16)
    yield make("4x64 huge", (4, 64), "none", f32, scale=1e37)
    yield make("4x64 tiny", (4, 64), "none", f32, scale=1e-37)
    yield make("1x1", (1, 1), "sigmoid", f32)
    yield make("empty", (0, 64), "silu", half, True)

    def odd(g: torch.Generator) -> tuple[Any, ...]:
        x = torch.randn(5, 40, generator=g)
        x[1, 3], x[2, 5], x[3] = torch.nan, torch.inf, 0.0
        return x, None, "relu", []

    yield Sample("NaN, infinity, zeros", odd, False)

    def long(g: torch.Generator) -> tuple[Any, ...]:
        x = torch.randn(2, 16400, generator=g)
        x[1, 8000], x[1, 16399] = torch.nan, 9.0
        return x, x.flip(0), "silu", []

    yield Sample("2x16400, NaN", long, False)


def ahead() -> Iterator[tuple[str, tuple[Any, ...]]]:
    both = torch.empty(4096, 22016, dtype=torch.bfloat16, device="meta")
    image = torch.empty(8, 64, 56, 56, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
    u8 = (0.02, 117, 0, 255, torch.uint8)
    yield "bfloat16 silu gate", (both[:, :11008], None, both[:, 11008:], "silu", [], *u8)
    yield "float16 bias gelu channels_last", (image, torch.empty(1, 64, 1, 1, device="meta"), None, "gelu", [], *u8)
    yield "float32 relu to float16", (torch.empty(4096, 1000, device="meta"), None, None, "relu", [], 1.0, 0, 0, 0, torch.float16)


def ahead_rows() -> Iterator[tuple[str, tuple[Any, ...]]]:
    both = torch.empty(4096, 22016, dtype=torch.bfloat16, device="meta")
    yield "11008 bfloat16 silu gate", (both[:, :11008], both[:, 11008:], "silu", [])
    yield "3072 float16 gelu", (torch.empty(4096, 3072, dtype=torch.float16, device="meta"), None, "gelu", [])
    yield "28672 float16 gelu_tanh gate", (*[torch.empty(4096, 28672, dtype=torch.float16, device="meta")] * 2, "gelu_tanh", [])


FAMILIES = (
    Family("graphwright.activate_quantize", plan, CONFIGS, supports, estimate, _bucket, cost, samples, ahead),
    Family("graphwright.activate_quantize_rows", plan_rows, ROW_CONFIGS, supports_rows, estimate_rows, _bucket_rows, cost_rows, samples_rows, ahead_rows, fits_rows),
)
