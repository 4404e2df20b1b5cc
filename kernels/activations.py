# ruff: noqa: FURB136  min() and max() treat NaN otherwise than the conditional expressions here do
"""Device side of the activations: loops over a tile of floats, chosen by number once per tile."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphwright.kernels.language import independent
from graphwright.kernels.tile import device, erf, exp, expm1, f32, real, sigmoid, tanh

#: Names (those of ``graphwright.ops.fused.ACTIVATIONS``) by number. The first group compiles fast; the second has its
#: own compiled kernel, so that a ReLU network does not wait for it.
SIMPLE = ("none", "relu", "hardtanh", "leaky_relu", "hardswish", "hardsigmoid")
SMOOTH = ("gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "elu", "selu", "mish")
CODE = {name: k for names in (SIMPLE, SMOOTH) for k, name in enumerate(names)}
_SELU = (1.6732632423543772, 1.0507009873554805)
ARITHMETIC = {"none": 0, "relu": 1, "hardtanh": 2, "leaky_relu": 2, "hardswish": 5, "hardsigmoid": 4}  # else about 30


@device
def simple(code, source, n, a, b, to):
    """The activation ``code`` of SIMPLE from one address to another; gives the address of the result."""
    x, y = f32(source), f32(to)
    if code == 0:
        return source
    if code == 1 or code == 2:  # relu is hardtanh from 0 to infinity
        for i in independent(n):
            v = a if x[i] < a else x[i]
            y[i] = b if v > b else v
    elif code == 3:
        for i in independent(n):
            y[i] = x[i] * a if x[i] < real(0) else x[i]
    else:
        for i in independent(n):
            v = x[i] + real(3)
            v = real(0) if v < real(0) else v
            v = (real(6) if v > real(6) else v) * real(1 / 6)
            y[i] = x[i] * v if code == 4 else v
    return to


@device
def smooth(code, source, n, a, b, to):
    """The same for SMOOTH."""
    x, y = f32(source), f32(to)
    if code == 0:
        for i in independent(n):
            h = real(0.5) * x[i]
            y[i] = h + h * erf(x[i] * real(0.7071067811865476))
    elif code == 1:
        for i in independent(n):
            u, h = x[i], real(0.5) * x[i]
            y[i] = h + h * tanh(real(0.7978845608028654) * (u + real(0.044715) * u * u * u))
    elif code == 2:
        for i in independent(n):
            y[i] = x[i] * sigmoid(x[i])
    elif code == 3:
        for i in independent(n):
            y[i] = sigmoid(x[i])
    elif code == 4:
        for i in independent(n):
            y[i] = tanh(x[i])
    elif code == 5 or code == 6:  # elu: a the slope to the left, b to the right
        for i in independent(n):
            v = expm1(x[i] if x[i] < real(0) else real(0)) * a
            y[i] = v if x[i] < real(0) else x[i] * b
    else:  # mish: tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2); beyond 20 it is 1
        for i in independent(n):
            e = exp(real(20) if x[i] > real(20) else x[i])
            m = e * (e + real(2))
            y[i] = x[i] * (m / (m + real(2)))
    return to


_FLOAT, _ANY = (None, torch.float32), (None, torch.float32, torch.uint8, torch.int8)


def unfit_epilogue(activation: str, other: torch.dtype | None, dtype: torch.dtype | None = None, *, integers: bool = False) -> str | None:
    """None, or why a product can't end in this activation, on a residual of dtype ``other`` (integers if said), as ``dtype``."""
    if activation not in CODE:
        return f"activation {activation!r} is not fused"
    if other not in (_ANY if integers else _FLOAT):
        return f"the residual is {other}; wanted float32" + (", uint8 or int8" if integers else "")
    return None if dtype in _ANY else f"result of {dtype}; float32, uint8 and int8 are supported"


def scalars_of(activation: str, scalars: Sequence[float]) -> tuple[float, float]:
    """What ``a`` and ``b`` are for an activation and its scalars."""
    match activation:
        case "relu":
            return 0.0, float("inf")
        case "selu":
            return _SELU[0] * _SELU[1], _SELU[1]
        case "elu":
            return scalars[0], 1.0
        case "hardtanh":
            return scalars[0], scalars[1]
    return (scalars[0] if scalars else 0.0), 0.0
