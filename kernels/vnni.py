"""Device side of the int8 products: tiles of ``c = a @ b`` by the AVX-512 VNNI instruction ``vpdpbusd``.

    c[i, j] = sum_k a[i, k] * b[k, j]      a uint8 [rows, k], b int8 [k, 16 * blocks], c int32

``vpdpbusd`` multiplies 64 unsigned by 64 signed bytes and adds groups of four into 16 int32. So ``b`` is packed: block by block
of 16 columns, then by four rows, then column by column: ``[blocks, k / 4, 16, 4]``. A tile holds up to 6 rows times 4 blocks in
24 of the 32 vector registers: per four rows of ``b`` it loads 4 vectors, spreads 6 words of ``a``, and starts 24 instructions.
``k`` is a multiple of four; both sides may be padded with zeros in ``b``. Nothing saturates before 2^31: up to 66,000 rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.kernels.language import INT32, INT64, VOID, intrinsic, ir, known, loop, maybe
from graphwright.kernels.native import unavailable
from graphwright.kernels.tile import apart, device
from graphwright.kernels.vector import I, prefetch, spread_of
from graphwright.measure import machine

#: Columns of one block, and rows that one instruction takes at once.
LANES, DEPTH = 16, 4


def unfit() -> str | None:
    """None, or why these products can't run on this machine."""
    if (reason := unavailable()) is not None:
        return reason
    return None if "avx512_vnni" in machine().get("flags", ()) else "the processor has no AVX-512 VNNI"


def pack(b: Tensor) -> Tensor:
    """``b`` int8 [k, n] as ``[ceil(n / 16), ceil(k / 4), 16, 4]``, padded with zeros."""
    k, n = b.shape
    padded = torch.nn.functional.pad(b, (0, -n % LANES, 0, -k % DEPTH))
    blocks = padded.reshape(-1, DEPTH, padded.shape[1] // LANES, LANES)
    return blocks.permute(2, 0, 3, 1).contiguous()


#: Heights and widths of the tiles: seven rows or more are cut into 3 to 6 at a time.
HIGH, WIDE = (6, 5, 4, 3, 2, 1), (4, 2, 1)
#: Steps of a turn of the large tiles: what advances addresses and counts takes slots from the products.
_TURNS = 4

_WORD, _LONG, _WORDS = INT32.llvm, INT64.llvm, I.llvm
_FOUR, _TWO, _ONE, _ZERO = (np.int64(n) for n in (4, 2, 1, 0))



@intrinsic(VOID, *[INT64] * 14)
def _tile(at, high, wide, a, a_step, taps, tap_step, b, b_step, steps, c, c_step, ahead, pace, more):
    """``c[:high, :16 * wide] = a @ b``, or that added where ``more`` is not 0, for a height of ``HIGH`` and a width of ``WIDE``; see ``products``."""
    other, done = at.append_basic_block("other"), at.append_basic_block("done")
    cases = at.switch(at.add(at.mul(high, _LONG(8)), wide), other)
    at.position_at_end(other)
    at.unreachable()
    for rows in HIGH:
        for blocks in WIDE:
            case = at.append_basic_block(f"tile.{rows}x{blocks}")
            cases.add_case(_LONG(rows * 8 + blocks), case)
            at.position_at_end(case)
            _emit(at, rows, blocks, a, a_step, taps, tap_step, b, b_step, steps, c, c_step, ahead, pace, more)
            at.branch(done)
    at.position_at_end(done)


def _emit(at: Any, rows: int, blocks: int, a: Any, a_step: Any, taps: Any, tap_step: Any, b: Any, b_step: Any, steps: Any, c: Any, c_step: Any,
          ahead: Any, pace: Any, more: Any) -> None:  # fmt: skip
    """The loops of one tile, over the pieces of a row and down each: by ``_TURNS`` steps at once, then by one."""
    turns = _TURNS if rows >= 4 and blocks == 4 else 1
    many = at.select(at.icmp_signed("<", steps, _LONG(4 * turns)), _LONG(0), at.sdiv(steps, _LONG(turns)))
    rest = at.sub(steps, at.mul(many, _LONG(turns)))
    places = [at.inttoptr(at.add(at.add(c, at.mul(c_step, _LONG(k // blocks))), _LONG(k % blocks * LANES * 4)), _WORDS.as_pointer())
              for k in range(rows * blocks)]  # fmt: skip
    added = spread_of(at, at.icmp_signed("!=", more, _LONG(0)), ir.VectorType(ir.IntType(1), LANES))
    nothing = ir.Constant(_WORDS, [0] * LANES)

    def tap(number: Any, sums: list[Any]) -> list[Any]:
        before, shift = at.mul(number, steps), at.mul(number, tap_step)
        strip, coming = at.mul(before, _LONG(LANES * DEPTH)), at.add(ahead, at.mul(before, pace))
        left = [_kept(at, at.add(at.add(a, shift), at.mul(a_step, _LONG(r)))) for r in range(rows)]
        right = [_kept(at, at.add(at.add(b, strip), at.mul(b_step, _LONG(v)))) for v in range(blocks)]

        def four(step: Any, sums: list[Any]) -> list[Any]:
            word, line = at.mul(step, _LONG(DEPTH)), at.mul(step, _LONG(LANES * DEPTH))
            columns = [_load(at, at.add(r, line), _WORDS) for r in right]
            after = []
            for r in range(rows):
                spread = spread_of(at, _load(at, at.add(left[r], word), _WORD), _WORDS)
                after += [known(at, "llvm.x86.avx512.vpdpbusd.512", _WORDS, sums[r * blocks + v], spread, columns[v])
                          for v in range(blocks)]  # fmt: skip
            return after

        def several(turn: Any, sums: list[Any]) -> list[Any]:
            first = at.mul(turn, _LONG(turns))
            for k in range(turns):
                sums = four(at.add(first, _LONG(k)), sums)
            prefetch.emit(at, at.add(coming, at.mul(first, pace)))
            return sums

        if turns == 1:
            return loop(at, steps, sums, several)
        sums = maybe(at, many, sums, lambda sums: loop(at, many, sums, several))
        done = at.mul(many, _LONG(turns))
        return maybe(at, rest, sums, lambda sums: loop(at, rest, sums, lambda step, sums: four(at.add(done, step), sums)))

    before = [known(at, "llvm.masked.load.v16i32.p0", _WORDS, p, INT32.llvm(4), added, nothing) for p in places]
    for value, place in zip(loop(at, taps, before, tap), places, strict=True):
        at.store(value, place, align=4)


def _kept(at: Any, address: Any) -> Any:
    """The address in a register of its own: LLVM would work it out from a neighbour's at every step, in slots that the products need."""
    return at.asm(ir.FunctionType(_LONG, [_LONG]), "", "=r,0", [address], False)


def _load(at: Any, address: Any, kind: Any) -> Any:
    return at.load(at.inttoptr(address, kind.as_pointer()), align=4 if kind is _WORDS else 1)


@device
def products(a, a_step, rows, taps, tap_step, b, b_step, blocks, steps, c, c_step, ahead, pace, more):
    """``c = a @ b``, or ``c += a @ b`` where ``more`` is not 0: addresses; ``rows`` of a, ``blocks`` of 16 columns; strides in bytes.

    A row of ``a`` lies in ``taps`` pieces of ``steps`` groups of four, ``tap_step`` apart (the lines of a convolution's
    window); that of a plain product is one piece.

    Blocks lie outside, so that a strip of ``b`` stays near while the rows of ``a`` pass by. ``ahead`` is what will be wanted next:
    at every step ``pace`` more bytes of it, 16 at most, are brought into the L2 cache, from the front for each tile.
    """
    apart()
    pieces = (rows + 5) // 6
    high, block = rows if pieces == 1 else rows // pieces, _ZERO  # a division costs as much as a small tile
    while block < blocks:
        wide = _FOUR if blocks - block >= 4 else (_TWO if blocks - block >= 2 else _ONE)
        row, taller = _ZERO, rows - high * pieces
        while row < rows:
            tall = high + 1 if taller > 0 else high
            taller -= 1
            _tile(tall, wide, a + row * a_step, a_step, taps, tap_step, b + block * b_step, b_step, steps, c + row * c_step + block * 64, c_step,
                  ahead, pace, more)  # fmt: skip
            row += tall
        block += wide
