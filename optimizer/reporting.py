"""From a finished build to its report: both sides timed, compared and scored; the captured graph runs where nothing was gained."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphwright import search
from graphwright.capture.rehearse import untouched
from graphwright.cost import cost
from graphwright.ir import describe
from graphwright.lower import Choice
from graphwright.measure import interleaved, machine
from graphwright.numerics import sqnr_db
from graphwright.ops import CAST, QUANT, facts
from graphwright.report import Accuracy, Option, Picture, Region, Report, SiteRow
from graphwright.report.model import AS_IT_WAS, SIMULATED
from graphwright.search import Built

if TYPE_CHECKING:
    from graphwright.api import Job
    from graphwright.optimized import Variant

Call = tuple[tuple[Any, ...], Mapping[str, Any]]


def make_report(job: Job, model: nn.Module, variant: Variant, call: Call, leaves: Sequence[Tensor], start: float) -> Report:
    """Measure, decide whether the result stands, and write down what was done."""
    args, kwargs = call
    report = Report(type(model).__name__, job.recipe_name, "", machine=dict(machine()), threads=torch.get_num_threads(),
                    versions=_versions(), notes=list(variant.capture.notes))  # fmt: skip
    report.regions = [Region(r.where or r.site or "the model itself", f"{r.site}: {r.reason}" if r.site and r.where else r.reason)
                      for r in variant.capture.regions]  # fmt: skip
    job.say("timing original and result side by side")
    original = _quiet(lambda: model(*args, **kwargs))
    result = _quiet(lambda: variant.run(list(leaves)))
    with untouched(model), _preserved(variant, leaves):
        with _preserved(variant, leaves):
            wanted = [t.clone() for t in _tensors(original())]
        with _preserved(variant, leaves):
            got = [t.clone() for t in _tensors(result())]
        report.original, report.optimized = interleaved([original, result], rounds=25, budget_s=2.0)
        if report.optimized.minimum >= report.original.minimum:  # a loss is not believed on one race: others may have used the machine
            report.original, report.optimized = interleaved([original, result], rounds=25, budget_s=2.0)
        _decide(job, variant, report, leaves)
        if variant.built is not None and variant.built.unchanged:
            with _preserved(variant, leaves):
                got = [t.clone() for t in _tensors(result())]
            report.original, report.optimized = interleaved([original, result], rounds=20, budget_s=2.0)
    _errors(report, wanted, got)
    if variant.built is not None:
        with _preserved(variant, leaves):
            _fill(report, variant.built, leaves)
    scores = job.scores(model, variant)
    if scores is not None:
        report.accuracy = Accuracy(*scores, budget=job.goal.max_drop)
    _goals(job, report, variant, result)
    report.seconds["total"] = time.perf_counter() - start
    return report


def _quiet(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def _preserved(variant: Variant, leaves: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Measuring leaves no trace in the result's own state, nor in the inputs."""
    return nullcontext() if variant.built is None else variant.built.captured.preserved(leaves)


def _tensors(value: Any) -> list[Tensor]:
    from graphwright.structure import flatten

    return flatten(value, name="output")[0]


def _decide(job: Job, variant: Variant, report: Report, leaves: Sequence[Tensor]) -> None:
    """Keep the result where it gained what was asked for; otherwise let the captured graph run unchanged, and say so."""
    built = variant.built
    assert report.original is not None and report.optimized is not None
    before, after = report.original.minimum, report.optimized.minimum
    if built is None:
        report.verdict = f"{len(variant.capture.regions)} regions were not captured and run as they were; {_ratio(before, after)}"
        return
    smaller = built.program.size_bytes() < built.captured.size_bytes()
    if after < before or (smaller and job.goal.about_size):
        report.verdict = _ratio(before, after)
        return
    reason = f"not faster: {after:.3g} ms against {before:.3g} ms"
    variant.built = search.revert(built, reason)
    report.verdict = f"{reason}; the captured graph runs unchanged"
    if smaller:
        report.notes.append("the optimized program is smaller: ask for it with goal=gw.Goal(size_mb=...)")


def _ratio(before: float, after: float) -> str:
    return f"{before / after:.2f} times faster" if after < before else f"{after / before:.2f} times slower"


def _errors(report: Report, wanted: Sequence[Tensor], got: Sequence[Tensor]) -> None:
    pairs = [(w, g) for w, g in zip(wanted, got, strict=True) if w.is_floating_point() and w.numel()]
    if pairs:
        report.sqnr_db = min(sqnr_db(w.nan_to_num(), g.nan_to_num()) for w, g in pairs)
        report.max_abs = max(float((w.nan_to_num() - g.nan_to_num()).abs().max()) for w, g in pairs)
    if any(not torch.isfinite(g).all() and bool(torch.isfinite(w).all()) for w, g in pairs):
        report.warnings.append("the result has values that are not finite where the original's are")


def _fill(report: Report, built: Built, leaves: Sequence[Tensor]) -> None:
    report.bytes_before, report.bytes_after = built.captured.size_bytes(), built.running.size_bytes()
    report.passes, report.seconds = built.records, dict(built.seconds)
    report.notes.extend(built.lowered.notes)
    report.log.extend(f"whole assignment {label!r}: {t.minimum:.3g} ms" for label, t in built.lowered.variants)
    report.graph = Picture.of(built.running)
    report.warnings.extend(f"pass {r.name} was undone: {r.undone}" for r in built.records if r.undone)
    report.sites = site_rows(built, leaves)


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
        rows.append(_row(choice, ms, ms / total, unchanged=built.unchanged))
    for site, ms in by_site.items():  # conversions of inputs
        rows.append(SiteRow((site,), "convert", "f32", "conversion", "graphwright", ms=ms, share=ms / total))
    return rows


def _row(choice: Choice, ms: float, share: float, unchanged: str | None) -> SiteRow:
    work, node = choice.work, choice.work.node
    decision = choice.precision if choice.precision != "f32" or choice.name != "aten.native" else AS_IT_WAS
    rounding = work.has(QUANT) and work.has(CAST)  # a quantize or dequantize left standing; fused ops are no simulation
    if rounding or (choice.precision == "f32" and any(r.quantized for r in work.reads) and work.weights):
        decision = SIMULATED + "int8" if rounding else "f32"
    reason = None
    if choice.precision == "f32" and work.weights:
        tried = [o for o in choice.options if "int8" in o.name]
        reason = ("int8 measured slower than float here" if any(o.ms is not None for o in tried)
                  else f"int8 could not run: {tried[0].problem}" if tried else "no int8 kernel serves this op: its weights are int8, its arithmetic is float")  # fmt: skip
    work_done = cost(node)
    return SiteRow(
        tuple(node.meta.get("sites") or (node.name,)), work.op, decision, choice.name, choice.name.partition(".")[0],
        describe(node.meta.get("val")), tuple(Option(o.name, o.ms, o.problem) for o in choice.options), ms, share,
        node.meta.get("sqnr_db"), work_done.flops, work_done.bytes, unchanged or reason, node.meta.get("trace"),
    )  # fmt: skip


def _goals(job: Job, report: Report, variant: Variant, result: Callable[[], Any]) -> None:
    """Measure what the goal speaks of; what it misses becomes a warning."""
    goal = job.goal
    assert report.original is not None and report.optimized is not None
    if goal.memory_mb is not None:
        report.memory_after_mb = search.peak_memory_mb(result)
    size = None if report.bytes_after is None else report.bytes_after / 1e6
    missed = [
        (goal.latency_ms is not None and report.optimized.minimum > goal.latency_ms, f"latency {report.optimized.minimum:.3g} ms, goal {goal.latency_ms} ms"),
        (goal.speedup is not None and (report.speedup or 0) < goal.speedup, f"speedup {report.speedup or 0:.2f}, goal {goal.speedup}"),
        (goal.size_mb is not None and size is not None and size > goal.size_mb, f"size {size or 0:.3g} MB, goal {goal.size_mb} MB"),
        (goal.memory_mb is not None and (report.memory_after_mb or 0) > goal.memory_mb, f"memory {report.memory_after_mb or 0:.3g} MB, goal {goal.memory_mb} MB"),
    ]
    report.warnings.extend(f"goal missed: {text}" for bad, text in missed if bad)


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("graphwright", "torch", "numpy", "numba"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
