"""The report in a terminal, through rich: plain text for strings and files, colour where rich finds a terminal."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphwright.report.model import Report
from graphwright.report.words import (
    clip,
    figures,
    gain,
    pass_cells,
    quantized_words,
    short,
    show_db,
    show_ms,
    show_share,
)

_TOP_SITES, _TOP_REFUSALS = 12, 8
_COLOURS = {"int8": "green", "int4": "green", "bf16": "cyan", "fp16": "cyan", "f32": "default", "left as it was": "yellow"}


def as_text(report: Report, *, full: bool, width: int | None) -> str:
    """See ``Report.text``."""
    return plain_text(lambda columns: blocks(report, full=full, width=columns), width)


def plain_text(make: Callable[[int], Iterable[Any]], width: int | None) -> str:
    """What rich would print of ``make(columns)``, as plain lines.

    Args:
        width: columns; those of the terminal by default.
    """
    if width is None:
        width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 160))
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=False,
        color_system=None,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )
    for block in make(width):
        console.print(block)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def blocks(report: Report, *, full: bool, width: int) -> Iterator[Any]:
    """What rich prints, in order."""
    yield Text(f"{report.model}, recipe {report.recipe}", style="bold")
    yield Text(report.verdict, style="green" if (report.speedup or 0) > 1 else "yellow")
    yield Text(_circumstances(report), style="dim")
    if figures(report):
        yield _figures(report)
    for warning in report.warnings:
        yield Text(f"Warning: {warning}", style="bold yellow")
    if report.passes:
        yield from _passes(report, full)
    if report.sites:
        yield from _sites(report, full, width)
    refusals = report.grouped_refusals()
    if refusals:
        yield from _refusals(refusals, full)
    if report.regions:
        yield _heading("Not captured: runs as you wrote it")
        for region in report.regions:
            yield Text(f"  {region.where}: {region.what}")
    for title, lines in (("Search", report.log), ("Notes", report.notes)):
        if lines:
            yield _heading(title)
            yield from (Text(f"  {line}") for line in lines)


def _heading(title: str) -> Text:
    return Text(f"\n{title}", style="bold")


def _circumstances(report: Report) -> str:
    threads = f"{report.threads} thread{'s' if report.threads != 1 else ''}" if report.threads else ""
    versions = ", ".join(f"{k} {v}" for k, v in report.versions.items())
    spent = f"optimized in {report.seconds.get('total', sum(report.seconds.values())):.1f} s" if report.seconds else ""
    return "; ".join(
        p for p in (report.created[:10], str(report.machine.get("gpu", report.machine.get("cpu", ""))), threads, versions, spent) if p
    )


def _table(*columns: str, numbers: int) -> Table:
    """A table without frames; all columns but the first ``numbers`` ones are right-aligned figures."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=True, header_style="dim", pad_edge=False)
    for k, name in enumerate(columns):
        table.add_column(name, justify="right" if k >= numbers else "left", no_wrap=k >= numbers, overflow="ellipsis")
    return table


def _figures(report: Report) -> Table:
    table = _table("", "original", "optimized", "", numbers=1)
    table.columns[3].justify, table.columns[3].no_wrap = "left", False
    for row in figures(report):
        table.add_row(*map(Text, row))
    return table


def _passes(report: Report, full: bool) -> Iterator[Any]:
    yield _heading("Passes")
    shown = [p for p in report.passes if full or p.result.modified or p.result.refusals or p.undone]
    if shown:
        table = _table("pass", "changed", "declined", "nodes", "tensors", "SQNR dB", "s", numbers=1)
        for p in shown:
            table.add_row(*map(Text, pass_cells(p)), style="yellow" if p.undone else "")
        yield table
    idle = [p.name for p in report.passes if p not in shown]
    if idle:
        yield Text(f"  nothing to do for {', '.join(idle)}", style="dim")


def _sites(report: Report, full: bool, width: int) -> Iterator[Any]:
    timed = report.by_time()
    rows = report.sites if full or not timed else timed[:_TOP_SITES]
    title = (
        f"Sites, all {len(rows)}"
        if len(rows) == len(report.sites)
        else f"Sites, the slowest {len(rows)} of {len(report.sites)}"
    )
    yield _heading(title)
    yield Text(f"  Decisions: {', '.join(f'{d} {n}' for d, n in report.decisions().items())}")
    if report.backend_shares():
        yield Text(f"  Time: {', '.join(f'{b} {100 * s:.0f} %' for b, s in report.backend_shares().items())}")
    quantized = quantized_words(report)
    if quantized:
        yield Text(f"  Quantization: {quantized}")
    table = _table("site", "decision", "kernel", "ms", "share", "gain", "SQNR dB", numbers=3)
    kernels = [r.kernel or r.op for r in rows]
    room = width - 40 - max(len(r.decision) for r in rows)  # what the figures leave
    kernel_room = min(max(map(len, kernels)), room * 4 // 9)
    for r, kernel in zip(rows, kernels, strict=True):
        table.add_row(
            Text(short(r.site, room - kernel_room)),
            Text(r.decision, style=_COLOURS.get(r.decision, "red")),
            Text(clip(kernel, kernel_room)),
            show_ms(r.ms),
            show_share(r.share),
            gain(r),
            show_db(r.sqnr_db),
        )
    yield table
    rest = len(report.sites) - len(rows)
    if rest:
        left = sum(r.share or 0.0 for r in timed[_TOP_SITES:])
        yield Text(f"  and {rest} more, {show_share(left)} of the time: report.text(full=True)", style="dim")


def _refusals(groups: list[tuple[str, str, list[str]]], full: bool) -> Iterator[Any]:
    total = sum(len(s) for _, _, s in groups)
    yield _heading(f"Declined, {total} time{'s' if total != 1 else ''}")
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(justify="right", min_width=5)
    grid.add_column()
    for who, reason, sites in groups if full else groups[:_TOP_REFUSALS]:
        shown = ", ".join(sites) if full else short(sites[0], 40)
        more = f" and {len(sites) - 1} more" if not full and len(sites) > 1 else ""
        grid.add_row(str(len(sites)), Text(f"{who}: {reason} ({shown}{more})"))
    yield grid
    if not full and len(groups) > _TOP_REFUSALS:
        yield Text(f"       and {len(groups) - _TOP_REFUSALS} more reasons: report.text(full=True)", style="dim")
