"""Linear layers whose weight is stored in blocks, absent ones skipped: products of float32 or of int8.

    y = activation(x @ W^T + bias + other), or x @ W

``x`` [*, i] float with a float weight, or int8 with ``x_scales`` [*, 1] and a weight of int8 with ``weight_scales`` [o]; W as ``values``
[n, b, b], ``columns`` int32 [n] and ``starts`` int32; out [*, o]. A task is one row of blocks by 24 rows of x: its sums stay in registers
from the first block to the last. A transposed weight is sorted by columns when it is packed, so both ways run the same code. Bound
by arithmetic; by memory (the blocks that are there, once) for few rows.
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
from graphwright.kernels.common import address, as_rows, not_cpu, pieces, rows_of
from graphwright.kernels.language import FLOAT32, INT32, INT64, VOID, intrinsic, ir, known, loop
from graphwright.kernels.linear_int8 import real_rows
from graphwright.kernels.linear_sparse24 import unfit_rows
from graphwright.kernels.native import Native, specialized, threads_for
from graphwright.kernels.tile import add as add_rows
from graphwright.kernels.tile import f64, i32, i64, real, scratch_of, share, store
from graphwright.kernels.vector import LANES, F, I, add, load_f, spread_of, store_f
from graphwright.kernels.vnni import DEPTH, unfit, unfit_depth
from graphwright.ops.sparse import SIDES, by_column, check_blocks, to_blocks, unfit_blocks

#: Rows of x in a task; the most rows of a tile, by the side of a block.
ROWS, HIGH = 24, {16: 12, 32: 12, 64: 6}
_ROWS, _ZERO, _ONE, _FOUR = (np.int64(n) for n in (ROWS, 0, 1, 4))
_sums, _more = (scratch_of(ROWS * max(SIDES)) for _ in range(2))
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the kernel reads it, sorted by rows of blocks of outputs.

    Attributes:
        values: ``[n, b inputs, b outputs]`` float32, or ``[n, b / 4 inputs, b outputs, 4]`` int8.
        columns: which block of inputs each meets, int32; starts: where each block of outputs begins, int32.
        sums: of the integers of each output, int32; scales, bias: of each output, float32.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    sums: Tensor
    scales: Tensor
    bias: Tensor


def pack(values: Tensor, columns: Tensor, starts: Tensor, out: int, width: int, transposed: bool, weight_scales: Tensor | None, bias: Tensor | None) -> Packed:
    """Lay out a weight in blocks; see ``graphwright.ops.sparse.linear_block_sparse``.

    Raises:
        InputError: ``columns`` or ``starts`` are not those of such a weight: the kernel would read elsewhere.
    """
    check_blocks(values, columns, starts, out if transposed else width)
    side, values = values.shape[1], values.detach()
    if transposed:
        order, columns, starts = by_column(columns, starts, out // side)
        values = values[order.long()]
    else:
        values = values.transpose(1, 2)
    sums = torch.zeros(out // side, side, dtype=torch.int32)
    if values.dtype == torch.int8:
        rows = torch.repeat_interleave(starts.diff().long())
        sums = sums.index_add(0, rows, values.sum(1, dtype=torch.int32))
        values = values.unflatten(1, (-1, DEPTH)).transpose(2, 3).contiguous()
    else:
        values = values.float().contiguous()
    ones, zeros = torch.ones(out), torch.zeros(out)
    return Packed(values, columns.contiguous(), starts.contiguous(), sums.flatten(), ones if weight_scales is None else weight_scales.detach().float().contiguous(),
                  zeros if bias is None else bias.detach().float().contiguous())  # fmt: skip


# -- device code -------------------------------------------------------------------------------------------------------


def _tile(rows: int, side: int, integers: bool) -> Any:
    """``c[:rows, :side] = sum of x @ block`` over blocks ``begin`` to ``end``, at least one; strides in bytes."""
    blocks, deep = side // LANES, DEPTH if integers else 1

    @intrinsic(VOID, *[INT64] * 8)
    def tile(at, a, a_step, columns, begin, end, values, c, c_step):
        long, vector = INT64.llvm, I.llvm if integers else F.llvm
        word = INT32.llvm if integers else FLOAT32.llvm
        nothing = ir.Constant(vector, [vector.element(0)] * LANES)
        rows_ = [at.add(a, at.mul(a_step, long(r))) for r in range(rows)]

        def load(address: Any, kind: Any) -> Any:
            return at.load(at.inttoptr(address, kind.as_pointer()), align=1 if kind is word else 4)

        def block(turn: Any, sums: list[Any]) -> list[Any]:
            number = at.add(begin, turn)
            column = at.sext(load(at.add(columns, at.mul(number, long(4))), INT32.llvm), long)
            shift = at.mul(column, long(side * (4 // deep)))
            left = [at.add(r, shift) for r in rows_]
            right = at.add(values, at.mul(number, long(side * side * (4 // deep))))

            def step(k: Any, sums: list[Any]) -> list[Any]:
                line, after = at.add(right, at.mul(k, long(side * 4))), []
                these = [load(at.add(line, long(v * LANES * 4)), vector) for v in range(blocks)]
                for r in range(rows):
                    spread = spread_of(at, load(at.add(left[r], at.mul(k, long(4))), word), vector)
                    for v, column in enumerate(these):
                        before = sums[r * blocks + v]
                        after.append(known(at, "llvm.x86.avx512.vpdpbusd.512", vector, before, spread, column) if integers else
                                     known(at, "llvm.fma.v16f32", vector, spread, column, before))  # fmt: skip
                return after

            return loop(at, long(side // deep), sums, step)

        sums = loop(at, at.sub(end, begin), [nothing] * (rows * blocks), block)
        for k, value in enumerate(sums):
            to = at.add(at.add(c, at.mul(c_step, long(k // blocks))), long(k % blocks * LANES * 4))
            at.store(value, at.inttoptr(to, vector.as_pointer()), align=4)

    return tile


def _linear(params):  # device code, with what a side, a dtype and an activation need put in by ``_native``
    """Slots: 2 x, 3 its row in bytes, 4 rows, 5 blocks of outputs, 6 values, 7 columns, 8 starts, 9 sums, 10 scales, 11 bias, 12 scales of rows
    or 0, 13 other or 0, 14 its row in bytes, 15 out, 16 code, 17 a, 18 b."""
    p, d = i64(params), f64(params)
    starts, bands, sums, step = i32(p[8]), (p[4] + _ROWS - 1) // _ROWS, _sums(), SIDE * 4  # noqa: F821
    first, end = share(params, p[5] * bands)
    for task in range(first, end):
        block, row = task // bands, task % bands * _ROWS
        rows, at = min(_ROWS, p[4] - row), block * SIDE  # noqa: F821
        begin, stop, done = np.int64(starts[block]), np.int64(starts[block + 1]), _ZERO
        if begin == stop:
            empty = i32(sums)
            for k in range(rows * SIDE):  # noqa: F821
                empty[k] = np.int32(0)
            done = rows
        while done < rows:
            x, to = p[2] + (row + done) * p[3], sums + done * step
            if rows - done >= TALL:  # noqa: F821
                MANY(x, p[3], p[7], begin, stop, p[6], to, step)  # noqa: F821
                done += TALL  # noqa: F821
            elif rows - done >= 4:
                SOME(x, p[3], p[7], begin, stop, p[6], to, step)  # noqa: F821
                done += _FOUR
            else:
                SINGLE(x, p[3], p[7], begin, stop, p[6], to, step)  # noqa: F821
                done += _ONE
        for r in range(rows):
            line = sums + r * step
            if p[12] != 0:
                real_rows(line, _ONE, step, SIDE, p[9] + at * 4, np.int32(128), real(1), p[10] + at * 4, p[11] + at * 4, _ZERO, p[12] + (row + r) * 4, line, step)  # noqa: F821
            else:
                for c in range(0, SIDE, 16):  # noqa: F821
                    store_f(add(load_f(line + c * 4), load_f(p[11] + (at + c) * 4)), line + c * 4)
            if p[13] != 0:
                add_rows(line, p[13] + (row + r) * p[14] + at * 4, SIDE, line)  # noqa: F821
        y = activate(p[16], sums, rows * SIDE, real(d[17]), real(d[18]), _more())  # noqa: F821
        for r in range(rows):
            store(0, p[15] + ((row + r) * p[5] * SIDE + at) * 4, SIDE, y + r * step, real(1), 0, real(0), real(0))  # noqa: F821


@functools.cache
def _native(side: int, integers: bool, smoothly: bool) -> Native:
    """The compiled kernel of one side and dtype of blocks and one kind of activation."""
    high, form = HIGH[side], smooth if smoothly else simple
    tiles = {name: _tile(rows, side, integers) for name, rows in (("MANY", high), ("SOME", 4), ("SINGLE", 1))}
    name = f"linear_block_sparse_{side}_{'int8' if integers else 'float'}_{form.__name__}"
    return Native(specialized(_linear, name, activate=form, SIDE=np.int64(side), TALL=np.int64(high), **tiles), "q" * 15 + "dd")  # type: ignore[arg-type]


# -- host code ---------------------------------------------------------------------------------------------------------


def apply(x: Tensor, x_scales: Tensor | None, packed: Packed, other: Tensor | None, activation: str, scalars: Sequence[float],
          dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    """``run`` with a weight packed ahead."""
    width = len(packed.bias)
    out = torch.empty((*x.shape[:-1], width))
    if not out.numel():
        return out.to(dtype or torch.float32)
    integers = x.dtype == torch.int8
    # the products want unsigned bytes: flipping the top bit adds 128, which the sums of the weight take away again
    rows = rows_of(x.view(torch.uint8) ^ 128 if integers else x.float())
    by = None if x_scales is None else x_scales.reshape(-1).float().contiguous()
    other, step = as_rows(other, out.shape)
    side, size = packed.values.shape[1] * (DEPTH if integers else 1), rows.element_size()
    threads = threads_for(rows.shape[0] * (packed.values.numel() // 16 + width))
    _native(side, integers, activation in SMOOTH)(
        threads, rows.data_ptr(), rows.stride(0) * size, rows.shape[0], width // side, packed.values.data_ptr(), packed.columns.data_ptr(),
        packed.starts.data_ptr(), packed.sums.data_ptr(), packed.scales.data_ptr(), packed.bias.data_ptr(), address(by),
        address(other), step, out.data_ptr(), CODE[activation], *scalars_of(activation, scalars),
    )  # fmt: skip
    return out.to(dtype or torch.float32)


def run(
    x: Tensor, x_scales: Tensor | None, values: Tensor, columns: Tensor, starts: Tensor, out: int, transposed: bool, weight_scales: Tensor | None,
    bias: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float], dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """See ``graphwright.ops.sparse.linear_block_sparse``."""
    return apply(x, x_scales, pack(values, columns, starts, out, x.shape[-1], transposed, weight_scales, bias), other, activation, scalars, dtype)


def supports(
    x: Tensor, x_scales: Tensor | None, values: Tensor, columns: Tensor, starts: Tensor, out: int, transposed: bool, weight_scales: Tensor | None,
    bias: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float], dtype: torch.dtype | None,
) -> str | None:  # fmt: skip
    if (reason := unfit() or not_cpu(x, x_scales, values, columns, starts, weight_scales, bias, other)) is not None:
        return reason
    return unfit_layer(x, x_scales, values, columns, starts, out, transposed, weight_scales, other, dtype) or unfit_epilogue(activation, None)


def unfit_layer(x: Tensor, x_scales: Tensor | None, values: Tensor, columns: Tensor, starts: Tensor, out: int, transposed: bool,
                weight_scales: Tensor | None, other: Tensor | None, dtype: torch.dtype | None) -> str | None:  # fmt: skip
    """None, or why shapes and dtypes don't make a linear layer with a weight in blocks."""
    if (reason := unfit_blocks(values, columns, starts)) is not None:
        return reason
    side, rows = values.shape[1], starts.shape[0] - 1
    if not x.ndim or x.shape[-1] % side or out % side:
        return f"{x.shape[-1] if x.ndim else 0} inputs and {out} outputs; both must be multiples of {side}, the side of a block"
    if rows * side != (x.shape[-1] if transposed else out):
        return f"{rows} rows of blocks of {side}; x has shape {tuple(x.shape)}, and there are {out} outputs"
    if values.dtype == torch.int8 and (reason := unfit_depth(x.shape[-1])) is not None:
        return reason
    return unfit_rows(x, x_scales, values, weight_scales, out, other, dtype)


def cost(
    x: Tensor, x_scales: Tensor | None, values: Tensor, columns: Tensor, starts: Tensor, out: int, transposed: bool, weight_scales: Tensor | None,
    bias: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float], dtype: torch.dtype | None,
) -> Cost:  # fmt: skip
    rows = x.numel() // max(x.shape[-1], 1)
    moved = pieces(x, x_scales, values, columns, starts, weight_scales, bias, other) + rows * out * (dtype or torch.float32).itemsize
    return Cost(moved, rows * (2 * values.numel() + out * (2 + ARITHMETIC.get(activation, 30))))


def make(name: str, rows: tuple[int, ...], width: int, out: int, side: int, *, kept: float = 0.5, transposed: bool = False, kind: torch.dtype = torch.float32,
         bias: bool = True, other: Any = None, activation: str = "none", scalars: tuple[float, ...] = (), dtype: Any = None, extreme: bool = False,
         strided: bool = False, bench: bool = False) -> Sample:  # fmt: skip
    """A sample; ``kept``: share of the blocks that are there."""

    def args(g: torch.Generator) -> tuple[Any, ...]:
        tall, wide = (width, out) if transposed else (out, width)
        mask = torch.rand(tall // side, wide // side, generator=g) < kept
        if mask.shape[0] > 1 and kept < 1:
            mask[-1] = False  # a row without any
        step = 2 if strided else 1
        if kind == torch.int8:
            given, dense = (torch.randint(-128 if extreme else -127, -126 if extreme else 128, s, generator=g, dtype=torch.int16).to(torch.int8)
                            for s in ((*rows, width * step), (tall, wide)))  # fmt: skip
        else:
            given, dense = (torch.randn(*rows, width * step, generator=g) * (1e3 if extreme else 1)).to(kind), torch.randn(tall, wide, generator=g).to(kind)
        dense = dense * mask.repeat_interleave(side, 0).repeat_interleave(side, 1)
        by = (torch.rand(*rows, 1, generator=g) * 0.05 + 0.001, torch.rand(out, generator=g) * 0.01 + 0.001) if kind == torch.int8 else (None, None)
        residual = torch.randn(*rows, out * step, generator=g).to(other)[..., :out] if other else None
        return (given[..., ::step], by[0], *to_blocks(dense, side, mask), out, transposed, by[1], torch.randn(out, generator=g) if bias else None, residual,
                activation, scalars, dtype)  # fmt: skip

    return Sample(name, args, bench)


def odd_samples() -> Iterator[Sample]:
    """Small ones: every side, dtype and way, rows without blocks, no blocks at all."""
    f32, f16, bf16, i8 = torch.float32, torch.float16, torch.bfloat16, torch.int8
    yield make("1x16x16", (1,), 16, 16, 16, kept=1.0)
    yield make("3x64x48 by 16, int8", (3,), 64, 48, 16, kind=i8, bias=False)
    yield make("2x5x96x64 by 32, residual gelu", (2, 5), 96, 64, 32, other=f32, activation="gelu")
    yield make("5x64x96 by 32, transposed", (5,), 64, 96, 32, transposed=True, activation="relu")
    yield make("17x128x64 by 64, int8 to bf16", (17,), 128, 64, 64, kind=i8, kept=0.8, other=bf16, dtype=bf16)
    yield make("9x80x112 by 16, int8 transposed", (9,), 80, 112, 16, kind=i8, transposed=True, activation="silu", dtype=f16)
    yield make("6x64x128 by 64, f16 transposed", (6,), 64, 128, 64, kind=f16, transposed=True, kept=1.0, dtype=f16)
    yield make("4x160x32 by 16, bf16", (4,), 160, 32, 16, kind=bf16, dtype=bf16, activation="tanh")
    yield make("3x512x16 by 16, int8, the largest sums", (3,), 512, 16, 16, kind=i8, kept=1.0, extreme=True)
    yield make("7x64x64 by 32, strided, hardtanh", (7,), 64, 64, 32, strided=True, other=f32, activation="hardtanh", scalars=(-1.0, 2.0))
    yield make("4x32x64 by 32, no blocks", (4,), 32, 64, 32, kept=0.0, activation="gelu")
    yield make("4x32x64 by 32, no blocks, int8 transposed", (4,), 32, 64, 32, kept=0.0, kind=i8, transposed=True)
    yield make("0x32x64", (0,), 32, 64, 32)
    yield make("2x0x32x64 int8", (2, 0), 32, 64, 32, kind=i8, dtype=bf16)


def samples() -> Iterator[Sample]:
    i8 = torch.int8
    yield make("128x768x3072 by 32, gelu", (1, 128), 768, 3072, 32, activation="gelu", bench=True)
    yield make("128x768x3072 by 32, gelu int8", (1, 128), 768, 3072, 32, kind=i8, activation="gelu", bench=True)
    yield make("1x4096x4096 by 64", (1,), 4096, 4096, 64, bench=True)
    yield make("128x3072x768 by 64, int8", (1, 128), 3072, 768, 64, kind=i8, bench=True)
    yield from odd_samples()
    yield make("31x96x80 by 16", (31,), 96, 80, 16)
    yield make("40x128x192 by 64", (40,), 128, 192, 64)


def ready(
    x: Tensor, x_scales: Tensor | None, values: Tensor, columns: Tensor, starts: Tensor, out: int, transposed: bool, weight_scales: Tensor | None,
    bias: Tensor | None, *rest: Any,
) -> Callable[[], Tensor]:  # fmt: skip
    """See ``Kernel.ready``."""
    return functools.partial(apply, x, x_scales, pack(values, columns, starts, out, x.shape[-1], transposed, weight_scales, bias), *rest)


KERNEL = Kernel("graphwright.linear_block_sparse", "cpu", "llvm", run, supports, cost, samples, ready=ready)
