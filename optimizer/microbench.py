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
from typing import Any

import torch
from torch import Tensor

from graphwright import kernels, measure, ops
from graphwright.errors import InternalError
from graphwright.kernel import Kernel, Sample
from graphwright.numerics import Exact, rms

#: Largest share of integer results that may differ (by the kernel's own number of steps).
RARELY = 2e-3


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


def _reference(kernel: Kernel) -> Any:
    for row in ops.rows():
        if row.name == kernel.op:
            return row.reference
    raise InternalError(f"kernel {kernel.op} has no row in the op table")


def _widened(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.double()
    return [_widened(v) for v in x] if isinstance(x, list) else x


def _list(out: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def disagreement(kernel: Kernel, sample: Sample, seed: int = 0) -> str | None:
    """None, or how the kernel differs from its op's reference in float64.

    Floats: RMS error at most twice that of the reference in float32 plus 4 eps of the values' RMS (plus the kernel's own
    tolerance); infinities and NaN where the reference has them. Integers: a few differ by few steps (values on a rounding
    boundary). Shapes, dtypes and strides are those of the reference, and the arguments stay as they were.
    """
    args = sample.args(torch.Generator().manual_seed(seed))
    if (reason := kernel.supports(*args)) is not None:
        return f"refused: {reason}"
    reference, (loose, steps) = _reference(kernel), kernel.tolerance
    kept = [t.clone() for t in _tensors(args)]
    with torch.no_grad():
        got = _list(kernel.run(*args))
        narrow = _list(reference(*args))
        wide = _list(reference(*[_widened(a) for a in args]))
    if len(got) != len(narrow):
        return f"{len(got)} results instead of {len(narrow)}"
    for before, after in zip(kept, _tensors(args), strict=True):
        if not torch.equal(before.nan_to_num(), after.nan_to_num()):
            return "an argument was overwritten"
    for k, (value, near, far) in enumerate(zip(got, narrow, wide, strict=True)):
        if value.stride() != near.stride():
            return f"result {k}: strides {value.stride()} instead of {near.stride()}"
        if value.is_floating_point():
            problem = Exact().failure(far, near, value)
            finite = torch.isfinite(near)
            if problem and loose and rms((value.double() - far)[finite]) <= loose * rms(far[finite]):
                problem = None
        else:
            problem = _integer_failure(value, near, far, steps)
        if problem is not None:
            return f"result {k}: {problem}"
    return None


def _integer_failure(value: Tensor, near: Tensor, far: Tensor, steps: int) -> str | None:
    if value.shape != near.shape or value.dtype != near.dtype:
        return f"{tuple(value.shape)} {value.dtype} instead of {tuple(near.shape)} {near.dtype}"
    apart = (value.long() - far.long()).abs()
    if apart.numel() and int(apart.max()) > steps:
        return f"an element is {int(apart.max())} steps off; {steps} are allowed"
    count, allowed = int(apart.count_nonzero()), max(1, int(RARELY * apart.numel()))
    return None if count <= allowed else f"{count} of {apart.numel()} elements differ; {allowed} are allowed"


def _tensors(args: Any) -> Iterator[Tensor]:
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _tensors(a)


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
    reference = _reference(kernel)
    mine, other = measure.interleaved(
        [lambda: kernel.run(*args), lambda: reference(*args)], rounds=rounds, budget_s=2.0, warmup=2
    )
    speed = cost.bytes / mine.minimum / 1e6
    return Result(
        kernel.op, kernel.backend, sample.name, "ok", cost.bytes, cost.flops, mine.minimum, other.minimum, speed,
        cost.flops / mine.minimum / 1e6, speed / copy_bandwidth(kernel.device), spent,
    )  # fmt: skip


def chosen(words: Sequence[str], everything: bool = False) -> Iterator[tuple[Kernel, Sample]]:
    """Kernels of this machine's devices whose op has one of the words in its name (all, without words)."""
    for name, found in sorted(kernels.load().items()):
        for kernel in found:
            here = kernel.device == "cpu" or torch.cuda.is_available()
            if here and (not words or any(word in name for word in words)):
                yield from ((kernel, s) for s in kernel.samples() if s.bench or everything)


def line(r: Result) -> str:
    """One row of the printed table."""
    name = f"{r.op.removeprefix('graphwright.'):<20} {r.sample:<30}"
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
        known = ", ".join(sorted(kernels.load()))
        print(f"no kernel for {' '.join(options.words)!r} on this machine; there are {known}", file=sys.stderr)
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
