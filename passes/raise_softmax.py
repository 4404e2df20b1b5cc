"""Recognise softmax and log softmax written out in exponentials and sums."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphwright.ir import Program, args_by_name, site_of
from graphwright.manager import Pass, PassResult
from graphwright.passes._algebra import enclosed, sites_in
from graphwright.passes._nodes import is_number, is_op, is_tensor, same_shape, sweep, val

aten = torch.ops.aten


@dataclass
class _Softmax:
    """What was found: what it reads, over which axis, whether the logarithm is wanted, and the ops in between."""

    x: fx.Node
    dim: int
    log: bool
    cone: set[fx.Node] = field(default_factory=set)


@dataclass(frozen=True)
class RaiseSoftmax(Pass):
    """Turn written-out softmax and log softmax into the op.

    ``e / e.sum(dim, keepdim=True)`` with ``e = exp(x - c)``, where c is anything that is one number along ``dim`` (the maximum,
    mostly, or nothing); the same with the reciprocal; ``exp(log_softmax(x))``; ``x - logsumexp(x)``. What overflows without a
    maximum that is taken off gives the right numbers afterwards.
    """

    name = "raise-softmax"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for node in program.nodes:
            if node._erased or not is_tensor(node):
                continue
            found = _read(node)
            if isinstance(found, str):
                result.refuse(site_of(node), f"it spells softmax, but {found}")
            if not isinstance(found, _Softmax) or self.refused(result, node):
                continue
            if reason := _reason(node, found):
                result.refuse(site_of(node), f"it spells softmax, but {reason}")
                continue
            op, inputs = aten.log_softmax.int if found.log else aten.softmax.int, node.all_input_nodes
            with program.graph.inserting_before(node):
                new = program.call(op, found.x, found.dim, sites=sites_in(found.cone), like=node)
            result.change(site_of(node), f"{len(found.cone)} ops → {'log_softmax' if found.log else 'softmax'}")
            program.replace(node, new)
            program.prune(inputs)
        if result.changes:
            sweep(program, result)
        return result


def _reason(node: fx.Node, found: _Softmax) -> str | None:
    if not val(found.x).dtype.is_floating_point or val(found.x).dtype != val(node).dtype or not same_shape(found.x, node):
        return "it changes dtype or shape on the way"
    return enclosed(node, found.cone - {node})


def _read(node: fx.Node) -> _Softmax | str | None:
    if is_op(node, "aten.div", "aten.mul"):
        return _quotient(node)
    if is_op(node, "aten.exp") and is_op(node.args[0], "aten.log_softmax", "aten._log_softmax"):
        inner = node.args[0]
        assert isinstance(inner, fx.Node) and isinstance(inner.args[0], fx.Node)
        given = args_by_name(inner)
        return _Softmax(inner.args[0], given["dim"], False, {node, inner}) if given.get("dtype") is None else None
    if is_op(node, "aten.sub") and node.kwargs.get("alpha", 1) == 1 and isinstance(node.args[0], fx.Node):
        cone: set[fx.Node] = {node}
        total = _spread(node.args[1], cone)
        if total is not None and is_op(total[0], "aten.logsumexp") and total[0].args[0] is node.args[0]:
            return _over(node, total, _Softmax(node.args[0], 0, True, cone))
    return None


def _quotient(node: fx.Node) -> _Softmax | str | None:
    """``exp(z) / sum(exp(z))``, or that times the reciprocal of the sum."""
    cone: set[fx.Node] = {node}
    pairs: list[tuple[Any, Any]] = [(node.args[0], node.args[1])]
    if is_op(node, "aten.mul"):
        pairs = [(a, b.args[0]) for a, b in (node.args[:2], node.args[1::-1]) if is_op(b, "aten.reciprocal")]
        cone |= {b for b in node.args[:2] if is_op(b, "aten.reciprocal")}  # type: ignore[misc]
    elif node.kwargs.get("rounding_mode") is not None:
        return None
    for top, bottom in pairs:
        total = _spread(bottom, cone)
        if total is None or not is_op(total[0], "aten.sum") or not is_op(top, "aten.exp"):
            continue
        summed = total[0].args[0]
        if summed is not top and not (is_op(summed, "aten.exp") and summed.args[0] is top.args[0]):
            continue
        if args_by_name(total[0]).get("dtype") not in (None, val(top).dtype):
            return "it sums in another dtype"
        cone |= {top, summed}
        return _over(node, total, _Softmax(top.args[0], 0, False, cone))
    return None


def _spread(node: object, cone: set[fx.Node]) -> tuple[fx.Node, int | None] | None:
    """A reduction whose axis is kept, or put back by ``unsqueeze``: the reduction, and where the axis was put back."""
    at = None
    if is_op(node, "aten.unsqueeze"):
        assert isinstance(node, fx.Node)
        cone.add(node)
        node, at = node.args[0], node.args[1]  # type: ignore[assignment]
    if not is_op(node, "aten.sum", "aten.logsumexp") or not is_tensor(node):
        return None
    assert isinstance(node, fx.Node)
    cone.add(node)
    return node, at


def _over(node: fx.Node, total: tuple[fx.Node, int | None], found: _Softmax) -> _Softmax | str | None:
    """The axis of the reduction, and what lies before a shift along it."""
    reduction, at = total
    rank, given = val(node).ndim, args_by_name(reduction)
    axes = given.get("dim")
    axes = [axes] if isinstance(axes, int) else list(axes or range(rank))
    if len(axes) != 1 or not rank:
        return f"it sums over {len(axes)} axes"
    dim = axes[0] % rank
    kept = given.get("keepdim", False)
    if kept == (at is not None) or at is not None and at % rank != dim:
        return None  # it broadcasts along another axis than the one summed over
    found.dim = dim
    if not found.log:
        found.x = _unshifted(found.x, dim, found.cone)
    return found


def _unshifted(z: fx.Node, dim: int, cone: set[fx.Node]) -> fx.Node:
    """``x`` where ``z = x - c`` and c is one number along ``dim``, which softmax does not see; z itself otherwise."""
    if not is_op(z, "aten.sub") or not isinstance(z.args[0], fx.Node) or not same_shape(z.args[0], z):
        return z
    x, c = z.args[0], z.args[1]
    flat = is_number(c) or is_tensor(c) and (val(c).ndim < val(z).ndim - dim or val(c).shape[dim - val(z).ndim] == 1)  # type: ignore[arg-type]
    readers_inside = all(u in cone for u in z.users)
    if not flat or not readers_inside or val(x).dtype != val(z).dtype:
        return z
    cone.add(z)
    return x
