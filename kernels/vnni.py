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
    flags = machine().get("flags", ())
    if "avx512_vnni" in flags:
        return None
    return "the processor has no AVX-512 VNNI" + (": its VNNI is for registers of 256 bits" if "avx_vnni" in flags else "")


def unfit_depth(depth: int) -> str | None:
    """None, or why int32 sums of so many products can't be taken."""
    return None if 0 < depth <= 65536 else f"sums of {depth} products; 1 to 65536 are supported"


def pack(b: Tensor) -> Tensor:
    """``b`` int8 [k, n] as ``[ceil(n / 16), ceil(k / 4), 16, 4]``, padded with zeros."""
    k, n = b.shape
    padded = torch.nn.functional.pad(b, (0, -n % LANES, 0, -k % DEPTH))
    blocks = padded.reshape(-1, DEPTH, padded.shape[1] // LANES, LANES)
    return blocks.permute(2, 0, 3, 1).contiguous()


#: Heights and widths of the tiles: eight rows or more are cut into 4 to 6 at a time.
HIGH, WIDE = (6, 5, 4, 3, 2, 1), (4, 2, 1)
#: Steps of a turn of the large tiles from so many steps on: what advances addresses and counts takes slots from the products.
_TURNS, _LONG_FROM = 4, 32

_WORD, _LONG, _WORDS = INT32.llvm, INT64.llvm, I.llvm
_SIX, _FOUR, _TWO, _ONE, _ZERO = (np.int64(n) for n in (6, 4, 2, 1, 0))



@intrinsic(VOID, *[INT64] * 14)
def _tile(at, high, wide, a, a_step, taps, tap_step, b, b_step, steps, c, c_step, ahead, pace, more):
    """``c[:high, :16 * wide] = a @ b``, or that added where ``more`` is not 0, for a height of ``HIGH`` and a width of ``WIDE``; see ``products``."""
    other, done = at.append_basic_block("other"), at.append_basic_block("done")
    long = at.zext(at.icmp_signed(">=", steps, _LONG(_LONG_FROM)), _LONG)
    cases = at.switch(at.add(at.add(at.mul(high, _LONG(8)), wide), at.mul(long, _LONG(64))), other)
    at.position_at_end(other)
    at.unreachable()
    for rows in HIGH:
        for blocks in WIDE:
            forms = (0, 64) if rows * blocks >= 16 else (None,)
            for form in forms:
                case = at.append_basic_block(f"tile.{rows}x{blocks}")
                for number in (0, 64) if form is None else (form,):
                    cases.add_case(_LONG(rows * 8 + blocks + number), case)
                at.position_at_end(case)
                _emit(at, rows, blocks, _TURNS if form else 1, a, a_step, taps, tap_step, b, b_step, steps, c, c_step, ahead, pace, more)
                at.branch(done)
    at.position_at_end(done)


def _emit(at: Any, rows: int, blocks: int, turns: int, a: Any, a_step: Any, taps: Any, tap_step: Any, b: Any, b_step: Any, steps: Any, c: Any,
          c_step: Any, ahead: Any, pace: Any, more: Any) -> None:  # fmt: skip
    """The loops of one tile, over the pieces of a row and down each: by ``turns`` steps at once, then by one."""
    kept = _kept if turns > 1 else lambda _, address: address
    many = at.sdiv(steps, _LONG(turns))
    done = at.mul(many, _LONG(turns))

    def places() -> list[Any]:
        lines = [at.add(c, at.mul(c_step, _LONG(r))) for r in range(rows)]
        return [at.inttoptr(at.add(line, _LONG(v * LANES * 4)), _WORDS.as_pointer()) for line in lines for v in range(blocks)]

    def tap(number: Any, sums: list[Any]) -> list[Any]:
        before, shift = at.mul(number, steps), at.mul(number, tap_step)
        strip, coming = at.mul(before, _LONG(LANES * DEPTH)), at.add(ahead, at.mul(before, pace))
        left = [kept(at, at.add(at.add(a, shift), at.mul(a_step, _LONG(r)))) for r in range(rows)]
        right = [kept(at, at.add(at.add(b, strip), at.mul(b_step, _LONG(v)))) for v in range(blocks)]

        def one(step: Any, sums: list[Any]) -> list[Any]:
            word, line = at.mul(step, _LONG(DEPTH)), at.mul(step, _LONG(LANES * DEPTH))
            columns, after = [_load(at, at.add(r, line), _WORDS) for r in right], []
            for r in range(rows):
                spread = spread_of(at, _load(at, at.add(left[r], word), _WORD), _WORDS)
                after += [known(at, "llvm.x86.avx512.vpdpbusd.512", _WORDS, sums[r * blocks + v], spread, columns[v])
                          for v in range(blocks)]  # fmt: skip
            return after

        def several(turn: Any, sums: list[Any]) -> list[Any]:
            first = at.mul(turn, _LONG(turns))
            for k in range(turns):
                sums = one(at.add(first, _LONG(k)), sums)
            prefetch.emit(at, at.add(coming, at.mul(first, pace)))
            return sums

        if turns == 1:
            return loop(at, steps, sums, one)
        rest = at.sub(steps, done)
        return maybe(at, rest, loop(at, many, sums, several), lambda sums: loop(at, rest, sums, lambda step, sums: one(at.add(done, step), sums)))

    nothing = [ir.Constant(_WORDS, [0] * LANES)] * (rows * blocks)
    before = maybe(at, more, nothing, lambda _: [at.load(place, align=4) for place in places()])
    for value, place in zip(loop(at, taps, before, tap), places(), strict=True):
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
    at every step of a large tile ``pace`` more bytes of it, 16 at most, are brought into the L2 cache, from the front for each tile.
    """
    apart()
    pieces = (rows + 5) // 6
    high, block = rows if pieces == 1 else rows // pieces, _ZERO  # a division costs as much as a small tile
    while block < blocks:
        wide = _FOUR if blocks - block >= 4 else (_TWO if blocks - block >= 2 else _ONE)
        row, taller = _ZERO, rows - high * pieces
        while row < rows:
            tall = (high + 1 if taller > 0 else high) if high > 3 else min(_SIX, rows - row)
            taller -= 1
            _tile(tall, wide, a + row * a_step, a_step, taps, tap_step, b + block * b_step, b_step, steps, c + row * c_step + block * 64, c_step,
                  ahead, pace, more)  # fmt: skip
            row += tall
        block += wide
