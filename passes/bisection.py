"""Find the first pass that breaks a program, and the first site at which it does."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from graphwright.capture.rehearse import where
from graphwright.cut import counterparts, values_of
from graphwright.errors import GraphwrightError, InputError, InternalError
from graphwright.ir import Program, site_of
from graphwright.manager import Pass, PassResult, fingerprint
from graphwright.numerics import Exact, Lossy, run_double
from graphwright.oracle import Oracle

T = TypeVar("T")

#: Takes a program; gives None where it is well, or what is wrong with it.
Check = Callable[[Program], str | None]
#: Runs of a pass that looking for a smallest set of sites may take.
_PROBES = 80


@dataclass(frozen=True, eq=False)
class Culprit:
    """The first step after which a program is broken: a pass, or the choice of kernels.

    Attributes:
        index, name: which pass of the recipe; of a kernel, the number of passes and the kernel's name.
        problem: what is wrong afterwards.
        before, after: the program on both sides of the pass.
        result: what the pass says it did.
        numerics: what the pass promises of its numbers.
        site: the first site whose change breaks the program.
        sites: the sites that break it together; one, where it does so alone.
        how: how surely that is known, and what stands in the way where it is not.
        narrowed: the program after the pass was let loose on ``sites`` alone; None where it can't be.
        stage: ``"pass"`` or ``"kernel"``.
        kind: of the problem, see ``Attempt``.
        repro: the smallest program that shows it: ``.replay()``, ``.save(path)``; None where none could be cut out.
    """

    index: int
    name: str
    problem: str
    before: Program
    after: Program
    result: PassResult
    numerics: Exact | Lossy = field(default_factory=Exact)
    site: str | None = None
    sites: tuple[str, ...] = ()
    how: str = ""
    narrowed: Program | None = None
    stage: str = "pass"
    kind: str = "numbers"
    repro: Any = None

    def save(self, path: Any) -> None:
        """Write the small program that shows the fault to a file; see ``gw.load_repro``.

        Raises:
            InputError: there is none.
            SaveError: it holds what no file may, or the file cannot be written.
        """
        if self.repro is None:
            raise InputError("no small program that shows the fault could be cut out", where=f"{self.stage} {self.name}", hint=self.how)
        self.repro.save(path)

    def __str__(self) -> str:
        lines = [f"pass {self.index} ({self.name}): {self.problem}" if self.stage == "pass" else f"kernel {self.name}: {self.problem}"]
        if self.site is not None:
            lines.append(f"  first site: {self.site}" + (f" (with {', '.join(s for s in self.sites if s != self.site)})" if len(self.sites) > 1 else ""))
        if self.how:
            lines.append(f"  {self.how}")
        mine = [c for c in self.result.changes if c[0] in self.sites] or self.result.changes[:5]
        if mine:
            lines.append("  it did: " + "; ".join(f"{site}: {what}" for site, what in mine[:5]))
        if self.repro is not None:
            lines.append(f"  {self.repro.summary()}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Attempt:
    """One run of a pass on a copy of a program.

    Attributes:
        kind: of the problem: ``"raised"``, ``"invariant"``, ``"report"`` (it says it did something else than it did),
            ``"numbers"``; empty where all is well.
    """

    program: Program
    result: PassResult
    kind: str = ""
    problem: str | None = None


def attempt(p: Pass, before: Program) -> Attempt:
    """Run a pass on a copy of ``before`` and look at the structure of what it leaves.

    Raises:
        GraphwrightError: the pass lacks data or options; no fault of its own.
    """
    after = before.copy()
    mark, result = fingerprint(after), PassResult()
    try:
        result = p.run(after)
    except InternalError as error:
        return Attempt(after, PassResult(), "raised", f"it raised InternalError: {error.what}")
    except GraphwrightError:
        raise
    except Exception as error:  # noqa: BLE001  whatever the pass does is the finding
        place = where(error)
        return Attempt(after, PassResult(), "raised", f"it raised {type(error).__name__}: {error}" + (f" ({place})" if place else ""))
    if not isinstance(result, PassResult):
        return Attempt(after, PassResult(), "report", f"run() returned {type(result).__name__}, not a PassResult")
    try:
        changed = fingerprint(after) != mark
    except Exception:  # noqa: BLE001  it does not even print
        changed = True
    if changed:
        try:
            after.verify()
            after.recompile()
        except InternalError as error:
            return Attempt(after, result, "invariant", error.what)
    if result.modified != changed:
        said = "it says that it changed the program, and it did not" if result.modified else "it changed the program and does not say so"
        return Attempt(after, result, "report", said)
    return Attempt(after, result)


class _Judge:
    """Holds programs to the user's check or, without one, to what the passes promise of the outputs."""

    def __init__(self, program: Program, check: Check | None):
        self.check = check
        if check is None and program.example is None:
            raise InputError("there is nothing to compare outputs on", where="bisect",
                             hint="Pass a check, or capture with example inputs.")  # fmt: skip
        if check is not None and (problem := check(program)):
            raise InputError(f"the check fails before any pass: {problem}", where="bisect")
        self.oracle = Oracle(program) if check is None else None

    def problem(self, p: Pass, tried: Attempt, before: Program) -> str | None:
        """What is wrong with the program that ``p`` made of ``before``."""
        if self.oracle is None:
            assert self.check is not None
            return self.check(tried.program)
        return self.oracle.compare(tried.program, p.numerics, before)[1]

    def accept(self, p: Pass, tried: Attempt, before: Program) -> None:
        """Hold later passes to the program as it is now, where ``p`` was allowed to change numbers."""
        if self.oracle is not None and isinstance(p.numerics, Lossy) and tried.result.modified:
            self.oracle.rebase(self.oracle.compare(tried.program, p.numerics, before)[2])


def first_bad(program: Program, passes: Sequence[Pass], check: Check | None = None) -> tuple[Culprit | None, Program]:
    """The first pass after which ``check`` finds fault, narrowed down to its first site; and the program after the last pass run.

    Without a check, each pass is held to what it promises of the outputs on ``program.example``, as the manager does. A check
    of one's own runs about log2(number of passes) times, on the assumption that what is broken stays broken.

    Raises:
        InputError: the program is broken before any pass, or there is neither check nor example.
    """
    judge, states, tries = _Judge(program, check), [program], []
    for k, p in enumerate(passes):
        tried = attempt(p, states[-1])
        if not tried.kind and check is None and tried.result.modified and (problem := judge.problem(p, tried, states[-1])):
            tried = replace(tried, kind="numbers", problem=problem)
        if tried.kind:
            if check is not None and (found := _halved(judge, passes[:k], states, tries)) is not None:
                return found, states[-1]
            return _narrowed(k, p, states[-1], tried, judge), states[-1]
        judge.accept(p, tried, states[-1])
        states.append(tried.program)
        tries.append(tried)
    return (_halved(judge, passes, states, tries) if check is not None else None), states[-1]


def _halved(judge: _Judge, passes: Sequence[Pass], states: Sequence[Program], tries: Sequence[Attempt]) -> Culprit | None:
    """Among states that a check of the user's own has not seen yet, the first that it finds fault with."""
    assert judge.check is not None
    problems = {len(states) - 1: judge.check(states[-1])}
    if problems[len(states) - 1] is None:
        return None
    good, bad = 0, len(states) - 1
    while bad - good > 1:
        middle = (good + bad) // 2
        problems[middle] = judge.check(states[middle])
        good, bad = (middle, bad) if problems[middle] is None else (good, middle)
    tried = replace(tries[bad - 1], kind="numbers", problem=str(problems[bad]))
    return _narrowed(bad - 1, passes[bad - 1], states[bad - 1], tried, judge)


# -- sites -----------------------------------------------------------------------------------------------------------


def only(p: Pass, sites: Sequence[str]) -> Pass:
    """The pass, let loose on these sites alone."""
    return replace(p, include=tuple(glob.escape(s) for s in sites))


def _narrowed(index: int, p: Pass, before: Program, tried: Attempt, judge: _Judge) -> Culprit:
    """The culprit, with the first site whose change breaks the program."""
    found = Culprit(index, p.name, str(tried.problem), before, tried.program, tried.result, p.numerics, kind=tried.kind)

    def probe(sites: Sequence[str]) -> Attempt:
        now = attempt(only(p, sites), before)
        if not now.kind and tried.kind == "numbers" and now.result.modified and (problem := judge.problem(p, now, before)):
            now = replace(now, kind="numbers", problem=problem)
        return now

    bad = lambda sites: probe(sites).kind == tried.kind
    try:
        nowhere = probe(["\0 no site"])
        deaf = "it does not heed include / exclude" if nowhere.kind or nowhere.result.modified else ""
    except TypeError as error:
        deaf = f"it takes no include / exclude ({error})"
    order = [s for s in before.sites() if p.selects((s,))]
    named = {s for s, _ in tried.result.changes}
    universe = [s for s in order if s in named]
    if not deaf and not (universe and bad(universe)):
        universe = order
        deaf = "" if order and bad(order) else "let loose on every site by name it does something else than on the whole"
    if deaf:
        return replace(found, **_by_value(found, tried, deaf))
    sites = smallest(universe, bad)
    alone = "let loose there alone, it breaks the program" if len(sites) == 1 else f"let loose at these {len(sites)} sites it breaks the program; the first of them takes the others"
    return replace(found, site=sites[-1], sites=tuple(sites), how=alone, narrowed=probe(sites).program)


def smallest(universe: Sequence[T], bad: Callable[[Sequence[T]], bool]) -> list[T]:
    """A set that is bad and from which nothing can be left out, with the first element of ``universe`` that makes its beginning
    bad as its last; ``universe`` as a whole is bad.

    About log2 tests where one element is bad alone; delta debugging (Zeller, "Yesterday, my program worked", 1999) otherwise,
    within a limit of tests.
    """
    low, high = 0, len(universe)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if bad(universe[:middle]) else (middle, high)
    first, others = universe[high - 1], list(universe[: high - 1])
    if not others or bad([first]):
        return [first]
    left, size = _PROBES, max(1, len(others) // 2)
    while left > 0:
        k = 0
        while k < len(others) and left > 0:
            fewer = others[:k] + others[k + size :]
            left -= 1
            if bad([*fewer, first]):
                others = fewer
            else:
                k += size
        if size == 1:
            break
        size = max(1, size // 2)
    return [*others, first]


def _by_value(found: Culprit, tried: Attempt, reason: str) -> dict[str, Any]:
    """Where changes can't be separated: the first value that differs."""
    how = f"its changes can't be told apart: {reason}"
    if tried.kind != "numbers" or found.before.example is None:
        sites = tuple(dict.fromkeys(s for s, _ in found.result.changes))
        return {"how": how, "site": sites[0] if len(sites) == 1 else None, "sites": sites if len(sites) == 1 else ()}
    pair = first_difference(found.before, found.after, found.numerics)
    if pair is None:
        return {"how": f"{how}; only the outputs differ"}
    site = site_of(pair[0])
    return {"how": f"{how}; the first value that differs is that of {site}", "site": site, "sites": (site,)}


def first_difference(before: Program, after: Program, numerics: Exact | Lossy) -> tuple[Any, Any] | None:
    """The first nodes (of ``before``, of ``after``) that stand for one value and give values further apart than ``numerics`` allows."""
    place = counterparts(before, after)[1]
    leaves = before.example or ()
    was, now = values_of(before, leaves, place.values()), values_of(after, leaves, place.keys())
    reference = wide_values(before, leaves, list(place.values()))
    for new, old in place.items():
        if isinstance(was[old], Tensor) and numerics.failure(reference.get(old, was[old]), was[old], now[new]):
            return old, new
    return None


def wide_values(program: Program, leaves: Sequence[Tensor], wanted: Sequence[Any]) -> dict[Any, Any]:
    """Values of nodes in float64; empty where an op has no float64 kernel."""
    twin = program.copy()
    names = {n.name: n for n in twin.graph.nodes}
    twin.output.args = (tuple(names[n.name] for n in wanted),)
    try:
        return dict(zip(wanted, run_double(twin, leaves), strict=True))
    except RuntimeError:
        return {}
