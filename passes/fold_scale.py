"""Fold a constant factor per channel (layer scale, the scale of queries) into the contraction before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphwright.ir import Program, site_of, sites_of
from graphwright.manager import Pass, PassResult
from graphwright.passes import _affine as affine
from graphwright.passes._nodes import is_number, is_op, same_kind, sweep, val


@dataclass(frozen=True)
class FoldScale(Pass):
    """Fold multiplication by constants, one for all or one per channel, into the convolution or linear before it."""

    name = "fold-scale"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for node in program.nodes:
            if not is_op(node, "aten.mul", "aten.div") or node.kwargs.get("rounding_mode") is not None:
                continue
            pairs = [tuple(node.args[:2])] + ([tuple(node.args[1::-1])] if is_op(node, "aten.mul") else [])
            product, factor = next(((p, f) for p, f in pairs if affine.is_contraction(p)), (None, None))
            if (
                product is None
                or (not is_number(factor) and program.constant(factor) is None)
                or self.refused(result, node)
            ):
                continue
            scale = _scale(program, node, product, factor)
            folded = (
                scale
                if isinstance(scale, str)
                else affine.fits(program, product, node) or affine.after(program, product, scale, None)
            )
            if isinstance(folded, str):
                result.refuse(site_of(node), folded)
                continue
            affine.install(
                program, product, folded, [factor] if isinstance(factor, fx.Node) else [], sites_of(node), "scaled"
            )
            result.change(site_of(node), f"factor folded into {site_of(product)}")
            node.replace_all_uses_with(product)
            program.graph.erase_node(node)
        sweep(program, result)
        return result


def _scale(program: Program, node: fx.Node, product: fx.Node, factor: object) -> Tensor | str:
    """The factor of each output channel as float64, or why there is no such thing."""
    if not same_kind(product, node) or not val(node).dtype.is_floating_point:
        return "the factor changes dtype or shape"
    axis = affine.channel_axis(product)
    channels = int(val(product).shape[axis])
    if is_number(factor):
        scale = torch.full((channels,), float(factor), dtype=torch.float64)  # type: ignore[arg-type]
    else:
        held = program.constant(factor)
        assert held is not None
        shape = [1] * (val(product).ndim - held.ndim) + list(held.shape)
        if any(n != 1 for k, n in enumerate(shape) if k != axis):
            return f"the factor has shape {tuple(held.shape)}: it varies along other axes than the channels"
        scale = held.detach().double().reshape(-1).expand(channels)
    scale = scale.to(val(product).device)
    if is_op(node, "aten.div"):
        scale = 1.0 / scale
    return scale if bool(torch.isfinite(scale).all()) else "the factor is not finite"
