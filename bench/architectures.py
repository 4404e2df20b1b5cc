#!/usr/bin/env python
"""How often each fusion fires on the survey's architectures, against what their configurations say.

    python bench/architectures.py                                # all of them: counts, numerics, differences
    python bench/architectures.py bert swin --attention default  # some; attention as transformers chooses it
    python bench/architectures.py --out bench/results/architectures.json --table bench/results/architectures.md

Each is captured with its attention written out, sent through the default pipeline, and compared with eager on two inputs,
one of them not the example, by the rule of exact passes (``graphwright.numerics.Exact``). Nothing is lowered or timed here.
"""

from __future__ import annotations

import argparse
import json
import operator
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

if __package__ in (None, ""):
    sys.path[0:1] = []
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import results, zoo
from graphwright.capture import capture
from graphwright.ir import Program, args_by_name
from graphwright.manager import PassRecord, Pipeline
from graphwright.numerics import Exact, run_double
from graphwright.ops.fused import activation_of
from graphwright.passes.pipeline import default_recipe
from graphwright.structure import flatten, flatten_call

SCHEMA = "graphwright-architectures/1"
Records = Sequence[PassRecord]


# -- counting --------------------------------------------------------------------------------------------------------


def _changes(name: str, saying: str = "") -> Callable[[Program, Records], int]:
    return lambda program, records: sum(saying in what for r in records if r.name == name for _, what in r.result.changes)


def _nodes(*ops: str, where: Callable[[dict[str, Any]], bool] = lambda given: True) -> Callable[[Program, Records], int]:
    return lambda program, records: sum(1 for n in program.nodes if _op(n) in ops and where(args_by_name(n)))


def _op(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.replace("::", ".") if schema is not None else ""


def _gates(program: Program, records: Records) -> int:
    """Products of a part of something with an activation of its other part."""

    def part(node: Any) -> Any:
        return node.args[0] if isinstance(node, fx.Node) and node.target is operator.getitem else None

    def active(node: Any) -> Any:
        known = isinstance(node, fx.Node) and _op(node) and activation_of(node.target, args_by_name(node))
        return part(node.args[0]) if known else None

    pairs = [tuple(n.args[:2]) for n in program.nodes if _op(n) == "aten.mul"]
    return sum(any(part(b) is not None and part(b) is active(a) for a, b in (p, p[::-1])) for p in pairs)


OURS = ("graphwright.linear", "graphwright.conv")

#: What is counted: in the program that the pipeline gives, or in the records of the passes that made it.
FUSIONS: dict[str, tuple[str, Callable[[Program, Records], int]]] = {
    "attention": ("attention ops in the result", _nodes("aten.scaled_dot_product_attention", "graphwright.attention")),
    "raised attention": ("of them, written out in the model", _changes("raise-attention")),
    "heads": ("attention that gives merged heads", _changes("merge-heads")),
    "norms": ("layer, RMS and group norms in the result",
              _nodes("aten.layer_norm", "aten.rms_norm", "aten.group_norm", "graphwright.add_norm")),
    "raised norms": ("of them, written out in the model", _changes("raise-norms")),
    "raised activations": ("activations written out in the model", _changes("raise-activations")),
    "activations": ("activations drawn into a linear or convolution", _nodes(*OURS, where=lambda g: g["activation"] != "none")),
    "residuals": ("residual adds drawn into a linear or convolution", _nodes(*OURS, where=lambda g: g["other"] is not None)),
    "merged": ("groups of linears merged into one", _changes("merge-linears", "linears merged")),
    "gates": ("gated feed-forward parts (SwiGLU, GeGLU) over one product", _gates),
    "batch norms": ("batch norms folded", _changes("fold-batch-norm")),
    "softmax": ("softmaxes left by themselves", _nodes("aten.softmax", "aten._softmax")),
}  # fmt: skip


def counts(program: Program, records: Records) -> dict[str, int]:
    """Every fusion that was found, and how often; zeros left out."""
    found = {name: count(program, records) for name, (_, count) in FUSIONS.items()}
    return {name: n for name, n in found.items() if n}


# -- one architecture ------------------------------------------------------------------------------------------------


def survey(architecture: zoo.Architecture, attention: str = "eager") -> dict[str, Any]:
    """One row of the table.

    Returns:
        ``name, family, model, captured`` (whole), ``reasons`` (why not), ``nodes`` before and after, ``expected`` and
        ``found`` per fusion, ``undone`` (passes whose work was thrown away, with the reason), ``numerics`` (None where
        right, else what is wrong), ``refusals`` (reason to number of sites) and ``seconds``.
    """
    start, model = time.perf_counter(), architecture.build(attention)
    example = architecture.example(model.config)
    row: dict[str, Any] = {"name": architecture.name, "family": architecture.family, "model": architecture.model,
                           "captured": False, "reasons": [], "nodes": None, "expected": architecture.expected(model.config),
                           "found": {}, "undone": [], "numerics": "not captured", "refusals": {}, "seconds": 0.0}  # fmt: skip
    found = capture(model, (), example)
    row["reasons"] = [str(r) for r in found.regions]
    if found.program is not None:
        program = found.program
        program.example = tuple(flatten_call((), example)[0])
        after, records = Pipeline(default_recipe()).run(program)
        row |= {"captured": True, "nodes": [len(program.nodes), len(after.nodes)], "found": counts(after, records),
                "undone": [f"{r.name}: {r.undone}" for r in records if r.undone],
                "refusals": _refusals(records),
                "numerics": _wrong(model, program, after, [example, architecture.example(model.config, seed=2)])}  # fmt: skip
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _refusals(records: Records) -> dict[str, int]:
    found: dict[str, int] = {}
    for record in records:
        for _, reason in record.result.refusals:
            line = f"{record.name}: {reason}"
            found[line] = found.get(line, 0) + 1
    return found


def _wrong(model: nn.Module, program: Program, after: Program, inputs: Sequence[zoo.Inputs]) -> str | None:
    """None where the program that passes made is right on every input by the rule of exact passes, else what is wrong."""
    for k, given in enumerate(inputs):
        leaves = tuple(flatten_call((), given)[0])
        with torch.no_grad():
            eager, ours = flatten(model(**given))[0], after(*leaves)
        # the captured program in float64, not the model: what torch.export was told to compute in float32 is widened too
        for place, (ref, was, now) in enumerate(zip(run_double(program, leaves), eager, ours, strict=True)):
            if problem := Exact().failure(ref, was, now):
                return f"input {k}, output {place}: {problem}"
    return None


def differences(row: dict[str, Any]) -> list[str]:
    """``"heads: 3 expected, 0 found"`` for every fusion where the two differ."""
    names = dict.fromkeys([*row["expected"], *row["found"]])
    return [f"{n}: {row['expected'].get(n, 0)} expected, {row['found'].get(n, 0)} found"
            for n in names if row["expected"].get(n, 0) != row["found"].get(n, 0)]  # fmt: skip


# -- the table -------------------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> str:
    """A record as Markdown: a row per architecture; a cell is what was found, with what was expected where that differs."""
    rows, versions = record["architectures"], record["versions"]
    whole, right = sum(r["captured"] for r in rows), sum(r["numerics"] is None for r in rows)
    lines = [
        f"# Fusions on {len(rows)} architectures of transformers",
        "",
        (f"Printed by `bench/architectures.py`; {record['date'][:10]}, commit {(record['commit'] or {'hash': 'none'})['hash'][:10]}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}. Tiny configurations, random weights, attention: {record['attention']}."),
        "",
        (f"Captured whole: {whole} of {len(rows)}. Right by the numerics rule: {right} of {len(rows)}. "
        f"Every count as expected: {sum(not differences(r) for r in rows)} of {len(rows)}."),
        "",
        "A cell is the number found, which is the number that the configuration says unless `of` tells another. Empty: none, and none expected.",
        "",
        *(f"- **{name}**: {meaning}" for name, (meaning, _) in FUSIONS.items()),
        "",
        "| architecture | " + " | ".join(FUSIONS) + " | nodes | numbers |",
        "| --- | " + " | ".join("---:" for _ in FUSIONS) + " | ---: | --- |",
    ]
    for row in rows:
        cells = [_cell(row, name) for name in FUSIONS]
        nodes = " → ".join(map(str, row["nodes"])) if row["nodes"] else "in parts"
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {nodes} | {'right' if row['numerics'] is None else row['numerics']} |")
    notes = [f"- {row['name']}: {x}" for row in rows for x in (*row["reasons"], *row["undone"])]
    return "\n".join([*lines, *(["", *notes] if notes else []), ""])


def _cell(row: dict[str, Any], name: str) -> str:
    found, expected = row["found"].get(name, 0), row["expected"].get(name, 0)
    return (str(found) if found else "") if found == expected else f"{found} of {expected}"


def record(rows: list[dict[str, Any]], attention: str) -> dict[str, Any]:
    """Rows with when and with what they were found."""
    versions = {k: v for k, v in results.versions().items() if k in ("python", "torch", "transformers", "numpy")}
    return {"schema": SCHEMA, "date": results.now(), "commit": results.commit(Path(__file__).parent), "versions": versions,
            "attention": attention, "architectures": rows}  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; all of them where none is named")
    parser.add_argument("--attention", choices=("eager", "default"), default="eager", help="written out, or as transformers chooses")
    parser.add_argument("--out", type=Path, help="write the record to this JSON file")
    parser.add_argument("--table", type=Path, help="write the table to this Markdown file")
    parser.add_argument("--refusals", action="store_true", help="print why sites were left alone")
    given = parser.parse_args(words)
    warnings.filterwarnings("ignore")
    rows = []
    for architecture in [zoo.get(n) for n in given.names] or zoo.ARCHITECTURES:
        rows.append(row := survey(architecture, given.attention))
        print(f"{row['name']}: {row['found']} {row['seconds']} s", flush=True)
        for line in (*row["reasons"], *row["undone"], *differences(row), *([row["numerics"]] if row["numerics"] else [])):
            print(f"    {line}", flush=True)
        if given.refusals:
            for line, n in row["refusals"].items():
                print(f"      {n} x {line}", flush=True)
    made = record(rows, given.attention)
    if given.out:
        given.out.write_text(json.dumps(made, indent=1) + "\n")
    if given.table:
        given.table.write_text(table(made))
    return 0 if all(r["captured"] and r["numerics"] is None and not differences(r) for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
