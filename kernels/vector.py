"""Vectors of 16 float32 or int32 as values in device code.

LLVM turns simple loops into vector code by itself, but not where rows are short (it prepares for 64 bytes at a time and
leaves the rest to scalar code) nor where numbers change their width on the way. There kernels say it in vectors:

    x = fma(load_f(a), splat_f(scale), splat_f(SHIFT))
    store_bytes(bits_of(x), to)

On processors with narrower registers LLVM splits each operation. Nothing is aligned, nothing is checked.
"""

from __future__ import annotations

from typing import Any

from graphwright.kernels.language import FLOAT32, INT32, INT64, VOID, Kind, intrinsic, ir, known
from graphwright.kernels.tile import SHIFT, device, real

LANES = 16

_FLOATS, _INTS, _BYTES = (ir and ir.VectorType(k, LANES) for k in (ir and (ir.FloatType(), ir.IntType(32), ir.IntType(8)) or (None,) * 3))
#: Sixteen float32, sixteen int32.
F, I = Kind("float32x16", _FLOATS, "vector"), Kind("int32x16", _INTS, "vector")
_address, _float, _int = INT64, FLOAT32, INT32


def _at(at: Any, address: Any, kind: Any) -> Any:
    return at.inttoptr(address, kind.as_pointer())


def spread_of(at: Any, x: Any, kind: Any) -> Any:
    """Sixteen times x."""
    first = at.insert_element(ir.Constant(kind, ir.Undefined), x, ir.IntType(32)(0))
    return at.shuffle_vector(first, first, ir.Constant(_INTS, [0] * LANES))


@intrinsic(F, _address)
def load_f(at, address):
    return at.load(_at(at, address, _FLOATS), align=4)


@intrinsic(I, _address)
def load_i(at, address):
    return at.load(_at(at, address, _INTS), align=4)


@intrinsic(I, _address)
def load_u8(at, address):
    """Sixteen unsigned bytes."""
    return at.zext(at.load(_at(at, address, _BYTES), align=1), _INTS)


@intrinsic(I, _address)
def load_i8(at, address):
    """Sixteen signed bytes."""
    return at.sext(at.load(_at(at, address, _BYTES), align=1), _INTS)


@intrinsic(VOID, F, _address)
def store_f(at, x, address):
    at.store(x, _at(at, address, _FLOATS), align=4)


@intrinsic(VOID, I, _address)
def store_i(at, x, address):
    at.store(x, _at(at, address, _INTS), align=4)


@intrinsic(VOID, I, _address)
def store_bytes(at, x, address):
    """The lowest byte of each."""
    at.store(at.trunc(x, _BYTES), _at(at, address, _BYTES), align=1)


def _bring(at: Any, address: Any, write: int, near: int) -> None:
    pointer, word = at.inttoptr(address, ir.IntType(8).as_pointer()), ir.IntType(32)
    known(at, "llvm.prefetch.p0", ir.VoidType(), pointer, word(write), word(near), word(1))


@intrinsic(VOID, _address)
def prefetch(at, address):
    """Start to bring a line of 64 bytes into the L2 cache."""
    _bring(at, address, 0, 2)


@intrinsic(VOID, _address)
def prefetch_to_write(at, address):
    """Start to bring a line of 64 bytes into the L1 cache, as this core's own."""
    _bring(at, address, 1, 3)


@intrinsic(F, _float)
def splat_f(at, x):
    return spread_of(at, x, _FLOATS)


@intrinsic(I, _int)
def splat_i(at, x):
    return spread_of(at, x, _INTS)


@intrinsic(F, F, F, F)
def fma(at, x, y, z):
    """``x * y + z``, rounded once."""
    return known(at, "llvm.fma.v16f32", _FLOATS, x, y, z)


@intrinsic(F, F, F)
def add(at, x, y):
    return at.fadd(x, y)


@intrinsic(F, F, F)
def sub(at, x, y):
    return at.fsub(x, y)


@intrinsic(F, F, F)
def mul(at, x, y):
    return at.fmul(x, y)


@intrinsic(F, F, F)
def larger(at, x, y):
    """The larger of the two; y where either is NaN."""
    return at.select(at.fcmp_ordered(">", x, y), x, y)


@intrinsic(F, F, F)
def smaller(at, x, y):
    return at.select(at.fcmp_ordered("<", x, y), x, y)


@intrinsic(F, F)
def fraction(at, x):
    """``x - floor(x)``, 0 for infinities (AVX-512 DQ)."""
    whole = ir.Constant(_FLOATS, [0.0] * LANES), ir.IntType(16)(-1), ir.IntType(32)(4)
    return known(at, "llvm.x86.avx512.mask.reduce.ps.512", _FLOATS, x, ir.IntType(32)(1), *whole)


@intrinsic(F, F, F)
def scaled(at, x, y):
    """``x * 2^floor(y)``, 0 where y is -inf (AVX-512)."""
    whole = ir.Constant(_FLOATS, [0.0] * LANES), ir.IntType(16)(-1), ir.IntType(32)(4)
    return known(at, "llvm.x86.avx512.mask.scalef.ps.512", _FLOATS, x, y, *whole)


@intrinsic(F, F)
def ordered(at, x):
    """x, 0 in place of NaN."""
    return at.select(at.fcmp_ordered("ord", x, x), x, ir.Constant(_FLOATS, [0.0] * LANES))


@intrinsic(I, I, I)
def add_i(at, x, y):
    return at.add(x, y)


@intrinsic(I, I, I)
def sub_i(at, x, y):
    return at.sub(x, y)


@intrinsic(I, I, I)
def mul_i(at, x, y):
    return at.mul(x, y)


@intrinsic(I, I, I)
def both(at, x, y):
    """Bitwise and."""
    return at.and_(x, y)


@intrinsic(I, I, I)
def either(at, x, y):
    """Bitwise or."""
    return at.or_(x, y)


@intrinsic(I, I, I)
def shifted(at, x, y):
    """``x << y``."""
    return at.shl(x, y)


@intrinsic(I, I, I)
def larger_i(at, x, y):
    return at.select(at.icmp_signed(">", x, y), x, y)


@intrinsic(I, F)
def bits_of(at, x):
    return at.bitcast(x, _INTS)


@intrinsic(F, I)
def of_bits(at, x):
    return at.bitcast(x, _FLOATS)


@intrinsic(F, I)
def floats(at, x):
    """The numbers, converted."""
    return at.sitofp(x, _FLOATS)


@intrinsic(_int, I)
def sum_i(at, x):
    return known(at, "llvm.vector.reduce.add.v16i32", ir.IntType(32), x)


@intrinsic(_int, I)
def most_i(at, x):
    return known(at, "llvm.vector.reduce.smax.v16i32", ir.IntType(32), x)


@intrinsic(_float, F)
def total_f(at, x):
    """The sum of sixteen numbers, in any order."""
    call = known(at, "llvm.vector.reduce.fadd.v16f32", ir.FloatType(), ir.FloatType()(0.0), x)
    call.fastmath.add("reassoc")
    return call


@intrinsic(_float, F)
def least(at, x):
    """The smallest of sixteen numbers, none of them NaN."""
    call = known(at, "llvm.vector.reduce.fmin.v16f32", ir.FloatType(), x)
    call.fastmath.add("nnan")
    return call


@intrinsic(_float, F)
def most(at, x):
    """The largest of sixteen numbers, none of them NaN."""
    call = known(at, "llvm.vector.reduce.fmax.v16f32", ir.FloatType(), x)
    call.fastmath.add("nnan")
    return call


@device
def rounded(x):
    """The bits of x + 1.5 * 2^23: their low bytes are those of x rounded half to even, for magnitudes below 2^22."""
    return bits_of(add(x, splat_f(SHIFT)))


@device
def power_of_two(x):
    """2^x within 3e-6 of its value, for any x that is not NaN: the fraction by a minimax polynomial of degree 4."""
    r = fraction(x)
    p = fma(splat_f(real(0.0135341604)), r, splat_f(real(0.0520114855)))
    p = fma(p, r, splat_f(real(0.241442733)))
    p = fma(p, r, splat_f(real(0.693003842)))
    p = fma(p, r, splat_f(real(1.00000259)))
    return scaled(p, x)


@device
def quantized(x, inverse, low, high, point):
    """As ``tile.store`` rounds: the lowest bytes are ``clamp(round(x * inverse), low, high) + point``, 0 + point for NaN."""
    y = smaller(larger(ordered(mul(x, inverse)), low), high)
    return bits_of(add(add(y, splat_f(SHIFT)), point))
