"""Fold batch norm in eval mode into the convolution or linear beside it.

``gamma * (y - mean) / sqrt(var + eps) + beta`` is a scale and a shift per channel, and a contraction's weight and bias
take both in. Folding moves where numbers cancel: where a channel's mean is large against its spread, the folded bias
and the product nearly cancel, and float error grows. Where that could break the exact rule, the site is run both ways
on the program's example, against float64, and left alone if it does break it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir import Program, arg, op_name, site_of, sites_of
from graphwright.manager import Pass, PassResult
from graphwright.passes import _absorb as absorb
from graphwright.passes import _affine as affine
from graphwright.passes import _trial as trial
from graphwright.passes._nodes import RESHAPES, is_op, only_user, rank, readers, renew, same_kind, same_layout, sweep

#: Cancellation (see ``_affine.cancels``) that is certain to keep the exact rule, and that without an example is refused.
SAFE, TOO_MUCH = 4.0, 64.0


@dataclass(frozen=True)
class Norm:
    """A batch norm in eval mode as ``scale * y + shift``, float64, one number per channel, and what it is made of."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    spread: Tensor
    tensors: list[fx.Node]


def _behind_views(x: fx.Node) -> fx.Node | None:
    """The contraction whose result ``x`` is under another shape, if it is."""
    while is_op(x, *RESHAPES, "aten.permute"):
        x = x.args[0]  # type: ignore[assignment]
    return x if affine.is_contraction(x) else None


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold batch norm into the convolution or linear before it, or into one without padding after it."""

    name = "fold-batch-norm"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        doubtful: list[tuple[fx.Node, fx.Node, Norm, affine.Folded]] = []
        for node in program.nodes:
            if not is_op(node, "aten.batch_norm") or self.refused(result, node):
                continue
            norm = read(program, node)
            reason = norm if isinstance(norm, str) else self._fold(program, node, norm, doubtful, result)
            if reason:
                result.refuse(site_of(node), reason)
        self._decide(program, doubtful, result)
        sweep(program, result)
        return result

    def _fold(self, program: Program, node: fx.Node, norm: Norm, doubtful: list[Any], result: PassResult) -> str | None:
        product = node.args[0]
        if not affine.is_contraction(product):
            behind = _behind_views(product)
            if behind is None:
                return self._fold_before(program, node, norm, result)
            return self._fold_through(program, node, behind, norm, result)
        if reason := affine.fits(program, product, node):
            return reason
        if affine.channel_axis(product) != 1:
            return f"its channels (axis 1) are not those of {site_of(product)} (axis {affine.channel_axis(product)})"
        folded = affine.after(program, product, norm.scale, norm.shift)
        if isinstance(folded, str):
            return folded
        bias = arg(product, "bias")
        mean = norm.mean if bias is None else norm.mean - program.tensor(str(bias.target)).detach().double()
        grown = affine.cancels(norm.scale, mean, norm.spread)
        if grown > SAFE and program.example is not None:
            doubtful.append((node, product, norm, folded))
            return None
        if grown > TOO_MUCH:
            return f"what the folded bias takes away is {grown:.0f} times what is left, and there is no example to measure the error on"
        self._install(program, node, product, norm, folded, result)
        return None

    def _fold_through(self, program: Program, node: fx.Node, product: fx.Node, norm: Norm, result: PassResult) -> str | None:
        """Fold past the views between a contraction and its norm, where the norm takes little away."""
        view: fx.Node = node.args[0]  # type: ignore[assignment]
        bias = arg(product, "bias")
        constant = program.constant(bias) if bias is not None else None
        if bias is not None and (constant is None or constant.shape != norm.mean.shape):
            return "its bias is no number per channel of the norm"
        mean = norm.mean if constant is None else norm.mean - constant.detach().double()
        if affine.cancels(norm.scale, mean, norm.spread) > SAFE:
            return "the folded bias would take away most of what is left"
        shape = [1, -1] + [1] * (rank(node) - 2)
        plan = absorb.Plan()
        reason = absorb.pull(program, view, node, norm.scale.reshape(shape), norm.shift.reshape(shape), plan)
        if reason:
            return reason
        plan.carry_out(program, norm.tensors, sites_of(node), "folded")
        result.change(site_of(node), f"batch norm folded into {op_name(product.target).split('.')[1]} {site_of(product)}, past views")
        node.replace_all_uses_with(view)
        moved = not same_layout(view, node)
        program.graph.erase_node(node)
        if moved:
            renew(program, [view])
        before: fx.Node = view.args[0]  # type: ignore[assignment]
        for back in list(view.users):  # the shape was changed for the norm alone
            if is_op(view, *RESHAPES) and is_op(back, *RESHAPES) and same_kind(back, before) and same_layout(back, before):
                back.replace_all_uses_with(before)
                program.graph.erase_node(back)
        return None

    def _install(
        self, program: Program, node: fx.Node, product: fx.Node, norm: Norm, folded: affine.Folded, result: PassResult
    ) -> None:
        affine.install(program, product, folded, norm.tensors, sites_of(node), "folded")
        result.change(
            site_of(node), f"batch norm folded into {op_name(product.target).split('.')[1]} {site_of(product)}"
        )
        node.replace_all_uses_with(product)
        program.graph.erase_node(node)

    def _fold_before(self, program: Program, node: fx.Node, norm: Norm, result: PassResult) -> str | None:
        before = op_name(node.args[0].target) if node.args[0].op == "call_function" else "an input"
        nothing = f"no convolution or linear stands before it ({before})"
        product = only_user(node)
        if product is None or not affine.is_contraction(product) or arg(product, "input") is not node:
            return f"{nothing}, nor after it" + ("" if product else f": it is read by {readers(node)}")
        if reason := affine.constant_parts(program, product):
            return f"{nothing}; {reason}"
        spatial = affine.spatial_axes(product)
        if spatial is not None and arg(product, "padding") != "valid" and any(arg(product, "padding")):
            return f"{nothing}, and {site_of(product)} pads with zeros, which the norm would shift"
        if is_op(product, *affine.TRANSPOSED):
            return f"{nothing}, and {site_of(product)} is transposed"
        if affine.channel_axis(product) != 1:
            return f"{nothing}, and its channels (axis 1) are not those of {site_of(product)}"
        folded = affine.before(program, product, norm.scale, norm.shift)
        if isinstance(folded, str):
            return folded
        affine.install(program, product, folded, norm.tensors, sites_of(node), "folded")
        result.change(
            site_of(node), f"batch norm folded into {op_name(product.target).split('.')[1]} {site_of(product)} after it"
        )
        node.replace_all_uses_with(node.args[0])
        program.graph.erase_node(node)
        return None

    def _decide(
        self, program: Program, doubtful: list[tuple[fx.Node, fx.Node, Norm, affine.Folded]], result: PassResult
    ) -> None:
        """Measure the sites where folding might break the exact rule, all in one run."""
        inputs = trial.values(program, {product.args[0] for _, product, _, _ in doubtful})
        for node, product, norm, folded in doubtful:
            if problem := _failure(program, node, product, folded, inputs[product.args[0]]):
                result.refuse(site_of(node), f"measured on the example: {problem}")
            else:
                self._install(program, node, product, norm, folded, result)


def read(program: Program, node: fx.Node) -> Norm | str:
    """The scale and shift of a batch norm, or why it has none."""
    if arg(node, "training"):
        return "batch norm in train mode computes its statistics from the input"
    parts = {k: arg(node, k) for k in ("weight", "bias", "running_mean", "running_var")}
    held: dict[str, Tensor] = {}
    for name, part in parts.items():
        if part is None and name in ("weight", "bias"):
            continue
        tensor = program.constant(part)
        if tensor is None:
            return f"its {name} is " + ("absent" if part is None else "no constant")
        held[name] = tensor.detach().double()
    mean, var = held["running_mean"], held["running_var"]
    gamma = held.get("weight", torch.ones_like(mean))
    beta = held.get("bias", torch.zeros_like(mean))
    scale = gamma / torch.sqrt(var + float(arg(node, "eps")))
    if not bool(torch.isfinite(scale).all()):
        return "its scale is not finite (variance + eps is not positive)"
    spread = torch.sqrt((scale * scale) * var.clamp_min(0) + beta * beta)
    return Norm(scale, beta - mean * scale, mean, spread, [p for p in parts.values() if p is not None])


def _failure(program: Program, node: fx.Node, product: fx.Node, folded: affine.Folded, x: Tensor) -> str | None:
    """How folding breaks the exact rule at one site, on input ``x``; None where it does not."""

    source = product.args[0]
    new = trial.evaluate(program, product, {source: x}, changed={product: {"weight": folded.weight, "bias": folded.bias}})  # type: ignore[dict-item]
    return trial.failure(program, node, {source: x}, new)  # type: ignore[dict-item]
