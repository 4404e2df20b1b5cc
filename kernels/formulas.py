"""What ATen's ops compute, element by element: the vocabulary of generated kernels.

An op becomes a small tree of ``Term`` over its operands: primitive scalar operations, and sums and maxima over a row.
``ROWS`` has a rule per op: it takes the op's arguments by name, and gives the term of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from graphwright.kernels import reductions
from graphwright.kernels.trees import Call, Rule, Term, Unfit, add, call, cast, constant, inverse, mul, root, squared

ROWS: dict[str, Rule] = dict(reductions.RULES)


def _row(*names: str) -> Callable[[Rule], Rule]:
    def add_(rule: Rule) -> Rule:
        ROWS.update(dict.fromkeys(names, rule))
        return rule

    return add_


def _unary(text: str, cost: float = 1.0) -> Rule:
    return lambda c: call(text, c.family, c.term("self"), cost=cost)


def _float(text: str, cost: float) -> Rule:
    return lambda c: call(text, "f", c.term("self", "f"), cost=cost)


ROWS |= {
    "neg": _unary("-{0}"), "relu": _float("real(0.0) if {0} < real(0.0) else {0}", 1), "abs": _float("magnitude({0})", 1),
    "square": lambda c: squared(c.term("self")), "sqrt": _float("root({0})", 6), "rsqrt": _float("real(1.0) / root({0})", 10),
    "reciprocal": _float("real(1.0) / {0}", 4), "exp": _float("exp({0})", 20), "log": _float("log({0})", 20), "erf": _float("erf({0})", 18),
    "tanh": _float("tanh({0})", 16), "sigmoid": _float("sigmoid({0})", 16), "silu": _float("silu({0})", 17),
    "floor": _float("down({0})", 1), "ceil": _float("up({0})", 1), "trunc": _float("inward({0})", 1), "fix": _float("inward({0})", 1),
    "sin": _float("sine({0})", 40), "cos": _float("cosine({0})", 40), "tan": _float("sine({0}) / cosine({0})", 80), "exp2": _float("exp2({0})", 18),
    "expm1": _float("less_one({0})", 36), "log1p": _float("log1p({0})", 26), "log2": _float("log({0}) * real(1.4426950408889634)", 21),
    "log10": _float("log({0}) * real(0.4342944819032518)", 21), "log_sigmoid": _float("smaller({0}, real(0.0)) - log1p(exp(-magnitude({0})))", 48),
    "frac": _float("{0} - inward({0})", 2), "relu6": _float("clipped({0}, real(0.0), real(6.0))", 2),
    "hardsigmoid": _float("clipped({0} + real(3.0), real(0.0), real(6.0)) * real(0.16666666666666666)", 4),
    "hardswish": _float("{0} * (clipped({0} + real(3.0), real(0.0), real(6.0)) * real(0.16666666666666666))", 5),
    "isnan": lambda c: call("{0} != {0}", "b", c.term("self", "f")), "isinf": lambda c: call("magnitude({0}) == real(inf)", "b", c.term("self", "f")),
    "isfinite": lambda c: call("magnitude({0}) < real(inf)", "b", c.term("self", "f")),
    "logical_not": lambda c: call("not {0}", "b", c.term("self", "b")),
}  # fmt: skip
for _name, _sign in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
    ROWS[_name] = lambda c, sign=_sign: call(f"{{0}} {sign} {{1}}", "b", *_numbers(c))
for _names, _text, _sign in ((("logical_and", "bitwise_and", "__and__"), "{1} if {0} else False", "&"),
                             (("logical_or", "bitwise_or", "__or__"), "True if {0} else {1}", "|"),
                             (("logical_xor", "bitwise_xor", "__xor__"), "not {1} if {0} else {1}", "^")):  # fmt: skip
    for _name in _names:
        _sign_of_bits = "" if _name.startswith("logical") else _sign
        ROWS[_name] = lambda c, text=_text, sign=_sign_of_bits: _bits(c, text, sign)


def _bits(c: Call, text: str, sign: str) -> Term:
    """Of truths, or, where there is a sign, of the bits of whole numbers."""
    if sign and c.family == "i":
        return call(f"{{0}} {sign} {{1}}", "i", c.term("self"), c.term("other"))
    if c.family != "b":
        raise Unfit("bits of floats")
    return call(text, "b", *(cast(c.term(n, _own(c.named[n])), "b") for n in ("self", "other")))


def _own(value: Term | float) -> str:
    return value.family if isinstance(value, Term) else "b" if isinstance(value, bool) else "i" if isinstance(value, int) else "f"


@_row("bitwise_not")
def _inverted(c: Call) -> Term:
    return call("not {0}", "b", c.term("self")) if c.family == "b" else call("-1 - {0}", "i", c.term("self", "i"))


def _numbers(c: Call) -> list[Term]:
    return [cast(t, "i") if t.family == "b" else t for t in c.together("self", "other")]


def _binary(sign: str, swap: bool = False, cost: float = 1.0) -> Rule:
    def rule(c: Call) -> Term:
        if c.family == "b" or c["rounding_mode"] is not None:
            raise Unfit("arithmetic of this kind")
        x, y = c.term("self"), c.term("other")
        if c["alpha"] not in (None, 1):
            x, y = (mul(x, constant(c["alpha"], c.family)), y) if swap else (x, mul(y, constant(c["alpha"], c.family)))
        x, y = (y, x) if swap else (x, y)
        return call(f"{{0}} {sign} {{1}}", c.family, x, y, cost=cost)

    return rule


# rsub(self, other) is other - alpha * self
ROWS |= {"add": _binary("+"), "sub": _binary("-"), "rsub": _binary("-", swap=True), "mul": _binary("*")}


@_row("div", "true_divide")
def _division(c: Call) -> Term:
    if c["rounding_mode"] is not None:
        raise Unfit("division that rounds")
    return call("{0} / {1}", "f", c.term("self", "f"), c.term("other", "f"), cost=4.0)


def _extreme(function: str, sign: str) -> Rule:
    def rule(c: Call) -> Term:
        if c.family == "b":
            raise Unfit("an extreme of truths")
        return call(f"{function}({{0}}, {{1}})" if c.family == "f" else f"{{0}} if {{0}} {sign} {{1}} else {{1}}", c.family, c.term("self"), c.term("other"))

    return rule


ROWS |= {"maximum": _extreme("larger", ">"), "minimum": _extreme("smaller", "<")}


@_row("remainder")
def _remainder(c: Call) -> Term:
    n = c["other"]
    if c.family != "i" or not isinstance(n, int) or n <= 0:
        raise Unfit("a remainder but of whole numbers by a constant")
    return call(f"({{0}} % {n} + {n}) % {n}", "i", c.term("self"), cost=40.0)  # whichever way % rounds


@_row("floor_divide")
def _floor_divide(c: Call) -> Term:
    n = c["other"]
    if c.family != "i" or not isinstance(n, int) or n <= 0:
        raise Unfit("a division that rounds but of whole numbers by a constant")
    return call(f"({{0}} - ({{0}} % {n} + {n}) % {n}) // {n}", "i", c.term("self"), cost=60.0)


@_row("sign", "sgn")
def _sign_of(c: Call) -> Term:
    zero, one = constant(0, c.family), constant(1, c.family)
    less = call("-{0}", c.family, one)
    return call("{2} if {0} > {1} else ({3} if {0} < {1} else {1})", c.family, c.term("self"), zero, one, less, cost=2.0)


@_row("round")
def _round(c: Call) -> Term:
    if c["decimals"] not in (None, 0):
        raise Unfit("decimals are rounded")
    return call("even({0})", "f", c.term("self", "f"))


@_row("pow")
def _power(c: Call) -> Term:
    x, n = c.named["self"], c["exponent"]
    if c.family != "f" or isinstance(n, Term) or not isinstance(x, Term):
        raise Unfit("a power that is no constant of a float")
    x = cast(x, "f")
    rules = {4: lambda: squared(squared(x)), 1.5: lambda: mul(x, root(x)), -1.5: lambda: inverse(mul(x, root(x))), 2: lambda: squared(x), 3: lambda: call("{0} * {0} * {0}", "f", x, cost=2.0), 0.5: lambda: root(x), 1: lambda: x,
             -0.5: lambda: inverse(root(x)), -1: lambda: inverse(x), -2: lambda: inverse(squared(x))}  # fmt: skip
    if n not in rules:
        raise Unfit(f"the power {n}")
    return rules[n]()


@_row("gelu")
def _gelu(c: Call) -> Term:
    name = "gelu_tanh" if c["approximate"] == "tanh" else "gelu"
    return call(f"{name}({{0}})", "f", c.term("self", "f"), cost=20.0)


@_row("leaky_relu")
def _leaky(c: Call) -> Term:
    return call("{0} * {1} if {0} < real(0.0) else {0}", "f", c.term("self", "f"), constant(c["negative_slope"], "f"), cost=2.0)


@_row("_prelu_kernel")
def _prelu(c: Call) -> Term:
    return call("{0} if {0} > real(0.0) else {0} * {1}", "f", c.term("self", "f"), c.term("weight", "f"), cost=2.0)


@_row("elu")
def _elu(c: Call) -> Term:
    if c["input_scale"] not in (None, 1):
        raise Unfit("elu with an input scale")
    alpha, scale = (constant(1 if c[n] is None else c[n], "f") for n in ("alpha", "scale"))
    text = "{0} * {2} if {0} > real(0.0) else expm1({0} if {0} < real(0.0) else real(0.0)) * {1} * {2}"
    return call(text, "f", c.term("self", "f"), alpha, scale, cost=22.0)


@_row("hardtanh", "clamp", "clip", "clamp_min", "clamp_max")
def _clamp(c: Call) -> Term:
    low, high = (next((c[n] for n in names if c[n] is not None), None) for names in (("min", "min_val"), ("max", "max_val")))
    if c.family == "b":
        raise Unfit("a clamp of truths")
    if c.family == "f" and not isinstance(low, Term) and not isinstance(high, Term):
        bounds = [constant(v, "f") for v in (-math.inf if low is None else low, math.inf if high is None else high)]
        return call("clipped({0}, {1}, {2})", "f", c.term("self"), *bounds, cost=2.0)
    y = c.term("self")
    for bound, function, sign in ((low, "larger", ">"), (high, "smaller", "<")):
        if bound is not None:
            bound = cast(bound, c.family) if isinstance(bound, Term) else constant(bound, c.family)
            y = call(f"{function}({{0}}, {{1}})" if c.family == "f" else f"{{0}} if {{0}} {sign} {{1}} else {{1}}", c.family, y, bound)
    return y


@_row("where")
def _where(c: Call) -> Term:
    return call("{1} if {0} else {2}", c.family, c.term("condition", "b"), c.term("self"), c.term("other"))


@_row("masked_fill")
def _masked_fill(c: Call) -> Term:
    return call("{1} if {0} else {2}", c.family, c.term("mask", "b"), c.term("value"), c.term("self"))


@_row("addcmul")
def _addcmul(c: Call) -> Term:
    x, y, z = (c.term(n, "f") for n in ("self", "tensor1", "tensor2"))
    return add(x, mul(mul(y, z), constant(1 if c["value"] is None else c["value"], "f")))


@_row("addcdiv")
def _addcdiv(c: Call) -> Term:
    x, y, z = (c.term(n, "f") for n in ("self", "tensor1", "tensor2"))
    return add(x, mul(call("{0} / {1}", "f", y, z, cost=4.0), constant(1 if c["value"] is None else c["value"], "f")))


@_row("lerp")
def _lerp(c: Call) -> Term:
    x, y, w = c.term("self", "f"), c.term("end", "f"), c.term("weight", "f")
    return call("{0} + {2} * ({1} - {0}) if magnitude({2}) < real(0.5) else {1} - ({1} - {0}) * (real(1.0) - {2})", "f", x, y, w, cost=6.0)


@_row("softplus")
def _softplus(c: Call) -> Term:
    x = c.term("self", "f")
    beta, limit = (constant(d if c[n] is None else c[n], "f") for n, d in (("beta", 1), ("threshold", 20)))
    return call("{0} if {0} * {1} > {2} else log1p(exp({0} * {1})) / {1}", "f", x, beta, limit, cost=50.0)


@_row("mish")
def _mish(c: Call) -> Term:
    return call("{0} * tanh({0} if {0} > real(20.0) else log1p(exp({0})))", "f", c.term("self", "f"), cost=64.0)


@_row("threshold")
def _threshold(c: Call) -> Term:
    return call("{2} if {0} <= {1} else {0}", c.family, c.term("self"), c.term("threshold"), c.term("value"))


@_row("to", "_to_copy", "clone", "contiguous", "type_as", "alias", "lift_fresh_copy", "detach")
def _same(c: Call) -> Term:
    return c.term("self")


