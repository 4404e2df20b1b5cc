#!/usr/bin/env python
"""Print files of measurements as a Markdown table: `python bench/table.py bench/results/x.json ...`.

Every number is read from the files, so a table in a README is what was measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0:1] = []
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import results

HEADER = ("peer", "median ms", "min ms", "p95 ms", "times eager", "SQNR dB", "prepare s", "peak MB")


def table(record: dict[str, Any]) -> str:
    """All models of one file: where it was measured, then a table per model, peers that gave no time below it."""
    return "\n\n".join([_heading(record), *(_model(model) for model in record["models"])])


def summary(record: dict[str, Any]) -> str:
    """One table for the whole file: a row per model, a column per peer, medians in ms and how many times eager."""
    names = list(dict.fromkeys(peer["peer"] for model in record["models"] for peer in model["peers"]))
    rows = []
    for model in record["models"]:
        by_name = {peer["peer"]: peer for peer in model["peers"]}
        rows.append([model["model"], *(_brief(by_name.get(name)) for name in names)])
    return _heading(record) + "\n\n" + _markdown(["model", *names], rows)


def _heading(record: dict[str, Any]) -> str:
    machine, settings, versions = record["machine"], record["settings"], record["versions"]
    commit = record["commit"] or {"hash": "no commit", "dirty": False}
    flags = [flag for flag in machine["flags"] if flag not in ("avx2", "avx512f")]
    return (
        f"{machine['cpu']}, {machine['physical_cores']} cores ({', '.join(flags) or 'no int8 or bf16 instructions'}), "
        f"{settings['threads']} threads, torch {versions['torch']}; {settings['rounds']} interleaved rounds of "
        f"{settings['calls']} calls; {record['date'][:10]}, commit {commit['hash'][:10]}"
        f"{' with changes' if commit['dirty'] else ''}."
    )


def _model(model: dict[str, Any]) -> str:
    timed = [peer for peer in model["peers"] if peer["status"] == "ok"]
    notes = [
        f"- {peer['peer']}: time by backend: {_shares(peer)}" for peer in timed if peer["details"].get("backend_shares")
    ]
    untimed = [f"- {peer['peer']}: {peer['status']}: {peer['reason']}" for peer in model["peers"] if peer not in timed]
    parts = [f"**{model['model']}**: {model['description']}, {model['parameters'] / 1e6:.1f} M parameters"]
    if timed:
        parts.append(_markdown(HEADER, [_row(peer) for peer in timed]))
    return "\n\n".join(parts + (["\n".join(notes + untimed)] if notes or untimed else []))


def _shares(peer: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {share:.0%}" for name, share in peer["details"]["backend_shares"].items() if share >= 0.005
    )


def _row(peer: dict[str, Any]) -> list[str]:
    latency = peer["latency"]
    return [
        peer["peer"],
        *(_number(latency[name]) for name in ("median_ms", "min_ms", "p95_ms")),
        f"{peer['speedup']['median']:.2f}" if peer["speedup"] else "",
        f"{peer['sqnr_db']:.1f}",
        _number(peer["prepare_s"]),
        "" if peer["peak_memory_mb"] is None else f"{peer['peak_memory_mb']:.0f}",
    ]


def _brief(peer: dict[str, Any] | None) -> str:
    if peer is None:
        return ""
    if peer["status"] != "ok":
        return peer["status"]
    times = f" ({peer['speedup']['median']:.2f}×)" if peer["speedup"] else ""
    return _number(peer["latency"]["median_ms"]) + times


def _number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _markdown(header: list[str] | tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> int:
    """The command line; 1 where a file is not a file of measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--summary", action="store_true", help="one row per model, one column per peer")
    options = parser.parse_args()
    for path in options.files:
        try:
            print((summary if options.summary else table)(results.load(path)), end="\n\n")
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
