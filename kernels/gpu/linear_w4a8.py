"""Linear layers of int8 rows and 4-bit weights with a scale per group, multiplied as integers.

    y = activation((x * x_scale) @ ((q - zero_point) * scale)^T + bias + other)

``x`` [*, i] int8 with ``x_scales`` [*, 1]; ``weight`` [o, i / 2] uint8 (two numbers a byte); ``scales`` and ``zero_points``
[o, ceil(i / group)], groups of 32, 64, 128 (or a multiple) or the whole row; ``bias`` [o]; ``other`` [*, o]; out [*, o] float16,
bfloat16 or float32. The weight is read as ``weight_tiles`` packs it, widened to int8 in registers (three instructions for eight
numbers where there are no zero points: a nibble at the top of a byte is 16 times itself) and multiplied transposed, by
the kernel of ``linear_narrow``. Sums of a group are exact int32; they become float32 and are scaled group by group. Bound by the bytes of the
weight up to some 64 rows of x, by the int8 matrix units and the scaling beyond.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright.kernel import Cost, Sample
from graphwright.kernels.gpu.launch import Config, Estimate, Family, Plan, bucket
from graphwright.kernels.gpu.linear_narrow import plan_packed
from graphwright.kernels.gpu.narrow_cases import (
    FLOATS,
    cost_of,
    estimate_of,
    on_meta,
    sample,
    small_samples,
    unfit,
    unfit_tiles,
)
from graphwright.kernels.gpu.weight_tiles import packed

#: The longest row under one scale: beyond, int32 sums could overflow.
WIDEST = 131072


CONFIGS = (
    Config.of(BM=16, BN=64, SPLIT=1, warps=4, stages=4),
    Config.of(BM=16, BN=64, SPLIT=4, warps=4, stages=4),
    Config.of(BM=16, BN=128, SPLIT=1, warps=4, stages=4),
    Config.of(BM=16, BN=128, SPLIT=4, warps=4, stages=4),
    Config.of(BM=64, BN=64, SPLIT=1, warps=4, stages=3),
    Config.of(BM=64, BN=128, SPLIT=4, warps=8, stages=3),
    Config.of(BM=128, BN=64, SPLIT=1, warps=4, stages=3),
    Config.of(BM=128, BN=128, SPLIT=1, warps=8, stages=3),
)


def plan(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None, *, config: Config,
) -> Plan:  # fmt: skip
    made = packed(weight, scales, zero_points, group, "w4a8")
    return plan_packed(x, x_scales, made, bias, other, activation, scalars, dtype, 4, config)


def supports(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None,
) -> str | None:  # fmt: skip
    if x.dtype != torch.int8 or weight.dtype != torch.uint8:
        return f"x is {x.dtype}, the weight {weight.dtype}; wanted int8 and uint8"
    if x_scales.dtype not in FLOATS or tuple(x_scales.shape) != (*x.shape[:-1], 1):
        return f"the scales of x are {x_scales.dtype} {tuple(x_scales.shape)}; wanted floats, one a row: {(*x.shape[:-1], 1)}"
    if group >= x.shape[-1] > WIDEST:
        return f"rows of {x.shape[-1]} under one scale; at most {WIDEST} are supported"
    return unfit(x, weight, scales, zero_points, bias, other, activation, group, dtype)


def fits(config: Config, x: Tensor, x_scales: Tensor, weight: Tensor, *rest: Any) -> str | None:
    return unfit_tiles(config, x.numel() // max(x.shape[-1], 1), weight.shape[0], x.shape[-1], rest[1])


def matrix(config: Config, *args: Any) -> str:
    return {"sm_80": "IMMA", "sm_90": "IGMMA"}.get(args[-1], "v_mfma_i32")


def estimate(config: Config, x: Tensor, x_scales: Tensor, weight: Tensor, *rest: Any) -> Estimate:
    return estimate_of(config, x, weight, 4, 1, "int8", 1)


def bucket_of(x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, zero_points: Any, bias: Any, other: Any, activation: str, scalars: Any,
              group: int, dtype: Any) -> tuple[Any, ...]:  # fmt: skip
    width = x.shape[-1]
    return (bucket(x.numel() // max(width, 1)), weight.shape[0], width, scales.dtype, zero_points is None, activation, min(group, width), dtype)


def cost(x: Tensor, x_scales: Tensor, weight: Tensor, *rest: Any) -> Cost:
    return cost_of(x, (x, x_scales, weight, *rest[:4]), weight.shape[0], rest[-1])


def samples() -> Iterator[Sample]:
    yield from small_samples(4, floats=False)
    for rows, width, out in ((1, 4096, 14336), (16, 4096, 14336), (64, 4096, 4096), (4096, 4096, 4096)):
        yield sample(f"{rows}x{width}x{out} group 128", (rows,), width, out, 4, group=128, int8=True, bench=True)


def ahead() -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "16x4096x4096 fp16 128", on_meta(16, 4096, 4096, 4, 128, torch.float16, points=False, int8=True)
    yield "4096x4096x4096 bf16 64 zero points", on_meta(4096, 4096, 4096, 4, 64, torch.bfloat16, points=True, int8=True)


FAMILY = Family("graphwright.linear_w4a8", plan, CONFIGS, supports, estimate, bucket_of, cost, samples, ahead, fits, matrix)
