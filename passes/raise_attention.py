"""Recognise attention written out as two products and a softmax.

``softmax(scale * q @ kᵀ + mask, -1) @ v`` becomes ``aten.scaled_dot_product_attention``, so that lowering may choose
among ways to compute the whole. One difference is accepted: a query that may attend to nothing (a row of the mask that
is all -inf) gives zeros, where the written-out form gives NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import fx

from graphwright.ir import Program, args_by_name, site_of
from graphwright.manager import Pass, PassResult
from graphwright.passes._algebra import enclosed, last_axis, sites_in, without_casts
from graphwright.passes._nodes import is_number, is_op, is_tensor, only_user, permutation, rank, same_sizes, sweep, val

aten = torch.ops.aten
#: Added to a score (float32, of ordinary size), a number below this leaves nothing of it.
MASKED = -1e9


@dataclass
class _Attention:
    """What was found between the second product and the first.

    Attributes:
        masks: added to the scores: nodes, or ``(boolean node, number)`` where the number takes the score's place.
        cone: the ops in between.
    """

    scale: float = 1.0
    masks: list[fx.Node | tuple[fx.Node, float]] = field(default_factory=list)
    cone: set[fx.Node] = field(default_factory=set)


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """Turn written-out attention (product, scale, mask, softmax, product) into scaled_dot_product_attention."""

    name = "raise-attention"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for node in program.nodes:
            if not node._erased and is_op(node, "aten.matmul", "aten.bmm"):
                self._raise(program, node, result)
        return result

    def _raise(self, program: Program, node: fx.Node, result: PassResult) -> None:
        found = _Attention(cone={node})
        softmax = without_casts(node.args[0], found.cone)  # type: ignore[arg-type]
        if not is_op(softmax, "aten.softmax", "aten._softmax"):
            return
        found.cone.add(softmax)
        first = _scores(softmax.args[0], found)
        if first is None or self.refused(result, node):
            return
        found.cone.add(first)
        q, k, v = first.args[-2], first.args[-1], node.args[1]
        reason = _reason(softmax, first, q, k, v, node, found) or enclosed(node, found.cone - {node})
        if reason:
            result.refuse(site_of(node), f"it spells attention, but {reason}")
            return
        with program.graph.inserting_before(node):
            q = _unscaled(q, found)  # type: ignore[arg-type]
            sites = sites_in(found.cone)
            k, mask = _swapped(program, k, sites), _mask(program, found, q, sites)  # type: ignore[arg-type]
            new = program.call(
                aten.scaled_dot_product_attention.default,
                q,
                k,
                v,
                mask,
                0.0,
                False,
                scale=found.scale,
                sites=sites,
                like=node,
            )
        result.change(site_of(node), f"{len(found.cone)} ops → scaled_dot_product_attention")
        program.replace(node, new)
        sweep(program, result)


def _scores(node: object, found: _Attention) -> fx.Node | None:
    """The first product, back through scaling and masking; what was met on the way goes into ``found``."""
    while isinstance(node, fx.Node):
        node = without_casts(node, found.cone)
        if is_op(node, "aten.matmul", "aten.bmm"):
            return node
        a, b = (*node.args, None, None)[:2]
        if is_op(node, "aten.mul", "aten.div") and is_number(b) and node.kwargs.get("rounding_mode") is None:
            if b == 0:
                return None
            found.scale *= float(b) if is_op(node, "aten.mul") else 1.0 / float(b)  # type: ignore[arg-type]
            step = a
        elif found.scale != 1.0 and is_op(node, "aten.add", "aten.masked_fill"):
            return None  # scaled after masking: the mask would have to be scaled too
        elif is_op(node, "aten.add") and node.kwargs.get("alpha", 1) == 1 and is_tensor(a) and is_tensor(b):
            step, mask = (a, b) if _is_scores(a) else (b, a)
            found.masks.append(mask)  # type: ignore[arg-type]
        elif is_op(node, "aten.masked_fill") and is_number(node.args[2]):
            step = a
            found.masks.append((b, float(node.args[2])))  # type: ignore[arg-type]
        else:
            return None
        if found.masks and not (is_tensor(step) and same_sizes(val(step).shape, val(node).shape)):
            return None
        found.cone.add(node)
        node = step
    return None


def _is_scores(node: object) -> bool:
    """Whether a product stands behind ``node``, through the steps that ``_scores`` takes."""
    seen: set[fx.Node] = set()
    while isinstance(node, fx.Node):
        node = without_casts(node, seen)
        if is_op(node, "aten.matmul", "aten.bmm"):
            return True
        if not is_op(node, "aten.mul", "aten.div", "aten.add", "aten.masked_fill"):
            return False
        node = node.args[0]
    return False


def _reason(
    softmax: fx.Node, first: fx.Node, q: object, k: object, v: object, node: fx.Node, found: _Attention
) -> str | None:
    given = args_by_name(softmax)
    if not last_axis(softmax, given["dim"]):
        return f"its softmax runs over axis {given['dim']}"
    if not (is_tensor(q) and is_tensor(k) and is_tensor(v)) or rank(q) not in (3, 4):  # type: ignore[arg-type]
        return "its operands have other than 3 or 4 axes"
    kinds = {val(n).dtype for n in (q, k, v, node)}
    if len(kinds) > 1 or not val(q).dtype.is_floating_point:
        return f"it mixes {', '.join(sorted(map(str, kinds)))}"
    if not rank(q) == rank(k) == rank(v):  # type: ignore[arg-type]
        return "its operands differ in rank"
    if not (same_sizes(val(q).shape[:-2], val(k).shape[:-2]) and same_sizes(val(q).shape[:-2], val(v).shape[:-2])):
        return "its operands are broadcast over the batch"
    for mask in found.masks:
        m = mask[0] if isinstance(mask, tuple) else mask
        if isinstance(mask, tuple) and mask[1] > MASKED:
            return f"it replaces scores by {mask[1]}, which does not hide them altogether"
        if not isinstance(mask, tuple) and val(m).dtype != val(q).dtype:
            return f"its mask is {val(m).dtype}"
        if val(m).ndim > rank(q):  # type: ignore[arg-type]
            return "its mask has more axes than the scores"
    return None


def _unscaled(q: fx.Node, found: _Attention) -> fx.Node:
    """``q`` before a multiplication by a number of its own, which joins the scale."""
    if (
        is_op(q, "aten.mul", "aten.div")
        and is_number(q.args[1])
        and q.args[1]
        and only_user(q)
        and q.kwargs.get("rounding_mode") is None
    ):
        factor = float(q.args[1])  # type: ignore[arg-type]
        same = is_tensor(q.args[0]) and val(q.args[0]).dtype == val(q).dtype
        if same and math.isfinite(factor):
            found.scale *= factor if is_op(q, "aten.mul") else 1.0 / factor
            found.cone.add(q)
            return q.args[0]  # type: ignore[return-value]
    return q


def _swapped(program: Program, k: fx.Node, sites: list[str]) -> fx.Node:
    """``kᵀ`` with its last two axes exchanged: the permute that made it, undone where there is one."""
    order = list(range(rank(k)))
    order[-1], order[-2] = order[-2], order[-1]
    inner = permutation(k)
    if inner is not None:
        order, k = [inner[d] for d in order], k.args[0]  # type: ignore[assignment]
    return k if order == sorted(order) else program.call(aten.permute.default, k, order, sites=sites)


def _mask(program: Program, found: _Attention, q: fx.Node, sites: list[str]) -> fx.Node | None:
    """All masks as one that is added, with at least two axes."""
    total: fx.Node | None = None
    for mask in reversed(found.masks):
        if isinstance(mask, tuple):
            like = val(q)
            zero = program.call(aten.full.default, [], 0.0, dtype=like.dtype, device=like.device, sites=sites)
            mask = program.call(
                aten.masked_fill.Scalar, _expand(program, zero, mask[0], sites), mask[0], mask[1], sites=sites
            )
        total = mask if total is None else program.call(aten.add.Tensor, total, mask, sites=sites)
    while total is not None and rank(total) < 2:
        total = program.call(aten.unsqueeze.default, total, 0, sites=sites)
    return total


def _expand(program: Program, zero: fx.Node, like: fx.Node, sites: list[str]) -> fx.Node:
    return program.call(aten.expand_as.default, zero, like, sites=sites)
