"""Compute parallel linears that read the same input (query, key and value; gate and up) as one."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir import Program, arg, args_by_name, site_of, sites_of
from graphwright.manager import Pass, PassResult
from graphwright.ops.fused import activation_call
from graphwright.passes._nodes import escapes, is_op, only_user, renew, same_kind, sweep, trainable, val


@dataclass(frozen=True)
class MergeLinears(Pass):
    """Merge linears that read the same input into one, whose output is split.

    Args:
        most: how many are merged at the most (a decoder's cross-attention reads one input in every layer).
        max_columns: a linear at least this wide fills the machine by itself and is left alone.
    """

    name = "merge-linears"

    most: int = 4
    max_columns: int = 8192

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        pairs = self._gates(program, result)
        groups: dict[Any, list[fx.Node]] = {}
        for node in program.nodes:
            if not is_op(node, "aten.linear", "graphwright.linear"):
                continue
            given = args_by_name(node)
            x = given.get("x", given.get("input"))
            key = (x, node.target, given.get("activation"), tuple(given.get("scalars", ())), pairs.get(node))
            groups.setdefault(key, []).append(node)
        shared = _repeated(program, groups.values())
        for nodes in groups.values():
            if len(nodes) > 1:
                fit = [n for n in nodes if not self._left_out(program, n, result, shared)]
                for start in range(0, len(fit), self.most):
                    self._merge(program, fit[start : start + self.most], result)
        sweep(program, result)
        return result

    def _gates(self, program: Program, result: PassResult) -> dict[fx.Node, fx.Node]:
        """``activation(gate(x)) * up(x)``: the activation is taken out of the gate's linear again, so that both become one.

        What is left behind the product is one elementwise pass, as it was.

        Returns:
            The linears of such pairs, and the multiplication of each.
        """
        found: dict[fx.Node, fx.Node] = {}
        for node in program.nodes:
            if not is_op(node, "aten.mul") or not all(is_op(a, "graphwright.linear") for a in node.args[:2]):
                continue
            gate, up = node.args[:2] if arg(node.args[0], "activation") != "none" else node.args[1::-1]
            fits = arg(gate, "x") is arg(up, "x") and arg(gate, "activation") != "none" and arg(up, "activation") == "none"
            both = [n for n in (gate, up) if only_user(n) is node and self.selects(sites_of(n)) and _reason(self, program, n) is None]
            if not fits or len(both) < 2 or not same_kind(gate, up):
                continue
            target, options = activation_call(arg(gate, "activation"), arg(gate, "scalars"))
            given = {**args_by_name(gate), "activation": "none", "scalars": []}
            with program.graph.inserting_before(gate):
                plain = program.call(gate.target, *given.values(), like=gate)  # type: ignore[arg-type]
                active = program.call(target, plain, like=gate, **options)
            result.change(site_of(gate), f"{arg(gate, 'activation')} taken out, to compute {site_of(up)} with it")
            program.replace(gate, active)
            found |= {plain: node, up: node}
        return found

    def _left_out(self, program: Program, node: fx.Node, result: PassResult, shared: set[fx.Node]) -> bool:
        if self.refused(result, node):
            return True
        reason = _reason(self, program, node, node in shared)
        if reason:
            result.refuse(site_of(node), reason)
        return reason is not None

    def _merge(self, program: Program, nodes: list[fx.Node], result: PassResult) -> None:
        if len(nodes) < 2:
            return
        first = nodes[0]
        weights = [arg(n, "weight") for n in nodes]
        biases = [arg(n, "bias") for n in nodes]
        held = [program.tensor(str(w.target)) for w in weights]
        if len({(w.dtype, w.device) for w in held}) > 1:
            result.refuse(site_of(first), "the weights differ in dtype or device")
            return
        sizes = [int(w.shape[0]) for w in held]
        given = args_by_name(first)
        given["weight"] = _stored(program, f"{weights[0].target}_merged", held, [str(w.target) for w in weights])
        if any(b is not None for b in biases):
            parts = [_bias(program, b, w) for b, w in zip(biases, held, strict=True)]
            names = [str(b.target) for b in biases if b is not None]
            given["bias"] = _stored(program, f"{names[0]}_merged", parts, names, like=held)
        sites = [s for n in nodes for s in sites_of(n)]
        with program.graph.inserting_before(first):
            merged = program.call(first.target, *given.values(), sites=sites)  # type: ignore[arg-type]
            merged.meta["trace"] = first.meta.get("trace")
            split = program.call(torch.ops.aten.split_with_sizes.default, merged, sizes, -1, sites=sites)
            parts_out = [_part(program, split, k, sites_of(n)) for k, n in enumerate(nodes)]
        for node, part in zip(nodes, parts_out, strict=True):
            node.replace_all_uses_with(part)
            program.graph.erase_node(node)
        renew(program, parts_out)
        result.change(sites[0], f"{len(nodes)} linears merged: {', '.join(sites)}")


def _reason(limits: MergeLinears, program: Program, node: fx.Node, shared: bool = False) -> str | None:
    """Why a linear is not to be merged with others, whichever these are."""
    weight, bias = program.constant(arg(node, "weight")), arg(node, "bias")
    if weight is None or (bias is not None and program.constant(bias) is None):
        return "its weight or bias is no constant"
    if args_by_name(node).get("other") is not None:
        return "it adds a residual of its own"
    if len(arg(node, "weight").users) > 1 and not shared:
        return f"its weight {arg(node, 'weight').target} is read elsewhere too: it would be stored twice"
    if is_op(only_user(node), "aten.split_with_sizes"):
        return "it is several linears already, or is taken apart as such"
    if weight.shape[0] >= limits.max_columns:
        return f"it has {weight.shape[0]} columns and fills the machine by itself"
    if escapes(program, node):
        return "it leaves the program, and would share memory with the others"
    return None


def _repeated(program: Program, groups: Iterable[list[fx.Node]]) -> set[fx.Node]:
    """Linears whose weights are read elsewhere only by groups that read them all in the same order: layers used several times."""
    found: dict[tuple[Any, ...], list[fx.Node]] = {}
    for nodes in groups:
        if len(nodes) > 1:
            found.setdefault(tuple((arg(n, "weight"), arg(n, "bias")) for n in nodes), []).extend(nodes)
    return {n for key, nodes in found.items() for n in nodes
            if len(nodes) > len(key) and all(set(w.users) <= set(nodes) for w, _ in key)}  # fmt: skip


def _stored(program: Program, name: str, parts: list[Tensor], origin: list[str], like: list[Tensor] | None = None) -> fx.Node:
    """The parts one below the other as a constant; one that holds the same already serves again."""
    value = torch.cat([p.detach() for p in parts])
    for node in program.graph.find_nodes(op="get_attr", target=name):
        held = program.constant(node)
        if held is not None and torch.equal(held, value):
            return node
    return program.add_tensor(name, value, origin=origin, trainable=trainable(like or parts))


def _part(program: Program, split: fx.Node, k: int, sites: tuple[str, ...]) -> fx.Node:
    node = program.graph.call_function(operator.getitem, (split, k))
    node.meta["val"], node.meta["sites"] = val(split)[k], sites
    return node


def _bias(program: Program, bias: fx.Node | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else program.tensor(str(bias.target)).detach()
