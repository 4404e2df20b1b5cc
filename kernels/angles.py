"""Sines and cosines for generated kernels, of any float32.

Angles up to 2^16 are brought to [-pi/4, pi/4] by a whole number of quarters of a turn, whose length is subtracted in three pieces (after Cody and
Waite, 1980): fused multiply-adds leave the first difference exact and round the others once. Larger ones go by their exponent (after Payne and
Hanek, 1983): x = y 2^e with a whole y of 24 bits, and a table has 2^e (2/pi) modulo 4 for every e, in two float64; the first has 29 bits, so that its
product with y is exact. There is a function for one number, and for 4, 8 and 16 at once, which LLVM is told to call where it makes vectors of a loop;
of those, numbers beyond 2^16 take one branch for all. What is left is held in two pieces: results are right to one unit in the last place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

from graphwright.kernels.language import FLOAT32, FLOAT64, INT32, INT64, intrinsic, ir, known

_BITS = 512  # of pi
#: Up to here three pieces of a quarter are enough.
_FAR = 65536.0
#: How many numbers the functions for several at once take.
_AT_ONCE = (4, 8, 16)


@cache
def _pi() -> Fraction:
    """By Machin's formula."""
    one = 1 << _BITS

    def arctan_inverse(n: int) -> int:
        total = term = one // n
        k = 1
        while term:
            term //= -n * n
            k += 2
            total += term // k
        return total

    return Fraction(4 * (4 * arctan_inverse(5) - arctan_inverse(239)), one)


def _float32(v: Fraction) -> Fraction:
    """The nearest float32 of a normal size."""
    unit = Fraction(2) ** (math.frexp(float(v))[1] - 24)
    return round(v / unit) * unit


@cache
def _quarter() -> tuple[float, ...]:
    """A quarter of a turn in three float32."""
    first = _float32(_pi() / 2)
    second = _float32(_pi() / 2 - first)
    return float(first), float(second), float(_float32(_pi() / 2 - first - second))


@cache
def _pieces() -> list[float]:
    """Twice for each exponent field of a float32: the leading bits of 2^(field - 150) (2/pi) modulo 4, and the rest."""
    found = [0.0, 0.0]  # below 2^-126 the angle is its own sine
    for field in range(1, 255):
        v = 2 / _pi() * Fraction(2) ** (field - 150)
        v -= 4 * round(v / 4)
        unit = Fraction(2) ** (math.frexp(float(v))[1] - 29)
        lead = round(v / unit) * unit
        found += [float(lead), float(v - lead)]
    return [*found, math.nan, math.nan]


def _table(module: Any) -> Any:
    name = "quarter.turns"
    if name not in module.globals:
        kind = ir.ArrayType(ir.DoubleType(), 512)
        table = ir.GlobalVariable(module, kind, name)
        table.initializer, table.global_constant, table.linkage = ir.Constant(kind, [FLOAT64.llvm(v) for v in _pieces()]), True, "internal"
    return module.globals[name]


def _far(at: Any, x: Any) -> tuple[Any, Any, Any]:
    """What is left of a large angle in two pieces, and how many quarters of a turn were taken from it."""
    word, number = INT32.llvm, FLOAT64.llvm
    b = at.bitcast(x, word)
    field = at.and_(at.lshr(b, word(23)), word(255))
    y = at.fpext(at.bitcast(at.or_(at.and_(b, word(0x007FFFFF)), word(0x4B000000)), FLOAT32.llvm), number)
    place = at.shl(at.zext(field, INT64.llvm), INT64.llvm(1))
    table = _table(at.module)
    lead, rest = (at.load(at.gep(table, [INT64.llvm(0), at.add(place, INT64.llvm(k))], inbounds=True), align=8) for k in (0, 1))
    product = at.fmul(y, lead)
    whole = known(at, "llvm.rint.f64", number, product)
    left = at.fmul(at.fadd(at.fsub(product, whole), at.fmul(y, rest)), number(math.pi / 2))
    first = at.fptrunc(left, FLOAT32.llvm)
    return first, at.fptrunc(at.fsub(left, at.fpext(first, number)), FLOAT32.llvm), known(at, "llvm.fptosi.sat.i32.f64", word, whole)


class _Of:
    """Writes the arithmetic of one number, or of ``several`` as a vector."""

    def __init__(self, at: Any, several: int):
        self.at, self.several = at, several
        self.number = ir.VectorType(FLOAT32.llvm, several) if several > 1 else FLOAT32.llvm
        self.word = ir.VectorType(INT32.llvm, several) if several > 1 else INT32.llvm
        self.suffix = f"v{several}f32" if several > 1 else "f32"

    def real(self, v: float) -> Any:
        return ir.Constant(self.number, [v] * self.several if self.several > 1 else v)

    def whole(self, v: int) -> Any:
        return ir.Constant(self.word, [v] * self.several if self.several > 1 else v)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return known(self.at, f"llvm.fma.{self.suffix}", self.number, a, b, c)

    def size(self, x: Any) -> Any:
        return known(self.at, f"llvm.fabs.{self.suffix}", self.number, x)

    def near(self, x: Any) -> tuple[Any, Any, Any]:
        """As ``_far``, of angles up to 2^16."""
        at, (first, second, third) = self.at, map(self.real, _quarter())
        turns = known(at, f"llvm.rint.{self.suffix}", self.number, at.fmul(x, self.real(2 / math.pi)))
        below = at.fneg(turns)
        exact = self.fma(below, first, x)
        step = at.fmul(below, second)
        left = at.fadd(exact, step)
        lost = at.fadd(at.fsub(step, at.fsub(left, exact)), self.fma(below, second, at.fneg(step)))
        return left, self.fma(below, third, lost), at.fptosi(turns, self.word)

    def beyond(self, x: Any) -> Any:
        """Whether an angle is larger, or no number."""
        return self.at.fcmp_unordered(">", x, self.real(_FAR))

    def curve(self, r: Any, rest: Any, quarters: Any, ahead: int) -> Any:
        """The sine of ``r + rest`` and so many quarters of a turn, and ``ahead`` more: two polynomials on [-pi/4, pi/4]."""
        at, z = self.at, self.at.fmul(r, r)
        s = self.fma(self.real(-0.00019516481852002032), z, self.real(0.00833217229967722))
        s = self.fma(s, z, self.real(-0.16666654854556384))
        s = at.fadd(r, self.fma(at.fmul(s, z), r, rest))
        c = self.fma(self.real(2.4437530736220543e-05), z, self.real(-0.0013887359768344658))
        c = self.fma(c, z, self.real(0.041666646714720985))
        half = self.fma(self.real(-0.5), z, self.real(1.0))
        lost = self.fma(self.real(-0.5), z, at.fsub(self.real(1.0), half))
        c = at.fadd(half, self.fma(at.fmul(c, z), z, self.fma(at.fneg(r), rest, lost)))
        quarters = at.add(quarters, self.whole(ahead))
        y = at.select(at.icmp_unsigned("!=", at.and_(quarters, self.whole(1)), self.whole(0)), c, s)
        return self.turned(y, at.shl(at.and_(quarters, self.whole(2)), self.whole(30)))

    def turned(self, y: Any, sign: Any) -> Any:
        """y, negative where the uppermost bit of ``sign`` is set and it was not, and the other way round."""
        return self.at.bitcast(self.at.xor(self.at.bitcast(y, self.word), sign), self.number)

    def signed(self, y: Any, x: Any, ahead: int) -> Any:
        """The sine of x from that of its size; a cosine stays."""
        return y if ahead else self.turned(y, self.at.and_(self.at.bitcast(x, self.word), self.whole(-(1 << 31))))


def _function(module: Any, name: str, several: int) -> Any:
    """An empty function that depends on nothing but its argument; visible from outside, or LLVM would drop what nothing calls yet."""
    kind = _Of(None, several).number
    function = ir.Function(module, ir.FunctionType(kind, [kind]), name)
    for attribute in ("nounwind", "noinline", "willreturn", "nofree", "nosync", "readnone", "speculatable", '"prefer-vector-width"="512"'):
        set.add(function.attributes, attribute)
    return function


def _either(at: Any, far: Any, near: Callable[[], Any], otherwise: Callable[[], Any]) -> None:
    """End a function with one of two results."""
    here, there = at.append_basic_block("near"), at.append_basic_block("far")
    at.cbranch(far, there, here)
    for block, result in ((here, near), (there, otherwise)):
        at.position_at_end(block)
        at.ret(result())


def _one(module: Any, name: str, ahead: int) -> Any:
    """The function for one number, with word of those for several."""
    function = _function(module, name, 1)
    far = _function(module, f"{name}_far", 1)  # by another name: LLVM makes vectors of equal calls, too, and it would call itself for ever
    at = ir.IRBuilder(far.append_basic_block())
    at.ret(_Of(at, 1).curve(*_far(at, far.args[0]), ahead))
    several = [_several(module, far, f"{name}_{n}", n, ahead) for n in _AT_ONCE]
    names = ",".join(f"_ZGV_LLVM_N{n}v_{name}({f.name})" for n, f in zip(_AT_ONCE, several, strict=True))
    set.add(function.attributes, f'"vector-function-abi-variant"="{names}"')
    at, (x,) = ir.IRBuilder(function.append_basic_block()), function.args
    of = _Of(at, 1)
    size = of.size(x)
    _either(at, of.beyond(size), lambda: of.signed(of.curve(*of.near(size), ahead), x, ahead), lambda: of.signed(at.call(far, [size]), x, ahead))
    return function


def _several(module: Any, far: Any, name: str, several: int, ahead: int) -> Any:
    """The function for several numbers: where any is large, each goes the long way too."""
    function = _function(module, name, several)
    at, (x,) = ir.IRBuilder(function.append_basic_block()), function.args
    of = _Of(at, several)
    size = of.size(x)
    beyond, near = of.beyond(size), of.curve(*of.near(size), ahead)

    def mixed() -> Any:
        y = ir.Constant(of.number, ir.Undefined)
        for k in range(several):
            y = at.insert_element(y, at.call(far, [at.extract_element(size, INT32.llvm(k))]), INT32.llvm(k))
        return of.signed(at.select(beyond, y, near), x, ahead)

    mask = ir.IntType(several)
    _either(at, at.icmp_unsigned("!=", at.bitcast(beyond, mask), mask(0)), lambda: of.signed(near, x, ahead), mixed)
    return function


def _call(at: Any, x: Any, name: str, ahead: int) -> Any:
    return at.call(at.module.globals.get(name) or _one(at.module, name, ahead), [x])


@intrinsic(FLOAT32, FLOAT32)
def sine(at, x):
    return _call(at, x, "sine", 0)


@intrinsic(FLOAT32, FLOAT32)
def cosine(at, x):
    return _call(at, x, "cosine", 1)
