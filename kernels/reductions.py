"""Formulas of ATen's ops that reduce: along any axes of what they read, which are a region's rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graphwright.kernels.trees import (
    Call,
    Rule,
    Term,
    Unfit,
    add,
    call,
    cast,
    centred,
    constant,
    inverse,
    mean,
    mul,
    root,
    squared,
    top,
    total,
)

#: Ops whose result has fewer elements than what they read.
REDUCTIONS = ("sum", "mean", "amax", "amin", "var", "std", "logsumexp", "linalg_vector_norm", "any", "all")
#: Ops that reduce, and give as many elements as they read.
_NORMS = {"layer_norm": "normalized_shape", "rms_norm": "normalized_shape", "softmax": "", "_softmax": "", "log_softmax": "", "_log_softmax": ""}

RULES: dict[str, Rule] = {}


def reduced(name: str, named: Mapping[str, Any], rank: int) -> tuple[int, ...] | None:
    """The axes that an op reduces what it reads over, ascending; None for an op that does not reduce.

    Args:
        rank: axes of its first operand.
    """
    if name not in REDUCTIONS and name not in _NORMS:
        return None
    if _NORMS.get(name):
        return tuple(range(rank - len(named["normalized_shape"]), rank))
    dims: Any = named.get("dim")
    dims = [] if dims is None else list(dims) if isinstance(dims, Sequence) else [dims]
    return tuple(sorted(d % rank for d in dims)) if dims else tuple(range(rank))


def _row(*names: str) -> Callable[[Rule], Rule]:
    def add_(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return add_


@_row("sum")
def _sum(c: Call) -> Term:
    if c.family != "f":
        raise Unfit("a sum of whole numbers")
    return total(c.term("self"))


@_row("mean")
def _mean(c: Call) -> Term:
    return mean(c.term("self", "f"), c.columns)


@_row("amax")
def _amax(c: Call) -> Term:
    return top(c.term("self"))


@_row("amin")
def _amin(c: Call) -> Term:
    return _lowest(c.term("self"))


def _lowest(x: Term) -> Term:
    if x.family != "f":
        raise Unfit("a minimum of numbers that are no floats")
    return call("-{0}", "f", top(call("-{0}", "f", x)))


@_row("any")
def _any(c: Call) -> Term:
    return call("{0} > real(0.0)", "b", top(cast(cast(c.term("self", _own(c)), "b"), "f")))


@_row("all")
def _all(c: Call) -> Term:
    return call("{0} > real(0.0)", "b", _lowest(cast(cast(c.term("self", _own(c)), "b"), "f")))


def _own(c: Call) -> str:
    return c.named["self"].family


@_row("var")
def _var(c: Call) -> Term:
    unbiased = c["unbiased"] if "unbiased" in c.named else True
    less = c["correction"] if "correction" in c.named else int(unbiased)
    less = 1 if less is None else less
    if less != int(less):
        raise Unfit("a correction that is no whole number")
    return mean(squared(centred(c.term("self", "f"), c.columns)), c.columns, int(less))


@_row("std")
def _std(c: Call) -> Term:
    return root(_var(c))


@_row("linalg_vector_norm")
def _vector_norm(c: Call) -> Term:
    x, order = c.term("self", "f"), 2 if c["ord"] is None else c["ord"]
    rules = {2: lambda: root(total(squared(x))), 1: lambda: total(_size(x)), math.inf: lambda: top(_size(x)), -math.inf: lambda: _lowest(_size(x))}
    if order not in rules:
        raise Unfit(f"a norm of order {order}")
    return rules[order]()


def _size(x: Term) -> Term:
    return call("magnitude({0})", "f", x)


@_row("logsumexp")
def _logsumexp(c: Call) -> Term:
    x = c.term("self", "f")
    most = top(x)
    # rows whose largest number is infinite give it back: nothing is subtracted from them
    most = call("({0} if magnitude({0}) < real(inf) else real(0.0)) if {0} == {0} else {0}", "f", most)
    return call("log({0}) + {1}", "f", total(call("exp({0} - {1})", "f", x, most, cost=21.0)), most, cost=21.0)


@_row("softmax", "_softmax")
def _softmax(c: Call) -> Term:
    x = c.term("self", "f")
    powers = call("tile.exp({0} - {1})", "f", x, top(x), cost=20.0)
    return mul(powers, inverse(total(powers)))


@_row("log_softmax", "_log_softmax")
def _log_softmax(c: Call) -> Term:
    x = c.term("self", "f")
    below = call("{0} - {1}", "f", x, top(x))
    powers = call("tile.exp({0})", "f", below, cost=20.0)
    return call("{0} - log({1})", "f", below, total(powers), cost=1.0)


@_row("layer_norm")
def _layer_norm(c: Call) -> Term:
    middle = centred(c.term("input", "f"), c.columns)
    variance = mean(squared(middle), c.columns)
    y = mul(middle, inverse(root(add(variance, constant(c["eps"], "f")))))
    y = y if c["weight"] is None else mul(y, c.term("weight"))
    return y if c["bias"] is None else add(y, c.term("bias"))


@_row("rms_norm")
def _rms_norm(c: Call) -> Term:
    x = c.term("input", "f")
    eps = torch.finfo(torch.float32).eps if c["eps"] is None else c["eps"]
    y = mul(x, inverse(root(add(mean(squared(x), c.columns), constant(eps, "f")))))
    return y if c["weight"] is None else mul(y, c.term("weight"))
