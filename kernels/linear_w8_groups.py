"""Linear layers whose weight is read as int8 with a scale for each group of inputs, and multiplied as float32.

    y = activation(x @ ((w8 - zero_point) * scale)^T + bias + other)

``x`` [*, i] float32 (halves are widened); ``weight`` int8 [o, i]; ``scales``, ``zero_points`` [o, groups]; out [*, o]. Packed ahead (``pack``), 16
bytes hold one input of 16 output channels, widened once for up to 4 rows; for many rows, see ``panels``. Bound by memory up to about a dozen rows, by arithmetic beyond.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.kernels.activations import ARITHMETIC
from graphwright.kernels.common import pieces
from graphwright.kernels.grouped import Kind, Packed, pack_bytes, spread_load, unfit_linear
from graphwright.kernels.grouped import pack as pack_groups
from graphwright.kernels.language import FLOAT32, INT64, known
from graphwright.kernels.panels import BYTES, Many
from graphwright.kernels.panels import column as INTEGERS
from graphwright.kernels.vector import LANES, F

_INPUTS = (torch.float32, torch.float16, torch.bfloat16)


def columns(name: str, column: Callable[[Any, Any, Any], Any]) -> Kind:
    """The kernels whose weight has a byte for each number: ``column(at, block, line)`` writes what makes 16 floats of one line."""

    def line(at: Any, rows: list[Any], blocks: list[Any], number: Any, sums: list[Any]) -> list[Any]:
        long, vector, after = INT64.llvm, F.llvm, []
        values, row_start = [column(at, b, number) for b in blocks], at.mul(number, long(4))
        for r, row in enumerate(rows):
            one = spread_load(at, at.add(row, row_start), FLOAT32.llvm, vector)
            after += [known(at, "llvm.fma.v16f32", vector, one, c, sums[r * len(blocks) + v]) for v, c in enumerate(values)]
        return after

    many = BYTES if column is INTEGERS else Many(name, LANES, 1, lambda *given: [column(*given)])
    return Kind(name, LANES, 4, 1, 4, lambda: F.llvm, line, many)


_KIND = columns("linear_w8_groups", INTEGERS)
_SIMPLE, _SMOOTH = _KIND.simple, _KIND.smooth  # under these names they are found and compiled ahead
_MANY_SIMPLE, _MANY_SMOOTH, _BESIDE = BYTES.natives


def pack(weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, group: int) -> Packed:
    """Pack ``weight [o, i]`` int8 with ``scales`` and ``zero_points`` (None: 0) ``[o, ceil(i / group)]``."""
    return pack_groups(pack_bytes(weight.detach()), weight.shape[1], group, scales, 0.0 if zero_points is None else zero_points, bias)


def apply(x: Tensor, packed: Packed, other: Tensor | None, activation: str, scalars: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    """``run`` with a weight packed ahead."""
    return _KIND(x, packed, None, other, activation, scalars, dtype)


def run(
    x: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """See ``graphwright.ops.weight_only.linear_w8_groups``."""
    return apply(x, pack(weight, scales, zero_points, bias, group), other, activation, scalars, dtype)


def supports(
    x: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None,
) -> str | None:  # fmt: skip
    return unfit_linear(x, _INPUTS, weight, torch.int8, 8, scales, zero_points, bias, other, activation, group, dtype)


def cost(
    x: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None,
) -> Cost:  # fmt: skip
    rows, (out, width) = x.numel() // max(x.shape[-1], 1), weight.shape
    moved = pieces(x, weight, scales, zero_points, bias, other) + rows * out * (dtype or torch.float32).itemsize
    return Cost(moved, rows * out * (2 * width + 2 + ARITHMETIC.get(activation, 30)))


def samples() -> Iterator[Sample]:
    def make(name: str, rows: tuple[int, ...], width: int, out: int, group: int, *, points: bool = False, bias: bool = True, other: Any = None,
             activation: str = "none", x: torch.dtype = torch.float32, dtype: Any = None, bench: bool = False) -> Sample:  # fmt: skip
        def args(g: torch.Generator) -> tuple[Any, ...]:
            weight, groups = torch.randint(-127, 128, (out, width), generator=g).to(torch.int8), -(-width // group)
            scales = torch.rand(out, groups, generator=g) * 0.001 + 0.0005
            zero_points = torch.randint(-40, 40, (out, groups), generator=g).to(torch.float32) if points else None
            return (torch.randn(*rows, width, generator=g).to(x), weight, scales, zero_points, torch.randn(out, generator=g) if bias else None,
                    torch.randn(*rows, out, generator=g).to(other) if other else None, activation, (), group, dtype)  # fmt: skip

        return Sample(name, args, bench)

    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    yield make("1x4096x4096", (1,), 4096, 4096, 128, bench=True)
    yield make("16x768x3072 gelu", (16,), 768, 3072, 64, activation="gelu", bench=True)
    yield make("1x1x1", (1,), 1, 1, 32)
    yield make("3x5x7, one group", (3,), 5, 7, 5, bias=False)
    yield make("2x9x64x33 residual relu", (2, 9), 64, 33, 32, other=f32, activation="relu", points=True)
    yield make("21x203x130 tanh, ragged group", (21,), 203, 130, 64, activation="tanh", points=True)
    yield make("5x1300x70, all of the inputs", (5,), 1300, 70, 1300)
    yield make("101x603x70 silu, ragged group", (101,), 603, 70, 128, activation="silu", points=True)
    yield make("7x256x48 bf16 residual", (7,), 256, 48, 128, x=bf16, other=bf16, dtype=bf16)
    yield make("1x96x16 f16", (1,), 96, 16, 32, x=f16, dtype=f16, points=True)
    yield make("0x8x16", (0,), 8, 16, 32)


def ready(
    x: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None,
) -> Callable[[], Tensor]:  # fmt: skip
    """See ``Kernel.ready``."""
    return functools.partial(apply, x, pack(weight, scales, zero_points, bias, group), other, activation, scalars, dtype)


KERNEL = Kernel("graphwright.linear_w8_groups", "cpu", "llvm", run, supports, cost, samples, ready=ready)
