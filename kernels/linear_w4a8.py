"""Linear layers of int8 rows and a 4-bit weight: products of integers within each group, scaled and added up as float32.

    y = activation(x_scale * sum over groups of scale * (x8 @ (w4 - zero_point)^T) + bias + other)

``x`` int8 [*, i] with ``x_scales`` [*, 1]; ``weight`` uint8 [o, i / 2], two numbers a byte, laid out as for ``linear_w4``; ``scales``,
``zero_points`` [o, groups]; out [*, o]. The numbers of a weight are the unsigned operand of ``vpdpbusd``, so one mask turns 64 bytes into 64
operands; a tile is 6 rows by 64 columns. Bound by memory for a few rows (an eighth of the bytes of float32), by arithmetic beyond.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.kernels.activations import ARITHMETIC
from graphwright.kernels.common import not_cpu, pieces
from graphwright.kernels.grouped import EIGHT, Kind, Packed, pack_nibbles, spread_load, unfit_linear
from graphwright.kernels.grouped import pack as pack_groups
from graphwright.kernels.language import INT32, INT64, ir, known
from graphwright.kernels.vector import LANES, I


def _line(at: Any, rows: list[Any], blocks: list[Any], line: Any, sums: list[Any]) -> list[Any]:
    """Eight inputs of 16 channels: the lower halves of four bytes are four of them, the upper halves the other four."""
    long, words = INT64.llvm, I.llvm
    start, row_start = at.mul(line, long(64)), at.mul(line, long(EIGHT))
    stored = [at.load(at.inttoptr(at.add(b, start), words.as_pointer()), align=4) for b in blocks]
    mask, four = ir.Constant(words, [0x0F0F0F0F] * LANES), ir.Constant(words, [4] * LANES)
    for half, columns in enumerate(([at.and_(w, mask) for w in stored], [at.and_(at.lshr(w, four), mask) for w in stored])):
        after = []
        for r, row in enumerate(rows):
            spread = spread_load(at, at.add(at.add(row, row_start), long(half * 4)), INT32.llvm, words)
            mine = sums[r * len(blocks) : (r + 1) * len(blocks)]
            after += [known(at, "llvm.x86.avx512.vpdpbusd.512", words, s, w, spread) for s, w in zip(mine, columns, strict=True)]
        sums = after
    return sums


_KIND = Kind("linear_w4a8", 64, EIGHT, EIGHT, 6, lambda: I.llvm, _line)
_SIMPLE, _SMOOTH = _KIND.simple, _KIND.smooth  # under these names they are found and compiled ahead


def pack(weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, group: int) -> Packed:
    """Pack ``weight [o, i / 2]`` uint8 with ``scales`` and ``zero_points`` (None: 8) ``[o, ceil(i / group)]``."""
    points = 8.0 if zero_points is None else zero_points
    return pack_groups(pack_nibbles(weight.detach()), weight.shape[1] * 2, group, scales, points, bias)


def apply(x: Tensor, x_scales: Tensor, packed: Packed, other: Tensor | None, activation: str, scalars: Sequence[float],
          dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    """``run`` with a weight packed ahead."""
    return _KIND(x, packed, x_scales, other, activation, scalars, dtype)


def run(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """See ``graphwright.ops.weight_only.linear_w4a8``."""
    return apply(x, x_scales, pack(weight, scales, zero_points, bias, group), other, activation, scalars, dtype)


def supports(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None,
) -> str | None:  # fmt: skip
    if (reason := not_cpu(x_scales)) is not None:
        return reason
    if x_scales.shape != (*x.shape[:-1], 1):
        return f"x_scales have shape {tuple(x_scales.shape)}; wanted {(*x.shape[:-1], 1)}"
    return unfit_linear(x, (torch.int8,), weight, torch.uint8, 4, scales, zero_points, bias, other, activation, group, dtype)


def cost(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None,
) -> Cost:  # fmt: skip
    rows, (out, half) = x.numel() // max(x.shape[-1], 1), weight.shape
    moved = pieces(x, x_scales, weight, scales, zero_points, bias, other) + rows * out * (dtype or torch.float32).itemsize
    return Cost(moved, rows * out * (4 * half + 3 + ARITHMETIC.get(activation, 30)))


def samples() -> Iterator[Sample]:
    def make(name: str, rows: tuple[int, ...], width: int, out: int, group: int, *, points: bool = True, bias: bool = True, other: Any = None,
             activation: str = "none", dtype: Any = None, full: bool = False, bench: bool = False) -> Sample:  # fmt: skip
        def args(g: torch.Generator) -> tuple[Any, ...]:
            low, high = (-128, -127) if full else (-127, 128)
            x = torch.randint(low, high, (*rows, width), generator=g).to(torch.int8)
            weight = torch.full((out, width // 2), 255, dtype=torch.uint8) if full else torch.randint(0, 256, (out, width // 2), generator=g, dtype=torch.uint8)
            groups = -(-width // group)
            scales = torch.rand(out, groups, generator=g) * 0.01 + 0.005
            zero_points = torch.randint(0, 16, (out, groups), generator=g).to(torch.float32) if points else None
            return (x, torch.rand(*rows, 1, generator=g) * 0.05 + 0.001, weight, scales, zero_points, torch.randn(out, generator=g) if bias else None,
                    torch.randn(*rows, out, generator=g).to(other) if other else None, activation, (), group, dtype)  # fmt: skip

        return Sample(name, args, bench)

    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    yield make("1x4096x4096", (1,), 4096, 4096, 128, bench=True)
    yield make("128x768x3072 gelu", (128,), 768, 3072, 64, activation="gelu", bench=True)
    yield make("1x2x1", (1,), 2, 1, 32)
    yield make("3x6x7, one group", (3,), 6, 7, 6, bias=False)
    yield make("2x9x64x33 residual relu", (2, 9), 64, 33, 32, other=f32, activation="relu")
    yield make("31x200x130 tanh, ragged group", (31,), 200, 130, 64, activation="tanh")
    yield make("5x1300x70, all of the inputs", (5,), 1300, 70, 1300, points=False)
    yield make("6x2048x16, the largest sums", (6,), 2048, 16, 2048, points=False, full=True)
    yield make("7x256x48 bf16 residual", (7,), 256, 48, 128, other=bf16, dtype=bf16)
    yield make("1x96x16 f16", (1,), 96, 16, 32, dtype=f16, points=False)
    yield make("0x8x16", (0,), 8, 16, 32)


def ready(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None,
) -> Callable[[], Tensor]:  # fmt: skip
    """See ``Kernel.ready``."""
    return functools.partial(apply, x, x_scales, pack(weight, scales, zero_points, bias, group), other, activation, scalars, dtype)


KERNEL = Kernel("graphwright.linear_w4a8", "cpu", "llvm", run, supports, cost, samples, ready=ready)
