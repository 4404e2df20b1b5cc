"""Linear layers whose weight has two of every four inputs, the others zero: products of what is stored, as float32 or as int8.

    y = activation(x @ expand(weight, indices)^T + bias + other)

``x`` [*, i] float with a float weight, or int8 with ``x_scales`` [*, 1] and a weight of int8 with ``weight_scales`` [o]; ``weight`` [o, i / 2];
``indices`` uint8 [o, i / 8]; out [*, o]. Nothing is gathered from memory: 16 inputs of x lie in one register, and a permutation by the stored
places hands each of 16 output channels the input that its number belongs to. So half of the multiplications are done, and a little
more than half of the weight is read (packed, a place takes four bits: its number among 16 inputs). Bound by memory for few rows. A permutation costs
what a multiplication does, so for many rows floats gain nothing by leaving zeros out: the weight is expanded piece by piece instead, see ``panels``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.kernels.activations import ARITHMETIC, unfit_epilogue
from graphwright.kernels.common import not_cpu, per_channel, pieces
from graphwright.kernels.grouped import CHUNK, ROWS, Kind, Packed
from graphwright.kernels.language import INT8, INT64, ir, known
from graphwright.kernels.panels import Many
from graphwright.kernels.tile import device, real
from graphwright.kernels.vector import LANES, F, I
from graphwright.kernels.vnni import unfit
from graphwright.ops.sparse import compress, places_of

#: Inputs of a line, and how many of them are stored.
WIDE, KEPT = 16, 8
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _load(at: Any, address: Any, offset: Any, kind: Any) -> Any:
    return at.load(at.inttoptr(at.add(address, offset), kind.as_pointer()), align=1)


def _float_line(at: Any, rows: list[Any], blocks: list[Any], line: Any, sums: list[Any]) -> list[Any]:
    """Eight stored numbers of 16 channels as float32, then 32 bits per channel: the places of the eight."""
    long, words, vector = INT64.llvm, I.llvm, F.llvm
    start, row_start = at.mul(line, long((KEPT + 1) * 64)), at.mul(line, long(WIDE * 4))
    places = [_load(at, at.add(b, start), long(KEPT * 64), words) for b in blocks]
    inputs = [_load(at, row, row_start, vector) for row in rows]
    for kept in range(KEPT):
        # the permutation looks at the lowest four bits alone
        which = [at.lshr(p, ir.Constant(words, [4 * kept] * LANES)) for p in places] if kept else places
        columns = [_load(at, at.add(b, start), long(kept * 64), vector) for b in blocks]
        after = []
        for r, x in enumerate(inputs):
            for v, column in enumerate(columns):
                taken = known(at, "llvm.x86.avx512.permvar.sf.512", vector, x, which[v])
                after.append(known(at, "llvm.fma.v16f32", vector, taken, column, sums[r * len(blocks) + v]))
        sums = after
    return sums


def _byte_line(at: Any, rows: list[Any], blocks: list[Any], line: Any, sums: list[Any]) -> list[Any]:
    """Twice four stored bytes of 16 channels, then their places: those of the first four in the lower halves of bytes, of the others in the upper."""
    long, words, bytes_ = INT64.llvm, I.llvm, ir.VectorType(INT8.llvm, 64)
    four = ir.VectorType(ir.IntType(32), 4)
    start, row_start = at.mul(line, long(3 * 64)), at.mul(line, long(WIDE))
    places, mask = [_load(at, at.add(b, start), long(2 * 64), words) for b in blocks], ir.Constant(words, [0x0F0F0F0F] * LANES)
    inputs = []
    for row in rows:
        x = _load(at, row, row_start, four)
        spread = at.shuffle_vector(x, x, ir.Constant(words, [0, 1, 2, 3] * 4))
        inputs.append(at.bitcast(spread, bytes_))
    for half in range(2):
        shifted = [at.lshr(p, ir.Constant(words, [4] * LANES)) for p in places] if half else places
        which = [at.bitcast(at.and_(p, mask), bytes_) for p in shifted]
        columns = [_load(at, at.add(b, start), long(half * 64), words) for b in blocks]
        after = []
        for r, x in enumerate(inputs):
            for v, column in enumerate(columns):
                taken = at.bitcast(known(at, "llvm.x86.avx512.pshuf.b.512", bytes_, x, which[v]), words)
                after.append(known(at, "llvm.x86.avx512.vpdpbusd.512", words, sums[r * len(blocks) + v], taken, column))
        sums = after
    return sums


def _widen(at: Any, block: Any, line: Any) -> list[Any]:
    """Each input is one of the two numbers stored of its four, or neither."""
    long, words = INT64.llvm, I.llvm
    start, nothing = at.mul(line, long((KEPT + 1) * 64)), ir.Constant(F.llvm, [0.0] * LANES)
    places = _load(at, at.add(block, start), long(KEPT * 64), words)
    stored = [_load(at, at.add(block, start), long(kept * 64), F.llvm) for kept in range(KEPT)]

    def equal(kept: int, place: int) -> Any:
        """Which channels have their number ``kept`` at ``place``; both are compared where they stand among the 32 bits."""
        mask, wanted = (ir.Constant(words, [n - 2**32 if n >= 2**31 else n] * LANES) for n in (15 << 4 * kept, place << 4 * kept))
        return at.icmp_signed("==", at.and_(places, mask), wanted)

    found = []
    for place in range(WIDE):
        kept = place // 4 * 2
        first = at.select(equal(kept, place), stored[kept], nothing)
        found.append(at.select(equal(kept + 1, place), at.fadd(first, stored[kept + 1]), first))
    return found


@device
def _excess(x, n):
    """x comes as unsigned bytes, 128 too large: what that adds is this times the sum of a group's weights."""
    return real(128)


_MANY = Many("linear_sparse24", (KEPT + 1) * 64, WIDE, _widen)
_FLOAT = Kind("linear_sparse24", (KEPT + 1) * 64, WIDE * 4, WIDE, 4, lambda: F.llvm, _float_line, _MANY, (ROWS + 1, 160))  # measured: as pieces of a band it never pays
_BYTE = Kind("linear_sparse24_int8", 3 * 64, WIDE, WIDE, 4, lambda: I.llvm, _byte_line, total_of=_excess)


def pack(weight: Tensor, indices: Tensor, weight_scales: Tensor | None, bias: Tensor | None) -> Packed:
    """Lay out a compressed weight: for each 16 output channels and 16 inputs what ``_float_line`` or ``_byte_line`` reads."""
    out, half = weight.shape
    pad = torch.nn.functional.pad
    behind = (0, -half % KEPT, 0, -out % LANES)
    lines = (half + KEPT - 1) // KEPT
    values = pad(weight.detach(), behind).reshape(-1, LANES, lines, KEPT).transpose(1, 2)  # [blocks, lines, 16, 8]
    within = places_of(indices) + (torch.arange(half) // 2 % 4 * 4).to(torch.uint8)
    places = pad(within, behind).reshape(-1, LANES, lines, KEPT).transpose(1, 2).to(torch.int64)
    groups = -(-2 * half // CHUNK)
    scales, biases = per_channel(torch.ones(1) if weight_scales is None else weight_scales, bias, out, LANES)
    by_group = scales.reshape(-1, 1, LANES).repeat(1, groups, 1)
    if weight.dtype != torch.int8:
        codes = (places << torch.arange(KEPT) * 4).sum(-1)
        codes = torch.where(codes >= 2**31, codes - 2**32, codes).to(torch.int32)
        stored = torch.cat((values.float().transpose(2, 3).contiguous().view(torch.int32), codes.unsqueeze(2)), 2)
        return Packed(out, 2 * half, CHUNK, stored.contiguous(), by_group, None, biases)
    codes = places[..., :4] | places[..., 4:] << 4
    stored = torch.cat((values.unflatten(3, (2, 4)).permute(0, 1, 3, 2, 4).view(torch.uint8), codes.to(torch.uint8).unsqueeze(2)), 2)
    sums = pad(weight.detach().float(), (0, groups * CHUNK // 2 - half, 0, -out % LANES)).reshape(-1, LANES, groups, CHUNK // 2).sum(-1)
    return Packed(out, 2 * half, CHUNK, stored.contiguous(), by_group, (sums.transpose(1, 2) * by_group).contiguous(), biases)


def apply(x: Tensor, x_scales: Tensor | None, packed: Packed, other: Tensor | None, activation: str, scalars: Sequence[float],
          dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    """``run`` with a weight packed ahead."""
    if x.dtype == torch.int8:
        return _BYTE(x.view(torch.uint8) ^ 128, packed, x_scales, other, activation, scalars, dtype)
    return _FLOAT(x, packed, None, other, activation, scalars, dtype)


def run(
    x: Tensor, x_scales: Tensor | None, weight: Tensor, indices: Tensor, weight_scales: Tensor | None, bias: Tensor | None,
    other: Tensor | None, activation: str, scalars: Sequence[float], dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """See ``graphwright.ops.sparse.linear_sparse24``."""
    return apply(x, x_scales, pack(weight, indices, weight_scales, bias), other, activation, scalars, dtype)


def supports(
    x: Tensor, x_scales: Tensor | None, weight: Tensor, indices: Tensor, weight_scales: Tensor | None, bias: Tensor | None,
    other: Tensor | None, activation: str, scalars: Sequence[float], dtype: torch.dtype | None,
) -> str | None:  # fmt: skip
    if (reason := unfit() or not_cpu(x, x_scales, weight, indices, weight_scales, bias, other)) is not None:
        return reason
    if (reason := unfit_compressed(x, weight, indices)) is not None:
        return reason
    return unfit_rows(x, x_scales, weight, weight_scales, weight.shape[0], other, dtype) or unfit_epilogue(activation, None)


def unfit_compressed(x: Tensor, weight: Tensor, indices: Tensor) -> str | None:
    """None, or why shapes are not those of a compressed weight and its input."""
    if weight.ndim != 2 or indices.dtype != torch.uint8 or indices.ndim != 2 or weight.shape[1] % 4 or indices.shape != (weight.shape[0], weight.shape[1] // 4):
        return f"a weight {tuple(weight.shape)} with {indices.dtype} indices {tuple(indices.shape)}; wanted [o, i / 2] and uint8 [o, i / 8], i a multiple of 8"
    if not x.ndim or x.shape[-1] != 2 * weight.shape[1] or not weight.shape[1]:
        return f"x has shape {tuple(x.shape)}, the weight {tuple(weight.shape)} is for rows of {2 * weight.shape[1]}"
    return None


def unfit_rows(x: Tensor, x_scales: Tensor | None, weight: Tensor, weight_scales: Tensor | None, out: int, other: Tensor | None,
               dtype: torch.dtype | None) -> str | None:  # fmt: skip
    """None, or why dtypes and scales don't belong together."""
    bytes_ = weight.dtype == torch.int8
    if (x.dtype != torch.int8 if bytes_ else x.dtype not in _FLOATS or weight.dtype not in _FLOATS):
        return f"x is {x.dtype}, the weight {weight.dtype}; wanted int8 and int8, or both of float32, float16, bfloat16"
    wanted = ((*x.shape[:-1], 1), (out,)) if bytes_ else (None, None)
    for name, scales, shape in zip(("x_scales", "weight_scales"), (x_scales, weight_scales), wanted, strict=True):
        if (None if scales is None else tuple(scales.shape)) != shape:
            return f"{name}: {'None' if scales is None else tuple(scales.shape)}; wanted {shape} for {weight.dtype}"
    if dtype not in (None, *_FLOATS) or (other is not None and (other.dtype not in _FLOATS or other.shape != (*x.shape[:-1], out))):
        return f"the residual is {None if other is None else (other.dtype, tuple(other.shape))}, the result {dtype}; float32, float16 and bfloat16 are supported"
    return None


def cost(
    x: Tensor, x_scales: Tensor | None, weight: Tensor, indices: Tensor, weight_scales: Tensor | None, bias: Tensor | None,
    other: Tensor | None, activation: str, scalars: Sequence[float], dtype: torch.dtype | None,
) -> Cost:  # fmt: skip
    rows, (out, half) = x.numel() // max(x.shape[-1], 1), weight.shape
    moved = pieces(x, x_scales, weight, indices, weight_scales, bias, other) + rows * out * (dtype or torch.float32).itemsize
    return Cost(moved, rows * out * (2 * half + 2 + ARITHMETIC.get(activation, 30)))


def make(name: str, rows: tuple[int, ...], width: int, out: int, *, kind: torch.dtype = torch.float32, x: torch.dtype | None = None, bias: bool = True,
         other: Any = None, activation: str = "none", scalars: tuple[float, ...] = (), dtype: Any = None, extreme: bool = False, strided: bool = False,
         empty: bool = False, bench: bool = False) -> Sample:  # fmt: skip
    """A sample; ``kind``: dtype of the weight; ``empty``: many fours hold one number or none."""

    def args(g: torch.Generator) -> tuple[Any, ...]:
        keep = torch.rand(out, width // 4, 4, generator=g).argsort(-1) < (1 if empty else 2)
        keep &= torch.rand(out, width // 4, 1, generator=g) < (0.4 if empty else 2.0)
        step = 2 if strided else 1
        if kind == torch.int8:
            given, dense = (torch.randint(-128 if extreme else -127, -126 if extreme else 128, s, generator=g, dtype=torch.int16).to(torch.int8)
                            for s in ((*rows, width * step), (out, width)))  # fmt: skip
        else:
            given, dense = (torch.randn(*rows, width * step, generator=g) * (1e3 if extreme else 1)).to(x or kind), torch.randn(out, width, generator=g).to(kind)
        weight, indices = compress(dense * keep.flatten(1))
        by = (torch.rand(*rows, 1, generator=g) * 0.05 + 0.001, torch.rand(out, generator=g) * 0.01 + 0.001) if kind == torch.int8 else (None, None)
        residual = torch.randn(*rows, out * step, generator=g).to(other)[..., :out] if other else None
        return (given[..., ::step], by[0], weight, indices, by[1], torch.randn(out, generator=g) if bias else None, residual, activation, scalars, dtype)

    return Sample(name, args, bench)


def odd_samples() -> Iterator[Sample]:
    """Small ones: every dtype, sizes that fill no tile."""
    f32, f16, bf16, i8 = torch.float32, torch.float16, torch.bfloat16, torch.int8
    yield make("1x8x1", (1,), 8, 1)
    yield make("3x24x7 int8", (3,), 24, 7, kind=i8, bias=False)
    yield make("2x9x64x33 residual relu", (2, 9), 64, 33, other=f32, activation="relu")
    yield make("4x5x136x50 int8 bf16 gelu", (4, 5), 136, 50, kind=i8, other=bf16, activation="gelu", dtype=bf16)
    yield make("21x200x70 tanh bf16", (21,), 200, 70, kind=bf16, activation="tanh", dtype=bf16)
    yield make("5x1304x20 f16", (5,), 1304, 20, kind=f16, x=f16, dtype=f16, other=f16)
    yield make("6x1056x16 int8, the largest sums", (6,), 1056, 16, kind=i8, extreme=True)
    yield make("1x520x40 int8 f16, few numbers", (1,), 520, 40, kind=i8, dtype=f16, empty=True)
    yield make("7x48x40 few numbers, strided, hardtanh", (7,), 48, 40, empty=True, strided=True, other=f32, activation="hardtanh", scalars=(-1.0, 2.0))
    yield make("4x64x24 int8, strided", (4,), 64, 24, kind=i8, strided=True, activation="silu")
    yield make("2x32x16 large numbers", (2,), 32, 16, kind=f16, extreme=True, dtype=f32)
    yield make("0x16x24", (0,), 16, 24)
    yield make("2x0x16x24 int8", (2, 0), 16, 24, kind=i8, dtype=bf16)


def samples() -> Iterator[Sample]:
    i8 = torch.int8
    yield make("1x4096x4096", (1,), 4096, 4096, bench=True)
    yield make("4x4096x11008 silu int8", (4,), 4096, 11008, kind=i8, activation="silu", bench=True)
    yield make("128x768x3072 gelu", (1, 128), 768, 3072, activation="gelu", bench=True)
    yield make("128x768x3072 gelu int8", (1, 128), 768, 3072, kind=i8, activation="gelu", bench=True)
    yield from odd_samples()
    yield make("37x72x130", (37,), 72, 130)
    yield make("161x40x70 residual bf16", (161,), 40, 70, other=torch.bfloat16, dtype=torch.bfloat16)
    yield make("50x88x150 int8", (50,), 88, 150, kind=i8)


def ready(
    x: Tensor, x_scales: Tensor | None, weight: Tensor, indices: Tensor, weight_scales: Tensor | None, bias: Tensor | None, *rest: Any,
) -> Callable[[], Tensor]:  # fmt: skip
    """See ``Kernel.ready``."""
    return functools.partial(apply, x, x_scales, pack(weight, indices, weight_scales, bias), *rest)


# What stands for the 128 that x is too large by is taken away in float32.
KERNEL = Kernel("graphwright.linear_sparse24", "cpu", "llvm", run, supports, cost, samples, tolerance=(1e-6, 1), ready=ready)
