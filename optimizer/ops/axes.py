"""The spelling of axes: a small relative of einops, parsed and solved.

``"* i, o i, o -> * o"`` spells the tensor arguments of an op in schema order (an absent optional one keeps its place)
and, after the arrow, its results. Within an operand, one word per axis:

    i           an axis; the same word in several operands is the same axis
    *           any number of axes, aligned at the right, broadcast where a size is 1
    (h d)       one axis that is a product of several, outermost first
    (a + b)     one axis that is several laid end to end
    1, 3        a literal size; ``g=3``: an axis of a size that the shapes alone do not tell
    ...         by itself: a tensor whose axes have nothing to do with the result's
    [d]         in a result too: handled as a whole (normalised, sorted); in no result: picked from by index
    h'          h seen through a sliding window: tied to h, its size is its own

An axis of an input that stands in no result and bears no bracket is summed (or otherwise reduced) over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from graphwright.errors import InternalError

_WORD = re.compile(r"\[?(?:[A-Za-z_]\w*(?:=\d+)?'?|\*)\]?|\d+|[+()]|\.\.\.")
Shape = Sequence[Any]


@dataclass(frozen=True)
class Dim:
    """One axis of one operand: its atoms, outermost first; ``joined`` where their sizes add up."""

    atoms: tuple[str, ...]
    joined: bool = False


Dims = tuple[Dim, ...]


@dataclass(frozen=True)
class Axes:
    """A parsed spelling, ``*`` written out for given ranks.

    Attributes:
        inputs: per tensor argument its axes, None where the argument is absent or spelled ``...``.
        outputs: per result its axes.
        whole: names in brackets.
        stated: sizes that the spelling itself gives.
    """

    inputs: tuple[Dims | None, ...]
    outputs: tuple[Dims, ...]
    whole: frozenset[str]
    stated: tuple[tuple[str, int], ...] = ()

    def named(self, operands: Iterable[Dims | None]) -> frozenset[str]:
        """Every axis name in these operands (no literal sizes; a window's name without its prime)."""
        return frozenset(a.rstrip("'") for dims in operands for d in dims or () for a in d.atoms if not a.isdigit())

    @property
    def summed(self) -> frozenset[str]:
        """Axes of the inputs that are reduced over."""
        return self.named(self.inputs) - self.named(self.outputs) - self.whole

    @property
    def picked(self) -> frozenset[str]:
        """Axes of the inputs that are picked from by index."""
        return self.whole - self.named(self.outputs)


def names(count: int, prefix: str = "a") -> list[str]:
    """``["a0", "a1", ...]``."""
    return [f"{prefix}{k}" for k in range(count)]


@cache
def _words(text: str) -> tuple[tuple[tuple[tuple[str, ...], bool], ...], ...]:
    """Operands of one side; each axis as (atoms, joined); ``*`` as (("*",), False)."""
    operands = []
    for part in text.split(","):
        if _WORD.sub("", part).strip():
            raise InternalError(f"cannot read the axes {part!r}")
        dims: list[tuple[tuple[str, ...], bool]] = []
        group: list[str] | None = None
        for word in _WORD.findall(part):
            if (word == "(") != (group is None) and word in "()":
                raise InternalError(f"brackets do not match in the axes {part!r}")
            if word == "(":
                group = []
            elif word == ")":
                assert group is not None
                dims.append((tuple(w for w in group if w != "+"), "+" in group))
                group = None
            elif group is not None:
                group.append(word)
            else:
                dims.append(((word,), False))
        if group is not None:
            raise InternalError(f"brackets do not match in the axes {part!r}")
        operands.append(tuple(dims))
    return tuple(operands)


def parse(text: str, inputs: Sequence[Shape | None], outputs: Sequence[Shape]) -> Axes:
    """Read a spelling for operands of these shapes (None: an absent argument; absent last ones need no spelling).

    Raises:
        InternalError: the text is malformed, or the ranks do not fit it.
    """
    left, _, right = text.partition("->")
    sides = [list(_words(left.strip())), list(_words(right.strip()))]
    whole: set[str] = set()
    stated: dict[str, int] = {}

    def atom(word: str) -> str:
        name, _, size = word.strip("[]").partition("=")
        if size:
            stated[name] = int(size)
        if word.startswith("["):
            whole.add(name)
        return name

    def operand(dims: Any, shape: Shape | None) -> Dims | None:
        if shape is None or dims == ((("...",), False),):
            return None
        has_star = any("*" in atoms[0] for atoms, _ in dims)
        stars = len(shape) - len(dims) + has_star
        if stars < 0 or (stars and not has_star):
            raise InternalError(f"a tensor with {len(shape)} axes does not fit the axes {text!r}")
        found: list[Dim] = []
        for atoms, joined in dims:
            if "*" in atoms[0]:
                found.extend(Dim((f"*{k}",)) for k in reversed(range(stars)))
                whole.update(f"*{k}" for k in range(stars) if atoms[0] == "[*]")
                continue
            found.append(Dim(tuple(map(atom, atoms)), joined))
        return tuple(found)

    sides[0].extend([()] * (len(inputs) - len(sides[0])) if all(s is None for s in inputs[len(sides[0]) :]) else [])
    if len(sides[0]) != len(inputs) or len(sides[1]) != len(outputs):
        counts = f"{len(inputs)} inputs and {len(outputs)} results"
        raise InternalError(f"the axes {text!r} do not spell {counts}")
    ins = tuple(operand(d, s) for d, s in zip(sides[0], inputs, strict=True))
    outs = tuple(operand(d, s) or () for d, s in zip(sides[1], outputs, strict=True))
    return Axes(ins, outs, frozenset(whole), tuple(stated.items()))


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal; asks symbolic ones without adding a guard."""
    return _known(a == b)


def divides(a: Any, b: Any) -> bool:
    """Whether size a is known to divide size b."""
    return same(a, b) or (not same(a, 0) and _known(b % a == 0))


def _known(truth: Any) -> bool:
    if isinstance(truth, bool):
        return truth
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(truth)


def sizes(axes: Axes, inputs: Sequence[Shape | None], outputs: Sequence[Shape]) -> dict[str, Any]:
    """The size of every axis name that the operands' shapes determine.

    Raises:
        InternalError: the shapes contradict the spelling.
    """
    found: dict[str, Any] = dict(axes.stated)
    given = [(dims, shape or (), False) for dims, shape in zip(axes.inputs, inputs, strict=True) if dims is not None]
    given += [(dims, shape, True) for dims, shape in zip(axes.outputs, outputs, strict=True)]
    pairs = [(d, n, result) for dims, shape, result in given for d, n in zip(dims or (), shape, strict=True)]
    waiting = pairs
    while waiting:
        rest = [p for p in waiting if not _solve(p[0], p[1], found)]
        if len(rest) == len(waiting):
            break
        waiting = rest
    for dim, size, is_result in pairs:
        got = total(dim, found)
        plainly = isinstance(got, int) and isinstance(size, int)
        if plainly and got != size and (is_result or size != 1 or len(dim.atoms) > 1):
            raise InternalError(f"axis ({' '.join(dim.atoms)}) comes to {got}, the tensor's is {size}")
    return found


def _solve(dim: Dim, size: Any, found: dict[str, Any]) -> bool:
    """Learn what one axis tells; True once nothing more is to be learnt from it."""
    unknown = [a for a in dict.fromkeys(dim.atoms) if not a.isdigit() and a not in found]
    if len(dim.atoms) == 1 and dim.atoms[0] in found:
        if same(found[dim.atoms[0]], 1) and not same(size, 1):
            found[dim.atoms[0]] = size  # what was 1 so far was broadcast
    elif len(unknown) == 1 and dim.atoms.count(unknown[0]) == 1:
        known = total(Dim(tuple(a for a in dim.atoms if a != unknown[0]), dim.joined), found)
        if dim.joined:
            found[unknown[0]] = size - known
        elif same(known, 0):
            return False
        else:
            found[unknown[0]] = size // known
    elif unknown:
        return False
    return True


def total(dim: Dim, found: dict[str, Any]) -> Any:
    """The size of an axis from its atoms' sizes, None while one is unknown."""
    size: Any = 0 if dim.joined else 1
    for atom in dim.atoms:
        part = int(atom) if atom.isdigit() else found.get(atom)
        if part is None:
            return None
        size = size + part if dim.joined else size * part
    return size


def regroup(old: Shape, new: Shape) -> str:
    """The spelling of a row-major reshape from shape ``old`` to shape ``new``, by factoring both.

    Axes of size 1 are literal. Where a boundary falls inside an axis at no common factor (``6 4 -> 8 3``), the input's
    axes there are bracketed and the result's are fresh.
    """
    left, right = _Side(old), _Side(new)
    fresh = _names()
    while not (left.done or right.done):
        a, b = left.rest, right.rest
        if divides(b, a):
            left.take(b, name := next(fresh))
            right.take(b, name)
        elif divides(a, b):
            left.take(a, name := next(fresh))
            right.take(a, name)
        else:
            _opaque(left, right, fresh)
    left.flush(fresh, "[{}]")
    right.flush(fresh, "{}")
    return f"{left} -> {right}"


def _names() -> Iterator[str]:
    count = 0
    while True:
        yield f"a{count}"
        count += 1


class _Side:
    """One side of a reshape while it is factored: the axes so far and what is left of the current one."""

    def __init__(self, shape: Shape):
        self.shape, self.at, self.words = list(shape), -1, [[] for _ in shape]
        self._next()

    def _next(self) -> None:
        self.at += 1
        while self.at < len(self.shape) and same(self.shape[self.at], 1):
            self.words[self.at].append("1")
            self.at += 1
        self.rest = self.shape[self.at] if self.at < len(self.shape) else 1

    @property
    def done(self) -> bool:
        return self.at >= len(self.shape)

    def take(self, size: Any, name: str) -> None:
        self.words[self.at].append(name)
        if same(self.rest, size):
            self._next()
        else:
            self.rest = self.rest // size

    def flush(self, fresh: Iterator[str], form: str) -> None:
        while not self.done:
            self.take(self.rest, form.format(next(fresh)))

    def __str__(self) -> str:
        return " ".join(w[0] if len(w) == 1 else f"({' '.join(w)})" for w in self.words)


def _opaque(left: _Side, right: _Side, fresh: Iterator[str]) -> None:
    """Pass over axes without a common factor until both sides have covered the same number of elements."""
    a, b = left.rest, right.rest
    left.take(a, f"[{next(fresh)}]")
    right.take(b, next(fresh))
    while not same(a, b):
        if not left.done and (right.done or _known(a < b)):
            a = a * left.rest
            left.take(left.rest, f"[{next(fresh)}]")
        elif not right.done:
            b = b * right.rest
            right.take(right.rest, next(fresh))
        else:
            return
