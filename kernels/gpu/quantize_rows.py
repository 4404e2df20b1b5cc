"""Rows of floats to int8, each row under its own scale.

    s[r] = max_c |x[r, c]| / 127;   q[r, c] = round(x[r, c] / s[r])

``x`` [*, c] float16, bfloat16 or float32; gives ``q`` [*, c] int8 and ``s`` [*, 1] float32. A row stays in registers between
its two passes, so that it is read once. Bound by memory: 3 bytes per half-precision element.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.kernel import Cost, Sample
from graphwright.kernels.gpu.language import to_int8
from graphwright.kernels.gpu.launch import Config, Estimate, Family, Launch, Plan, bucket, cdiv, power_of_two

CONFIGS = tuple(Config.of(ROWS=rows, warps=warps, stages=1) for rows in (1, 4) for warps in (1, 4, 8))

#: The longest row that one program holds in registers.
WIDEST = 32768


@triton.jit
def quantize_rows_kernel(x, q, s, rows, columns, step, ROWS: tl.constexpr, BLOCK: tl.constexpr, PTX: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    v = tl.load(x + r[:, None].to(tl.int64) * step + c[None, :], inside, other=0.0).to(tl.float32)
    odd = tl.sum(tl.where(v == v, 0.0, 1.0), 1)
    scale = tl.max(tl.where(v == v, tl.abs(v), 0.0), 1) / 127
    scale = tl.where(scale > 1.1754943508222875e-38, scale, 1.0)
    y = to_int8(v / scale[:, None], PTX)
    tl.store(q + r[:, None].to(tl.int64) * columns + c[None, :], y, inside)
    tl.store(s + r, tl.where(odd > 0, float("nan"), scale), r < rows)


def plan(x: Tensor, *, config: Config) -> Plan:
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()
    rows, columns = flat.shape
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    s = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    args = (flat, q, s, rows, columns, flat.stride(0))
    return Plan((q, s), (Launch(quantize_rows_kernel, (cdiv(rows, config["ROWS"]),), args, {"BLOCK": power_of_two(max(columns, 1))}, config),))


def supports(x: Tensor) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"x is {x.dtype}; wanted float16, bfloat16 or float32"
    if not x.ndim or not 0 < x.shape[-1] <= WIDEST:
        return f"x has shape {tuple(x.shape)}; rows of 1 to {WIDEST} numbers are supported"
    return None


def fits(config: Config, x: Tensor) -> str | None:
    held = config["ROWS"] * power_of_two(x.shape[-1])
    if held > 128 * 32 * config.warps:
        return f"{held} numbers are too many for the registers of {config.warps} warps"
    return None if held >= 32 * config.warps or config["ROWS"] == 4 else f"{config.warps} warps have less than a number each"


def estimate(config: Config, x: Tensor) -> Estimate:
    moved = x.numel() * (x.element_size() + 1) + 4 * (x.numel() // x.shape[-1])
    return Estimate(4 * x.numel(), "f32", moved, moved, cdiv(x.numel() // x.shape[-1], config["ROWS"]))


def cost(x: Tensor) -> Cost:
    return Cost(x.numel() * (x.element_size() + 1) + 4 * (x.numel() // max(x.shape[-1], 1)), 4 * x.numel())


def samples() -> Iterator[Sample]:
    def make(name: str, *shape: int, dtype: torch.dtype = torch.float16, scale: float = 1.0, bench: bool = False, step: int = 1) -> Sample:
        def args(g: torch.Generator) -> tuple[Any, ...]:
            return ((torch.randn(*shape[:-1], shape[-1] * step, generator=g) * scale).to(dtype)[..., :: step],)

        return Sample(name, args, bench)

    yield make("16384x4096 fp16", 16384, 4096, bench=True)
    yield make("8x128x768 bf16", 8, 128, 768, dtype=torch.bfloat16, bench=True)
    yield make("3x5x33", 3, 5, 33)
    yield make("1x1", 1, 1, dtype=torch.float32)
    yield make("7x1000 float32", 7, 1000, dtype=torch.float32)
    yield make("empty", 0, 64)
    yield make("strided", 9, 48, step=2, dtype=torch.bfloat16)
    yield make("tiny numbers", 4, 64, dtype=torch.float32, scale=1e-37)
    yield make("huge numbers", 4, 64, dtype=torch.float32, scale=1e37)


def ahead() -> Iterator[tuple[str, tuple[Any, ...]]]:
    for width, dtype in ((4096, torch.float16), (768, torch.bfloat16), (1000, torch.float32)):
        yield f"{width} {str(dtype).removeprefix('torch.')}", (torch.empty(4096, width, dtype=dtype, device="meta"),)


FAMILY = Family("graphwright.quantize_rows", plan, CONFIGS, supports, estimate, lambda x: (bucket(x.numel() // x.shape[-1]), x.shape[-1], x.dtype),
                cost, samples, ahead, fits)  # fmt: skip
