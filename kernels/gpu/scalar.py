"""Device side of generated kernels: one number in, one out, with PyTorch's meaning of NaN and infinities.

The names are those of ``graphwright.kernels.scalar``, which has the same functions for the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphwright.kernels.gpu.language import expm1, gelu, keep_nan, nearest, tanh


@triton.jit
def larger(x, y):
    """The larger of two numbers; NaN where one of them is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(x, y):
    """The smaller of two numbers; NaN where one of them is."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def top(x):
    """The largest number of each row, [rows, 1]; NaN where one is in it."""
    odd = tl.max((x != x).to(tl.int32), 1, keep_dims=True)
    return tl.where(odd > 0, float("nan"), tl.max(x, 1, keep_dims=True))


@triton.jit
def exp(x):
    """e^x to the last bits over the whole range: the device's own loses some where x is large."""
    z = tl.minimum(tl.maximum(x, -110.0), 90.0)
    n = nearest(z * 1.4426950408889634)
    rest = (z - n * 0.693359375) + n * 2.1219444e-4  # x - n log 2, the first product exact
    half = nearest(n * 0.5)
    return keep_nan(tl.exp(rest) * tl.exp2(half) * tl.exp2(n - half), x)


@triton.jit
def inward(x):
    """The whole part of x."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def even(x):
    """The nearest whole number, the even one of two."""
    small = tl.abs(x) < 4194304.0
    return tl.where(small, nearest(tl.where(small, x, 0.0)), x)


@triton.jit
def exp2(x):
    """2^x; the device's own may take what is not normalized for 0."""
    return tl.exp2(x)


@triton.jit
def less_one(x):
    """e^x - 1, of any x."""
    return keep_nan(tl.where(x > 0.25, exp(x) - 1.0, expm1(tl.where(x < 0.25, x, 0.25))), x)


@triton.jit
def log1p(x):
    """log(1 + x); what 1 + x loses of x is put back."""
    u = 1.0 + x
    v = tl.log(u)
    return tl.where((u > 0) & (u < float("inf")), v + (x - (u - 1.0)) / u, v)


@triton.jit
def clipped(x, low, high):
    """x within the bounds; NaN stays."""
    y = tl.where(x < low, low, x)
    return tl.where(y > high, high, y)


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def gelu_tanh(x):
    h = 0.5 * x
    return h + h * tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))


__all__ = ["clipped", "even", "exp", "exp2", "expm1", "gelu", "gelu_tanh", "inward", "larger", "less_one", "log1p", "silu", "smaller", "tanh", "top"]
