"""Compute parallel convolutions that read the same input (the branches of an Inception block) as one.

The merged output is split along its channels, without copies. What is saved is reading the input again; what may have to be paid is a
copy of a part whose reader wants it in one piece, such as another convolution. Both are counted in bytes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright import ops
from graphwright.cost import number
from graphwright.ir import Program, arg, args_by_name, site_of, sites_of
from graphwright.manager import Pass, PassResult
from graphwright.passes._nodes import escapes, is_op, rank, renew, sweep, trainable, val


@dataclass(frozen=True)
class MergeConvolutions(Pass):
    """Merge convolutions that read the same input, with the same window and activation, into one, whose output is split.

    Args:
        most: how many are merged at the most.
        max_channels: a convolution with at least this many output channels fills the machine by itself and is left alone.
    """

    name = "merge-convolutions"

    most: int = 8
    max_channels: int = 512

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        groups: dict[Any, list[fx.Node]] = {}
        for node in program.nodes:
            if is_op(node, "graphwright.conv"):
                groups.setdefault(_key(node), []).append(node)
        moved: list[fx.Node] = []
        for nodes in groups.values():
            if len(nodes) > 1:
                fit = [n for n in nodes if not self._left_out(program, n, result)]
                for start in range(0, len(fit), self.most):
                    moved += self._merge(program, fit[start : start + self.most], result)
        if moved:
            renew(program, moved)
        sweep(program, result)
        return result

    def _left_out(self, program: Program, node: fx.Node, result: PassResult) -> bool:
        if self.refused(result, node):
            return True
        weight, bias = program.constant(arg(node, "weight")), arg(node, "bias")
        reason = None
        if weight is None or (bias is not None and program.constant(bias) is None):
            reason = "its weight or bias is no constant"
        elif arg(node, "other") is not None:
            reason = "it adds a residual of its own"
        elif arg(node, "groups") != 1:
            reason = "it is grouped"
        elif len(arg(node, "weight").users) > 1:
            reason = f"its weight {arg(node, 'weight').target} is read elsewhere too: it would be stored twice"
        elif weight.shape[0] >= self.max_channels:
            reason = f"it has {weight.shape[0]} channels and fills the machine by itself"
        elif escapes(program, node):
            reason = "it leaves the program, and would share memory with the others"
        if reason:
            result.refuse(site_of(node), reason)
        return reason is not None

    def _merge(self, program: Program, nodes: list[fx.Node], result: PassResult) -> list[fx.Node]:
        if len(nodes) < 2:
            return []
        saved = (len(nodes) - 1) * _bytes(nodes[0].args[0])
        paid = 2 * sum(_bytes(n) for n in nodes if any(_wants_it_whole(u) for u in n.users))
        if paid >= saved:
            result.refuse(site_of(nodes[0]), f"merging {', '.join(site_of(n) for n in nodes)} would save {saved:,} bytes of reading and cost {paid:,} of copying parts")
            return []
        first, weights = nodes[0], [arg(n, "weight") for n in nodes]
        biases = [arg(n, "bias") for n in nodes]
        held = [program.tensor(str(w.target)) for w in weights]
        if len({(w.dtype, w.device) for w in held}) > 1:
            result.refuse(site_of(first), "the weights differ in dtype or device")
            return []
        given = args_by_name(first)
        given["weight"] = program.add_tensor(f"{weights[0].target}_merged", torch.cat([w.detach() for w in held]),
                                             origin=[str(w.target) for w in weights], trainable=trainable(held))  # fmt: skip
        if any(b is not None for b in biases):
            parts = [w.new_zeros(w.shape[0]) if b is None else program.tensor(str(b.target)).detach() for b, w in zip(biases, held, strict=True)]
            names = [str(b.target) for b in biases if b is not None]
            given["bias"] = program.add_tensor(f"{names[0]}_merged", torch.cat(parts), origin=names, trainable=trainable(held))
        sites = [s for n in nodes for s in sites_of(n)]
        with program.graph.inserting_before(first):
            merged = program.call(first.target, *given.values(), sites=sites)  # type: ignore[arg-type]
            merged.meta["trace"] = first.meta.get("trace")
            axis = rank(first) - 1 - (held[0].ndim - 2)
            split = program.call(torch.ops.aten.split_with_sizes.default, merged, [int(w.shape[0]) for w in held], axis, sites=sites)
            found = []
            for k, node in enumerate(nodes):
                part = program.graph.call_function(operator.getitem, (split, k))
                part.meta["val"], part.meta["sites"] = val(split)[k], sites_of(node)
                found.append(part)
        for node, part in zip(nodes, found, strict=True):
            node.replace_all_uses_with(part)
            program.graph.erase_node(node)
        result.change(sites[0], f"{len(nodes)} convolutions merged: {', '.join(sites)}")
        return found


def _key(node: fx.Node) -> Any:
    given = args_by_name(node)
    window = tuple(tuple(given[k]) for k in ("stride", "padding", "dilation"))
    return given["x"], tuple(val(given["weight"]).shape[2:]), window, given["groups"], given["activation"], tuple(given["scalars"])


def _wants_it_whole(reader: fx.Node) -> bool:
    """Whether a reader would have to copy a part of a larger tensor first."""
    row = ops.row(reader.target) if reader.op == "call_function" else None
    return row is None or not (ops.ELEMENTWISE in row.traits or ops.REDUCTION in row.traits or is_op(reader, "aten.cat"))


def _bytes(node: Any) -> int:
    return number(val(node).numel()) * val(node).element_size()
