"""Bring a captured program into one form, without what computes nothing.

Signed zeros: ``x + 0.0`` gives ``0.0`` for ``-0.0``, so it is no identity in the letter. It is dropped where the sign of
a zero cannot reach the output other than as the sign of a zero, and kept, with the reason, where a reciprocal, a
division or the like would turn it into another number. ``x - 0.0``, ``x * 1`` and ``x / 1`` are identities, NaN included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import Program, arg, args_by_name, op_name, site_of
from graphwright.manager import Pass, PassResult
from graphwright.passes._nodes import (
    RESHAPES,
    base,
    escapes,
    is_number,
    is_op,
    is_tensor,
    only_user,
    permutation,
    rank,
    renew,
    root,
    same_kind,
    same_layout,
    same_shape,
    sweep,
    val,
)

aten = torch.ops.aten

#: A rule gives the node that stands for ``node`` afterwards, or the reason why not, or None where it has no say.
Rule = Callable[[Program, fx.Node], fx.Node | str | None]


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Drop what computes nothing: eval-mode dropout, identities, casts and reshapes without effect, double transposes."""

    name = "canonicalize"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        sweep(program, result)  # assertions on metadata go first: they would count as readers
        known = set(program.nodes)
        for node in program.nodes:
            rule = RULES.get(base(node))
            if rule is None or not is_tensor(node):
                continue
            with program.graph.inserting_before(node):
                new = rule(program, node)
            if new is None or new is node:
                continue
            if isinstance(new, str):
                result.refuse(site_of(node), new)
                continue
            if self.refused(result, node):
                _take_back(program, new, known)
                continue
            made = new.op == "call_function" and new not in known
            what = f"is {op_name(new.target)} of {root(new).name}" if made else "dropped"
            result.change(site_of(node), f"{op_name(node.target).split('.')[1]} {what}")
            if made:
                program.replace(node, new)
            else:  # an identity: its reader's site is no business of the node before it
                moved = not same_layout(new, node)
                node.replace_all_uses_with(new)
                program.graph.erase_node(node)
                if moved:
                    renew(program, [new])
        sweep(program, result)
        return result


def dropout(program: Program, node: fx.Node) -> fx.Node | str | None:
    if arg(node, "train") and arg(node, "p") != 0:
        return "dropout in train mode draws random numbers"
    return arg(node, "input")


def add(program: Program, node: fx.Node) -> fx.Node | str | None:
    x, other, alpha = node.args[0], node.args[1], node.kwargs.get("alpha", 1)
    if not (is_number(other) and is_number(alpha) and other == 0 and math.isfinite(alpha)):
        return None
    plus_zero = math.copysign(1.0, other * alpha) > 0
    if plus_zero and val(node).dtype.is_floating_point and (reason := zero_sign_matters(node)):
        return f"adding 0 turns -0.0 into 0.0, and {reason}"
    return identity(program, node, x)


def sub(program: Program, node: fx.Node) -> fx.Node | str | None:
    other, alpha = node.args[1], node.kwargs.get("alpha", 1)
    neutral = is_number(other) and other == 0 and math.copysign(1.0, other) > 0 and alpha == 1
    return identity(program, node, node.args[0]) if neutral else None


def mul(program: Program, node: fx.Node) -> fx.Node | str | None:
    other = node.args[1]
    if node.kwargs.get("rounding_mode") is not None:
        return None
    return identity(program, node, node.args[0]) if is_number(other) and other == 1 else None


def _take_back(program: Program, new: fx.Node, known: set[fx.Node]) -> None:
    """Erase what a rule has put in for a node that is to stay."""
    if new.op == "call_function" and new not in known and not new.users:
        inputs = new.all_input_nodes
        program.graph.erase_node(new)
        for x in inputs:
            _take_back(program, x, known)


def identity(program: Program, node: fx.Node, x: Any) -> fx.Node | str | None:
    """``x`` where it has the kind of ``node``: arithmetic that changes the dtype by promotion is none."""
    if not (is_tensor(x) and same_kind(x, node)):
        return None
    return x if same_layout(x, node) else "it also changes the memory layout"


def cast(program: Program, node: fx.Node) -> fx.Node | str | None:
    x = node.args[0]
    if not is_tensor(x) or not same_shape(x, node) or val(x).device != val(node).device:
        return None
    if val(x).dtype == val(node).dtype:
        # reshape takes any layout, and copies where it must: a copy before it is at best a second one
        settled = is_op(node, "aten.contiguous", "aten.clone") and all(is_op(u, "aten.reshape") for u in node.users)
        return x if settled or same_layout(x, node) else None
    if is_op(x, "aten.to", "aten._to_copy") and is_tensor(x.args[0]):
        source = x.args[0]
        wider = torch.promote_types(val(source).dtype, val(x).dtype) == val(x).dtype
        floats = val(source).dtype.is_floating_point and val(x).dtype.is_floating_point
        if floats and wider and same_kind(source, node) and same_layout(source, node):
            return source  # up and down again
    return None


def reshape(program: Program, node: fx.Node) -> fx.Node | str | None:
    x = node.args[0]
    if same_shape(x, node):
        return x
    if is_op(node, "aten.flatten", "aten.unflatten"):
        return _as_reshape(program, node)
    if not is_op(x, *RESHAPES):
        return None
    source = x.args[0]
    if same_shape(source, node):
        return source if same_layout(source, node) else None
    merges = is_op(node, "aten.view", "aten.reshape", "aten._unsafe_view") and (
        is_op(x, "aten.view") or only_user(x) is node
    )
    if not merges:
        return None
    try:
        return program.call(aten.view.default, source, node.args[1], like=node)
    except (RuntimeError, ValueError):  # no view of these strides
        return program.call(aten.reshape.default, source, node.args[1], like=node)


def _as_reshape(program: Program, node: fx.Node) -> fx.Node | None:
    """flatten and unflatten, spelled with the sizes they give; with two sizes that vary there is no such spelling."""
    sizes = list(val(node).shape)
    vary = [k for k, n in enumerate(sizes) if not isinstance(n, int)]
    if len(vary) > 1 or (vary and 0 in sizes):
        return None
    return program.call(
        aten.reshape.default, node.args[0], [-1 if k in vary else n for k, n in enumerate(sizes)], like=node
    )


def unchanged(program: Program, node: fx.Node) -> fx.Node | str | None:
    """expand, slice, narrow: whatever they were asked, the shape is the same."""
    return node.args[0] if same_shape(node.args[0], node) and same_layout(node.args[0], node) else None


def alias(program: Program, node: fx.Node) -> fx.Node | str | None:
    return node.args[0]


def transpose(program: Program, node: fx.Node) -> fx.Node | str | None:
    """Every spelling of a transpose becomes ``aten.permute``; two in a row become one, or none."""
    x, n = node.args[0], rank(node)
    order = _order(node, n)
    if order is None:
        return None
    inner = permutation(x)
    if inner is not None:
        x, order = x.args[0], tuple(inner[d] for d in order)
    if order == tuple(range(n)):
        return x
    if inner is None and is_op(node, "aten.permute"):
        return None
    return program.call(aten.permute.default, x, list(order), like=node)


def _order(node: fx.Node, n: int) -> tuple[int, ...] | None:
    order = list(range(n))
    if is_op(node, "aten.permute"):
        return permutation(node)
    if is_op(node, "aten.t", "aten.numpy_T", "aten.matrix_H"):
        return None if val(node).is_complex() else tuple(reversed(order))
    if is_op(node, "aten.mT", "aten.adjoint"):
        a, b = -2, -1
    elif is_op(node, "aten.movedim", "aten.moveaxis"):
        a, b = node.args[1:3]
        if not isinstance(a, int):
            return None
        order.insert(b % n, order.pop(a % n))
        return tuple(order)
    else:
        a, b = node.args[1:3]
    if n < 2 or (val(node).is_complex() and is_op(node, "aten.adjoint")):
        return None
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def pad(program: Program, node: fx.Node) -> fx.Node | str | None:
    """Padding by nothing."""
    return None if any(not isinstance(n, int) or n for n in arg(node, "pad")) else identity(program, node, node.args[0])


def single(program: Program, node: fx.Node) -> fx.Node | str | None:
    """cat of one tensor."""
    parts = node.args[0]
    return identity(program, node, parts[0]) if isinstance(parts, (list, tuple)) and len(parts) == 1 else None


def shaped_like(program: Program, node: fx.Node) -> fx.Node | None:
    """``reshape_as`` with sizes that are known: the tensor that told them is no operand."""
    sizes = list(val(node).shape)
    if not all(isinstance(n, int) for n in sizes):
        return None
    return program.call(aten.reshape.default, node.args[0], sizes, like=node)


def fresh(rule: Rule) -> Rule:
    """A rule for ops that give memory of their own: what leaves the program must not share it with anything else."""

    def guarded(program: Program, node: fx.Node) -> fx.Node | str | None:
        new = rule(program, node)
        if isinstance(new, fx.Node) and escapes(program, node):
            origin = root(new)
            if origin.op in ("placeholder", "get_attr") or escapes(program, origin):
                return f"an output would share memory with {origin.name}"
        return new

    return guarded


_CASTS = ("aten.to", "aten._to_copy", "aten.type_as", "aten.contiguous", "aten.clone", "aten.lift_fresh_copy")
_TRANSPOSES = ("aten.permute", "aten.transpose", "aten.t", "aten.numpy_T", "aten.mT", "aten.adjoint", "aten.matrix_H",
               "aten.movedim", "aten.moveaxis", "aten.swapaxes", "aten.swapdims")  # fmt: skip

RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.feature_alpha_dropout"), dropout
    ),
    "aten.add": fresh(add),
    "aten.sub": fresh(sub),
    **dict.fromkeys(("aten.mul", "aten.div", "aten.pow"), fresh(mul)),
    **dict.fromkeys(_CASTS, fresh(cast)),
    **dict.fromkeys(RESHAPES, reshape),
    **dict.fromkeys(("aten.reshape_as", "aten.view_as"), shaped_like),
    **dict.fromkeys(("aten.expand", "aten.slice", "aten.narrow"), unchanged),
    **dict.fromkeys(("aten.alias", "aten.detach", "aten.lift_fresh"), alias),
    **dict.fromkeys(_TRANSPOSES, transpose),
    "aten.cat": fresh(single),
    **dict.fromkeys(("aten.pad", "aten.constant_pad_nd"), fresh(pad)),
}

_SIGN_ENDS = (
    "aten.softmax",
    "aten._softmax",
    "aten.exp",
    "aten.sigmoid",
    "aten.layer_norm",
    "aten.batch_norm",
    "aten.group_norm",
)
_SIGN_READ = ("aten.reciprocal", "aten.rsqrt", "aten.atan2", "aten.copysign", "aten.signbit", "aten.nextafter")


def zero_sign_matters(node: fx.Node) -> str | None:
    """The reason when the sign of a zero in ``node`` may become another number further on; None when it may not."""
    todo, seen = [node], {node}
    while todo:
        now = todo.pop()
        for user in now.users:
            if user in seen or user.op == "output" or not is_tensor(user) or not val(user).dtype.is_floating_point:
                continue
            if _reads_sign(user, now):
                return f"{site_of(user)} ({base(user) or op_name(user.target)}) may read the sign of a zero"
            seen.add(user)
            if not is_op(user, *_SIGN_ENDS):
                todo.append(user)
    return None


def _reads_sign(user: fx.Node, of: fx.Node) -> bool:
    name = base(user)
    if name in _SIGN_READ or not name.startswith(("aten.", "graphwright.", "operator.")):
        return True
    if name == "aten.view" and user.target is aten.view.dtype:
        return True
    if name in ("aten.div", "aten.true_divide", "aten.divide"):
        return user.args[1] is of
    if name == "aten.pow":
        exponent = args_by_name(user).get("exponent")
        return not (is_number(exponent) and exponent >= 0)
    return False
