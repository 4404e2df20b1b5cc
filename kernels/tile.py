# ruff: noqa: FURB136  min() and max() treat NaN otherwise than the conditional expressions here do
"""Device side of the kernels: pointers, vectorized elementary functions, and loading and storing tiles.

Kernels work on tiles of at most ``TILE`` float32 numbers that stay in the L1 cache: fetch (converting from any storage
dtype), compute, store (rounding to any). Each stage is one simple loop that LLVM vectorizes, so that dtypes and activations
add up instead of multiplying, and one compiled kernel serves them all.

Addresses are plain integers; ``f32(address)`` and the like make pointers of them. Nothing checks bounds here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from graphwright.kernels.language import (
    FAST,
    FLOAT32,
    FLOAT64,
    INT8,
    INT32,
    INT64,
    UINT8,
    UINT16,
    Device,
    apart,
    intrinsic,
    ir,
    known,
    pointer,
)  # fmt: skip

TILE = np.int64(1024)

#: Storage dtypes by the number that kernels know them by.
F32, BF16, U8, I8 = range(4)
KIND = {torch.float32: F32, torch.bfloat16: BF16, torch.uint8: U8, torch.int8: I8}
BYTES = {F32: 4, BF16: 2, U8: 1, I8: 1}

real = np.float32
_ZERO, _ONE, _HALF, _TWO = real(0), real(1), real(0.5), real(2)
# Adding 1.5 * 2^23 rounds a float32 below 2^22 half to even and leaves the integer in its low bits.
SHIFT = real(12582912.0)

def device(body: Callable[..., Any]) -> Any:
    """A function that kernels call."""
    return Device(body)


def reducing(body: Callable[..., Any]) -> Any:
    """The same where sums may be reordered: needed to vectorize them, and more accurate than one running sum."""
    return Device(body, (*FAST, "reassoc"))


f32, f64, u8, i8, u16, i32, i64 = (pointer(k) for k in (FLOAT32, FLOAT64, UINT8, INT8, UINT16, INT32, INT64))


def scratch_of(floats: int) -> Any:
    """Address of so many floats on the stack; each place in the code has its own."""

    @intrinsic(INT64)
    def scratch(at):
        with at.goto_entry_block():
            block = at.alloca(ir.ArrayType(ir.FloatType(), floats))
        block.align = 64
        return at.ptrtoint(block, INT64.llvm)

    return scratch


scratch = scratch_of(int(TILE))
wide_scratch = scratch_of(16384)  # 64 KiB, for whole rows


@intrinsic(INT64, INT64)
def call(at, function):
    """Call ``int (void)`` at an address."""
    kind = ir.FunctionType(INT32.llvm, [])
    return at.sext(at.call(at.inttoptr(function, kind.as_pointer()), []), INT64.llvm)


@intrinsic(INT32, FLOAT32)
def bits(at, x):
    """The bits of a float32."""
    return at.bitcast(x, INT32.llvm)


@intrinsic(FLOAT32, INT32)
def from_bits(at, x):
    """The float32 with these bits."""
    return at.bitcast(x, FLOAT32.llvm)


@intrinsic(FLOAT32, FLOAT32)
def root(at, x):
    """The square root."""
    return known(at, "llvm.sqrt.f32", FLOAT32.llvm, x)


@device
def share(params, units):
    """First and last-plus-one of the units of work that belong to the calling thread."""
    p = i64(params)
    if p[0] == 0:
        return 0, units
    me, all_ = call(p[0]), call(p[1])
    return units * me // all_, units * (me + 1) // all_


# -- elementary functions: one float32 in, one out, no branches ------------------------------------------------------


@device
def exp(x):
    """e^x within 1e-7 of its value; 0 below -87.3, 2^127 (not infinity) above 88; NaN stays NaN.

    2^n times a degree-6 minimax polynomial on [-1/2, 1/2], the argument reduced in two parts.
    """
    y = real(88.0) if x > real(88.0) else x
    shifted = y * real(1.4426950216293335) + SHIFT
    n = shifted - SHIFT
    r = (y * real(1.4426950216293335) - n) + y * real(1.9259629911266175e-08)
    p = real(0.00015345812425948679)
    p = p * r + real(0.0013399930903688073)
    p = p * r + real(0.009618489071726799)
    p = p * r + real(0.05550328642129898)
    p = p * r + real(0.24022646248340607)
    p = p * r + real(0.6931471824645996)
    p = p * r + _ONE
    p = from_bits(np.int32(bits(p) + np.int32(bits(shifted) << np.int32(23))))
    return _ZERO if x < real(-87.3) else p


@device
def tanh(x):
    """tanh(x), relative error 4e-7: an odd rational function on [-9, 9]."""
    y = real(9.0) if x > real(9.0) else x
    y = real(-9.0) if y < real(-9.0) else y
    u = y * y
    p = real(1.335462940232901e-08)
    p = p * u + real(2.0609057173714973e-05)
    p = p * u + real(0.003495586570352316)
    p = p * u + real(0.13381023705005646)
    p = p * u + _ONE
    q = real(7.776544634907623e-07)
    q = q * u + real(0.00032856324105523527)
    q = q * u + real(0.025876976549625397)
    q = q * u + real(0.46714338660240173)
    q = q * u + _ONE
    return y * p / q


@device
def erf(x):
    """erf(x), relative error 4.3e-7, exactly +-1 beyond 3.9: an odd rational function."""
    y = real(3.92) if x > real(3.92) else x
    y = real(-3.92) if y < real(-3.92) else y
    u = y * y
    p = real(1.9924302208096378e-08)
    p = p * u + real(-1.9578264982555993e-06)
    p = p * u + real(0.00014184803876560181)
    p = p * u + real(0.003701509442180395)
    p = p * u + real(0.050573013722896576)
    p = p * u + real(0.19992217421531677)
    p = p * u + real(1.1283791065216064)
    q = real(0.0009560147300362587)
    q = q * u + real(0.014353001490235329)
    q = q * u + real(0.11499743908643723)
    q = q * u + real(0.5105080604553223)
    q = q * u + _ONE
    r = y * p / q
    r = _ONE if x > real(3.9) else r
    return real(-1.0) if x < real(-3.9) else r


@device
def sigmoid(x):
    return _ONE / (_ONE + exp(-x))


@device
def expm1(x):
    """e^x - 1 for x <= 0, without cancellation near 0."""
    t = tanh(_HALF * x)
    return _TWO * t / (_ONE - t)


@device
def widened(h):
    """The float32 behind the bits of a bfloat16."""
    return from_bits(np.int32(np.int32(h) << np.int32(16)))


# -- tiles -----------------------------------------------------------------------------------------------------------


@device
def load(kind, address, stride, n, scale, zero, to):
    """``n`` elements ``stride`` apart, as float32, to the address ``to``; integers become ``(q - zero) * scale``."""
    apart()
    out = f32(to)  # LLVM makes a version of each loop for stride 1
    if kind == F32:
        x = f32(address)
        for i in range(n):
            out[i] = x[i * stride]
    elif kind == BF16:
        h = u16(address)
        for i in range(n):
            out[i] = widened(h[i * stride])
    elif kind == U8:
        b = u8(address)
        for i in range(n):
            out[i] = (real(b[i * stride]) - zero) * scale
    elif kind == I8:
        c = i8(address)
        for i in range(n):
            out[i] = (real(c[i * stride]) - zero) * scale


@device
def fetch(kind, address, stride, n, scale, zero, buffer):
    """Address of ``n`` consecutive floats: the tensor itself where it is float32, else the buffer, filled."""
    if kind == F32 and stride == 1:
        return address
    load(kind, address, stride, n, scale, zero, buffer)
    return buffer


@device
def store(kind, address, n, source, inverse, zero, low, high):
    """Write ``n`` floats, consecutively. Integers: ``round_half_even(x * inverse)`` saturated to ``[low, high]``.

    ``low`` and ``high`` are bounds before the zero point is added. NaN becomes the zero point.
    """
    apart()
    x, point = f32(source), real(zero)
    if kind == F32:
        f = f32(address)
        for i in range(n):
            f[i] = x[i]
    elif kind == BF16:
        h = u16(address)
        for i in range(n):  # round half to even on the upper half of the bits
            b = bits(x[i])
            up = np.int32(np.int32(b + np.int32(0x7FFF)) + np.int32(np.int32(b >> np.int32(16)) & np.int32(1)))
            h[i] = np.uint16(np.int32(up >> np.int32(16)) if x[i] == x[i] else np.int32(0x7FC0))
    elif kind == U8:
        u = u8(address)
        for i in range(n):
            u[i] = np.uint8(_rounded(x[i], inverse, low, high, point))
    elif kind == I8:
        c = i8(address)
        for i in range(n):
            c[i] = np.int8(_rounded(x[i], inverse, low, high, point))


@device
def _rounded(x, inverse, low, high, point):
    """int32 whose low byte is the result: the zero point, an integer, is added exactly after the rounding."""
    y = x * inverse
    y = y if y == y else _ZERO  # noqa: PLR0124
    y = low if y < low else y
    y = high if y > high else y
    return bits((y + SHIFT) + point)


@device
def add(x, y, n, to):
    """``to[i] = x[i] + y[i]``; all are addresses of floats."""
    a, b, out = f32(x), f32(y), f32(to)
    for i in range(n):
        out[i] = a[i] + b[i]


@device
def multiply(x, y, n, to):
    """``to[i] = x[i] * y[i]``."""
    a, b, out = f32(x), f32(y), f32(to)
    for i in range(n):
        out[i] = a[i] * b[i]


@reducing
def total(x, n):
    """Sum of ``n`` floats."""
    a, sum_ = f32(x), _ZERO
    for i in range(n):
        sum_ += a[i]
    return sum_


@reducing
def squares(x, n, centre):
    """Sum of ``(x - centre)^2``."""
    a, sum_ = f32(x), _ZERO
    for i in range(n):
        d = a[i] - centre
        sum_ += d * d
    return sum_


@device
def _ordered(b):
    """Bits of a float32 as an integer that is ordered as the float is; its own inverse. (int32 throughout: sums of them would be int64.)"""
    return np.int32(b ^ np.int32(np.int32(b >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@device
def largest(x, n):
    """Largest of ``n`` floats; -inf for none. NaN counts as larger or smaller than all by its sign.

    Compares the bits as integers that are ordered as the floats are, which vectorizes without assuming away NaN.
    """
    a, best = i32(x), np.int32(-0x7F800001)
    for i in range(n):
        key = _ordered(a[i])
        best = key if key > best else best
    return from_bits(_ordered(best))

