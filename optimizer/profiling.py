"""``Optimized.profile``: the clock is read round every step while the model is called as its user calls it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphwright.accelerator import random_devices
from graphwright.backends.base import by_integers
from graphwright.checkup import Call, shapes
from graphwright.cost import Cost, cost
from graphwright.errors import InputError
from graphwright.ir import Program, describe, sites_of
from graphwright.lower.runner import Runner, Step
from graphwright.measure import Timing
from graphwright.report.profile import Event, Part, Profile, Round, Span
from graphwright.search import Built
from graphwright.structure import flatten_call

if TYPE_CHECKING:
    from graphwright.optimized import Optimized, Variant


def profile(fast: Optimized, args: tuple[Any, ...], kwargs: dict[str, Any], *, rounds: int = 20, budget_s: float = 5.0) -> Profile:
    """See ``Optimized.profile``.

    Args:
        rounds: calls with the clock inside, each after one without; at least 3 are made.
        budget_s: no further round starts past this many seconds.
    """
    if rounds < 1:
        raise InputError(f"rounds={rounds}: at least one is wanted", where="profile()")
    if not args and not kwargs:
        args, kwargs = _given(fast)
    leaves, spec = flatten_call(args, kwargs)
    with torch.no_grad(), torch.random.fork_rng(devices=random_devices()):
        variant = fast._covering(leaves, spec)
        if variant is None:
            fast(*args, **kwargs)  # captured anew, or refused
            variant = fast._covering(leaves, spec)
        if variant is None:
            raise InputError("these inputs are captured for each call alone, since some share memory", where="profile()",
                             hint="Pass inputs that do not look at one another's memory.")  # fmt: skip
        with variant.preserved(leaves):
            return _profiled(fast, variant, Call(args, kwargs), rounds, budget_s)


def _given(fast: Optimized) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs that ``optimize`` saw, where they are still held."""
    variant = fast._first()
    example = variant.built.captured.example if variant.built is not None else None
    if not example:
        raise InputError("no inputs are given, and none are held", where="profile()", hint="Call it as you call the model: fast.profile(x).")
    args, kwargs = variant.spec.unflatten(list(example))
    return tuple(args), dict(kwargs)


def _profiled(fast: Optimized, variant: Variant, inputs: Call, rounds: int, budget_s: float) -> Profile:
    builds = variant.parts if variant.built is None else [variant.built]
    facts = _Facts(builds)
    names = {id(v.program): piece.site for piece in variant.capture.pieces for v in piece.variants}
    clock = _Clock(facts, {b.lowered.runner: names.get(id(b.captured), "") for b in builds})
    call = lambda: fast(*inputs.args, **inputs.kwargs)
    call()
    with _watched(builds, facts):  # what is read and written stays the same over the rounds
        call()
    done: list[Round] = []
    plain: list[float] = []
    start = time.perf_counter()
    while len(done) < rounds and (len(done) < 3 or time.perf_counter() - start < budget_s):
        begin = time.perf_counter()
        call()
        plain.append(time.perf_counter() - begin)
        with _watched(builds, clock):
            done.append(clock.round(call))
    notes = [f"not captured, runs as it was: {region}" for region in variant.capture.regions]
    if variant.built is not None and variant.built.unchanged:
        notes.append(f"the captured graph runs unchanged: {variant.built.unchanged}")
    name = fast._report.model if fast._report is not None else "model"
    return Profile(name, shapes(inputs), torch.get_num_threads(), tuple(facts.parts), tuple(_from_zero(done)), Timing.of(plain),
                   tuple(notes), bool(variant.capture.regions), tid=threading.get_native_id())  # fmt: skip


@contextmanager
def _watched(builds: Sequence[Built], watcher: Any) -> Iterator[None]:
    """This thread's calls of the builds' runners go through ``watcher.run(runner, leaves)``."""
    own = threading.get_ident()
    runners = [b.lowered.runner for b in builds]

    def instead(runner: Runner) -> Callable[..., Any]:
        def forward(*leaves: Tensor) -> Any:
            return watcher.run(runner, leaves) if threading.get_ident() == own else Runner.forward(runner, *leaves)

        return forward

    try:
        for runner in runners:
            runner.__dict__["forward"] = instead(runner)
        yield
    finally:
        for runner in runners:
            runner.__dict__.pop("forward", None)


class _Facts:
    """What every step is, from one run that looks at the values: ``parts``, and where each step's stands."""

    def __init__(self, builds: Sequence[Built]):
        self.builds = {b.lowered.runner: b for b in builds}
        self.parts: list[Part] = []
        self.places: dict[tuple[Runner, Step | None], int] = {}

    def place(self, runner: Runner, step: Step | None) -> int:
        """Of a step, or of writing buffers back; made up on the spot where no run has shown it yet."""
        key = runner, step
        if key not in self.places:
            self.places[key] = len(self.parts)
            self.parts.append(Part("buffers", (), "copy", "write back") if step is None else Part(step.site, (step.site,), "", step.name))
        return self.places[key]

    def run(self, runner: Runner, leaves: Sequence[Tensor]) -> Any:
        built = self.builds[runner]
        sizes = _sizes(built.running.settled(), leaves)

        def see(step: Step | None, begin: int, end: int, args: Sequence[Any], result: Any) -> None:
            if step is None:
                self.place(runner, None)
            elif (runner, step) not in self.places:
                self.places[runner, step] = len(self.parts)
                self.parts.append(_part(built, step, sizes, args, result))

        return runner.watched(leaves, see)


class _Clock:
    """Collects one round: programs and events, in nanoseconds."""

    def __init__(self, facts: _Facts, names: dict[Runner, str]):
        self.facts, self.names = facts, names
        self.programs: list[Span] = []
        self.events: list[tuple[Runner, Step | None, int, int]] = []

    def run(self, runner: Runner, leaves: Sequence[Tensor]) -> Any:
        events = self.events
        begin = time.perf_counter_ns()
        outs = runner.watched(leaves, lambda step, begin, end, args, result: events.append((runner, step, begin, end)))
        self.programs.append(Span(begin, time.perf_counter_ns(), self.names[runner]))
        return outs

    def round(self, call: Callable[[], Any]) -> Round:
        self.programs, self.events = [], []
        begin = time.perf_counter_ns()
        call()
        whole = Span(begin, time.perf_counter_ns())
        events = tuple(Event(self.facts.place(r, s), b, e) for r, s, b, e in self.events)
        return Round(whole, tuple(self.programs), events)


def _from_zero(rounds: Sequence[Round]) -> Iterator[Round]:
    zero = rounds[0].whole.begin
    for r in rounds:
        yield Round(Span(r.whole.begin - zero, r.whole.end - zero), tuple(Span(s.begin - zero, s.end - zero, s.name) for s in r.programs),
                    tuple(Event(e.part, e.begin - zero, e.end - zero) for e in r.events))  # fmt: skip


# -- what a step is -----------------------------------------------------------------------------------------------------


def _sizes(program: Program, leaves: Sequence[Tensor]) -> dict[str, int]:
    """Values of the symbols in the inputs' sizes."""
    found: dict[str, int] = {}
    for node, leaf in zip(program.placeholders, leaves, strict=True):
        for said, size in zip(node.meta["val"].shape, leaf.shape, strict=True):
            if isinstance(said, torch.SymInt) and said.node.expr.is_Symbol:
                found[str(said.node.expr)] = int(size)
    return found


def _part(built: Built, step: Step, sizes: dict[str, int], args: Sequence[Any], result: Any) -> Part:
    region = next((f.region for f in built.lowered.fused if f.name == step.name), None)
    works = region.works if region is not None else [step.work] if step.work is not None else []
    moved = _bytes(args) + _bytes(result)
    if not works:  # a conversion or a copy
        return Part(step.site, (step.site,), "convert", step.name, bytes=moved or None)
    sites = tuple(dict.fromkeys(s for w in works for s in sites_of(w.node) or (w.node.name,)))
    ops = ", ".join(dict.fromkeys(w.op for w in works))
    each = [cost(w.node, sizes) for w in works]
    flops = sum(c.flops for c in each)
    if region is not None:  # which of its numbers go through memory is the compiler's affair
        return Part(step.site, sites, ops, step.name, ", ".join(describe(n.meta["val"]) for n in region.writes), flops or None, moved or None)
    (work,) = works
    return Part(step.site, sites, ops, step.name, describe(work.out), flops or None, _held(step, each[0], args, result) or None)


def _held(step: Step, said: Cost, args: Sequence[Any], result: Any) -> int:
    """The cost model's bytes, which count the graph's dtypes, in the dtypes that the step really reads and writes."""
    work = step.work
    assert work is not None
    weights = 1.0
    if work.weights and by_integers(step.name):
        held = [w for w in work.weights.values()]
        floats = sum(w.values.numel() * 4 * 8 // w.bits for w in held)
        weights = sum(w.values.numel() * w.values.element_size() for w in held) / floats if floats else 1.0
    reads = _ratio([(a, r.value.meta.get("val")) for a, r in zip(args, work.reads, strict=False)])
    results = result if isinstance(result, (tuple, list)) else (result,)
    several = isinstance(work.out, (tuple, list))
    writes = _ratio(list(zip(results, work.out, strict=False)) if several else [(results[0], work.out)])
    return round(said.parameters * weights + (said.read - said.parameters) * reads + said.written * writes)


def _ratio(pairs: Sequence[tuple[Any, Any]]) -> float:
    """Bytes as they are by bytes as the graph has them."""
    tensors = [(a.numel(), a.element_size(), v.dtype.itemsize) for a, v in pairs if isinstance(a, Tensor) and isinstance(v, Tensor)]
    said = sum(n * per for n, _, per in tensors)
    return sum(n * per for n, per, _ in tensors) / said if said else 1.0


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 0
