"""Linear layers whose weight is read as int8 and multiplied as float32: for few rows, where reading the weight is all the work.

    y = activation(x @ w8^T * w_scale + bias + other)

``x`` [*, i] float32; ``weight`` [o, i] int8 with a scale per row, packed ahead (``pack``) as [o / 16, i, 16]; out [*, o] float32.
For a few rows a tile holds up to 4 of them times 64 columns of sums in registers, widening each weight once. For more, pieces of the weight
are widened into the L2 cache once for all rows of a task, and tiles of floats do the rest; for many, see ``panels``. Bound by memory up to about a dozen rows
(a quarter of the bytes of float32), by arithmetic beyond.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.kernels.activations import ARITHMETIC, CODE, SMOOTH, scalars_of, simple, smooth, unfit_epilogue
from graphwright.kernels.common import address, as_rows, not_cpu, per_channel, pieces, rows_of
from graphwright.kernels.fma import products
from graphwright.kernels.language import FLOAT32, INT64, VOID, intrinsic, ir, known, loop
from graphwright.kernels.native import GRAIN, Native, specialized, threads_for, unavailable
from graphwright.kernels.panels import BYTES
from graphwright.kernels.tile import add as add_rows
from graphwright.kernels.tile import apart, device, f64, i64, real, scratch_of, share, store
from graphwright.kernels.vector import LANES, F, floats, fma, load_f, load_i8, splat_f, spread_of, store_f

#: Rows and blocks of 16 columns of a task, how many products go into one running sum, and from how many rows on pieces are widened first
#: and ``panels`` takes over.
ROWS, BLOCKS, CHUNK, MANY, MORE = 48, 4, 256, 8, 96
_CHUNK = np.int64(CHUNK)
_ROWS, _BLOCKS, _FOUR, _TWO, _ONE, _ZERO, _MANY = (np.int64(n) for n in (ROWS, BLOCKS, 4, 2, 1, 0, MANY))
_sums, _more = (scratch_of(ROWS * BLOCKS * LANES) for _ in range(2))
_piece = scratch_of(CHUNK * BLOCKS * LANES)


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the kernel reads it: ``weight [blocks, width, 16]`` int8; all padded to whole blocks of 16 output channels."""

    out: int
    width: int
    weight: Tensor
    scales: Tensor
    bias: Tensor


def pack(weight: Tensor, scales: Tensor, bias: Tensor | None) -> Packed:
    """Pack ``weight [o, i]`` int8 with ``scales`` [o] (or one for all) and ``bias`` [o]."""
    out, width = weight.shape
    columns = torch.nn.functional.pad(weight.detach().t(), (0, -out % LANES)).reshape(width, -1, LANES).transpose(0, 1).contiguous()
    return Packed(out, width, columns, *per_channel(scales, bias, out, LANES))


def _tile(rows: int, blocks: int) -> Any:
    """``c[:rows, :16 * blocks] += x @ w`` over ``width`` steps; strides in bytes."""

    @intrinsic(VOID, *[INT64] * 7)
    def tile(at, x, x_step, w, w_step, width, c, c_step):
        long, vector, narrow = INT64.llvm, F.llvm, ir.VectorType(ir.IntType(8), LANES)

        def place(address: Any, kind: Any) -> Any:
            return at.inttoptr(address, kind.as_pointer())

        def turn(step: Any, sums: list[Any]) -> list[Any]:
            line, after = at.mul(step, long(LANES)), []
            columns = [at.sitofp(at.load(place(at.add(at.add(w, at.mul(w_step, long(v))), line), narrow), align=1), vector) for v in range(blocks)]
            for r in range(rows):
                one = at.load(place(at.add(at.add(x, at.mul(x_step, long(r))), at.mul(step, long(4))), FLOAT32.llvm), align=4)
                spread = spread_of(at, one, vector)
                after += [known(at, "llvm.fma.v16f32", vector, spread, columns[v], sums[r * blocks + v]) for v in range(blocks)]
            return after

        sums = loop(at, width, [ir.Constant(vector, [0.0] * LANES)] * (rows * blocks), turn)
        for k, value in enumerate(sums):
            to = place(at.add(at.add(c, at.mul(c_step, long(k // blocks))), long(k % blocks * LANES * 4)), vector)
            at.store(at.fadd(at.load(to, align=4), value), to, align=4)

    return tile


_4x4, _4x1, _1x4, _1x1 = _tile(4, 4), _tile(4, 1), _tile(1, 4), _tile(1, 1)


@device
def pieces_products(x, x_step, rows, w, w_step, blocks, width, c, c_step, piece):
    """As ``widened_products``, for many rows: a piece of the weight becomes floats at ``piece``, and all rows pass by it."""
    apart()
    line = blocks * 64
    for start in range(0, width, _CHUNK):
        steps = min(_CHUNK, width - start)
        for block in range(blocks):
            strip, to = w + block * w_step + start * 16, piece + block * 64
            for k in range(steps):
                store_f(floats(load_i8(strip + k * 16)), to + k * line)
        products(x + start * 4, x_step, rows, piece, line, blocks, steps, c, c_step, w, start)


@device
def widened_products(x, x_step, rows, w, w_step, blocks, width, c, c_step):
    """``c = x @ w``: ``rows`` of x, ``blocks`` of 16 columns; strides in bytes.

    Long sums are made of shorter ones: one running float32 sum over thousands of products would lose digits.
    """
    apart()
    for k in range(0, rows * c_step, 64):
        store_f(splat_f(real(0)), c + k)
    block = _ZERO
    while block < blocks:
        wide = _FOUR if blocks - block >= 4 else _ONE
        for start in range(0, width, _CHUNK):
            steps = min(_CHUNK, width - start)
            strip, out, row = w + block * w_step + start * 16, c + block * 64, _ZERO
            while row < rows:
                high = _FOUR if rows - row >= 4 else _ONE
                at, to = x + row * x_step + start * 4, out + row * c_step
                if high == 4:
                    if wide == 4:
                        _4x4(at, x_step, strip, w_step, steps, to, c_step)
                    else:
                        _4x1(at, x_step, strip, w_step, steps, to, c_step)
                elif wide == 4:
                    _1x4(at, x_step, strip, w_step, steps, to, c_step)
                else:
                    _1x1(at, x_step, strip, w_step, steps, to, c_step)
                row += high
        block += wide


def _linear_w8(params):  # device code, with ``activate`` put in by ``specialized``
    """Slots: 2 x, 3 its row in bytes, 4 rows, 5 columns, 6 weight, 7 width, 8 scales, 9 bias, 10 other or 0, 11 its row in bytes,
    12 out, 13 code, 14 a, 15 b."""
    p, d = i64(params), f64(params)
    columns, width = p[5], p[7]
    blocks, bands, sums = (columns + 15) // 16, (p[4] + _ROWS - 1) // _ROWS, _sums()
    first, end = share(params, (blocks + _BLOCKS - 1) // _BLOCKS * bands)
    for task in range(first, end):
        block, row = task // bands * _BLOCKS, task % bands * _ROWS
        rows, count = min(_ROWS, p[4] - row), min(_BLOCKS, blocks - block)
        at, wide = block * 16, count * 16
        n = min(wide, columns - at)
        x, strip = p[2] + row * p[3], p[6] + block * width * 16
        if rows < _MANY:
            widened_products(x, p[3], rows, strip, width * 16, count, width, sums, wide * 4)
        else:
            pieces_products(x, p[3], rows, strip, width * 16, count, width, sums, wide * 4, _piece())
        for r in range(rows):
            line = sums + r * wide * 4
            for c in range(0, wide, 16):
                store_f(fma(load_f(line + c * 4), load_f(p[8] + (at + c) * 4), load_f(p[9] + (at + c) * 4)), line + c * 4)
            if p[10] != 0:
                add_rows(line, p[10] + (row + r) * p[11] + at * 4, n, line)
        y = activate(p[13], sums, rows * wide, real(d[14]), real(d[15]), _more())  # noqa: F821
        for r in range(rows):
            store(0, p[12] + ((row + r) * columns + at) * 4, n, y + r * wide * 4, real(1), 0, real(0), real(0))


_SIMPLE, _SMOOTH = (Native(specialized(_linear_w8, f"linear_w8_{f.__name__}", activate=f), "q" * 12 + "dd") for f in (simple, smooth))
_MANY_SIMPLE, _MANY_SMOOTH, _BESIDE = BYTES.natives  # under these names they are found and compiled ahead


def run(
    x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float],
) -> Tensor:  # fmt: skip
    """See ``graphwright.ops.lowered.linear_w8``."""
    return apply(x, pack(weight, weight_scales, bias), other, activation, scalars)


def apply(x: Tensor, packed: Packed, other: Tensor | None, activation: str, scalars: Sequence[float]) -> Tensor:
    """``run`` with a weight packed ahead."""
    out = torch.empty((*x.shape[:-1], packed.out))
    if not out.numel():
        return out
    rows = rows_of(x)
    other, step = as_rows(other, out.shape)
    threads = threads_for(max(GRAIN, packed.weight.numel()) * rows.shape[0] // 4)
    if rows.shape[0] >= MORE:
        scales = packed.scales.view(-1, 1, LANES)
        BYTES(threads, rows, out, packed.weight, packed.width, packed.width, scales, None, packed.bias, other, activation, scalars_of(activation, scalars))
        return out
    native = _SMOOTH if activation in SMOOTH else _SIMPLE
    native(
        threads, rows.data_ptr(), rows.stride(0) * 4, rows.shape[0], packed.out,
        packed.weight.data_ptr(), packed.width, packed.scales.data_ptr(), packed.bias.data_ptr(), address(other), step, out.data_ptr(),
        CODE[activation], *scalars_of(activation, scalars),
    )  # fmt: skip
    return out


def supports(
    x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float],
) -> str | None:  # fmt: skip
    if (reason := unavailable() or not_cpu(x, weight, weight_scales, bias, other)) is not None:
        return reason
    if x.dtype != torch.float32 or weight.dtype != torch.int8 or weight.ndim != 2:
        return f"x is {x.dtype}, the weight {weight.dtype} with {weight.ndim} axes; wanted float32, and int8 with 2"
    if not x.ndim or x.shape[-1] != weight.shape[1] or not weight.shape[1]:
        return f"shapes {tuple(x.shape)} and {tuple(weight.shape)} do not belong together"
    return unfit_epilogue(activation, None if other is None else other.dtype)


def cost(
    x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float],
) -> Cost:  # fmt: skip
    rows, (out, width) = x.numel() // max(x.shape[-1], 1), weight.shape
    moved = pieces(x, weight, weight_scales, bias, other) + rows * out * 4
    return Cost(moved, rows * out * (2 * width + 2 + ARITHMETIC.get(activation, 30)))


def samples() -> Iterator[Sample]:
    def make(name: str, rows: tuple[int, ...], width: int, out: int, *, bias: bool = True, other: bool = False, activation: str = "none",
             bench: bool = False) -> Sample:  # fmt: skip
        def args(g: torch.Generator) -> tuple[Any, ...]:
            weight = torch.randint(-127, 128, (out, width), generator=g).to(torch.int8)
            return (torch.randn(*rows, width, generator=g), weight, torch.rand(out, generator=g) * 0.001 + 0.0005,
                    torch.randn(out, generator=g) if bias else None, torch.randn(*rows, out, generator=g) if other else None,
                    activation, ())  # fmt: skip

        return Sample(name, args, bench)

    yield make("1x4096x4096", (1,), 4096, 4096, bench=True)
    yield make("4x4096x11008 silu", (4,), 4096, 11008, activation="silu", bench=True)
    yield make("16x768x3072 gelu", (16,), 768, 3072, activation="gelu", bench=True)
    yield make("3x5x7", (3,), 5, 7, bias=False)
    yield make("2x9x33x17 residual relu", (2, 9), 33, 17, other=True, activation="relu")
    yield make("128x768x768", (128,), 768, 768, bench=True)
    yield make("21x20x130 tanh", (21,), 20, 130, activation="tanh")
    yield make("101x600x70 residual", (101,), 600, 70, other=True)
    yield make("1x1x1", (1,), 1, 1)
    yield make("0x8x16", (0,), 8, 16)


def ready(x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, *rest: Any) -> Callable[[], Tensor]:
    """See ``Kernel.ready``."""
    return functools.partial(apply, x, pack(weight, weight_scales, bias), *rest)


KERNEL = Kernel("graphwright.linear_w8", "cpu", "llvm", run, supports, cost, samples, ready=ready)
