"""Linear layers of many rows whose weight is stored in few bits: it becomes floats piece by piece, and tiles of floats do the rest.

    y[r, o] = activation(sum_k x[r, k] * w[o, k] + bias[o] + other[r, o])        x [rows, k], y [rows, o] float32

Of the weight only a piece of ``PIECE`` inputs times ``STRIPS`` strips is ever float, in the L2 cache of the core that multiplies it, widened anew for
each band of rows, which costs a hundredth of the products. x is laid out once for all: eight rows side by side. A tile holds 8 rows times a
strip of 48 columns of sums in 24 of the 32 vector registers of AVX-512; per input it reads 3 vectors of the piece and 8 floats of x, each from where
the last ones came from, and starts 24 multiply-adds. Bound by arithmetic; on processors with narrower registers LLVM splits each operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.kernels.activations import CODE, SMOOTH, simple, smooth
from graphwright.kernels.language import FLOAT32, INT8, INT32, INT64, VOID, Device, intrinsic, ir, known, loop
from graphwright.kernels.native import Native, specialized
from graphwright.kernels.tile import add as add_rows
from graphwright.kernels.tile import apart, call, device, f32, f64, i64, real, scratch_of, share, store
from graphwright.kernels.vector import LANES, F, add, load_f, prefetch, splat_f, spread_of, store_f

#: Rows of a tile, and blocks of 16 columns of a strip.
HIGH, WIDE = 8, 3
#: Inputs of a piece of the weight, strips of it, tiles of rows that it serves (what the pieces and the sums take fits half an L2 cache of 1 MiB), and how
#: many of these tiles share in bringing the next piece near.
PIECE, STRIPS, BAND, PARTS = 384, 2, 64, 4

_HIGH, _WIDE, _PIECE, _STRIPS, _BAND, _PARTS, _ONE, _ZERO = (np.int64(n) for n in (HIGH, WIDE, PIECE, STRIPS, BAND, PARTS, 1, 0))
_piece = scratch_of(PIECE * STRIPS * WIDE * LANES)
_sums = scratch_of(BAND * HIGH * STRIPS * WIDE * LANES)
_more = scratch_of(HIGH * STRIPS * WIDE * LANES)

#: Writes what makes floats of one line of one block: ``(at, address of the block, line) -> 16 outputs for each input of the line``.
Widen = Callable[[Any, Any, Any], list[Any]]


# -- x, eight rows side by side --------------------------------------------------------------------------------------


@intrinsic(VOID, *[INT64] * (HIGH + 1))
def _turned(at, *addresses):
    """Sixteen numbers of each of eight rows, as sixteen times eight: neighbours are interleaved three times."""
    *rows, to = addresses
    pointer, word = F.llvm.as_pointer(), ir.IntType(32)
    values = [at.load(at.inttoptr(a, pointer), align=4) for a in rows]
    low, high = ([word(k // 2 + start + k % 2 * LANES) for k in range(LANES)] for start in (0, LANES // 2))
    kind = ir.VectorType(word, LANES)
    for _ in range(3):
        pairs = [(values[k], values[k + HIGH // 2]) for k in range(HIGH // 2)]
        values = [at.shuffle_vector(a, b, ir.Constant(kind, half)) for a, b in pairs for half in (low, high)]
    for k, value in enumerate(values):
        at.store(value, at.inttoptr(at.add(to, INT64.llvm(k * LANES * 4)), pointer), align=4)


@device
def beside(row, step, left, inputs, even, to):
    """Eight rows side by side, ``[even, 8]``: addresses, a row in bytes. What is beyond the last row, ``left`` further on, repeats it."""
    apart()
    whole = inputs // 16 * 16
    for k in range(0, whole, 16):
        at = row + k * 4
        _turned(at, at + min(left, 1) * step, at + min(left, 2) * step, at + min(left, 3) * step, at + min(left, 4) * step, at + min(left, 5) * step,
                at + min(left, 6) * step, at + min(left, 7) * step, to + k * 32)  # fmt: skip
    for r in range(_HIGH):
        source, out = f32(row + min(left, r) * step), f32(to + r * 4)
        for k in range(whole, even):
            out[k * 8] = source[k] if k < inputs else real(0)


def _beside(params):  # device code
    """Slots: 2 x, 3 its row in bytes, 4 rows, 5 inputs, 6 the same, even, 7 to: ``[tiles, inputs, 8]``. What is beyond the rows repeats the last."""
    p = i64(params)
    first, end = share(params, (p[4] + _HIGH - 1) // _HIGH)
    for t in range(first, end):
        beside(p[2] + t * _HIGH * p[3], p[3], p[4] - 1 - t * _HIGH, p[5], p[6], p[7] + t * p[6] * 32)


_BESIDE = Native(_beside, "q" * 6)


# -- products --------------------------------------------------------------------------------------------------------


@intrinsic(VOID, *[INT64] * 11)
def tile_of(at, high, wide, a, b, depth, c, c_step, more, ahead, ahead_step, strip):
    """``c[:high, :16 * wide] = a @ b``, or that added where ``more`` is not 0.

    ``high`` is 8 or 4, ``wide`` 1 to 3; ``a [depth, 8]`` and ``b [depth, 16 * wide]`` without gaps, ``depth`` even; ``c_step`` in bytes. Every
    two inputs, the lines of memory at ``ahead``, so many bytes further on each time, are brought into the L2 cache: ``wide`` of them, ``strip`` apart.
    """
    other, done = at.append_basic_block("other"), at.append_basic_block("done")
    cases = at.switch(at.add(at.mul(high, INT64.llvm(HIGH)), wide), other)
    at.position_at_end(other)
    at.unreachable()
    for rows in (HIGH, HIGH // 2):
        for blocks in range(1, WIDE + 1):
            case = at.append_basic_block(f"tile.{rows}x{blocks}")
            cases.add_case(INT64.llvm(rows * HIGH + blocks), case)
            at.position_at_end(case)
            _emit(at, rows, blocks, a, b, depth, c, c_step, more, ahead, ahead_step, strip)
            at.branch(done)
    at.position_at_end(done)


def _emit(at: Any, rows: int, blocks: int, a: Any, b: Any, depth: Any, c: Any, c_step: Any, more: Any, ahead: Any, ahead_step: Any,
          strip: Any) -> None:  # fmt: skip
    """The loop of one tile: two inputs a turn."""
    long, word, vector, line = INT64.llvm, INT32.llvm, F.llvm, blocks * LANES * 4

    def place(address: Any, offset: int, kind: Any) -> Any:
        return at.inttoptr(at.add(address, long(offset)), kind.as_pointer())

    def fetch(address: Any, level: int) -> None:
        known(at, "llvm.prefetch.p0", VOID.llvm, place(address, 0, INT8.llvm), word(0), word(level), word(1))

    def turn(step: Any, sums: list[Any]) -> list[Any]:
        left, right = at.add(a, at.mul(step, long(2 * HIGH * 4))), at.add(b, at.mul(step, long(2 * line)))
        for k in range(2):
            columns = [at.load(place(right, k * line + v * LANES * 4, vector), align=64) for v in range(blocks)]
            for v in range(blocks):  # eight inputs from now
                fetch(at.add(right, long((k + 8) * line + v * LANES * 4)), 3)
            after = []
            for r in range(rows):
                spread = spread_of(at, at.load(place(left, (k * HIGH + r) * 4, FLOAT32.llvm), align=4), vector)
                after += [known(at, "llvm.fma.v16f32", vector, spread, column, sums[r * blocks + v]) for v, column in enumerate(columns)]
            sums = after
        following = at.add(ahead, at.mul(step, ahead_step))
        for v in range(blocks):
            fetch(at.add(following, at.mul(strip, long(v))), 2)
        return sums

    nothing, added = ir.Constant(vector, [0.0] * LANES), at.icmp_signed("!=", more, long(0))
    sums = loop(at, at.ashr(depth, long(1)), [nothing] * (rows * blocks), turn)
    for k, value in enumerate(sums):
        to = place(at.add(c, at.mul(c_step, long(k // blocks))), k % blocks * LANES * 4, vector)
        at.store(at.fadd(value, at.select(added, at.load(to, align=4), nothing)), to, align=4)


def widener(widen: Widen | None) -> Any:
    """``to[k, :16] = w * scale - offset`` for the inputs k of a line, ``step`` bytes apart; nothing without ``widen``."""

    @intrinsic(VOID, INT64, INT64, F, F, INT64, INT64)
    def unpack(at, w, line, scale, offset, to, step):
        vector = F.llvm
        below = at.fneg(offset)
        for k, column in enumerate(widen(at, w, line) if widen else ()):
            value = known(at, "llvm.fma.v16f32", vector, column, scale, below)
            at.store(value, at.inttoptr(at.add(to, at.mul(step, INT64.llvm(k))), vector.as_pointer()), align=64)

    return unpack


def _floats(w, strip, first, count, each, scales, every, offsets, blocks, piece, depth):  # device code
    """So many lines of ``blocks`` blocks as floats, strip by strip ``[depth, 48]``: the last strip may be narrower. Zeros where ``depth`` is larger."""
    apart()
    for b in range(blocks):
        before = b // _WIDE * _WIDE
        step = min(_WIDE, blocks - before) * 64
        to, line = piece + before * 64 * depth + (b - before) * 64, _ZERO
        while line < count:
            group = (first + line) // each
            until, by = min(count, (group + 1) * each - first), (b * every + group) * 64
            scale, offset = load_f(scales + by), splat_f(real(0))
            if offsets != 0:
                offset = load_f(offsets + by)
            for k in range(line, until):
                UNPACK(w + b * strip, first + k, scale, offset, to + k * PER_LINE * step, step)  # noqa: F821
            line = until
        for k in range(count * PER_LINE, depth):  # noqa: F821
            store_f(splat_f(real(0)), to + k * step)


@device
def _number(params):
    """The calling thread's number, and how many there are."""
    p = i64(params)
    if p[0] == 0:
        return 0, 1
    me, all_ = call(p[0]), call(p[1])
    return me, all_


@intrinsic(VOID, INT64)
def _prefetch_to_write(at, address):
    word = INT32.llvm
    known(at, "llvm.prefetch.p0", VOID.llvm, at.inttoptr(address, INT8.llvm.as_pointer()), word(1), word(3), word(1))


@device
def _expect(params, rows, row, first, wide):
    """Bring what will be written of the result, and read of the residual, near: so many rows from ``row`` on, blocks from the byte ``first``."""
    apart()
    p = i64(params)
    for r in range(rows):
        for b in range(wide):
            _prefetch_to_write(p[15] + (row + r) * p[5] * 4 + first + b * 64)
            if p[13] != 0:
                prefetch(p[13] + (row + r) * p[14] + first + b * 64)


def _end(params, sums, step, rows, row, first, n):  # device code
    """Finish so many rows of sums, ``step`` bytes wide: bias, residual, activation; write ``n`` numbers of each, from column ``first``."""
    apart()
    p, d = i64(params), f64(params)
    for r in range(rows):
        line = sums + r * step
        for c in range(0, step, 64):
            store_f(add(load_f(line + c), load_f(p[12] + first * 4 + c)), line + c)
        if p[13] != 0:
            add_rows(line, p[13] + (row + r) * p[14] + first * 4, n, line)
    y = activate(p[17], sums, rows * step // 4, real(d[18]), real(d[19]), _more())  # noqa: F821
    for r in range(rows):
        store(0, p[15] + ((row + r) * p[5] + first) * 4, n, y + r * step, real(1), 0, real(0), real(0))


def _linear(params):  # device code, with what a kind of weight and an activation need put in by ``Many``
    """Slots: 2 x as ``_beside`` leaves it, 3 bytes of eight rows of it, 4 rows, 5 columns, 6 weight, 7 lines of a block, 8 lines of a group, 9 scales,
    10 all groups, 11 offsets or 0, 12 bias, 13 other or 0, 14 its row in bytes, 15 out, 16 threads side by side on the same columns, 17 code,
    18 a, 19 b."""
    p, piece, sums = i64(params), _piece(), _sums()
    lines, strip, length = p[7], p[7] * W_LINE, _PIECE // PER_LINE  # noqa: F821
    blocks, tiles = (p[5] + 15) // 16, (p[4] + _HIGH - 1) // _HIGH
    strips = (blocks + _WIDE - 1) // _WIDE
    me, all_ = _number(params)
    down = p[16] if all_ % p[16] == 0 else _ONE
    across = all_ // down
    at, last = strips * (me % across) // across, strips * (me % across + 1) // across
    top, bottom = tiles * (me // across) // down, tiles * (me // across + 1) // down
    while at < last:
        panels = (last - at + _STRIPS - 1) // _STRIPS
        several = (last - at + panels - 1) // panels
        block = at * _WIDE
        count = min(several * _WIDE, blocks - block)
        w, scales, step = p[6] + block * strip, p[9] + block * p[10] * 64, count * 64
        offsets = p[11] + block * p[10] * 64 if p[11] != 0 else _ZERO
        tile = top
        while tile < bottom:
            bands = (bottom - tile + _BAND - 1) // _BAND
            band = (bottom - tile + bands - 1) // bands
            line = _ZERO
            while line < lines:
                taken = min(length, lines - line)
                depth = (taken * PER_LINE + 1) // 2 * 2  # noqa: F821
                FLOATS(w, strip, line, taken, p[8], scales, p[10], offsets, count, piece, depth)  # noqa: F821
                ends = line + taken == lines
                ahead = w + (count * strip if ends else (line + taken) * W_LINE)  # noqa: F821
                parts = min(band, _PARTS)
                share_ = taken * W_LINE // parts  # noqa: F821
                for t in range(band):
                    row = (tile + t) * _HIGH
                    rows, to = min(_HIGH, p[4] - row), sums + t * _HIGH * step
                    x = p[2] + (tile + t) * p[3] + line * PER_LINE * 32  # noqa: F821
                    new = _ONE if t < parts else _ZERO
                    for b in range(0, count, _WIDE):
                        wide = min(_WIDE, count - b)
                        if ends:
                            _expect(params, rows, row, (block + b) * 64, wide)
                        tile_of(_HIGH if rows > _HIGH // 2 else _HIGH // 2, wide, x, piece + b * 64 * depth, depth, to + b * 64, step, line,
                              ahead + b * strip + new * t * share_, new * (W_LINE * 2 // PER_LINE // parts), new * strip)  # noqa: F821  # fmt: skip
                    if ends:
                        END(params, to, step, rows, row, block * 16, min(count * 16, p[5] - block * 16))  # noqa: F821
                line += taken
            tile += band
        at += several


def _beside_threads(threads: int, strips: int, tiles: int) -> int:
    """How many threads share the same columns, each with rows of its own: as few as leave none with more work than it must have."""
    return min((d for d in range(1, threads + 1) if threads % d == 0), key=lambda d: (-(-strips // (threads // d)) * -(-tiles // d), d))


class Many:
    """The compiled kernels for many rows of one kind of weight.

    Args:
        name: of the kernel on disk.
        w_line: bytes of the weight of 16 output channels that belong to one line; per_line: its inputs, a divisor of 384.
        widen: writes what makes floats of a line.
    """

    def __init__(self, name: str, w_line: int, per_line: int, widen: Widen):
        self.per_line, self.widen = per_line, widen
        lines: dict[str, Any] = {"PER_LINE": np.int64(per_line), "W_LINE": np.int64(w_line)}
        floats = Device(specialized(_floats, f"{name}_floats", UNPACK=widener(widen), **lines))  # type: ignore[arg-type]

        def native(activate: Any) -> Native:
            end = Device(specialized(_end, f"{name}_end_{activate.__name__}", activate=activate))  # type: ignore[arg-type]
            return Native(specialized(_linear, f"{name}_many_{activate.__name__}", FLOATS=floats, END=end, **lines), "q" * 16 + "dd")

        self.natives = self.simple, self.smooth, _ = native(simple), native(smooth), _BESIDE

    def __call__(self, threads: int, x: Tensor, out: Tensor, weight: Tensor, width: int, step: int, scales: Tensor, offsets: Tensor | None, bias: Tensor,
                 other: Tensor | None, activation: str, scalars: tuple[float, float]) -> None:  # fmt: skip
        """Fill ``out``.

        Args:
            x: ``[rows, inputs]`` float32 with whole lines of adjacent inputs; other: None, or ``[rows, o]`` float32, adjacent too.
            out: ``[*, o]`` float32, contiguous.
            weight: ``[blocks, lines, ...]``; width: its inputs, padded to whole lines; step: inputs of a group, of whole lines.
            scales, offsets: ``[blocks, groups, 16]`` float32: a number stands for ``number * scale - offset``.
            bias: ``[16 * blocks]`` float32.
        """
        rows, even = x.shape[0], width + width % 2
        tiles, columns = -(-rows // HIGH), out.shape[-1]
        beside = torch.empty(tiles * even * HIGH)
        _BESIDE(threads, x.data_ptr(), x.stride(0) * 4, rows, width, even, beside.data_ptr())
        down = _beside_threads(threads, -(-columns // (LANES * WIDE)), tiles)
        residual, residual_step = (0, 0) if other is None else (other.data_ptr(), other.stride(0) * 4)
        native = self.smooth if activation in SMOOTH else self.simple
        native(
            threads, beside.data_ptr(), even * HIGH * 4, rows, columns, weight.data_ptr(), width // self.per_line, step // self.per_line,
            scales.data_ptr(), scales.shape[1], 0 if offsets is None else offsets.data_ptr(), bias.data_ptr(), residual, residual_step,
            out.data_ptr(), down, CODE[activation], *scalars,
        )  # fmt: skip


def column(at: Any, block: Any, line: Any) -> Any:
    """One input of 16 channels, from int8 ``[inputs, 16]``, as floats."""
    narrow = ir.VectorType(INT8.llvm, LANES)
    return at.sitofp(at.load(at.inttoptr(at.add(block, at.mul(line, INT64.llvm(LANES))), narrow.as_pointer()), align=1), F.llvm)


BYTES = Many("bytes", LANES, 1, lambda *given: [column(*given)])
