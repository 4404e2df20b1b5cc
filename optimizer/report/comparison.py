"""How far a result's values are from the original's, site by site: what ``gw.compare`` gives."""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graphwright.errors import SaveError, SiteError, nearest
from graphwright.report.plain import to_plain
from graphwright.report.shown import Shown


@dataclass(frozen=True)
class Error:
    """Distance of values from the original's, over all inputs.

    Attributes:
        sqnr_db: 10·log10(Σ ref² / Σ (ref − value)²); inf where they are equal, -inf where one is not finite.
        cosine: of the angle between them; None where one is zero throughout.
        noise: Σ (ref − value)².
    """

    sqnr_db: float
    max_abs: float
    cosine: float | None
    noise: float


@dataclass(frozen=True)
class Deviation:
    """One op of the result against the values of the original that it stands for.

    Attributes:
        sites: every site that it stands for.
        position: in graph order.
        kernel, precision: what runs.
        shape: of its value, with its dtype in the original: ``"f32[8, 128, 384]"``.
        as_it_runs: on what the ops before it in the result give.
        alone: its kernel on the original's values: error that arises here; None where those are not at hand.
        worst_input: on which of the inputs it errs most.
        note: how its value is held, where otherwise than in the original.
    """

    sites: tuple[str, ...]
    op: str
    position: int
    kernel: str
    precision: str
    shape: str
    as_it_runs: Error
    alone: Error | None = None
    worst_input: int = 0
    note: str = ""

    @property
    def site(self) -> str:
        return self.sites[0]

    @property
    def arises(self) -> str:
        """``"here"``, ``"before"`` or ``"both"``: where its error comes from; empty where there is none, or it is not known."""
        if self.alone is None or not self.as_it_runs.noise:
            return ""
        if not math.isfinite(self.as_it_runs.noise):
            return "here" if not math.isfinite(self.alone.noise) else "before"
        share = self.alone.noise / self.as_it_runs.noise
        return "here" if share >= 0.5 else "before" if share <= 0.1 else "both"


@dataclass(frozen=True)
class OutputError:
    """One of the model's outputs, as its callers see it.

    Attributes:
        path: where it stands in what the model returns: ``".logits"``; ``"output"`` for a tensor alone.
        differing: of how many numbers the two are not equal.
    """

    path: str
    shape: str
    error: Error
    differing: int
    count: int


@dataclass(frozen=True)
class Comparison(Shown):
    """A result against the original, worst first. ``print`` it, index it by a site pattern, or take ``to_json()`` or ``to_html()``.

    Attributes:
        inputs: how many inputs were run.
        missing: sites of the original whose value is not at hand in the result (they run as a part of others).
    """

    model: str
    recipe: str
    inputs: int
    outputs: tuple[OutputError, ...]
    sites: tuple[Deviation, ...]
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    site: str | None = None

    def __getitem__(self, pattern: str) -> Comparison:
        """The part about the sites that match an ``fnmatch`` pattern.

        Raises:
            SiteError: none matches; names the nearest sites.
        """
        known = [s for d in self.sites for s in d.sites] + list(self.missing)
        found = {s for s in known if isinstance(pattern, str) and fnmatch.fnmatchcase(s, pattern)}
        if not found:
            hint = nearest(str(pattern), known) or f"the sites are {', '.join(known[:8])}{', …' if len(known) > 8 else ''}"
            raise SiteError(f"pattern {pattern!r} matches no site", where="compare()", hint=hint)
        sites = tuple(d for d in self.sites if not found.isdisjoint(d.sites))
        return replace(self, sites=sites, missing=tuple(s for s in self.missing if s in found), site=pattern)

    def blocks(self, *, full: bool, width: int) -> Iterator[Any]:
        from graphwright.report.comparison_text import blocks

        return blocks(self, full, width)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON; ``arises`` among it."""
        data = to_plain(self)
        for row, d in zip(data["sites"], self.sites, strict=True):
            row["arises"] = d.arises
        return data

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """One self-contained page, also written to ``path`` where one is given.

        Raises:
            SaveError: the file cannot be written.
        """
        from graphwright.report.comparison_html import page

        text = page(self)
        if path is not None:
            try:
                Path(path).write_text(text, encoding="utf-8")
            except OSError as error:
                raise SaveError(f"{path} cannot be written: {error.strerror or error}", hint="Choose another folder.") from error
        return text
