"""The choice over the whole graph: one candidate per work, conversions included, as a mixed-integer linear program.

Minimise  Σ time(w, c)·x(w, c) + Σ time(v, f→g)·z(v, f→g)   subject to
    Σ_c x(w, c) = 1                                                      each work is done once
    x(w, c needing v as f) ≤ Σ given(v, f)·x + Σ_g z(v, g→f)               what is read exists in that form
    z(v, g→f) ≤ Σ given(v, g)·x                                            a conversion starts from a form that is given

The graph falls into parts that have nothing to do with each other (``parts``); equal parts are solved once, and most of them
without the integer program.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from graphwright.backends.base import NATIVE, Candidate, Format, QParams, Read, Work
from graphwright.errors import InternalError
from graphwright.lower.conversions import possible
from graphwright.lower.graph import Analysis
from graphwright.lower.parts import Part, split, walk


class NoAssignment(InternalError):
    """No choice of candidates serves the whole graph."""


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything the choice depends on.

    Attributes:
        works: in program order, with ``options[k]`` and their times in ms, ``times[k]``.
        sources: values that no work makes (inputs): they are given in native form.
        demands: forms in which the program's outputs are read.
        convert: time in ms of one conversion.
    """

    works: Sequence[Work]
    options: Sequence[Sequence[Candidate]]
    times: Sequence[Sequence[float]]
    sources: Collection[fx.Node]
    demands: Sequence[tuple[fx.Node, Format]]
    convert: Mapping[tuple[fx.Node, Format, Format], float]


    @cached_property
    def conversions(self) -> dict[fx.Node, list[tuple[Format, Format, float]]]:
        """``convert`` by value."""
        found: dict[fx.Node, list[tuple[Format, Format, float]]] = {}
        for (value, source, target), ms in self.convert.items():
            found.setdefault(value, []).append((source, target, ms))
        return found


Price = Callable[[fx.Node, Format, Format, QParams | None], float]


def pose(analysis: Analysis, options: Sequence[Sequence[Candidate]], times: Sequence[Sequence[float]], price: Price) -> Problem:
    """The problem with every conversion that any choice could need; ``price(value, source, target, params)`` in ms."""
    sources = [n for n in analysis.program.graph.nodes if n.op in ("placeholder", "get_attr")]
    given: dict[fx.Node, set[Format]] = {n: {NATIVE} for n in sources}
    wanted: dict[fx.Node, set[Format]] = {}
    for work, several in zip(analysis.works, options, strict=True):
        given[work.node] = {f for c in several for f in c.gives}
        for k, read in enumerate(work.reads):
            wanted.setdefault(read.value, set()).update(c.needs[k] for c in several)
    demands = [(o.value, NATIVE) for o in analysis.outputs if isinstance(o, Read) and o.value in given]
    for value, form in demands:
        wanted.setdefault(value, set()).add(form)
    convert = {}
    for value, forms in wanted.items():
        params = analysis.qparams.get(value)
        for source in sorted(given.get(value, ())):
            for target in sorted(forms):
                if possible(source, target) and (params is not None or "q" not in (source.kind, target.kind)) and isinstance(value.meta["val"], Tensor):
                    convert[value, source, target] = price(value, source, target, params)
    return Problem(analysis.works, options, times, frozenset(sources), demands, convert)


def solve(problem: Problem, *, allowed: Sequence[Collection[int]] | None = None, seconds: float = 5.0) -> list[int]:
    """The index of the chosen candidate per work.

    Args:
        allowed: per work, the indices to choose among; all by default.
        seconds: what the integer program may take, where it is needed, for each part.

    Raises:
        NoAssignment: no assignment exists (the native candidates always make one).
    """
    picks = [0] * len(problem.works)
    known: dict[Any, list[int]] = {}  # by signature, positions among a part's options
    for part in split(problem, allowed):
        if part.plain:
            found = [0] * len(part.works)
        else:
            mark = part.signature()
            if mark not in known:
                chosen = walk(part) or _integer_program(part, seconds)
                known[mark] = [o.index(c) for o, c in zip(part.options, chosen, strict=True)]
            found = known[mark]
        for k, options, at in zip(part.works, part.options, found, strict=True):
            picks[k] = options[at]
    return picks


def _integer_program(part: Part, seconds: float) -> list[int]:
    """The chosen candidates of one part, as positions among all of each work's."""
    whole = part.problem
    if not all(part.options):
        raise NoAssignment("no assignment of kernels exists: a work is left without a candidate")
    works = [whole.works[k] for k in part.works]
    inside = {w.node for w in works}
    sources = {r.value for w in works for r in w.reads} - inside
    options = [[whole.options[k][c] for c in o] for k, o in zip(part.works, part.options, strict=True)]
    times = [[whole.times[k][c] for c in o] for k, o in zip(part.works, part.options, strict=True)]
    demands = [(value, form) for value, forms in part.demands.items() for form in forms]
    picks = _milp(Problem(works, options, times, sources, demands, whole.convert), seconds)
    return [o[c] for o, c in zip(part.options, picks, strict=True)]


def _milp(problem: Problem, seconds: float) -> list[int]:
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    cost: list[float] = []
    upper: list[float] = []
    x: list[list[int]] = []
    givers: dict[tuple[fx.Node, Format], list[int]] = defaultdict(list)
    needs: dict[tuple[fx.Node, Format], list[list[int]]] = defaultdict(list)  # one inner list per reader
    for k, (work, options) in enumerate(zip(problem.works, problem.options, strict=True)):
        columns = []
        for c, candidate in enumerate(options):
            columns.append(len(cost))
            cost.append(problem.times[k][c])
            upper.append(1.0)
            for form in candidate.gives:
                givers[work.node, form].append(columns[-1])
        x.append(columns)
        for r, read in enumerate(work.reads):
            by_form: dict[Format, list[int]] = defaultdict(list)
            for c, candidate in enumerate(options):
                by_form[candidate.needs[r]].append(columns[c])
            for form, wanted in by_form.items():
                needs[read.value, form].append(wanted)
    demanded = set(problem.demands)
    for key in demanded:
        needs.setdefault(key, [])
    forms: dict[fx.Node, set[Format]] = defaultdict(set)
    for value, form in givers:
        forms[value].add(form)
    z: dict[tuple[fx.Node, Format, Format], int] = {}
    for value, form in needs:
        for source in {NATIVE} if value in problem.sources else forms[value]:
            if possible(source, form) and (value, source, form) in problem.convert:
                z[value, source, form] = len(cost)
                cost.append(problem.convert[value, source, form])
                upper.append(1.0)

    rows: list[dict[int, float]] = []
    low: list[float] = []
    high: list[float] = []

    def constrain(terms: Mapping[int, float], lo: float, hi: float) -> None:
        rows.append(dict(terms))
        low.append(lo)
        high.append(hi)

    for columns in x:
        constrain(dict.fromkeys(columns, 1.0), 1.0, 1.0)
    for (value, form), readers in needs.items():
        given = value in problem.sources and form == NATIVE
        available = {i: -1.0 for i in givers.get((value, form), ())}
        available |= {i: -1.0 for (v, _, f), i in z.items() if v is value and f == form}
        if given:
            continue
        for wanted in readers:
            constrain({**available, **dict.fromkeys(wanted, 1.0)}, -np.inf, 0.0)
        if (value, form) in demanded:
            constrain(available, -np.inf, -1.0)
    for (value, source, _), column in z.items():
        if value not in problem.sources:
            constrain({column: 1.0, **{i: -1.0 for i in givers[value, source]}}, -np.inf, 0.0)

    entries = [(r, c, v) for r, terms in enumerate(rows) for c, v in terms.items()]
    r, c, v = zip(*entries, strict=True)
    matrix = coo_matrix((v, (r, c)), shape=(len(rows), len(cost))).tocsc()
    integer = np.zeros(len(cost))
    integer[[i for columns in x for i in columns]] = 1
    found = milp(np.array(cost), constraints=LinearConstraint(matrix, low, high), integrality=integer,
                 bounds=Bounds(0, np.array(upper)), options={"time_limit": seconds, "mip_rel_gap": 1e-3})  # fmt: skip
    if found.x is None:
        raise NoAssignment(f"no assignment of kernels exists: {found.message}")
    return [max(range(len(columns)), key=lambda c: found.x[columns[c]]) for columns in x]
