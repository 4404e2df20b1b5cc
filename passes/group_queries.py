"""Let attention read keys and values that several heads of queries share, instead of copies of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import Program, arg, args_by_name, site_of
from graphwright.manager import Pass, PassResult
from graphwright.passes._nodes import is_op, is_tensor, renew, same_sizes, sweep, val


@dataclass(frozen=True)
class GroupQueries(Pass):
    """Read each head of keys and values where it stands, though several heads of queries share it (grouped queries).

    ``[b, h, t, d] → [b, h, 1, t, d] → [b, h, r, t, d] → [b, h·r, t, d]`` before attention copies keys and values ``r`` times;
    attention's kernels find the head of keys by themselves.
    """

    name = "group-queries"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for node in program.nodes:
            if not is_op(node, "aten.scaled_dot_product_attention", "graphwright.attention"):
                continue
            given = args_by_name(node)
            key, value = _shared(given["key"]), _shared(given["value"])
            if (key is None and value is None) or self.refused(result, node):
                continue
            reason = _reason(given, key, value)
            if reason:
                result.refuse(site_of(node), reason)
                continue
            assert key is not None and value is not None
            heads, queries = val(key).shape[1], val(given["query"]).shape[1]
            given |= {"key": key, "value": value} | ({"enable_gqa": True} if "enable_gqa" in given else {})
            with program.graph.inserting_before(node):
                made = program.call(node.target, **given, like=node)  # type: ignore[arg-type]
            result.change(site_of(node), f"{queries} heads of queries read {heads} of keys and values")
            program.replace(node, made)
            renew(program, [made])
        sweep(program, result)
        return result


def _shared(node: Any) -> fx.Node | None:
    """What ``node`` repeats head by head, ``[b, h, t, d]``; None where it is no such repetition."""
    if not is_tensor(node) or val(node).ndim != 4:
        return None
    if is_op(node, "aten.repeat_interleave"):
        source = node.args[0]
        fits = is_tensor(source) and arg(node, "dim") in (1, -3) and isinstance(node.args[1], int) and val(source).ndim == 4
        return source if fits else None
    if not is_op(node, "aten.reshape", "aten.view", "aten.flatten"):
        return None
    spread = node.args[0]
    lifted = spread.args[0] if is_op(spread, "aten.expand") else None
    source = lifted.args[0] if is_op(lifted, "aten.unsqueeze") else None
    if not is_tensor(source) or val(source).ndim != 4 or arg(lifted, "dim") not in (2, -3):
        return None
    b, h, t, d = val(source).shape
    times = val(spread).shape[2] if val(spread).ndim == 5 else None
    if not isinstance(times, int) or not isinstance(h, int):
        return None
    right = same_sizes(val(spread).shape, (b, h, times, t, d)) and same_sizes(val(node).shape, (b, h * times, t, d))
    return source if right else None


def _reason(given: dict[str, Any], key: fx.Node | None, value: fx.Node | None) -> str | None:
    """Why attention can't read what is shared; None where it can."""
    if key is None or value is None:
        return f"its {'keys' if value is None else 'values'} are repeated, its {'values' if value is None else 'keys'} are not"
    heads, queries = val(key).shape[1], val(given["query"]).shape[1]
    if not isinstance(queries, int) or val(value).shape[1] != heads or queries % heads:
        return f"{queries} heads of queries, {heads} of keys, {val(value).shape[1]} of values"
    if val(given["query"]).dtype not in (torch.float32, torch.float64):
        return "not float32: ATen's kernels for shorter floats repeat the heads, too"
    return None
