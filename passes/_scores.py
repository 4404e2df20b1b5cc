"""Read what stands between the two products of written-out attention: scaling, masks, views, casts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir import Program, args_by_name, site_of
from graphwright.passes._algebra import without_casts
from graphwright.passes._nodes import RESHAPES, base, is_number, is_op, is_tensor, same_shape, same_sizes, val

PRODUCTS = ("aten.matmul", "aten.bmm", "aten.baddbmm")
#: Added to a score (float32, of ordinary size), a number below this leaves nothing of it.
MASKED = -1e9
#: How many ops a number may be computed from.
_OPS = 16


@dataclass(frozen=True)
class Mask:
    """Something that hides or shifts scores.

    Attributes:
        node: what is added; or a boolean, where ``number`` takes the score's place.
        number: None for what is added.
        where: the value of the boolean for which it does.
        factor: what the scores, the mask included, are multiplied by afterwards.
        stage: the scores' shape where the mask meets them.
    """

    node: fx.Node
    number: float | None
    where: bool
    factor: float
    stage: tuple[Any, ...]


@dataclass
class Scores:
    """What was found between the second product and the first.

    Attributes:
        first: the product of queries and keys.
        scale: of its result, one number.
        factors: tensors that it is multiplied by (True) or divided by (False), constant along both of its last axes.
        masks: the one nearest to the softmax first.
        cone: the ops in between.
        shapes: those that the scores take on the way.
    """

    first: fx.Node | None = None
    scale: float = 1.0
    factors: list[tuple[fx.Node, bool, int]] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    cone: set[fx.Node] = field(default_factory=set)
    shapes: list[tuple[Any, ...]] = field(default_factory=list)


def number_of(program: Program, node: Any, left: int = _OPS) -> float | None:
    """The number that ``node`` is: written so, or a tensor of no axes that depends on nothing but constants."""
    if is_number(node):
        return float(node)
    value = _evaluate(program, node, [left]) if is_tensor(node) and val(node).dim() == 0 else None
    return float(value) if isinstance(value, Tensor) else None


def _evaluate(program: Program, node: fx.Node, left: list[int]) -> Tensor | None:
    constant = program.constant(node)
    if constant is not None:
        return constant if constant.numel() == 1 else None
    target, left[0] = node.target, left[0] - 1
    if node.op != "call_function" or left[0] < 0 or not isinstance(target, torch._ops.OpOverload) or not is_tensor(node):
        return None
    if val(node).numel() != 1 or target.namespace != "aten" or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    known = {n: _evaluate(program, n, left) for n in node.all_input_nodes}
    if any(v is None for v in known.values()) or base(node).startswith("aten.empty"):
        return None
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
    with torch.no_grad():
        value = target(*args, **kwargs)
    return value if isinstance(value, Tensor) else None


def through_views(node: Any, cone: set[fx.Node]) -> fx.Node:
    """``node`` before casts between floats and views that leave its last two axes alone."""
    while True:
        node = without_casts(node, cone)
        if not _regrouped(node):
            return node
        cone.add(node)
        node = node.args[0]


def _regrouped(node: Any) -> bool:
    """Whether it is a view that joins or splits batch axes only."""
    if not is_op(node, *RESHAPES) or not is_tensor(node.args[0]) or val(node).dim() < 3 or val(node.args[0]).dim() < 3:
        return False
    return same_sizes(val(node).shape[-2:], val(node.args[0]).shape[-2:])


def read_scores(program: Program, node: Any) -> Scores | str | None:
    """What leads to the scores ``node``; None where no product does, the reason where one does but not as attention's would."""
    found = Scores()
    while isinstance(node, fx.Node):
        node = through_views(node, found.cone)
        found.shapes.append(tuple(val(node).shape) if is_tensor(node) else ())
        if is_op(node, "aten.matmul", "aten.bmm"):
            found.first = node
            return found
        step = _step(program, node, found)
        if not isinstance(step, fx.Node):
            return step
        if step is node:  # baddbmm: a sum and a product at once
            found.first = node
            return found
        if not same_shape(step, node):
            return None
        found.cone.add(node)
        node = step
    return None


def _step(program: Program, node: fx.Node, found: Scores) -> fx.Node | str | None:
    """One step back towards the product; what the step does goes into ``found``."""
    a, b = (*node.args, None, None)[:2]
    if is_op(node, "aten.mul", "aten.div"):
        return _scaled(program, node, found)
    if is_op(node, "aten.add", "aten.sub") and node.kwargs.get("alpha", 1) == 1 and is_tensor(a) and is_tensor(b):
        swap = is_op(node, "aten.add") and not _leads_to_product(a)
        step, mask = (b, a) if swap else (a, b)
        return _masked(node, found, mask, None, step=step, sign=-1.0 if is_op(node, "aten.sub") else 1.0)
    if is_op(node, "aten.masked_fill") and (number := number_of(program, node.args[2])) is not None:
        return _masked(node, found, b, number, step=a)
    if is_op(node, "aten.where") and is_tensor(b):
        other = node.args[2]
        if (number := number_of(program, other)) is not None:
            return _masked(node, found, a, number, step=b, where=False)
        if is_tensor(other) and (number := number_of(program, b)) is not None:
            return _masked(node, found, a, number, step=other)
        return None
    if is_op(node, "aten.baddbmm"):
        return _added_product(node, found)
    if len(node.all_input_nodes) == 1 and is_tensor(a) and same_shape(a, node) and _leads_to_product(a):
        return f"{site_of(node)} ({base(node)}) stands between its products"
    return None


def _scaled(program: Program, node: fx.Node, found: Scores) -> fx.Node | str | None:
    a, b = node.args[:2]
    if node.kwargs.get("rounding_mode") is not None:
        return None
    multiplied = is_op(node, "aten.mul")
    if multiplied and is_tensor(b) and not _leads_to_product(a):
        a, b = b, a
    number = number_of(program, b)
    if number is not None:
        if number == 0:
            return None
        found.scale *= number if multiplied else 1.0 / number
        return a  # type: ignore[return-value]
    if not (is_tensor(a) and is_tensor(b) and _leads_to_product(a)):
        return None
    if val(b).dtype != val(a).dtype or not all(isinstance(n, int) and n == 1 for n in val(b).shape[-2:]):
        return f"its scores are multiplied by {site_of(b)}"  # type: ignore[arg-type]
    found.factors.append((b, multiplied, val(node).dim()))  # type: ignore[arg-type]
    return a  # type: ignore[return-value]


def _masked(node: fx.Node, found: Scores, mask: Any, number: float | None, *, step: Any, where: bool = True,
            sign: float = 1.0) -> fx.Node | str | None:  # fmt: skip
    if not is_tensor(mask) or not is_tensor(step) or not _leads_to_product(step):
        return None
    if found.factors:
        return "its scores are scaled per head after they are masked"
    if not 0 < found.scale <= 1:
        return f"its scores are scaled by {found.scale:g} after they are masked, which a hidden score may not survive"
    found.masks.append(Mask(mask, number, where, sign * found.scale, tuple(val(node).shape)))
    return step


def _added_product(node: fx.Node, found: Scores) -> fx.Node | str | None:
    """``beta * input + alpha * batch1 @ batch2``: the input is a mask, alpha a scale."""
    given = args_by_name(node)
    if not is_number(given["beta"]) or not is_number(given["alpha"]) or given["alpha"] == 0:
        return None
    if given["beta"]:
        if found.factors or not 0 < found.scale <= 1:
            return "its scores are scaled after a mask is added to them"
        found.masks.append(Mask(given["self"], None, True, found.scale * float(given["beta"]), tuple(val(node).shape)))
    found.scale *= float(given["alpha"])
    return node


def _leads_to_product(node: Any) -> bool:
    """Whether a product stands behind ``node``, through steps that scores take."""
    seen: set[fx.Node] = set()
    while isinstance(node, fx.Node):
        node = through_views(node, seen)
        if is_op(node, *PRODUCTS):
            return True
        if is_op(node, "aten.where"):
            a, b = node.args[1], node.args[2]
            node = a if is_tensor(a) and val(a).dim() else b
        elif is_op(node, "aten.add", "aten.mul") and is_tensor(node.args[0]) and is_tensor(node.args[1]):
            first = node.args[0]
            node = first if _leads_to_product(first) else node.args[1]
        elif is_op(node, "aten.mul", "aten.div", "aten.sub", "aten.add", "aten.masked_fill", "aten.tanh"):
            node = node.args[0]
        else:
            return False
    return False
