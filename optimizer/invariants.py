"""What holds for every program, and checking it. A node that was found right is not inferred again until it changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._ops import OpOverload

from graphwright import ops
from graphwright.errors import InternalError
from graphwright.nodes import SCALAR_FUNCTIONS, describe, normalise, sites_of
from graphwright.sizes import always

if TYPE_CHECKING:
    from graphwright.ir import Program


def verify(program: Program, nodes: Iterable[fx.Node] | None = None) -> None:
    """See ``Program.verify``."""
    try:
        if nodes is None:
            program.settled().graph.lint()
        else:
            _check_order(program.settled().graph)
    except Exception as error:
        raise InternalError(f"the graph is malformed: {error}", program=_text(program)) from error
    for node in program.graph.nodes if nodes is None else nodes:
        reason = _broken(program, node)
        if reason:
            site = ", ".join(sites_of(node)) or node.name
            raise InternalError(f"node {node.name}: {reason}", where=site, program=_text(program))


def _check_order(graph: fx.Graph) -> None:
    """What fx's ``lint`` says of the nodes' order, names and owners, in a fifth of its time."""
    seen: set[fx.Node] = set()
    names: set[str] = set()
    for node in graph.nodes:
        for given in node.all_input_nodes:
            if given not in seen:
                known = "used before it has been defined" if given.graph is graph and not given._erased else "no node of this graph"
                raise InternalError(f"argument {given.name!r} of node {node.name!r} is {known}")
        if node.graph is not graph:
            raise InternalError(f"node {node.name!r} belongs to another graph")
        seen.add(node)
        names.add(node.name)
    if len(names) < len(seen):
        raise InternalError("two nodes have the same name")


def _text(program: Program) -> str:
    try:
        return program.text()
    except Exception:  # noqa: BLE001  a broken graph may not print: its own words are the next best thing
        return str(program.graph)


def _broken(program: Program, node: fx.Node) -> str | None:
    if node.op == "output":
        flat = isinstance(node.args[0], tuple)
        return None if flat else "the output is no flat tuple"
    if "val" not in node.meta:
        return "meta['val'] is missing"
    if node.op == "get_attr":
        try:
            held, said = program.tensor(str(node.target)), node.meta["val"]
        except (AttributeError, InternalError):
            return f"there is no tensor {node.target}"
        same = tuple(held.shape) == tuple(said.shape) and held.dtype == said.dtype
        return None if same else f"meta['val'] says {describe(said)}, the tensor is {describe(held)}"
    if node.op == "placeholder":
        return None
    if node.op != "call_function":
        return f"a {node.op} node may not stand in a program"
    if node.meta.get("sites") is None:
        return "meta['sites'] is missing"
    if not isinstance(node.target, OpOverload):
        known = node.target in SCALAR_FUNCTIONS.values()
        return None if known else f"{node.target!r} is neither an op nor a scalar function"
    if node.target._schema.is_mutable:
        return f"{node.target} writes into its arguments"
    return _wrong_value(program, node)


def _same_sizes(program: Program, a: Any, b: Any) -> bool:
    """Two fake tensors whose sizes are spelled differently and are equal: ``1 - Max(0, 1 - 2*s)`` and 1. What torch
    cannot tell is tried on sizes that the program covers."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes a second to import

    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.ndim != b.ndim:
        return False
    return all(bool(statically_known_true(x == y)) or _equal_within(program, x, y) for x, y in zip(a.shape, b.shape, strict=True))


def _equal_within(program: Program, x: Any, y: Any) -> bool:
    import sympy

    left, right = (sympy.sympify(n.node.expr if isinstance(n, torch.SymInt) else n) for n in (x, y))
    return always(sympy.Eq(left, right), program.signature.symbols)


def _wrong_value(program: Program, node: fx.Node) -> str | None:
    found_right = evidence(node)
    if node.meta.get("checked") == found_right:
        return None  # found right earlier, and neither its op, its arguments nor their values have changed since
    try:
        complete = normalise(node.target, node.args, node.kwargs) == (node.args, dict(node.kwargs))  # type: ignore[arg-type]
    except InternalError as error:
        return error.what
    if not complete:
        return "its arguments are not complete"
    if ops.row(node.target) is None:
        return None  # opaque: it may not be runnable on fakes a second time
    if _data_decides(node.meta["val"]):
        return None  # every inference gives a new symbol
    try:
        gives = program.infer(node)
        said, found = describe(node.meta["val"]), describe(gives)
    except Exception as error:  # noqa: BLE001  an op says so by raising anything
        return f"the op does not take these arguments: {error}"
    if said != found and not _same_sizes(program, node.meta["val"], gives):
        return f"meta['val'] says {said}, the op gives {found}"
    node.meta["checked"] = found_right
    return None


def _data_decides(value: Any) -> bool:
    """Whether a size in ``value`` is known only once the data are (the count of a mask's trues)."""
    tensors = value if isinstance(value, (tuple, list)) else [value]
    if all(isinstance(t, torch.Tensor) and all(type(n) is int for n in (*t.shape, *t.stride())) for t in tensors):
        return False
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return any(bool(free_unbacked_symbols(t)) for t in tensors if isinstance(t, (torch.Tensor, torch.SymInt)))


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal to another where both hold the very same object."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def evidence(node: fx.Node) -> tuple[Any, ...]:
    """What the check of a node's value depends on; comparing it is far cheaper than inferring the value anew."""
    args = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: _Same(n.meta.get("val")))
    return node.target, _Same(node.meta.get("val")), args
