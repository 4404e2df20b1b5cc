"""Recognise activations written out in arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import Program, args_by_name, site_of
from graphwright.manager import Pass, PassResult
from graphwright.passes._algebra import affine, close, enclosed, is_polynomial, polynomial, product, sites_in, uniform
from graphwright.passes._nodes import is_op, is_tensor, sweep, val

aten = torch.ops.aten
_TANH = {1: math.sqrt(2 / math.pi), 3: math.sqrt(2 / math.pi) * 0.044715}
_ERF = {1: math.sqrt(0.5)}

#: The op, its keyword arguments, its input, and the ops it replaces.
Found = tuple[Any, dict[str, Any], fx.Node, set[fx.Node]]


@dataclass(frozen=True)
class RaiseActivations(Pass):
    """Turn written-out gelu (erf, tanh and sigmoid forms), silu, hardswish, hardsigmoid and mish into the op."""

    name = "raise-activations"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for node in program.nodes:
            if node._erased or not is_op(node, "aten.mul", "aten.div") or not is_tensor(node):
                continue
            found = next(_spelled(node), None) if val(node).dtype.is_floating_point else None
            if found is None or self.refused(result, node):
                continue
            op, options, x, cone = found
            name = op._schema.name.split("::")[1]
            if not uniform(x, cone):
                result.refuse(site_of(node), f"it spells {name}, but changes dtype or shape on the way")
            elif reason := enclosed(node, cone):
                result.refuse(site_of(node), f"it spells {name}, but {reason}")
            else:
                slope = options.pop("slope", 1.0)
                with program.graph.inserting_before(node):
                    if slope != 1.0:  # x * sigmoid(a x) is silu(a x) / a, whose factors go into the linears beside it
                        x = program.call(aten.mul.Tensor, x, slope, sites=sites_in(cone))
                    new = program.call(op, x, sites=sites_in(cone), like=node, **options)
                    if slope != 1.0:
                        new = program.call(aten.div.Tensor, new, slope, sites=sites_in(cone), like=node)
                result.change(site_of(node), f"{len(cone)} ops → {name}")
                inputs = node.all_input_nodes
                program.replace(node, new)
                program.prune(inputs)  # the next one must not find them among its readers
        if result.changes:
            sweep(program, result)
        return result


def _spelled(root: fx.Node) -> Iterator[Found]:
    """Which activation the product ``root`` computes, if any."""
    cone: set[fx.Node] = set()
    number, leaves = product(root, cone)
    if len(leaves) == 1 and close(number, 1 / 6) and (x := _relu6_of_x_plus_3(leaves[0], cone)) is not None:
        yield aten.hardsigmoid.default, {}, x, cone
    if len(leaves) != 2:
        return
    for x, gate in (leaves, leaves[::-1]):
        seen = set(cone)
        if close(number, 1) and is_op(gate, "aten.sigmoid") and gate.args[0] is x:
            yield aten.silu.default, {}, x, seen | {gate}
        elif close(number, 1) and is_op(gate, "aten.sigmoid") and (slope := _slope(gate.args[0], x, seen)):
            yield aten.silu.default, {"slope": slope}, x, seen | {gate}
        elif close(number, 1) and is_op(gate, "aten.hardsigmoid") and gate.args[0] is x:
            yield aten.hardswish.default, {}, x, seen | {gate}
        elif close(number, 1 / 6) and _relu6_of_x_plus_3(gate, seen) is x:
            yield aten.hardswish.default, {}, x, seen
        elif close(number, 1) and is_op(gate, "aten.tanh") and _softplus_of(gate.args[0], x):
            yield aten.mish.default, {}, x, seen | {gate, gate.args[0]}  # type: ignore[arg-type]
        else:
            yield from _gelu(x, gate, number, seen)


def _slope(scaled: Any, x: fx.Node, cone: set[fx.Node]) -> float | None:
    """``a`` where ``scaled`` is ``a * x`` with a positive number: quick gelu has 1.702."""
    found = polynomial(scaled, x, cone)
    return found[1] if found is not None and set(found) == {1} and found[1] > 0 else None


def _gelu(x: fx.Node, gate: fx.Node, number: float, cone: set[fx.Node]) -> Iterator[Found]:
    parts = affine(gate, cone)
    if parts is None or not (close(number * parts[0], 0.5) and close(number * parts[1], 0.5)):
        return
    curve = parts[2]
    for op, wanted, form in (("aten.erf", _ERF, "none"), ("aten.tanh", _TANH, "tanh")):
        if is_op(curve, op) and is_polynomial(curve.args[0], x, wanted, cone):
            yield aten.gelu.default, {"approximate": form}, x, cone | {curve}


def _relu6_of_x_plus_3(node: fx.Node, cone: set[fx.Node]) -> fx.Node | None:
    if not is_op(node, "aten.relu6", "aten.hardtanh", "aten.clamp"):
        return None
    given = args_by_name(node)
    low, high = given.get("min_val", given.get("min", 0)), given.get("max_val", given.get("max", 6))
    shifted = node.args[0]
    if (low, high) != (0, 6) or not is_op(shifted, "aten.add"):
        return None
    for x in shifted.args[:2]:
        if isinstance(x, fx.Node) and is_polynomial(shifted, x, {1: 1.0, 0: 3.0}, cone):
            cone.add(node)
            return x
    return None


def _softplus_of(node: Any, x: fx.Node) -> bool:
    if not is_op(node, "aten.softplus") or node.args[0] is not x:
        return False
    given = args_by_name(node)
    return given["beta"] == 1 and given["threshold"] >= 20
