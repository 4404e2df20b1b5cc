"""Arithmetic with fewer or cheaper ops that gives the same bits, or rounds once where it rounded twice.

What is left alone: ``x / 3`` (a product with 1/3 rounds differently), ``(x + a) - b`` (rounding away digits may be meant), factors
of which one grows and the other shrinks (what overflowed in between, or vanished, no longer would).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from graphwright.ir import Program, op_name, site_of
from graphwright.manager import Pass, PassResult
from graphwright.passes._nodes import (
    base,
    escapes,
    is_number,
    is_op,
    is_tensor,
    only_user,
    same_kind,
    same_layout,
    sweep,
    val,
)

aten = torch.ops.aten

#: A rule gives the node that stands for ``node`` afterwards, or the reason why not, or None where it has no say.
Rule = Callable[[Program, fx.Node], fx.Node | str | None]


@dataclass(frozen=True)
class SimplifyArithmetic(Pass):
    """Cancel double negations, join constants, turn squares and exact quotients into products, drop what changes nothing twice."""

    name = "simplify-arithmetic"

    def run(self, program: Program) -> PassResult:
        result, known = PassResult(), set(program.nodes)
        for node in program.nodes:
            rule = RULES.get(base(node))
            if rule is None or not is_tensor(node) or not val(node).dtype.is_floating_point or not self.selects(node.meta.get("sites") or ()):
                if rule is not None:
                    self.refused(result, node)
                continue
            with program.graph.inserting_before(node):
                new = rule(program, node)
            if isinstance(new, str):
                result.refuse(site_of(node), new)
            if not isinstance(new, fx.Node):
                continue
            result.change(site_of(node), f"{op_name(node.target).split('.')[1]} → {op_name(new.target).split('.')[1] if new.op == 'call_function' else new.name}")
            if new in known:
                node.replace_all_uses_with(new)
                program.graph.erase_node(node)
            else:
                known.add(new)
                program.replace(node, new)
        sweep(program, result)
        return result


def _same(program: Program, node: fx.Node, x: object) -> fx.Node | None:
    """``x`` where it may stand for ``node`` as it is."""
    if not is_tensor(x) or not same_kind(x, node) or not same_layout(x, node) or escapes(program, node):  # type: ignore[arg-type]
        return None
    return x  # type: ignore[return-value]


def _neg(program: Program, node: fx.Node) -> fx.Node | str | None:
    x = node.args[0]
    return _same(program, node, x.args[0]) if is_op(x, "aten.neg") else None  # type: ignore[union-attr]


def _twice(program: Program, node: fx.Node) -> fx.Node | str | None:
    """relu of relu, abs of abs."""
    x = node.args[0]
    if is_op(x, base(node)):
        return _same(program, node, x)
    if is_op(node, "aten.abs") and is_op(x, "aten.neg"):
        return program.call(aten.abs.default, x.args[0], like=node)  # type: ignore[union-attr]
    return None


def _pow(program: Program, node: fx.Node) -> fx.Node | str | None:
    x, exponent = node.args[:2]
    if not is_tensor(x) or not is_number(exponent) or not same_kind(x, node):  # type: ignore[arg-type]
        return None
    if exponent == 2:
        return program.call(aten.mul.Tensor, x, x, like=node)
    other = {0.5: aten.sqrt.default, -1: aten.reciprocal.default, -0.5: aten.rsqrt.default}.get(exponent)  # type: ignore[call-overload]
    return None if other is None else program.call(other, x, like=node)


def _mul(program: Program, node: fx.Node) -> fx.Node | str | None:
    x, factor = node.args[:2]
    if not is_number(factor) or not is_tensor(x) or not same_kind(x, node):  # type: ignore[arg-type]
        return None
    if is_op(x, "aten.neg"):
        return program.call(aten.mul.Tensor, x.args[0], -factor, like=node)  # type: ignore[operator, union-attr]
    if not is_op(x, "aten.mul") or not is_number(x.args[1]) or not same_kind(x.args[0], x):  # type: ignore[union-attr, arg-type]
        return None
    return _joined(program, node, float(x.args[1]), float(factor), float(x.args[1]) * float(factor), aten.mul.Tensor)  # type: ignore[union-attr, arg-type]


def _joined(program: Program, node: fx.Node, a: float, b: float, both: float, op: torch._ops.OpOverload) -> fx.Node | str | None:
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    info = torch.finfo(val(node).dtype)
    if only_user(x) is not node:
        return f"{site_of(x)} is read elsewhere too"
    if is_op(node, "aten.mul"):
        if not (min(abs(a), abs(b)) >= 1 or max(abs(a), abs(b)) <= 1):
            return "one factor grows what the other shrinks: in between it might overflow or vanish"
        if not (info.tiny <= abs(both) <= info.max):
            return f"the product of the factors is out of the range of {val(node).dtype}"
    elif a * b < 0:
        return "two constants of opposite signs: what the first rounds away may be meant"
    elif not abs(both) <= info.max:
        return f"the sum of the constants is out of the range of {val(node).dtype}"
    return program.call(op, x.args[0], both, like=node)


def _div(program: Program, node: fx.Node) -> fx.Node | str | None:
    x, by = node.args[:2]
    if not is_number(by) or not is_tensor(x) or node.kwargs.get("rounding_mode") is not None or not same_kind(x, node):  # type: ignore[arg-type]
        return None
    if by == 0 or not math.isfinite(by) or abs(math.frexp(by)[0]) != 0.5:  # type: ignore[arg-type]
        return None
    info, factor = torch.finfo(val(node).dtype), 1.0 / float(by)  # type: ignore[arg-type]
    if not (info.tiny <= abs(factor) <= info.max and info.tiny <= abs(float(by)) <= info.max):  # type: ignore[arg-type]
        return f"1/{by} is out of the range of {val(node).dtype}"
    return program.call(aten.mul.Tensor, x, factor, like=node)


def _add(program: Program, node: fx.Node) -> fx.Node | str | None:
    x, other = node.args[:2]
    if node.kwargs.get("alpha", 1) != 1 or not is_tensor(x):
        return None
    if is_tensor(other):
        turned = aten.sub.Tensor if is_op(node, "aten.add") else aten.add.Tensor
        if is_op(other, "aten.neg"):
            return program.call(turned, x, other.args[0], like=node)  # type: ignore[union-attr]
        if is_op(x, "aten.neg") and is_op(node, "aten.add"):
            return program.call(aten.sub.Tensor, other, x.args[0], like=node)  # type: ignore[union-attr]
        return None
    plain = is_op(x, "aten.add", "aten.sub") and x.kwargs.get("alpha", 1) == 1 and is_number(x.args[1]) and is_number(other)  # type: ignore[union-attr]
    if not plain or not same_kind(x, node) or not same_kind(x.args[0], x):  # type: ignore[union-attr, arg-type]
        return None
    a = float(x.args[1]) * (1 if is_op(x, "aten.add") else -1)  # type: ignore[union-attr, arg-type]
    b = float(other) * (1 if is_op(node, "aten.add") else -1)  # type: ignore[arg-type]
    return _joined(program, node, a, b, a + b, aten.add.Tensor)


RULES: dict[str, Rule] = {
    "aten.neg": _neg,
    "aten.relu": _twice,
    "aten.abs": _twice,
    "aten.pow": _pow,
    "aten.mul": _mul,
    "aten.div": _div,
    "aten.add": _add,
    "aten.sub": _add,
}
