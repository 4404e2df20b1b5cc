"""Small questions about nodes that several passes ask."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from graphwright.ir import Program, walk_nodes
from graphwright.manager import PassResult

#: Ops that give their input's numbers in the same order under another shape.
RESHAPES = (
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.flatten",
    "aten.unflatten",
    "aten.unsqueeze",
    "aten.squeeze",
)
#: Ops whose result shares memory with their input.
ALIASING = (*RESHAPES, "aten.permute", "aten.transpose", "aten.t", "aten.expand", "aten.slice", "aten.select", "aten.split",
            "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.narrow", "aten.alias", "aten.detach", "operator.getitem")  # fmt: skip


def base(node: Any) -> str:
    """``"aten.add"``: the op of a node without its overload; ``"operator.getitem"`` for a scalar function; else ``""``."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.replace("::", ".")
    return f"operator.{node.target.__name__}" if node.target.__module__ == "_operator" else ""  # type: ignore[union-attr]


def is_op(node: Any, *names: str) -> bool:
    """Whether ``node`` calls one of these ops, whatever the overload."""
    return base(node) in names


def val(node: Any) -> Any:
    """The fake value of a node; anything else is its own value."""
    return node.meta["val"] if isinstance(node, fx.Node) else node


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def is_number(value: Any) -> bool:
    """A Python number that is no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def same_size(a: Any, b: Any) -> bool:
    """Two sizes, symbolic ones included, are known to be equal; never adds a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    equal = a == b
    if isinstance(equal, bool):
        return equal
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes a second to import

    return bool(statically_known_true(equal))


def same_sizes(a: Iterable[Any], b: Iterable[Any]) -> bool:
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(map(same_size, a, b))


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Both are tensors whose shapes are known to be equal."""
    return is_tensor(a) and is_tensor(b) and same_sizes(val(a).shape, val(b).shape)


def same_kind(a: fx.Node, b: fx.Node) -> bool:
    """Equal shape, dtype and device."""
    return same_shape(a, b) and val(a).dtype == val(b).dtype and val(a).device == val(b).device


def same_layout(a: fx.Node, b: fx.Node) -> bool:
    """Equal strides and offset: any view that one takes, the other takes too."""
    return same_sizes(val(a).stride(), val(b).stride())


def only_user(node: fx.Node) -> fx.Node | None:
    """The one op that reads ``node``, once; None where there are several, or the output reads it."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    reads = sum(1 for n in walk_nodes((user.args, user.kwargs)) if n is node)
    return user if user.op == "call_function" and reads == 1 else None


def readers(node: fx.Node, besides: Iterable[fx.Node] = ()) -> str:
    """``"a, b"``: who reads ``node`` besides those, for a refusal."""
    from graphwright.ir import site_of

    skip = set(besides)
    names = ["the output" if u.op == "output" else site_of(u) for u in node.users if u not in skip]
    return ", ".join(dict.fromkeys(names[:3])) + (", …" if len(names) > 3 else "")


def rank(node: fx.Node) -> int:
    return int(val(node).ndim)


def is_random(node: fx.Node) -> bool:
    """Whether calling it twice may give two results."""
    target = node.target
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def permutation(node: Any) -> tuple[int, ...] | None:
    """The axis order that a permute gives, non-negative; None for other nodes."""
    if not is_op(node, "aten.permute"):
        return None
    return tuple(int(d) % max(1, len(node.args[1])) for d in node.args[1])


def root(node: fx.Node) -> fx.Node:
    """Where the memory of a node comes from, back through views."""
    while is_op(node, *ALIASING) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def escapes(program: Program, node: fx.Node) -> bool:
    """Whether ``node``, or a view of it, leaves the program."""
    return any(isinstance(out, fx.Node) and (out is node or _reaches(out, node)) for out in program.output.args[0])


def _reaches(view: fx.Node, node: fx.Node) -> bool:
    while is_op(view, *ALIASING) and isinstance(view.args[0], fx.Node):
        view = view.args[0]
        if view is node:
            return True
    return False


def renew(program: Program, start: Iterable[fx.Node]) -> None:
    """Infer anew everything downstream of nodes whose strides changed; a ``view`` that no longer fits becomes a reshape."""
    waiting = {user for node in start for user in node.users}
    stale = sorted(waiting)  # a heap in graph order: what lies between is not looked at
    while stale:
        node = heapq.heappop(stale)
        waiting.discard(node)
        if node.op != "call_function":
            continue
        try:
            found = program.infer(node)
        except (RuntimeError, ValueError):
            if not is_op(node, "aten.view"):
                raise
            node.target = torch.ops.aten.reshape.default
            found = program.infer(node)
        was = node.meta["val"]
        if _strides(was) != _strides(found):
            for user in node.users.keys() - waiting:
                heapq.heappush(stale, user)
                waiting.add(user)
        node.meta["val"] = found


def _strides(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [str(s) for s in value.stride()]
    return [_strides(v) for v in value] if isinstance(value, (list, tuple)) else None


def sweep(program: Program, result: PassResult) -> None:
    """Erase what nothing reads; ``result`` is told where nodes went."""
    before = len(program.graph.nodes)
    program.tidy()
    result.touched |= len(program.graph.nodes) != before


def trainable(tensors: Sequence[Tensor | None]) -> bool:
    """A tensor made from these is a parameter where one of them is."""
    return any(isinstance(t, torch.nn.Parameter) for t in tensors)
