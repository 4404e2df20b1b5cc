"""bfloat16 is placed by the error that it makes, site by site."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright import backends
from graphwright.lower import lower
from graphwright.lower.graph import analyse
from graphwright.lower.stopwatch import Stopwatch
from graphwright.manager import Pipeline
from graphwright.numerics import sqnr_db
from graphwright.passes.allow_bf16 import AllowBf16
from graphwright.passes.pipeline import resolve


class Mixed(nn.Module):
    """A linear that bears bfloat16, and a difference of nearly equal numbers that does not."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.one(x))
        big = y + 1000.0
        return self.two(y) + (big - 1000.25).mean(-1, keepdim=True)


X = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def program(captured):
    return captured(Mixed(), X)


def _placed(program, **options):
    after, records = Pipeline((*resolve("default"), AllowBf16(**options)), strict=True).run(program)
    return after, records[-1].result


def test_it_is_measured_where_it_errs(program):
    after, result = _placed(program)
    refused = dict(result.refusals)
    assert set(refused) == {"add", "sub"}, refused
    assert refused["add"].startswith("sub reads it and gives SQNR ")
    assert refused["sub"].startswith("bfloat16 gives SQNR ") and refused["sub"].endswith("30 dB are asked")
    nodes = {s: n for n in after.nodes for s in n.meta["sites"]}
    assert nodes["one"].meta["bf16"] and nodes["two"].meta["bf16"] and not nodes["sub"].meta["bf16"]
    assert "bfloat16 is allowed at" in result.notes[0] and "least SQNR" in result.notes[0] and not result.changes
    linear, weight, bias = nodes["one"], *(t.bfloat16() for t in (program.tensor("one.weight"), program.tensor("one.bias")))
    own = torch.tanh(torch.nn.functional.linear(X.bfloat16(), weight, bias)).float()
    with torch.no_grad():
        truth = torch.tanh(torch.nn.functional.linear(X, program.tensor("one.weight"), program.tensor("one.bias")))
    assert linear.meta["bf16_db"] == pytest.approx(sqnr_db(truth, own), abs=3)


def test_the_floor_is_an_option(program):
    strict, lenient = _placed(program, floor_db=200.0)[1], _placed(program, floor_db=-1000.0)[1]
    assert "allowed at 0 of" in strict.notes[0] and not lenient.refusals
    with pytest.raises(gw.RecipeError, match="decibels"):
        AllowBf16(floor_db="high")


def test_lowering_offers_it_only_where_it_was_admitted(program):
    after, _ = _placed(program)
    allowed = frozenset({"f32", "bf16"})
    offers = {w.site: {c.precision for c in backends.offered(w, allowed)} for w in analyse(after).works}
    assert offers["one"] == {"f32", "bf16"} and offers["sub"] == {"f32"}
    assert {c.precision for w in analyse(after).works if w.site == "sub" for c in backends.candidates(w, allowed)} == {"f32", "bf16"}


def test_include_and_exclude(program):
    after, result = _placed(program, exclude=("one",))
    assert ("one", "left out by include / exclude") in result.refusals
    nodes = {s: n for n in after.nodes for s in n.meta["sites"]}
    assert not nodes["one"].meta["bf16"] and nodes["two"].meta["bf16"]


def test_calibration_batches_count(captured):
    """Small numbers in the example, cancelling ones in the data."""

    class Difference(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x - y

    program = captured(Difference(), torch.randn(4, 4), torch.zeros(4, 4))
    assert not _placed(program)[1].refusals
    program.calibration = ((torch.full((4, 4), 1000.0), torch.full((4, 4), 1000.5)),)
    assert [s for s, _ in _placed(program)[1].refusals] == ["sub"]


def test_without_an_example_nothing_is_measured(program):
    program.example = None
    after, result = _placed(program)
    assert "no example" in result.notes[0] and all("bf16" not in n.meta for n in after.nodes)


def test_the_whole_recipe_keeps_what_was_admitted(monkeypatch):
    """With bfloat16 preferred everywhere, a result keeps the numbers that it may not round; saved, it is the same."""
    monkeypatch.setattr(Stopwatch, "work", lambda self, work, options: [0.1 if c.precision == "bf16" else 1.0 for c in options])
    monkeypatch.setattr(Stopwatch, "convert", lambda self, *a: 0.0)
    torch.manual_seed(0)
    model = Mixed().eval()
    program = gw.explain(model, X, "bf16")
    rows = {s: r for r in program.ops for s in r.sites}
    assert any("bf16" in c for c in rows["one"].candidates) and not any("bf16" in c for c in rows["sub"].candidates)
    assert "30 dB are asked" in str(program["sub"])
    from graphwright.capture import capture

    captured = capture(model, (X,), {}).program
    captured.example = (X,)
    after, _ = _placed(captured)
    lowered = lower(after, allowed={"bf16"}, example=())
    taken = {c.work.site: c.precision for c in lowered.choices}
    assert taken["one"] == "bf16" and taken["sub"] == "f32"
    with torch.no_grad():
        assert sqnr_db(model(X), lowered.runner(X)[0]) > 30
        everywhere = lower(Pipeline(resolve("default")).run(captured)[0], allowed={"bf16"}, example=())
        assert sqnr_db(model(X), everywhere.runner(X)[0]) < 20, "what an op list would have given"


def test_accuracy_budget_takes_bfloat16_back(monkeypatch):
    monkeypatch.setattr(Stopwatch, "work", lambda self, work, options: [0.1 if c.precision == "bf16" else 1.0 for c in options])
    monkeypatch.setattr(Stopwatch, "convert", lambda self, *a: 0.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        wanted = model(X)

    def score(candidate) -> float:
        with torch.no_grad():
            return min(100.0, sqnr_db(wanted, candidate(X)))

    fast = gw.optimize(model, X, "bf16", evaluate=score, goal=gw.Goal(max_drop=1.0))
    assert fast.report.accuracy.after > 99 and any("score drops" in n for n in fast.report.notes)
