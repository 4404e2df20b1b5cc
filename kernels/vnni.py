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

from graphwright.kernels.language import INT32, INT64, VOID, intrinsic, ir, known, loop
from graphwright.kernels.native import unavailable
from graphwright.kernels.tile import apart, device
from graphwright.kernels.vector import I, spread_of
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


_WORD, _LONG, _WORDS = INT32.llvm, INT64.llvm, I.llvm


def _tile(rows: int, blocks: int) -> Any:
    """``c[:rows, :16 * blocks] = a @ b``; see ``products``."""

    @intrinsic(VOID, *[INT64] * 9)
    def tile(at, a, a_step, taps, tap_step, b, b_step, steps, c, c_step):
        nothing = ir.Constant(_WORDS, [0] * LANES)

        def tap(number: Any, sums: list[Any]) -> list[Any]:
            strip, shift = at.mul(at.mul(number, steps), _LONG(LANES * DEPTH)), at.mul(number, tap_step)
            left = [at.add(at.add(a, shift), at.mul(a_step, _LONG(r))) for r in range(rows)]
            right = [at.add(at.add(b, strip), at.mul(b_step, _LONG(v))) for v in range(blocks)]

            def four(step: Any, sums: list[Any]) -> list[Any]:
                word, line = at.mul(step, _LONG(DEPTH)), at.mul(step, _LONG(LANES * DEPTH))
                columns = [_load(at, at.add(r, line), _WORDS) for r in right]
                after = []
                for r in range(rows):
                    spread = spread_of(at, _load(at, at.add(left[r], word), _WORD), _WORDS)
                    after += [known(at, "llvm.x86.avx512.vpdpbusd.512", _WORDS, sums[r * blocks + v], spread, columns[v])
                              for v in range(blocks)]  # fmt: skip
                return after

            return loop(at, steps, sums, four)

        sums = loop(at, taps, [nothing] * (rows * blocks), tap)
        for k, value in enumerate(sums):
            to = at.add(at.add(c, at.mul(c_step, _LONG(k // blocks))), _LONG(k % blocks * LANES * 4))
            at.store(value, at.inttoptr(to, _WORDS.as_pointer()), align=4)

    return tile


def _load(at: Any, address: Any, kind: Any) -> Any:
    return at.load(at.inttoptr(address, kind.as_pointer()), align=4 if kind is _WORDS else 1)


_6x4, _6x2, _6x1 = _tile(6, 4), _tile(6, 2), _tile(6, 1)
_2x4, _2x2, _2x1 = _tile(2, 4), _tile(2, 2), _tile(2, 1)
_1x4, _1x2, _1x1 = _tile(1, 4), _tile(1, 2), _tile(1, 1)

_SIX, _FOUR, _TWO, _ONE = np.int64(6), np.int64(4), np.int64(2), np.int64(1)


@device
def products(a, a_step, rows, taps, tap_step, b, b_step, blocks, steps, c, c_step):
    """``c = a @ b``: addresses; ``rows`` of a, ``blocks`` of 16 columns; strides in bytes.

    A row of ``a`` lies in ``taps`` pieces of ``steps`` groups of four, ``tap_step`` apart (the lines of a convolution's
    window); that of a plain product is one piece.

    Blocks lie outside, so that a strip of ``b`` stays in the L1 cache while the rows of ``a`` pass by.
    """
    apart()
    block = np.int64(0)
    while block < blocks:
        wide = _FOUR if blocks - block >= 4 else (_TWO if blocks - block >= 2 else _ONE)
        strip, out = b + block * b_step, c + block * 64
        row = np.int64(0)
        while row < rows:
            high = _SIX if rows - row >= 6 else (_TWO if rows - row >= 2 else _ONE)
            x, y = a + row * a_step, out + row * c_step
            if high == 6:
                if wide == 4:
                    _6x4(x, a_step, taps, tap_step, strip, b_step, steps, y, c_step)
                elif wide == 2:
                    _6x2(x, a_step, taps, tap_step, strip, b_step, steps, y, c_step)
                else:
                    _6x1(x, a_step, taps, tap_step, strip, b_step, steps, y, c_step)
            elif high == 2:
                if wide == 4:
                    _2x4(x, a_step, taps, tap_step, strip, b_step, steps, y, c_step)
                elif wide == 2:
                    _2x2(x, a_step, taps, tap_step, strip, b_step, steps, y, c_step)
                else:
                    _2x1(x, a_step, taps, tap_step, strip, b_step, steps, y, c_step)
            elif wide == 4:
                _1x4(x, a_step, taps, tap_step, strip, b_step, steps, y, c_step)
            elif wide == 2:
                _1x2(x, a_step, taps, tap_step, strip, b_step, steps, y, c_step)
            else:
                _1x1(x, a_step, taps, tap_step, strip, b_step, steps, y, c_step)
            row += high
        block += wide
