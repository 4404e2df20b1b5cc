"""Every code block of the README runs as it stands."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _, name, body in BLOCKS:
        if name:
            (tmp_path / name).write_text(body, encoding="utf-8")
    return tmp_path


def test_no_block_escapes():
    fences = len(re.findall(r"^```", TEXT, re.MULTILINE))
    assert fences == 2 * len(BLOCKS)
    assert {kind for kind, _, _ in BLOCKS} == {"python", "sh"}


def test_python_blocks(here):
    """In order, in one namespace, as a reader would paste them."""
    from graphwright.kernel_registry import registered, unregister_kernel
    from graphwright.ops.extend import unregister_op
    from graphwright.passes.pipeline import unregister_pass

    code = "\n".join(body for kind, name, body in BLOCKS if kind == "python" and not name)
    scope: dict = {"__name__": "readme"}
    try:
        exec(compile(code, "README.md", "exec"), scope)  # noqa: S102
    finally:
        unregister_pass("fuse-squared-relu")
        unregister_op("mylib.softsign")
        for kernel in list(registered("mylib.softsign")):
            unregister_kernel(kernel)
    assert (here / "small.gw").exists()
    assert scope["again"](scope["x"]).shape == (8, 10)


def test_shell_blocks(here):
    from typer.testing import CliRunner

    from graphwright.cli import app

    for kind, _, body in BLOCKS:
        if kind != "sh":
            continue
        for line in body.strip().splitlines():
            program, *words = shlex.split(line)
            assert program == "graphwright"
            ran = CliRunner().invoke(app, words, env={**os.environ, "COLUMNS": "120"})
            assert ran.exit_code == 0, f"{line}\n{ran.output}"
            assert ran.output.strip()


def test_the_two_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^    make (\w+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)


def test_floors_are_those_that_are_tested():
    """The architecture table names exactly the modules that the floors test knows."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("floors", ROOT / "tests/system/test_floors.py")
    floors = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(floors)
    rows = re.findall(r"^\| (\d) \| (.*?) \|", TEXT, re.MULTILINE)
    for number, cell in rows:
        named = set(re.findall(r"`([\w/]+)`", cell))
        known = {m for m in floors.FLOORS[int(number)] if f"graphwright.{m}" in floors.MODULES}
        unlisted = known - {n.rstrip("/") for n in named}
        assert unlisted <= {"console", "userfile", "dynamo", "checkup", "listing", "output"}, f"floor {number}: {unlisted}"


def test_measured_numbers_come_from_result_files():
    """Every row of a results table in the README stands so in the tables of the files that the README names."""
    import importlib.util
    import json

    from graphwright.microbench.results import summary

    spec = importlib.util.spec_from_file_location("bench_table", ROOT / "bench/table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    files = sorted(set(re.findall(r"`(bench/results/\S+\.json)`", TEXT)))
    assert files
    for record in (r for f in files if "results" in (r := json.loads((ROOT / f).read_text()))):
        assert [row for row in summary(record) if row not in TEXT] == []
    records = [r for f in files if "models" in (r := json.loads((ROOT / f).read_text()))]
    decoded = [r for r in records if "decode" in r["schema"]]
    for peer in (p for r in decoded for m in r["models"] for p in m["peers"]):
        assert f"{peer['tokens_per_second']['median']:.1f}" in TEXT, peer["peer"]
    records = [r for r in records if r not in decoded]
    printed = "\n".join(show(r) for r in records for show in (table.table, table.summary))
    rows = re.findall(r"^\| [\w-]+ \| [\d.]+ (?:\|.*|\(.*)\|$", TEXT, re.MULTILINE)
    assert len(rows) >= 5
    for row in rows:
        assert row in printed, row
