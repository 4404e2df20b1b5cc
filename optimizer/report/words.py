"""The words and figures that the terminal, the page and the explanations share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from graphwright.drawing.words import clip, short, show_ms, show_share

if TYPE_CHECKING:
    from graphwright.manager import PassRecord
    from graphwright.report.model import Report, SiteRow


__all__ = ["clip", "figures", "gain", "pass_cells", "quantized_words", "short", "show_bytes", "show_db", "show_ms", "show_share"]


def show_bytes(count: float | None) -> str:
    if count is None:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def show_db(db: float | None) -> str:
    if db is None:
        return ""
    return "equal" if db == math.inf else "lost" if not math.isfinite(db) else f"{db:.1f}"


def figures(report: Report) -> list[tuple[str, str, str, str]]:
    """``(what, original, optimized, change)``: the lines that both the terminal and the page show."""
    rows = []
    a, b = report.original, report.optimized
    if a is not None and b is not None:
        for name in ("minimum", "median", "p95"):
            was, now = getattr(a, name), getattr(b, name)
            ratio = f"{was / now:.2f}x" if now else ""
            rows.append((f"latency, {name}", f"{show_ms(was)} ms", f"{show_ms(now)} ms", ratio))
    memory = [m * 2**20 if m is not None else None for m in (report.memory_before_mb, report.memory_after_mb)]
    for name, was, now in (("tensors", report.bytes_before, report.bytes_after), ("peak memory", *memory)):
        if was is not None and now is not None:
            rows.append((name, show_bytes(was), show_bytes(now), _change(was, now)))
    if report.allocations_before is not None and report.allocations_after is not None:
        rows.append(("allocations", str(report.allocations_before), str(report.allocations_after), ""))
    if report.planned is not None and report.planned.values:
        p = report.planned
        least, arena, every = (show_bytes(m * 2**20) for m in (p.least, p.arena, p.without_reuse))
        rows.append(("values of a run", "", least, f"{every} without reuse; {arena} in one arena"))
    if report.process_peak_mb is not None:
        rows.append(("process, at most", "", show_bytes(report.process_peak_mb * 2**20), ""))
    if report.file_bytes is not None:
        rows.append(("saved file", "", show_bytes(report.file_bytes), ""))
    if report.accuracy is not None:
        score = report.accuracy
        budget = "" if score.budget is None else f" of {score.budget:g} allowed"
        rows.append(
            (score.metric, f"{score.before:.4f}", f"{score.after:.4f}", f"{score.after - score.before:+.4f}{budget}")
        )
    if report.sqnr_db is not None or report.max_abs is not None:
        words = (
            [f"SQNR {show_db(report.sqnr_db)}{' dB' if math.isfinite(report.sqnr_db) else ''}"]
            if report.sqnr_db is not None
            else []
        )
        words += [f"largest {report.max_abs:.3g}"] if report.max_abs is not None else []
        rows.append(("output error", "", "", ", ".join(words)))
    return rows


def _change(was: float, now: float) -> str:
    if was == now:
        return "the same"
    if was <= 0 or now <= 0:
        return ""
    return f"{was / now:.2f}x smaller" if now < was else f"{now / was:.2f}x larger"


def quantized_words(report: Report) -> str | None:
    """Real and simulated quantization are two things, and are counted apart."""
    real = sum(r.decision in ("int8", "int4", "w8", "w4") for r in report.sites)
    simulated = sum(r.decision.startswith("simulated ") for r in report.sites)
    return f"real at {real} op{'s' if real != 1 else ''}, simulated at {simulated}" if real or simulated else None


def pass_cells(p: PassRecord) -> tuple[str, ...]:
    """One pass: name, sites changed, sites declined, nodes, bytes, error, seconds."""
    nodes = f"{p.nodes_before} > {p.nodes_after}" if p.nodes_before != p.nodes_after else str(p.nodes_after)
    size = (
        f"{show_bytes(p.bytes_before)} > {show_bytes(p.bytes_after)}"
        if p.bytes_before != p.bytes_after
        else show_bytes(p.bytes_after)
    )
    name = f"{p.name} (undone)" if p.undone else p.name
    changed = str(len(p.result.changes)) if p.result.changes or not p.result.touched else "all"
    return name, changed, str(len(p.result.refusals)), nodes, size, show_db(p.error), f"{p.seconds:.2f}"


def gain(row: SiteRow) -> str:
    """How much faster the chosen candidate was than the next one: ``"2.3x"``."""
    chosen = next((o.ms for o in row.options if o.name == row.kernel and o.ms), None)
    other = row.runner_up
    return f"{other.ms / chosen:.1f}x" if chosen and other is not None and other.ms else ""
