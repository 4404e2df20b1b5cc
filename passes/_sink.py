"""What a transpose or a reshape may change places with, and what becomes of the op when it does.

A view says how a value relates to what would be computed in its stead: ``value = view(other)``. ``Turned`` is a permute
of ``other``, ``Regrouped`` a reshape of ``other``, whose shape it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright import ops
from graphwright.ir import Program, arg, args_by_name, set_arg
from graphwright.passes._nodes import (
    RESHAPES,
    is_number,
    is_op,
    is_tensor,
    permutation,
    rank,
    same_size,
    same_sizes,
    trainable,
    val,
)

_REDUCTIONS = ("aten.mean", "aten.sum", "aten.amax", "aten.amin")
_SOFTMAX = ("aten.softmax", "aten._softmax", "aten.log_softmax")
_SPLITS = ("aten.split", "aten.split_with_sizes", "aten.chunk")
#: A constant this large is not stored a second time in another order.
MOST = 1 << 16


@dataclass(frozen=True)
class Turned:
    order: tuple[int, ...]

    @property
    def nothing(self) -> bool:
        return self.order == tuple(range(len(self.order)))


@dataclass(frozen=True)
class Regrouped:
    shape: tuple[Any, ...]
    nothing = False


View = Turned | Regrouped
#: The view of the op's value, and what changes its arguments once its inputs are the others.
Carried = tuple[View, Callable[[], None]]


def entry(node: fx.Node) -> View | None:
    """The view that ``node`` itself is."""
    order = permutation(node)
    if order is not None:
        return Turned(order)
    if is_op(node, *RESHAPES) and is_tensor(node.args[0]):
        return Regrouped(tuple(val(node.args[0]).shape))
    return None


def meets(node: fx.Node, view: View) -> bool:
    """Whether ``node``, reading a value of that view, can be joined with it."""
    return permutation(node) is not None if isinstance(view, Turned) else is_op(node, "aten.view", "aten.reshape")


def carry(program: Program, node: fx.Node, views: Mapping[fx.Node, View]) -> Carried | None:
    """How ``node`` computes what it computes from the other values; None where it cannot."""
    read = [n for n in node.all_input_nodes if n in views]
    view = views[read[0]]
    if any(views[n] != view for n in read):
        return None
    if is_op(node, "operator.getitem"):
        return view, lambda: None
    if not is_tensor(node) and not is_op(node, *_SPLITS):
        return None
    row = ops.row(node.target)
    if row is not None and ops.ELEMENTWISE in row.traits and ops.CAST not in row.traits and ops.RANDOM not in row.traits:
        return _elementwise(program, node, view, read)
    if is_op(node, "aten.linear", "aten.layer_norm"):
        return _last_axis(node, view, read)
    return _along(node, view, read) if isinstance(view, Turned) else None


def _elementwise(program: Program, node: fx.Node, view: View, read: list[fx.Node]) -> Carried | None:
    shape = val(read[0]).shape
    if not same_sizes(val(node).shape, shape) or any(not same_sizes(val(n).shape, shape) for n in read):
        return None
    turned: list[fx.Node] = []
    for other in node.all_input_nodes:
        if other in read or is_number(val(other)) or (is_tensor(other) and val(other).ndim == 0):
            continue
        held = program.constant(other)
        if held is None or not isinstance(view, Turned) or held.numel() > MOST:
            return None
        turned.append(other)

    def change() -> None:
        for other in turned:
            node.replace_input_with(other, _turned_constant(program, other, view))  # type: ignore[arg-type]

    return view, change


def _turned_constant(program: Program, node: fx.Node, view: Turned) -> fx.Node:
    held = program.tensor(str(node.target))
    back = [view.order.index(k) for k in range(len(view.order))]
    moved = held.detach().reshape([1] * (len(back) - held.ndim) + list(held.shape)).permute(back)
    if same_sizes(moved.shape, held.shape) and all(n == 1 for n in held.shape):
        return node
    return program.add_tensor(f"{node.target}_turned", moved.contiguous(), origin=[str(node.target)], trainable=trainable([held]))


def _last_axis(node: fx.Node, view: View, read: list[fx.Node]) -> Carried | None:
    """Ops over the last axis alone: it must stay where it is."""
    x = node.args[0]
    if read != [x] or (is_op(node, "aten.layer_norm") and len(arg(node, "normalized_shape")) != 1):
        return None
    if isinstance(view, Turned):
        return (view, lambda: None) if view.order[-1:] == (len(view.order) - 1,) else None
    if not view.shape or not same_size(view.shape[-1], val(x).shape[-1]):
        return None
    return Regrouped((*view.shape[:-1], val(node).shape[-1])), lambda: None


def _along(node: fx.Node, view: Turned, read: list[fx.Node]) -> Carried | None:
    """Ops along axes that they name."""
    order, x = view.order, read[0]
    if is_op(node, "aten.cat"):
        parts = node.args[0]
        if any(p not in read or rank(p) != len(order) for p in parts):  # type: ignore[union-attr]
            return None
        return view, lambda: set_arg(node, "dim", order[int(node.args[1]) % len(order)])  # type: ignore[arg-type, call-overload]
    if node.args[0] is not x or len(read) != 1:
        return None
    if is_op(node, *_SOFTMAX, "aten.slice", "aten.narrow", *_SPLITS):
        axis = arg(node, "dim")
        return (view, lambda: set_arg(node, "dim", order[axis % len(order)])) if isinstance(axis, int) else None
    if is_op(node, "aten.select"):
        axis = arg(node, "dim") % len(order)
        return _without(order, [axis]), lambda: set_arg(node, "dim", order[axis])
    if is_op(node, *_REDUCTIONS):
        given = args_by_name(node)
        if given.get("dim") is None or given["dim"] == []:
            return None
        listed = [given["dim"]] if isinstance(given["dim"], int) else list(given["dim"])
        if any(not isinstance(d, int) for d in listed):
            return None
        axes = [d % len(order) for d in listed]
        return view if given.get("keepdim") else _without(order, axes), lambda: set_arg(node, "dim", [order[d] for d in axes])
    return None


def _without(order: tuple[int, ...], axes: list[int]) -> Turned:
    """The order of what is left when these axes of the value go."""
    left = [o for k, o in enumerate(order) if k not in axes]
    return Turned(tuple(sorted(left).index(o) for o in left))


def join(program: Program, end: fx.Node, view: View) -> bool:
    """Let a permute or reshape, which reads the other value now, do both; True where there is nothing left to do."""
    if isinstance(view, Turned):
        joined = [view.order[d] for d in permutation(end) or ()]
        end.args = (end.args[0], joined)
        return joined == sorted(joined)
    return same_sizes(val(end).shape, view.shape)


def cancels(end: fx.Node, view: View) -> bool:
    if isinstance(view, Turned):
        return [view.order[d] for d in permutation(end) or ()] == list(range(len(view.order)))
    return same_sizes(val(end).shape, view.shape)


def as_reshape(node: fx.Node) -> None:
    """A view of one value may be no view of another."""
    if is_op(node, "aten.view"):
        node.target = torch.ops.aten.reshape.default
