"""Let a convolution pad its own input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from graphwright.ir import Program, arg, args_by_name, op_name, set_arg, site_of, sites_of
from graphwright.manager import Pass, PassResult
from graphwright.passes import _affine as affine
from graphwright.passes._nodes import is_op, rank, readers, sweep


@dataclass(frozen=True)
class FoldPadding(Pass):
    """Fold symmetric zero padding into the convolutions that read it."""

    name = "fold-padding"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for node in program.nodes:
            if not is_op(node, "aten.pad", "aten.constant_pad_nd") or self.refused(result, node):
                continue
            found = _symmetric(node)
            reason = found if isinstance(found, str) else _reason(node, len(found))
            if reason:
                result.refuse(site_of(node), reason)
                continue
            for product in list(node.users):
                _widen(product, node, found)
                result.change(site_of(node), f"{op_name(node.target).split('.')[1]} folded into {site_of(product)}")
        sweep(program, result)
        return result


def _widen(product: fx.Node, pad: fx.Node, by: Any) -> None:
    spatial = affine.spatial_axes(product) or 0
    own = arg(product, "padding")
    own = [0] * spatial if own == "valid" else list(own) * (spatial if len(own) == 1 else 1)
    padding = [a + b for a, b in zip(own, by, strict=True)]
    if product.target._overloadname == "padding":  # type: ignore[union-attr]  # the spelling with words
        product.target = getattr(product.target, "_overloadpacket", product.target).default  # type: ignore[union-attr]
    set_arg(product, "padding", padding)
    product.replace_input_with(pad, pad.args[0])  # type: ignore[arg-type]
    product.meta["sites"] = tuple(dict.fromkeys([*sites_of(product), *sites_of(pad)]))


def _symmetric(node: fx.Node) -> list[int] | str:
    """How much a pad adds on both sides of each trailing axis, first axis first, or why it is not of that kind."""
    given = args_by_name(node)
    if given.get("mode", "constant") != "constant":
        return f"it pads in mode {given['mode']!r}, not with zeros"
    if given.get("value") not in (None, 0):
        return f"it pads with {given['value']}, not with zeros"
    pairs = list(zip(given["pad"][::2], given["pad"][1::2], strict=True))
    while pairs and pairs[-1] == (0, 0):
        pairs.pop()
    if any(not isinstance(n, int) or n < 0 for pair in pairs for n in pair):
        return "its widths are not known, or crop"
    if any(low != high for low, high in pairs):
        return f"it pads one side more than the other: {', '.join(f'{a} and {b}' for a, b in pairs)}"
    return [low for low, _ in reversed(pairs)] or "it pads nothing"


def _reason(node: fx.Node, axes: int) -> str | None:
    others = [u for u in node.users if not is_op(u, *affine.CONVOLUTIONS) or arg(u, "input") is not node]
    if others:
        return f"it is read by {readers(node, set(node.users) - set(others))}, no convolution"
    for product in node.users:
        if arg(product, "padding") == "same":
            return f"{site_of(product)} sizes its own padding by its input ('same')"
        if affine.spatial_axes(product) != axes:
            return f"it pads {axes} axes, {site_of(product)} has {affine.spatial_axes(product)}" if rank(node) else None
    return None
