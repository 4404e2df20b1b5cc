"""The choice over the whole graph in parts: as good as the integer program, and equal parts are solved once."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import pytest
from torch import fx

from graphwright.backends.base import NATIVE, NATIVE_LAST, Candidate, Q, Read
from graphwright.lower import parts, select
from graphwright.lower.conversions import possible
from graphwright.lower.parts import split, walk
from graphwright.lower.select import NoAssignment, Problem, solve

FORMS = (NATIVE, NATIVE_LAST, Q)


@dataclass(frozen=True, eq=False)
class Unit:
    """What the choice looks at of a work."""

    node: fx.Node
    reads: tuple[Read, ...]


def candidate(needs, gives) -> Candidate:
    return Candidate("made.up", tuple(needs), tuple(gives), "f32", lambda: None)


def drawn(seed: int, count: int, *, missing: float = 0.1) -> Problem:
    """A random problem: the first candidate of each work is native; some conversions can't be done."""
    rng, graph = random.Random(seed), fx.Graph()
    values = [graph.placeholder(f"x{k}") for k in range(2)]
    sources, works, options, times = frozenset(values), [], [], []
    for _ in range(count):
        reads = tuple(Read(v) for v in rng.sample(values[-5:], rng.choice((1, 1, 2))))
        node = graph.call_function(print, tuple(r.value for r in reads))
        several = [candidate([NATIVE] * len(reads), [NATIVE])]
        for _ in range(rng.choice((0, 0, 1, 2))):
            gives = rng.sample(FORMS, rng.choice((1, 1, 2)))
            several.append(candidate([rng.choice(FORMS) for _ in reads], gives))
        works.append(Unit(node, reads))
        options.append(several)
        times.append([rng.uniform(0, 3) for _ in several])
        values.append(node)
    convert = {
        (v, a, b): rng.uniform(0, 1.5) for v in values for a in FORMS for b in FORMS
        if possible(a, b) and (NATIVE in (a, b) or rng.random() > missing)
    }  # fmt: skip
    demands = [(v, NATIVE) for v in rng.sample(values[2:], 2)]
    return Problem(works, options, times, sources, demands, convert)


def total(problem: Problem, picks) -> float:
    """What an assignment costs, conversions included."""
    cost = sum(t[c] for t, c in zip(problem.times, picks, strict=True))
    given = {source: {NATIVE} for source in problem.sources}
    given |= {w.node: set(o[c].gives) for w, o, c in zip(problem.works, problem.options, picks, strict=True)}
    wanted = {(v, f) for v, f in problem.demands}
    for work, several, c in zip(problem.works, problem.options, picks, strict=True):
        wanted |= {(r.value, f) for r, f in zip(work.reads, several[c].needs, strict=True)}
    for value, form in wanted:
        if form not in given[value]:
            cost += min((problem.convert.get((value, g, form), math.inf) for g in given[value] if possible(g, form)), default=math.inf)
    return cost


@pytest.mark.parametrize("seed", range(40))
def test_the_parts_give_the_best_of_all_assignments(seed):
    problem = drawn(seed, 7)
    best = min(itertools.product(*(range(len(o)) for o in problem.options)), key=lambda picks: total(problem, picks))
    assert total(problem, solve(problem)) == pytest.approx(total(problem, best))


@pytest.mark.parametrize("seed", range(6))
def test_the_walk_and_the_integer_program_agree(seed, monkeypatch):
    problem = drawn(seed, 60)
    walked = solve(problem)
    asked = []
    program = select._integer_program
    monkeypatch.setattr(select, "_integer_program", lambda part, seconds: (asked.append(part), program(part, seconds))[1])
    monkeypatch.setattr(parts, "WIDEST", 0)
    by_program = solve(problem)
    assert asked
    assert total(problem, walked) <= total(problem, by_program) + 1e-9
    assert total(problem, by_program) <= 1.002 * total(problem, walked)  # it stops at a gap of one in a thousand


@pytest.mark.parametrize("widest", [0, parts.WIDEST])
def test_what_is_not_allowed_is_not_chosen(widest, monkeypatch):
    monkeypatch.setattr(parts, "WIDEST", widest)
    problem = drawn(3, 40)
    rng = random.Random(1)
    allowed = [{0, rng.randrange(len(o))} for o in problem.options]
    assert all(c in a for c, a in zip(solve(problem, allowed=allowed), allowed, strict=True))
    with pytest.raises(NoAssignment):
        solve(problem, allowed=[set(), *allowed[1:]])


def blocks(count: int) -> Problem:
    """Blocks of three works that may run channels last, each behind a work that is always native."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    works, options, times, sources = [], [], [], frozenset({value})
    both = [candidate([NATIVE], [NATIVE]), candidate([NATIVE_LAST], [NATIVE_LAST])]
    for _ in range(count):
        for k in range(4):
            node = graph.call_function(print, (value,))
            works.append(Unit(node, (Read(value),)))
            options.append(both if k else both[:1])
            times.append([2.0, 1.0][: len(options[-1])])
            value = node
    convert = {(w.node, a, b): 0.25 for w in works for a, b in itertools.permutations((NATIVE, NATIVE_LAST))}
    return Problem(works, options, times, sources, [(value, NATIVE)], convert)


def test_equal_parts_are_solved_once(monkeypatch):
    walked = []
    monkeypatch.setattr(select, "walk", lambda part: (walked.append(part), walk(part))[1])
    for count in (3, 30):
        walked.clear()
        assert solve(blocks(count)) == [0, 1, 1, 1] * count
        assert len(walked) == 1


def test_settled_values_separate_parts():
    problem = blocks(5)
    assert sorted(len(p.works) for p in split(problem)) == [1] * 5 + [3] * 5
    one_chain = Problem(problem.works, [problem.options[1]] * 20, [[2.0, 1.0]] * 20, problem.sources, problem.demands, problem.convert)
    assert [len(p.works) for p in split(one_chain)] == [20]
    only_native = split(one_chain, [{0}] * 20)
    assert [len(p.works) for p in only_native] == [1] * 20


def test_the_walk_s_states_do_not_grow_with_the_graph(monkeypatch):
    looked = []
    priced = parts._with
    monkeypatch.setattr(parts, "_with", lambda *a: (looked.append(a), priced(*a))[1])
    counts = []
    for length in (100, 200):
        problem = blocks(length)
        chain = Problem(problem.works, [problem.options[1]] * 4 * length, [[2.0, 1.0]] * 4 * length, problem.sources, problem.demands,
                        {**problem.convert, **{(next(iter(problem.sources)), a, b): 0.25 for a, b in itertools.permutations((NATIVE, NATIVE_LAST))}})  # fmt: skip
        looked.clear()
        assert solve(chain) == [1] * 4 * length
        counts.append(len(looked))
    assert counts[1] < 2.1 * counts[0]
