"""Recognise attention written out as two products and a softmax.

``softmax(scale * q @ kᵀ + mask, -1) @ v`` becomes ``aten.scaled_dot_product_attention``, so that lowering may choose
among ways to compute the whole. Masks may be added, subtracted, filled in or chosen by ``where``; heads may be an axis or
joined with the batch on the way; keys and values may be fewer than queries (broadcast heads). One difference is accepted: a
query that may attend to nothing (a row of the mask that is all -inf) gives zeros, where the written-out form gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import Program, args_by_name, site_of
from graphwright.manager import Pass, PassResult
from graphwright.passes._algebra import enclosed, last_axis, sites_in
from graphwright.passes._nodes import (
    RESHAPES,
    is_op,
    is_tensor,
    only_user,
    permutation,
    rank,
    same_shape,
    same_sizes,
    sweep,
    val,
)
from graphwright.passes._scores import MASKED, Mask, Scores, number_of, read_scores, through_views

aten = torch.ops.aten


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """Turn written-out attention (product, scale, mask, softmax, product) into scaled_dot_product_attention."""

    name = "raise-attention"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for node in program.nodes:
            if not node._erased and is_op(node, "aten.matmul", "aten.bmm"):
                self._raise(program, node, result)
        if result.changes:
            sweep(program, result)
        return result

    def _raise(self, program: Program, node: fx.Node, result: PassResult) -> None:
        behind: set[fx.Node] = {node}
        softmax = through_views(node.args[0], behind)
        if not is_op(softmax, "aten.softmax", "aten._softmax"):
            return
        found = read_scores(program, softmax.args[0])
        if found is None or self.refused(result, node):
            return
        if isinstance(found, str):
            result.refuse(site_of(node), f"it spells attention, but {found}")
            return
        assert found.first is not None
        found.cone |= {*behind, softmax, found.first}
        q, k = found.first.args[-2:] if not is_op(found.first, "aten.baddbmm") else found.first.args[1:3]
        v = node.args[1]
        reason = (_reason(softmax, found, q, k, v, node) or _batches(found, q, k, v, node)
                  or enclosed(node, found.cone - {node}))  # fmt: skip
        if reason:
            result.refuse(site_of(node), f"it spells attention, but {reason}")
            return
        count, inputs = len(found.cone), node.all_input_nodes
        with program.graph.inserting_before(node):
            self._replace(program, node, found, q, k, v)  # type: ignore[arg-type]
        result.change(site_of(node), f"{count} ops → scaled_dot_product_attention")
        program.prune(inputs)  # the next one must not find them among its readers

    def _replace(self, program: Program, node: fx.Node, found: Scores, q: fx.Node, k: fx.Node, v: fx.Node) -> None:
        q, k = _unscaled(program, q, found), _unscaled(program, k, found)
        sites, batch = sites_in(found.cone), _batch(found)
        k = _swapped(program, k, sites)
        q, k, v = (_grouped(program, x, batch, sites) for x in (q, k, v))
        for factor, multiplied, _ in reversed(found.factors):
            q = program.call(aten.mul.Tensor if multiplied else aten.div.Tensor, q, factor, sites=sites)
        mask = _mask(program, found, q, sites)
        new = program.call(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, False, scale=found.scale,
                           sites=sites, like=node)  # fmt: skip
        for user in list(node.users):  # views that undo the joining of heads and batch
            if is_op(user, *RESHAPES) and same_shape(user, new) and user.args[0] is node:
                program.replace(user, new)
        if not same_shape(new, node):
            new = program.call(aten.reshape.default, new, list(val(node).shape), sites=sites) if node.users else new
        program.replace(node, new)


def _reason(softmax: fx.Node, found: Scores, q: Any, k: Any, v: Any, node: fx.Node) -> str | None:
    given = args_by_name(softmax)
    if not last_axis(softmax, given["dim"]):
        return f"its softmax runs over axis {given['dim']}"
    if not (is_tensor(q) and is_tensor(k) and is_tensor(v)) or rank(q) not in (3, 4):
        return "its operands have other than 3 or 4 axes"
    kinds = {val(n).dtype for n in (q, k, v, node)}
    if len(kinds) > 1 or not val(q).dtype.is_floating_point:
        return f"it mixes {', '.join(sorted(map(str, kinds)))}"
    for mask in found.masks:
        m = val(mask.node)
        if mask.number is not None and mask.number * mask.factor > MASKED:
            return f"it replaces scores by {mask.number}, which does not hide them altogether"
        if mask.number is None and m.dtype != val(q).dtype:
            return f"its mask is {m.dtype}"
        if m.ndim > len(mask.stage):
            return "its mask has more axes than the scores"
    return None


def _batch(found: Scores) -> tuple[Any, ...]:
    """The batch axes under which attention is to stand: two of them where the scores have them anywhere."""
    return max((s[:-2] for s in found.shapes if len(s) <= 4), key=len)


def _batches(found: Scores, q: fx.Node, k: fx.Node, v: fx.Node, node: fx.Node) -> str | None:
    """Why operands or masks can't be brought to one batch, if they can't."""
    shapes = found.shapes
    if any(not 3 <= len(s) <= 5 for s in shapes) or min(map(len, shapes)) > 4:
        return "its scores have other than 3 or 4 axes"
    if rank(q) != rank(k) or rank(v) != rank(node):
        return "its operands differ in rank"
    if not same_sizes(val(q).shape[:-2], shapes[-1][:-2]):
        return "its operands are broadcast over the batch"
    given = val(node).shape[:-2]
    for name, x, stage in (("keys", k, val(q).shape[:-2]), ("values", v, given)):
        lead = val(x).shape[:-2]
        if not same_sizes(lead, stage) and not all(isinstance(n, int) for n in (*lead, *stage)):
            return f"its {name} are broadcast over sizes that are unknown"
    moved = {len(s) for s in shapes} | {rank(q), rank(v)}
    if len(moved) > 1:
        if not all(isinstance(n, int) for s in (*shapes, val(q).shape, val(v).shape, given) for n in s[:-2]):
            return "its scores change between shapes of unknown size"
        lead = _batch(found)
        if any(len(s) == 4 and tuple(s[:-2]) != lead for s in (*shapes, val(q).shape, val(node).shape)):
            return "its scores are regrouped on the way"
        if any(r != len(lead) + 2 for *_, r in found.factors):
            return "its scores are scaled under another shape than they are masked"
    elif any(not same_sizes(s[:-2], val(q).shape[:-2]) for s in (*shapes, val(node).shape)):
        return "its scores are regrouped on the way"
    return None


def _unscaled(program: Program, x: fx.Node, found: Scores) -> fx.Node:
    """Queries or keys before a multiplication by a number of its own, which joins the scale."""
    if is_op(x, "aten.mul", "aten.div") and only_user(x) and x.kwargs.get("rounding_mode") is None:
        factor = number_of(program, x.args[1])
        same = is_tensor(x.args[0]) and val(x.args[0]).dtype == val(x).dtype and same_shape(x.args[0], x)  # type: ignore[arg-type]
        if same and factor and math.isfinite(factor):
            found.scale *= factor if is_op(x, "aten.mul") else 1.0 / factor
            found.cone.add(x)
            return x.args[0]  # type: ignore[return-value]
    return x


def _swapped(program: Program, k: fx.Node, sites: list[str]) -> fx.Node:
    """``kᵀ`` with its last two axes exchanged: the permute that made it, undone where there is one."""
    order = list(range(rank(k)))
    order[-1], order[-2] = order[-2], order[-1]
    inner = permutation(k)
    if inner is not None:
        order, k = [inner[d] for d in order], k.args[0]  # type: ignore[assignment]
    return k if order == sorted(order) else program.call(aten.permute.default, k, order, sites=sites)


def _grouped(program: Program, x: fx.Node, batch: Sequence[Any], sites: list[str]) -> fx.Node:
    """``x [*, n, e]`` as ``[*batch, n, e]``: batch and heads taken apart, fewer heads stretched over all of them."""
    wanted = [*batch, *val(x).shape[-2:]]
    while not same_sizes(val(x).shape, wanted):
        if is_op(x, *RESHAPES) and is_tensor(x.args[0]) and same_sizes(val(x.args[0]).shape, wanted):
            return x.args[0]  # type: ignore[return-value]
        if math.prod(val(x).shape[:-2]) != math.prod(batch):
            lead = list(batch) if rank(x) == len(wanted) else [math.prod(batch)]
            x = program.call(aten.expand.default, x, [*lead, -1, -1], sites=sites)
        else:
            x = program.call(aten.reshape.default, x, [*batch, *_sizes(x)], sites=sites)
    return x


def _sizes(x: fx.Node) -> list[int]:
    """The last two sizes as a reshape takes them; an unknown one is left for it to find."""
    sizes = [n if isinstance(n, int) else -1 for n in val(x).shape[-2:]]
    return sizes


def _mask(program: Program, found: Scores, q: fx.Node, sites: list[str]) -> fx.Node | None:
    """All masks as one that is added, with at least two axes."""
    total: fx.Node | None = None
    batch = _batch(found)
    for mask in reversed(found.masks):
        added = _placed(program, _added(program, mask, q, sites), mask, batch, sites)
        total = added if total is None else program.call(aten.add.Tensor, total, added, sites=sites)
    while total is not None and rank(total) < 2:
        total = program.call(aten.unsqueeze.default, total, 0, sites=sites)
    return total


def _added(program: Program, mask: Mask, q: fx.Node, sites: list[str]) -> fx.Node:
    """A mask as something that is added to the scores as they enter the softmax."""
    like, node = val(q), mask.node
    if mask.number is None:
        return node if mask.factor == 1.0 else program.call(aten.mul.Scalar, node, mask.factor, sites=sites)
    if not mask.where:
        node = program.call(aten.logical_not.default, node, sites=sites)
    zero = program.call(aten.full.default, [], 0.0, dtype=like.dtype, device=like.device, sites=sites)
    zero = program.call(aten.expand_as.default, zero, node, sites=sites)
    return program.call(aten.masked_fill.Scalar, zero, node, mask.number * mask.factor, sites=sites)


def _placed(program: Program, added: fx.Node, mask: Mask, batch: Sequence[Any], sites: list[str]) -> fx.Node:
    """A mask of the scores under one grouping of heads and batch, under another."""
    lead, stage = list(val(added).shape[:-2]), list(mask.stage[:-2])
    if same_sizes(stage, batch) or not lead or all(isinstance(n, int) and n == 1 for n in lead):
        return added if len(lead) <= len(batch) else program.call(aten.squeeze.dim, added, 0, sites=sites)
    if not same_sizes(lead, stage):
        added = program.call(aten.expand.default, added, [*stage, -1, -1], sites=sites)
    return program.call(aten.reshape.default, added, [*batch, *_sizes(added)], sites=sites)
