"""Device code that the kernels share: activations, rounding, the order in which programs take tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from graphwright.ops.fused import ACTIVATIONS

#: Numbers of the activations for the constexpr ``ACT``.
CODE = {name: k for k, name in enumerate(ACTIVATIONS)}

_NONE = tl.constexpr(CODE["none"])
_RELU = tl.constexpr(CODE["relu"])
_GELU = tl.constexpr(CODE["gelu"])
_GELU_TANH = tl.constexpr(CODE["gelu_tanh"])
_SILU = tl.constexpr(CODE["silu"])
_SIGMOID = tl.constexpr(CODE["sigmoid"])
_TANH = tl.constexpr(CODE["tanh"])
_HARDSWISH = tl.constexpr(CODE["hardswish"])
_HARDSIGMOID = tl.constexpr(CODE["hardsigmoid"])
_HARDTANH = tl.constexpr(CODE["hardtanh"])
_LEAKY_RELU = tl.constexpr(CODE["leaky_relu"])
_ELU = tl.constexpr(CODE["elu"])
_SELU = tl.constexpr(CODE["selu"])
_MISH = tl.constexpr(CODE["mish"])
_SOFTPLUS = tl.constexpr(CODE["softplus"])


@triton.jit
def keep_nan(y, x):
    """y, but NaN where x is: minima and maxima drop NaN on some targets."""
    return tl.where(x != x, x, y)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, exact near 0 too."""
    series = x * (1.0 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))))
    return tl.where(x > -0.25, series, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    """tanh(x); never overflows."""
    down = expm1(-2.0 * tl.abs(x))
    y = -down / (down + 2.0)
    return tl.where(x < 0, -y, y)


@triton.jit
def log1p_exp(x):
    """log(1 + exp(x))."""
    e = tl.exp(-tl.abs(x))
    series = e * (1.0 - e * (0.5 - e * (1 / 3 - e * (0.25 - e * 0.2))))
    return tl.maximum(x, 0.0) + tl.where(e < 0.03, series, tl.log(1.0 + e))


@triton.jit
def gelu(x):
    """x times the share of a normal distribution below x.

    The share above ``t = |x|`` is ``2^P(t)``: its logarithm is so smooth that a polynomial of degree 8 has the share to 1.6e-8 (minimax;
    weighted so that small shares are right too), and falls below -26 for good where float32 sees no more of it. The library's erf takes twice the instructions,
    and loses small shares to cancellation. Infinities and NaN come out as with erf.
    """
    t = tl.abs(x)
    p = 3.0146044082357548e-05 - t * 2.027447408181615e-06
    p = p * t - 0.0001446695241611451
    p = p * t - 0.00023089211026672274
    p = p * t + 0.007177175488322973
    p = p * t - 0.05256839841604233
    p = p * t - 0.4591863751411438
    p = p * t - 1.151107668876648
    above = tl.exp2(p * t - 1.0)
    return x * tl.where(x > 0, 1.0 - above, above)


@triton.jit
def activate(x, a, b, ACT: tl.constexpr):
    """``activation(x, a, b)`` of float32 numbers, as ``graphwright.ops.fused.ACTIVATIONS`` defines them."""
    if ACT == _RELU:
        y = keep_nan(tl.maximum(x, 0.0), x)
    elif ACT == _GELU:
        y = gelu(x)
    elif ACT == _GELU_TANH:
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == _SILU:
        y = x * tl.sigmoid(x)
    elif ACT == _SIGMOID:
        y = tl.sigmoid(x)
    elif ACT == _TANH:
        y = tanh(x)
    elif ACT == _HARDSWISH:
        y = keep_nan(x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) * (1 / 6), x)
    elif ACT == _HARDSIGMOID:
        y = keep_nan(tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) * (1 / 6), x)
    elif ACT == _HARDTANH:
        y = keep_nan(tl.minimum(tl.maximum(x, a), b), x)
    elif ACT == _LEAKY_RELU:
        y = tl.where(x < 0, x * a, x)
    elif ACT == _ELU:
        y = tl.where(x < 0, expm1(tl.minimum(x, 0.0)) * a, x)
    elif ACT == _SELU:
        y = tl.where(x < 0, expm1(tl.minimum(x, 0.0)) * 1.7580993408473766, x * 1.0507009873554805)
    elif ACT == _MISH:
        y = x * tanh(log1p_exp(x))
    elif ACT == _SOFTPLUS:
        y = tl.where(x * a > b, x, log1p_exp(x * a) / a)
    else:
        y = x
    return y


@triton.jit
def nearest(x):
    """The nearest whole number, halves to even, for ``|x| < 2^22``; NaN stays."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def to_int8(x, PTX: tl.constexpr):
    """Float32 to int8: halves to even, saturating; NaN becomes 0."""
    if PTX:
        return tl.inline_asm_elementwise(
            "cvt.rni.sat.s8.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1).to(tl.int8)  # fmt: skip
    else:
        return nearest(tl.where(x != x, 0.0, tl.minimum(tl.maximum(x, -128.0), 127.0))).to(tl.int8)


@triton.jit
def tile_of(pid, rows, columns, GROUP: tl.constexpr):
    """Tile (row, column) of a program: GROUP rows of tiles are gone through together, so that their columns stay in the L2 cache."""
    width = GROUP * columns
    first = pid // width * GROUP
    tall = min(rows - first, GROUP)
    return first + pid % width % tall, pid % width // tall


@triton.jit
def row_scales(v):
    """What the rows of ``v`` [r, c] float32 are multiplied with before ``to_int8``, and the scales to be stored: those of ``quantize_rows``.

    Magnitudes are compared as integers, which order NaN above all: one reduction tells the largest and whether there is any.
    """
    bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    most = tl.max(bits, 1)
    odd = most > 0x7F800000
    if tl.max(odd.to(tl.int32), 0) > 0:
        most = tl.max(tl.where(bits > 0x7F800000, 0, bits), 1)
    scale = most.to(tl.float32, bitcast=True) * (1 / 127)
    scale = tl.where(scale > 1.1754943508222875e-38, scale, 1.0)
    return 1.0 / scale, tl.where(odd, float("nan"), scale)


@triton.jit
def to_levels(x, inverse, zero_point, low, high):
    """``clamp(round(x * inverse) + zero_point, low, high)`` as int32, bounds and zero point below 2^22; NaN becomes the zero point."""
    y = x * inverse
    y = tl.where(y == y, y, 0.0)
    y = tl.minimum(tl.maximum(y, (low - zero_point) * 1.0), (high - zero_point) * 1.0)
    return (y + 12582912.0).to(tl.int32, bitcast=True) - (1262485504 - zero_point)


@triton.jit
def emit(to, y, inside, inverse, zero_point, low, high):
    """Store float32 ``y`` at the pointers ``to`` where ``inside``: as it is, or on a grid where bytes are pointed to."""
    kind: tl.constexpr = to.dtype.element_ty
    if kind.is_int():
        tl.store(to, to_levels(y, inverse, zero_point, low, high).to(kind), inside)
    else:
        tl.store(to, y.to(kind), inside)


@triton.jit
def leave(v, r, c, rows, columns, y, bias, other, other_step, a, b, inverse, zero_point, low, high, ACT: tl.constexpr):
    """``activation(v + bias + other)`` of rows ``r`` and columns ``c`` into ``y`` [rows, columns]: ``bias`` [columns] and ``other`` [rows, columns], or None; a grid as for ``emit``."""
    there = c < columns
    inside = (r < rows)[:, None] & there[None, :]
    if bias is not None:
        v += tl.load(bias + c, there, other=0.0).to(tl.float32)[None, :]
    wide = r.to(tl.int64)[:, None]
    if other is not None:
        v += tl.load(other + wide * other_step + c[None, :], inside, other=0.0).to(tl.float32)
    emit(y + wide * columns + c[None, :], activate(v, a, b, ACT), inside, inverse, zero_point, low, high)
