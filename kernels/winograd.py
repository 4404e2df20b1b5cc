"""Device side of Winograd's minimal filtering F(2x2, 3x3): the transforms of 16 channels of one tile, in registers."""

from __future__ import annotations

from typing import Any

from graphwright.kernels.language import INT32, INT64, VOID, intrinsic, ir, known
from graphwright.kernels.vector import LANES, F, I


def _vector(at: Any, address: Any, *steps: tuple[Any, int]) -> Any:
    """Where 16 floats lie: at an address and so many of these steps from it."""
    for step, count in steps:
        address = at.add(address, at.mul(step, INT64.llvm(count)))
    return at.inttoptr(address, F.llvm.as_pointer())


def _load(at: Any, place: Any, first: Any = None) -> Any:
    """Sixteen floats, or those that ``first`` says and zeros: nothing behind them is touched."""
    if first is None:
        return at.load(place, align=4)
    return known(at, "llvm.masked.load.v16f32.p0", F.llvm, place, INT32.llvm(4), first, ir.Constant(F.llvm, [0.0] * LANES))


def _store(at: Any, x: Any, place: Any, first: Any = None) -> None:
    if first is None:
        at.store(x, place, align=4)
    else:
        known(at, "llvm.masked.store.v16f32.p0", VOID.llvm, x, place, INT32.llvm(4), first)


def _first(at: Any, count: Any) -> Any:
    """The first so many of 16."""
    one = at.insert_element(ir.Constant(I.llvm, ir.Undefined), at.trunc(count, INT32.llvm), INT32.llvm(0))
    spread = at.shuffle_vector(one, one, ir.Constant(I.llvm, [0] * LANES))
    return at.icmp_signed("<", ir.Constant(I.llvm, list(range(LANES))), spread)


def _in(at: Any, source: Any, line: Any, pixel: Any, to: Any, step: Any, first: Any = None) -> None:
    d = [[_load(at, _vector(at, source, (line, r), (pixel, q)), first) for q in range(4)] for r in range(4)]

    def mixed(x: Any) -> Any:
        return at.fsub(x[0], x[2]), at.fadd(x[1], x[2]), at.fsub(x[2], x[1]), at.fsub(x[1], x[3])

    columns = [mixed([d[r][q] for r in range(4)]) for q in range(4)]
    for r in range(4):
        for q, x in enumerate(mixed([columns[q][r] for q in range(4)])):
            _store(at, x, _vector(at, to, (step, r * 4 + q)))


def _out(at: Any, source: Any, step: Any, bias: Any, other: Any, other_line: Any, other_pixel: Any, to: Any, line: Any, pixel: Any,
         mark: Any, low: Any, high: Any, first: Any = None) -> None:  # fmt: skip
    m = [[_load(at, _vector(at, source, (step, r * 4 + q))) for q in range(4)] for r in range(4)]
    offset = _load(at, _vector(at, bias))

    def mixed(x: Any) -> Any:
        return at.fadd(at.fadd(x[0], x[1]), x[2]), at.fsub(at.fsub(x[1], x[2]), x[3])

    columns = [mixed([m[r][q] for r in range(4)]) for q in range(4)]
    strange = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [0] * LANES)
    for r in range(2):
        for q, x in enumerate(mixed([columns[q][r] for q in range(4)])):
            x = at.fadd(at.fadd(x, offset), _load(at, _vector(at, other, (other_line, r), (other_pixel, q)), first))
            nought = at.fsub(x, x)  # NaN of NaN and of infinities
            strange = at.or_(strange, at.fcmp_unordered("uno", nought, nought))
            x = at.select(at.fcmp_ordered("<", x, low), low, x)  # NaN stays
            x = at.select(at.fcmp_ordered(">", x, high), high, x)
            _store(at, x, _vector(at, to, (line, r), (pixel, q)), first)
    with at.if_then(at.icmp_unsigned("!=", at.bitcast(strange, ir.IntType(LANES)), ir.IntType(LANES)(0)), likely=False):
        at.store(INT64.llvm(1), at.inttoptr(mark, INT64.llvm.as_pointer()))


@intrinsic(VOID, *[INT64] * 5)
def transform_in(at, source, line, pixel, to, step):
    """``B^T d B``: 4x4 pixels, ``line`` and ``pixel`` bytes apart, to 16 places ``step`` bytes apart."""
    _in(at, source, line, pixel, to, step)


@intrinsic(VOID, *[INT64] * 6)
def transform_last_in(at, source, line, pixel, to, step, count):
    """The same of fewer than 16 channels; zeros after them."""
    _in(at, source, line, pixel, to, step, _first(at, count))


@intrinsic(VOID, *[INT64] * 10, F, F)
def transform_out(at, source, step, bias, other, other_line, other_pixel, to, line, pixel, mark, low, high):
    """``A^T m A`` plus bias and residual, within bounds: 16 places ``step`` bytes apart to 2x2 pixels; 1 to ``mark`` where one is not finite."""
    _out(at, source, step, bias, other, other_line, other_pixel, to, line, pixel, mark, low, high)


@intrinsic(VOID, *[INT64] * 10, F, F, INT64)
def transform_last_out(at, source, step, bias, other, other_line, other_pixel, to, line, pixel, mark, low, high, count):
    """The same of fewer than 16 channels."""
    _out(at, source, step, bias, other, other_line, other_pixel, to, line, pixel, mark, low, high, _first(at, count))
