"""From a finished build to its report: both sides timed, compared and scored; the captured graph runs where nothing was gained."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphwright import accelerator, search
from graphwright.accelerator import Cuda
from graphwright.backends.base import HALF, by_integers
from graphwright.capture.rehearse import clone_sharing, untouched
from graphwright.cost import cost
from graphwright.errors import InputError
from graphwright.ir import describe
from graphwright.lower import Choice, arena
from graphwright.manager import PassRecord, PassResult
from graphwright.measure import interleaved, machine
from graphwright.memory import fault_us, faults, peak_on, process_peak_mb
from graphwright.numerics import sqnr_db
from graphwright.ops import CAST, QUANT
from graphwright.optimized import Optimized, Variant
from graphwright.report import Accuracy, Option, Picture, Region, Report, SiteRow
from graphwright.report.model import AS_IT_WAS, SIMULATED
from graphwright.search import Built
from graphwright.structure import Spec, flatten

if TYPE_CHECKING:
    from graphwright.api import Job

def make_report(job: Job, model: nn.Module, variant: Variant, leaves: Sequence[Tensor], start: float) -> Report:
    """Measure, decide whether the result stands, and write down what was done.

    Both sides get copies of the inputs, and the result is called as the user will call it: through ``Optimized``.
    """
    leaves = clone_sharing(leaves)
    call = _caller(variant.spec, leaves)
    door: Callable[..., Any] = Optimized(None, None)
    door._add(variant, None)
    if variant.covers(leaves, variant.spec) is not None:  # inputs that share memory, one of them written: captured for this call alone
        door = lambda *args, **kwargs: variant.run(leaves)
    cuda = accelerator.of(_device(variant, leaves))
    report = Report(type(model).__name__, job.recipe_name, "", machine={**machine(), **(cuda.facts if cuda else {})}, threads=torch.get_num_threads(),
                    versions=_versions(), notes=list(variant.capture.notes))  # fmt: skip
    report.regions = [Region(r.where or r.site or "the model itself", f"{r.site}: {r.reason}" if r.site and r.where else r.reason)
                      for r in variant.capture.regions]  # fmt: skip
    job.say("timing original and result side by side")
    original, result = _quiet(lambda: call(model)), _quiet(lambda: call(door))
    with untouched(model):
        with variant.preserved(leaves):
            wanted = _answer(original, job.seed)
        with variant.preserved(leaves):
            got = _answer(result, job.seed)
        with variant.preserved(leaves):
            report.original, report.optimized = interleaved([original, result], rounds=25, budget_s=2.0, settled=7)
            if report.optimized.minimum >= report.original.minimum:  # a loss is not believed on one race: others may have used the machine
                report.original, report.optimized = interleaved([original, result], rounds=25, budget_s=2.0)
        if _declined(job, variant, report):
            job.economize(variant)
            with variant.preserved(leaves):
                got = _answer(result, job.seed)
            with variant.preserved(leaves):
                report.original, report.optimized = interleaved([original, result], rounds=20, budget_s=2.0)
        _peaks(report, variant, leaves, original, result, cuda)
    _errors(report, wanted, got, exact=not search.lossy_passes(job.passes))
    with variant.preserved(leaves):
        _fill(report, variant, leaves)
    scores = job.scores(model, variant)
    if scores is not None:
        report.accuracy = Accuracy(*scores, budget=job.goal.max_drop)
    _goals(job, report)
    report.process_peak_mb = process_peak_mb()
    report.seconds["total"] = time.perf_counter() - start
    return report


def _peaks(report: Report, variant: Variant, leaves: Sequence[Tensor], original: Callable[[], Any], result: Callable[[], Any],
           cuda: Cuda | None) -> None:  # fmt: skip
    """Tensor memory of one run of each side beyond the weights, as the allocator sees it."""
    with variant.preserved(leaves):
        before = peak_on(cuda, original)
    with variant.preserved(leaves):
        after = peak_on(cuda, result)
    if before is None or after is None:
        report.notes.append("peak memory was not measured: another profiler is running, or this torch has none that tells")
        return
    if cuda is None:
        with variant.preserved(leaves):
            _mapping(report, result)
    graphs = sum(r.held for b in _builds(variant) if (r := b.lowered.runner.replay) is not None) / 2**20  # values live there, and stay
    report.memory_before_mb, report.memory_after_mb = before.mb, after.mb + graphs
    report.allocations_before, report.allocations_after = before.allocations, after.allocations


#: What keeps glibc from handing blocks back; 32 MiB and more go back after each use otherwise, smaller ones too on threads of one's own.
_KEEPING = "GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4294967296:glibc.malloc.arena_max=1"
#: The share of a call that mapping memory may take before the report speaks of it.
_MAPPING = 0.01


def _mapping(report: Report, result: Callable[[], Any]) -> None:
    """Memory that goes back to the system after each use, and has to be mapped anew in each call."""
    assert report.optimized is not None
    with torch.no_grad():
        count = faults(result)
    cost, call = count * fault_us() / 1e3, report.optimized.minimum
    if cost > _MAPPING * call:
        report.notes.append(f"{count} pages are mapped in each call, some {cost:.3g} of its {call:.3g} ms: large blocks go back to the system after each "
                            f"use. Started with {_KEEPING} in the environment, a process keeps them")  # fmt: skip


def _builds(variant: Variant) -> list[Built]:
    return variant.parts if variant.built is None else [variant.built]


def _device(variant: Variant, leaves: Sequence[Tensor]) -> torch.device:
    """Where the result runs: a GPU, if any of it does."""
    found = [accelerator.device_of(b.captured) for b in _builds(variant)] + [x.device for x in leaves]
    return next((d for d in found if d.type != "cpu"), torch.device("cpu"))


def _quiet(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def _caller(spec: Spec, leaves: list[Tensor]) -> Callable[[Callable[..., Any]], Any]:
    """Calls something on the inputs; containers that the call could write into (a cache, a list) are built afresh each time."""
    args, kwargs = spec.unflatten(leaves)
    if all(_immutable(s) for part in spec.children for s in part.children):
        return lambda called: called(*args, **kwargs)

    def afresh(called: Callable[..., Any]) -> Any:
        args, kwargs = spec.unflatten(leaves)
        return called(*args, **kwargs)

    return afresh


def _immutable(spec: Spec) -> bool:
    return spec.kind in ("tensor", "none", "const") or (spec.kind in ("tuple", "namedtuple") and all(map(_immutable, spec.children)))


def _answer(call: Callable[[], Any], seed: int) -> list[Tensor]:
    """Copies of the tensors that a call returns; what is drawn at random is the same in each."""
    torch.manual_seed(seed)
    try:
        return [t.clone() for t in flatten(call(), name="output")[0]]
    except InputError:  # an answer of a type that is none of ours: it runs, and there is nothing to compare
        return []


def _declined(job: Job, variant: Variant, report: Report) -> bool:
    """Whether the result gained nothing that was asked for: then the model's own ops run unchanged, and the verdict says so."""
    built = variant.built
    assert report.original is not None and report.optimized is not None
    before, after = report.original.minimum, report.optimized.minimum
    count = len(variant.capture.regions)
    left = f"{count} region{' was' if count == 1 else 's were'} not captured and run{'s as it was' if count == 1 else ' as they were'}; "
    smaller = built is not None and built.program.size_bytes() < built.captured.size_bytes()
    if after < before or (smaller and job.goal.about_size) or job.backend is not None:
        report.verdict = (left if built is None else "") + _ratio(before, after)
        if smaller and after >= before and built is not None:
            report.verdict = f"{built.captured.size_bytes() / max(1, built.program.size_bytes()):.2f} times smaller, {report.verdict}"
        return False
    reason = f"not faster: {after:.3g} ms against {before:.3g} ms"
    if built is None:
        variant.parts = [search.revert(part, reason) for part in variant.parts]
        for piece in variant.capture.pieces:
            piece.variants.clear()
        report.verdict = f"{left}the rest is {reason} and runs as it was, too"
        return True
    variant.built = search.revert(built, reason)
    report.verdict = f"{reason}; the captured graph runs unchanged"
    if smaller:
        report.notes.append("the optimized program is smaller: ask for it with goal=gw.Goal(size_mb=...)")
    return True


def _ratio(before: float, after: float) -> str:
    return f"{before / after:.2f} times faster" if after < before else f"{after / before:.2f} times slower"


#: an exact recipe whose outputs agree with the original's by fewer decibels is warned about
_ROUNDING_DB = {torch.float64: 60.0, torch.float32: 60.0, torch.float16: 25.0, torch.bfloat16: 15.0}


def _errors(report: Report, wanted: Sequence[Tensor], got: Sequence[Tensor], *, exact: bool) -> None:
    """Compare the answers; values that are not finite in the original's are left out of the figures, and said to be."""
    for k, (w, g) in enumerate(zip(wanted, got, strict=True)):
        if not w.numel():
            continue
        if w.is_complex():
            w, g = torch.view_as_real(w.resolve_conj()), torch.view_as_real(g.resolve_conj())
        if not w.is_floating_point():
            different = int((w != g).sum())
            if different:
                said = f"output {k} ({str(w.dtype).removeprefix('torch.')}): {different} of {w.numel()} values are not the original's"
                (report.warnings if exact else report.notes).append(said)
            continue
        finite = torch.isfinite(w)
        if not bool(finite.all()):
            report.notes.append(f"output {k} of the original has {int((~finite).sum())} of {w.numel()} values that are not finite: the errors leave them out")
        if not bool(torch.isfinite(g[finite]).all()):
            report.warnings.append("the result has values that are not finite where the original's are")
        w, g = w[finite], g[finite].nan_to_num()
        if not w.numel():
            continue
        db = sqnr_db(w, g)
        report.sqnr_db = db if report.sqnr_db is None else min(db, report.sqnr_db)
        report.max_abs = max(float((w.double() - g.double()).abs().max()), report.max_abs or 0.0)
        if exact and db < _ROUNDING_DB.get(w.dtype, 60.0):
            report.warnings.append(f"output {k} differs from the original's by more than rounding (SQNR {db:.1f} dB)")


def _fill(report: Report, variant: Variant, leaves: Sequence[Tensor]) -> None:
    built = variant.built
    if built is None:
        _fill_parts(report, variant.parts)
        return
    report.bytes_before, report.bytes_after = built.captured.size_bytes(), built.running.size_bytes()
    report.passes, report.seconds = built.records, dict(built.seconds)
    report.notes.extend(built.lowered.notes)
    if (replay := built.lowered.runner.replay) is not None:
        report.notes.append(replay.told())
    report.log.extend(f"whole assignment {label!r}: {t.minimum:.3g} ms" for label, t in built.lowered.variants)
    report.graph = Picture.of(built.running, built.lowered.serving())
    report.warnings.extend(f"pass {r.name} was {r.undone}" for r in built.records if r.undone)
    report.sites = site_rows(built, leaves)
    report.planned = arena.figures(built.lowered.runner, leaves)


def _fill_parts(report: Report, parts: Sequence[Built]) -> None:
    """One report for the pieces of a model: each pass counted once over all of them, sites with their share of the pieces' time."""
    records: dict[str, PassRecord] = {}
    for part in parts:
        for r in part.records:
            records[r.name] = r if r.name not in records else merged(records[r.name], r)
            if r.undone:
                report.warnings.append(f"pass {r.name} was {r.undone}")
        with part.captured.preserved(part.captured.example or ()):
            report.sites += site_rows(part, part.captured.example or ())
        replay = part.lowered.runner.replay
        told = [*part.lowered.notes, *([replay.told()] if replay is not None else [])]
        report.notes.extend(n for n in told if n not in report.notes)
    report.passes = list(records.values())
    total = sum(row.ms or 0.0 for row in report.sites) or 1.0
    report.sites = [replace(row, share=None if row.ms is None else row.ms / total) for row in report.sites]


def merged(a: PassRecord, b: PassRecord) -> PassRecord:
    """What one pass did to two pieces."""
    result = PassResult(a.result.changes + b.result.changes, a.result.refusals + b.result.refusals,
                        a.result.notes + b.result.notes, a.result.touched or b.result.touched)  # fmt: skip
    errors = [e for e in (a.error, b.error) if e is not None]
    return PassRecord(a.name, a.numerics, result, a.seconds + b.seconds, a.nodes_before + b.nodes_before, a.nodes_after + b.nodes_after,
                      a.bytes_before + b.bytes_before, a.bytes_after + b.bytes_after, min(errors, default=None), a.undone or b.undone)  # fmt: skip


def site_rows(built: Built, leaves: Sequence[Tensor]) -> list[SiteRow]:
    """A row per op, with its time within the whole; the time of a conversion belongs to the op that made the value."""
    runner = built.lowered.runner
    with torch.no_grad():
        spent = runner.profile(leaves)
    by_node: dict[Any, float] = {}
    by_site: dict[str, float] = {}
    for step, ms in zip(runner.steps, spent, strict=True):
        if step.work is not None:
            by_node[step.work.node] = ms
        else:
            by_site[step.site] = by_site.get(step.site, 0.0) + ms
    total = sum(spent) or 1.0
    rows = []
    for choice in built.lowered.choices:
        node = choice.work.node
        ms = by_node.get(node, 0.0) + by_site.pop(choice.work.site, 0.0)
        timed = ms or not choice.fused  # a region's time stands at its first op
        rows.append(_row(choice, ms if timed else None, ms / total if timed else None, unchanged=built.unchanged))
    for site, ms in by_site.items():  # conversions of inputs
        rows.append(SiteRow((site,), "convert", "f32", "conversion", "graphwright", ms=ms, share=ms / total))
    return rows


def _row(choice: Choice, ms: float | None, share: float | None, unchanged: str | None) -> SiteRow:
    work, node = choice.work, choice.work.node
    decision = choice.precision if choice.precision != "f32" or choice.name != "aten.native" else AS_IT_WAS
    stored = "int4" if any(w.bits == 4 for w in work.weights.values()) else "int8"
    decision = stored if decision == "int8" else decision
    rounding = work.has(QUANT) and work.has(CAST)  # a quantize or dequantize left standing; fused ops are no simulation
    if rounding or (choice.precision == "f32" and any(r.quantized for r in work.reads) and work.weights):
        decision = SIMULATED + "int8" if rounding else "f32"
    reason = None
    if choice.precision == "f32" and work.weights:
        tried = [o for o in choice.options if by_integers(o.name)]
        reason = (f"{stored} measured slower than float here" if any(o.ms is not None for o in tried)
                  else f"{stored} could not run: {tried[0].problem}" if tried else f"no {stored} kernel serves this op: its weights are {stored}, its arithmetic is float")  # fmt: skip
    work_done = None if choice.fused else cost(node)  # which of a region's numbers go through memory is the compiler's affair
    return SiteRow(
        tuple(node.meta.get("sites") or (node.name,)), work.op, decision, choice.name, choice.name.partition(".")[0],
        describe(node.meta.get("val")), tuple(Option(o.name, o.ms, o.problem) for o in choice.options), ms, share,
        node.meta.get("halves", {}).get(choice.precision) if choice.precision in HALF else node.meta.get("sqnr_db"), work_done and work_done.flops, work_done and work_done.bytes, unchanged or reason, node.meta.get("trace"),
    )  # fmt: skip


def _goals(job: Job, report: Report) -> None:
    """What the goal speaks of and the result misses becomes a warning."""
    goal = job.goal
    assert report.original is not None and report.optimized is not None
    size = None if report.bytes_after is None else report.bytes_after / 1e6
    lost = report.accuracy.before - report.accuracy.after if report.accuracy is not None else 0.0
    missed = [
        (goal.max_drop is not None and lost > goal.max_drop, f"evaluate drops by {lost:.3g}, goal {goal.max_drop}"),
        (goal.latency_ms is not None and report.optimized.minimum > goal.latency_ms, f"latency {report.optimized.minimum:.3g} ms, goal {goal.latency_ms} ms"),
        (goal.speedup is not None and (report.speedup or 0) < goal.speedup, f"speedup {report.speedup or 0:.2f}, goal {goal.speedup}"),
        (goal.size_mb is not None and size is not None and size > goal.size_mb, f"size {size or 0:.3g} MB, goal {goal.size_mb} MB"),
        (goal.memory_mb is not None and (report.memory_after_mb or 0) > goal.memory_mb, f"peak memory {report.memory_after_mb or 0:.3g} MB, goal {goal.memory_mb} MB"),
        (goal.memory_mb is not None and report.memory_after_mb is None, f"peak memory could not be measured, goal {goal.memory_mb} MB"),
    ]
    report.warnings.extend(f"goal missed: {text}" for bad, text in missed if bad)


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("graphwright", "torch", "numpy", "llvmlite"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
