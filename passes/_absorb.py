"""Follow a constant scale and shift through views, sums and activations to the contractions that can take it in.

Scales and shifts are float64 tensors with as many axes as the value they belong to, of size 1 along axes where they do not vary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir import Program, arg, args_by_name, site_of
from graphwright.passes import _affine as affine
from graphwright.passes._nodes import (
    RESHAPES,
    base,
    is_number,
    is_op,
    is_tensor,
    only_user,
    permutation,
    rank,
    readers,
    same_kind,
    same_size,
    val,
)


@dataclass(frozen=True)
class Affine:
    """A node as ``scale * x + shift``, and the constants it is made of."""

    x: fx.Node
    scale: Tensor | None
    shift: Tensor | None
    tensors: tuple[fx.Node, ...]


@dataclass
class Plan:
    """What is to be done: a new weight and bias per contraction, a new tensor per constant operand."""

    products: list[tuple[fx.Node, affine.Folded]] = field(default_factory=list)
    constants: list[tuple[fx.Node, int, Tensor]] = field(default_factory=list)

    def carry_out(self, program: Program, origin: Sequence[fx.Node], sites: Sequence[str], suffix: str) -> None:
        for product, folded in self.products:
            affine.install(program, product, folded, origin, sites, suffix)
        for node, place, value in self.constants:
            old = str(node.args[place].target)  # type: ignore[union-attr]
            names = [old, *(str(n.target) for n in origin)]
            new = program.add_tensor(f"{old}_{suffix}", value, origin=names, trainable=isinstance(program.tensor(old), torch.nn.Parameter))
            node.update_arg(place, new)


def read(program: Program, node: fx.Node) -> Affine | str | None:
    """The scale and shift that ``node`` applies to one tensor; a reason where it is of that kind and cannot be used; else None."""
    if is_op(node, "aten.neg"):
        x, scale, constant = node.args[0], -1.0, None
    elif is_op(node, "aten.mul", "aten.div", "aten.add", "aten.sub", "aten.rsub") and node.kwargs.get("rounding_mode") is None:
        a, b = node.args[:2]
        first = not is_op(node, "aten.div") and (program.constant(a) is not None or is_number(a))
        x, constant, scale = (b, a, 1.0) if first else (a, b, 1.0)
    else:
        return None
    if not is_tensor(x) or (constant is not None and not is_number(constant) and program.constant(constant) is None):
        return None
    if not same_kind(x, node) or not val(node).dtype.is_floating_point:
        return "the factor changes dtype or shape"
    tensors = (constant,) if isinstance(constant, fx.Node) else ()
    if constant is None:
        return Affine(x, _wide(program, scale, node), None, tensors)
    held = _wide(program, constant, node)
    if is_op(node, "aten.mul", "aten.div"):
        found = Affine(x, held if is_op(node, "aten.mul") else 1.0 / held, None, tensors)
    else:
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if not is_number(alpha):
            return None
        minus = is_op(node, "aten.sub") and x is node.args[0]
        turned = is_op(node, "aten.rsub") or (is_op(node, "aten.sub") and not minus)
        # alpha belongs to the second operand, whichever the constant is
        on_x = float(alpha) * (-1.0 if turned else 1.0) if x is not node.args[0] or is_op(node, "aten.rsub") else 1.0
        on_constant = (-1.0 if minus else 1.0) * (float(alpha) if constant is node.args[1] and not is_op(node, "aten.rsub") else 1.0)
        scale = None if on_x == 1 else _wide(program, on_x, node)
        found = Affine(x, scale, held * on_constant, tensors)
    finite = all(t is None or bool(torch.isfinite(t).all()) for t in (found.scale, found.shift))
    return found if finite else "the factor is not finite"


def _wide(program: Program, constant: Any, like: fx.Node) -> Tensor:
    held = program.constant(constant)
    if held is None:
        held = torch.tensor(float(constant), dtype=torch.float64, device=val(like).device)
    held = held.detach().double()
    return held.reshape([1] * (rank(like) - held.ndim) + list(held.shape))


def _factor(program: Program, node: fx.Node) -> Affine | None:
    """``node`` as a product of one tensor with a constant."""
    found = read(program, node) if is_op(node, "aten.mul", "aten.div", "aten.neg") else None
    return found if isinstance(found, Affine) else None


# -- backwards: from what is computed to what computes it ------------------------------------------------------------------


def pull(program: Program, node: fx.Node, reader: fx.Node, scale: Tensor | None, shift: Tensor | None, plan: Plan) -> str | None:
    """Let what computes ``node`` give ``scale * node + shift``, which is what ``reader`` wants: None, or why that cannot be."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return "no convolution or linear stands before it"
    if affine.is_contraction(node):
        return _pull_product(program, node, reader, scale, shift, plan)
    if only_user(node) is not reader:
        return f"{site_of(node)} is read by {readers(node, [reader]) or 'it twice'} too"
    x = node.args[0]
    order = permutation(node)
    if order is not None:
        back = [order.index(k) for k in range(len(order))]
        return pull(program, x, node, *(None if t is None else t.permute(back) for t in (scale, shift)), plan)  # type: ignore[arg-type]
    if is_op(node, *RESHAPES):
        moved = [None if t is None else regroup(t, val(node).shape, val(x).shape) for t in (scale, shift)]
        if any(isinstance(t, str) for t in moved):
            return next(t for t in moved if isinstance(t, str))
        return pull(program, x, node, *moved, plan)  # type: ignore[arg-type]
    factor = _factor(program, node)
    if factor is not None:  # y * f + t is (y + t / f) * f
        if shift is not None and not bool((factor.scale != 0).all()):  # type: ignore[union-attr]
            return f"{site_of(node)} multiplies by zero"
        return pull(program, factor.x, node, scale, None if shift is None else shift / factor.scale, plan)
    if is_op(node, "aten.add", "aten.sub") and node.kwargs.get("alpha", 1) == 1:
        return _pull_sum(program, node, scale, shift, plan)
    if is_op(node, "aten.relu", "aten.leaky_relu", "aten.max_pool1d", "aten.max_pool2d", "aten.max_pool3d") and shift is None:
        if scale is None or not bool((scale > 0).all()):
            return f"a factor that is not positive does not pass {site_of(node)}"
        pooled = int(base(node)[-2]) if "max_pool" in base(node) else 0
        if any(n != 1 for n in scale.shape[rank(node) - pooled :]):
            return f"the factor varies along axes that {site_of(node)} pools"
        return pull(program, x, node, scale, None, plan)  # type: ignore[arg-type]
    return f"no convolution or linear stands before it ({site_of(node)})"


def _pull_product(program: Program, node: fx.Node, reader: fx.Node, scale: Tensor | None, shift: Tensor | None, plan: Plan) -> str | None:
    if reason := affine.fits(program, node, reader) or _shared(node):
        return reason
    axis = affine.channel_axis(node)
    parts = [None if t is None else per_channel(t, axis, val(node).shape[axis]) for t in (scale, shift)]
    if any(isinstance(t, str) for t in parts):
        return next(t for t in parts if isinstance(t, str))
    factor, added = parts
    if factor is None:
        factor = torch.ones_like(added)
    folded = affine.after(program, node, factor, added)  # type: ignore[arg-type]
    if isinstance(folded, str):
        return folded
    plan.products.append((node, folded))
    return None


def _pull_sum(program: Program, node: fx.Node, scale: Tensor | None, shift: Tensor | None, plan: Plan) -> str | None:
    """A shift goes to either operand, a scale to both."""
    operands = node.args[:2]
    if any(program.constant(a) is None and not (is_tensor(a) and same_kind(a, node)) for a in operands):
        return f"{site_of(node)} adds something of another shape or dtype"
    if scale is None:
        sign = [1.0, -1.0 if is_op(node, "aten.sub") else 1.0]
        reasons = []
        for a, s in zip(operands, sign, strict=True):
            assert shift is not None
            trial = Plan()
            reason = pull(program, a, node, None, shift * s, trial)  # type: ignore[arg-type]
            if reason is None:
                plan.products += trial.products
                plan.constants += trial.constants
                return None
            reasons.append(reason)
        return reasons[0]
    if operands[0] is operands[1]:
        return f"{site_of(node)} adds a value to itself"
    rest = shift if shift is None or not is_op(node, "aten.sub") or program.constant(operands[0]) is None else -shift
    for place, a in enumerate(operands):
        held = program.constant(a)
        if held is not None:
            wide = held.detach().double().reshape([1] * (rank(node) - held.ndim) + list(held.shape)) * scale
            if wide.numel() > held.numel():
                return f"the constant of {site_of(node)} would grow from {held.numel()} to {wide.numel()} numbers"
            plan.constants.append((node, place, wide.to(held.dtype)))
        elif reason := pull(program, a, node, scale, rest, plan):  # type: ignore[arg-type]
            return reason
        else:
            rest = None
    return None if rest is None else f"{site_of(node)} adds constants alone"


# -- forwards: from what is computed to what reads it ----------------------------------------------------------------------


def push(program: Program, node: fx.Node, scale: Tensor | None, shift: Tensor | None, plan: Plan) -> str | None:
    """Let every reader of ``node`` be content with ``x`` where it read ``node = scale * x + shift``: None, or why one is not."""
    if not node.users:
        return "nothing reads it"
    for user in node.users:
        if user.op != "call_function":
            return "no convolution or linear stands before it, and it leaves the program"
        if affine.is_contraction(user):
            reason = _push_product(program, node, user, scale, shift, plan)
        elif (order := permutation(user)) is not None:
            reason = push(program, user, *(None if t is None else t.permute(order) for t in (scale, shift)), plan)
        elif is_op(user, *RESHAPES):
            moved = [None if t is None else regroup(t, val(node).shape, val(user).shape) for t in (scale, shift)]
            wrong = [t for t in moved if isinstance(t, str)]
            reason = wrong[0] if wrong else push(program, user, *moved, plan)  # type: ignore[arg-type]
        elif (factor := _factor(program, user)) is not None:
            reason = push(program, user, scale, None if shift is None else shift * factor.scale, plan)
        else:
            reason = f"no convolution or linear stands before it, nor after it: it is read by {site_of(user)}"
        if reason:
            return reason
    return None


def _push_product(program: Program, node: fx.Node, user: fx.Node, scale: Tensor | None, shift: Tensor | None, plan: Plan) -> str | None:
    if arg(user, "input") is not node or sum(n is node for n in user.all_input_nodes) != 1:
        return f"it is the weight or the bias of {site_of(user)}"
    if reason := affine.constant_parts(program, user) or _shared(user):
        return reason
    if any(user is p for p, _ in plan.products):
        return f"{site_of(user)} reads it twice"
    spatial = affine.spatial_axes(user)
    if shift is not None:
        padding = args_by_name(user).get("padding", "valid")
        if spatial is not None and padding != "valid" and (isinstance(padding, str) or any(padding)):
            return f"{site_of(user)} pads with zeros, which the constant would shift"
        if is_op(user, *affine.TRANSPOSED):
            return f"{site_of(user)} is transposed"
    axis = rank(node) - 1 - (spatial or 0)
    size = val(node).shape[axis]
    parts = [None if t is None else per_channel(t, axis, size) for t in (scale, shift)]
    if any(isinstance(t, str) for t in parts):
        return next(t for t in parts if isinstance(t, str))
    factor = torch.ones_like(parts[1]) if parts[0] is None else parts[0]  # type: ignore[arg-type]
    folded = affine.before(program, user, factor, parts[1])  # type: ignore[arg-type]
    if isinstance(folded, str):
        return folded
    plan.products.append((user, folded))
    return None


def _shared(node: fx.Node) -> str | None:
    weight = arg(node, "weight")
    return f"the weight of {site_of(node)} is read elsewhere too: it would be stored twice" if len(weight.users) > 1 else None


# -- shapes ------------------------------------------------------------------------------------------------------------------


def per_channel(t: Tensor, axis: int, size: Any) -> Tensor | str:
    """``t`` as one number per index of ``axis``, or why it is not of that kind."""
    if not isinstance(size, int):
        return "the number of channels is not known"
    if any(n != 1 for k, n in enumerate(t.shape) if k != axis):
        return f"the factor has shape {_short(t)}: it varies along other axes than the channels"
    return t.reshape(-1).expand(size)


def _short(t: Tensor) -> tuple[int, ...]:
    shape = list(t.shape)
    while len(shape) > 1 and shape[0] == 1:
        shape.pop(0)
    return tuple(shape)


def regroup(t: Tensor, old: Sequence[Any], new: Sequence[Any]) -> Tensor | str:
    """What ``t``, spread over the shape ``old``, becomes when that is reshaped to ``new``; axes where it does not vary are 1 again."""
    if t.numel() == 1:
        return t.reshape([1] * len(new))
    start = end = 0
    while start < min(len(old), len(new)) and same_size(old[start], new[start]):
        start += 1
    while end < min(len(old), len(new)) - start and same_size(old[-1 - end], new[-1 - end]):
        end += 1
    inner, outer = list(old[start : len(old) - end]), list(new[start : len(new) - end])
    head, tail = list(t.shape[:start]), list(t.shape[len(old) - end :])
    if all(n == 1 for n in t.shape[start : len(old) - end]):
        return t.reshape([*head, *[1] * len(outer), *tail])
    if not all(isinstance(n, int) and n > 0 for n in (*inner, *outer)):
        return "it varies along axes whose sizes are not known"
    if t.numel() > 1 << 20:
        return "it varies along too many axes"
    wide = t.expand([*head, *inner, *tail]).reshape([*head, *outer, *tail])
    for k in range(start, start + len(outer)):
        if wide.shape[k] > 1 and bool((wide == wide.narrow(k, 0, 1)).all()):
            wide = wide.narrow(k, 0, 1)
    return wide
