"""Two products in a row, with nothing between them, as one: ``B @ (A @ x + a) + b = (B @ A) @ x + (B @ a + b)``.

Linear after linear, and convolution after convolution where one of the two is pointwise. The product of the weights is made in
float64. It pays where the one product is less work than the two: a narrow middle (low rank) is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.cost import Cost, cost, number
from graphwright.ir import Program, arg, args_by_name, site_of, sites_of
from graphwright.manager import Pass, PassResult
from graphwright.passes import _affine as affine
from graphwright.passes import _trial as trial
from graphwright.passes._nodes import is_op, renew, same_layout, sweep, trainable, val
from graphwright.passes.select_early import FLOPS_PER_BYTE


@dataclass(frozen=True)
class MergeProducts(Pass):
    """Merge a linear into the linear after it, and a convolution into a pointwise one beside it, where that saves work."""

    name = "merge-products"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        sweep(program, result)
        pairs = [n for n in program.nodes if _reads_a_product(n)]
        inputs: dict[fx.Node, Tensor] = {}
        if program.example is not None:
            inputs = trial.values(program, {n.args[0].args[0] for n in pairs})  # type: ignore[union-attr, misc]
        moved = []
        for node in pairs:
            first: Any = node.args[0]
            reason = self._merge(program, first, node, inputs, result, moved)
            if reason:
                result.refuse(site_of(node), reason)
        if moved:
            renew(program, moved)
        sweep(program, result)
        return result

    def _merge(self, program: Program, first: fx.Node, node: fx.Node, inputs: dict[fx.Node, Tensor], result: PassResult, moved: list[fx.Node]) -> str | None:
        if reason := affine.fits(program, first, node) or affine.constant_parts(program, node) or _unfit(first, node):
            return reason
        weights: list[fx.Node] = [arg(first, "weight"), arg(node, "weight")]
        if any(len(w.users) > 1 for w in weights):
            return "a weight is read elsewhere too: the product would be stored beside it"
        made = _product(program, first, node)
        if isinstance(made, str) or (reason := _not_less(first, node, made[0])):
            return made if isinstance(made, str) else reason
        if self.refused(result, node) or self.refused(result, first):
            return None
        held = [program.tensor(str(w.target)) for w in weights]
        with program.graph.inserting_before(node):
            weight = program.add_tensor(f"{weights[1].target}_merged", made[0].to(held[1].dtype), origin=[str(w.target) for w in weights], trainable=trainable(held))
            bias = None
            if made[1] is not None:
                names = [str(b.target) for b in (arg(first, "bias"), arg(node, "bias")) if b is not None]
                bias = program.add_tensor(f"{names[-1]}_merged", made[1].to(held[1].dtype), origin=names, trainable=trainable(held))
            given = {**args_by_name(node), "input": first.args[0], "weight": weight, "bias": bias, **_window(first, node)}
            new = program.call(node.target, *given.values(), sites=[*sites_of(first), *sites_of(node)])  # type: ignore[arg-type]
            new.meta["trace"] = node.meta.get("trace")
        if first.args[0] in inputs:
            x = {first.args[0]: inputs[first.args[0]]}  # type: ignore[index]
            if problem := trial.failure(program, node, x, trial.evaluate(program, new, x)):
                program.graph.erase_node(new)
                program.tidy()
                return f"measured on the example: {problem}"
        result.change(site_of(node), f"{site_of(first)} merged into it")
        if not same_layout(new, node):
            moved.append(new)
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
        program.graph.erase_node(first)
        return None


def _reads_a_product(node: fx.Node) -> bool:
    kinds = ("aten.linear",), tuple(affine.CONVOLUTIONS)
    return any(is_op(node, *k) and is_op(node.args[0], *k) for k in kinds)


def _listed(value: Any, count: int) -> list[int] | None:
    """One number per axis; None for words."""
    if isinstance(value, str):
        return [0] * count if value == "valid" else None
    return list(value) * (count if len(value) == 1 else 1)


def _pointwise(node: fx.Node) -> bool:
    return all(k == 1 for k in val(arg(node, "weight")).shape[2:])


def _unfit(first: fx.Node, node: fx.Node) -> str | None:
    """Why these two are no one convolution; None where they are."""
    if is_op(node, "aten.linear"):
        return None
    n = affine.spatial_axes(node) or 0
    one, two = args_by_name(first), args_by_name(node)
    if one["groups"] != 1 or two["groups"] != 1:
        return "one of the two is grouped"
    padding = _listed(one["padding"], n), _listed(two["padding"], n)
    if None in padding:
        return "one of the two sizes its own padding by its input ('same')"
    if not _pointwise(first) and not _pointwise(node):
        return f"neither it nor {site_of(first)} is pointwise"
    if _pointwise(first):
        if any(padding[0] or []) or any(s != 1 for s in _listed(one["stride"], n) or []):
            return f"{site_of(first)} pads or strides"
        if any(padding[1] or []) and one["bias"] is not None:
            return f"it pads with zeros, where {site_of(first)} would have given its bias"
        return None
    return "it pads" if any(padding[1] or []) else None


def _window(first: fx.Node, node: fx.Node) -> dict[str, Any]:
    """Stride, padding and dilation of both: those of the one that is not pointwise, strides multiplied."""
    if is_op(node, "aten.linear"):
        return {}
    n = affine.spatial_axes(node) or 0
    wide = node if _pointwise(first) else first
    strides = [_listed(arg(k, "stride"), n) or [] for k in (first, node)]
    return {"stride": [a * b for a, b in zip(*strides, strict=True)], "padding": _listed(arg(wide, "padding"), n), "dilation": _listed(arg(wide, "dilation"), n)}


def _product(program: Program, first: fx.Node, node: fx.Node) -> tuple[Tensor, Tensor | None] | str:
    """Weight and bias of both at once, in float64."""

    def wide(n: fx.Node, name: str) -> Tensor | None:
        held = program.constant(arg(n, name))
        return None if held is None else held.detach().double()

    a, b, a0, b0 = wide(first, "weight"), wide(node, "weight"), wide(first, "bias"), wide(node, "bias")
    assert a is not None and b is not None
    if a.dtype != b.dtype or program.tensor(str(arg(first, "weight").target)).dtype != program.tensor(str(arg(node, "weight").target)).dtype:
        return "their weights differ in dtype"
    if is_op(node, "aten.linear"):
        if a.ndim != 2 or b.ndim != 2:
            return "a weight is no matrix"
        weight = b @ a
    elif _pointwise(first):
        weight = torch.einsum("om...,mi->oi...", b, a.flatten(1))
    else:
        weight = torch.einsum("om,mi...->oi...", b.flatten(1), a)
    bias = b0
    if a0 is not None:
        moved = torch.einsum("om...,m->o", b, a0) if b.ndim == 2 else (b.flatten(2).sum(2) @ a0)
        bias = moved if b0 is None else moved + b0
    info = torch.finfo(program.tensor(str(arg(node, "weight").target)).dtype)
    largest = max((float(t.abs().max()) for t in (weight, bias) if t is not None and t.numel()), default=0.0)
    return (weight, bias) if largest <= info.max else "the weights' product is not finite"


def _not_less(first: fx.Node, node: fx.Node, weight: Tensor) -> str | None:
    """The figures, where one product is no less work than two."""
    x, out = val(first.args[0]), val(node)
    size = out.element_size()
    now = Cost(2 * number(out.numel()) * (weight.numel() // max(1, weight.shape[0])), (number(x.numel()) + weight.numel()) * size, number(out.numel()) * size)
    was = cost(first) + cost(node)

    def work(c: Cost) -> float:
        return c.flops + FLOPS_PER_BYTE * c.bytes

    if work(now) < work(was) and now.flops <= was.flops:
        return None
    return f"one product would be no less work: {now.flops:,} operations and {now.bytes:,} bytes, {was.flops:,} and {was.bytes:,} in two"
