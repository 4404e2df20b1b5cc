"""``fast.profile``: what it counts is what ran, it leaves no trace, and its files open elsewhere."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import graphwright as gw
from graphwright.report.profile import Profile


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


@pytest.fixture(scope="module")
def fast() -> gw.Optimized:
    x = torch.randn(2, 3, 12, 12)
    return gw.optimize(model(), x, "int8", calibration=[x], goal=gw.Goal(size_mb=100))  # kept, even where it is not faster


def assert_adds_up(found: Profile) -> None:
    """Every event lies in a program, every program in its call, none overlaps, and the shares leave the rest over."""
    for r in found.rounds:
        assert r.whole.begin < r.whole.end
        spans = [(e.begin, e.end) for e in r.events]
        assert spans == sorted(spans) and all(a[1] <= b[0] for a, b in pairwise(spans))
        for program in r.programs:
            assert r.whole.begin <= program.begin <= program.end <= r.whole.end
        assert all(any(p.begin <= e.begin <= e.end <= p.end for p in r.programs) for e in r.events)
    assert 0 <= sum(row.share for row in found.rows) <= 1
    assert all(0 < row.min_ms <= row.median_ms for row in found.rows)
    assert found.kernels_ms >= 0 and found.between_ms >= 0 and found.around_ms >= 0


def test_a_row_per_step(fast):
    found = fast.profile(torch.randn(2, 3, 12, 12), rounds=4)
    runner = fast._first().built.lowered.runner
    assert_adds_up(found)
    assert [(r.part.site, r.part.kernel, r.calls) for r in found.rows] == [(s.site, s.name, 1) for s in runner.steps]
    assert len(found.rounds) == 4 == found.plain.rounds
    conv = next(r for r in found.rows if r.part.op == "graphwright.conv")
    assert conv.part.sites == ("0", "1", "2") and conv.part.flops == 2 * 2 * 8 * 100 * 27 and conv.part.bytes
    assert conv.gflops_per_s == pytest.approx(conv.part.flops / conv.median_ms / 1e6)
    assert "forward" not in vars(runner), "nothing stays in the runner"


def test_bytes_are_those_of_the_dtypes_that_run():
    model, x = nn.Linear(256, 256, bias=False).eval(), torch.randn(64, 256)
    floats = gw.optimize(model, x, goal=gw.Goal(size_mb=1)).profile(x, rounds=3)
    ints = gw.optimize(model, x, "int8", calibration=[x], goal=gw.Goal(size_mb=1)).profile(x, rounds=3)
    (linear,) = [r.part for r in floats.rows if "linear" in r.part.op]
    assert linear.bytes == 4 * (256 * 256 + 2 * 64 * 256)
    for part in (r.part for r in ints.rows if "linear" in r.part.op and "int8" in r.part.kernel):
        assert part.bytes < linear.bytes / 2


def test_repeated_blocks_stand_together():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)) for _ in range(6))).eval()
    found = gw.optimize(net, torch.randn(8, 32), [], goal=gw.Goal(size_mb=1)).profile(torch.randn(8, 32), rounds=3)
    assert len(found.rows) >= 12 > len(found.alike)
    assert sum(r.calls for r in found.rows) == sum(r.calls for r in found.alike)
    assert sum(r.share for r in found.rows) == pytest.approx(sum(r.share for r in found.alike))
    for row in found.alike:
        if row.part.flops:
            assert row.gflops_per_s == pytest.approx(row.part.flops * row.calls / row.median_ms / 1e6)
    assert "*" in str(found) and "*" not in found.text(full=True)


def test_the_table(fast):
    found = fast.profile(torch.randn(2, 3, 12, 12), rounds=3)
    for width in (60, 80, 100, 160):
        lines = found.text(width=width).splitlines()
        assert width < 80 or max(map(len, lines)) <= max(width, 120)
    text = str(found)
    assert text.startswith("Sequential on 2x3x12x12: 3 rounds") and "0 +2" in text and "whole call" in text and "between them" in text
    assert "\x1b" not in text


def test_chrome_trace(fast, tmp_path):
    found = fast.profile(torch.randn(2, 3, 12, 12), rounds=3)
    text = found.to_chrome_trace(tmp_path / "trace.json")
    data = json.loads((tmp_path / "trace.json").read_text())
    assert json.loads(text) == data
    assert_opens(data)
    slices = [e for e in data["traceEvents"] if e["ph"] == "X"]
    assert [e["name"] for e in slices if e["cat"] == "call"] == ["call 1", "call 2", "call 3"]
    steps = [e for e in slices if "kernel" in e["args"]]
    assert len(steps) == 3 * len(found.rows) and {e["args"]["kernel"] for e in steps} == {r.part.kernel for r in found.rows}


def assert_opens(data: dict[str, Any]) -> None:
    """What the Trace Event Format asks of complete and metadata events, and that slices of a thread nest."""
    assert set(data) >= {"traceEvents", "displayTimeUnit"} and data["displayTimeUnit"] in ("ms", "ns")
    for e in data["traceEvents"]:
        assert e["ph"] in ("X", "M") and isinstance(e["name"], str) and isinstance(e["args"], dict)
        assert isinstance(e["pid"], int) and isinstance(e["tid"], int) and isinstance(e["ts"], (int, float)) and e["ts"] >= 0
        if e["ph"] == "M":
            assert e["name"] in ("process_name", "thread_name") and isinstance(e["args"]["name"], str)
        else:
            assert isinstance(e["dur"], (int, float)) and e["dur"] >= 0 and isinstance(e["cat"], str)
    open_: list[float] = []
    for e in sorted((e for e in data["traceEvents"] if e["ph"] == "X"), key=lambda e: (e["ts"], -e["dur"])):
        while open_ and open_[-1] <= e["ts"]:
            open_.pop()
        assert not open_ or e["ts"] + e["dur"] <= open_[-1] + 1e-6
        open_.append(e["ts"] + e["dur"])


def test_json(fast, tmp_path):
    found = fast.profile(torch.randn(2, 3, 12, 12), rounds=3)
    data = json.loads(found.to_json(tmp_path / "p.json"))
    assert data == json.loads((tmp_path / "p.json").read_text()) == found.to_dict()
    assert len(data["rows"]) == len(found.rows) and data["rows"][0]["kernel"] == found.rows[0].part.kernel
    with pytest.raises(gw.SaveError, match="cannot be written"):
        found.to_json(tmp_path / "no" / "p.json")
    with pytest.raises(gw.SaveError, match="cannot be written"):
        found.to_chrome_trace(tmp_path)


def test_after_load_and_on_the_command_line(fast, tmp_path):
    from graphwright.cli import app

    fast.save(tmp_path / "m.gw")
    found = gw.load(tmp_path / "m.gw").profile(torch.randn(2, 3, 12, 12), rounds=3)
    assert_adds_up(found)
    assert [r.part for r in found.rows] == [r.part for r in fast.profile(torch.randn(2, 3, 12, 12), rounds=3).rows]
    given = [str(tmp_path / "m.gw"), "--rounds", "3", "--trace", str(tmp_path / "t.json"), "--json", str(tmp_path / "p.json"), "-q"]
    result = CliRunner().invoke(app, ["profile", *given])
    assert result.exit_code == 0, result.output
    assert "whole call" in result.stdout and f"trace: {tmp_path / 't.json'}" in result.stdout
    assert_opens(json.loads((tmp_path / "t.json").read_text()))
    assert json.loads((tmp_path / "p.json").read_text())["rounds"] == 3
    assert CliRunner().invoke(app, ["profile", *given, "--inputs", "2x4x12x12"]).exit_code == 2
    assert CliRunner().invoke(app, ["profile", str(tmp_path / "m.gw"), "--trace", str(tmp_path / "no" / "t.json")]).exit_code == 2


def test_inputs():
    net = nn.Linear(4, 4).eval()
    fast = gw.optimize(net, torch.randn(2, 4))
    assert fast.profile(rounds=3).inputs == "2x4", "those that optimize saw"
    assert fast.profile(torch.randn(5, 4), rounds=3).inputs == "5x4", "captured anew"
    with pytest.raises(gw.InputError, match="rounds=0"):
        fast.profile(rounds=0)


def test_without_any_inputs(tmp_path):
    fast = gw.optimize(nn.Linear(4, 4).eval(), torch.randn(2, 4))
    fast.save(tmp_path / "m.gw")
    again = gw.load(tmp_path / "m.gw")
    with pytest.raises(gw.InputError, match="no inputs are given"):
        again.profile()
    with pytest.raises(gw.CoverageError):
        again.profile(torch.randn(3, 4))


def test_open_sizes_count_as_they_are():
    fast = gw.optimize(nn.Linear(8, 16, bias=False).eval(), torch.randn(4, 8), dynamic="auto")
    for batch in (4, 32):
        (row,) = fast.profile(torch.randn(batch, 8), rounds=3).rows
        assert row.part.flops == 2 * batch * 8 * 16 and row.part.bytes == 4 * (batch * 8 + 8 * 16 + batch * 16)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        x += 1
        return torch.nn.functional.dropout(x, 0.5) * self.count


def test_state_inputs_and_random_numbers_stay():
    fast = gw.optimize(Counting().eval(), torch.ones(3))
    x, state = torch.ones(3), torch.get_rng_state()
    before = fast.program.tensor("count").clone()
    found = fast.profile(x, rounds=3)
    assert torch.equal(x, torch.ones(3)) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(fast.program.tensor("count"), before)
    assert found.rows[-1].part.kernel == "write back"
    assert_adds_up(found)


class InPieces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        self.second = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if float(y.sum().numpy()) > 1e9:  # what torch.export does not take
            y = -y
        return self.second(self.second(y))


def test_a_model_in_pieces():
    torch.manual_seed(0)
    fast = gw.optimize(InPieces().eval(), torch.randn(8, 64), goal=gw.Goal(size_mb=100))
    found = fast.profile(torch.randn(8, 64), rounds=3)
    assert_adds_up(found)
    assert found.uncaptured and any("not captured" in n for n in found.notes)
    if found.rows:  # else no piece was faster, and none runs
        assert [p.name for p in found.rounds[0].programs] == ["first", "second", "second"]
        assert max(r.calls for r in found.rows) == 2
        assert "code that was not captured" in " ".join(str(found).split())
    assert_opens(json.loads(found.to_chrome_trace()))


def test_a_graph_that_runs_unchanged():
    fast = gw.optimize(nn.Identity().eval(), torch.randn(2, 3))
    assert_adds_up(fast.profile(torch.randn(2, 3), rounds=3))
    assert "unchanged" in str(fast.profile(torch.randn(2, 3), rounds=3))


def test_other_threads_run_meanwhile(fast):
    """What another thread calls while a profile is made is not counted."""
    import threading

    x, stop = torch.randn(2, 3, 12, 12), threading.Event()

    def work() -> None:
        while not stop.is_set():
            fast(x)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        found = fast.profile(x, rounds=3)
    finally:
        stop.set()
        thread.join()
    assert all(r.calls == 1 for r in found.rows) and all(len(r.programs) == 1 for r in found.rounds)
