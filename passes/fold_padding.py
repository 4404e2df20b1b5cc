"""Let a convolution pad its own input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import Program, arg, args_by_name, op_name, set_arg, site_of, sites_of
from graphwright.manager import Pass, PassResult
from graphwright.passes import _affine as affine
from graphwright.passes._nodes import is_op, readers, same_sizes, sweep, val


@dataclass(frozen=True)
class FoldPadding(Pass):
    """Fold zero padding into the convolutions that read it.

    Padding that is wider on one side goes into convolutions of each channel by itself, whose windows get rows and columns of
    zeros: such convolutions are bound by memory, so that the wider window costs less than a padded copy. (A kernel that does
    not leave these zeros out multiplies them with pixels: an infinity then spreads one window further, as NaN.)
    """

    name = "fold-padding"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for node in program.nodes:
            if not is_op(node, "aten.pad", "aten.constant_pad_nd") or self.refused(result, node):
                continue
            found = _widths(node)
            reason = found if isinstance(found, str) else _reason(program, node, found)
            if reason:
                result.refuse(site_of(node), reason)
                continue
            for product in list(node.users):
                _widen(program, product, node, found)
                result.change(site_of(node), f"{op_name(node.target).split('.')[1]} folded into {site_of(product)}")
        sweep(program, result)
        return result


def _widen(program: Program, product: fx.Node, pad: fx.Node, by: Any) -> None:
    spatial = affine.spatial_axes(product) or 0
    by = _every_axis(by, spatial)
    own = arg(product, "padding")
    own = [0] * spatial if own == "valid" else list(own) * (spatial if len(own) == 1 else 1)
    if any(low != high for low, high in by):
        _pad_window(program, product, by)
    if product.target._overloadname == "padding":  # type: ignore[union-attr]  # the spelling with words
        product.target = getattr(product.target, "_overloadpacket", product.target).default  # type: ignore[union-attr]
    set_arg(product, "padding", [a + max(low, high) for a, (low, high) in zip(own, by, strict=True)])
    product.replace_input_with(pad, pad.args[0])  # type: ignore[arg-type]
    product.meta["sites"] = tuple(dict.fromkeys([*sites_of(product), *sites_of(pad)]))


def _pad_window(program: Program, product: fx.Node, by: Sequence[tuple[int, int]]) -> None:
    """Rows of zeros ahead of the window where more is padded behind it, and the other way round."""
    weight = arg(product, "weight")
    was, name = program.constant(weight), str(weight.target)
    assert was is not None
    zeros: list[int] = []
    for (low, high), step in zip(reversed(by), reversed(_dilation(product, len(by))), strict=True):
        zeros += [max(high - low, 0) // step, max(low - high, 0) // step]
    with program.graph.inserting_before(product):
        wider = program.add_tensor(f"{name}_padded", torch.nn.functional.pad(was, zeros), origin=[name], trainable=isinstance(was, torch.nn.Parameter))
    set_arg(product, "weight", wider)


def _every_axis(by: Sequence[tuple[int, int]], spatial: int) -> list[tuple[int, int]]:
    return [(0, 0)] * (spatial - len(by)) + list(by)


def _dilation(product: fx.Node, axes: int) -> list[int]:
    given = list(arg(product, "dilation"))
    return given * (axes if len(given) == 1 else 1)


def _widths(node: fx.Node) -> list[tuple[int, int]] | str:
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
    return pairs[::-1] or "it pads nothing"


def _reason(program: Program, node: fx.Node, by: Sequence[tuple[int, int]]) -> str | None:
    axes = len(by)
    rest = val(node).ndim - axes
    if not same_sizes(val(node).shape[:rest], val(node.args[0]).shape[:rest]):  # torch's own shape rule of pad fixes some sizes that vary
        return f"it gives {list(val(node).shape)} where what it pads is {list(val(node.args[0]).shape)}: sizes would vary again"
    others = [u for u in node.users if not is_op(u, *affine.CONVOLUTIONS) or arg(u, "input") is not node]
    if others:
        return f"it is read by {readers(node, set(node.users) - set(others))}, no convolution"
    for product in node.users:
        if arg(product, "padding") == "same":
            return f"{site_of(product)} sizes its own padding by its input ('same')"
        spatial = affine.spatial_axes(product) or 0
        if spatial < axes:
            return f"it pads {axes} axes, {site_of(product)} has {spatial}"
        if any(low != high for low, high in by) and (problem := _uneven(program, product, _every_axis(by, spatial))):
            return problem
    return None


def _uneven(program: Program, product: fx.Node, by: Sequence[tuple[int, int]]) -> str | None:
    """None, or why padding that differs from side to side can't go into the window of this convolution."""
    said = f"it pads one side more than the other: {', '.join(f'{low} and {high}' for low, high in reversed(by) if (low, high) != (0, 0))}"
    weight = arg(product, "weight")
    value = program.constant(weight) if isinstance(weight, fx.Node) else None
    if value is None or not isinstance(arg(product, "groups"), int) or value.shape[0] != arg(product, "groups") or value.shape[1] != 1:
        return f"{said}; {site_of(product)} multiplies more than each channel by itself"
    if any((high - low) % step for (low, high), step in zip(by, _dilation(product, len(by)), strict=True)):
        return f"{said}; no whole number of steps in the window of {site_of(product)}"
    return None
