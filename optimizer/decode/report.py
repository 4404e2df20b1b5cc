"""The report of a decoder: two programs, and how fast original and result generate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from graphwright.errors import LoadError
from graphwright.measure import Timing
from graphwright.report import Report
from graphwright.report.plain import from_plain, to_plain


@dataclass
class DecoderReport:
    """What one ``optimize_decoder`` call did.

    Attributes:
        verdict: one sentence: how much faster answers come, or why the captured graphs run unchanged.
        batch, prompt, tokens: what was generated for the comparison: rows, length of their prompts, new tokens per row.
        original, optimized: milliseconds of such a generation, prefill and steps, timed in turns.
        prefill, step: each program's own report; its timings are those of one call.
        bytes_before, bytes_after: tensors that both programs read, captured and as they run; what they share counts once.
    """

    model: str
    recipe: str
    cache: str
    verdict: str
    prefill: Report
    step: Report
    batch: int = 1
    prompt: int = 1
    tokens: int = 1
    max_length: int | None = None
    original: Timing | None = None
    optimized: Timing | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    file_bytes: int | None = None
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """Ratio of the minima of a whole generation, original over optimized."""
        if self.original is None or self.optimized is None or not self.optimized.minimum:
            return None
        return self.original.minimum / self.optimized.minimum

    def tokens_per_second(self) -> tuple[float | None, float | None]:
        """New tokens of all rows per second of a whole generation, prefill included: original and result, at the minima."""
        count = 1e3 * self.batch * self.tokens
        first, second = (None if t is None or not t.minimum else count / t.minimum for t in (self.original, self.optimized))
        return first, second

    def rows(self) -> list[tuple[str, str, str]]:
        """Label, original, result."""
        rates = self.tokens_per_second()
        found = [("prefill ms", _ms(self.prefill.original), _ms(self.prefill.optimized)),
                 ("step ms", _ms(self.step.original), _ms(self.step.optimized)),
                 ("tokens/s", *("-" if r is None else f"{r:.1f}" for r in rates))]  # fmt: skip
        if self.bytes_before is not None and self.bytes_after is not None:
            found.append(("tensors MB", f"{self.bytes_before / 1e6:.2f}", f"{self.bytes_after / 1e6:.2f}"))
        if self.file_bytes is not None:
            found.append(("file MB", "-", f"{self.file_bytes / 1e6:.2f}"))
        return found  # type: ignore[return-value]

    def text(self, *, full: bool = False, width: int | None = None) -> str:
        """The report as plain text: the comparison, then each program's own report."""
        limit = "" if self.max_length is None else f", at most {self.max_length} tokens"
        lines = [f"{self.model}, recipe {self.recipe}, {self.cache} cache{limit}", self.verdict, "",
                 f"{'':<12}{'original':>12}{'optimized':>12}"]  # fmt: skip
        lines += [f"{label:<12}{before:>12}{after:>12}" for label, before, after in self.rows()]
        lines += [f"generation: {self.batch} x {self.prompt} tokens of prompt, {self.tokens} new ones each, in turns", *self.notes]
        for name, report in (("Prefill", self.prefill), ("Step", self.step)):
            lines += ["", f"--- {name} ---", report.text(full=full, width=width)]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        yield Text(self.text(width=options.max_width))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return to_plain(self)

    def to_json(self, *, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, data: Any) -> DecoderReport:
        """What ``to_dict`` gave.

        Raises:
            LoadError: it is none.
        """
        try:
            return from_plain(cls, data, "report")
        except RecursionError:
            raise LoadError("the report in the file is nested too deep", hint="Save the model again.") from None


def _ms(timing: Timing | None) -> str:
    return "-" if timing is None else f"{timing.minimum:.3g}"
