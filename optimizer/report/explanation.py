"""What would happen to a model, told without optimizing it: capture, passes, and which kernels could compete at each op."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graphwright.errors import SiteError, nearest
from graphwright.manager import PassRecord
from graphwright.report.plain import to_plain
from graphwright.report.shown import Shown


@dataclass(frozen=True)
class Refused:
    """A part of the model that torch.export did not take; it runs as the user wrote it.

    Attributes:
        site: the module whose own code it is, ``""`` for the model itself.
        where: ``file.py:12`` in the user's source, where known.
        source: that line's text.
        reason: what stands in the way.
    """

    site: str
    where: str | None
    source: str | None
    reason: str


@dataclass(frozen=True)
class OpRow:
    """One op that is left after the passes.

    Attributes:
        sites: every site that it stands for.
        shape: of its result: ``"f32[8, 128, 384]"``.
        trace: ``file:line`` of the call in the model's source.
        opaque: it has no row in the op table: it runs as it is and passes leave it alone.
        candidates: kernels that would race the op's own (``aten.native``), by name.
        reason: why there are none.
    """

    sites: tuple[str, ...]
    op: str
    shape: str
    trace: str | None = None
    opaque: bool = False
    candidates: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Explanation(Shown):
    """What ``gw.explain`` found. ``print`` it, index it by a site pattern, or take ``to_json()``.

    Attributes:
        whole: the model was captured as one program.
        refused: what was not captured.
        pieces: the submodules that were captured instead of the whole.
        captured, left: ops before and after the passes.
        passes: what each pass did and declined; ``undone`` where it broke its promise.
        ops: in graph order.
        sites: every site of the captured model, those included that the passes took into others.
        notes: from capture, passes and backends.
        site: the pattern that this was narrowed to.
    """

    model: str
    recipe: str
    whole: bool
    refused: tuple[Refused, ...] = ()
    pieces: tuple[str, ...] = ()
    captured: int = 0
    left: int = 0
    passes: tuple[PassRecord, ...] = ()
    ops: tuple[OpRow, ...] = ()
    sites: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    site: str | None = field(default=None)

    def __getitem__(self, pattern: str) -> Explanation:
        """The part about the sites that match an ``fnmatch`` pattern.

        Raises:
            SiteError: none matches; names the nearest sites.
        """
        if not isinstance(pattern, str):
            raise SiteError(f"{pattern!r} is no site pattern", where="Explanation[...]", hint="Pass a string such as 'encoder.layer.0.*'.")
        found = {s for s in self.sites if fnmatch.fnmatchcase(s, pattern)}
        if not found:
            hint = nearest(pattern, self.sites) or (
                f"the model's sites are {', '.join(self.sites[:8])}{', …' if len(self.sites) > 8 else ''}"
                if self.sites else "nothing of the model was captured")  # fmt: skip
            raise SiteError(f"pattern {pattern!r} matches no site", where="explain()", hint=hint)
        ops = tuple(r for r in self.ops if not found.isdisjoint(r.sites))
        found |= {s for r in ops for s in r.sites}  # an op's story is that of all its sites
        keep = lambda pairs: [(s, words) for s, words in pairs if s in found]
        passes = tuple(replace(p, result=replace(p.result, changes=keep(p.result.changes), refusals=keep(p.result.refusals)))
                       for p in self.passes)  # fmt: skip
        return replace(self, passes=passes, ops=ops, sites=tuple(s for s in self.sites if s in found), site=pattern)

    # -- facts that follow -------------------------------------------------------------------------------------

    @property
    def opaque(self) -> dict[str, list[str]]:
        """Ops without a row in the op table, with their sites."""
        found: dict[str, list[str]] = {}
        for row in self.ops:
            if row.opaque:
                found.setdefault(row.op, []).append(row.sites[0])
        return found

    def fired(self) -> dict[str, list[tuple[str, str]]]:
        """By pass: ``(site, what was done)``; passes that changed nothing are left out."""
        return {p.name: list(p.result.changes) for p in self.passes if p.result.changes}

    def declined(self) -> dict[str, list[tuple[str, str]]]:
        """By pass: ``(site, reason)``."""
        return {p.name: list(p.result.refusals) for p in self.passes if p.result.refusals}

    def grouped_refusals(self) -> list[tuple[str, str, list[str]]]:
        """``(pass, reason, sites)``, the most frequent first."""
        groups: dict[tuple[str, str], list[str]] = {}
        for name, refusals in self.declined().items():
            for site, reason in refusals:
                groups.setdefault((name, reason), []).append(site)
        return sorted(((p, r, s) for (p, r), s in groups.items()), key=lambda g: -len(g[2]))

    # -- showing -----------------------------------------------------------------------------------------------

    def blocks(self, *, full: bool, width: int) -> Iterator[Any]:
        from graphwright.report.explanation_text import blocks

        return blocks(self, full, width)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return to_plain(self)


def shown_sites(sites: Sequence[str], full: bool, count: int = 3) -> str:
    """``"a, b, c and 9 more"``."""
    kept = list(dict.fromkeys(sites))
    if full or len(kept) <= count + 1:
        return ", ".join(kept)
    return f"{', '.join(kept[:count])} and {len(kept) - count} more"
