"""What differs between two programs: ``program.diff(other)``. Names of nodes play no part in it.

Nodes are paired in turn: those that compute the same from the same; those of one op at one site; those of one op on paired operands.
A pair whose arguments or results differ is *changed*; a node without a partner was *removed* or *added*. An operand that was replaced
by another of its site (a sum by the convolution that took it in) is no change of its reader.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphwright.nodes import describe, line, op_name, sites_of, walk_nodes

if TYPE_CHECKING:
    from graphwright.ir import Program


@dataclass(frozen=True)
class Change:
    """One node: ``before`` is None where it was added, ``after`` where it was removed; neither where it was changed."""

    before: fx.Node | None
    after: fx.Node | None

    @property
    def node(self) -> fx.Node:
        found = self.before if self.before is not None else self.after
        assert found is not None
        return found


@dataclass(frozen=True)
class Hunk:
    """Changes that belong together: of nodes that share sites.

    Attributes:
        sites: in the order of the program.
    """

    sites: tuple[str, ...]
    changes: tuple[Change, ...]

    def lines(self) -> Iterator[str]:
        """As in a unified diff: what goes, then what comes."""
        yield from (f"-{_line(c.before)}" for c in self.changes if c.before is not None)
        yield from (f"+{_line(c.after)}" for c in self.changes if c.after is not None)

    @cached_property
    def form(self) -> tuple[Any, ...]:
        """Equal for hunks that do the same at other sites: in the blocks of a transformer, say."""
        names: dict[fx.Node, str] = {}

        def canonical(value: Any) -> str:
            if isinstance(value, fx.Node):
                return names.get(value) or f"{'tensor' if value.op == 'get_attr' else 'value'} {describe(value.meta.get('val'))}"
            if isinstance(value, (tuple, list)):
                return f"[{', '.join(map(canonical, value))}]"
            return repr(value)

        found = []
        for sign, nodes in (("-", [c.before for c in self.changes]), ("+", [c.after for c in self.changes])):
            for k, node in enumerate(n for n in nodes if n is not None):
                names[node] = f"{sign}{k}"
                found.append((sign, op_name(node.target), describe(node.meta.get("val")), canonical((node.args, list(node.kwargs.values())))))
        return tuple(re.sub(r"\d+", "#", s) for s in self.sites), tuple(found)


@dataclass(frozen=True)
class Difference:
    """What ``before.diff(after)`` found; true where anything differs. ``print`` it.

    Attributes:
        same: pairs of nodes that compute the same, but for operands that others of their site replaced.
        hunks: the changes, in program order.
        tensors: lines on tensors that came, went, or hold other values.
        notes: lines on inputs, outputs and mutations.
    """

    before: Program
    after: Program
    same: int
    hunks: tuple[Hunk, ...]
    tensors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.hunks or self.tensors or self.notes)

    @property
    def changes(self) -> list[Change]:
        return [c for h in self.hunks for c in h.changes]

    @property
    def added(self) -> list[fx.Node]:
        return [c.after for c in self.changes if c.before is None and c.after is not None]

    @property
    def removed(self) -> list[fx.Node]:
        return [c.before for c in self.changes if c.after is None and c.before is not None]

    @property
    def changed(self) -> list[tuple[fx.Node, fx.Node]]:
        return [(c.before, c.after) for c in self.changes if c.before is not None and c.after is not None]

    def summary(self) -> str:
        """One line: how many ops came, went and changed, and the tensors."""
        sizes = [p.size_bytes() / 1e6 for p in (self.before, self.after)]
        ops = f"{len(self.removed)} ops removed, {len(self.added)} added, {len(self.changed)} changed, {self.same} the same"
        if not self:
            return f"no difference: {self.same} ops the same"
        return f"{len(self.before.nodes)} > {len(self.after.nodes)} ops: {ops}; tensors {sizes[0]:.3g} > {sizes[1]:.3g} MB"

    def text(self, *, full: bool = False) -> str:
        """The difference like a unified diff, a hunk per group of sites, the summary last.

        Args:
            full: every hunk, also those that do the same at other sites as one before them, and every tensor.
        """
        lines = ["--- before", "+++ after"] if self else []
        lines += self.notes
        for hunk, others in self._folded(full):
            more = f" and the same at {len(others)} more: {_listed([o.sites[0] for o in others], 3)}" if others else ""
            lines += [f"@@ {_listed(hunk.sites, 4)} @@{more}", *hunk.lines()]
        shown = self.tensors if full else self.tensors[:6]
        if shown:
            more = f" ({len(self.tensors) - len(shown)} more: .text(full=True))" if len(shown) < len(self.tensors) else ""
            lines += [f"@@ tensors @@{more}", *shown]
        return "\n".join([*lines, self.summary()])

    def __str__(self) -> str:
        return self.text()

    def _folded(self, full: bool) -> list[tuple[Hunk, list[Hunk]]]:
        if full:
            return [(h, []) for h in self.hunks]
        groups: dict[Any, list[Hunk]] = {}
        for hunk in self.hunks:
            groups.setdefault(hunk.form, []).append(hunk)
        return [(first, rest) for first, *rest in groups.values()]


def diff(before: Program, after: Program) -> Difference:
    """What became of ``before`` in ``after``; time grows with the number of nodes, and with the bytes of tensors that are not shared."""
    pairing = _Pairing(before, after)
    same, changes = pairing.changes()
    return Difference(before, after, same, tuple(_hunks(changes, pairing)), tuple(_tensors(before, after)), tuple(_notes(pairing)))


def _line(node: fx.Node) -> str:
    """As the program's text has it, but for the sites, which the hunk names."""
    return line(node.name, node.op, node.target, node.args, node.kwargs, {"val": node.meta.get("val")})


def _listed(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


@dataclass
class _Pairing:
    """Which node of ``after`` stands for which of ``before``."""

    before: Program
    after: Program
    to: dict[fx.Node, fx.Node] = field(default_factory=dict)
    back: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.numbers: dict[fx.Node, int] = {}  # equal for nodes that compute the same from the same
        known: dict[Any, int] = {}
        self._leaves(known)
        for program in (self.before, self.after):
            for node in program.nodes:
                key = _key(node, lambda n: self.numbers[n])
                self.numbers[node] = known.setdefault(key, len(known))
        for name in (lambda n: (self.numbers[n], sites_of(n)), lambda n: self.numbers[n],
                     lambda n: (n.target, sites_of(n)), lambda n: (n.target, sites_of(n)[:1])):  # fmt: skip
            self._match(name)
        self._by_operands()

    def _leaves(self, known: dict[Any, int]) -> None:
        """Inputs pair by position, tensors by name or memory, where they are equal."""
        for k, (a, b) in enumerate(zip(self.before.placeholders, self.after.placeholders, strict=False)):
            self._pair(a, b)
            self.numbers[a] = self.numbers[b] = known.setdefault(("input", k), len(known))
        held = [{str(n.target): n for n in p.graph.nodes if n.op == "get_attr"} for p in (self.before, self.after)]
        by_memory = {_memory(self.before.tensor(name)): n for name, n in held[0].items()}
        for name, b in held[1].items():
            tensor = self.after.tensor(name)
            a = held[0].get(name)
            if a is None or not _equal(self.before.tensor(name), tensor):
                a = by_memory.get(_memory(tensor))
            if a is not None and a not in self.to:
                self._pair(a, b)
        for k, node in enumerate((*(n for p in (self.before, self.after) for n in p.graph.nodes if n.op in ("get_attr", "placeholder")),)):
            if node not in self.numbers:
                partner = self.back.get(node)
                self.numbers[node] = self.numbers[partner] if partner is not None else known.setdefault(("leaf", k), len(known))

    def _pair(self, a: fx.Node, b: fx.Node) -> None:
        self.to[a], self.back[b] = b, a

    def _match(self, name: Callable[[fx.Node], Any]) -> None:
        """Pair nodes without a partner that bear one name, in program order."""
        free: dict[Any, list[fx.Node]] = {}
        for a in reversed(self.before.nodes):
            if a not in self.to:
                free.setdefault(name(a), []).append(a)
        for b in self.after.nodes:
            if b not in self.back and (sites_of(b) or not isinstance(name(b), tuple)) and free.get(name(b)):
                self._pair(free[name(b)].pop(), b)

    def _by_operands(self) -> None:
        """Pair nodes of one op whose operands are pairs: what has no site of its own, such as a part of a split."""
        free: dict[Any, list[fx.Node]] = {}
        for a in reversed(self.before.nodes):
            if a not in self.to:
                free.setdefault(_key(a, lambda n: n), []).append(a)
        for b in self.after.nodes:
            if b not in self.back and all(n in self.back for n in b.all_input_nodes):
                found = free.get(_key(b, lambda n: self.back[n]))
                if found:
                    self._pair(found.pop(), b)

    def changes(self) -> tuple[int, list[Change]]:
        """How many pairs are the same; and the rest, in program order, what was added behind what stands before it."""
        place = {n: k for k, n in enumerate(self.before.nodes)}
        found: list[tuple[tuple[int, int], Change]] = []
        same, last = 0, -1
        for k, b in enumerate(self.after.nodes):
            a = self.back.get(b)
            if a is None:
                found.append(((last, k + 1), Change(None, b)))
                continue
            last = place[a]
            if self._alike(a, b):
                same += 1
            else:
                found.append(((last, 0), Change(a, b)))
        found += [((k, 0), Change(a, None)) for a, k in place.items() if a not in self.to]
        return same, [change for _, change in sorted(found, key=lambda f: f[0])]

    def _alike(self, a: fx.Node, b: fx.Node) -> bool:
        if self.numbers[a] == self.numbers[b]:
            return True
        return describe(a.meta.get("val")) == describe(b.meta.get("val")) and self.equal((a.args, dict(a.kwargs)), (b.args, dict(b.kwargs)))

    def equal(self, a: Any, b: Any) -> bool:
        """Equal arguments; operands may be pairs, or one may have taken the other's place."""
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if self.to.get(a) is b:
                return True
            lone = a not in self.to or b not in self.back or describe(a.meta.get("val")) == describe(b.meta.get("val"))
            return lone and not set(sites_of(a)).isdisjoint(sites_of(b))
        if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
            return len(a) == len(b) and all(map(self.equal, a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(self.equal(v, b[k]) for k, v in a.items())
        return _plain(a) == _plain(b)


def _plain(value: Any) -> Any:
    """A value that compares by type and, of floats, by what they are: nan is nan."""
    return type(value).__name__, repr(value)


def _key(node: fx.Node, named: Callable[[fx.Node], Any]) -> Any:
    """Op and arguments, operands under the given names; can be hashed."""

    def seen(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return "node", named(value)
        if isinstance(value, (tuple, list)):
            return "list", *map(seen, value)
        return _plain(value)

    return node.target, tuple(map(seen, node.args)), tuple((k, seen(v)) for k, v in sorted(node.kwargs.items()))


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if _memory(a) == _memory(b):
        return True
    return bool(torch.equal(a, b)) or (a.is_floating_point() and bool(torch.equal(a.nan_to_num(), b.nan_to_num())) and bool(torch.equal(a.isnan(), b.isnan())))


def _hunks(changes: Sequence[Change], pairing: _Pairing) -> Iterator[Hunk]:
    """Changes of nodes that share sites, together; what has no site goes with an operand or a reader."""
    parent: dict[Any, Any] = {}

    def root(x: Any) -> Any:
        parent.setdefault(x, x)
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    def nodes(change: Change) -> list[fx.Node]:
        return [n for n in (change.before, change.after) if n is not None]

    inside = {n for c in changes for n in nodes(c)}
    for change in changes:
        for node in nodes(change):
            marks: Iterable[Any] = sites_of(node) or [node, *[n for n in (*node.all_input_nodes, *node.users) if n in inside][:1]]
            for mark in marks:
                near = next(iter(sites_of(mark)), mark) if isinstance(mark, fx.Node) else mark
                parent[root(near)] = root(_mark(change.node))
            parent[root(_mark(node))] = root(_mark(change.node))
    groups: dict[Any, list[Change]] = {}
    for change in changes:
        groups.setdefault(root(_mark(change.node)), []).append(change)
    for group in groups.values():
        sites = dict.fromkeys(s for c in group for n in nodes(c) for s in sites_of(n))
        yield Hunk(tuple(sites) or (group[0].node.name,), tuple(group))


def _mark(node: fx.Node) -> Any:
    return next(iter(sites_of(node)), node)


def _tensors(before: Program, after: Program) -> Iterator[str]:
    held = [before.tensors(), after.tensors()]
    for name, tensor in held[0].items():
        other = held[1].get(name)
        if other is None:
            yield f"-{name}: {describe(tensor)}"
        elif tensor.dtype != other.dtype or tensor.shape != other.shape:
            yield f"-{name}: {describe(tensor)}"
            yield f"+{name}: {describe(other)}"
        elif not _equal(tensor, other):
            yield f" {name}: {describe(tensor)} holds other values"
    yield from (f"+{name}: {describe(tensor)}" for name, tensor in held[1].items() if name not in held[0])


def _notes(pairing: _Pairing) -> Iterator[str]:
    a, b = pairing.before, pairing.after
    for what, one, other in (("inputs", a.placeholders, b.placeholders),):
        said = [[describe(n.meta.get("val")) for n in nodes] for nodes in (one, other)]
        if said[0] != said[1]:
            yield f"{what}: ({', '.join(said[0])}) > ({', '.join(said[1])})"
    if a.signature.mutations != b.signature.mutations:
        yield "other buffers or inputs are written"
    outs = a.output.args[0], b.output.args[0]
    if not pairing.equal(*outs):
        names = [", ".join(n.name for n in walk_nodes(o)) for o in outs]
        yield f"outputs: ({names[0]}) > ({names[1]})"
