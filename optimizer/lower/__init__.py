"""Lowering: candidates per work, timed on this machine, chosen over the whole graph, put together as a ``Runner``.

    lowered = lower(program, allowed={"f32", "int8"})
    lowered.runner(*leaves)
    lowered.plan            # {node name: candidate name}: what a saved file keeps; lower(program, plan=...) times nothing
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphwright import accelerator, backends
from graphwright.backends.base import Candidate, Work
from graphwright.errors import InternalError
from graphwright.ir import Program
from graphwright.lower import halves
from graphwright.lower.graph import Analysis, analyse
from graphwright.lower.runner import Fused, Runner, emit
from graphwright.lower.select import NoAssignment, Price, Problem, pose, solve
from graphwright.lower.stopwatch import Stopwatch
from graphwright.measure import Timing, interleaved
from graphwright.memory import release

#: By what the times of a backend that is asked for by name are multiplied, so that it wins wherever it serves.
_TAKEN = 1e-6


@dataclass(frozen=True)
class Option:
    """One candidate of one work, as the report shows it.

    Attributes:
        ms: measured time; None where there was nothing to choose.
        problem: why it could not be used.
    """

    name: str
    ms: float | None
    problem: str | None = None


@dataclass
class Choice:
    """What was chosen for one work, among what.

    Attributes:
        fused: it runs as a part of the region ``name``.
    """

    work: Work
    name: str
    precision: str
    options: tuple[Option, ...]
    fused: bool = False


@dataclass(eq=False)
class Lowered:
    """A program made runnable.

    Attributes:
        plan: candidate by node name.
        choices: per work, with the alternatives and their times.
        analysis, chosen: what the runner was put together from: per work, the candidate and its implementation.
        variants: whole assignments that were timed: label and timing; the first is the one taken.
        notes: what could not be used on this machine, and anything else worth a line.
        regions: chains that run as one, as plain data for a saved file: see ``graphwright.lower.regions``.
        fused: the same regions as they run.
        sequence: the order of the steps where it is not the program's: see ``graphwright.lower.arrange``.
    """

    runner: Runner
    plan: dict[str, str]
    choices: list[Choice]
    analysis: Analysis
    chosen: list[tuple[Candidate, Callable[..., Any]]]
    variants: list[tuple[str, Timing]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    regions: list[dict[str, Any]] = field(default_factory=list)
    fused: list[Fused] = field(default_factory=list)
    sequence: list[int] = field(default_factory=list)


    def serving(self) -> dict[str, str]:
        """Nodes that one step serves, by name, several or more for each: the name of the node that the step is called by."""
        own = {s.work.node for s in self.runner.steps if s.work is not None}
        leader: dict[fx.Node, fx.Node] = {w.node: f.region.head.node for f in self.fused for w in f.region.works}
        for work in self.analysis.works:
            if work.node not in own and work.node not in leader and len(work.node.users) == 1:  # a view that its reader looks through
                leader[work.node] = next(iter(work.node.users))
        leader.update(self.analysis.absorbed)

        def root(node: fx.Node) -> fx.Node:
            while leader.get(node, node) is not node:
                node = leader[node]
            return node

        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in (*self.analysis.program.placeholders, *self.analysis.program.nodes):
            groups.setdefault(root(node), []).append(node)
        return {n.name: first.name for first, nodes in groups.items() if len(nodes) > 1 for n in nodes}


def lower(program: Program, *, allowed: Collection[str] = ("f32",), plan: Mapping[str, str] | None = None,
          example: Sequence[Tensor] | None = None, progress: Callable[[str], None] | None = None, backend: str | None = None) -> Lowered:  # fmt: skip
    """Choose and put together the kernels of a program.

    Args:
        allowed: precisions that may be chosen: ``"f32"``, ``"bf16"``, ``"fp16"``, ``"int8"``.
        plan: take these candidates and time nothing; what can't be built here runs natively, with a note.
        example: flat inputs on which whole assignments are timed; ``program.example`` by default.
        backend: take its kernels wherever they serve, even where others are faster.
    """
    allowed = frozenset(allowed) | {"f32"}
    analysis = analyse(program)
    release()
    device = accelerator.device_of(program)
    every = [list(backends.candidates(w, allowed)) for w in analysis.works]
    barred = [{c.name: why for c in several if (why := backends.withheld(w, c)) is not None} for w, several in zip(analysis.works, every, strict=True)]
    # a plan has been chosen already
    options = every if plan is not None else [[c for c in several if c.name not in out] for several, out in zip(every, barred, strict=True)]
    cuda = accelerator.of(device)
    notes = [f"{name}: {why}" for name, why in backends.reasons(device.type).items()]
    if plan is not None:
        return _from_plan(analysis, options, plan, notes)
    say = progress or (lambda text: None)
    watch = Stopwatch(program.size_bytes(), cuda)
    times: list[list[float]] = []
    kept: list[list[Candidate]] = []
    shown: list[tuple[Option, ...]] = []
    for k, (work, several) in enumerate(zip(analysis.works, options, strict=True)):
        say(f"timing kernels {k + 1}/{len(options)}: {work.site}")
        found = watch.work(work, several)
        usable = [(c, t) for c, t in zip(several, found, strict=True) if isinstance(t, float)]
        native = next(c for c in several if c.name == "aten.native")
        usable = usable or [(native, 0.0)]  # its own error will say more than ours when it runs
        kept.append([c for c, _ in usable])
        times.append([t for _, t in usable])
        shown.append((*(_option(c, t, len(several)) for c, t in zip(several, found, strict=True)),
                      *(Option(name, None, why) for name, why in barred[len(shown)].items())))  # fmt: skip
    price: Price = watch.convert
    if backend is not None:
        price = lambda *asked: watch.convert(*asked) * _TAKEN  # what its kernels read has to be made
        times = [[t * _TAKEN if c.backend == backend else t for c, t in zip(*pair, strict=True)] for pair in zip(kept, times, strict=True)]
    problem = pose(analysis, kept, times, price)
    watch.flush()
    release()
    say("choosing kernels")
    assignments = _assignments(problem) if backend is None else {f"kernels of {backend}": solve(problem)}
    example = tuple(example if example is not None else program.example or ())
    built: dict[str, tuple[list[int], list[tuple[Candidate, Callable[..., Any]]], Runner]] = {}
    cache: dict[tuple[int, int], Callable[..., Any]] = {}
    for label, picks in assignments.items():
        if any(picks == other for other, *_ in built.values()):
            continue
        chosen = [(kept[k][c], _build(cache, k, c, kept)) for k, c in enumerate(picks)]
        built[label] = picks, chosen, emit(analysis, chosen)
    variants: list[tuple[str, Timing]] = []
    best = next(iter(built))
    if len(built) > 1 and example:
        say(f"timing {len(built)} whole assignments")
        with program.preserved(example):
            for label, why in _failing({label: runner for label, (*_, runner) in built.items()}, example):
                notes.append(f"whole assignment {label!r} does not run: {why}")
                del built[label]
            runs = [(lambda r=r: r(*example)) for *_, r in built.values()]
            timings = interleaved(runs, rounds=10, budget_s=1.5, settled=4)
        variants = sorted(zip(built, timings, strict=True), key=lambda v: v[1].minimum)
        best = variants[0][0]
    picks, chosen, runner = built[best]
    chosen = _settled(analysis, chosen)
    choices = [Choice(w, kept[k][c].name, kept[k][c].precision, shown[k]) for k, (w, c) in enumerate(zip(analysis.works, picks, strict=True))]
    notes += halves.note(choices, runner, allowed)
    return Lowered(runner, {c.work.node.name: c.name for c in choices}, choices, analysis, chosen, variants, notes)


def _settled(analysis: Analysis, chosen: Sequence[tuple[Candidate, Callable[..., Any]]]) -> list[tuple[Candidate, Callable[..., Any]]]:
    """The choice once everything is built: what only building needed, float copies of integer weights above all, is let go."""
    analysis.let_go()
    return [(replace(c, build=_built_already), call) for c, call in chosen]


def _built_already() -> Callable[..., Any]:
    raise InternalError("a candidate is built while its program is lowered, and not again")


def _failing(runners: Mapping[str, Runner], example: Sequence[Tensor]) -> list[tuple[str, str]]:
    """Assignments that can't run, and why; none where no other would be left, whose error then says more."""
    found = []
    for label, runner in runners.items():
        try:
            runner(*example)
        except Exception as error:  # kernels that each serve their op may still not go together  # noqa: BLE001
            found.append((label, f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"))
    return found if len(found) < len(runners) else []


def _option(candidate: Candidate, found: float | str, count: int) -> Option:
    if isinstance(found, str):
        return Option(candidate.name, None, found)
    return Option(candidate.name, found if candidate.timed and count > 1 else None)


def _build(cache: dict[tuple[int, int], Callable[..., Any]], work: int, index: int, kept: Sequence[Sequence[Candidate]]) -> Callable[..., Any]:
    """Build each chosen implementation once, however many assignments use it."""
    if (work, index) not in cache:
        with torch.no_grad():
            cache[work, index] = kept[work][index].build()
    return cache[work, index]


def _assignments(problem: Problem) -> dict[str, list[int]]:
    """The best few assignments: the optimum, and the optima among restricted families that isolated timings may misjudge.

    A family whose own times already add up to a quarter more than the optimum's is not worth building.
    """
    found = {"optimum": solve(problem)}
    limit = 1.25 * _work_time(problem, found["optimum"])
    families = {
        "plain layout": lambda c: all(f.layout == "plain" for f in (*c.needs, *c.gives)),
        "channels last": lambda c: "-last" in c.name or c.name.startswith(("onednn.int8", "llvm.max-pool", "llvm.mean-pool")),
        "matrix ops in int8": lambda c: c.name.startswith("onednn.int8"),
        "float kernels": lambda c: c.precision == "f32",
    }
    for label, member in families.items():
        allowed = []
        for options in problem.options:
            inside = {k for k, c in enumerate(options) if member(c)}
            allowed.append(inside or set(range(len(options))))
        if any(len(a) < len(o) for a, o in zip(allowed, problem.options, strict=True)):
            with contextlib.suppress(NoAssignment):  # a family need not be able to serve the whole graph
                picks = solve(problem, allowed=allowed)
                if _work_time(problem, picks) <= limit:
                    found[label] = picks
    return found


def _work_time(problem: Problem, picks: Sequence[int]) -> float:
    """Milliseconds of the works alone, conversions left out."""
    return sum(times[c] for times, c in zip(problem.times, picks, strict=True))


def _from_plan(analysis: Analysis, options: list[list[Candidate]], plan: Mapping[str, str], notes: list[str]) -> Lowered:
    chosen: list[tuple[Candidate, Callable[..., Any]]] = []
    for work, several in zip(analysis.works, options, strict=True):
        name = plan.get(work.node.name, "aten.native")
        candidate = next((c for c in several if c.name == name), None)
        native = next(c for c in several if c.name == "aten.native")
        with torch.no_grad():
            try:
                if candidate is None:
                    notes.append(f"{work.site}: kernel {name} does not exist on this machine; the op runs as it is")
                chosen.append((candidate or native, (candidate or native).build()))
            except Exception as error:  # the file may come from another machine: slower is better than not at all  # noqa: BLE001
                notes.append(f"{work.site}: kernel {name} can't be built here ({error}); the op runs as it is")
                chosen.append((native, native.build()))
    choices = [Choice(w, c.name, c.precision, ()) for w, (c, _) in zip(analysis.works, chosen, strict=True)]
    chosen = _settled(analysis, chosen)
    return Lowered(emit(analysis, chosen), {c.work.node.name: c.name for c in choices}, choices, analysis, chosen, notes=notes)
