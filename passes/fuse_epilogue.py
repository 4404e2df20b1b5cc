"""One form for every convolution and linear with a constant weight, with what follows it drawn in.

After this pass each is ``graphwright.conv`` or ``graphwright.linear``, whose epilogue (residual add, then activation)
is an argument: rooms further on see one spelling. Only additions of the output's own shape are drawn in, and of two
contractions that an addition joins, the later one takes it, since by then the other's result is there; what is added to their
sum goes to the earlier one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import Program, arg, args_by_name, op_name, site_of, sites_of
from graphwright.manager import Pass, PassResult
from graphwright.ops.fused import activation_of
from graphwright.passes import _affine as affine
from graphwright.passes._nodes import (
    RESHAPES,
    is_op,
    is_tensor,
    only_user,
    permutation,
    rank,
    readers,
    renew,
    same_kind,
    same_layout,
    same_shape,
    sweep,
    val,
)

OURS = ("graphwright.conv", "graphwright.linear")


@dataclass(frozen=True)
class FuseEpilogue(Pass):
    """Draw residual additions and activations into the convolution or linear before them."""

    name = "fuse-epilogue"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for node in program.nodes:
            if is_op(
                node, "aten.convolution", "aten.linear", *affine.CONVOLUTIONS, *affine.TRANSPOSED
            ) and not self.refused(result, node):
                self._convert(program, node, result)
        for node in program.nodes:
            if not node._erased and is_op(node, *OURS) and self.selects(sites_of(node)):
                fused = self._residual(program, node, result) or self._past_transpose(program, node, result) or node
                self._activation(program, fused, result)
        sweep(program, result)
        return result

    def _convert(self, program: Program, node: fx.Node, result: PassResult) -> None:
        found = _arguments(program, node)
        if isinstance(found, str):
            result.refuse(site_of(node), found)
            return
        ours = torch.ops.graphwright.linear if is_op(node, "aten.linear") else torch.ops.graphwright.conv
        with program.graph.inserting_before(node):
            new = program.call(ours.default, *found, None, "none", [], like=node)
        result.change(site_of(node), f"{op_name(node.target)} → {op_name(new.target)}")
        program.replace(node, new)

    def _residual(self, program: Program, node: fx.Node, result: PassResult) -> fx.Node | None:
        add = next((u for u in node.users if is_op(u, "aten.add")), None)
        if add is None or arg(node, "other") is not None or arg(node, "activation") != "none":
            return None
        other = add.args[1] if add.args[0] is node else add.args[0]
        if not is_tensor(other):
            return None
        if _waits(other, add, node):
            return self._early(program, node, add, result)  # the later one takes it, when its turn comes
        if reason := _no_residual(node, add, other):
            result.refuse(site_of(add), reason)
            return None
        if self.refused(result, add):
            return None
        return _redo(program, node, add, "residual add", result, other=other)

    def _past_transpose(self, program: Program, node: fx.Node, result: PassResult) -> fx.Node | None:
        """A residual that is added to a linear's result once its axes are back where pictures have them: turned, it is added before.

        Only where everything lies in memory as the linear gives it, so that turning moves nothing.
        """
        turn = only_user(node)
        order = None if turn is None else permutation(turn)
        add = None if order is None else only_user(turn)
        if add is None or not is_op(node, "graphwright.linear") or not is_op(add, "aten.add") or program.output in add.users:
            return None
        other = add.args[1] if add.args[0] is turn else add.args[0]
        if arg(node, "other") is not None or arg(node, "activation") != "none" or not is_tensor(other):
            return None
        if _no_residual(turn, add, other) or not same_layout(turn, add) or not same_layout(turn, other) or self.refused(result, add):
            return None
        with program.graph.inserting_before(add):
            back = other.args[0] if permutation(other) == order else program.call(turn.target, other, _inverse(order), like=turn)
            given = {**args_by_name(node), "other": back}
            new = program.call(node.target, *given.values(), like=node, sites=[*sites_of(node), *sites_of(add)])  # type: ignore[arg-type]
            turned = program.call(turn.target, new, list(order), like=turn)
        result.change(site_of(add), f"residual add drawn into {site_of(node)}, past a transpose")
        add.replace_all_uses_with(turned)
        for old in (add, turn, node):
            program.graph.erase_node(old)
        return None  # an activation would follow the transpose

    def _early(self, program: Program, node: fx.Node, add: fx.Node, result: PassResult) -> fx.Node | None:
        """``(node + later) + r``, as parallel attention and feed-forward parts have it: ``node`` takes ``r``."""
        outer = only_user(add)
        if outer is None or not is_op(outer, "aten.add") or only_user(node) is not add:
            return None
        r = outer.args[1] if outer.args[0] is add else outer.args[0]
        if not is_tensor(r) or not r < node or not same_kind(r, node) or not same_kind(outer, node) or outer.kwargs.get("alpha", 1) != 1:
            return None
        if is_op(r, *OURS) and only_user(r) is outer:
            return None  # it may take the sum itself
        if self.refused(result, outer):
            return None
        given = {**args_by_name(node), "other": r}
        with program.graph.inserting_before(node):
            new = program.call(node.target, *given.values(), like=node)  # type: ignore[arg-type]
        program.replace(node, new)
        result.change(site_of(outer), f"residual add drawn into {site_of(node)}")
        outer.replace_all_uses_with(add)
        program.graph.erase_node(outer)
        return new

    def _behind_views(self, program: Program, node: fx.Node, result: PassResult) -> None:
        """An activation that stands behind views: it may as well stand before them."""
        view, user = node, only_user(node)
        while user is not None and is_op(user, *RESHAPES, "aten.permute") and user.args[0] is view:
            view, user = user, only_user(user)
        if view is node or user is None or not user.args or user.args[0] is not view or not hasattr(user.target, "_schema"):
            return
        found = activation_of(user.target, args_by_name(user))
        if found is None or not same_kind(view, user) or self.refused(result, user):
            return
        given = {**args_by_name(node), "activation": found[0], "scalars": list(found[1])}
        with program.graph.inserting_before(node):
            new = program.call(node.target, *given.values(), like=node, sites=[*sites_of(node), *sites_of(user)])  # type: ignore[arg-type]
        result.change(site_of(user), f"{found[0]} drawn into {site_of(node)}, past views")
        program.replace(node, new)
        moved = not same_layout(view, user)
        user.replace_all_uses_with(view)
        program.graph.erase_node(user)
        if moved:
            renew(program, [view])

    def _activation(self, program: Program, node: fx.Node, result: PassResult) -> None:
        found = None
        for user in node.users:
            if user.op == "call_function" and user.args and user.args[0] is node and hasattr(user.target, "_schema"):
                found = activation_of(user.target, args_by_name(user))
                if found:
                    break
        if arg(node, "activation") != "none":
            return
        if found is None:
            self._behind_views(program, node, result)
        elif only_user(node) is not user:
            result.refuse(site_of(user), f"{site_of(node)} is read by {readers(node, [user]) or 'it twice'} too")
        elif not same_kind(node, user):
            result.refuse(site_of(user), "it changes dtype or shape")
        elif not self.refused(result, user):
            _redo(program, node, user, found[0], result, activation=found[0], scalars=list(found[1]))


def _redo(program: Program, node: fx.Node, last: fx.Node, what: str, result: PassResult, **changed: Any) -> fx.Node:
    """``node`` once more, where ``last`` stands and in its stead, with some arguments changed."""
    given = {**args_by_name(node), **changed}
    with program.graph.inserting_before(last):
        new = program.call(node.target, *given.values(), like=node)  # type: ignore[arg-type]
    result.change(site_of(last), f"{what} drawn into {site_of(node)}")
    program.replace(last, new)
    program.graph.erase_node(node)
    return new


def _waits(other: fx.Node, add: fx.Node, node: fx.Node) -> bool:
    """Whether ``other`` is a contraction after ``node`` that can take the addition itself."""
    if not is_op(other, *OURS) or other is node or not node < other:
        return False
    return arg(other, "activation") == "none" and arg(other, "other") is None and _no_residual(other, add, node) is None


def _inverse(order: Sequence[int]) -> list[int]:
    return [list(order).index(k) for k in range(len(order))]


def _no_residual(node: fx.Node, add: fx.Node, other: fx.Node) -> str | None:
    if other is node:
        return f"it adds {site_of(node)} to itself"
    if add.kwargs.get("alpha", 1) != 1:
        return f"its alpha is {add.kwargs['alpha']}, not 1"
    if not same_shape(other, node):
        return f"the other operand has shape {list(val(other).shape)}, not the output's {list(val(node).shape)}"
    if not same_kind(other, node) or not same_kind(add, node):
        return f"it mixes {val(node).dtype} and {val(other).dtype}"
    return None if only_user(node) is add else f"{site_of(node)} is read by {readers(node, [add])} too"


def _arguments(program: Program, node: fx.Node) -> tuple[Any, ...] | str:
    """``x, weight, bias`` and for convolutions ``stride, padding, dilation, groups`` as our op takes them, or why not."""
    if is_op(node, *affine.TRANSPOSED) or args_by_name(node).get("transposed"):
        return "a transposed convolution has no fused form"
    given = args_by_name(node)
    weight = program.constant(given["weight"])
    if weight is None:
        return "its weight is computed, or written to"
    if not weight.is_floating_point() or val(node).dtype != weight.dtype:
        return f"its weight is {weight.dtype}"
    head = (given["input"], given["weight"], given["bias"])
    if is_op(node, "aten.linear"):
        return head if weight.ndim == 2 else f"its weight has {weight.ndim} axes"
    n = weight.ndim - 2
    if not 1 <= n <= 3 or rank(given["input"]) not in (n + 1, n + 2):
        return f"a convolution over {n} axes"
    stride, dilation = _per_axis(given["stride"], n), _per_axis(given["dilation"], n)
    padding = _padding(given["padding"], weight.shape[2:], dilation)
    return padding if isinstance(padding, str) else (*head, stride, padding, dilation, given["groups"])


def _per_axis(value: Sequence[int], n: int) -> list[int]:
    return list(value) * (n if len(value) == 1 else 1)


def _padding(value: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int] | str:
    """Padding per axis; ``"same"`` widens an axis by dilation * (kernel - 1), which must be even to be symmetric."""
    if not isinstance(value, str):
        return _per_axis(value, len(kernel))
    widths = [0 if value == "valid" else d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(w % 2 for w in widths):
        return f"padding 'same' adds {widths} in all: an odd number cannot stand on both sides alike"
    return [w // 2 for w in widths]
