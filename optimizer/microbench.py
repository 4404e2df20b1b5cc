"""The kernel benchmark: every kernel on its samples, checked first, timed only when the check is green.

    python -m graphwright.microbench [words of the name ...] [--json FILE] [--rounds N]
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from graphwright import kernels, measure
from graphwright.kernel import Kernel, Sample
from graphwright.kernel_registry import registered
from graphwright.testing.kernels import disagreement, reference_of


@dataclass(frozen=True)
class Result:
    """One kernel on one sample. Milliseconds are minima over interleaved rounds; None where nothing was timed.

    Attributes:
        verdict: ``"ok"``, or why the kernel was not run or what was wrong.
        reference_ms: the op's reference, chains of ATen calls, on the same arguments.
        gb_per_s: least bytes of the call by its time.
        share: that by the copy bandwidth of this machine.
        compile_s: processor seconds for the first call of the kernel in this process (a disk cache shortens it).
    """

    op: str
    backend: str
    sample: str
    verdict: str
    bytes: int = 0
    flops: int = 0
    ms: float | None = None
    reference_ms: float | None = None
    gb_per_s: float | None = None
    gflop_per_s: float | None = None
    share: float | None = None
    compile_s: float | None = None


@functools.cache
def copy_bandwidth(device: str = "cpu") -> float:
    """GB/s read plus written by a copy far larger than the caches; measured once per process and device."""
    size = max(64 * 2**20, 2 * measure.last_level_cache_bytes())
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if device != "cpu":
            torch.cuda.synchronize()

    best = measure.interleaved([copy], rounds=12)[0].minimum
    return 2 * source.numel() * 4 / best / 1e6


def bench(kernel: Kernel, sample: Sample, rounds: int = 15) -> Result:
    """Check one kernel on one sample and, where it is right, time it beside its reference."""
    begin = time.process_time()
    problem = disagreement(kernel, sample)
    spent = time.process_time() - begin
    args = sample.args(torch.Generator().manual_seed(0))
    cost = kernel.cost(*args)
    if problem is not None:
        return Result(kernel.op, kernel.backend, sample.name, problem, cost.bytes, cost.flops)
    reference = reference_of(kernel)
    mine, other = measure.interleaved(
        [lambda: kernel.run(*args), lambda: reference(*args)], rounds=rounds, budget_s=2.0, warmup=2
    )
    speed = cost.bytes / mine.minimum / 1e6
    return Result(
        kernel.op, kernel.backend, sample.name, "ok", cost.bytes, cost.flops, mine.minimum, other.minimum, speed,
        cost.flops / mine.minimum / 1e6, speed / copy_bandwidth(kernel.device), spent,
    )  # fmt: skip


def known() -> dict[str, list[Kernel]]:
    """Every kernel by its op: Graphwright's own, those that were registered, and those of installed plug-ins."""
    from graphwright.passes.pipeline import load_plugins

    load_plugins()
    found = {op: list(several) for op, several in kernels.load().items()}
    for kernel in registered():
        found.setdefault(kernel.op, []).append(kernel)
    return found


def chosen(words: Sequence[str], everything: bool = False) -> Iterator[tuple[Kernel, Sample]]:
    """Kernels of this machine's devices whose op has one of the words in its name (all, without words)."""
    for name, found in sorted(known().items()):
        for kernel in found:
            here = kernel.device == "cpu" or torch.cuda.is_available()
            if here and (not words or any(word in name for word in words)):
                yield from ((kernel, s) for s in kernel.samples() if s.bench or everything)


def line(r: Result) -> str:
    """One row of the printed table."""
    own = r.op.startswith("graphwright.") and r.backend == "llvm"
    name = f"{r.op.removeprefix('graphwright.') if own else f'{r.op} ({r.backend})':<20} {r.sample:<30}"
    if r.ms is None or r.reference_ms is None or r.gb_per_s is None or r.share is None or r.gflop_per_s is None:
        return f"{name} NOT TIMED: {r.verdict}"
    return (f"{name} {r.ms:9.4f} {r.reference_ms:9.4f} {r.reference_ms / r.ms:6.2f}x {r.bytes / 1e6:8.2f} "
            f"{r.gb_per_s:7.1f} {100 * r.share:5.0f}% {r.gflop_per_s:8.1f}")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a kernel was wrong or refused one of its own samples."""
    parser = argparse.ArgumentParser(prog="graphwright.microbench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", help="only ops whose name contains one of these")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--all", action="store_true", help="the odd samples of the correctness test too")
    options = parser.parse_args(argv)
    pairs = list(chosen(options.words, options.all))
    if not pairs:
        there = ", ".join(sorted(known()))
        print(f"no kernel for {' '.join(options.words)!r} on this machine; there are {there}", file=sys.stderr)
        return 2
    print(f"threads {torch.get_num_threads()}, copy {copy_bandwidth():.1f} GB/s (read + written)")
    print(f"{'op':<20} {'sample':<30} {'ms':>9} {'reference':>9} {'ratio':>7} {'MB':>8} {'GB/s':>7} {'copy':>6} {'GFLOP/s':>8}")
    results = []
    for kernel, sample in pairs:
        results.append(bench(kernel, sample, options.rounds))
        print(line(results[-1]), flush=True)
    if options.json:
        record = {
            "schema": 1, "machine": measure.machine(), "threads": torch.get_num_threads(),
            "copy_gb_per_s": copy_bandwidth(), "results": [asdict(r) for r in results],
        }  # fmt: skip
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(r.verdict != "ok" for r in results))


if __name__ == "__main__":
    sys.exit(main())
