"""Models in half precision on a processor without units for it are computed in float32."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphwright as gw
from graphwright.manager import Pipeline
from graphwright.numerics import run_double, run_pure, sqnr_db
from graphwright.passes import widen
from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.pipeline import DEFAULT
from graphwright.passes.widen import Widen
from graphwright.testing.models import Random, program_of

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def no_units(monkeypatch):
    """A processor that multiplies neither."""
    monkeypatch.setattr(widen, "has_fast_bf16", lambda: False)
    monkeypatch.setattr(widen, "has_fast_fp16", lambda: False)


class Tagger(nn.Module):
    """A table that its head shares, a norm with casts of its own, two results."""

    def __init__(self):
        super().__init__()
        self.table, self.one = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor, x: Tensor) -> dict[str, Tensor]:
        h = self.table(ids) + self.one(x)
        wide = h.float()
        h = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return {"scores": F.linear(h, self.table.weight), "mean": wide.mean(-1), "hidden": h}


def _tagger(captured, dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    return captured(Tagger().to(dtype), torch.randint(0, 11, (2, 5)), torch.randn(2, 5, 8).to(dtype), **options)


GOLDEN = """\
to_dtype_3: f32[2, 5, 8] = aten.to.dtype(x, torch.float32, False, False, None)  # x
embedding_default: bf16[2, 5, 8] = aten.embedding(table_weight, ids, -1, False, False)  # table
to_dtype_2: f32[2, 5, 8] = aten.to.dtype(embedding_default, torch.float32, False, False, None)  # table
linear_default: f32[2, 5, 8] = aten.linear(to_dtype_3, one_weight_wide, one_bias_wide)  # one
add_tensor: f32[2, 5, 8] = aten.add.Tensor(to_dtype_2, linear_default, alpha=1)  # add
pow_tensor_scalar: f32[2, 5, 8] = aten.pow.Tensor_Scalar(add_tensor, 2)  # pow
mean_dim: f32[2, 5, 1] = aten.mean.dim(pow_tensor_scalar, [-1], True, dtype=None)  # mean
add_tensor_1: f32[2, 5, 1] = aten.add.Tensor(mean_dim, 1e-06, alpha=1)  # add#2
rsqrt_default: f32[2, 5, 1] = aten.rsqrt(add_tensor_1)  # rsqrt
mul_tensor: f32[2, 5, 8] = aten.mul.Tensor(add_tensor, rsqrt_default)  # mul
linear_default_1: f32[2, 5, 11] = aten.linear(mul_tensor, table_weight_wide, None)  # linear
mean_dim_1: f32[2, 5] = aten.mean.dim(add_tensor, [-1], False, dtype=None)  # mean#2
to_dtype_4: bf16[2, 5, 11] = aten.to.dtype(linear_default_1, torch.bfloat16, False, False, None)  # linear
to_dtype_5: bf16[2, 5, 8] = aten.to.dtype(mul_tensor, torch.bfloat16, False, False, None)  # mul
return (to_dtype_4, mean_dim_1, to_dtype_5)"""


def test_golden(captured, run, body):
    program = _tagger(captured)
    before = program.text()
    after, result = run(program, Canonicalize(), Widen())
    assert [what for _, what in result.changes] == ["3 ops in float32 instead of bfloat16, which this processor does not multiply"]
    assert body(after) == GOLDEN
    assert program.text() == before
    names = set(after.tensors())
    assert "table.weight" in names and "table.weight_wide" in names and "one.weight" not in names  # rows are read as they are stored
    assert after.provenance["one.weight_wide"] == ("one.weight",)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dynamic", [None, "auto"])
def test_results_keep_their_dtypes_and_gain_precision(captured, run, dtype, dynamic):
    program = _tagger(captured, dtype, dynamic=dynamic)
    after, _ = run(program, Canonicalize(), Widen())
    truth, eager, got = run_double(program, program.example), run_pure(program, program.example), run_pure(after, program.example)
    for t, e, g in zip(truth, eager, got, strict=True):
        assert g.dtype == e.dtype and sqnr_db(t, g) >= sqnr_db(t, e)
    if dynamic:
        ids, x = torch.randint(0, 11, (7, 5)), torch.randn(7, 5, 8).to(dtype)
        assert run_pure(after, (ids, x))[0].shape == (7, 5, 11)


def test_it_settles(captured, run):
    program = _tagger(captured)
    after, _ = run(program, Canonicalize(), Widen())
    again, result = run(after, Widen())
    assert not result.modified and again.text() == after.text()


def test_one_half_that_is_served_stays(captured, run, monkeypatch):
    monkeypatch.setattr(widen, "has_fast_bf16", lambda: True)
    assert not run(_tagger(captured), Widen())[1].modified
    assert run(_tagger(captured, torch.float16), Widen())[1].modified


def test_float32_models_are_none_of_its_business(captured, run):
    assert not run(_tagger(captured, torch.float32), Widen())[1].modified


def test_what_it_declines(captured, run):
    def reason(function, *args, **tensors):
        _, result = run(captured(function, *args, **tensors), Widen())
        assert not result.changes
        return result.refusals[0][1]

    x = torch.randn(2, 4).half()

    def cache(m, x):
        m.kept[:, :4] = x
        return m.kept * 2

    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kept", torch.zeros(2, 8).half())

        def forward(self, x):
            self.kept[:, :4] = x
            return self.kept * 2

    assert reason(Cache(), x) == "it writes into a tensor of float16"
    assert reason(lambda m, x: (x * 2).view(torch.int16) + 1, x).endswith("reads memory as another type")
    assert reason(lambda m, x: x + torch.rand_like(x), x).endswith("draws numbers at random: others in float32")
    left = run(captured(lambda m, x: torch.relu(x * 2), x), Widen(exclude=("mul",)))[1]
    assert not left.modified and ("mul", "left out by include / exclude") in left.refusals


def test_a_result_that_leaves_the_dtype_alone_is_undone_where_numbers_would_differ(captured):
    """float16 overflows here; in float32 it does not: the model's own answer stands."""
    program = captured(lambda m, x: torch.log(x * 60000 * 2) + 1, torch.ones(2, 3).half())
    after, records = Pipeline((Widen(),)).run(program)
    assert records[0].undone and "finite" in records[0].undone and torch.isinf(run_pure(after, program.example)[0]).all()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), dtype=st.sampled_from(HALVES))
def test_random_programs(seed, dtype):
    torch.manual_seed(seed)
    program = program_of(Random(random.Random(seed)).to(dtype), (torch.randn(3, 5, 8).to(dtype),))
    after, records = Pipeline(DEFAULT).run(program)
    widened = next(r for r in records if r.name == "widen")
    for w, g in zip(program(*program.example), after(*program.example), strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
    if widened.result.changes and not widened.undone:
        computing = [n for n in after.nodes if isinstance(n.meta["val"], Tensor) and n.meta["val"].dtype == dtype]
        assert all(n.target is torch.ops.aten.to.dtype for n in computing), after.text()


@pytest.mark.parametrize("recipe", ["default", "int8", "w8"])
def test_recipes_find_what_they_look_for(recipe):
    """In float32, products get kernels and weights become integers."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).eval().bfloat16(), torch.randn(16, 32).bfloat16()
    told = gw.explain(model, x, recipe, calibration=[x] if recipe == "int8" else None)
    rows = {r.sites[0]: r for r in told.ops}
    assert any(c.startswith("onednn") for c in rows["0"].candidates)
