# ruff: noqa: FURB136  min() and max() treat NaN otherwise than the conditional expressions here do
"""Device side of generated kernels: one number in, one out, with PyTorch's meaning of NaN and infinities.

``tile`` has the elementary functions in the form that fused kernels want (saturating where their callers never go); what a
user's own ``exp`` or ``where`` has to do at the ends of the range is put right here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphwright.kernels import tile
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
def clipped(x, low, high):
    """x within the bounds; NaN stays."""
    y = low if x < low else x
    return high if y > high else y


def names() -> dict[str, Any]:
    """What the text of a generated kernel may name."""
    return {"np": np, **{k: v for k, v in globals().items() if not k.startswith("__")}}
