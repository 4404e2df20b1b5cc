"""The report: what was asked, what was done site by site, and what it brought."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.drawing.picture import Picture
from graphwright.errors import LoadError, SaveError
from graphwright.lower.arena import Figures
from graphwright.manager import PassRecord
from graphwright.measure import Timing
from graphwright.report.plain import from_plain, to_plain

if TYPE_CHECKING:
    from graphwright.report.comparison import Comparison

#: Decision for a site that runs as the user wrote it.
AS_IT_WAS = "left as it was"
#: Prefix of a decision whose numbers are quantized but whose arithmetic is not.
SIMULATED = "simulated "


@dataclass(frozen=True)
class Option:
    """One candidate for a site.

    Attributes:
        ms: measured time; None where it was not timed.
        problem: why it could not be used.
    """

    name: str
    ms: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class SiteRow:
    """What became of one op.

    Attributes:
        sites: every site that it stands for, first the one it was born with.
        op: ``"aten.linear"``.
        shape: of its result: ``"f32[8, 128, 384]"``.
        decision: ``"int8"``, ``"int4"`` (of the weight), ``"bf16"``, ``"fp16"``, ``"f32"``, ``"left as it was"``, or ``"simulated int8"``, … where quantization
            is computed in float.
        kernel: the candidate that runs: ``"onednn.int8-linear"``.
        backend: whose it is: ``"onednn"``, ``"llvm"``, ``"aten"``.
        options: the candidates and their times.
        ms: time of one call within the whole model; None where it was not measured.
        share: of the model's time, 0 to 1.
        sqnr_db: error of its output against float, in dB.
        flops, bytes: arithmetic of one call, and what it reads and writes at least.
        reason: why it was left alone or did not get what was asked for.
        trace: ``file:line`` of the call in the model's source.
    """

    sites: tuple[str, ...]
    op: str
    decision: str = AS_IT_WAS
    kernel: str = ""
    backend: str = ""
    shape: str = ""
    options: tuple[Option, ...] = ()
    ms: float | None = None
    share: float | None = None
    sqnr_db: float | None = None
    flops: int | None = None
    bytes: int | None = None
    reason: str | None = None
    trace: str | None = None

    @property
    def site(self) -> str:
        return self.sites[0] if self.sites else self.op

    @property
    def runner_up(self) -> Option | None:
        """The fastest candidate that was timed and not taken."""
        others = [o for o in self.options if o.ms is not None and o.name != self.kernel]
        return min(others, key=lambda o: o.ms or 0.0, default=None)


@dataclass(frozen=True)
class Region:
    """Something that was not captured and runs as the user wrote it.

    Attributes:
        where: ``file:line`` in the user's source, or a module's path.
        what: what stands in the way.
    """

    where: str
    what: str


@dataclass(frozen=True)
class Accuracy:
    """The user's own measure, higher is better.

    Attributes:
        budget: how much may be lost; None: no limit was set.
    """

    before: float
    after: float
    metric: str = "evaluate"
    budget: float | None = None


@dataclass
class Report:
    """What one ``optimize`` call did.

    Attributes:
        verdict: one sentence: how much faster, or why the captured graph runs unchanged.
        created: ISO date and time, UTC.
        original, optimized: timed side by side.
        bytes_before, bytes_after: tensors; shared storage counts once.
        file_bytes: size of the saved file, once there is one.
        memory_before_mb, memory_after_mb: tensor memory of one run at its peak, beyond the resident weights, in MiB, where it
            was measured.
        sqnr_db, max_abs: error of the result's outputs against the original's on the example inputs.
        passes: what each pass did, in order.
        sites: what became of each op, in graph order.
        regions: what was not captured.
        notes: what capture and lowering have to say.
        log: trials of a search, in order.
        warnings: what the user should know before trusting the result.
        seconds: how long each phase took, and, where it was measured, the ``"total"``.
        graph: the program's shape, for the picture.
        allocations_before, allocations_after: how often that run asked for memory.
        planned: what the values within a run would take in one arena, with offsets assigned ahead, for comparison: results of
            steps are freed after their last reader, which comes as low.
        process_peak_mb: the most that the process held resident until the report was written, in MiB: model, libraries and all.
    """

    model: str
    recipe: str
    verdict: str
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    threads: int | None = None
    original: Timing | None = None
    optimized: Timing | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    file_bytes: int | None = None
    memory_before_mb: float | None = None
    memory_after_mb: float | None = None
    accuracy: Accuracy | None = None
    sqnr_db: float | None = None
    max_abs: float | None = None
    passes: list[PassRecord] = field(default_factory=list)
    sites: list[SiteRow] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    graph: Picture | None = None
    allocations_before: int | None = None
    allocations_after: int | None = None
    process_peak_mb: float | None = None
    planned: Figures | None = None

    # -- facts that follow -------------------------------------------------------------------------------------

    @property
    def speedup(self) -> float | None:
        """Ratio of the minima, original over optimized: what other loads on the machine disturb least."""
        if self.original is None or self.optimized is None or not self.optimized.minimum:
            return None
        return self.original.minimum / self.optimized.minimum

    def by_time(self) -> list[SiteRow]:
        """Rows that were timed, the slowest first."""
        return sorted((r for r in self.sites if r.ms is not None), key=lambda r: -(r.ms or 0.0))

    def backend_shares(self) -> dict[str, float]:
        """Share of the measured time per backend, the largest first."""
        spent: Counter[str] = Counter()
        for row in self.sites:
            spent[row.backend or "unknown"] += row.ms or 0.0  # type: ignore[assignment]
        total = sum(spent.values())
        return {b: ms / total for b, ms in spent.most_common()} if total else {}

    def decisions(self) -> dict[str, int]:
        """Number of ops per decision, the most frequent first."""
        return dict(Counter(r.decision for r in self.sites).most_common())

    def refusals(self) -> list[tuple[str, str, str]]:
        """``(who, site, reason)`` of everything that was asked for and not done."""
        found = [(p.name, site, reason) for p in self.passes for site, reason in p.result.refusals]
        return found + [("lowering", r.site, r.reason) for r in self.sites if r.reason]

    def grouped_refusals(self) -> list[tuple[str, str, list[str]]]:
        """``(who, reason, sites)``, the most frequent reason first."""
        groups: dict[tuple[str, str], list[str]] = {}
        for who, site, reason in self.refusals():
            groups.setdefault((who, reason), []).append(site)
        return sorted(((w, r, s) for (w, r), s in groups.items()), key=lambda g: -len(g[2]))

    # -- showing -----------------------------------------------------------------------------------------------

    def text(self, *, full: bool = False, width: int | None = None) -> str:
        """The report as plain text.

        Args:
            full: every site and every refusal, not just the slowest and the most frequent.
            width: columns; those of the terminal by default.
        """
        from graphwright.report.text import as_text

        return as_text(self, full=full, width=width)

    def __str__(self) -> str:
        return self.text()

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from graphwright.report.text import blocks

        yield from blocks(self, full=False, width=options.max_width)

    def to_html(self, path: str | os.PathLike[str] | None = None, *, comparison: Comparison | None = None) -> str:
        """One self-contained page (no scripts, no network), also written to ``path`` where one is given.

        Args:
            comparison: what ``gw.compare`` gave, to be drawn with it.

        Raises:
            SaveError: the file cannot be written.
        """
        from graphwright.report.html import page

        text = page(self, comparison)
        if path is not None:
            try:
                Path(path).write_text(text, encoding="utf-8")
            except OSError as error:
                raise SaveError(
                    f"{path} cannot be written: {error.strerror or error}", hint="Choose another folder."
                ) from error
        return text

    # -- plain data --------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return to_plain(self)

    def to_json(self, *, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, data: Any) -> Report:
        """What ``to_dict`` gave.

        Raises:
            LoadError: it is none.
        """
        return from_plain(cls, data, "report")

    @classmethod
    def from_json(cls, text: str) -> Report:
        """What ``to_json`` gave.

        Raises:
            LoadError: it is none.
        """
        try:
            return cls.from_dict(json.loads(text))
        except (ValueError, RecursionError) as error:
            if isinstance(error, LoadError):
                raise
            raise LoadError(f"the report is no valid JSON ({error})") from None
