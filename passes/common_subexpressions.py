"""Compute the same thing once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from graphwright import ops
from graphwright.ir import Program, op_name, site_of
from graphwright.manager import Pass, PassResult
from graphwright.passes._nodes import escapes, is_random, is_tensor, same_kind, same_layout, sweep


@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Let calls of the same op with the same arguments share one result."""

    name = "common-subexpressions"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        seen: dict[Any, fx.Node] = {}
        for node in program.nodes:
            if is_random(node):
                continue
            first = seen.setdefault((node.target, _arguments(node), _key(dict(node.kwargs))), node)
            if first is node or self.refused(result, node):
                continue
            if escapes(program, node) and escapes(program, first):
                result.refuse(
                    site_of(node), f"it and {site_of(first)} leave the program: two outputs would share memory"
                )
                continue
            result.change(site_of(node), f"{op_name(node.target)} shared with {site_of(first)}")
            program.replace(node, first)
        sweep(program, result)
        return result


def _arguments(node: fx.Node) -> Any:
    """The positional arguments; in one order where their order makes no difference."""
    key, row = _key(node.args), ops.row(node.target)
    swaps = row is not None and ops.COMMUTATIVE in row.traits and node.kwargs.get("alpha", 1) == 1 and len(node.args) == 2
    if swaps and all(is_tensor(a) and same_kind(a, node) and same_layout(a, node) for a in node.args):  # type: ignore[arg-type]
        return key[0], tuple(sorted(key[1], key=lambda n: n.name))
    return key


def _key(value: Any) -> Any:
    """Hashable, and different for 1, 1.0 and True, and for 0.0 and -0.0."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in sorted(value.items()))
    return type(value).__name__, repr(value)
