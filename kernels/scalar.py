# ruff: noqa: FURB136  min() and max() treat NaN otherwise than the conditional expressions here do
"""Device side of generated kernels: one number in, one out, with PyTorch's meaning of NaN and infinities.

``tile`` has the elementary functions in the form that fused kernels want (saturating where their callers never go); what a
user's own ``exp`` or ``where`` has to do at the ends of the range is put right here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphwright.kernels import tile
from graphwright.kernels.angles import cosine, sine  # noqa: F401
from graphwright.kernels.language import FLOAT32, UINT8, Device, intrinsic, known
from graphwright.kernels.tile import (  # noqa: F401
    bits,
    device,
    erf,
    f32,
    from_bits,
    i8,
    i32,
    i64,
    real,
    root,
    share,
    sigmoid,
    tanh,
    u8,
    wide_scratch,
)

inf, nan = float("inf"), float("nan")
_ZERO, _ONE, _HALF = real(0), real(1), real(0.5)


@intrinsic(FLOAT32, FLOAT32, FLOAT32)
def larger(at, x, y):
    """The larger of two numbers; NaN where one of them is."""
    return known(at, "llvm.maximum.f32", FLOAT32.llvm, x, y)


@intrinsic(FLOAT32, FLOAT32, FLOAT32)
def smaller(at, x, y):
    """The smaller of two numbers; NaN where one of them is."""
    return known(at, "llvm.minimum.f32", FLOAT32.llvm, x, y)


@intrinsic(FLOAT32, FLOAT32)
def magnitude(at, x):
    return known(at, "llvm.fabs.f32", FLOAT32.llvm, x)


@intrinsic(FLOAT32, FLOAT32)
def down(at, x):
    """The largest whole number that is not above x."""
    return known(at, "llvm.floor.f32", FLOAT32.llvm, x)


@intrinsic(FLOAT32, FLOAT32)
def up(at, x):
    """The smallest whole number that is not below x."""
    return known(at, "llvm.ceil.f32", FLOAT32.llvm, x)


@intrinsic(FLOAT32, FLOAT32)
def inward(at, x):
    """The whole part of x."""
    return known(at, "llvm.trunc.f32", FLOAT32.llvm, x)


@intrinsic(FLOAT32, FLOAT32)
def even(at, x):
    """The nearest whole number, the even one of two."""
    return known(at, "llvm.rint.f32", FLOAT32.llvm, x)


@intrinsic(UINT8, FLOAT32)
def is_not_zero(at, x):
    """1 where x is anything but 0, NaN included."""
    return at.zext(at.fcmp_unordered("!=", x, FLOAT32.llvm(0.0)), UINT8.llvm)


def _sums(x: Any, y: Any) -> Any:
    return x + y


#: An addition whose terms may come in any order: what sums over a row need to be done sixteen at a time.
plus = Device(_sums, (*tile.FAST, "reassoc"))


@device
def exp(x):
    """e^x, infinite from 88.73 on."""
    y = tile.exp(real(88.0) if x > real(88.0) else x)
    y = y * tile.exp(x - real(88.0)) if x > real(88.0) else y
    return real(inf) if x > real(88.72284) else y


@device
def log(x):
    """The natural logarithm within 8e-8 of its value: -inf at 0, NaN below.

    x = 2^n (1 + r) with r in [sqrt(1/2) - 1, sqrt(2) - 1]; log(1 + r) is r - r^2 / 2 + r^3 times a polynomial of degree 7.
    """
    tiny = x < real(1.1754943508222875e-38)  # not normalized: fewer bits, another exponent
    y = x * real(8388608.0) if tiny else x
    b = bits(y)
    e = (b - 0x3F3504F3) >> 23
    n = real(e - 23 if tiny else e)
    r = from_bits(np.int32(b - (e << 23))) - _ONE
    p = real(-0.07363942265510559)
    p = p * r + real(0.1262092888355255)
    p = p * r + real(-0.13201940059661865)
    p = p * r + real(0.14226998388767242)
    p = p * r + real(-0.1662137657403946)
    p = p * r + real(0.19999833405017853)
    p = p * r + real(-0.2500085234642029)
    p = p * r + real(0.3333335518836975)
    z = r * r
    low = z * r * p - n * real(2.1219444e-4)  # 0.693359375 - 2.12e-4 is log 2, its first part exact in any product with n
    v = (low - _HALF * z + r) + n * real(0.693359375)
    v = x if x > real(3.4028234663852886e38) else v
    v = real(-inf) if x == _ZERO else v
    return v if x >= _ZERO else real(nan)


@device
def gelu(x):
    h = _HALF * x
    return h + h * erf(x * real(0.7071067811865476))


@device
def gelu_tanh(x):
    h = _HALF * x
    return h + h * tanh(real(0.7978845608028654) * (x + real(0.044715) * x * x * x))


@device
def silu(x):
    return x * sigmoid(x)


@device
def expm1(x):
    """e^x - 1 for x <= 0."""
    return tile.expm1(x)


@device
def less_one(x):
    """e^x - 1, of any x."""
    y = tile.expm1(x if x < _HALF else _HALF)
    return exp(x) - _ONE if x > _HALF else (y if x == x else x)  # noqa: PLR0124


@device
def exp2(x):
    """2^x: 0 below 2^-126, infinite from 128 on."""
    y = x - _ONE if x > _ONE else x  # 2^128 is out of reach, 2^127 is not
    y = real(127.0) if y > real(127.0) else y
    y = real(-126.0) if y < real(-126.0) else y
    n = even(y)
    r = y - n
    p = real(0.00015345812425948679)
    p = p * r + real(0.0013399930903688073)
    p = p * r + real(0.009618489071726799)
    p = p * r + real(0.05550328642129898)
    p = p * r + real(0.24022646248340607)
    p = p * r + real(0.6931471824645996)
    p = p * r + _ONE
    p = from_bits(np.int32(bits(p) + (np.int32(n) << 23)))
    p = p + p if x > _ONE else p
    p = real(inf) if x >= real(128.0) else p
    p = _ZERO if x < real(-126.0) else p
    return p if x == x else x  # noqa: PLR0124


@device
def log1p(x):
    """log(1 + x); what 1 + x loses of x is put back."""
    u = _ONE + x
    v = log(u)
    y = v + (x - (u - _ONE)) / u if u > _ZERO else v
    return v if u > real(3.4028234663852886e38) else y


@device
def clipped(x, low, high):
    """x within the bounds; NaN stays."""
    y = low if x < low else x
    return high if y > high else y


def names() -> dict[str, Any]:
    """What the text of a generated kernel may name."""
    return {"np": np, **{k: v for k, v in globals().items() if not k.startswith("__")}}
