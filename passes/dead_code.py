"""Erase what nothing reads."""

from __future__ import annotations

from dataclasses import dataclass

from graphwright.ir import Program, op_name, site_of
from graphwright.manager import Pass, PassResult


@dataclass(frozen=True)
class DeadCode(Pass):
    """Erase ops and constants that no output depends on."""

    name = "dead-code"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        before = list(program.graph.nodes)
        was = {n: (site_of(n), op_name(n.target)) for n in before}
        program.tidy()
        for node in before:
            if node._erased:
                site, op = was[node]
                result.change(site if node.op == "call_function" else str(node.target), f"{op} erased: nothing reads it"
                              if node.op == "call_function" else "constant erased: nothing reads it")  # fmt: skip
        return result
