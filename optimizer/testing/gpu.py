"""Numbers of the Triton kernels: every sample of every kernel against its op's reference, in the interpreter or on a GPU.

    TRITON_INTERPRET=1 python -m graphwright.testing.gpu [kernels ...] [--every]

Each sample runs under the config that a call would take and under one other, so that all configs get their turn; with
``--every``, under each that fits.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from graphwright.errors import CheckError
from graphwright.kernel import Sample
from graphwright.kernels import gpu
from graphwright.kernels.gpu import machine, tuning
from graphwright.kernels.gpu.launch import Config, Family
from graphwright.testing.kernels import arguments, check_kernel


def trials(family: Family, every: bool = False, large: bool = True) -> Iterator[tuple[Sample, Config]]:
    """Which samples to run under which configs; large ones only where there is a GPU, and where they are wanted. Nothing is timed
    to find out; none for a kernel that is for other GPUs than this."""
    kernel, found = family.kernel(), machine.here()
    if found is not None and found.target and found.target not in family.targets:
        return
    for k, sample in enumerate(s for s in family.samples() if not s.bench or large and not gpu.interpreting()):
        args = arguments(kernel, sample)
        fitting = [c for c in family.configs if family.fits(c, *args) is None]
        with tuning.frozen():
            own = tuning.choose(family, args)
        del args
        yield from ((sample, c) for c in (fitting if every else dict.fromkeys([own, fitting[k % len(fitting)]])))


def check(family: Family, sample: Sample, config: Config) -> str | None:
    """None, or what is wrong with a kernel's result on a sample under a config."""

    def run(*args: Any) -> Any:
        return family.under(config, *args)

    try:
        check_kernel(replace(family.kernel(), run=run), samples=[sample], threads=(1,))
    except CheckError as error:
        return str(error)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line per trial; 1 where one fails."""
    parser = argparse.ArgumentParser(prog="graphwright.testing.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kernels", nargs="*", help="only these kernels")
    parser.add_argument("--every", action="store_true", help="every sample under every config that fits")
    options = parser.parse_args(argv)
    if not gpu.wanted():
        parser.error(gpu.unavailable() or "there is no GPU; set TRITON_INTERPRET=1 to run in the interpreter")
    families = gpu.families()
    if unknown := sorted(set(options.kernels) - set(families)):
        parser.error(f"no kernel {', '.join(unknown)}; there are {', '.join(sorted(families))}")
    failures = count = 0
    for name in options.kernels or sorted(families):
        for sample, config in trials(families[name], options.every):
            begin = time.perf_counter()
            problem = check(families[name], sample, config)
            print(f"{name}: {sample.name} under {config}: {problem or 'ok'} ({time.perf_counter() - begin:.1f} s)", flush=True)
            failures, count = failures + bool(problem), count + 1
    print(f"{count} trials, {failures} failures")
    return int(bool(failures) or not count)


if __name__ == "__main__":
    sys.exit(main())
