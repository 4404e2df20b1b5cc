"""What a node or a program moves and computes at the least: bytes and arithmetic, derived from the op table.

These are facts about the graph, not predictions of time: they bound it from below, order work for a search, and say
in a report what a site is bound by. Symbolic sizes count with the values given for them, else with their hints (the
sizes at capture).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import Program, sites_of
from graphwright.ops import facts


@dataclass(frozen=True)
class Cost:
    """Work of a node, a site or a program.

    Attributes:
        flops: arithmetic operations; a multiply-add counts two.
        read: bytes read, each tensor once per node that reads it.
        written: bytes written.
        parameters: the part of ``read`` that comes from parameters, buffers and constants.
    """

    flops: int = 0
    read: int = 0
    written: int = 0
    parameters: int = 0

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written

    @property
    def intensity(self) -> float:
        """Operations per byte; 0.0 where nothing moves."""
        return self.flops / self.bytes if self.bytes else 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.read + other.read, self.written + other.written,
                    self.parameters + other.parameters)  # fmt: skip

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time on a machine with these peaks: whichever of arithmetic and memory takes longer."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def number(value: Any, sizes: Mapping[str, int] | None = None) -> int:
    """An int from an int or a symbolic size.

    Args:
        sizes: values of symbols by name (``"s27"``); the hint from capture stands for those that are not given, and 0
            for a size that only the data decides.
    """
    if not isinstance(value, (torch.SymInt, torch.SymFloat)):
        return int(value)
    expression, env = value.node.expr, value.node.shape_env
    hints = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    given = sizes or {}
    return int(expression.subs({s: given.get(str(s), hints.get(s, 0)) for s in expression.free_symbols}))


def cost(node: fx.Node, sizes: Mapping[str, int] | None = None) -> Cost:
    """The cost of one node; nothing for placeholders, tensors by name and the output."""
    if node.op != "call_function":
        return Cost()
    traffic = facts.traffic(node)
    read = {name: number(size, sizes) for name, size in traffic.read.items()}
    held = {
        o.name for o in facts.operands(node) if o is not None and o.node is not None and _root(o.node).op == "get_attr"
    }
    parameters = sum(size for name, size in read.items() if name in held)
    return Cost(number(facts.flops(node), sizes), sum(read.values()), number(traffic.written, sizes), parameters)


def _root(node: fx.Node) -> fx.Node:
    """The node whose memory this one looks at."""
    while node.op == "call_function" and node.all_input_nodes and facts.aliases(node):
        node = node.all_input_nodes[0]
    return node


def by_node(program: Program, sizes: Mapping[str, int] | None = None) -> dict[fx.Node, Cost]:
    """The cost of every op of a program, in the order of the graph."""
    return {n: cost(n, sizes) for n in program.graph.nodes if n.op == "call_function"}


def by_site(program: Program, sizes: Mapping[str, int] | None = None) -> dict[str, Cost]:
    """The cost of every site: of all nodes whose first site it is."""
    found: dict[str, Cost] = {}
    for node, each in by_node(program, sizes).items():
        site = next(iter(sites_of(node)), node.name)
        found[site] = found.get(site, Cost()) + each
    return found


def total(program: Program, sizes: Mapping[str, int] | None = None) -> Cost:
    """The cost of a whole program, run op by op: what fusion can save is still in it."""
    return sum(by_node(program, sizes).values(), Cost())
