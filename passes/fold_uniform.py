"""Masks and tables that provably hold one number, whatever their size: what they do nothing to, they no longer touch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import Program, arg, op_name, set_arg, site_of
from graphwright.manager import Pass, PassResult
from graphwright.passes._nodes import escapes, is_op, is_tensor, same_kind, same_layout, sweep, val
from graphwright.passes._uniform import uniform
from graphwright.passes.canonicalize import zero_sign_matters
from graphwright.passes.simplify_masks import HIDDEN


@dataclass(frozen=True)
class FoldUniform(Pass):
    """Drop masks that hide nothing and sums and products with tensors of zeros and ones, also where sizes vary."""

    name = "fold-uniform"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        known = uniform(program)
        if not known:
            return result
        for node in program.nodes:
            if not is_tensor(node) or not any(n in known for n in node.all_input_nodes):
                continue
            if is_op(node, "aten.scaled_dot_product_attention"):
                self._attention(program, node, known, result)
                continue
            found = _stands_for(node, known)
            if found is None:
                continue
            if isinstance(found, str):
                result.refuse(site_of(node), found)
            elif not is_tensor(found) or not same_kind(found, node):
                result.refuse(site_of(node), "it also changes shape or dtype")
            elif not same_layout(found, node) or escapes(program, node):
                result.refuse(site_of(node), "it also gives memory of its own, in a layout of its own")
            elif not self.refused(result, node):
                result.change(site_of(node), f"{op_name(node.target).split('.')[1]} changes nothing: one number everywhere")
                node.replace_all_uses_with(found)
                program.graph.erase_node(node)
        sweep(program, result)
        return result

    def _attention(self, program: Program, node: fx.Node, known: dict[fx.Node, Any], result: PassResult) -> None:
        mask = arg(node, "attn_mask")
        value = known.get(mask) if isinstance(mask, fx.Node) else None
        if value is None or self.refused(result, node):
            return
        # the same number added to every score changes no weight, as long as adding it rounds nothing away
        if value is True or (not isinstance(value, bool) and value == 0):
            set_arg(node, "attn_mask", None)
            result.change(site_of(node), "a mask that hides nothing dropped")
        elif value is False or (not isinstance(value, bool) and value <= HIDDEN):
            result.refuse(site_of(node), "its mask hides everything")


def _stands_for(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """What ``node`` gives unchanged, or why it does not quite, or None."""

    def number(a: Any) -> Any:
        return known.get(a) if isinstance(a, fx.Node) else None

    a, b = (*node.args[:2], None, None)[:2]
    if is_op(node, "aten.add") and node.kwargs.get("alpha", 1) == 1:
        for x, zero in ((a, number(b)), (b, number(a))):
            if zero == 0 and not isinstance(zero, bool):
                minus = isinstance(zero, float) and math.copysign(1.0, zero) < 0
                reason = None if minus or not val(node).dtype.is_floating_point else zero_sign_matters(node)
                return f"adding 0 turns -0.0 into 0.0, and {reason}" if reason else x
    if is_op(node, "aten.sub") and number(b) == 0 and not isinstance(number(b), bool) and node.kwargs.get("alpha", 1) == 1:
        return a if not isinstance(number(b), float) or math.copysign(1.0, number(b)) > 0 else None
    if is_op(node, "aten.mul"):
        for x, one in ((a, number(b)), (b, number(a))):
            if one == 1:
                return x
    if is_op(node, "aten.div") and number(b) == 1 and node.kwargs.get("rounding_mode") is None:
        return a
    if is_op(node, "aten.masked_fill"):
        return a if number(b) is False else None
    if is_op(node, "aten.where") and len(node.args) == 3 and isinstance(number(a), bool):
        return node.args[1] if number(a) else node.args[2]
    if is_op(node, "aten.logical_and", "aten.bitwise_and", "aten.__and__") and val(node).dtype == torch.bool:
        return b if number(a) is True else a if number(b) is True else None
    if is_op(node, "aten.logical_or", "aten.bitwise_or", "aten.__or__") and val(node).dtype == torch.bool:
        return b if number(a) is False else a if number(b) is False else None
    return None
