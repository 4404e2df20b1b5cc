"""Every exact pass, and the whole default pipeline, on random programs: the same numbers by the float64 rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from graphwright.ir import Program
from graphwright.manager import Pipeline
from graphwright.numerics import Exact, run_double, run_pure
from graphwright.passes.pipeline import DEFAULT

RANDOM = st.tuples(st.randoms(use_true_random=False), st.integers(0, 2**16))
#: Always the same programs, not made smaller when one fails: a failure says which program it was. The slow test draws new ones.
FEW = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None,
               phases=[Phase.generate])  # fmt: skip


def run_settled(program: Program) -> Program:
    """What the default pipeline gives, in which a second run finds nothing to do."""
    after, _ = Pipeline(DEFAULT, strict=True).run(program)
    again, records = Pipeline(DEFAULT, strict=True).run(after)
    assert {r.name: r.result.changes for r in records if r.result.changes} == {}
    assert again.text() == after.text()
    return after


def the_rule_holds(before: Program, after: Program, x: torch.Tensor) -> None:
    reference, was, now = run_double(before, (x,)), run_pure(before, (x,)), run_pure(after, (x,))
    assert len(was) == len(now)
    for r, a, b in zip(reference, was, now, strict=True):
        assert Exact().failure(r, a, b) is None


@FEW
@given(RANDOM)
def test_the_default_pipeline(captured, random_model, drawn):
    rng, seed = drawn
    torch.manual_seed(seed)
    model, x = random_model(rng)
    program = captured(model, x)
    after = run_settled(program)
    the_rule_holds(program, after, x + torch.rand_like(x))


@pytest.mark.slow
@settings(FEW, max_examples=150, derandomize=False)
@given(RANDOM)
def test_the_default_pipeline_on_many(captured, random_model, drawn):
    rng, seed = drawn
    torch.manual_seed(seed)
    model, x = random_model(rng)
    program = captured(model, x)
    after, _ = Pipeline(DEFAULT, strict=True).run(program)
    the_rule_holds(program, after, x + torch.rand_like(x))


@FEW
@given(RANDOM)
def test_each_pass_by_itself(captured, random_model, drawn):
    rng, seed = drawn
    torch.manual_seed(seed)
    model, x = random_model(rng)
    program = captured(model, x)
    text = program.text()
    for p in DEFAULT:
        after, _ = Pipeline((p,), strict=True).run(program)
        the_rule_holds(program, after, x + torch.rand_like(x))
    assert program.text() == text


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@settings(FEW, max_examples=3)
@given(RANDOM)
def test_other_dtypes(captured, random_model, dtype, drawn):
    rng, seed = drawn
    torch.manual_seed(seed)
    model, x = random_model(rng)
    program = captured(model.to(dtype), x.to(dtype))
    after, _ = Pipeline(DEFAULT).run(program)  # what breaks the rule in 8 bits of mantissa is undone, and nothing else breaks
    the_rule_holds(program, after, x.to(dtype))


@settings(FEW, max_examples=4)
@given(RANDOM)
def test_sizes_that_vary(captured, random_model, drawn):
    rng, seed = drawn
    torch.manual_seed(seed)
    model, x = random_model(rng)
    program = captured(model, x, dynamic="auto")
    after = run_settled(program)
    the_rule_holds(program, after, x)
    if program.signature.symbols:
        other = torch.randn(3, *x.shape[1:])
        try:
            run_pure(program, (other,))
        except RuntimeError:  # a constant fixes the batch size
            return
        the_rule_holds(program, after, other)
