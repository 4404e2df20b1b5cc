"""Pattern rewriting: what to find and what to put there are both written as ordinary calls.

    class FuseSquaredRelu(RewritePass):
        '''Replace relu(x) * relu(x).'''
        name = "fuse-squared-relu"
        def pattern(self, op, x): return op.relu(x) * op.relu(x)
        def check(self, match): return None if match.val("x").dtype.is_floating_point else "x is no float"
        def replace(self, op, x): return op.square(op.relu(x))

Parameters after ``op`` are wildcards: each matches anything, the same thing everywhere it stands. ``op.name`` is an
ATen op, ``op.graphwright.name`` one of ours, ``op.mylib.name`` one of another library's; any overload matches. Arguments that a pattern leaves out match anything.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from graphwright.errors import InternalError, RecipeError, nearest
from graphwright.ir import Program, args_by_name, normalise, op_name, site_of, sites_of
from graphwright.manager import Pass, PassResult
from graphwright.ops import COMMUTATIVE, row

_COMMUTATIVE = {"aten::add", "aten::mul"}


class _Operators:
    """Infix arithmetic for patterns: ``a * b`` is ``op.mul(a, b)``."""

    def __add__(self, other: Any) -> Call:
        return Call("aten::add", (self, other), {})

    def __radd__(self, other: Any) -> Call:
        return Call("aten::add", (other, self), {})

    def __mul__(self, other: Any) -> Call:
        return Call("aten::mul", (self, other), {})

    def __rmul__(self, other: Any) -> Call:
        return Call("aten::mul", (other, self), {})

    def __sub__(self, other: Any) -> Call:
        return Call("aten::sub", (self, other), {})

    def __truediv__(self, other: Any) -> Call:
        return Call("aten::div", (self, other), {})


@dataclass(frozen=True, eq=False)
class Wild(_Operators):
    """Matches anything, the same thing everywhere."""

    name: str


@dataclass(frozen=True, eq=False)
class Call(_Operators):
    """Matches a call of an op (any overload) with these arguments."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Names:
    """``op``: every name below it is an ATen op to be called, or a library whose ops are named below that."""

    def __init__(self, call: Callable[[OpOverloadPacket, tuple[Any, ...], dict[str, Any]], Any], path: tuple[str, ...] = ()):
        self._call, self._path = call, path

    def __getattr__(self, name: str) -> Any:
        if len(self._path) > 1 or name.startswith("__"):
            raise RecipeError(f"there is no op {'.'.join((*self._path, name))}", hint="Write op.relu, or op.library.name; overloads are chosen by the arguments.")
        return _Names(self._call, (*self._path, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        namespace, name = self._path if len(self._path) == 2 else ("aten", *self._path)
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is None:
            hint = nearest(name, dir(torch.ops.aten)) if namespace == "aten" else "Import the package that defines it first."
            raise RecipeError(f"there is no op {namespace}.{name} in this process", hint=hint)
        return self._call(packet, args, kwargs)


def _pattern_call(packet: OpOverloadPacket, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return Call(packet._qualified_op_name, args, kwargs)


@dataclass
class Match:
    """One place where a pattern fits.

    Attributes:
        program: where.
        root: the node whose value is replaced.
        bound: what each wildcard stands for: nodes, numbers, lists.
        nodes: the ops that the pattern covers, root first.
    """

    program: Program
    root: fx.Node
    bound: dict[str, Any] = field(default_factory=dict)
    nodes: list[fx.Node] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def node(self, op: str) -> fx.Node:
        """The covered node whose op (without overload) is ``op``, e.g. ``"aten.linear"``."""
        for node in self.nodes:
            if op_name(node.target).startswith(op) and op_name(node.target).removeprefix(op)[:1] in ("", "."):
                return node
        raise InternalError(f"the match covers no {op}: {[op_name(n.target) for n in self.nodes]}")

    def val(self, name: str) -> Any:
        """The fake value of a wildcard bound to a node; the bound value itself otherwise."""
        value = self.bound[name]
        return value.meta["val"] if isinstance(value, fx.Node) else value

    def constant(self, name: str) -> torch.Tensor | None:
        """The tensor that a wildcard is bound to, where it is a constant of the program."""
        return self.program.constant(self.bound[name])

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(s for n in self.nodes for s in sites_of(n)))


class Builder(_Names):
    """``op`` in ``replace``: every call inserts a normalised, inferred node. Overloads are chosen by the arguments."""

    def __init__(self, program: Program, match: Match):
        self._program, self._match = program, match
        super().__init__(self._insert)

    def _insert(self, packet: OpOverloadPacket, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        target = choose_overload(self._program, packet, args, kwargs)
        return self._program.call(target, *args, sites=self._match.sites, like=self._match.root, **kwargs)

    def tensor(self, name: str, value: torch.Tensor, *, origin: Iterable[str] = ()) -> fx.Node:
        """A new constant of the program."""
        return self._program.add_tensor(name, value, origin=origin)


def choose_overload(program: Program, packet: OpOverloadPacket, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpOverload:
    """The first functional overload of ``packet`` that takes these arguments.

    Raises:
        InternalError: none does.
    """
    for overload in packet.overloads():
        target = getattr(packet, overload)
        if target._schema.is_mutable:
            continue
        try:
            program.infer_call(target, *normalise(target, args, kwargs))
            return target
        except Exception:  # noqa: BLE001, S112
            continue
    raise InternalError(f"no overload of {packet} takes ({', '.join(map(str, args))})")


class RewritePass(Pass):
    """A pass written as a pattern, a check and a replacement. Subclasses give the three methods and a ``name``."""

    def pattern(self, op: Any, *wilds: Any) -> Any:
        """The graph to find, or a tuple of alternatives."""
        raise InternalError(f"{type(self).__name__} has no pattern")

    def check(self, match: Match) -> str | None:
        """None, or the reason why this match is left alone (kept for ``explain``)."""
        return None

    def replace(self, op: Builder, *wilds: Any) -> Any:
        """What stands there afterwards: a node. A wildcard that not every alternative binds has a default."""
        raise InternalError(f"{type(self).__name__} has no replacement")

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        names = list(inspect.signature(self.pattern).parameters)[1:]
        found = self.pattern(_Names(_pattern_call), *(Wild(n) for n in names))
        alternatives = found if isinstance(found, tuple) else (found,)
        wanted = list(inspect.signature(self.replace).parameters)[1:]
        for node in list(program.nodes):
            if node._erased:
                continue
            matches = [m for p in alternatives for m in _match(program, p, node)]
            if not matches or self.refused(result, node):
                continue
            reasons = [_shared(m) or self.check(m) for m in matches]  # `x + y` fits in both orders: take one that may be
            if None not in reasons:
                result.refuse(site_of(node), str(reasons[0]))
                continue
            match = matches[reasons.index(None)]
            with program.graph.inserting_before(match.root):
                new = self.replace(Builder(program, match), **{n: match.bound[n] for n in wanted if n in match.bound})
            was = describe_ops(match)
            program.replace(match.root, new)
            for inner in match.nodes[1:]:
                if not inner._erased and not inner.users:
                    program.graph.erase_node(inner)
            result.change(site_of(new), f"{was} → {op_name(new.target)}")
        if result.changes:
            program.tidy()
        return result


def describe_ops(match: Match) -> str:
    return " + ".join(op_name(n.target).split(".")[1] for n in reversed(match.nodes))


def _shared(match: Match) -> str | None:
    """The reason when a node inside the match is read from outside it too."""
    inside = set(match.nodes)
    for node in match.nodes[1:]:
        outside = [u for u in node.users if u not in inside]
        if outside:
            return f"{site_of(node)} is read by {site_of(outside[0])} too"
    return None


def _match(program: Program, pattern: Any, root: fx.Node) -> Iterator[Match]:
    for bound, nodes in _fit(pattern, root, {}, []):
        yield Match(program, root, bound, nodes)


def _fit(pattern: Any, value: Any, bound: dict[str, Any], nodes: list[fx.Node]) -> Iterator[tuple[dict[str, Any], list[fx.Node]]]:
    """Every way in which ``pattern`` fits ``value`` given what is bound already."""
    if isinstance(pattern, Wild):
        if pattern.name not in bound:
            yield {**bound, pattern.name: value}, nodes
        elif bound[pattern.name] is value or (not isinstance(value, fx.Node) and bound[pattern.name] == value):
            yield bound, nodes
        return
    if not isinstance(pattern, Call):
        if isinstance(pattern, (list, tuple)) and isinstance(value, (list, tuple)) and len(pattern) == len(value):
            yield from _fit_all(list(zip(pattern, value, strict=True)), bound, nodes)
        elif not isinstance(value, fx.Node) and type(pattern) is not bool and pattern == value or pattern is value:
            yield bound, nodes
        return
    if not (isinstance(value, fx.Node) and isinstance(value.target, OpOverload) and value.target._schema.name == pattern.op):
        return
    covered = nodes if value in nodes else [*nodes, value]
    params = [a.name for a in value.target._schema.arguments]
    if len(pattern.args) > len(params) or any(k not in params for k in pattern.kwargs):
        return
    actual = args_by_name(value)
    named = {**dict(zip(params, pattern.args, strict=False)), **pattern.kwargs}
    orders = [list(named)]
    if (pattern.op in _COMMUTATIVE or _commutes(value)) and len(pattern.args) == 2 and actual.get("alpha", 1) == 1:
        orders = [list(o) for o in permutations(list(named)[:2])]
    for order in orders:
        pairs = [(named[k], actual[o]) for k, o in zip(named, [*order, *list(named)[len(order):]], strict=True)]
        yield from _fit_all(pairs, bound, covered)


def _commutes(node: fx.Node) -> bool:
    """An op from outside whose row says so."""
    found = row(node.target)
    return found is not None and bool(found.owner) and COMMUTATIVE in found.traits


def _fit_all(pairs: list[tuple[Any, Any]], bound: dict[str, Any], nodes: list[fx.Node]) -> Iterator[tuple[dict[str, Any], list[fx.Node]]]:
    if not pairs:
        yield bound, nodes
        return
    (pattern, value), *rest = pairs
    for b, n in _fit(pattern, value, bound, nodes):
        yield from _fit_all(rest, b, n)
