"""Fold constant summands (biases that stand apart, the mean that an image is normalised by) into contractions.

A shift before a contraction becomes part of its bias, and there it may cancel against what the weights make of the
input: such a site is tried on the program's example, against float64, and left alone where the exact rule breaks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from graphwright.ir import Program, site_of, sites_of
from graphwright.manager import Pass, PassResult
from graphwright.passes import _absorb as absorb
from graphwright.passes import _trial as trial
from graphwright.passes._nodes import is_op, renew, same_layout, sweep


@dataclass(frozen=True)
class FoldShift(Pass):
    """Fold added constants, one for all or one per channel, into the bias of the convolutions and linears beside them."""

    name = "fold-shift"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        refused: dict[fx.Node, str] = {}
        for node in program.nodes:
            self._fold(program, node, result, refused, None)
        inputs: dict[fx.Node, Tensor] | None = None
        for node in reversed(program.nodes):  # the later of two before the earlier: what it reads is as it was
            if node._erased or not is_op(node, "aten.add", "aten.sub", "aten.rsub"):
                continue
            if inputs is None and program.example is not None:
                inputs = trial.values(program, self._sources(program))
            self._fold(program, node, result, refused, inputs or {})
        for node, reason in refused.items():
            result.refuse(site_of(node), reason)
        sweep(program, result)
        return result

    def _sources(self, program: Program) -> set[fx.Node]:
        """What may be shifted on its way to a contraction."""
        found = (absorb.read(program, n) for n in program.nodes if is_op(n, "aten.add", "aten.sub", "aten.rsub"))
        return {a.x for a in found if isinstance(a, absorb.Affine)}

    def _fold(self, program: Program, node: fx.Node, result: PassResult, refused: dict[fx.Node, str], inputs: dict[fx.Node, Tensor] | None) -> None:
        """Backwards where ``inputs`` is None, else forwards; these are the values on the example."""
        if not is_op(node, "aten.add", "aten.sub", "aten.rsub"):
            return
        found = absorb.read(program, node)
        if found is None or isinstance(found, str):
            if found and any(absorb.affine.is_contraction(a) for a in node.all_input_nodes):
                refused.setdefault(node, found.replace("factor", "constant"))
            return
        if not self.selects(sites_of(node)):
            refused.setdefault(node, "left out by include / exclude")
            return
        plan = absorb.Plan()
        if inputs is None:
            reason = absorb.pull(program, found.x, node, found.scale, found.shift, plan)
        else:
            reason = absorb.push(program, node, found.scale, found.shift, plan) or _measured(program, node, found, plan, inputs)
        if reason:
            if absorb.affine.is_contraction(found.x) or not reason.startswith("no convolution"):
                refused.setdefault(node, reason.replace("the factor", "the constant"))
            return
        refused.pop(node, None)
        plan.carry_out(program, found.tensors, sites_of(node), "shifted")
        result.change(site_of(node), f"constant folded into {', '.join(site_of(p) for p, _ in plan.products)}")
        moved = not same_layout(found.x, node)
        node.replace_all_uses_with(found.x)
        program.graph.erase_node(node)
        if moved:
            renew(program, [found.x])


def _measured(program: Program, node: fx.Node, found: absorb.Affine, plan: absorb.Plan, inputs: dict[fx.Node, Tensor]) -> str | None:
    """How folding forwards breaks the exact rule on the example; None where it does not."""
    if found.x not in inputs:
        return "there is no example to measure the error on"
    x = inputs[found.x]
    for product, folded in plan.products:
        new = trial.evaluate(program, product, {node: x}, changed={product: {"weight": folded.weight, "bias": folded.bias}})
        if problem := trial.failure(program, product, {found.x: x}, new):
            return f"measured on the example: {problem}"
    return None
