"""Attention masks that are known beforehand: drop them, name them, or store them once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphwright.ir import Program, arg, set_arg, site_of
from graphwright.manager import Pass, PassResult
from graphwright.passes._nodes import is_op, same_size, sweep, val

#: Added to a score of ordinary size, a number below this leaves an attention weight of exactly 0.
HIDDEN = -1e30


@dataclass(frozen=True)
class SimplifyMasks(Pass):
    """Drop constant attention masks that hide nothing, name causal ones, store repeated ones once."""

    name = "simplify-masks"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for node in program.nodes:
            if not is_op(node, "aten.scaled_dot_product_attention") or arg(node, "is_causal"):
                continue
            mask = program.constant(arg(node, "attn_mask"))
            if mask is None or self.refused(result, node):
                continue
            what = _simplify(program, node, mask)
            if what:
                result.change(site_of(node), what)
        sweep(program, result)
        return result


def _simplify(program: Program, node: fx.Node, mask: Tensor) -> str | None:
    """Change ``node`` for the better; what was done, or None."""
    allowed = mask if mask.dtype == torch.bool else mask == 0
    hidden = ~mask if mask.dtype == torch.bool else mask <= HIDDEN
    if bool(allowed.all()):
        set_arg(node, "attn_mask", None)
        return "a mask that hides nothing dropped"
    queries, keys = val(arg(node, "query")).shape[-2], val(arg(node, "key")).shape[-2]
    square = same_size(queries, keys) and tuple(mask.shape[-2:]) == (queries, keys)
    if square and bool((allowed | hidden).all()) and bool((allowed == torch.ones_like(allowed).tril()).all()):
        set_arg(node, "attn_mask", None)
        set_arg(node, "is_causal", True)
        return "its mask is causal"
    small = mask
    for axis in range(mask.ndim - 2):
        if small.shape[axis] > 1 and bool((small == small.narrow(axis, 0, 1)).all()):
            small = small.narrow(axis, 0, 1)
    if small.shape == mask.shape:
        return None
    name = str(arg(node, "attn_mask").target)
    set_arg(node, "attn_mask", program.add_tensor(f"{name}_once", small.clone(), origin=[name]))
    return f"its mask repeats itself: {tuple(mask.shape)} stored as {tuple(small.shape)}"
