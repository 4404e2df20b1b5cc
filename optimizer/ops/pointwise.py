"""ATen rows: functions that work on each element by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from graphwright.ops.registry import COMMUTATIVE, ELEMENTWISE, LAYOUT_FREE, RANDOM, described, op

_TRAITS = frozenset({ELEMENTWISE, LAYOUT_FREE})
Body = Callable[..., Any]


def _unary(name: str, summary: str, body: Body, overloads: Iterable[str] = ("default",)) -> None:
    op(f"aten.{name}", axes="* -> *", traits=_TRAITS, overloads=overloads)(described(body, summary))


def _floating(x: Tensor) -> Tensor:
    """Integers and bools as the default float: what functions of real numbers do with them."""
    return x if x.is_floating_point() or x.is_complex() else x.to(torch.get_default_dtype())


# -- one argument ----------------------------------------------------------------------------------------------------

_unary("abs", "Absolute value.", lambda x: torch.where(x < 0, -x, x) + 0 if not x.is_complex() else torch.abs(x))
_unary("neg", "Negation.", lambda x: x * -1)
_unary("positive", "The number itself.", lambda x: x.clone())
_unary("sign", "-1, 0 or 1; 0 for NaN.", lambda x: torch.where(x > 0, 1, torch.where(x < 0, -1, 0)).to(x.dtype))
_unary("square", "x squared.", lambda x: x * x)
_unary("reciprocal", "1 / x.", lambda x: torch.ones_like(_floating(x)) / _floating(x))
_unary("sqrt", "Square root.", lambda x: torch.pow(_floating(x), 0.5))
_unary("rsqrt", "1 / sqrt(x).", lambda x: 1 / torch.sqrt(_floating(x)))
_unary("exp", "e to the x.", torch.exp)
_unary("exp2", "2 to the x.", lambda x: torch.exp(_floating(x) * math.log(2)))
_unary("expm1", "exp(x) - 1, accurate near 0.", torch.expm1)
_unary("log", "Natural logarithm.", torch.log)
_unary("log2", "Logarithm to base 2.", lambda x: torch.log(_floating(x)) / math.log(2))
_unary("log10", "Logarithm to base 10.", lambda x: torch.log(_floating(x)) / math.log(10))
_unary("log1p", "log(1 + x), accurate near 0.", torch.log1p)
_unary("sin", "Sine of radians.", torch.sin)
_unary("cos", "Cosine of radians.", torch.cos)
_unary("tan", "Tangent of radians.", lambda x: torch.sin(x) / torch.cos(x))
_unary("asin", "Arc sine.", torch.asin)
_unary("acos", "Arc cosine.", lambda x: math.pi / 2 - torch.asin(x))
_unary("atan", "Arc tangent.", torch.atan)
_unary("sinh", "Hyperbolic sine.", lambda x: (torch.exp(x) - torch.exp(-x)) / 2)
_unary("cosh", "Hyperbolic cosine.", lambda x: (torch.exp(x) + torch.exp(-x)) / 2)
_unary("tanh", "Hyperbolic tangent.", lambda x: 2 * torch.sigmoid(2 * _floating(x)) - 1)
_unary("erf", "Error function.", torch.erf)
_unary("erfc", "1 - erf(x).", torch.erfc)
_unary("erfinv", "Inverse of the error function.", torch.erfinv)
_unary("floor", "Round down.", torch.floor)
_unary("ceil", "Round up.", lambda x: -torch.floor(-x))
_unary("trunc", "Round towards zero.", lambda x: torch.sign(x) * torch.floor(torch.abs(x)))
_unary("round", "Round to the nearest integer, ties to even.", torch.round)
_unary("round", "Round to so many decimals.", lambda x, *, decimals: torch.round(x, decimals=decimals), ("decimals",))
_unary("frac", "What follows the decimal point, with the sign of x.", lambda x: x - torch.trunc(x))
_unary("isnan", "Whether x is NaN.", lambda x: ~((x < 0) | (x >= 0)) if not x.is_complex() else torch.isnan(x))
_unary("isinf", "Whether x is infinite.", lambda x: torch.abs(x) == float("inf"))
_unary("isfinite", "Whether x is neither infinite nor NaN.", lambda x: torch.abs(x) < float("inf"))
_unary("logical_not", "Whether x is zero.", lambda x: x == 0)
_unary("bitwise_not", "Every bit turned.", lambda x: x == 0 if x.dtype == torch.bool else -x - 1)
_unary("sigmoid", "1 / (1 + exp(-x)).", lambda x: 1 / (1 + torch.exp(-_floating(x))))
_unary("relu", "max(x, 0).", lambda x: torch.clamp(x, min=0))
_unary("relu6", "x between 0 and 6.", lambda x: torch.clamp(x, 0, 6))
_unary("silu", "x * sigmoid(x).", lambda x: x * torch.sigmoid(x))
_unary("mish", "x * tanh(softplus(x)).", lambda x: x * torch.tanh(torch.logaddexp(x, torch.zeros_like(x))))
_unary("hardsigmoid", "(x + 3) / 6 between 0 and 1.", lambda x: torch.clamp(x / 6 + 0.5, 0, 1))
_unary("hardswish", "x * hardsigmoid(x).", lambda x: x * torch.clamp(x / 6 + 0.5, 0, 1))
_unary("lgamma", "Logarithm of the gamma function's absolute value.", torch.lgamma)
_unary("conj", "Complex conjugate.", lambda x: torch.complex(x.real, -x.imag) if x.is_complex() else x)


@op("aten.log_sigmoid", axes="* -> *", traits={ELEMENTWISE})
def log_sigmoid(self: Tensor) -> Tensor:
    """``log(sigmoid(x))``; always contiguous."""
    return (torch.clamp(self, max=0) - torch.log1p(torch.exp(-torch.abs(self)))).contiguous()


@op("aten.real", axes="* -> *", traits={ELEMENTWISE})
def real(self: Tensor) -> Tensor:
    """Real part, a view."""
    return torch.view_as_real(self)[..., 0] if self.is_complex() else self


@op("aten.imag", axes="* -> *", traits={ELEMENTWISE})
def imag(self: Tensor) -> Tensor:
    """Imaginary part, a view."""
    return torch.view_as_real(self)[..., 1]


@op("aten.angle", axes="* -> *", traits={ELEMENTWISE})
def angle(self: Tensor) -> Tensor:
    """Angle of a complex number; contiguous."""
    return torch.atan2(self.imag, self.real).contiguous()


# -- one argument and constants --------------------------------------------------------------------------------------


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _elu(x: Tensor, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Tensor:
    return torch.where(x > 0, x * scale, scale * alpha * torch.expm1(torch.clamp(x, max=0) * input_scale))


def _clamp(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    for bound in (min, max):
        x = x if bound is None else x.to(torch.result_type(x, bound))
    x = x.clone() if min is None else torch.where(x < min, torch.as_tensor(min, dtype=x.dtype, device=x.device), x)
    return x if max is None else torch.where(x > max, torch.as_tensor(max, dtype=x.dtype, device=x.device), x)


def _nan_to_num(
    x: Tensor, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Tensor:
    if not x.is_floating_point():
        return x.clone()
    limits = torch.finfo(x.dtype)
    x = torch.where(torch.isnan(x), 0.0 if nan is None else nan, x)
    x = torch.where(x == float("inf"), limits.max if posinf is None else posinf, x)
    return torch.where(x == float("-inf"), limits.min if neginf is None else neginf, x)


def _softplus(x: Tensor, beta: Any = 1, threshold: Any = 20) -> Tensor:
    return torch.where(x * beta > threshold, x, torch.logaddexp(x * beta, torch.zeros_like(x)) / beta)


_unary("gelu", "x * Phi(x), or its tanh approximation.", _gelu)
_unary("elu", "x above 0, alpha * (exp(x) - 1) below.", _elu)
_unary(
    "selu",
    "Scaled ELU that keeps mean and variance.",
    lambda x: _elu(x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946),
)
_unary("celu", "x above 0, alpha * (exp(x / alpha) - 1) below.", lambda x, alpha=1.0: _elu(x, alpha, 1, 1 / alpha))
_unary("leaky_relu", "x above 0, slope * x below.", lambda x, slope=0.01: torch.where(x > 0, x, x * slope))
_unary("hardtanh", "x between two numbers.", lambda x, low=-1, high=1: torch.clamp(x, low, high).to(x.dtype))
_unary(
    "threshold",
    "x above the threshold, else a value.",
    lambda x, threshold, value: torch.where(x <= threshold, value, x).to(x.dtype),
)
_unary("softplus", "log(1 + exp(beta * x)) / beta; x itself past the threshold.", _softplus)
_unary(
    "hardshrink", "0 between -lambd and lambd, else x.", lambda x, lambd=0.5: torch.where(torch.abs(x) <= lambd, 0, x)
)
_unary(
    "softshrink",
    "x moved towards 0 by lambd, 0 within.",
    lambda x, lambd=0.5: torch.sign(x) * torch.clamp(torch.abs(x) - lambd, min=0),
)
_unary("clamp", "x between bounds.", _clamp)
_unary("clip", "x between bounds.", lambda x, min=None, max=None: _clamp(x, min, max))
_unary("clamp_min", "x, at least min.", lambda x, min: _clamp(x, min))
_unary("clamp_max", "x, at most max.", lambda x, max: _clamp(x, None, max))
_unary("nan_to_num", "NaN and infinities replaced by numbers.", _nan_to_num)
_unary("pow", "x to a constant power.", lambda x, exponent: torch.pow(x, exponent), ("Tensor_Scalar",))


@op("aten.pow", axes="* -> *", traits={ELEMENTWISE}, overloads=("Scalar",))
def power_of(self: Any, exponent: Tensor) -> Tensor:
    """A constant to the power of x; contiguous."""
    return torch.pow(self, exponent)


# -- two and three arguments -----------------------------------------------------------------------------------------


def _binary(
    name: str,
    summary: str,
    body: Body,
    tensor: str = "Tensor",
    scalar: str | None = "Scalar",
    commutative: bool = False,
) -> None:
    """A row for two tensors and, under its own overload, one for a tensor and a number."""
    body = described(body, summary)
    traits = _TRAITS | {COMMUTATIVE} if commutative else _TRAITS
    op(f"aten.{name}", axes="*, * -> *", traits=traits, overloads=(tensor,))(body)
    if scalar is not None:
        op(f"aten.{name}", axes="* -> *", traits=_TRAITS, overloads=(scalar,))(body)


def _divide(a: Any, b: Any, *, rounding_mode: str | None = None) -> Tensor:
    if rounding_mode is None:
        return _floating(a) * (1 / b) if not isinstance(b, Tensor) else _floating(a) / b
    return torch.div(a, b, rounding_mode=rounding_mode)


def _remainder(a: Any, b: Any) -> Tensor:
    return a - torch.floor_divide(a, b) * b


_binary("add", "self + alpha * other.", lambda a, b, alpha=1: a + (b if alpha == 1 else b * alpha), commutative=True)
_binary("sub", "self - alpha * other.", lambda a, b, alpha=1: a - (b if alpha == 1 else b * alpha))
_binary("rsub", "other - alpha * self.", lambda a, b, alpha=1: b - (a if alpha == 1 else a * alpha))
_binary("mul", "Product.", lambda a, b: a * b, commutative=True)
_binary("div", "True quotient.", _divide)
_binary("div", "Quotient, rounded: None, floor or trunc.", _divide, "Tensor_mode", "Scalar_mode")
_binary("true_divide", "True quotient.", _divide)
_binary(
    "floor_divide", "Quotient, rounded down.", lambda a, b: torch.div(a, b, rounding_mode="floor"), "default", "Scalar"
)
_binary("remainder", "Remainder with the sign of the divisor.", _remainder)
_binary("fmod", "Remainder with the sign of the dividend.", lambda a, b: a - torch.div(a, b, rounding_mode="trunc") * b)
_binary("pow", "self to the power of exponent.", lambda a, b: torch.pow(a, b), "Tensor_Tensor", None)
_binary("maximum", "The larger; NaN wins.", torch.maximum, "default", None, commutative=True)
_binary("minimum", "The smaller; NaN wins.", torch.minimum, "default", None, commutative=True)
_binary("max", "The larger; NaN wins.", torch.maximum, "other", None, commutative=True)
_binary("min", "The smaller; NaN wins.", torch.minimum, "other", None, commutative=True)
_binary("fmax", "The larger; NaN loses.", torch.fmax, "default", None, commutative=True)
_binary("fmin", "The smaller; NaN loses.", torch.fmin, "default", None, commutative=True)
_binary("atan2", "Angle of the point (other, self).", torch.atan2, "default", None)
_binary("hypot", "Length of the hypotenuse.", lambda a, b: torch.sqrt(a * a + b * b), "default", None, commutative=True)
_binary("copysign", "self with the sign of other.", torch.copysign)
_binary(
    "logaddexp",
    "log(exp(self) + exp(other)).",
    lambda a, b: torch.maximum(a, b) + torch.log1p(torch.exp(-torch.abs(a - b))),
    "default",
    None,
    commutative=True,
)
_binary("eq", "Whether equal.", lambda a, b: a == b, commutative=True)
_binary("ne", "Whether different.", lambda a, b: a != b, commutative=True)
_binary("lt", "Whether less.", lambda a, b: a < b)
_binary("le", "Whether less or equal.", lambda a, b: a <= b)
_binary("gt", "Whether greater.", lambda a, b: a > b)
_binary("ge", "Whether greater or equal.", lambda a, b: a >= b)
_binary("logical_and", "Whether both are nonzero.", lambda a, b: (a != 0) & (b != 0), "default", None, commutative=True)
_binary("logical_or", "Whether one is nonzero.", lambda a, b: (a != 0) | (b != 0), "default", None, commutative=True)
_binary(
    "logical_xor", "Whether just one is nonzero.", lambda a, b: (a != 0) ^ (b != 0), "default", None, commutative=True
)
for _name in ("bitwise_and", "__and__"):
    _binary(_name, "Bits set in both.", lambda a, b: a & b, commutative=True)
for _name in ("bitwise_or", "__or__"):
    _binary(_name, "Bits set in one.", lambda a, b: a | b, commutative=True)
for _name in ("bitwise_xor", "__xor__"):
    _binary(_name, "Bits set in just one.", lambda a, b: a ^ b, commutative=True)
_binary("bitwise_left_shift", "Bits moved up.", lambda a, b: a * 2**b, scalar="Tensor_Scalar")
_binary(
    "bitwise_right_shift",
    "Bits moved down.",
    lambda a, b: torch.div(a, 2**b, rounding_mode="floor"),
    scalar="Tensor_Scalar",
)
_binary(
    "polar",
    "Complex numbers from length and angle.",
    lambda r, t: torch.complex(r * torch.cos(t), r * torch.sin(t)),
    "default",
    None,
)
_binary(
    "complex",
    "Complex numbers from their parts.",
    lambda re, im: torch.view_as_complex(torch.stack(torch.broadcast_tensors(re, im), -1)),
    "default",
    None,
)
_binary("lerp", "self + weight * (end - self), for a number.", lambda a, b, w: a + w * (b - a), "Scalar", None)
_binary(
    "isclose",
    "Whether equal within tolerances.",
    lambda a, b, rtol=1e-5, atol=1e-8, equal_nan=False: torch.isclose(a, b, rtol, atol, equal_nan),
    "default",
    None,
)


@op("aten.lerp", axes="*, *, * -> *", traits=_TRAITS, overloads=("Tensor",))
def lerp(self: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """``self + weight * (end - self)``."""
    return self + weight * (end - self)


@op("aten.addcmul", axes="*, *, * -> *", traits=_TRAITS)
def addcmul(self: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: Any = 1) -> Tensor:
    """``self + value * tensor1 * tensor2``."""
    product = tensor1 * tensor2
    return (self + value * product).to(torch.promote_types(self.dtype, product.dtype))


@op("aten.addcdiv", axes="*, *, * -> *", traits=_TRAITS)
def addcdiv(self: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: Any = 1) -> Tensor:
    """``self + value * tensor1 / tensor2``."""
    return self + value * tensor1 / tensor2


def _where_axes(**args: Any) -> str:
    return ", ".join("*" for v in args.values() if isinstance(v, Tensor)) + " -> *"


@op("aten.where", axes=_where_axes, traits=_TRAITS, overloads=("self", "ScalarSelf", "ScalarOther", "Scalar"))
def where(condition: Tensor, self: Any, other: Any) -> Tensor:
    """``self`` where the condition holds, else ``other``."""
    return torch.where(condition, self, other)


@op("aten.masked_fill", axes=_where_axes, traits={ELEMENTWISE}, overloads=("Scalar", "Tensor"))
def masked_fill(self: Tensor, mask: Tensor, value: Any) -> Tensor:
    """``value`` where the mask holds, else ``self``; the result has self's dtype and no particular layout."""
    return torch.where(mask, torch.as_tensor(value, dtype=self.dtype, device=self.device), self)


def _prelu_axes(**args: Any) -> str:
    ndim, count = args["self"].ndim, args["weight"].numel()
    x = " ".join(["n", "c", *(f"s{k}" for k in range(ndim - 2))][:ndim]) if ndim != 1 else "c"
    return f"{x}, {'c' if not isinstance(count, int) or count > 1 else '1'} -> {x}"


@op("aten.prelu", axes=_prelu_axes, traits=_TRAITS)
def prelu(self: Tensor, weight: Tensor) -> Tensor:
    """``x`` above 0, ``weight * x`` below, with one weight for all or one per channel (axis 1)."""
    if weight.numel() > 1:
        weight = weight.reshape(-1, *[1] * (self.ndim - 2))
    return torch.where(self > 0, self, weight * self)


@op("aten.rrelu", axes="* -> *", traits={ELEMENTWISE, RANDOM})
def rrelu(
    self: Tensor, lower: Any = 1 / 8, upper: Any = 1 / 3, training: bool = False, generator: Any = None
) -> Tensor:
    """Leaky ReLU with the mean slope; in training with a random one."""
    if training:
        return torch.rrelu(self, lower, upper, True)
    return torch.where(self > 0, self, self * ((lower + upper) / 2))
