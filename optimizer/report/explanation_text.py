"""An ``Explanation`` in a terminal, through rich."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from graphwright.manager import PassRecord
from graphwright.report.explanation import Explanation, OpRow, shown_sites

_TOP = 12
#: Sites whose whole story is told where a pattern picks them.
_STORIES = 40


def blocks(e: Explanation, full: bool, width: int) -> Iterator[Any]:
    """What rich prints, in order."""
    yield Text(f"{e.model}, recipe {e.recipe}" + (f", sites {e.site}" if e.site else ""), style="bold")
    if e.site is not None:
        yield from _stories(e, full)
        return
    if e.whole:
        yield Text(f"Captured whole: {e.captured} ops, {e.left} after the passes", style="green")
    else:
        parts = f"in {len(e.pieces)} piece{'s' * (len(e.pieces) != 1)}: {shown_sites(e.pieces, full)}" if e.pieces else "not at all"
        yield Text(f"Captured {parts}; {e.captured} ops, {e.left} after the passes", style="yellow")
        yield from _refused(e)
    yield from _passes(e, full)
    yield from _declined(e, full)
    yield from _kernels(e, full)
    if e.opaque:
        yield _heading("Opaque: no row in the op table, run as they are")
        for op, sites in e.opaque.items():
            yield Text(f"  {op}: {shown_sites(sites, full)}")
    if e.notes:
        yield _heading("Notes")
        yield from (Text(f"  {n}") for n in e.notes)


def _heading(title: str) -> Text:
    return Text(f"\n{title}", style="bold")


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right")
    grid.add_column()
    return grid


def _refused(e: Explanation) -> Iterator[Any]:
    yield _heading("Not captured: runs as you wrote it")
    for r in e.refused:
        yield Text(f"  {r.where or 'unknown line'}" + (f", in {r.site}" if r.site else ", in the model itself"))
        if r.source:
            yield Text(f"      {r.source}", style="cyan")
        yield Text(f"      {r.reason}")


def _passes(e: Explanation, full: bool) -> Iterator[Any]:
    shown = [p for p in e.passes if p.result.modified or p.undone or p.result.notes]
    if shown:
        yield _heading("Passes that fired")
        grid = _grid()
        for p in shown:
            grid.add_row(Text(f"  {p.name}"), Text(str(len(p.result.changes) or "")), Text(_deeds(p, full), style="yellow" if p.undone else ""))
        yield grid
    idle = [p.name for p in e.passes if p not in shown]
    if idle:
        yield Text(f"  nothing to do for {', '.join(idle)}", style="dim")


def _deeds(p: PassRecord, full: bool) -> str:
    if p.undone:
        return p.undone
    kinds: dict[str, list[str]] = {}
    for site, what in p.result.changes:
        kinds.setdefault(what, []).append(site)
    several = sorted(kinds.items(), key=lambda k: -len(k[1]))
    kept = several if full else several[:4]
    lines = [f"{len(s)} × {what}: {shown_sites(s, full)}" if len(s) > 1 else f"{what}: {s[0]}" for what, s in kept]
    if len(several) > len(kept):
        lines.append(f"and {sum(len(s) for _, s in several[4:])} more")
    if not lines:
        lines = list(p.result.notes) or ["the program as a whole"]
    return "\n".join(lines)


def _declined(e: Explanation, full: bool) -> Iterator[Any]:
    groups = e.grouped_refusals()
    if not groups:
        return
    yield _heading("Passes that declined")
    grid = _grid()
    for name, reason, sites in groups if full else groups[:_TOP]:
        grid.add_row(Text(f"  {name}"), str(len(sites)), Text(f"{reason} ({shown_sites(sites, full, 2)})"))
    yield grid
    if not full and len(groups) > _TOP:
        yield Text(f"  and {len(groups) - _TOP} more reasons: text(full=True)", style="dim")


def _kernels(e: Explanation, full: bool) -> Iterator[Any]:
    racing: Counter[tuple[str, tuple[str, ...]]] = Counter((r.op, r.candidates) for r in e.ops if r.candidates)
    if racing:
        yield _heading("Ops for which kernels will race the op's own")
        grid = _grid()
        for (op, names), count in racing.most_common():
            grid.add_row(Text(f"  {op}"), str(count), Text(", ".join(names)))
        yield grid
    alone: dict[tuple[str, str], list[OpRow]] = {}
    for r in e.ops:
        if not r.candidates and not r.opaque:
            alone.setdefault((r.op, r.reason or ""), []).append(r)
    if alone:
        yield _heading("Ops that run as they are")
        grid = _grid()
        rows = sorted(alone.items(), key=lambda k: -len(k[1]))
        for (op, reason), several in rows if full else rows[:_TOP]:
            grid.add_row(Text(f"  {op}"), str(len(several)), Text(f"{reason} ({shown_sites([r.sites[0] for r in several], full, 2)})"))
        yield grid
        if not full and len(rows) > _TOP:
            yield Text(f"  and {len(rows) - _TOP} more kinds: text(full=True)", style="dim")


# -- site by site ----------------------------------------------------------------------------------------------------


def _stories(e: Explanation, full: bool) -> Iterator[Any]:
    told = {s for r in e.ops for s in r.sites}
    gone = [s for s in e.sites if s not in told]
    rows: list[OpRow | str] = [*e.ops, *gone]
    for row in rows if full else rows[:_STORIES]:
        yield _story(e, row)
    if not full and len(rows) > _STORIES:
        yield Text(f"\nand {len(rows) - _STORIES} more: text(full=True)", style="dim")


def _story(e: Explanation, row: OpRow | str) -> Any:
    sites = (row,) if isinstance(row, str) else row.sites
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column()
    for p in e.passes:
        for site, what in dict.fromkeys(p.result.changes):
            if site in sites:
                grid.add_row(f"  {p.name}", Text(what))
        for site, why in dict.fromkeys(p.result.refusals):
            if site in sites:
                grid.add_row(f"  {p.name}", Text(f"declined: {why}"))
    if isinstance(row, str):
        grid.add_row("  left", Text("nothing of it is left to run"))
    else:
        grid.add_row("  left", Text(f"{row.op} gives {row.shape}" + (f", from {row.trace}" if row.trace else "")))
        grid.add_row("  kernels", Text(f"will race: aten.native, {', '.join(row.candidates)}" if row.candidates else f"its own alone: {row.reason}"))
    from rich.console import Group

    title = sites[0] + (f" (with {', '.join(sites[1:])})" if len(sites) > 1 else "")
    return Group(Text(f"\n{title}", style="bold"), grid)
