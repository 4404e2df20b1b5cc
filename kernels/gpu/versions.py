"""Evidence that the kernels compile with versions of Triton other than that of the record.

    python -m graphwright.kernels.gpu.versions [kernels ...] [--target sm_90] [--sample N]     with the Triton that is installed
    python -m graphwright.kernels.gpu.versions --list                                          what is on record

Builds whose evidence stands are left out, so that it goes on where it was stopped. ``resources/versions.json`` has, by kernel,
version and target: how many builds there are, how many were compiled, the day, which of them are no good and why, and a digest of
what the main record says of their sources, by which evidence about older code is told. What is no good is not tried either
where that version runs.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from graphwright.kernels import gpu
from graphwright.kernels.gpu import ahead

#: Where it is kept: kernel -> version -> target -> row.
FILE = ahead.TABLES / "versions.json"


def read(file: Path = FILE) -> dict[str, Any]:
    """All rows; empty where there is no file."""
    return json.loads(file.read_text()) if file.exists() else {}


def write(rows: dict[str, Any], file: Path = FILE) -> None:
    """One row a line."""
    lines = [
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(
            f"  {json.dumps(version)}: {{\n" + ",\n".join(f"   {json.dumps(t)}: {json.dumps(row)}" for t, row in sorted(targets.items())) + "\n  }"
            for version, targets in sorted(versions.items())
        )
        + "\n }"
        for name, versions in sorted(rows.items())
    ]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def of(name: str, target: str) -> str:
    """Digest of the sources that the main record holds for a kernel's builds for a target."""
    sources = sorted((key, row["source"]) for key, row in ahead.read(name).items() if key.endswith(f" | {target}"))
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:16]


def summed_up(name: str, target: str, builds: int, made: dict[str, ahead.Built], day: str) -> dict[str, Any]:
    """A row: what was ``made`` of so many ``builds``; ``refused`` by ``case | config | part``."""
    refused = {_short(key): built.problem for key, built in sorted(made.items()) if built.problem}
    return {"builds": builds, "compiled": len(made), "good": len(made) - len(refused), "spilled": sum(b.spills > 0 for b in made.values()),
            "refused": refused, "of": of(name, target), "date": day}  # fmt: skip


def _short(key: str) -> str:
    return key.partition(" | ")[2].rpartition(" | ")[0]


def stands(row: dict[str, Any] | None, name: str, target: str, wanted: int) -> bool:
    """The row is about the code on record, and about so many builds or more."""
    return row is not None and row["of"] == of(name, target) and row["compiled"] >= wanted


def unexpected(name: str, target: str, row: dict[str, Any]) -> list[str]:
    """Builds that are no good with this version, though the main record holds nothing against their config."""
    return [short for short in row["refused"] if (short.split(" | ")[1], target) not in ahead.problems(name)]


@functools.cache
def problems(name: str, version: str = triton.__version__) -> dict[tuple[str, str], str]:
    """By config and target: what a version of Triton has against a kernel's configs."""
    targets = read().get(name, {}).get(version, {})
    return {(short.split(" | ")[1], target): problem for target, row in targets.items() for short, problem in row["refused"].items()}


def gather(name: str, target: str, sample: int, processes: int, seed: int = 0) -> dict[str, Any] | None:
    """Compile a kernel's builds for a target (``sample`` of them, 0 for all) and give the row; None where it has none."""
    every = list(ahead.builds([name], [target]))
    if not every:
        return None
    work = random.Random(seed).sample(every, min(sample, len(every))) if sample else every
    return summed_up(name, target, len(every), ahead.compile_all(work, processes), datetime.date.today().isoformat())


def listed(rows: dict[str, Any]) -> list[str]:
    """A line per row, for people."""
    return [
        f"{name:<24} {version:<7} {target:<7} {row['good']:>3} of {row['compiled']:>3} good, {row['builds']:>3} in all, {row['spilled']} spilled, {row['date']}"
        + ("" if row["of"] == of(name, target) else ", of older code")
        + "".join(f"\n    worse than on record: {short}: {row['refused'][short]}" for short in unexpected(name, target, row))
        for name, versions in rows.items() for version, targets in versions.items() for target, row in targets.items()
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring; 1 where a build is no good that is good on record."""
    parser = argparse.ArgumentParser(prog="graphwright.kernels.gpu.versions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kernels", nargs="*", help="only these kernels")
    parser.add_argument("--target", action="append", default=[], choices=ahead.TARGETS)
    parser.add_argument("--sample", type=int, default=0, help="so many builds of each kernel and target; without it, all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="compile nothing")
    options = parser.parse_args(argv)
    if gpu.interpreting():
        parser.error("TRITON_INTERPRET is set: nothing can be compiled")
    if unknown := sorted(set(options.kernels) - set(gpu.families())):
        parser.error(f"no kernel {', '.join(unknown)}; there are {', '.join(sorted(gpu.families()))}")
    names = options.kernels or sorted(gpu.families())
    if options.list:
        print("\n".join(listed({name: rows for name, rows in read().items() if name in names})))
        return 0
    bad = 0
    for name in names:
        for target in options.target or ahead.TARGETS:
            every = len(list(ahead.builds([name], [target])))
            row = read().get(name, {}).get(triton.__version__, {}).get(target)
            if not stands(row, name, target, min(options.sample or every, every)):
                row = gather(name, target, options.sample, options.processes)
                if row is not None:
                    rows = read()  # anew: it may have been written meanwhile
                    rows.setdefault(name, {}).setdefault(triton.__version__, {})[target] = row
                    write(rows)
            if row is not None:
                bad += len(unexpected(name, target, row))
                print("\n".join(listed({name: {triton.__version__: {target: row}}})), flush=True)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
