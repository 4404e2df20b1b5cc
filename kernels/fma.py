"""Device side of float32 products: tiles of ``c = a @ b`` in registers of 16 floats.

    c[i, j] = sum_k a[i, k] * b[k, j]      all float32; b's columns in blocks of 16

A tile holds up to 6 rows times 4 blocks in 24 of the 32 vector registers of AVX-512: per row of ``b`` it loads 4 vectors, spreads
6 floats of ``a``, and starts 24 multiply-adds. On processors with narrower registers LLVM splits each operation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphwright.kernels.language import FLOAT32, INT8, INT32, INT64, VOID, intrinsic, ir, known, loop
from graphwright.kernels.tile import apart, device
from graphwright.kernels.vector import LANES, F, spread_of

#: Heights and widths of the tiles. Eight rows or more are cut into 4 to 6 at a time without a rest.
HIGH, WIDE = (6, 5, 4, 1), (4, 2, 1)


@intrinsic(VOID, *[INT64] * 11)
def _tile(at, high, wide, a, a_step, b, b_step, depth, c, c_step, ahead, more):
    """``c[:high, :16 * wide] = a @ b``, or that added where ``more`` is not 0, for a height of ``HIGH`` and a width of ``WIDE``; see ``products``."""
    which = at.add(at.mul(high, INT64.llvm(8)), wide)
    other, done = at.append_basic_block("other"), at.append_basic_block("done")
    cases = at.switch(which, other)
    at.position_at_end(other)
    at.unreachable()
    for rows in HIGH:
        for blocks in WIDE:
            case = at.append_basic_block(f"tile.{rows}x{blocks}")
            cases.add_case(INT64.llvm(rows * 8 + blocks), case)
            at.position_at_end(case)
            _emit(at, rows, blocks, a, a_step, b, b_step, depth, c, c_step, ahead, more)
            at.branch(done)
    at.position_at_end(done)


def _emit(at: Any, rows: int, blocks: int, a: Any, a_step: Any, b: Any, b_step: Any, depth: Any, c: Any, c_step: Any, ahead: Any,
          more: Any) -> None:  # fmt: skip
    """The loop of one tile, down the rows of ``b``."""
    long, word, vector = INT64.llvm, INT32.llvm, F.llvm
    left = [at.add(a, at.mul(a_step, long(r))) for r in range(rows)]

    def place(address: Any, kind: Any) -> Any:
        return at.inttoptr(address, kind.as_pointer())

    def turn(step: Any, carried: list[Any]) -> list[Any]:
        line, *sums = carried
        columns, after = [at.load(place(at.add(line, long(v * LANES * 4)), vector), align=4) for v in range(blocks)], []
        for r in range(rows):
            spread = spread_of(at, at.load(place(at.add(left[r], at.mul(step, long(4))), FLOAT32.llvm), align=4), vector)
            after += [known(at, "llvm.fma.v16f32", vector, spread, columns[v], sums[r * blocks + v]) for v in range(blocks)]
        known(at, "llvm.prefetch.p0", VOID.llvm, place(at.add(ahead, at.mul(step, long(64))), INT8.llvm), word(0), word(2), word(1))
        return [at.add(line, b_step), *after]

    nothing, added = ir.Constant(vector, [0.0] * LANES), at.icmp_signed("!=", more, long(0))
    _, *sums = loop(at, depth, [b, *[nothing] * (rows * blocks)], turn)
    for k, value in enumerate(sums):
        to = at.add(at.add(c, at.mul(c_step, long(k // blocks))), long(k % blocks * LANES * 4))
        before = at.select(added, at.load(place(to, vector), align=4), nothing)
        at.store(at.fadd(value, before), place(to, vector), align=4)


_FOUR, _TWO, _ONE, _ZERO = (np.int64(n) for n in (4, 2, 1, 0))


@device
def products(a, a_step, rows, b, b_step, blocks, depth, c, c_step, ahead, more):
    """``c = a @ b``, or ``c += a @ b`` where ``more`` is not 0: addresses; ``rows`` of a, ``blocks`` of 16 adjacent columns, ``depth`` rows of b (at least one); steps from
    row to row in bytes. Blocks lie outside, so that a strip of ``b`` stays near while the rows of ``a`` pass by.

    ``ahead`` is what will be wanted next: each tile brings another ``64 * depth`` bytes of it into the L2 cache.
    """
    apart()
    pieces = (rows + 5) // 6
    high = rows // pieces
    block = _ZERO
    while block < blocks:
        wide = _FOUR if blocks - block >= 4 else (_TWO if blocks - block >= 2 else _ONE)
        row, taller = _ZERO, rows - high * pieces
        while row < rows:
            tall = high + 1 if taller > 0 else high
            taller -= 1
            if tall < 4:
                tall = _ONE
            _tile(tall, wide, a + row * a_step, a_step, b + block * 64, b_step, depth, c + row * c_step + block * 64, c_step, ahead, more)
            ahead += depth * 64
            row += tall
        block += wide
