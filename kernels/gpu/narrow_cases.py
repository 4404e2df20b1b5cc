"""What the kernels for narrow weights have in common besides device code: limits, costs, estimates, samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.kernel import Cost, Sample
from graphwright.kernels.gpu.launch import Config, Estimate, cdiv, power_of_two
from graphwright.kernels.gpu.weight_tiles import TURN
from graphwright.ops.fused import ACTIVATIONS
from graphwright.ops.weight_only import pack as two_a_byte

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def unfit(
    x: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None, activation: str, group: int,
    dtype: torch.dtype | None,
) -> str | None:  # fmt: skip
    """None, or why no kernel here can serve arguments: everything but x's dtype."""
    if not x.ndim or weight.ndim != 2 or not x.shape[-1] or not weight.shape[0]:
        return f"x has shape {tuple(x.shape)}, the weight {tuple(weight.shape)}; wanted [*, i] and two axes, none of them empty"
    width = x.shape[-1]
    held = weight.shape[1] * (1 if weight.dtype == torch.int8 else 2)
    if weight.dtype not in (torch.int8, torch.uint8) or held != width:
        return f"rows of {width} numbers and a weight of {held} columns ({weight.dtype}) do not belong together"
    if group < width and group not in (32, 64) and group % TURN:
        return f"groups of {group}; supported are 32, 64, multiples of 128, and whole rows"
    wanted = (weight.shape[0], cdiv(width, group))
    for name, t in (("scales", scales), ("zero points", zero_points)):
        if t is not None and tuple(t.shape) != wanted:
            return f"{name} have shape {tuple(t.shape)}; wanted {wanted}"
    for name, t in (("scales", scales), ("bias", bias), ("other", other)):
        if t is not None and t.dtype not in FLOATS:
            return f"{name}: {t.dtype}; wanted float16, bfloat16 or float32"
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} is not fused"
    return None if dtype in (None, *FLOATS) else f"result of {dtype}; wanted float16, bfloat16 or float32"


def unfit_tiles(config: Config, rows: int, out: int, width: int, zero_points: Tensor | None) -> str | None:
    """None, or why tiles make no sense for ``[rows, width]`` by ``[out, width]``."""
    if zero_points is not None and config["BN"] > 16 * config.warps:  # seen in the machine code: the widened weight goes through shared memory
        return f"zero points of {config['BN']} rows are laid out as {config.warps} warps read the weight only up to {16 * config.warps} rows"
    if config["BM"] > max(16, power_of_two(rows)):
        return f"tiles of {config['BM']} rows for {rows}"
    if config["BM"] <= 16 and rows > 64:
        return f"tiles of {config['BM']} rows read the weight {cdiv(rows, config['BM'])} times"
    if config["SPLIT"] > cdiv(width, TURN):
        return f"{width} columns can't be split in {config['SPLIT']}"
    if config["SPLIT"] > 1 and cdiv(rows, config["BM"]) * cdiv(out, config["BN"]) > 512:
        return "enough tiles to fill a GPU without splitting columns"
    return None


def estimate_of(config: Config, x: Tensor, weight: Tensor, bits: int, size: int, unit: str, products: int) -> Estimate:
    """What a config is expected to cost; ``size`` bytes a number of x."""
    width, out = x.shape[-1], weight.shape[0]
    rows, (bm, bn, split) = x.numel() // width, (config["BM"], config["BN"], config["SPLIT"])
    tiles_m, tiles_n, turns = cdiv(rows, bm), cdiv(out, bn), cdiv(width, TURN)
    held = out * turns * TURN * bits // 8
    parts = split * rows * out * 8 if split > 1 else 0
    dram = held + rows * width * size + rows * out * 4
    l2 = held * tiles_m + tiles_n * rows * width * size + rows * out * 4 + parts
    shared = config.stages * TURN * (bn * bits // 8 + bm * size)
    return Estimate(2 * products * tiles_m * bm * tiles_n * bn * turns * TURN, unit, dram, l2, tiles_m * tiles_n * split, shared, cdiv(turns, split))


def cost_of(x: Tensor, given: tuple[Tensor | None, ...], out: int, dtype: torch.dtype | None) -> Cost:
    """The least that a call moves and computes; ``given`` are all of its tensors."""
    rows = x.numel() // max(x.shape[-1], 1)
    moved = sum(t.numel() * t.element_size() for t in given if t is not None)
    return Cost(moved + rows * out * (dtype or torch.float32).itemsize, 2 * rows * out * x.shape[-1])


def sample(
    name: str, rows: tuple[int, ...], width: int, out: int, bits: int, *, group: int, dtype: torch.dtype = torch.float16, points: str = "", bias: bool = False,
    other: bool = False, activation: str = "none", scalars: tuple[float, ...] = (), result: torch.dtype | None = None, scale: float = 0.01, step: int = 1,
    special: bool = False, int8: bool = False, bench: bool = False,
) -> Sample:  # fmt: skip
    """One set of arguments; ``points``: "whole", "odd" (fractions) or none; ``int8``: x has 8 bits and scales."""

    def args(g: torch.Generator) -> tuple[Any, ...]:
        shape = (out, cdiv(width, group))
        if bits == 4:
            weight = two_a_byte(torch.randint(0, 16, (out, width), generator=g))
        else:
            weight = torch.randint(-128, 128, (out, width), generator=g).to(torch.int8)
        scales = ((torch.rand(shape, generator=g) + 0.5) * scale).to(dtype)
        zeros = {"": None, "whole": torch.randint(0, 16, shape, generator=g).to(dtype), "odd": (torch.rand(shape, generator=g) * 15)}[points]
        x = torch.randn(*rows, width * step, generator=g)[..., ::step]
        if special:
            x[0, 0], x[-1, -1] = float("inf"), float("nan")
        lead: tuple[Tensor, ...] = (x.to(dtype),)
        if int8:
            lead = ((x * 40).clamp(-127, 127).to(torch.int8), torch.rand(*rows, 1, generator=g) * 0.02)
        return (*lead, weight, scales, zeros, torch.randn(out, generator=g).to(dtype) if bias else None,
                torch.randn(*rows, out, generator=g).to(dtype) if other else None, activation, scalars, group, result)  # fmt: skip

    return Sample(name, args, bench)


def small_samples(bits: int, floats: bool) -> Iterator[Sample]:
    """Odd shapes and numbers for the interpreter; ``floats``: x is floating, else int8."""
    f16, bf16, f32 = FLOATS
    only: dict[str, Any] = {"int8": not floats}
    yield sample("1x256x80 group 128", (1,), 256, 80, bits, group=128, result=f16, **only)
    yield sample("3x5x70x33 group 32 bias gelu", (3, 5), 70, 33, bits, group=32, bias=True, activation="gelu", dtype=bf16, result=bf16, **only)
    yield sample("17x194x130 group 64 zero points residual", (17,), 194, 130, bits, group=64, points="whole", other=True, result=f32, **only)
    yield sample("2x320x16 whole row, zero points", (2,), 320, 16, bits, group=320, points="whole", dtype=f16, result=f32, activation="hardtanh", scalars=(-1.0, 1.0), **only)
    yield sample("5x288x48 group 128, fractions", (5,), 288, 48, bits, group=128, points="odd", result=f32, **only)
    yield sample("4x64x20 whole row, fractions, float32", (4,), 64, 20, bits, group=64, points="odd", dtype=f32, **only)
    yield sample("66x130x70 group 256 of float32", (66,), 130, 70, bits, group=256, dtype=f32, bias=True, other=True, activation="silu", **only)
    yield sample("3x160x40 group 32 of float32, huge", (3,), 160, 40, bits, group=32, dtype=f32, scale=1e30, **only)
    yield sample("3x256x24 group 64, tiny scales", (3,), 256, 24, bits, group=64, dtype=bf16, scale=1e-30, result=bf16, **only)
    yield sample("9x600x40 group 256, strided", (9,), 600, 40, bits, group=256, step=2, result=f16, **only)
    for result in (f16, f32):  # of their many turns, some are split
        yield sample(f"2x1100x70 group 64 zero points {result}", (2,), 1100, 70, bits, group=64, points="whole", bias=True, other=True, activation="relu", result=result, **only)
    yield sample("0x64x32", (0,), 64, 32, bits, group=32, **only)
    yield sample("1x2x1", (1,), 2, 1, bits, group=2, **only)
    if floats:
        yield sample("3x66x20 infinite and NaN", (3,), 66, 20, bits, group=32, special=True, dtype=f32)


def on_meta(rows: int, width: int, out: int, bits: int, group: int, dtype: torch.dtype, points: bool, int8: bool = False) -> tuple[Any, ...]:
    """Arguments for ahead-of-time compilation."""

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    weight = empty(out, width // 2, of=torch.uint8) if bits == 4 else empty(out, width, of=torch.int8)
    groups = (out, cdiv(width, group))
    lead = (empty(rows, width, of=torch.int8), empty(rows, 1, of=torch.float32)) if int8 else (empty(rows, width),)
    return (*lead, weight, empty(*groups), empty(*groups) if points else None, empty(out), empty(rows, out), "silu", (), group, dtype)
