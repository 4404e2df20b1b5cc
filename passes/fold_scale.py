"""Fold constant factors (layer scale, the scale of queries, pixels over 255) into the contractions before or after them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from graphwright.ir import Program, site_of, sites_of
from graphwright.manager import Pass, PassResult
from graphwright.passes import _absorb as absorb
from graphwright.passes._nodes import is_op, renew, same_layout, sweep


@dataclass(frozen=True)
class FoldScale(Pass):
    """Fold multiplication by constants, one for all or one per channel, into the convolutions and linears beside it.

    The factor may pass views, sums and activations such as relu on its way back, and views on its way forward.
    """

    name = "fold-scale"

    def run(self, program: Program) -> PassResult:
        result, refused = PassResult(), {}
        for node in program.nodes:  # backwards first: layer scale, then what it is added to
            self._fold(program, node, result, refused, back=True)
        for node in reversed(program.nodes):
            if not node._erased:
                self._fold(program, node, result, refused, back=False)
        for node, reason in refused.items():
            result.refuse(site_of(node), reason)
        sweep(program, result)
        return result

    def _fold(self, program: Program, node: fx.Node, result: PassResult, refused: dict[fx.Node, str], *, back: bool) -> None:
        if not is_op(node, "aten.mul", "aten.div", "aten.neg"):
            return
        found = absorb.read(program, node)
        if found is None or isinstance(found, str):
            if found and any(absorb.affine.is_contraction(a) for a in node.all_input_nodes):
                refused.setdefault(node, found)
            return
        if not self.selects(sites_of(node)):
            refused.setdefault(node, "left out by include / exclude")
            return
        plan = absorb.Plan()
        reason = absorb.pull(program, found.x, node, found.scale, None, plan) if back else absorb.push(program, node, found.scale, None, plan)
        if reason:
            if absorb.affine.is_contraction(found.x) or not reason.startswith("no convolution"):
                refused.setdefault(node, reason)
            return
        refused.pop(node, None)
        plan.carry_out(program, found.tensors, sites_of(node), "scaled")
        result.change(site_of(node), f"factor folded into {', '.join(site_of(p) for p, _ in plan.products)}")
        moved = not same_layout(found.x, node)
        node.replace_all_uses_with(found.x)
        program.graph.erase_node(node)
        if moved:
            renew(program, [found.x])
