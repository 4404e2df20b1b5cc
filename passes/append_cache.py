"""Let a cache grow in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphwright.ir import Program, arg, site_of
from graphwright.manager import Pass, PassResult
from graphwright.passes._nodes import is_op, sweep, val


@dataclass(frozen=True)
class AppendCache(Pass):
    """Write new keys and values behind the cached ones instead of copying both.

    A concatenation along axis 2 of an input ``[batch, heads, tokens, size]`` with something computed, which the program also
    returns, is a cache that grows. For programs whose caller keeps room behind the input, as ``Decoder`` does.
    """

    name = "append-cache"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        returned = set(program.output.all_input_nodes)
        for node in program.nodes:
            parts = arg(node, "tensors") if is_op(node, "aten.cat") else None
            if parts is None or node not in returned or len(parts) != 2 or parts[0].op != "placeholder" or self.refused(result, node):
                continue
            reason = _reason(node, *parts)
            if reason:
                result.refuse(site_of(node), reason)
                continue
            with program.graph.inserting_before(node):
                made = program.call(torch.ops.graphwright.cache_append.default, *parts, like=node)
            result.change(site_of(node), f"appended to {parts[0].name}")
            program.replace(node, made)
        sweep(program, result)
        return result


def _reason(node: fx.Node, past: fx.Node, new: fx.Node) -> str | None:
    """Why a concatenation is no growing cache; None where it is one."""
    if val(past).ndim != 4:
        return f"it has {val(past).ndim} axes, a cache 4"
    if arg(node, "dim") not in (2, -2):
        return f"it grows along axis {arg(node, 'dim')}, a cache along axis 2"
    if any(is_op(user, "graphwright.cache_append") for user in past.users):
        return f"another value was appended to {past.name}: both would stand in the same place"
    return "it is joined with an input, not with something computed" if new.op == "placeholder" else None
