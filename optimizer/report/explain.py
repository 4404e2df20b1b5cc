"""Why a site is as it is: what was captured, what each pass did or declined, which kernels raced and which won."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from graphwright.errors import SiteError, nearest
from graphwright.report.model import Report, SiteRow
from graphwright.report.words import gain, show_db, show_ms, show_share

if TYPE_CHECKING:
    from graphwright.ir import Program


def explain(report: Report, pattern: str, *, program: Program | None = None) -> str:
    """The story of every site that matches an ``fnmatch`` pattern.

    Args:
        program: fills in ops that the report has no row for.

    Raises:
        SiteError: none matches; names the nearest sites.
    """
    rows: dict[str, SiteRow] = {}
    for row in [*report.sites, *_rows_of(program)]:
        for site in row.sites:
            rows.setdefault(site, row)
    deeds = _deeds(report)
    known = list(dict.fromkeys([*rows, *deeds]))
    matching = [s for s in known if fnmatch.fnmatchcase(s, pattern)]
    if not matching:
        hint = nearest(pattern, known) or (
            f"the model's sites are {', '.join(known[:8])}{', …' if len(known) > 8 else ''}"
            if known
            else "the report has no sites"
        )
        raise SiteError(f"pattern {pattern!r} matches no site", where="explain()", hint=hint)
    told: set[int] = set()
    parts = []
    for site in matching:
        row = rows.get(site)
        if row is None:
            parts.append(_aligned(site, [*_told((site,), deeds), ("now", "gone: nothing of it is left to run")]))
        elif id(row) not in told:
            told.add(id(row))
            title = row.site + (f" (with {', '.join(row.sites[1:])})" if len(row.sites) > 1 else "")
            parts.append(_aligned(title, list(_story(row, deeds))))
    return "\n\n".join(parts)


def _aligned(title: str, lines: Sequence[tuple[str, str]]) -> str:
    """A title and labelled lines; a label that repeats is written once."""
    width = max(len(label) for label, _ in lines)
    labels = [label if k == 0 or lines[k - 1][0] != label else "" for k, (label, _) in enumerate(lines)]
    return "\n".join([title, *(f"  {label:<{width}}  {text}" for label, (_, text) in zip(labels, lines, strict=True))])


#: What the passes did or declined, as ``(position of the pass, its name, words)``, by site.
Deeds = dict[str, list[tuple[int, str, str]]]


def _deeds(report: Report) -> Deeds:
    found: Deeds = {}
    for k, record in enumerate(report.passes):
        for site, what in record.result.changes:
            found.setdefault(site, []).append((k, record.name, what))
        for site, reason in record.result.refusals:
            found.setdefault(site, []).append((k, record.name, f"declined: {reason}"))
    return found


def _told(sites: Sequence[str], deeds: Deeds) -> list[tuple[str, str]]:
    """The deeds at several sites, pass after pass, each once."""
    together = dict.fromkeys(deed for site in sites for deed in deeds.get(site, ()))
    return [(name, words) for _, name, words in sorted(together, key=lambda deed: deed[0])]


def _story(row: SiteRow, deeds: Deeds) -> Iterator[tuple[str, str]]:
    yield (
        "captured",
        f"{row.op}{f' gives {row.shape}' if row.shape else ''}{f', from {row.trace}' if row.trace else ''}",
    )
    yield from _told(row.sites, deeds)
    facts = [
        row.kernel or "the op as it is",
        f"{show_ms(row.ms)} ms" if row.ms is not None else "",
        f"{show_share(row.share)} of the time" if row.share is not None else "",
        f"SQNR {show_db(row.sqnr_db)} dB" if row.sqnr_db is not None else "",
        _rate(row),
    ]
    yield "now", f"{row.decision}: {', '.join(f for f in facts if f)}"
    if row.reason:
        yield "why", row.reason
    yield from _race(row)


def _rate(row: SiteRow) -> str:
    if not row.ms:
        return ""
    rates = [
        f"{row.flops / row.ms / 1e6:.0f} GFLOP/s" if row.flops else "",
        f"{row.bytes / row.ms / 1e6:.1f} GB/s" if row.bytes else "",
    ]
    return ", ".join(r for r in rates if r)


def _race(row: SiteRow) -> Iterator[tuple[str, str]]:
    for option in sorted((o for o in row.options if o.ms is not None), key=lambda o: o.ms or 0.0):
        yield "timed", f"{show_ms(option.ms):>6} ms  {option.name}{_lead(row) if option.name == row.kernel else ''}"
    for option in row.options:
        if option.problem:
            yield "not usable", f"{option.name}: {option.problem}"


def _lead(row: SiteRow) -> str:
    if row.reason and row.reason.startswith("not faster"):
        return "  runs: with the fastest of each, the whole was not faster"
    ahead = gain(row)
    if not ahead:
        return "  taken"
    return (
        "  taken although slower alone: the whole graph is faster with it"
        if ahead.startswith("0")
        else f"  taken, {ahead} faster than the next"
    )


def _rows_of(program: Program | None) -> list[SiteRow]:
    if program is None:
        return []
    from graphwright.ir import describe, op_name, sites_of

    return [
        SiteRow(
            sites_of(n) or (n.name,),
            op_name(n.target),
            shape=describe(n.meta.get("val")),
            trace=str(n.meta["trace"]) if n.meta.get("trace") else None,
        )
        for n in program.nodes
    ]
