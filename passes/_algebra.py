"""Read hand-written arithmetic: products, polynomials in one variable, sums. Every reader notes the ops it went through."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import fx

from graphwright.ir import args_by_name, site_of, sites_of
from graphwright.passes._nodes import is_number, is_op, is_tensor, readers, val

#: Coefficients closer than this, relatively, are the same: constants are often written with ten digits.
CLOSE = 1e-7


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=CLOSE, abs_tol=1e-12)


def product(node: fx.Node, cone: set[fx.Node]) -> tuple[float, list[fx.Node]]:
    """``node`` as a number times tensors: products, and quotients by numbers, taken apart as far as they have one reader."""
    number, leaves, todo, first = 1.0, [], [node], True
    while todo:
        now = todo.pop(0)
        by_number = is_op(now, "aten.div") and is_number(now.args[1]) and now.kwargs.get("rounding_mode") is None
        if not (is_op(now, "aten.mul") or by_number) or not (first or len(now.users) == 1):
            leaves.append(now)
            continue
        first = False
        cone.add(now)
        if by_number:
            if now.args[1] == 0:
                return 0.0, []
            number /= float(now.args[1])  # type: ignore[arg-type]
            todo.append(now.args[0])  # type: ignore[arg-type]
            continue
        for a in now.args[:2]:
            if isinstance(a, fx.Node):
                todo.append(a)
            elif is_number(a):
                number *= float(a)  # type: ignore[arg-type]
    return number, leaves


def polynomial(node: object, x: fx.Node, cone: set[fx.Node]) -> dict[int, float] | None:
    """``node`` as a polynomial in ``x``, coefficients by power; None where it is none."""
    if node is x:
        return {1: 1.0}
    if is_number(node):
        return {0: float(node)}  # type: ignore[arg-type]
    if not isinstance(node, fx.Node):
        return None
    found: dict[int, float] | None = None
    if is_op(node, "aten.add", "aten.sub"):
        a, b = (polynomial(n, x, cone) for n in node.args[:2])
        alpha = node.kwargs.get("alpha", 1)
        if a is not None and b is not None and is_number(alpha):
            sign = float(alpha) * (1.0 if is_op(node, "aten.add") else -1.0)  # type: ignore[arg-type]
            found = {k: a.get(k, 0.0) + sign * b.get(k, 0.0) for k in {*a, *b}}
    elif is_op(node, "aten.mul", "aten.div"):
        a, b = (polynomial(n, x, cone) for n in node.args[:2])
        if is_op(node, "aten.div"):
            constant = b is not None and set(b) == {0} and b[0] != 0 and node.kwargs.get("rounding_mode") is None
            b = {0: 1.0 / b[0]} if constant and b else None
        found = None if a is None or b is None else _times(a, b)
    elif is_op(node, "aten.pow", "aten.square"):
        exponent = args_by_name(node).get("exponent", 2)
        a = polynomial(node.args[0], x, cone)
        if a is not None and is_number(exponent) and exponent in (1, 2, 3):
            found = a
            for _ in range(int(exponent) - 1):
                found = _times(found, a)
    elif is_op(node, "aten.neg"):
        a = polynomial(node.args[0], x, cone)
        found = None if a is None else {k: -v for k, v in a.items()}
    if found is not None:
        cone.add(node)
    return found


def _times(a: dict[int, float], b: dict[int, float]) -> dict[int, float]:
    out: dict[int, float] = {}
    for i, v in a.items():
        for j, w in b.items():
            out[i + j] = out.get(i + j, 0.0) + v * w
    return out


def is_polynomial(node: object, x: fx.Node, wanted: dict[int, float], cone: set[fx.Node]) -> bool:
    """Whether ``node`` is that polynomial in ``x``."""
    found = polynomial(node, x, cone)
    return found is not None and all(close(found.get(k, 0.0), wanted.get(k, 0.0)) for k in {*found, *wanted})


def affine(node: object, cone: set[fx.Node]) -> tuple[float, float, fx.Node] | None:
    """``node`` as ``a + b * n``: a, b and n; None where it is no sum with a number."""
    if not is_op(node, "aten.add") or node.kwargs.get("alpha", 1) != 1:  # type: ignore[union-attr]
        return None
    for constant, rest in (node.args[:2], node.args[1::-1]):  # type: ignore[union-attr]
        if is_number(constant) and isinstance(rest, fx.Node):
            cone.add(node)  # type: ignore[arg-type]
            factor, leaves = product(rest, cone)
            return (float(constant), factor, leaves[0]) if len(leaves) == 1 else None  # type: ignore[arg-type]
    return None


def enclosed(root: fx.Node, cone: Iterable[fx.Node]) -> str | None:
    """None, or the reason when something between ``root`` and its inputs is read from outside."""
    inside = {root, *cone}
    for node in inside - {root}:
        if any(u not in inside for u in node.users):
            return f"{site_of(node)} is read by {readers(node, inside)} too"
    return None


def sites_in(cone: Iterable[fx.Node]) -> list[str]:
    """The sites of these nodes, in graph order."""
    return [s for n in sorted(cone) for s in sites_of(n)]


def uniform(x: fx.Node, cone: Iterable[fx.Node]) -> bool:
    """Every op in between computes in the dtype and shape of ``x``."""
    shape, dtype = [str(s) for s in val(x).shape], val(x).dtype
    return all(is_tensor(n) and val(n).dtype == dtype and [str(s) for s in val(n).shape] == shape for n in cone)


def without_casts(node: fx.Node, cone: set[fx.Node]) -> fx.Node:
    """``node`` before conversions from one float to another."""
    while is_op(node, "aten.to", "aten._to_copy") and is_tensor(node.args[0]):
        source = node.args[0]
        if not (val(source).dtype.is_floating_point and val(node).dtype.is_floating_point):
            break
        cone.add(node)
        node = source
    return node


def last_axis(node: fx.Node, axes: object) -> bool:
    """Whether these reduction axes are the last one alone."""
    listed = list(axes) if isinstance(axes, (list, tuple)) else [axes]
    return len(listed) == 1 and isinstance(listed[0], int) and listed[0] % max(1, val(node).ndim) == val(node).ndim - 1
