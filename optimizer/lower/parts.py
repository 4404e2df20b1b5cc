"""The choice over the whole graph falls apart where a value's form is settled: each part is solved by itself, equal ones once.

A work whose every candidate gives its value in native form settles it for whoever reads it; a reader whose every
candidate wants it so asks nothing of the maker but that form. What is left hangs together in parts: a convolutional
network's images, say, while every linear of a transformer stands alone.

A part is solved exactly by one walk in program order (dynamic programming): all that a later work needs to know of the
earlier choices is in which forms the values that it may still read exist. Where too many values are live at once for
that (``WIDEST`` states), the part goes to the integer program.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from graphwright.backends.base import NATIVE, Candidate, Format
from graphwright.lower.conversions import possible

if TYPE_CHECKING:
    from graphwright.lower.select import Problem

#: States that a walk may be in before the integer program is asked instead.
WIDEST = 2048


@dataclass(frozen=True, eq=False)
class Part:
    """Works whose choices hang together.

    Attributes:
        works: positions in ``problem.works``, ascending.
        options: for each of them, the positions of the candidates that may be chosen.
        demands: forms in which values made here are wanted from outside.
    """

    problem: Problem
    works: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    demands: Mapping[fx.Node, tuple[Format, ...]]

    def candidates(self, position: int) -> Iterator[tuple[int, Candidate, float]]:
        """``(position among the work's candidates, candidate, time)`` of one of ``works``."""
        k = self.works[position]
        for c in self.options[position]:
            yield c, self.problem.options[k][c], self.problem.times[k][c]

    @property
    def plain(self) -> bool:
        """Nothing to choose, and nothing to convert."""
        several = [list(self.candidates(position)) for position in range(len(self.works))]
        return all(len(o) == 1 and {*o[0][1].needs, *o[0][1].gives} == {NATIVE} for o in several)

    def signature(self) -> Any:
        """Equal for parts that have the same answer: times, forms, conversions and who reads whom."""
        number: dict[fx.Node, int] = {}
        works = []
        for position, k in enumerate(self.works):
            work = self.problem.works[k]
            reads = tuple(number.setdefault(r.value, len(number)) for r in work.reads)
            choice = tuple((t, c.needs, c.gives) for _, c, t in self.candidates(position))
            works.append((reads, number.setdefault(work.node, len(number)), choice))
        return tuple(works), self._prices(number), tuple((number[v], forms) for v, forms in self.demands.items())

    def _prices(self, number: Mapping[fx.Node, int]) -> tuple[Any, ...]:
        found = []
        for value, k in number.items():
            for source, target, ms in self.problem.conversions.get(value, ()):
                found.append((k, source, target, ms))
        return tuple(found)


def split(problem: Problem, allowed: Sequence[Collection[int]] | None = None) -> list[Part]:
    """The parts, in the order of their first works.

    Args:
        allowed: per work, the positions to choose among; all by default.
    """
    options = [tuple(c for c in range(len(o)) if allowed is None or c in allowed[k]) for k, o in enumerate(problem.options)]
    maker = {w.node: k for k, w in enumerate(problem.works)}
    settled = {
        node for node, k in maker.items() if all(set(problem.options[k][c].gives) == {NATIVE} for c in options[k])
    } | set(problem.sources)
    demands: dict[fx.Node, dict[Format, None]] = defaultdict(dict)
    for value, form in problem.demands:
        demands[value][form] = None
    groups = _Groups(len(problem.works))
    leader: dict[fx.Node, int] = {}  # of each value that is not settled for all: a work whose choice bears on it
    for k, work in enumerate(problem.works):
        for r, read in enumerate(work.reads):
            value = read.value
            if all(problem.options[k][c].needs[r] == NATIVE for c in options[k]):
                if value not in settled:
                    demands[value][NATIVE] = None
                continue
            if value in maker and value not in settled:
                groups.join(k, maker[value])
            groups.join(k, leader.setdefault(value, k))
    members: dict[int, list[int]] = {}
    for k in range(len(problem.works)):
        members.setdefault(groups.of(k), []).append(k)
    found = []
    for several in members.values():
        wanted = {problem.works[k].node: tuple(demands[problem.works[k].node]) for k in several if problem.works[k].node in demands}
        found.append(Part(problem, tuple(several), tuple(options[k] for k in several), wanted))
    return found


class _Groups:
    """Disjoint sets of numbers; a set is known by its smallest."""

    def __init__(self, count: int):
        self._above = list(range(count))

    def of(self, k: int) -> int:
        while self._above[k] != k:
            self._above[k] = k = self._above[self._above[k]]
        return k

    def join(self, a: int, b: int) -> None:
        a, b = sorted((self.of(a), self.of(b)))
        self._above[b] = a


#: A value's forms: those that its maker gives, and those that exist, conversions included.
_Held = tuple[frozenset[Format], frozenset[Format]]
_AS_GIVEN: _Held = (frozenset({NATIVE}), frozenset({NATIVE}))


def walk(part: Part) -> list[int] | None:
    """The best candidate of each work by dynamic programming; None where the part is too wide for that, or has no answer."""
    works = [part.problem.works[k] for k in part.works]
    last = _last_reads(part)
    live: list[fx.Node] = []
    states: dict[tuple[_Held, ...], tuple[float, Any]] = {(): (0.0, None)}
    for position, work in enumerate(works):
        entering = [v for v in dict.fromkeys(r.value for r in work.reads) if v in last and v not in live]
        live += entering
        places = {value: k for k, value in enumerate(live)}
        kept = [k for k, value in enumerate(live) if last[value] > position]
        follow: dict[tuple[_Held, ...], tuple[float, Any]] = {}
        for held, (spent, chain) in states.items():
            held += (_AS_GIVEN,) * len(entering)
            for c, candidate, ms in part.candidates(position):
                now, cost = list(held), spent + ms
                for read, form in zip(work.reads, candidate.needs, strict=True):
                    if read.value in places:
                        k = places[read.value]
                        now[k], price = _with(part.problem, read.value, now[k], form)
                        cost += price
                made = (frozenset(candidate.gives), frozenset(candidate.gives))
                for form in part.demands.get(work.node, ()):
                    made, price = _with(part.problem, work.node, made, form)
                    cost += price
                if cost == math.inf:
                    continue
                key = (*(now[k] for k in kept), made) if work.node in last else tuple(now[k] for k in kept)
                if key not in follow or cost < follow[key][0]:
                    follow[key] = cost, (c, chain)
        live = [live[k] for k in kept] + ([work.node] if work.node in last else [])
        states = follow
        if not 0 < len(states) <= WIDEST:
            return None
    _, chain = min(states.values(), key=lambda s: s[0])
    picks: list[int] = []
    while chain is not None:
        c, chain = chain
        picks.append(c)
    return picks[::-1]


def _last_reads(part: Part) -> dict[fx.Node, int]:
    """For each value whose forms matter within the part: the position of the last work that reads it."""
    works = [part.problem.works[k] for k in part.works]
    matter = {w.node for w in works}
    for position, work in enumerate(works):
        for r, read in enumerate(work.reads):
            if any(c.needs[r] != NATIVE for _, c, _ in part.candidates(position)):
                matter.add(read.value)
    return {r.value: position for position, work in enumerate(works) for r in work.reads if r.value in matter}


def _with(problem: Problem, value: fx.Node, held: _Held, form: Format) -> tuple[_Held, float]:
    """The value's forms with ``form`` among them, and what that costs."""
    given, there = held
    if form in there:
        return held, 0.0
    ways = [problem.convert.get((value, g, form), math.inf) for g in given if possible(g, form)]
    return (given, there | {form}), min(ways, default=math.inf)
