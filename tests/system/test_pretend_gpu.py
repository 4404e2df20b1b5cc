"""Whole runs as on a GPU, with one that is none: what is recorded, timed, reported and stored, with the CPU doing the work."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright import accelerator
from graphwright.numerics import sqnr_db
from graphwright.testing.pretend import Pretend


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.two(torch.relu(self.norm(self.one(x))))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    found = Pretend(wall=True)
    monkeypatch.setattr(accelerator, "of", lambda device: found)
    return found


KEEP = gw.Goal(size_mb=100)


def replay(fast):
    return fast._variants[-1].built.lowered.runner.replay


@pytest.mark.parametrize("recipe", ["default", "int8", "w8"])
def test_a_result_replays_and_says_so(cuda, recipe, tmp_path):
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(8, 32)
    batches = [torch.randn(8, 32) for _ in range(3)]
    fast = gw.optimize(model, x, recipe, calibration=batches if recipe == "int8" else None, goal=KEEP)
    assert {"flush", "mark", "record", "replay", "peak"} <= set(cuda.log)
    assert replay(fast).reason is None and replay(fast).shapes == 1
    cuda.log.clear()
    with torch.no_grad():
        kept = fast(x)
        before = kept.clone()
        for batch in batches:
            assert sqnr_db(model(batch), fast(batch)) > 25
    assert cuda.log == ["order", "replay", "mark"] * 4 and torch.equal(kept, before)
    report = fast.report
    assert report.machine["gpu"] == "pretend" and "pretend" in str(report)
    assert any("launches are recorded for 1 shape" in n for n in report.notes)
    assert report.memory_after_mb >= 1.0 + replay(fast).held / 2**20  # what graphs hold counts
    # a copy and a file record for themselves
    other = copy.deepcopy(fast)
    assert replay(other).shapes == 0 and torch.equal(other(x), kept) and replay(other).shapes == 1
    fast.save(tmp_path / "x.gw")
    from graphwright import store

    assert store.peek(tmp_path / "x.gw")["gpu"]["gpu"] == "pretend"


def test_what_cannot_be_recorded_runs_with_the_reason_in_the_report(monkeypatch):
    found = Pretend(refuses=RuntimeError("operation not permitted when stream is capturing"), wall=True)
    monkeypatch.setattr(accelerator, "of", lambda device: found)
    model, x = Net().eval(), torch.randn(8, 32)
    fast = gw.optimize(model, x, goal=KEEP)
    assert any("no CUDA graph: RuntimeError: operation not permitted" in n for n in fast.report.notes)
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)


def test_open_sizes_profiles_and_memory_goals(cuda):
    model, x = Net().eval(), torch.randn(8, 32)
    fast = gw.optimize(model, x, dynamic="auto", goal=gw.Goal(size_mb=100, memory_mb=1e-6))
    assert any("on a GPU the peak stays as it is" in n for n in fast.report.notes)
    with torch.no_grad():
        for rows in (3, 5, 3, 5, 3):
            y = torch.randn(rows, 32)
            assert torch.allclose(fast(y), model(y), atol=1e-5)
    assert fast.profile(x, rounds=3).rows


def test_new_shapes_have_recordings_of_their_own(cuda):
    model, x = Net().eval(), torch.randn(8, 32)
    fast = gw.optimize(model, x, goal=KEEP)
    y = torch.randn(2, 32)
    with torch.no_grad():
        assert torch.allclose(fast(y), model(y), atol=1e-5) and torch.allclose(fast(x), model(x), atol=1e-5)
    assert len(fast._variants) == 2 and all(v.built.lowered.runner.replay.reason is None for v in fast._variants)


@pytest.mark.parametrize("dtypes", [("fp16",), ("bf16", "fp16")])
def test_half_precision_is_recorded_with_its_conversions(cuda, dtypes, monkeypatch):
    """float16's products run on a GPU; inputs are narrowed and results widened within the recorded launches."""
    from graphwright import reporting
    from graphwright.backends import aten
    from graphwright.lower import halves
    from graphwright.lower.stopwatch import Stopwatch

    monkeypatch.setattr(aten, "no_float16", lambda: None)
    monkeypatch.setattr(Stopwatch, "work", lambda self, work, options: [0.1 if c.precision == dtypes[0] else 0.2 if c.halves else 1.0 for c in options])
    monkeypatch.setattr(Stopwatch, "convert", lambda self, *a: 0.01)
    monkeypatch.setattr(reporting, "_declined", lambda job, variant, report: False)
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(8, 32)
    fast = gw.optimize(model, x, gw.AllowHalf(dtypes))
    runner = fast._variants[-1].built.lowered.runner
    assert [halves.conversion(s.name) for s in runner.steps if halves.conversion(s.name)] == [f"native→{dtypes[0]}", f"{dtypes[0]}→native"]
    assert {s.work.node.meta["val"].dtype for s in runner.steps if s.work} == {torch.float32} and replay(fast).reason is None
    with torch.no_grad():
        for batch in (x, torch.randn(8, 32)):
            assert fast(batch).dtype == torch.float32 and sqnr_db(model(batch), fast(batch)) > (60 if dtypes == ("fp16",) else 40)
        wanted = fast(x)
        assert torch.equal(copy.deepcopy(fast)(x), wanted)
    assert {r.decision for r in fast.report.sites if r.op != "convert"} <= {*dtypes, "left as it was"}
