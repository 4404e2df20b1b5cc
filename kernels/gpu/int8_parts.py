"""What the Triton kernels for ``graphwright.linear_int8`` have in common: the op's arguments, what stands before and behind the product.

    y = activation((x8 - x_point) @ w8^T * x_scale * w_scale + bias + other)
    (x8 - p) @ w8^T = x8 @ w8^T - p * sum_k w8[:, k]

Zero points so cost one product per result, given the sums of the weight's rows, which are added up once. uint8 becomes int8 by its top bit (128 less, zero
point and all), since the matrix units take two operands of one kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.kernel import Cost, Sample
from graphwright.kernels.gpu.language import CODE, leave, nearest
from graphwright.kernels.gpu.launch import Config, Launch, bucket, power_of_two
from graphwright.kernels.gpu.prepared import once

#: The longest row of floats that is quantized here, and the longest sum that int32 holds for sure.
WIDEST_ROW, LONGEST = 32768, 65536

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_BYTES = (torch.int8, torch.uint8)


class Arguments(NamedTuple):
    """Those of ``graphwright.linear_int8``, in order."""

    x: Tensor
    x_scale: float
    x_zero_point: int
    weight: Tensor
    weight_scales: Tensor
    bias: Tensor | None
    other: Tensor | None
    activation: str
    scalars: Sequence[float]
    scale: float
    zero_point: int
    low: int
    high: int
    dtype: torch.dtype | None
    x_scales: Tensor | None
    x_zero_points: Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows of x, rows of the weight, the length of the sums: M, N, K."""
        out, width = self.weight.shape
        return self.x.numel() // max(width, 1), out, width

    @property
    def symmetric(self) -> bool:
        """Integers without a zero point: the weight's sums are not needed."""
        return self.x.dtype == torch.int8 and self.x_zero_points is None and (self.x_scales is not None or self.x_zero_point == 0)


class Tail(NamedTuple):
    """What the end of a product needs, in the order of the kernels' parameters: ``finish`` says what each is."""

    y: Tensor
    x_scale: float
    x_scales: Tensor | None
    point: int
    points: Tensor | None
    scales: Tensor
    sums: Tensor | None
    bias: Tensor | None
    other: Tensor | None
    other_step: int
    a: float
    b: float
    inverse: float
    zero_point: int
    low: int
    high: int


# -- device code -------------------------------------------------------------------------------------------------------


@triton.jit
def finish(
    acc, r, c, rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step,
    a, b, inverse, zero_point, low, high, ACT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """From int32 sums ``acc`` of rows ``r`` and columns ``c`` to what is stored in ``y`` [rows, columns].

    ``x_scales`` [rows] or None, then ``x_scale`` for all; ``points`` [rows] int32 (SHIFT less, for bytes that were unsigned) or
    None, then ``point`` for all; ``sums`` [columns] int32, or None where there is no zero point; ``scales`` and ``bias`` [columns].
    """
    here, there = r < rows, c < columns
    if sums is not None:
        column_sums = tl.load(sums + c, there, other=0)
        if points is not None:
            acc -= (tl.load(points + r, here, other=0) - SHIFT)[:, None] * column_sums[None, :]
        else:
            acc -= (point * column_sums)[None, :]
    v = acc.to(tl.float32)
    by_column = tl.load(scales + c, there, other=0.0).to(tl.float32)
    if x_scales is not None:
        v *= tl.load(x_scales + r, here, other=0.0).to(tl.float32)[:, None]
    else:
        by_column *= x_scale
    v *= by_column[None, :]
    leave(v, r, c, rows, columns, y, bias, other, other_step, a, b, inverse, zero_point, low, high, ACT)


@triton.jit
def finish_tile(
    acc, r, first, rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step,
    a, b, inverse, zero_point, low, high, ACT: tl.constexpr, SHIFT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``finish`` for the columns from ``first`` on, in one, two or four parts one after the other: less is held in registers at a time."""
    BM: tl.constexpr = acc.shape[0]
    WIDE: tl.constexpr = acc.shape[1] // PARTS
    if PARTS == 1:
        finish(acc, r, first + tl.arange(0, WIDE), rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step,
               a, b, inverse, zero_point, low, high, ACT, SHIFT)  # fmt: skip
    else:
        left, right = tl.split(acc.reshape(BM, 2, acc.shape[1] // 2).permute(0, 2, 1))
        if PARTS == 2:
            finish(left, r, first + tl.arange(0, WIDE), rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step,
                   a, b, inverse, zero_point, low, high, ACT, SHIFT)  # fmt: skip
            finish(right, r, first + WIDE + tl.arange(0, WIDE), rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias,
                   other, other_step, a, b, inverse, zero_point, low, high, ACT, SHIFT)  # fmt: skip
        else:
            p0, p1 = tl.split(left.reshape(BM, 2, WIDE).permute(0, 2, 1))
            p2, p3 = tl.split(right.reshape(BM, 2, WIDE).permute(0, 2, 1))
            finish(p0, r, first + tl.arange(0, WIDE), rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step,
                   a, b, inverse, zero_point, low, high, ACT, SHIFT)  # fmt: skip
            finish(p1, r, first + WIDE + tl.arange(0, WIDE), rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias,
                   other, other_step, a, b, inverse, zero_point, low, high, ACT, SHIFT)  # fmt: skip
            finish(p2, r, first + 2 * WIDE + tl.arange(0, WIDE), rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias,
                   other, other_step, a, b, inverse, zero_point, low, high, ACT, SHIFT)  # fmt: skip
            finish(p3, r, first + 3 * WIDE + tl.arange(0, WIDE), rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias,
                   other, other_step, a, b, inverse, zero_point, low, high, ACT, SHIFT)  # fmt: skip


@triton.jit
def round_rows_kernel(x, q, scales, points, columns, step, padded, BLOCK: tl.constexpr):
    """A row of floats as ``quantize_dynamic`` has it from 0 to 255, less 128: q int8, a scale, and a zero point (less 128)."""
    r = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    v = tl.load(x + r.to(tl.int64) * step + c, c < columns, other=0.0).to(tl.float32)
    odd = tl.sum(tl.where(tl.abs(v) < float("inf"), 0, 1), 0)
    v = tl.where(tl.abs(v) < float("inf"), v, 0.0)
    top, bottom = tl.maximum(tl.max(v, 0), 0.0), tl.minimum(tl.min(v, 0), 0.0)
    scale = tl.div_rn(top - bottom, 255.0)
    scale = tl.where(scale > 1.1754943508222875e-38, scale, 1.0)
    point = tl.minimum(tl.maximum(nearest(tl.div_rn(-bottom, scale)), 0.0), 255.0)
    y = tl.minimum(tl.maximum(nearest(tl.div_rn(v, scale)) + point, 0.0), 255.0) - 128.0
    tl.store(q + r.to(tl.int64) * padded + c, y.to(tl.int8), c < padded)
    tl.store(scales + r, tl.where(odd > 0, float("nan"), scale))
    tl.store(points + r, point.to(tl.int32) - 128)


# -- host code ---------------------------------------------------------------------------------------------------------


def flat(x: Tensor) -> Tensor:
    """x as ``[rows, columns]`` with neighbouring columns adjacent; a view where the strides allow it."""
    x = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _at_16_bytes(x: Tensor) -> bool:
    return x.shape[1] % 16 == 0 and x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0


def _padded(x: Tensor) -> Tensor:
    bits = x.contiguous().view(torch.int8)
    return (torch.nn.functional.pad(bits, (0, -x.shape[1] % 16)) if x.shape[1] % 16 else bits.clone()).view(x.dtype)


def aligned(x: Tensor) -> Tensor:
    """Bytes ``[rows, columns]`` so that each row begins at a multiple of 16 bytes and ends at one, with zeros: x itself, or a copy."""
    return x if _at_16_bytes(x) else _padded(x)


def aligned_weight(weight: Tensor) -> Tensor:
    """``aligned``, where the copy is made once for all calls with this tensor."""
    return weight if _at_16_bytes(weight) else once(_padded, weight)


def _row_sums(weight: Tensor) -> Tensor:
    return weight.sum(1, dtype=torch.int32)


def prologue(a: Arguments) -> tuple[Tensor, Tensor, Tail, dict[str, Any], list[Launch]]:
    """What every plan begins with: x and weight as two-dimensional int8, the product's end, constants, launches that come before it.

    Rows of x and the weight are padded with zeros to whole multiples of 16 bytes where they are not; a zero on both sides adds nothing.
    """
    rows, out, width = a.sizes
    x, weight, device, before = flat(a.x), aligned_weight(a.weight), a.x.device, list[Launch]()
    scales, points, point, shift = a.x_scales, a.x_zero_points, 0 if a.x_scales is not None else a.x_zero_point, 0
    if x.is_floating_point():
        padded = weight.shape[1]
        q = torch.empty((rows, padded), dtype=torch.int8, device=device)
        scales, points = (torch.empty(rows, dtype=t, device=device) for t in (torch.float32, torch.int32))
        block = power_of_two(padded)
        before.append(Launch(round_rows_kernel, (rows,), (x, q, scales, points, width, x.stride(0), padded), {"BLOCK": block},
                             Config.of(warps=max(1, min(16, block // 1024)), stages=1)))  # fmt: skip
        x = q
    else:
        x = aligned(x)
        if x.dtype == torch.uint8:
            x, shift, point = x.view(torch.int8), 128, point - 128
    sums = None if a.symmetric else once(_row_sums, a.weight)
    y = torch.empty((*a.x.shape[:-1], out), dtype=a.dtype or torch.float32, device=device)
    other = None if a.other is None else flat(a.other)
    numbers = (*a.scalars, 0.0, 0.0)[:2]
    tail = Tail(y, float(a.x_scale), None if scales is None else scales.reshape(-1), point, None if points is None else points.reshape(-1),
                a.weight_scales.contiguous(), sums, None if a.bias is None else a.bias.contiguous(), other,
                0 if other is None else other.stride(0), *map(float, numbers), 1.0 / a.scale if a.dtype in _BYTES else 1.0, a.zero_point, a.low, a.high)  # fmt: skip
    return x, weight, tail, {"ACT": CODE[a.activation], "SHIFT": shift}, before


def supports(*args: Any) -> str | None:
    """None, or why none of the families serves these arguments of ``graphwright.linear_int8``."""
    a = Arguments(*args)
    if a.x.dtype not in (torch.int8, torch.uint8, *FLOATS) or a.weight.dtype != torch.int8:
        return f"x is {a.x.dtype}, the weight {a.weight.dtype}; wanted int8, uint8, float16, bfloat16 or float32, and int8"
    if not a.x.ndim or a.weight.ndim != 2 or a.x.shape[-1] != a.weight.shape[1]:
        return f"shapes {tuple(a.x.shape)} and {tuple(a.weight.shape)} do not belong together"
    most = WIDEST_ROW if a.x.is_floating_point() else LONGEST
    if not 0 < a.weight.shape[1] <= most:
        return f"{a.weight.shape[1]} inputs; 1 to {most} are supported" + (", more where x is quantized ahead" if a.x.is_floating_point() else "")
    if a.activation not in CODE:
        return f"activation {a.activation!r} is not fused"
    if a.dtype not in (None, torch.int8, torch.uint8, *FLOATS):
        return f"result of {a.dtype}; float32, float16, bfloat16, int8 and uint8 are supported"
    return _unfit_rest(a)


def _unfit_rest(a: Arguments) -> str | None:
    rows, out = a.x.shape[:-1], a.weight.shape[0]
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "weight_scales": (a.weight_scales, (out,), FLOATS), "bias": (a.bias, (out,), FLOATS), "other": (a.other, (*rows, out), FLOATS),
        "x_scales": (a.x_scales, (*rows, 1), FLOATS), "x_zero_points": (a.x_zero_points, (*rows, 1), (torch.int32,)),
    }  # fmt: skip
    for name, (tensor, shape, dtypes) in wanted.items():
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype not in dtypes):
            kinds = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            return f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; wanted {shape} of {kinds}"
    return None


def cost(*args: Any) -> Cost:
    """Each tensor once; a multiply-add counts two."""
    a = Arguments(*args)
    rows, out, width = a.sizes
    held = sum(t.numel() * t.element_size() for t in args if isinstance(t, Tensor))
    return Cost(held + rows * out * (a.dtype or torch.float32).itemsize, 2 * rows * out * width)


def bucket_of(*args: Any) -> tuple[Any, ...]:
    """Rows in powers of two; all else that changes the code or its speed as it is."""
    a = Arguments(*args)
    rows, out, width = a.sizes
    return bucket(rows), out, width, a.x.dtype, a.dtype, a.symmetric, a.other is not None, a.activation != "none"


def moved(args: Sequence[Any]) -> int:
    """Bytes that come from or go to device memory at the least."""
    return cost(*args).bytes


# -- samples -----------------------------------------------------------------------------------------------------------


def make(
    name: str, rows: tuple[int, ...], width: int, out: int, *, x: torch.dtype = torch.int8, per_row: str = "scales", bias: torch.dtype | None = torch.float32,
    other: torch.dtype | None = None, activation: str = "none", scalars: tuple[float, ...] = (), dtype: torch.dtype | None = torch.float16,
    strided: bool = False, extreme: bool = False, big: float = 1.0, bench: bool = False,
) -> Sample:  # fmt: skip
    """A sample; ``per_row``: ``"scales"``, ``"both"`` (zero points too) or ``""``, one scale for all."""

    def integers(kind: torch.dtype, g: torch.Generator, *shape: int) -> Tensor:
        low, high = (0, 255) if kind == torch.uint8 else (-128, 127)
        if extreme:
            return torch.randint(0, 2, shape, generator=g).mul(high - low).add(low).to(kind)
        return torch.randint(low, high + 1, shape, generator=g, dtype=torch.int16 if bench else torch.int64).to(kind)

    def args(g: torch.Generator) -> tuple[Any, ...]:
        if x.is_floating_point:
            given = (torch.randn(*rows, width, generator=g) * 3).to(x)
        else:
            given = integers(x, g, *rows, 2 * width if strided else width)[..., : width * 2 : 2 if strided else 1]
        weight = integers(torch.int8, g, out, width + 3 if strided else width)[:, :width]
        scales = (torch.rand(out, generator=g) + 0.5) * big / (100 * width**0.5)
        points = (0.05, 128, 0, 255) if dtype == torch.uint8 else (0.05, -3, -128, 127)
        residual = None if other is None else torch.randn(*rows, out * 2 if strided else out, generator=g).to(other)[..., :out]
        return (given, 0.02, 121 if x == torch.uint8 else 7, weight, scales, torch.randn(out, generator=g).to(bias) if bias else None, residual,
                activation, scalars, *points, dtype, torch.rand(*rows, 1, generator=g) * 0.05 if per_row else None,
                torch.randint(-20, 21, (*rows, 1), generator=g, dtype=torch.int32) if per_row == "both" else None)  # fmt: skip

    return Sample(name, args, bench)


def odd_samples() -> Iterator[Sample]:
    """Small ones: every form of input and result, sizes that fill no tile."""
    half, bf16, f32, i8, u8 = torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8
    yield make("3x16x16", (3,), 16, 16)
    yield make("1x1x1", (1,), 1, 1, dtype=f32)
    yield make("one scale, no bias, float32", (5,), 40, 24, per_row="", bias=None, dtype=None)
    yield make("2x9x70x33 bf16 gelu residual", (2, 9), 70, 33, other=bf16, activation="gelu", dtype=bf16, bias=bf16)
    yield make("17x48x80 uint8 to uint8, hardtanh", (17,), 48, 80, x=u8, per_row="", activation="hardtanh", scalars=(-1.0, 2.5), dtype=u8)
    yield make("20x64x20 zero points of rows to int8, silu", (20,), 64, 20, per_row="both", activation="silu", dtype=i8)
    yield make("6x33x18 uint8 with scales of rows", (6,), 33, 18, x=u8, dtype=f32)
    yield make("6x33x18 uint8, zero points of rows", (6,), 33, 18, x=u8, per_row="both", other=f32)
    yield make("strided", (7,), 32, 16, strided=True, other=half)
    yield make("extreme integers", (4,), 520, 16, extreme=True, x=u8, per_row="", dtype=f32)
    yield make("saturating", (8,), 32, 32, big=1e6, dtype=i8)
    yield make("overflowing", (8,), 32, 32, big=1e9, dtype=half)
    yield make("rows of half floats", (5,), 30, 20, x=half, per_row="")
    yield make("rows of floats, softplus", (3, 2), 64, 16, x=f32, per_row="", activation="softplus", scalars=(2.0, 20.0), dtype=bf16)
    yield make("empty", (0,), 32, 16)
    yield make("empty rows of floats", (2, 0), 32, 16, x=half, per_row="")
    yield make("no columns", (4,), 32, 0)


def meta(rows: int, out: int, width: int, x: torch.dtype, y: torch.dtype, activation: str = "none") -> tuple[Any, ...]:
    """Arguments without data, for compilation ahead of time: int8 with scales of rows and a residual, uint8 under one scale, or floats."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weight, signed = empty(out, width, dtype=torch.int8), x == torch.int8
    return (empty(rows, width, dtype=x), 0.02, 121, weight, empty(out), empty(out), empty(rows, out, dtype=torch.float16) if signed else None,
            activation, (), 0.05, 128, 0, 255, y, empty(rows, 1) if signed else None, None)  # fmt: skip
