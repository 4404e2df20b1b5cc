"""A ``Comparison`` in a terminal, through rich."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from graphwright.report.comparison import Comparison, Error
from graphwright.report.words import clip, short, show_db

_TOP = 20


def blocks(c: Comparison, full: bool, width: int) -> Iterator[Any]:
    """What rich prints, in order."""
    title = f"{c.model}, recipe {c.recipe}, against the original on {c.inputs} input{'s' * (c.inputs != 1)}"
    yield Text(title + (f", sites {c.site}" if c.site else ""), style="bold")
    table = _table("output", "shape", numbers=2, figures=("SQNR dB", "largest", "cosine", "differ"))
    for o in c.outputs:
        table.add_row(*map(Text, (o.path, o.shape, *figures(o.error), f"{o.differing} of {o.count}")))
    if c.outputs:
        yield table
    if c.sites:
        rows = c.sites if full else c.sites[:_TOP]
        said = f"the worst {len(rows)} of {len(c.sites)}" if len(rows) < len(c.sites) else f"all {len(rows)}, the worst first"
        yield Text(f"\nSites, {said}", style="bold")
        yield Text("  as it runs: behind the errors of the ops before it; alone: its kernel on the original's values", style="dim")
        table = _table("site", "shape", "kernel", numbers=3, figures=("SQNR dB", "alone", "arises", "largest", "cosine"))
        shapes, kernels = max(len(d.shape) for d in rows), [clip(d.kernel, 24) for d in rows]
        room = max(16, width - 46 - min(shapes, 24) - max(map(len, kernels)))
        for d, kernel in zip(rows, kernels, strict=True):
            db, largest, cosine = figures(d.as_it_runs)
            alone = show_db(d.alone.sqnr_db) if d.alone is not None else ""
            table.add_row(*map(Text, (short(d.site, room), clip(d.shape, 24), kernel, db, alone, d.arises, largest, cosine)),
                          style="yellow" if d.arises == "here" and d.as_it_runs.sqnr_db < 20 else "")  # fmt: skip
        yield table
        if len(rows) < len(c.sites):
            yield Text(f"  and {len(c.sites) - len(rows)} more: text(full=True)", style="dim")
    if c.missing:
        yield Text(f"\n{len(c.missing)} site{'s are' if len(c.missing) > 1 else ' is'} part of others now: "
                   f"{', '.join(c.missing if full else c.missing[:4])}{'' if full or len(c.missing) <= 4 else ', …'}", style="dim")  # fmt: skip
    for note in c.notes:
        yield Text(f"Note: {note}")


def figures(e: Error) -> tuple[str, str, str]:
    """SQNR, largest distance, cosine."""
    cosine = "" if e.cosine is None else f"{e.cosine:.6f}"
    return show_db(e.sqnr_db), f"{e.max_abs:.3g}", cosine


def _table(*columns: str, numbers: int, figures: tuple[str, ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in (*columns, *figures):
        table.add_column(name, justify="right" if name in figures else "left", no_wrap=True, overflow="ellipsis")
    return table
