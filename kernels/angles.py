"""Sines and cosines for generated kernels, of any float32: device functions without a branch.

An angle is brought to [-pi/4, pi/4] by its exponent (after Payne and Hanek, 1983): x = y 2^e with a whole y of 24 bits, and a table has
2^e (2/pi) modulo 4 for every e, in two float64. The first has 29 bits, so that its product with y is exact.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from typing import Any

from graphwright.kernels.language import FLOAT32, FLOAT64, INT32, INT64, intrinsic, ir, known
from graphwright.kernels.tile import device, real

_BITS = 512  # of pi


@cache
def _pieces() -> list[float]:
    """Twice for each exponent field of a float32: the leading bits of 2^(field - 150) (2/pi) modulo 4, and the rest."""
    one = 1 << _BITS

    def arctan_inverse(n: int) -> int:
        total = term = one // n
        k = 1
        while term:
            term //= -n * n
            k += 2
            total += term // k
        return total

    turn = Fraction(2 * one, 4 * (4 * arctan_inverse(5) - arctan_inverse(239)))  # Machin's formula for pi
    found = [0.0, 0.0]  # below 2^-126 the angle is its own sine
    for field in range(1, 255):
        v = turn * Fraction(2) ** (field - 150)
        v -= 4 * round(v / 4)
        unit = Fraction(2) ** (math.frexp(float(v))[1] - 29)
        lead = round(v / unit) * unit
        found += [float(lead), float(v - lead)]
    return [*found, math.nan, math.nan]


def _table(at: Any) -> Any:
    name = "quarter.turns"
    if name not in at.module.globals:
        kind = ir.ArrayType(ir.DoubleType(), 512)
        table = ir.GlobalVariable(at.module, kind, name)
        table.initializer, table.global_constant, table.linkage = ir.Constant(kind, [_constant(v) for v in _pieces()]), True, "internal"
    return at.module.globals[name]


def _constant(v: float) -> Any:
    return ir.Constant(ir.DoubleType(), v)


def _reduced(at: Any, x: Any) -> tuple[Any, Any]:
    """How many quarters of a turn there are in an angle, a float64, and what is left, in quarters."""
    word, number = ir.IntType(32), ir.DoubleType()
    b = at.bitcast(x, word)
    field = at.and_(at.lshr(b, word(23)), word(255))
    y = at.fpext(at.bitcast(at.or_(at.and_(b, word(0x807FFFFF - (1 << 32))), word(0x4B000000)), ir.FloatType()), number)
    place = at.shl(at.zext(field, INT64.llvm), INT64.llvm(1))
    table = _table(at)
    lead, rest = (at.load(at.gep(table, [INT64.llvm(0), at.add(place, INT64.llvm(k))], inbounds=True), align=8) for k in (0, 1))
    product = at.fmul(y, lead)
    whole = known(at, "llvm.rint.f64", number, product)
    return whole, at.fadd(at.fsub(product, whole), at.fmul(y, rest))


@intrinsic(INT32, FLOAT32)
def _quarter(at, x):
    return at.fptosi(_reduced(at, x)[0], INT32.llvm)


@intrinsic(FLOAT32, FLOAT32)
def _angle(at, x):
    return at.fptrunc(at.fmul(_reduced(at, x)[1], FLOAT64.llvm(math.pi / 2)), FLOAT32.llvm)


@device
def _from_quarter(x, quarter):
    """The sine of an angle in this quarter."""
    r = _angle(x)
    z = r * r
    s = real(-0.00019516481852002032) * z + real(0.00833217229967722)
    s = s * z + real(-0.16666654854556384)
    s = (s * z) * r + r
    c = real(2.4437530736220543e-05) * z + real(-0.0013887359768344658)
    c = c * z + real(0.041666646714720985)
    c = (c * z) * z + (real(1.0) - real(0.5) * z)
    y = s if (quarter & 1) == 0 else c
    return y if (quarter & 2) == 0 else -y


@device
def sine(x):
    y = _from_quarter(x, _quarter(x))
    return y if x * x > real(1e-9) else (x if x == x else y)  # noqa: PLR0124


@device
def cosine(x):
    return _from_quarter(x, _quarter(x) + 1)
