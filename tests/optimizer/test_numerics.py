"""The checks that passes promise to keep."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphwright.capture import capture
from graphwright.numerics import Exact, Lossy, rms, run_double, run_pure, sqnr_db


def test_rms_and_sqnr():
    assert rms(torch.tensor([3.0, -4.0])) == pytest.approx(math.sqrt(12.5))
    assert rms(torch.empty(0)) == 0
    ref = torch.ones(10)
    assert sqnr_db(ref, ref) == math.inf
    assert sqnr_db(ref, ref * 1.1) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf


def test_exact_allows_rounding_and_no_more():
    torch.manual_seed(0)
    reference = torch.randn(1000, dtype=torch.float64)
    before = reference.float()
    assert Exact().failure(reference, before, before) is None
    assert Exact().failure(reference, before, before * (1 + 2e-7)) is None
    assert "exceeds" in str(Exact().failure(reference, before, before * (1 + 2e-6)))


@given(st.floats(0, 1e-3), st.integers(0, 2**31))
def test_exact_is_the_rule_of_the_contract(noise, seed):
    """RMS error against float64 at most twice eager's plus 4·eps·RMS(reference)."""
    g = torch.Generator().manual_seed(seed)
    reference = torch.randn(64, dtype=torch.float64, generator=g)
    before = (reference + 1e-5 * torch.randn(64, dtype=torch.float64, generator=g)).float()
    after = (reference + noise * torch.randn(64, dtype=torch.float64, generator=g)).float()
    allowed = 2 * rms(before - reference) + 4 * torch.finfo(torch.float32).eps * rms(reference)
    assert (Exact().failure(reference, before, after) is None) == (rms(after - reference) <= allowed)


@pytest.mark.parametrize("check", [Exact(), Lossy()])
def test_shape_and_dtype_count(check):
    x = torch.ones(2, 3)
    assert "(6,)" in str(check.failure(x.double(), x, x.reshape(6)))
    assert "float64" in str(check.failure(x.double(), x, x.double()))


def test_exact_integers_must_be_equal():
    x = torch.arange(4)
    assert Exact().failure(x, x, x.clone()) is None
    assert Exact().failure(x, x, x + 1) == "integer or boolean values differ"


@pytest.mark.parametrize("now", [[1.0, math.inf, math.inf], [1.0, math.nan, 2.0], [1.0, -math.inf, 2.0]])
def test_exact_non_finite_values_stay_as_they_are(now):
    before = torch.tensor([1.0, math.inf, 2.0])
    assert Exact().failure(before.double(), before, torch.tensor(now)) is not None
    assert Exact().failure(before.double(), before, before.clone()) is None


def test_lossy_has_a_floor_and_stays_finite():
    ref = torch.ones(10)
    assert Lossy(19).failure(ref.double(), ref, ref * 1.1) is None
    assert "lies below 21.0 dB" in str(Lossy(21).failure(ref.double(), ref, ref * 1.1))
    assert "finite" in str(Lossy().failure(ref.double(), ref, ref * math.nan))


def test_the_float64_run_leaves_the_program_alone_and_holds_one_wide_weight_at_a_time(monkeypatch):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)), nn.BatchNorm1d(64)).eval()
    x = torch.randn(3, 64)
    program = capture(model, (x,)).program
    wide, alive, most = Tensor.double, weakref.WeakSet(), 0

    def widen(tensor):
        nonlocal most
        made = wide(tensor)
        if made.shape == (64, 64):
            alive.add(made)
        most = max(most, len(alive))
        return made

    monkeypatch.setattr(Tensor, "double", widen)
    (got,) = run_double(program, (x,))
    assert most == 1
    assert torch.equal(got, copy.deepcopy(model).to(torch.float64)(x.to(torch.float64)))
    assert {t.dtype for t in program.tensors().values() if t.is_floating_point()} == {torch.float32}
    program.verify()


def test_the_float64_run_widens_casts_too():
    def f(x):
        return (x.to(torch.float32) / 3).to(torch.bfloat16).float()

    class M(nn.Module):
        def forward(self, x):
            return f(x)

    x = torch.tensor([1.0, 2.0])
    program = capture(M(), (x,)).program
    assert torch.equal(run_double(program, (x,))[0], x.double() / 3)


def test_runs_that_are_compared_draw_the_same_random_numbers_and_leave_the_generator_alone():
    class M(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    x = torch.zeros(5)
    program = capture(M(), (x,)).program
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    assert torch.equal(run_pure(program, (x,))[0], run_pure(program, (x,))[0])
    assert torch.equal(state, torch.random.get_rng_state())
