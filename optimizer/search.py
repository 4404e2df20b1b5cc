"""From a captured program to the build that meets the goal: passes, lowering, measuring, and retreat where accuracy is lost."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from graphwright.accelerator import device_of
from graphwright.errors import InputError
from graphwright.ir import Program, op_name, site_of
from graphwright.lower import Lowered, economy, lower, regions
from graphwright.manager import Pass, PassRecord, Pipeline

Say = Callable[[str], None]


@dataclass(frozen=True)
class Goal:
    """What a result must meet.

    Args:
        max_drop: how much ``evaluate`` may lose, in its own unit (0.01: one point where accuracy is in [0, 1]).
        latency_ms, speedup: at most this long, at least this much faster than the original, on the example inputs.
        size_mb: tensors at most this large. When it is given, a result that is smaller is kept even if it is not faster.
        memory_mb: peak memory of one run at most this: tensors beyond the resident weights, in MiB, as measured. Where it is more,
            steps are put into another order, and cheap ones run again where holding their results takes too much.
        time_budget: seconds for optimizing; a search gives its best so far when they are over. What is left of them after
            kernels were chosen goes into compiling chains of ops by Inductor, where a C++ compiler is at hand; without a
            budget nothing is compiled by it.

    Raises:
        InputError: a number is negative or not finite.
    """

    max_drop: float | None = None
    latency_ms: float | None = None
    speedup: float | None = None
    size_mb: float | None = None
    memory_mb: float | None = None
    time_budget: float | None = None

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value < float("inf")):
                raise InputError(f"Goal({f.name}={value!r}): a finite number, 0 or more, is wanted")

    @property
    def about_size(self) -> bool:
        return self.size_mb is not None or self.memory_mb is not None


@dataclass(eq=False)
class Built:
    """One program, optimized and runnable.

    Attributes:
        captured: as it came from capture.
        program: after the passes.
        unchanged: why the captured graph runs as it was; None where the optimized one runs.
    """

    captured: Program
    program: Program
    records: list[PassRecord]
    lowered: Lowered
    seconds: dict[str, float] = field(default_factory=dict)
    unchanged: str | None = None

    @property
    def running(self) -> Program:
        """The program that the runner computes."""
        return self.captured if self.unchanged else self.program


def build(captured: Program, passes: Sequence[Pass], allowed: frozenset[str], say: Say,
          between: Callable[[Program], None] = lambda program: None, backend: str | None = None) -> Built:  # fmt: skip
    """Run the passes and lower the result. ``captured.example`` and ``.calibration`` feed both.

    Args:
        between: told of the program after the passes, before its weights are packed.
        backend: see ``lower``.
    """
    start = time.perf_counter()
    program, records = Pipeline(tuple(passes)).run(captured, progress=say)
    between(program)
    middle = time.perf_counter()
    if device_of(program).type == "cpu":
        _compiled(program, "int8" in allowed)
    lowered = lower(program, allowed=allowed, example=captured.example, progress=say, backend=backend)
    if captured.example is not None and backend is None:
        lowered = regions.generated(lowered, captured.example, say)
    return Built(captured, program, records, lowered, {"passes": middle - start, "lowering": time.perf_counter() - middle})


def _compiled(program: Program, quantizing: bool) -> None:
    """Have the kernels that the program may ask for before any is timed: nothing else may run then."""
    from graphwright.kernels import ahead

    activations = {a for n in program.nodes for a in n.args if isinstance(a, str)}
    ahead.finish(activations.union(op_name(n.target) for n in program.nodes), quantizing)


def with_regions(built: Built, deadline: float, say: Say) -> Built:
    """The build with the chains of ops that Inductor makes faster, as far as they can be compiled before ``deadline``."""
    start = time.perf_counter()
    lowered = regions.compiled(built.lowered, built.captured.example or (), deadline, say)
    return dataclasses.replace(built, lowered=lowered, seconds={**built.seconds, "regions": time.perf_counter() - start})


def economized(built: Built, limit_mb: float, say: Say) -> Built:
    """The build with a lower peak of memory, where its own is above the limit and one is found."""
    start = time.perf_counter()
    lowered = economy.economize(built.lowered, built.captured.example or (), limit_mb, say)
    return dataclasses.replace(built, lowered=lowered, seconds={**built.seconds, "memory": time.perf_counter() - start})


def revert(built: Built, why: str) -> Built:
    """The captured graph, unchanged, op by op; what was noted on the way stays."""
    plain = lower(built.captured, plan={})
    kept = [n for n in built.lowered.notes if not n.startswith(economy.NOTE)]  # its peak is another
    plain.notes[:] = dict.fromkeys([*kept, *plain.notes])
    raced = {(c.work.site, op): c.options for c in built.lowered.choices for op in (c.work.op, None)}
    for choice in plain.choices:  # what was tried and refused there, perhaps for what the op had become, is still worth telling
        others = tuple(o for o in raced.get((choice.work.site, None), ()) if o.name != choice.name)
        choice.options = raced.get((choice.work.site, choice.work.op), others)
    return Built(built.captured, built.program, built.records, plain, built.seconds, why)


def lossy_passes(passes: Sequence[Pass]) -> list[int]:
    """Positions of the passes that change numbers."""
    from graphwright.numerics import Lossy

    return [k for k, p in enumerate(passes) if isinstance(p.numerics, Lossy)]


def within_budget(built: Built, passes: Sequence[Pass], attempt: Callable[[Sequence[Pass]], Built], drop: Callable[[Built], float],
                  max_drop: float, deadline: float, say: Say) -> tuple[Built, list[str]]:  # fmt: skip
    """Leave out the sites that err most until the accuracy budget is met.

    The worst 1/16, 1/8, 1/4, 1/2 of the quantized sites are excluded in turn, then all of them; the first build within the
    budget is taken. No trial is lost: each stands in the log.

    Args:
        attempt: builds the same program with other passes.
        drop: by how much a build's score falls short of the original's.
        deadline: ``time.perf_counter()`` value past which no further trial starts; the exact build is then the answer.

    Returns:
        The build and a line per trial.
    """
    lost = drop(built)
    log = [f"all sites: score drops by {lost:.4g}, budget {max_drop:.4g}"]
    if lost <= max_drop:
        return built, log
    spots = lossy_passes(passes)
    errors = {n: n.meta["sqnr_db"] for n in built.program.nodes if "sqnr_db" in n.meta}
    errors |= {c.work.node: db for c in built.lowered.choices if (db := c.work.node.meta.get("halves", {}).get(c.precision)) is not None}
    ranked = sorted((db, site_of(n)) for n, db in errors.items())
    for count in dict.fromkeys(-(-len(ranked) // share) for share in (16, 8, 4, 2)):
        worst = [site for _, site in ranked[:count]]
        if not worst or time.perf_counter() > deadline:
            break
        escaped = tuple(s.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]") for s in worst)
        trial = [dataclasses.replace(p, exclude=(*p.exclude, *escaped)) if k in spots else p for k, p in enumerate(passes)]
        say(f"leaving {len(worst)} of {len(ranked)} quantized sites in float")
        candidate = attempt(trial)
        lost = drop(candidate)
        log.append(f"{len(worst)} of {len(ranked)} sites in float ({', '.join(worst[:3])}{', …' if len(worst) > 3 else ''}): score drops by {lost:.4g}")
        if lost <= max_drop:
            return candidate, log
    say("falling back to the exact passes")
    exact = [p for k, p in enumerate(passes) if k not in spots]
    candidate = attempt(exact)
    log.append(f"no lossy pass: score drops by {drop(candidate):.4g}")
    return candidate, log
