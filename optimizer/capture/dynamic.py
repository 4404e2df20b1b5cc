"""Which sizes of the inputs may vary: the plan before tracing, and what tracing left of it.

A plan is a list of groups; a group is one size shared by dimensions of several inputs (all batch dimensions, say).
Where torch.export, or the model itself, does not allow a group to vary, the group is dropped and a note says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.export import Dim

from graphwright import ir
from graphwright.errors import InputError, nearest
from graphwright.sizes import always, as_function

#: of every leaf, of every dimension
Sizes = tuple[tuple[int | None, ...], ...]

_CACHE = re.compile(r"\.(keys|values)$|\['past_key_values'\](\[\d+\])+$")
_SCAN = 4096  # sizes up to here are tried against a guard on one size
_HUGE = 2**31


@dataclass(frozen=True)
class Group:
    """One size that may vary.

    Attributes:
        kind: ``"batch"``, ``"sequence"``, ``"cache"`` or the user's own name.
        size: in the example.
        members: (leaf, dimension) pairs that share it.
        low, high: bounds the user gave.
    """

    kind: str
    size: int
    members: tuple[tuple[int, int], ...]
    low: int | None = None
    high: int | None = None


@dataclass
class Plan:
    """The groups that may vary, and sizes that are sums of others (a mask over past and present tokens)."""

    groups: list[Group] = field(default_factory=list)
    sums: list[tuple[tuple[int, int], tuple[tuple[int, int], ...], int]] = field(default_factory=list)

    def without(self, *kinds: str) -> Plan:
        """The plan with those kinds of group fixed."""
        return Plan([g for g in self.groups if g.kind not in kinds], [] if kinds else self.sums)

    def dims(self, count: int) -> list[dict[int, Any]]:
        """For each of ``count`` leaves, what torch.export is to do with its dimensions."""
        found: list[dict[int, Any]] = [{} for _ in range(count)]
        for group in self.groups:
            hint = Dim.AUTO if group.low is None and group.high is None else Dim.AUTO(min=group.low, max=group.high)
            for leaf, d in group.members:
                found[leaf][d] = hint
        for (leaf, d), _, _ in self.sums:
            found[leaf][d] = Dim.AUTO
        return found

    def relate(self, leaves: Sequence[torch.Tensor]) -> None:
        """State the equalities between sizes; called while the model is traced."""
        for group in self.groups:
            first = leaves[group.members[0][0]].shape[group.members[0][1]]
            for leaf, d in group.members[1:]:
                torch._check(leaves[leaf].shape[d] == first)
        for (leaf, d), parts, extra in self.sums:
            torch._check(leaves[leaf].shape[d] == sum(leaves[k].shape[j] for k, j in parts) + extra)


@dataclass(frozen=True)
class Changed:
    """For ``capture(dynamic=...)``: as ``"auto"``, and what differed between the calls so far.

    Attributes:
        calls: the sizes of every leaf in each of them; None is one that varies already.
        fixed: places (leaf, dimension) that an earlier capture could not leave open.
    """

    calls: tuple[Sizes, ...]
    fixed: frozenset[tuple[int, int]] = frozenset()

    def differing(self, leaves: Sequence[torch.Tensor]) -> dict[tuple[int, int], tuple[int | None, ...]]:
        """Places (leaf, dimension) with the size that they have now and in each call, where those are not all one."""
        calls = [c for c in self.calls if [len(s) for s in c] == [t.ndim for t in leaves]]
        found = {(k, d): (n, *(c[k][d] for c in calls)) for k, t in enumerate(leaves) for d, n in enumerate(t.shape)}
        return {place: sizes for place, sizes in found.items() if len(set(sizes)) > 1 and place not in self.fixed}

    def opened(self, plan: Plan, leaves: Sequence[torch.Tensor]) -> Plan:
        """The plan with a group for each set of sizes that have always been equal, and not always what they are now."""
        open_ = {place for g in plan.groups for place in g.members} | {place for place, _, _ in plan.sums}
        found: dict[tuple[int | None, ...], list[tuple[int, int]]] = {}
        for place, sizes in self.differing(leaves).items():
            if place not in open_:
                found.setdefault(sizes, []).append(place)
        return Plan([*plan.groups, *(Group("size", sizes[0] or 0, tuple(places)) for sizes, places in found.items())], plan.sums)


# -- making a plan ---------------------------------------------------------------------------------------------------


def automatic(leaves: Sequence[torch.Tensor], names: Sequence[str], paths: Sequence[str]) -> Plan:
    """Batch: dimension 0 of every input that shares the first one's size. Sequence: dimension 1 of integer, boolean
    and mask inputs. Cache: the lengths of past keys and values."""
    cached = {k for k, p in enumerate(paths) if _CACHE.search(p)}
    shaped = [k for k, t in enumerate(leaves) if t.ndim >= 2] or [k for k, t in enumerate(leaves) if t.ndim]
    plan = Plan()
    if not shaped:
        return plan
    batch = leaves[shaped[0]].shape[0]
    members = tuple((k, 0) for k, t in enumerate(leaves) if t.ndim and t.shape[0] == batch)
    plan.groups.append(Group("batch", batch, members))
    tokens = [k for k, t in enumerate(leaves) if t.ndim >= 2 and k not in cached and _token_like(t, names[k])]
    lengths: dict[int, list[tuple[int, int]]] = {}
    for k in sorted(cached):
        if leaves[k].ndim == 4:
            lengths.setdefault(leaves[k].shape[2], []).append((k, 2))
    past = None
    for size, places in lengths.items():
        if size >= 2:
            plan.groups.append(Group("cache", size, tuple(places)))
            past = (size, places[0]) if past is None else past
    by_size: dict[int, list[tuple[int, int]]] = {}
    for k in tokens:
        for d in range(1, leaves[k].ndim) if "mask" in names[k] else (1,):
            by_size.setdefault(leaves[k].shape[d], []).append((k, d))
    present = next((s for k in tokens for s in [leaves[k].shape[1]] if "mask" not in names[k]), None)
    for size, places in by_size.items():
        if past is not None and present is not None and size == past[0] + present and size != present:
            query = [(k, 1) for k in tokens if "mask" not in names[k]][:1] if present > 1 else []
            plan.sums += [(place, (past[1], *query), 0 if query else present) for place in places]
        elif size > 1 or (size == 1 and not cached and _two_dimensional(leaves, places)):
            plan.groups.append(Group("sequence", size, tuple(places)))
    return plan


def _token_like(tensor: torch.Tensor, name: str) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) or "mask" in name


def _two_dimensional(leaves: Sequence[torch.Tensor], places: Sequence[tuple[int, int]]) -> bool:
    return all(leaves[k].ndim == 2 for k, _ in places)


def stated(given: Any, leaves: Sequence[torch.Tensor], names: Sequence[str], positional: Sequence[str]) -> Plan:
    """The plan that a user wrote: by input name (or position), ``{dimension: name | Dim | True}``.

    Equal names are equal sizes. An entry for a nested input (a cache) holds for all tensors inside.

    Raises:
        InputError: an input or dimension does not exist.
    """
    if isinstance(given, (tuple, list)):
        given = dict(zip(positional or names, given, strict=False))
    if not isinstance(given, Mapping):
        raise InputError(f"dynamic={given!r}", hint='Pass None, "auto", or {"input": {0: "batch"}}.')
    named: dict[str, list[tuple[int, int]]] = {}
    bounds: dict[str, tuple[int | None, int | None]] = {}
    for name, dims in given.items():
        mine = [k for k, n in enumerate(names) if n == name or n.startswith(f"{name}_")]
        if not mine:
            close = nearest(str(name), names)
            raise InputError(f"dynamic names the input {name!r}, which does not exist",
                             hint=f"The inputs are {', '.join(names)}{f'; {close}' if close else ''}.")  # fmt: skip
        for k in mine:
            for d, said in _entries(dims, leaves[k], name):
                label, low, high = _label(said, k, d)
                named.setdefault(label, []).append((k, d))
                bounds[label] = (low, high)
    return Plan([Group(n, leaves[m[0][0]].shape[m[0][1]], tuple(m), *bounds[n]) for n, m in named.items()])


def _entries(dims: Any, leaf: torch.Tensor, name: str) -> list[tuple[int, Any]]:
    pairs = list(dims.items()) if isinstance(dims, Mapping) else list(enumerate(dims or ()))
    found = []
    for d, said in pairs:
        if said is None or isinstance(said, int) and not isinstance(said, bool) or said is Dim.STATIC or said is False:
            continue
        if not isinstance(d, int) or not -leaf.ndim <= d < leaf.ndim:
            raise InputError(f"dynamic: {name!r} has {leaf.ndim} dimensions, no dimension {d!r}")
        found.append((d % leaf.ndim, said))
    return found


def _label(said: Any, k: int, d: int) -> tuple[str, int | None, int | None]:
    """(name, low, high) of a user's entry; anything anonymous gets a name of its own."""
    if isinstance(said, str):
        return said, None, None
    low, high = getattr(said, "min", None), getattr(said, "max", None)
    high = None if high is None or high >= _HUGE else int(high)
    low = None if low is None or low < 2 else int(low)
    name = getattr(said, "__name__", None)
    return (name if isinstance(name, str) and not isinstance(said, bool) else f"size {d} of input {k}"), low, high


# -- what tracing left -----------------------------------------------------------------------------------------------


class Inexpressible(Exception):
    """The traced program holds under a condition on sizes that spans cannot state."""


def spans(placeholders: Sequence[fx.Node], groups: Sequence[Group]) -> dict[str, ir.Span]:
    """Every free symbol in the placeholders' sizes, and what it may be by the guards of the trace.

    Raises:
        Inexpressible: a guard relates several sizes other than by equality.
    """
    import sympy

    sizes = [s for n in placeholders for s in n.meta["val"].shape if isinstance(s, torch.SymInt)]
    if not sizes:
        return {}
    env = sizes[0].node.shape_env
    symbols = set().union(*(s.node.expr.free_symbols for s in sizes))
    hint = getattr(env, "guarding_hint_or_throw", None) or env.size_hint
    hints = {s: int(hint(s)) for s in symbols}
    found = {}
    single: dict[Any, list[Any]] = {s: [] for s in symbols}
    joint = []
    for guard in env.guards:
        expression = env.simplify(guard.expr)
        free = expression.free_symbols
        if expression is sympy.true or not free & symbols:
            continue
        if len(free) == 1:
            single[next(iter(free))].append(expression)
        else:
            joint.append(expression)
    for symbol in symbols:
        bounds = env.bound_sympy(symbol)
        low, high = _bound(bounds.lower, 0), _bound(bounds.upper, None)
        own = [(g.low, g.high) for g in groups if any(_is(placeholders, m, symbol) for m in g.members)]
        low = max([low or 0, 2 if not own else 1, *(lo for lo, _ in own if lo)])
        highs = [h for h in (high, *(h for _, h in own)) if h is not None and h < _HUGE]
        found[str(symbol)] = _fit(symbol, single[symbol], hints[symbol], low, min(highs, default=None))
    for expression in joint:
        if not always(expression, found):
            raise Inexpressible(f"the model's code holds for sizes with {expression} alone")
    return dict(sorted(found.items()))


def _fit(symbol: Any, guards: Sequence[Any], hint: int, low: int, high: int | None) -> ir.Span:
    """The widest run of sizes round the example that satisfies every guard."""
    import sympy

    step = 1
    for guard in guards:
        for mod in guard.atoms(sympy.Function):
            if type(mod).__name__ in ("Mod", "PythonMod") and mod.args[1].is_Integer and hint % int(mod.args[1]) == 0:
                step = step * int(mod.args[1]) // sympy.gcd(step, int(mod.args[1]))
    step = int(step)

    tests = [as_function(g, (symbol,)) for g in guards]

    def good(value: int) -> bool:
        return all(test(value) for test in tests)

    bottom = hint
    while guards and bottom - step >= low and good(bottom - step):
        bottom -= step
    top: int | None = hint
    if not guards:
        return ir.Span(low, high, 1)
    limit = min(high or hint + _SCAN, hint + _SCAN)
    while top + step <= limit and good(top + step):
        top += step
    if top + step > limit and limit == hint + _SCAN and all(good(step * (10**k)) for k in range(4, 9)):
        top = high
    return ir.Span(bottom, top, step)


def _is(placeholders: Sequence[fx.Node], member: tuple[int, int], symbol: Any) -> bool:
    size = placeholders[member[0]].meta["val"].shape[member[1]]
    return isinstance(size, torch.SymInt) and size.node.expr == symbol


def _bound(value: Any, otherwise: int | None) -> int | None:
    return int(value) if getattr(value, "is_Integer", False) and abs(int(value)) < _HUGE else otherwise
