"""The demo: a pretrained model optimized exactly and as int8, measured, scored, saved, and read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphwright.checkup import call, race, same_bits, shapes
from graphwright.demo import load_task
from graphwright.demo.task import DemoTask
from graphwright.errors import SaveError
from graphwright.measure import Timing
from graphwright.report import Accuracy, Report

#: Recipe by column heading.
RECIPES = {"exact": "default", "int8": "int8"}


@dataclass(frozen=True)
class Column:
    """One model of the table.

    Attributes:
        timing: milliseconds per call, in rounds shared with the other columns.
        megabytes: size on disk; for the original, of its `state_dict`.
        score: the task's metric.
        done: what was done, a line each.
        saved, report: files; None for the original.
        same_bits: whether the saved file, loaded again, gives the same bits.
    """

    name: str
    timing: Timing
    megabytes: float
    score: float
    done: tuple[str, ...] = ()
    saved: Path | None = None
    report: Path | None = None
    same_bits: bool | None = None


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; the first column is the original."""

    task: DemoTask
    columns: tuple[Column, ...]
    threads: int = field(default_factory=torch.get_num_threads)

    def show(self) -> None:
        """Print one table to standard output."""
        from graphwright.console import out_console

        out_console().print(self.table())

    def table(self) -> Any:
        """A `rich.table.Table`, a column per model."""
        from rich import box
        from rich.table import Table

        first = self.columns[0]
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        table = Table(
            title=f"{self.task.title}: {shapes(self.task.example_inputs)}, {threads}",
            caption="Weights and data: " + "; ".join(map(str, self.task.sources)),
            box=box.SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("")
        for column in self.columns:
            table.add_column(column.name, overflow="fold")

        def row(title: str, cell: Callable[[Column], str]) -> None:
            table.add_row(title, *(cell(c) for c in self.columns))

        row("latency, median", lambda c: f"{c.timing.median:.2f} ms")
        row("latency, p95", lambda c: f"{c.timing.p95:.2f} ms")
        row("speed", lambda c: "1.00 x" if c is first else f"{first.timing.median / c.timing.median:.2f} x")
        row("size on disk", lambda c: f"{c.megabytes:.2f} MB")
        digits = self.task.digits
        row(
            self.task.metric,
            lambda c: f"{c.score:.{digits}f}" + ("" if c is first else f" ({c.score - first.score:+.{digits}f})"),
        )
        row("what was done", lambda c: "\n".join(c.done))
        row("loaded again", lambda c: {True: "same bits", False: "DIFFERS", None: ""}[c.same_bits])
        row("saved file", lambda c: str(c.saved or ""))
        row("report", lambda c: str(c.report or ""))
        return table


def run(name: str, out: Path, say: Callable[[str], None], *, rounds: int = 40, budget_s: float = 20.0) -> DemoResult:
    """Run the demo called `name`.

    Args:
        name: a key of `graphwright.demo.TASKS`.
        out: folder for saved files and reports, made if it is not there.
        say: receives progress.
        rounds, budget_s: how long the original and the results are timed against each other.

    Raises:
        GraphwrightError: data could not be fetched, optimizing failed, or a file could not be written.
    """
    import graphwright as gw

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(
            f"no folder can be made: {error.strerror}", where=str(out), hint="Choose another with --out."
        ) from error
    say(f"loading the {name} model and data")
    task = load_task(name, say)
    results: dict[str, Any] = {}
    for heading, recipe in RECIPES.items():
        results[heading] = gw.optimize(
            task.model,
            task.example_inputs,
            recipe,
            calibration=task.calibration if recipe != "default" else None,
            progress=lambda line, heading=heading: say(f"{heading}: {line}"),
        )
    models: dict[str, nn.Module] = {"original": task.model, **results}
    say("timing the original and the results side by side")
    timings = race(models, task.example_inputs, rounds=rounds, budget_s=budget_s)
    say(f"original: {task.metric}")
    original = Column("original", timings["original"], _state_megabytes(task.model, out), task.evaluate(task.model))
    columns = [original]
    for heading, fast in results.items():
        say(f"{heading}: {task.metric}")
        score = task.evaluate(fast)
        fast.report.accuracy = Accuracy(original.score, score, task.metric)
        say(f"{heading}: saving, and loading again")
        saved, page = out / f"{name}-{heading}.gw", out / f"{name}-{heading}.html"
        fast.save(saved)
        fast.report.to_html(page)
        same = same_bits(call(fast, task.example_inputs), call(gw.load(saved), task.example_inputs))
        size = saved.stat().st_size / 1e6
        columns.append(Column(heading, timings[heading], size, score, done(fast.report), saved, page, same))
    return DemoResult(task, tuple(columns))


def done(report: Report) -> tuple[str, ...]:
    """What was done, in a few lines: ops by decision, what the passes changed, what they declined."""
    before = report.passes[0].nodes_before if report.passes else len(report.sites)
    decisions = ", ".join(f"{count} {decision}" for decision, count in report.decisions().items())
    changed = [f"{p.name} {len(p.result.changes)}" for p in report.passes if p.result.changes]
    declined = len(report.refusals())
    lines = [f"{before} ops became {len(report.sites)}: {decisions}", ", ".join(changed)]
    lines += [f"declined at {declined} site{'s' * (declined != 1)}, with reasons in the report"] if declined else []
    lines += [f"not captured: {len(report.regions)} regions"] if report.regions else []
    return tuple(line for line in lines if line)


def _state_megabytes(model: nn.Module, out: Path) -> float:
    """What `torch.save` writes of the model's state."""
    path = out / ".original.pt"
    try:
        torch.save(model.state_dict(), path)
        return path.stat().st_size / 1e6
    except OSError as error:
        raise SaveError(f"the original could not be measured: {error.strerror}", where=str(path)) from error
    finally:
        path.unlink(missing_ok=True)
