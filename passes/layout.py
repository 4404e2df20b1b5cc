"""Move transposes to where they meet, and cancel them.

Which memory format a convolution runs in is a measured choice of lowering; this pass does what is certain: a transpose
that can pass the elementwise ops after it and join, or undo, the next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from graphwright import ops
from graphwright.ir import Program, site_of, sites_of
from graphwright.manager import Pass, PassResult
from graphwright.passes._nodes import is_number, is_tensor, only_user, permutation, renew, same_sizes, sweep, val

aten = torch.ops.aten


@dataclass(frozen=True)
class Layout(Pass):
    """Move transposes through elementwise ops where two of them become one, or none."""

    name = "layout"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for node in program.nodes:
            if node._erased or permutation(node) is None:
                continue
            chain, ends = _follow(node)
            if not chain or not ends or self.refused(result, node):
                continue
            for done in _sink(program, node, chain, ends):
                result.change(
                    done, f"transposes joined across {len(chain)} elementwise op{'s' if len(chain) > 1 else ''}"
                )
        sweep(program, result)
        return result


def _follow(permute: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The elementwise ops after a permute, one after the other, and the permutes that end them; empty where there are none."""
    chain: list[fx.Node] = []
    now = permute
    while True:
        ends = list(now.users)
        if chain and ends and all(permutation(u) is not None for u in ends):
            return chain, ends
        user = only_user(now)
        if user is None or not _passes(user, now):
            return [], []
        chain.append(user)
        now = user


def _passes(node: fx.Node, permuted: fx.Node) -> bool:
    """Whether ``node`` computes every element from ``permuted``'s at the same place, and nothing else."""
    row = ops.row(node.target)
    if row is None or ops.ELEMENTWISE not in row.traits or ops.CAST in row.traits or not is_tensor(node):
        return False
    others = [n for n in node.all_input_nodes if n is not permuted]
    scalars = all(is_tensor(n) and val(n).ndim == 0 or is_number(val(n)) for n in others)
    return scalars and same_sizes(val(node).shape, val(permuted).shape)


def _sink(program: Program, permute: fx.Node, chain: list[fx.Node], ends: list[fx.Node]) -> Iterator[str]:
    """Let the chain read what the permute read, and its last members' permutes do both transposes at once."""
    order, source = permutation(permute), permute.args[0]
    assert order is not None
    chain[0].replace_input_with(permute, source)  # type: ignore[arg-type]
    for node in chain:
        node.meta["val"] = program.infer(node)
    last = chain[-1]
    for end in ends:
        joined = [order[d] for d in permutation(end) or ()]
        yield site_of(end)
        if joined == sorted(joined):
            last.meta["sites"] = tuple(dict.fromkeys([*sites_of(last), *sites_of(end)]))
            end.replace_all_uses_with(last)
            program.graph.erase_node(end)
        else:
            end.args = (last, joined)
            end.meta["val"] = program.infer(end)
    renew(program, [last, *last.users])
