"""What each op of a result takes as it runs: a table, JSON, and a trace for Perfetto or chrome://tracing."""

from __future__ import annotations

import json
import operator
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from graphwright.errors import SaveError
from graphwright.measure import Timing
from graphwright.report.plain import to_plain
from graphwright.report.shown import Shown
from graphwright.report.words import clip, short, show_bytes, show_ms, show_share

_TOP = 25


@dataclass(frozen=True)
class Part:
    """One step of a result: a kernel, a conversion between two forms of a value, or writing buffers back.

    Attributes:
        site: its first site; ``sites``: all that it stands for.
        op: ``"aten.linear"``; of several fused ops: all of them.
        kernel: what runs: ``"onednn.int8-linear"``, ``"convert native→q"``.
        shape: of the result, as the graph states it: ``"f32[8, 128, 384]"``.
        flops: arithmetic of one call by the cost model, a multiply-add as two; None where it knows none.
        bytes: what one call reads and writes at the least, in the dtypes that it really holds; None where unknown.
    """

    site: str
    sites: tuple[str, ...]
    op: str
    kernel: str
    shape: str = ""
    flops: int | None = None
    bytes: int | None = None

    @property
    def backend(self) -> str:
        return self.kernel.partition(".")[0] if "." in self.kernel.partition(" ")[0] else "graphwright"


@dataclass(frozen=True)
class Event:
    """One run of one part: ``begin`` and ``end`` in nanoseconds since the first round began."""

    part: int
    begin: int
    end: int


@dataclass(frozen=True)
class Span:
    """From ``begin`` to ``end`` in nanoseconds; ``name``: of a captured piece of a model that was not captured whole."""

    begin: int
    end: int
    name: str = ""


@dataclass(frozen=True)
class Round:
    """One call of the model: the whole of it, the programs that ran in it, and their parts, in order of time."""

    whole: Span
    programs: tuple[Span, ...]
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Row:
    """A part over all rounds.

    Attributes:
        calls: how often it runs in one call of the model; of parts that are alike: all of them.
        median_ms, min_ms: of all its runs within one call of the model, over the rounds.
        share: of the time of all rounds together.
        gflops_per_s, gbytes_per_s: from the median; None where the cost model knows no figure.
    """

    part: Part
    calls: int
    median_ms: float
    min_ms: float
    share: float
    gflops_per_s: float | None
    gbytes_per_s: float | None


@dataclass(frozen=True)
class Profile(Shown):
    """A profile of a result on given inputs.

    Times are medians over the rounds, each of its own, so that they add up only roughly; shares are of the time of all rounds together,
    and do add up.

    Attributes:
        model: its class; ``inputs`` in words; ``threads`` of torch while it ran.
        plain: whole calls without a clock inside, in turn with the rounds.
        notes: what a reader should know: parts of the model that were not captured, say.
        uncaptured: some of the model runs as it was, around the programs.
    """

    model: str
    inputs: str
    threads: int
    parts: tuple[Part, ...]
    rounds: tuple[Round, ...]
    plain: Timing
    notes: tuple[str, ...] = ()
    uncaptured: bool = False
    pid: int = field(default_factory=os.getpid)
    tid: int = 0

    # -- facts that follow -------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """A row per part that ran, in the order of their first run."""
        return self._rows(list(range(len(self.parts))))

    @cached_property
    def alike(self) -> tuple[Row, ...]:
        """``rows`` with those of repeated blocks together: one kernel at ``encoder.layer.*.output.dense``, shapes alike."""
        return self._rows([(_family(p.site), p.op, p.kernel, p.shape) for p in self.parts])

    def _rows(self, names: Sequence[Any]) -> tuple[Row, ...]:
        """A row for all parts of one name."""
        spent: dict[Any, list[int]] = {}
        runs: dict[Any, Counter[int]] = {}
        for k, each in enumerate(self.rounds):
            for event in each.events:
                spent.setdefault(names[event.part], [0] * len(self.rounds))[k] += event.end - event.begin
                runs.setdefault(names[event.part], Counter())[event.part] += 1
        return tuple(self._row(runs[name], ns) for name, ns in spent.items())

    def _row(self, runs: Counter[int], ns: Sequence[int]) -> Row:
        part, median = self.parts[next(iter(runs))], statistics.median(ns) / 1e6
        if len(runs) > 1:
            part = replace(part, site=_family(part.site), sites=tuple(s for p in runs for s in self.parts[p].sites))
        rates = []
        for amounts in ([self.parts[p].flops for p in runs], [self.parts[p].bytes for p in runs]):
            known = sum(a * n for a, n in zip(amounts, runs.values(), strict=True) if a) / len(self.rounds)
            rates.append(known / median / 1e6 if known and median and all(amounts) else None)
        return Row(part, -(-sum(runs.values()) // len(self.rounds)), median, min(ns) / 1e6, sum(ns) / sum(self._whole), rates[0], rates[1])

    @cached_property
    def _whole(self) -> list[int]:
        """Nanoseconds of each round."""
        return [max(1, r.whole.end - r.whole.begin) for r in self.rounds]

    @cached_property
    def _kernels(self) -> list[int]:
        return [sum(e.end - e.begin for e in r.events) for r in self.rounds]

    @cached_property
    def _programs(self) -> list[int]:
        return [sum(s.end - s.begin for s in r.programs) for r in self.rounds]

    @property
    def whole_ms(self) -> float:
        """Median of a whole call, the clock's own reading included."""
        return statistics.median(self._whole) / 1e6

    @property
    def kernels_ms(self) -> float:
        """Median of what all parts take together."""
        return statistics.median(self._kernels) / 1e6

    @property
    def between_ms(self) -> float:
        """Median of what lies between the parts of a program: taking values up and handing them on, and the clock."""
        return statistics.median(map(operator.sub, self._programs, self._kernels)) / 1e6

    @property
    def around_ms(self) -> float:
        """Median of what lies outside the programs: inputs checked, outputs put together, and code that was not captured."""
        return statistics.median(map(operator.sub, self._whole, self._programs)) / 1e6

    # -- showing -----------------------------------------------------------------------------------------------

    def blocks(self, *, full: bool, width: int) -> Iterator[Any]:
        """What rich prints, in order."""
        from rich.text import Text

        rows = sorted(self.rows if full else self.alike, key=lambda r: -r.median_ms)
        shown = rows if full else rows[:_TOP]
        counted = f"{len(self.rounds)} round{'s' * (len(self.rounds) != 1)}, {self.threads} thread{'s' * (self.threads != 1)}"
        yield Text(f"{self.model} on {self.inputs}: {counted}", style="bold")
        if shown:
            yield _table(shown, width)
        if len(shown) < len(rows):
            rest = rows[len(shown) :]
            yield Text(f"and {len(rest)} more, which take {show_share(sum(r.share for r in rest))} together: .text(full=True)")
        yield Text(self._sums(sum(r.calls for r in rows)))
        for note in self.notes:
            yield Text(note)

    def _sums(self, runs: int) -> str:
        whole, kernels, programs = sum(self._whole), sum(self._kernels), sum(self._programs)
        head = f"whole call      {show_ms(self.whole_ms)} ms; without a clock inside {show_ms(self.plain.median)} ms, {show_ms(self.plain.minimum)} ms at the least"
        lines = [
            (f"{runs} step{'s' * (runs != 1)}", self.kernels_ms, kernels, ""),
            ("between them", self.between_ms, programs - kernels, "values taken up and handed on, the clock"),
            ("around them", self.around_ms, whole - programs, "inputs checked, outputs put together" + (", code that was not captured" if self.uncaptured else "")),
        ]  # fmt: skip
        said = [f"{what:<16}{show_ms(ms)} ms, {show_share(ns / whole)}" + (f": {why}" if why else "") for what, ms, ns, why in lines if runs or what == "around them"]
        return "\n".join([head, *said])

    # -- files -------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON: sums, rows, times in milliseconds."""
        return {
            "model": self.model, "inputs": self.inputs, "threads": self.threads, "rounds": len(self.rounds), "notes": list(self.notes),
            "whole_ms": self.whole_ms, "kernels_ms": self.kernels_ms, "between_ms": self.between_ms, "around_ms": self.around_ms,
            "plain": self.plain.to_json(), "rows": [{**to_plain(r.part), **{k: v for k, v in to_plain(r).items() if k != "part"}} for r in self.rows],
        }  # fmt: skip

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """``to_dict`` as text, also written to ``path`` where one is given.

        Raises:
            SaveError: the file cannot be written.
        """
        return _written(json.dumps(self.to_dict(), indent=2, allow_nan=False), path)

    def to_chrome_trace(self, path: str | os.PathLike[str] | None = None) -> str:
        """All rounds in the Trace Event Format, which https://ui.perfetto.dev and chrome://tracing open; written to ``path``, too.

        Times are in microseconds since the first round began. The calls without a clock inside leave gaps between the rounds.

        Raises:
            SaveError: the file cannot be written.
        """
        events = [
            {"ph": "M", "name": "process_name", "ts": 0, "pid": self.pid, "tid": self.tid, "args": {"name": f"{self.model} (graphwright)"}},
            {"ph": "M", "name": "thread_name", "ts": 0, "pid": self.pid, "tid": self.tid, "args": {"name": "steps"}},
            *(e for k, r in enumerate(self.rounds) for e in self._events(k, r)),
        ]
        data = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"inputs": self.inputs, "threads": self.threads, "notes": list(self.notes)}}
        return _written(json.dumps(data, allow_nan=False), path)

    def _events(self, index: int, each: Round) -> Iterator[dict[str, Any]]:
        yield self._slice(f"call {index + 1}", "call", each.whole, {"round": index})
        for program in each.programs:
            yield self._slice(program.name or "program", "program", program, {})
        for e in each.events:
            part = self.parts[e.part]
            args = {"site": ", ".join(part.sites), "op": part.op, "kernel": part.kernel, "shape": part.shape}
            yield self._slice(part.site, part.backend, e, {**args, **{k: v for k, v in (("flops", part.flops), ("bytes", part.bytes)) if v is not None}})

    def _slice(self, name: str, category: str, span: Span | Event, args: dict[str, Any]) -> dict[str, Any]:
        return {"ph": "X", "name": name, "cat": category, "ts": span.begin / 1e3, "dur": (span.end - span.begin) / 1e3,
                "pid": self.pid, "tid": self.tid, "args": args}  # fmt: skip


def _family(site: str) -> str:
    """``"layer.*.dense"`` of ``"layer.3.dense"``."""
    return re.sub(r"(^|\.)\d+(?=[.#]|$)", r"\1*", site)


def _table(rows: Sequence[Row], width: int) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    several = any(r.calls > 1 for r in rows)
    headings = [*(("calls",) if several else ()), "median ms", "min ms", "share", "moves", "GFLOP/s", "GB/s"]
    cells = [[*((str(r.calls),) if several else ()), show_ms(r.median_ms), show_ms(r.min_ms), show_share(r.share), show_bytes(r.part.bytes),
              _rate(r.gflops_per_s), _rate(r.gbytes_per_s)] for r in rows]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    left = width - sum(widths) - 3 * (len(widths) + 2)
    wanted = min(max(len(r.part.site) for r in rows) + 4, 34)
    kernels = min(max(len(r.part.kernel) for r in rows), max(left - wanted, 14))
    sites = max(left - kernels, 16)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("site", no_wrap=True)
    table.add_column("kernel", no_wrap=True)
    for heading, most in zip(headings, widths, strict=True):
        table.add_column(heading, justify="right", no_wrap=True, min_width=most)
    for r, figures in zip(rows, cells, strict=True):
        more = f" +{len(r.part.sites) - 1}" if len(r.part.sites) > 1 and "*" not in r.part.site else ""
        table.add_row(Text(short(r.part.site, sites - len(more)) + more), Text(clip(r.part.kernel, kernels)), *figures)
    return table


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 0.05 else f"{value:.0e}"


def _written(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        try:
            Path(path).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise SaveError(f"{path} cannot be written: {error.strerror or error}", hint="Choose another folder.") from error
    return text
