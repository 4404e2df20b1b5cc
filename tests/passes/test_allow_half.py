"""Half precision is placed by the error that it makes, site by site."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphwright as gw
from graphwright import backends, reporting
from graphwright.backends import aten
from graphwright.backends.base import HALF
from graphwright.lower import halves, lower
from graphwright.lower.graph import analyse
from graphwright.lower.stopwatch import Stopwatch
from graphwright.manager import Pipeline
from graphwright.numerics import sqnr_db
from graphwright.passes.allow_half import AllowHalf
from graphwright.passes.pipeline import resolve
from graphwright.testing.models import Random, program_of

BOTH = frozenset({"f32", "bf16", "fp16"})
X = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """A linear that bears bfloat16, and a difference of nearly equal numbers that does not."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.one(x))
        big = y + 1000.0
        return self.two(y) + (big - 1000.25).mean(-1, keepdim=True)


class Ranges(nn.Module):
    """Sums past float16's range, numbers below it, and a linear that both halves bear."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = F.softplus(self.plain(x)) + 0.1
        large = y.square() * 3e5
        tiny = y * 1e-7
        return torch.log(large) + torch.sigmoid(tiny * 1e7)


@pytest.fixture
def program(captured):
    return captured(Mixed(), X)


@pytest.fixture
def halves_win(monkeypatch):
    """Kernels in half precision measure fastest, conversions cost a little; float16's products are offered although this processor has none."""
    monkeypatch.setattr(Stopwatch, "work", lambda self, work, options: [0.1 if c.halves else 1.0 for c in options])
    monkeypatch.setattr(Stopwatch, "convert", lambda self, *a: 0.01)
    monkeypatch.setattr(aten, "no_float16", lambda: None)
    monkeypatch.setattr(reporting, "_declined", lambda job, variant, report: False)  # here it is slower, and still what is looked at


def _placed(program, *dtypes, **options):
    after, records = Pipeline((*resolve("default"), AllowHalf(dtypes or ("bf16", "fp16"), **options)), strict=True).run(program)
    return after, records[-1].result


def _sites(program):
    return {s: n for n in program.nodes for s in n.meta["sites"]}


def test_it_is_measured_where_it_errs(program):
    after, result = _placed(program, "bf16")
    refused = dict(result.refusals)
    assert set(refused) == {"add", "sub"}, refused
    assert refused["add"].startswith("sub reads it and gives SQNR ") and refused["add"].endswith("once it is rounded to bfloat16, 30 dB are asked")
    assert refused["sub"].startswith("bfloat16 gives SQNR ") and refused["sub"].endswith("30 dB are asked")
    nodes = _sites(after)
    assert nodes["one"].meta["halves"] and nodes["two"].meta["halves"] and not nodes["sub"].meta["halves"]
    assert "half precision is allowed at" in result.notes[0] and "least SQNR" in result.notes[0] and not result.changes
    linear, weight, bias = nodes["one"], *(t.bfloat16() for t in (program.tensor("one.weight"), program.tensor("one.bias")))
    own = torch.tanh(F.linear(X.bfloat16(), weight, bias)).float()
    with torch.no_grad():
        truth = torch.tanh(F.linear(X, program.tensor("one.weight"), program.tensor("one.bias")))
    assert linear.meta["halves"]["bf16"] == pytest.approx(sqnr_db(truth, own), abs=3)


def test_each_half_has_its_own_limits(captured):
    """float16 ends at 65504 and has few bits below 6e-5; bfloat16 has eight everywhere."""
    after, result = _placed(captured(Ranges(), X), floor_db=40.0)
    nodes = _sites(after)
    over, under = nodes["mul"], nodes["mul_1" if "mul_1" in nodes else "mul#2"]
    assert set(over.meta["halves"]) == {"bf16"} and set(under.meta["halves"]) == {"bf16"}
    assert over.meta["halves_barred"]["fp16"].endswith("float16 ends at 65504") and "its values reach" in over.meta["halves_barred"]["fp16"]
    assert "where float16 has few bits), 40 dB are asked" in under.meta["halves_barred"]["fp16"]
    assert set(nodes["plain"].meta["halves"]) == {"bf16", "fp16"}
    assert nodes["plain"].meta["halves"]["fp16"] > nodes["plain"].meta["halves"]["bf16"] + 10  # three bits more
    assert not result.refusals  # each op has a half that serves it
    _, strict = _placed(captured(Ranges(), X), "fp16", floor_db=40.0)
    assert {s for s, _ in strict.refusals} >= {"mul"}


GOLDEN = """\
half precision is allowed at 4 of 6 float32 ops (bfloat16 at 4, float16 at 4), where it measures faster
bf16 fp16  one, tanh
-          add: sub reads it and gives SQNR
bf16 fp16  two
-          sub: bfloat16 gives SQNR
bf16 fp16  mean
bf16 fp16  add#2"""


def test_golden(program):
    """The marks as text: they are all that the pass leaves."""
    before = program.text()
    after, result = _placed(program)
    lines = [result.notes[0].partition(";")[0]]
    reasons = dict(result.refusals)
    for node in after.nodes:
        site = node.meta["sites"][0]
        why = f": {reasons[site].partition(' SQNR')[0]} SQNR" if site in reasons else ""
        lines.append(f"{' '.join(node.meta['halves']) or '-':10} {', '.join(node.meta['sites'])}{why}")
    assert "\n".join(lines) == GOLDEN
    assert program.text() == before


def test_the_options_are_checked(program):
    strict, lenient = _placed(program, floor_db=200.0)[1], _placed(program, floor_db=-1000.0)[1]
    assert "allowed at 0 of" in strict.notes[0] and not lenient.refusals
    assert AllowHalf("fp16").dtypes == ("fp16",)
    for wrong, said in (({"floor_db": "high"}, "decibels"), ({"dtypes": ("fp61",)}, "'fp61' is no half precision"), ({"dtypes": ()}, "there is no half")):
        with pytest.raises(gw.RecipeError, match=said):
            AllowHalf(**wrong)


def test_lowering_offers_it_only_where_it_was_admitted(program):
    after, _ = _placed(program)
    offers = {w.site: {c.precision for c in backends.offered(w, BOTH)} for w in analyse(after).works}
    assert offers["one"] == set(BOTH) and offers["sub"] == {"f32"}
    sub = next(w for w in analyse(after).works if w.site == "sub")
    assert {c.precision for c in backends.candidates(sub, BOTH)} == set(BOTH)
    withheld = {c.name: backends.withheld(sub, c) for c in backends.candidates(sub, BOTH)}
    assert withheld["aten.bf16"].startswith("bfloat16 gives SQNR") and withheld["aten.native"] is None


def test_include_and_exclude(program):
    after, result = _placed(program, exclude=("one",))
    assert ("one", "left out by include / exclude") in result.refusals
    nodes = _sites(after)
    assert not nodes["one"].meta["halves"] and nodes["two"].meta["halves"]


def test_two_passes_add_up(captured):
    """One for each half, with limits of their own."""
    program = captured(Mixed(), X)
    after, _ = Pipeline((*resolve("default"), AllowHalf("bf16", floor_db=60.0), AllowHalf("fp16")), strict=True).run(program)
    assert set(_sites(after)["one"].meta["halves"]) == {"fp16"} and "60 dB" in _sites(after)["one"].meta["halves_barred"]["bf16"]


def test_calibration_batches_count(captured):
    """Small numbers in the example, cancelling ones and ones out of range in the data."""

    class Difference(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x - y

    program = captured(Difference(), torch.randn(4, 4), torch.zeros(4, 4))
    assert not _placed(program)[1].refusals
    program.calibration = ((torch.full((4, 4), 1000.0), torch.full((4, 4), 1000.5)),)
    assert [s for s, _ in _placed(program, "bf16")[1].refusals] == ["sub"]
    program.calibration = ((torch.full((4, 4), 9e4), torch.full((4, 4), 1.0)),)
    after, result = _placed(program)
    assert set(_sites(after)["sub"].meta["halves"]) == {"bf16"} and not result.refusals


def test_a_mask_out_of_range_says_nothing_of_the_scores_beside_it(captured):
    """-3e38 is infinite in both halves: the sum keeps float32, the product before it does not."""
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), torch.finfo(torch.float32).min)

    def scores(m, q, k):
        return torch.softmax(q @ k.transpose(-1, -2) + m.mask, -1)

    program = captured(scores, torch.randn(2, 5, 8), torch.randn(2, 5, 8), mask=mask)
    after, _ = Pipeline((AllowHalf(),), strict=True).run(program)
    nodes = _sites(after)
    assert set(nodes["matmul"].meta["halves"]) == {"bf16", "fp16"}
    assert not nodes["add"].meta["halves"] and "3.4e+38" in nodes["add"].meta["halves_barred"]["bf16"]


def test_without_an_example_nothing_is_measured(program):
    program.example = None
    after, result = _placed(program)
    assert "no example" in result.notes[0] and all("halves" not in n.meta for n in after.nodes)


def test_products_add_up_in_float32(captured):
    """A sum of 4096 ones: in float16 steps it would stop at 2048."""
    program = captured(lambda m, x: F.linear(x, m.weight), torch.ones(2, 4096), weight=torch.ones(3, 4096) + 2.0**-9)
    after, _ = _placed(program)
    assert all(db > 45 for db in after.nodes[-1].meta["halves"].values()) and len(after.nodes[-1].meta["halves"]) == 2


def test_the_whole_recipe_keeps_what_was_admitted(halves_win):
    """With half precision preferred everywhere, a result keeps the numbers that it may not round."""
    torch.manual_seed(0)
    model = Mixed().eval()
    told = gw.explain(model, X, "half")
    rows = {s: r for r in told.ops for s in r.sites}
    assert any("bf16" in c for c in rows["one"].candidates) and not any("bf16" in c for c in rows["sub"].candidates)
    assert "30 dB are asked" in str(told["sub"])
    captured = program_of(model, (X,))
    after, _ = _placed(captured)
    lowered = lower(after, allowed=BOTH, example=())
    taken = {c.work.site: c.precision for c in lowered.choices}
    assert taken["one"] in HALF and taken["sub"] == "f32"
    barred = next(c for c in lowered.choices if c.work.site == "sub")
    assert any(o.problem and "30 dB are asked" in o.problem for o in barred.options)
    with torch.no_grad():
        assert sqnr_db(model(X), lowered.runner(X)[0]) > 30
        everywhere = lower(Pipeline(resolve("default")).run(captured)[0], allowed={"bf16"}, example=())
        assert sqnr_db(model(X), everywhere.runner(X)[0]) < 20, "what an op list would have given"


class Encoder(nn.Module):
    """Convolutions, a table, attention over merged projections, norms, a gate: nothing that other tests use."""

    def __init__(self, wide: int = 24, heads: int = 3):
        super().__init__()
        self.heads, self.stem, self.table = heads, nn.Conv1d(4, wide, 3, padding=1), nn.Embedding(16, wide)
        self.norm, self.qkv, self.out = nn.LayerNorm(wide), nn.Linear(wide, 3 * wide), nn.Linear(wide, wide)
        self.after, self.gate, self.up, self.down = nn.RMSNorm(wide), nn.Linear(wide, 40), nn.Linear(wide, 40), nn.Linear(40, wide)
        self.head = nn.Linear(wide, 5)

    def forward(self, signal: Tensor, places: Tensor) -> dict[str, Tensor]:
        x = F.gelu(self.stem(signal)).transpose(1, 2) + self.table(places)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.after(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return {"tokens": x, "class": self.head(x.mean(1))}


def _encoder():
    torch.manual_seed(3)
    return Encoder().eval(), (torch.randn(2, 4, 10), torch.randint(0, 16, (2, 10)))


@pytest.mark.parametrize("dtypes", [("bf16",), ("fp16",), ("bf16", "fp16")])
def test_a_whole_model_in_half_precision(halves_win, dtypes, tmp_path):
    model, inputs = _encoder()
    recipe = [*gw.default_recipe(), AllowHalf(dtypes)]
    fast = gw.optimize(model, inputs, recipe)
    lowered = fast._variants[-1].built.lowered
    runner = lowered.runner
    with torch.no_grad():
        wanted, got = model(*inputs), fast(*inputs)
    for name in wanted:
        assert got[name].dtype == torch.float32 and sqnr_db(wanted[name], got[name]) > (35 if "bf16" in dtypes else 55)
    computing = [c for c in lowered.choices if c.work.has("contraction") or "attention" in c.work.op]
    assert computing and not [(c.work.site, c.name) for c in computing if c.precision not in dtypes]
    # split, getitem, reshape and transpose hand halves through: inputs are narrowed, results widened, and nothing in between
    moved = [s for s in runner.steps if halves.conversion(s.name)]
    assert len(moved) <= 1 + 2 * len(wanted), [f"{s.site}: {s.name}" for s in moved]
    note = next(n for n in fast.report.notes if n.startswith("half precision: "))
    assert f"of {len([c for c in lowered.choices if c.precision in HALF])}" not in note and "conversions in a call: " in note
    fast.save(tmp_path / "half.gw")
    again = gw.load(tmp_path / "half.gw")
    with torch.no_grad():
        assert all(torch.equal(again(*inputs)[n], got[n]) for n in wanted)


def test_float32_that_stays_is_said(monkeypatch):
    monkeypatch.setattr(Stopwatch, "work", lambda self, work, options: [2.0 if c.halves else 1.0 for c in options])
    monkeypatch.setattr(Stopwatch, "convert", lambda self, *a: 1.0)
    monkeypatch.setattr(reporting, "_declined", lambda job, variant, report: False)
    model, inputs = _encoder()
    fast = gw.optimize(model, inputs, "half")
    assert any(n.startswith("half precision: float32 measured faster at each of the ") for n in fast.report.notes)
    assert not any(halves.conversion(s.name) for s in fast._variants[-1].built.lowered.runner.steps)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), floor=st.sampled_from([20.0, 45.0, 60.0]))
def test_random_programs_keep_the_limit_and_never_convert_twice(seed, floor):
    """Whatever the stopwatch says: only admitted dtypes run, results are as good as their sites, no value goes there and back."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    program = program_of(Random(draw), (torch.randn(3, 5, 8),))
    with pytest.MonkeyPatch.context() as patch:
        times: dict[str, float] = {}
        patch.setattr(Stopwatch, "work", lambda self, work, options: [times.setdefault(work.node.name + c.name, draw.random()) for c in options])
        patch.setattr(Stopwatch, "convert", lambda self, value, a, b, params: times.setdefault(f"{value.name}{a}{b}", 0.3 * draw.random()))
        patch.setattr(aten, "no_float16", lambda: None)
        after, _ = _placed(program, floor_db=floor)
        lowered = lower(after, allowed=BOTH, example=())
    for choice in lowered.choices:
        if choice.precision in HALF:
            assert choice.precision in choice.work.node.meta["halves"]
            assert choice.work.node.meta["halves"][choice.precision] >= floor
    came = {s.writes[0]: s for s in lowered.runner.base.steps if halves.conversion(s.name)}
    assert not any(s.reads[0] in came for s in came.values()), "a conversion reads what another one made"
    x = program.example
    with torch.no_grad():
        wanted, got = program(*x), lowered.runner(*x)
    for w, g in zip(wanted, got, strict=True):
        assert g.dtype == w.dtype and bool(torch.isfinite(g).all()) == bool(torch.isfinite(w).all())
        assert sqnr_db(w, g) > floor - 25


@pytest.mark.parametrize("recipe", ["int8", "w4"])
def test_beside_integers(recipe, monkeypatch):
    """Values between quantized ops may be held in half precision: whatever the stopwatch says, numbers stay those of the recipe."""
    model, inputs = _encoder()
    program = program_of(model, inputs)
    program.calibration = (inputs,)
    after, _ = Pipeline((*resolve(recipe), AllowHalf()), strict=True).run(program)
    monkeypatch.setattr(aten, "no_float16", lambda: None)
    for seed in range(3):
        draw, times = random.Random(seed), {}
        monkeypatch.setattr(Stopwatch, "work", lambda self, work, options, d=draw, t=times: [t.setdefault(work.node.name + c.name, d.random()) for c in options])
        monkeypatch.setattr(Stopwatch, "convert", lambda self, v, a, b, q, d=draw, t=times: t.setdefault(f"{v.name}{a}{b}", 0.2 * d.random()))
        lowered = lower(after, allowed=BOTH | {"int8"}, example=())
        assert {c.precision for c in lowered.choices} & {"bf16", "fp16"}
        with torch.no_grad():
            for wanted, simulated, got in zip(program(*inputs), after(*inputs), lowered.runner(*inputs), strict=True):
                assert sqnr_db(wanted, got) > sqnr_db(wanted, simulated) - 6


def test_accuracy_budget_takes_half_precision_back(halves_win):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        wanted = model(X)

    def score(candidate) -> float:
        with torch.no_grad():
            return min(100.0, sqnr_db(wanted, candidate(X)))

    fast = gw.optimize(model, X, "half", evaluate=score, goal=gw.Goal(max_drop=1.0))
    assert fast.report.accuracy.after > 99 and any("score drops" in n for n in fast.report.notes)
