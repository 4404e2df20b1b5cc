"""What ATen's ops compute, element by element: the vocabulary of generated kernels.

An op becomes a small tree of ``Term`` over its operands: primitive scalar operations, and sums and maxima over the last axis.
``ROWS`` has a rule per op: it takes a ``Maker`` and the op's arguments by name, and gives the term of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

#: What a term may be, by dtype: float32 arithmetic, whole numbers (held in 64 bits), or true and false.
FAMILY = {torch.float32: "f", torch.bool: "b", torch.int64: "i", torch.int32: "i", torch.int8: "i", torch.uint8: "i"}
#: The same where halves are read and written too.
WITH_HALVES = FAMILY | {torch.float16: "f", torch.bfloat16: "f"}


class Unfit(Exception):
    """A region that no kernel can be generated for; says why."""


@dataclass(frozen=True, eq=False)
class Term:
    """A number at each element of a region, or one for each of its rows.

    Attributes:
        op: ``"read"``, ``"constant"``, ``"call"``, ``"sum"``, ``"max"`` or ``"cat"``.
        family: ``"f"``, ``"i"`` or ``"b"``.
        args: terms. ``text`` is a format of their names; of a read, the number of the operand; of a constant, how it is written.
        cost: what it takes beyond its operands, an addition being 1.
        bounds: of ``cat``: where each operand begins, and the end.
    """

    op: str
    family: str
    args: tuple[Term, ...] = ()
    text: str = ""
    cost: float = 0.0
    bounds: tuple[int, ...] = ()


def constant(value: Any, family: str) -> Term:
    """A number that is known now."""
    if family == "f":
        value = float(value)
        said = repr(value) if math.isfinite(value) else ("nan" if math.isnan(value) else "inf" if value > 0 else "-inf")
        return Term("constant", "f", text=f"real({said})")
    if family == "b":
        return Term("constant", "b", text=str(bool(value)))
    if isinstance(value, float) and not value.is_integer():
        raise Unfit(f"{value} among whole numbers")
    return Term("constant", "i", text=str(int(value)))


def call(text: str, family: str, *args: Term, cost: float = 1.0) -> Term:
    """A scalar operation: ``text`` with ``{0}``, ``{1}`` for the names of its operands."""
    return Term("call", family, args, text, cost=cost)


def cast(x: Term, family: str) -> Term:
    """The same number in another family."""
    if x.family == family:
        return x
    if x.op == "constant" and x.family != "b":
        return constant(float(x.text[5:-1]) if x.family == "f" else int(x.text), family)
    text = {"bf": "(real(1.0) if {0} else real(0.0))", "bi": "(1 if {0} else 0)", "if": "real({0})", "ib": "{0} != 0",
            "fb": "is_not_zero({0}) != 0"}.get(x.family + family)  # fmt: skip
    if text is None:
        raise Unfit("a float becomes a whole number")
    return call(text, family, x)


def add(x: Term, y: Term) -> Term:
    return call("{0} + {1}", x.family, x, y)


def mul(x: Term, y: Term) -> Term:
    return call("{0} * {1}", x.family, x, y)


def total(x: Term) -> Term:
    """The sum over a row."""
    return Term("sum", "f", (cast(x, "f"),), cost=1.0)


def top(x: Term) -> Term:
    """The largest number of a row."""
    if x.family != "f":
        raise Unfit("a maximum of numbers that are no floats")
    return Term("max", "f", (x,), cost=1.0)


def mean(x: Term, columns: int, less: int = 0) -> Term:
    if columns - less <= 0:
        raise Unfit("a mean of no numbers")
    return mul(total(x), constant(1.0 / (columns - less), "f"))


def centred(x: Term, columns: int) -> Term:
    return call("{0} - {1}", "f", cast(x, "f"), mean(x, columns))


def squared(x: Term) -> Term:
    return call("{0} * {0}", x.family, x)


def root(x: Term) -> Term:
    return call("root({0})", "f", x, cost=6.0)


def inverse(x: Term) -> Term:
    return call("real(1.0) / {0}", "f", x, cost=4.0)


@dataclass(frozen=True)
class Call:
    """One op of a region, its arguments by name: terms for tensors, plain values else.

    Attributes:
        family: of its result.
        columns: length of the last axis of what it reads.
        rank: axes of its first operand.
    """

    named: dict[str, Any]
    family: str
    columns: int
    rank: int

    def __getitem__(self, name: str) -> Any:
        return self.named.get(name)

    def term(self, name: str, family: str | None = None) -> Term:
        """An argument as a term, in the result's family unless another is asked for."""
        value, family = self.named[name], family or self.family
        return cast(value, family) if isinstance(value, Term) else constant(value, family)

    def together(self, *names: str) -> list[Term]:
        """Arguments in the family that can hold all of them."""
        values = [self.named[n] for n in names]
        kinds = {v.family if isinstance(v, Term) else "b" if isinstance(v, bool) else "i" if isinstance(v, int) else "f" for v in values}
        family = next(f for f in "fib" if f in kinds)
        return [self.term(n, family) for n in names]

    def last_axis(self, dims: Any) -> None:
        """Refuse a reduction over other axes than the last."""
        dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
        if dims != [-1] and dims != [self.rank - 1]:
            raise Unfit(f"a reduction over axes {dims} of {self.rank}")


Rule = Callable[[Call], Term]
ROWS: dict[str, Rule] = {}


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
    "floor": _float("down({0})", 1), "relu6": _float("clipped({0}, real(0.0), real(6.0))", 2),
    "hardsigmoid": _float("clipped({0} + real(3.0), real(0.0), real(6.0)) * real(0.16666666666666666)", 4),
    "hardswish": _float("{0} * (clipped({0} + real(3.0), real(0.0), real(6.0)) * real(0.16666666666666666))", 5),
    "logical_not": lambda c: call("not {0}", "b", c.term("self", "b")),
}  # fmt: skip
for _name, _sign in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
    ROWS[_name] = lambda c, sign=_sign: call(f"{{0}} {sign} {{1}}", "b", *_numbers(c))
for _names, _text in ((("logical_and", "bitwise_and", "__and__"), "{1} if {0} else False"),
                      (("logical_or", "bitwise_or", "__or__"), "True if {0} else {1}")):  # fmt: skip
    ROWS.update(dict.fromkeys(_names, lambda c, text=_text: call(text, "b", *_truths(c))))


def _numbers(c: Call) -> list[Term]:
    return [cast(t, "i") if t.family == "b" else t for t in c.together("self", "other")]


def _truths(c: Call) -> list[Term]:
    if c.family != "b":
        raise Unfit("bits of whole numbers")
    return [c.term("self", "b"), c.term("other", "b")]


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


ROWS["maximum"] = lambda c: call("larger({0}, {1})", "f", *_floats(c))
ROWS["minimum"] = lambda c: call("smaller({0}, {1})", "f", *_floats(c))


def _floats(c: Call) -> list[Term]:
    if c.family != "f":
        raise Unfit("an extreme of numbers that are no floats")
    return [c.term("self"), c.term("other")]


@_row("pow")
def _power(c: Call) -> Term:
    x, n = c.named["self"], c["exponent"]
    if c.family != "f" or isinstance(n, Term) or not isinstance(x, Term):
        raise Unfit("a power that is no constant of a float")
    x = cast(x, "f")
    rules = {2: lambda: squared(x), 3: lambda: call("{0} * {0} * {0}", "f", x, cost=2.0), 0.5: lambda: root(x), 1: lambda: x,
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


@_row("elu")
def _elu(c: Call) -> Term:
    if c["input_scale"] not in (None, 1):
        raise Unfit("elu with an input scale")
    alpha, scale = (constant(c[n], "f") for n in ("alpha", "scale"))
    text = "{0} * {2} if {0} > real(0.0) else expm1({0} if {0} < real(0.0) else real(0.0)) * {1} * {2}"
    return call(text, "f", c.term("self", "f"), alpha, scale, cost=22.0)


@_row("hardtanh", "clamp", "clip", "clamp_min", "clamp_max")
def _clamp(c: Call) -> Term:
    low, high = (next((c[n] for n in names if c[n] is not None), None) for names in (("min", "min_val"), ("max", "max_val")))
    if c.family != "f" or isinstance(low, Term) or isinstance(high, Term):
        raise Unfit("a clamp that is no constant of a float")
    bounds = [constant(v, "f") for v in (-math.inf if low is None else low, math.inf if high is None else high)]
    return call("clipped({0}, {1}, {2})", "f", c.term("self"), *bounds, cost=2.0)


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


@_row("to", "_to_copy", "clone", "contiguous", "type_as", "alias", "lift_fresh_copy", "detach")
def _same(c: Call) -> Term:
    return c.term("self")


#: Ops whose result has fewer elements than what they read.
REDUCTIONS = ("sum", "mean", "amax", "amin", "var")

# -- over the last axis ----------------------------------------------------------------------------------------------


@_row("sum")
def _sum(c: Call) -> Term:
    c.last_axis(c["dim"])
    if c.family != "f":
        raise Unfit("a sum of whole numbers")
    return total(c.term("self"))


@_row("mean")
def _mean(c: Call) -> Term:
    c.last_axis(c["dim"])
    return mean(c.term("self", "f"), c.columns)


@_row("amax")
def _amax(c: Call) -> Term:
    c.last_axis(c["dim"])
    return top(c.term("self"))


@_row("amin")
def _amin(c: Call) -> Term:
    c.last_axis(c["dim"])
    return call("-{0}", "f", top(call("-{0}", "f", c.term("self"))))


@_row("var")
def _var(c: Call) -> Term:
    c.last_axis(c["dim"])
    unbiased = c["unbiased"] if "unbiased" in c.named else True
    less = c["correction"] if "correction" in c.named else int(unbiased)
    less = 1 if less is None else less
    if less != int(less):
        raise Unfit("a correction that is no whole number")
    return mean(squared(centred(c.term("self", "f"), c.columns)), c.columns, int(less))


@_row("softmax", "_softmax")
def _softmax(c: Call) -> Term:
    c.last_axis(c["dim"])
    x = c.term("self", "f")
    powers = call("tile.exp({0} - {1})", "f", x, top(x), cost=20.0)
    return mul(powers, inverse(total(powers)))


@_row("log_softmax", "_log_softmax")
def _log_softmax(c: Call) -> Term:
    c.last_axis(c["dim"])
    x = c.term("self", "f")
    below = call("{0} - {1}", "f", x, top(x))
    powers = call("tile.exp({0})", "f", below, cost=20.0)
    return call("{0} - log({1})", "f", below, total(powers), cost=1.0)


@_row("layer_norm")
def _layer_norm(c: Call) -> Term:
    if len(c["normalized_shape"]) != 1:
        raise Unfit("a norm over several axes")
    middle = centred(c.term("input", "f"), c.columns)
    variance = mean(squared(middle), c.columns)
    y = mul(middle, inverse(root(add(variance, constant(c["eps"], "f")))))
    y = y if c["weight"] is None else mul(y, c.term("weight"))
    return y if c["bias"] is None else add(y, c.term("bias"))


@_row("rms_norm")
def _rms_norm(c: Call) -> Term:
    if len(c["normalized_shape"]) != 1:
        raise Unfit("a norm over several axes")
    x = c.term("input", "f")
    eps = torch.finfo(torch.float32).eps if c["eps"] is None else c["eps"]
    y = mul(x, inverse(root(add(mean(squared(x), c.columns), constant(eps, "f")))))
    return y if c["weight"] is None else mul(y, c.term("weight"))
