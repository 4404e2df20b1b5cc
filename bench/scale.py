#!/usr/bin/env python
"""How the time to optimize grows with the graph: generated programs of 100 to 20,000 nodes through every stage.

    python bench/scale.py --out bench/results/scale.json --plot bench/results/scale.svg

Stages, each timed by itself on one thread, in seconds of processor time (least of ``--rounds``):

    pipeline            the default passes, every invariant checked, without example inputs
    pipeline, checked   the same with example inputs: outputs compared with float64 after every pass that changed anything
    save, load          the optimized program to disk and back
    analyse             from the program to units of work
    candidates          what every backend offers for each
    choose              the choice over the whole graph, with made-up times in the place of measured ones
    emit                from choice to a runner
    report              the HTML page

Capturing a model and timing candidates are left out: the first is torch.export's work, and the second depends on the
number of distinct works alone (that number is recorded: ``distinct``).

For each stage and form the exponent b of ``seconds = a * nodes ** b`` is fitted from ``--from`` nodes on, beside the exponent
that n * log(n) would give over the same sizes. The file is one JSON object:

    schema      "graphwright-scale/1"
    date, commit, command, machine, versions    as in ``results``
    settings    sizes, forms, rounds, seed, fitted_from, threads
    points      list of {"form", "nodes", "works", "distinct", "seconds": {stage: s}, "passes": {pass: s}}; ``passes``
                are wall-clock seconds of each pass within the pipeline without examples
    fits        list of {"form", "stage", "exponent", "n_log_n"}
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

if __package__ in (None, ""):
    # Run as a file: the repository's root goes last, so that its folders hide no installed package.
    sys.path[0:1] = []
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from bench import graphs, results
from graphwright import backends, store
from graphwright.ir import Program
from graphwright.lower.graph import Analysis, analyse
from graphwright.lower.runner import emit
from graphwright.lower.select import pose, solve
from graphwright.lower.stopwatch import signature
from graphwright.manager import PassRecord, Pipeline
from graphwright.passes.pipeline import DEFAULT
from graphwright.report import Option, Picture, Report, SiteRow

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = "graphwright-scale/1"
SIZES = (100, 200, 500, 1000, 2000, 5000, 10000, 20000)
FITTED_FROM = 1000
T = TypeVar("T")


class Clock:
    """Processor seconds per stage, the least of several rounds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, run: Callable[[], T]) -> T:
        gc.collect()
        begin = time.process_time()
        found = run()
        took = time.process_time() - begin
        self.seconds[stage] = min(took, self.seconds.get(stage, math.inf))
        return found


def measure(nodes: int, form: str, seed: int = 0, rounds: int = 1) -> dict[str, Any]:
    """One generated program through every stage: one of the file's ``points``."""
    program = graphs.build(nodes, form, seed)
    clock, passes = Clock(), {}
    for _ in range(rounds):
        plain = program.copy()
        plain.example = None
        optimized, records = clock("pipeline", lambda: Pipeline(DEFAULT).run(plain))  # noqa: B023
        passes = {r.name: round(min(r.seconds, passes.get(r.name, math.inf)), 6) for r in records}
        clock("pipeline, checked", lambda: Pipeline(DEFAULT).run(program))
        _disk(clock, optimized)
        analysis = _lowering(clock, optimized)
        clock("report", lambda: _report(optimized, analysis, records).to_html())  # noqa: B023
    distinct = len({signature(w) for w in analysis.works})
    return {"form": form, "nodes": len(program.nodes), "works": len(analysis.works), "distinct": distinct,
            "seconds": {stage: round(s, 6) for stage, s in clock.seconds.items()}, "passes": passes}  # fmt: skip


def _disk(clock: Clock, program: Program) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.gw"
        clock("save", lambda: store.save(path, store.Archive([store.Variant(program)])))
        clock("load", lambda: store.load(path))


def _lowering(clock: Clock, program: Program) -> Analysis:
    analysis = clock("analyse", lambda: analyse(program))
    allowed = frozenset({"f32"})
    options = clock("candidates", lambda: [list(backends.candidates(w, allowed)) for w in analysis.works])
    times = [[_made_up(signature(w), c.name) if c.timed else 0.0 for c in several]
             for w, several in zip(analysis.works, options, strict=True)]  # fmt: skip
    picks = clock("choose", lambda: solve(pose(analysis, options, times, lambda *conversion: 0.05)))
    chosen = [(several[k], several[k].build()) for several, k in zip(options, picks, strict=True)]
    clock("emit", lambda: emit(analysis, chosen))
    return analysis


def _made_up(work: str, candidate: str) -> float:
    """Milliseconds: the same for equal works, as measured ones are."""
    return np.random.default_rng([*f"{work} {candidate}".encode()]).uniform(0.1, 1.0)


def _report(program: Program, analysis: Analysis, records: Sequence[PassRecord]) -> Report:
    report = Report("generated", "default", "made up", passes=list(records), graph=Picture.of(program))
    options = (Option("aten.native", 1.0), Option("other", 1.5))
    report.sites = [SiteRow((w.site,), w.op, "f32", "aten.native", "aten", "", options, 1.0, 1 / len(analysis.works))
                    for w in analysis.works]  # fmt: skip
    return report


def fits(points: Sequence[dict[str, Any]], start: int = FITTED_FROM) -> list[dict[str, Any]]:
    """Per form and stage the exponent, from ``start`` nodes on; none where fewer than two sizes are left."""
    found = []
    for form in dict.fromkeys(p["form"] for p in points):
        large = [p for p in points if p["form"] == form and p["nodes"] >= start]
        if len({p["nodes"] for p in large}) < 2:
            continue
        nodes = [float(p["nodes"]) for p in large]
        log_n = exponent(nodes, [n * math.log(n) for n in nodes])
        for stage in large[0]["seconds"]:
            b = exponent(nodes, [max(p["seconds"][stage], 1e-6) for p in large])
            found.append({"form": form, "stage": stage, "exponent": round(b, 3), "n_log_n": round(log_n, 3)})
    return found


def exponent(nodes: Sequence[float], seconds: Sequence[float]) -> float:
    """b of the power law ``a * nodes ** b`` that fits best in logarithms."""
    return float(np.polyfit(np.log(nodes), np.log(seconds), 1)[0])


def table(record: dict[str, Any]) -> str:
    """The measurements as text: a row per form and stage, a column per size, the exponent at the end."""
    lines = []
    for form in dict.fromkeys(p["form"] for p in record["points"]):
        points = [p for p in record["points"] if p["form"] == form]
        slopes = {f["stage"]: f for f in record["fits"] if f["form"] == form}
        lines.append(f"{form:<20}" + "".join(f"{p['nodes']:>9}" for p in points) + f"{'exponent':>10}")
        for stage in points[0]["seconds"]:
            slope = f"{slopes[stage]['exponent']:>10.2f}" if stage in slopes else ""
            lines.append(f"  {stage:<18}" + "".join(f"{p['seconds'][stage]:>9.3f}" for p in points) + slope)
        lines.append(f"  {'distinct works':<18}" + "".join(f"{p['distinct']:>9}" for p in points))
        if slopes:
            lines.append(f"  n·log n would give an exponent of {next(iter(slopes.values()))['n_log_n']:.2f}")
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """A log-log plot, one panel per form, with n·log n for comparison; the suffix says in which format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    forms = list(dict.fromkeys(p["form"] for p in record["points"]))
    figure = Figure(figsize=(6.2 * len(forms), 5.6), layout="constrained")
    panels = figure.subplots(1, len(forms), sharey=True, squeeze=False)[0]
    slopes = {(f["form"], f["stage"]): f["exponent"] for f in record["fits"]}
    for panel, form in zip(panels, forms, strict=True):
        points = [p for p in record["points"] if p["form"] == form]
        nodes = np.array([p["nodes"] for p in points], dtype=float)
        for stage in points[0]["seconds"]:
            said = f"{stage} ({slopes[form, stage]:.2f})" if (form, stage) in slopes else stage
            panel.loglog(nodes, [max(p["seconds"][stage], 1e-6) for p in points], "o-", markersize=3, linewidth=1, label=said)
        reference = nodes * np.log(nodes)
        highest = max(points[-1]["seconds"].values())
        panel.loglog(nodes, reference / reference[-1] * highest, "--", color="0.6", label="n·log n")
        panel.set(title=form, xlabel="nodes")
        panel.grid(True, which="both", color="0.92", linewidth=0.5)
        panel.legend(fontsize=7)
    panels[0].set_ylabel("seconds of processor time, one thread")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="How the time to optimize grows with the graph.")
    add = parser.add_argument
    add("--out", type=Path, help="write the measurements to this JSON file")
    add("--plot", type=Path, help="draw them into this file (.svg, .png); needs matplotlib")
    add("--sizes", type=_sizes, default=SIZES, help=f"nodes, separated by commas (default: {','.join(map(str, SIZES))})")
    add("--forms", type=lambda text: text.split(","), default=list(graphs.FORMS), help=f"of {', '.join(graphs.FORMS)}")
    add("--rounds", type=int, default=3, help="of each size; the least counts (default: 3)")
    add("--seed", type=int, default=0)
    add("--from", dest="start", type=int, default=FITTED_FROM, help="exponents are fitted from this size on")
    given = parser.parse_args(arguments)
    unknown = [form for form in given.forms if form not in graphs.FORMS]
    if unknown:
        parser.error(f"there is no form {unknown[0]!r}; there are {', '.join(graphs.FORMS)}")
    if given.plot is not None:
        try:
            import matplotlib.figure  # noqa: F401  said before an hour of measuring, not after
        except ImportError:
            parser.error("--plot needs matplotlib: pip install -c constraints.txt -e '.[bench]'")
    torch.set_num_threads(1)
    measure(100, given.forms[0])  # imports, and whatever else happens once
    record = {
        "schema": SCHEMA, "date": results.now(), "commit": results.commit(ROOT), "command": results.command(sys.argv),
        "machine": results.machine(), "versions": results.versions(), "points": [], "fits": [],
        "settings": {"sizes": list(given.sizes), "forms": given.forms, "rounds": given.rounds, "seed": given.seed,
                     "fitted_from": given.start, "threads": 1},
    }  # fmt: skip
    for form in given.forms:
        for size in given.sizes:
            print(f"{form}, {size} nodes", file=sys.stderr, flush=True)
            record["points"].append(measure(size, form, given.seed, given.rounds))
            record["fits"] = fits(record["points"], given.start)
            if given.out is not None:  # after every size: what is interrupted is not lost
                results.write(record, given.out)
    print(table(record))
    if given.plot is not None:
        plot(record, given.plot)
    return 0


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(sorted({int(part) for part in text.split(",")}))
    if not sizes or sizes[0] < 1:
        raise argparse.ArgumentTypeError("sizes are positive")
    return sizes


if __name__ == "__main__":
    sys.exit(main())
