"""Progress: plain lines away from a terminal, nothing when quiet, one changing line on a terminal."""

from __future__ import annotations

import io
import re

from rich.console import Console

from graphwright.console import Progress, out_console


def _written(quiet: bool = False, terminal: bool = False) -> str:
    file = io.StringIO()
    with Progress(quiet=quiet, console=Console(file=file, force_terminal=terminal, width=80)) as say:
        for line in ("capture", "capture", "pass [bold]", "done"):
            say(line)
    return file.getvalue()


def test_plain_lines_are_stamped_and_not_repeated():
    lines = _written().splitlines()
    assert [re.sub(r"^ +\d+\.\d s  ", "", line) for line in lines] == ["capture", "pass [bold]", "done"]


def test_counting_lines_come_now_and_then(monkeypatch):
    clock = iter([0.0, 0.0, *(0.5 * k for k in range(100))])
    monkeypatch.setattr("graphwright.console.time.monotonic", lambda: next(clock))
    file = io.StringIO()
    with Progress(console=Console(file=file)) as say:
        for k in range(20):
            say(f"timing kernels {k + 1}/20: conv{k}")
        say("choosing kernels")
    counts = [int(n) for n in re.findall(r"kernels (\d+)/20", file.getvalue())]
    assert counts == [1, 7, 13, 19] and "choosing kernels" in file.getvalue()


def test_quiet_writes_nothing():
    assert _written(quiet=True) == "" and _written(quiet=True, terminal=True) == ""


def test_a_terminal_gets_a_status_line():
    assert "\x1b[" in _written(terminal=True)


def test_results_are_plain_without_a_terminal(capsys):
    out_console().print("[red]x[/red]" + "y" * 140)
    assert capsys.readouterr().out == "x" + "y" * 140 + "\n"
