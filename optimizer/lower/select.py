"""The choice over the whole graph: one candidate per work, conversions included, as a mixed-integer linear program.

Minimise  Σ time(w, c)·x(w, c) + Σ time(v, f→g)·z(v, f→g)   subject to
    Σ_c x(w, c) = 1                                                      each work is done once
    x(w, c needing v as f) ≤ Σ given(v, f)·x + Σ_g z(v, g→f)               what is read exists in that form
    z(v, g→f) ≤ Σ given(v, g)·x                                            a conversion starts from a form that is given
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from graphwright.backends.base import NATIVE, Candidate, Format, Work
from graphwright.errors import InternalError
from graphwright.lower.conversions import possible


class NoAssignment(InternalError):
    """No choice of candidates serves the whole graph."""


@dataclass(frozen=True)
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


def solve(problem: Problem, *, allowed: Sequence[Collection[int]] | None = None, seconds: float = 5.0) -> list[int]:
    """The index of the chosen candidate per work.

    Args:
        allowed: per work, the indices to choose among; all by default.

    Raises:
        NoAssignment: no assignment exists (the native candidates always make one).
    """
    if all(len(o) == 1 for o in problem.options):
        return [0] * len(problem.works)
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
            upper.append(0.0 if allowed is not None and c not in allowed[k] else 1.0)
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
