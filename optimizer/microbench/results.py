"""What the kernel benchmark found: the record, a line of the table, CSV, and the roofline."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from graphwright.microbench.clock import Times

#: Ratios from here on count as level: what two runs of one call differ by.
LEVEL = 0.97


@dataclass(frozen=True)
class Peer:
    """A peer on one sample: its times, or why it has none. ``ratio``: its median over ours; above 1, ours is faster."""

    name: str
    times: Times | None = None
    ratio: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Result:
    """One kernel on one sample.

    Attributes:
        verdict: ``"ok"``, or why the kernel was not run or what was wrong; then nothing is timed.
        bytes, flops: the least that the call moves and computes.
        unit: what does the arithmetic: ``"int8"``, ``"f32"``, ``"fp16"``, ``"fp8"``.
        times: of calls with cold caches (unless asked otherwise), weights packed ahead, on a GPU as replayed graphs where that can be;
            ``replay``: of many calls in one CUDA graph, caches warm.
        gb_per_s, gop_per_s: by the median.
        of_copy, of_peak: shares of the machine's copy bandwidth and matrix rate, measured in the same run.
        compile_s: processor seconds of the first call in this process (a disk cache shortens it).
    """

    op: str
    backend: str
    sample: str
    verdict: str
    bytes: int = 0
    flops: int = 0
    unit: str = "f32"
    times: Times | None = None
    replay: Times | None = None
    peers: tuple[Peer, ...] = field(default=())
    gb_per_s: float | None = None
    gop_per_s: float | None = None
    of_copy: float | None = None
    of_peak: float | None = None
    compile_s: float | None = None

    @property
    def best_peer(self) -> Peer | None:
        """The fastest of the peers that ran; not the floating-point layer alone, but it too."""
        ran = [p for p in self.peers if p.times is not None]
        return min(ran, key=lambda p: p.times.p50 if p.times else 0.0) if ran else None


HEADER = f"{'op':<26} {'sample':<28} {'ms p50':>9} {'p20':>8} {'p80':>8} {'GB/s':>6} {'copy':>5} {'GOP/s':>7} {'peak':>5}  peers: times as long"


def line(r: Result) -> str:
    """One row of the printed table."""
    own = r.op.startswith("graphwright.") and r.backend in ("llvm", "triton")
    name = f"{r.op.removeprefix('graphwright.') if own else f'{r.op} ({r.backend})':<26} {r.sample:<28}"
    if r.times is None or r.gb_per_s is None or r.gop_per_s is None or r.of_copy is None or r.of_peak is None:
        return f"{name} NOT TIMED: {r.verdict}"
    peers = "  ".join(f"{p.name} {p.ratio:.2f}x" if p.ratio is not None else f"{p.name} –" for p in r.peers)
    t = r.times
    return (f"{name} {t.p50:9.4f} {t.p20:8.4f} {t.p80:8.4f} {r.gb_per_s:6.1f} {100 * r.of_copy:4.0f}% {r.gop_per_s:7.1f} {100 * r.of_peak:4.0f}%  {peers}")  # fmt: skip


def notes(results: Sequence[Result]) -> list[str]:
    """Why peers are missing, each reason once; and where a peer is ahead."""
    found: dict[str, None] = {}
    for r in results:
        for p in r.peers:
            if p.reason:
                found[f"{p.name} for {r.op.removeprefix('graphwright.')}: {p.reason}"] = None
    behind = [(r, p) for r in results if (p := r.best_peer) is not None and p.ratio is not None and p.ratio < 1]
    lines = [f"– {reason}" for reason in found]
    timed = sum(r.times is not None for r in results)
    if timed and any(r.peers for r in results):
        lines.append(f"the best peer is ahead on {len(behind)} of {timed}" + (":" if behind else "."))
        lines += [f"  {r.op.removeprefix('graphwright.')} {r.sample}: {p.name}, {p.ratio:.2f} times as long" for r, p in behind]
    return lines


def write_csv(results: Sequence[Result], path: Path) -> None:
    """One row per kernel and sample, one column of medians per peer."""
    names = list(dict.fromkeys(p.name for r in results for p in r.peers))
    plain = ["op", "backend", "sample", "verdict", "bytes", "flops", "unit", "gb_per_s", "gop_per_s", "of_copy", "of_peak"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*plain, "min_ms", "p20_ms", "p50_ms", "p80_ms", "replay_p50_ms", *(f"{n}_p50_ms" for n in names)])
        for r in results:
            ours = [r.times.least, r.times.p20, r.times.p50, r.times.p80] if r.times else [None] * 4
            theirs = {p.name: p.times.p50 for p in r.peers if p.times}
            writer.writerow([*(getattr(r, n) for n in plain), *ours, r.replay.p50 if r.replay else None, *(theirs.get(n) for n in names)])


def plot(results: Sequence[Result], copy_gb_per_s: float, peaks: dict[str, float], path: Path) -> None:
    """The roofline: rate against operations per byte, a point per kernel and sample, below what was measured of the machine.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    timed = [r for r in results if r.gop_per_s and r.bytes]
    colours = {op: f"C{k % 10}" for k, op in enumerate(dict.fromkeys(r.op for r in timed))}
    for op, colour in colours.items():
        mine = [r for r in timed if r.op == op]
        axes.scatter([r.flops / r.bytes for r in mine], [r.gop_per_s for r in mine], s=18, color=colour, label=op.removeprefix("graphwright."), zorder=3)
    reach = [r.flops / r.bytes for r in timed] or [1.0]
    low, high = min(reach) / 2, max(reach) * 2
    for unit, most in peaks.items():
        bend = most / copy_gb_per_s
        axes.plot([low, max(bend, low), max(high, 2 * bend)], [min(low * copy_gb_per_s, most), most, most], color="0.4", linewidth=1)
        axes.annotate(f"{unit} {most:,.0f} GOP/s", (max(high, 2 * bend), most), ha="right", va="bottom", fontsize=8, color="0.3")
    axes.annotate(f"copy {copy_gb_per_s:.1f} GB/s", (low, low * copy_gb_per_s), ha="left", va="bottom", fontsize=8, color="0.3", rotation=30)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="10⁹ operations per second", title="Kernels below the machine's roofline")
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def summary(record: dict[str, Any]) -> list[str]:
    """A Markdown table of a JSON record: per op, how often it is level with the best peer or ahead, by how much, and what share it reaches."""
    rows = ["| op | layers | level or ahead | best peer's time over ours: least, median, most | of the matrix rate | of the copy rate |", "|---|---:|---:|---:|---:|---:|"]
    timed = [r for r in record["results"] if r["times"]]
    for op in dict.fromkeys(r["op"] for r in timed):
        mine = [r for r in timed if r["op"] == op]
        best = [(min(ran), r) for r in mine if (ran := [p["ratio"] for p in r["peers"] if p["ratio"] is not None])]
        ratios = sorted(ratio for ratio, _ in best)
        spread = f"{ratios[0]:.2f}, {statistics.median(ratios):.2f}, {ratios[-1]:.2f}" if ratios else "–"
        level = str(sum(r >= LEVEL for r in ratios)) if ratios else "–"
        peak, copy = max(r["of_peak"] for r in mine), max(r["of_copy"] for r in mine)
        rows.append(f"| `{op.removeprefix('graphwright.')}` | {len(mine)} | {level} | {spread} | {100 * peak:.0f} % | {100 * copy:.0f} % |")
    return rows


def plain(r: Result) -> dict[str, Any]:
    """JSON data."""
    return asdict(r)


__all__ = ["HEADER", "Peer", "Result", "line", "notes", "plain", "plot", "summary", "write_csv"]
