"""Linear layers whose weight is read as 4-bit numbers and multiplied as float32: for few rows, where reading the weight is all the work.

    y = activation(x @ ((w4 - zero_point) * scale)^T + bias + other)

``x`` [*, i] float32 (halves are widened); ``weight`` uint8 [o, i / 2], two numbers a byte; ``scales``, ``zero_points`` [o, groups]; out [*, o].
Packed ahead (``pack``), 64 bytes hold eight inputs of 16 output channels. A shift and one permutation of a table make 16 floats of them,
which serve up to 4 rows; for many rows, see ``panels``. Bound by memory up to about four rows (an eighth of the bytes of float32), by arithmetic beyond.
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
from graphwright.kernels.grouped import EIGHT, Kind, Packed, pack_nibbles, spread_load, unfit_linear
from graphwright.kernels.grouped import pack as pack_groups
from graphwright.kernels.language import FLOAT32, INT64, ir, known
from graphwright.kernels.panels import Many
from graphwright.kernels.vector import LANES, F, I

_INPUTS = (torch.float32, torch.float16, torch.bfloat16)
#: What stands for zero where there are no zero points; the table holds the numbers from it.
_MIDDLE = 8


def _words(at: Any, block: Any, line: Any) -> Any:
    """Eight inputs of 16 channels: byte b of a channel's four holds input b in its lower half and 4 + b in its upper one."""
    return at.load(at.inttoptr(at.add(block, at.mul(line, INT64.llvm(64))), I.llvm.as_pointer()), align=4)


def _column(at: Any, stored: Any, place: int) -> Any:
    """Input ``place`` of the eight as floats."""
    vector, bits = F.llvm, 8 * (place % 4) + 4 * (place // 4)
    table = ir.Constant(vector, [float(n - _MIDDLE) for n in range(LANES)])
    shifted = at.lshr(stored, ir.Constant(I.llvm, [bits] * LANES)) if bits else stored
    return known(at, "llvm.x86.avx512.permvar.sf.512", vector, table, shifted)  # it looks at the lowest four bits alone


def _line(at: Any, rows: list[Any], blocks: list[Any], line: Any, sums: list[Any]) -> list[Any]:
    """Eight inputs of 16 channels, one after the other: few registers."""
    long, vector, sums = INT64.llvm, F.llvm, list(sums)
    row_start, stored = at.mul(line, long(EIGHT * 4)), [_words(at, b, line) for b in blocks]
    for place in (0, 4, 1, 5, 2, 6, 3, 7):
        columns = [_column(at, w, place) for w in stored]
        for r, row in enumerate(rows):
            one = spread_load(at, at.add(at.add(row, row_start), long(place * 4)), FLOAT32.llvm, vector)
            for k, column in enumerate(columns, r * len(blocks)):
                sums[k] = known(at, "llvm.fma.v16f32", vector, one, column, sums[k])
    return sums


def _widen(at: Any, block: Any, line: Any) -> list[Any]:
    stored = _words(at, block, line)
    return [_column(at, stored, place) for place in range(EIGHT)]


_MANY = Many("linear_w4", 64, EIGHT, _widen)
_KIND = Kind("linear_w4", 64, EIGHT * 4, EIGHT, 4, lambda: F.llvm, _line, _MANY)
_SIMPLE, _SMOOTH = _KIND.simple, _KIND.smooth  # under these names they are found and compiled ahead
_MANY_SIMPLE, _MANY_SMOOTH, _BESIDE = _MANY.natives


def pack(weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, group: int) -> Packed:
    """Pack ``weight [o, i / 2]`` uint8 with ``scales`` and ``zero_points`` (None: 8) ``[o, ceil(i / group)]``."""
    points = 0.0 if zero_points is None else zero_points.detach().float() - _MIDDLE
    return pack_groups(pack_nibbles(weight.detach()), weight.shape[1] * 2, group, scales, points, bias)


def apply(x: Tensor, packed: Packed, other: Tensor | None, activation: str, scalars: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    """``run`` with a weight packed ahead."""
    return _KIND(x, packed, None, other, activation, scalars, dtype)


def run(
    x: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """See ``graphwright.ops.weight_only.linear_w4``."""
    return apply(x, pack(weight, scales, zero_points, bias, group), other, activation, scalars, dtype)


def supports(
    x: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None,
) -> str | None:  # fmt: skip
    return unfit_linear(x, _INPUTS, weight, torch.uint8, 4, scales, zero_points, bias, other, activation, group, dtype)


def cost(
    x: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None,
) -> Cost:  # fmt: skip
    rows, (out, half) = x.numel() // max(x.shape[-1], 1), weight.shape
    moved = pieces(x, weight, scales, zero_points, bias, other) + rows * out * (dtype or torch.float32).itemsize
    return Cost(moved, rows * out * (4 * half + 2 + ARITHMETIC.get(activation, 30)))


def samples() -> Iterator[Sample]:
    def make(name: str, rows: tuple[int, ...], width: int, out: int, group: int, *, points: bool = True, bias: bool = True, other: Any = None,
             activation: str = "none", x: torch.dtype = torch.float32, dtype: Any = None, mean: float = 0.0, bench: bool = False) -> Sample:  # fmt: skip
        def args(g: torch.Generator) -> tuple[Any, ...]:
            weight = torch.randint(0, 256, (out, width // 2), generator=g, dtype=torch.uint8)
            groups = -(-width // group)
            scales = torch.rand(out, groups, generator=g) * 0.01 + 0.005
            zero_points = torch.randint(0, 16, (out, groups), generator=g).to(torch.float32) if points else None
            given = (torch.randn(*rows, width, generator=g) + mean).to(x)
            return (given, weight, scales, zero_points, torch.randn(out, generator=g) if bias else None,
                    torch.randn(*rows, out, generator=g).to(other) if other else None, activation, (), group, dtype)  # fmt: skip

        return Sample(name, args, bench)

    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    yield make("1x4096x4096", (1,), 4096, 4096, 128, bench=True)
    yield make("4x4096x11008 silu", (4,), 4096, 11008, 128, activation="silu", bench=True)
    yield make("16x768x3072 gelu", (16,), 768, 3072, 64, activation="gelu", bench=True)
    yield make("128x768x768", (128,), 768, 768, 128, bench=True)
    yield make("1x2x1", (1,), 2, 1, 32)
    yield make("61x600x70, ragged group", (61,), 600, 70, 128, other=f32)
    yield make("30x1300x40, all of the inputs", (30,), 1300, 40, 1300)
    yield make("3x6x7, one group", (3,), 6, 7, 6, bias=False)
    yield make("2x9x64x33 residual relu", (2, 9), 64, 33, 32, other=f32, activation="relu")
    yield make("21x200x130 tanh, ragged group", (21,), 200, 130, 64, activation="tanh")
    yield make("5x1300x70, all of the inputs", (5,), 1300, 70, 1300, points=False)
    yield make("4x1300x20, all of the inputs, zero points, one sign", (4,), 1300, 20, 2048, mean=2.0)
    yield make("7x256x48 bf16 residual", (7,), 256, 48, 128, x=bf16, other=bf16, dtype=bf16)
    yield make("1x96x16 f16", (1,), 96, 16, 32, x=f16, dtype=f16, points=False)
    yield make("101x600x70, ragged group", (101,), 600, 70, 128, other=f32)
    yield make("98x1300x40 gelu, all of the inputs", (98,), 1300, 40, 1300, activation="gelu")
    yield make("49x72x65 silu", (49,), 72, 65, 8, activation="silu")
    yield make("0x8x16", (0,), 8, 16, 32)


def ready(
    x: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, other: Tensor | None,
    activation: str, scalars: Sequence[float], group: int, dtype: torch.dtype | None,
) -> Callable[[], Tensor]:  # fmt: skip
    """See ``Kernel.ready``."""
    return functools.partial(apply, x, pack(weight, scales, zero_points, bias, group), other, activation, scalars, dtype)


KERNEL = Kernel("graphwright.linear_w4", "cpu", "llvm", run, supports, cost, samples, ready=ready)
