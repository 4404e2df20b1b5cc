"""Canonicalize: what is dropped, what is kept and why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from graphwright.passes.canonicalize import Canonicalize

X = torch.tensor([[-0.0, 1.0, -2.0], [0.0, 5.0, 6.0]])


def test_golden(captured, run, body):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            y = self.drop(self.linear(x))
            y = (y.to(torch.float32) * 1 - 0).t().t()
            return y.reshape(4, 4).reshape(16).exp() + y.transpose(0, 1).reshape(16)

    after, result = run(captured(Net(), torch.randn(2, 8)), Canonicalize())
    assert body(after) == (
        "linear_default: f32[2, 8] = aten.linear(x, linear_weight, linear_bias)  # linear\n"
        "view_default: f32[16] = aten.view(linear_default, [16])  # reshape#2\n"
        "exp_default: f32[16] = aten.exp(view_default)  # exp\n"
        "permute_default_1: f32[8, 2] = aten.permute(linear_default, [1, 0])  # transpose\n"
        "reshape_default_2: f32[16] = aten.reshape(permute_default_1, [16])  # reshape#3\n"
        "add_tensor: f32[16] = aten.add.Tensor(exp_default, reshape_default_2, alpha=1)  # add\n"
        "return (add_tensor)"
    )
    assert ("drop", "dropout dropped") in result.changes


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x * 1,
        lambda x: 1.0 * x,
        lambda x: x / 1,
        lambda x: x - 0,
        lambda x: x**1,
        lambda x: x.to(torch.float32),
        lambda x: x.double().float(),
        lambda x: x.contiguous(),
        lambda x: x.clone(),
        lambda x: x.reshape(2, 3),
        lambda x: x.expand(2, -1),
        lambda x: x[:, 0:3],
        lambda x: x.permute(0, 1),
        lambda x: x.t().t(),
        lambda x: x.transpose(0, 1).permute(1, 0),
        lambda x: x.movedim(0, 1).mT,
        lambda x: x.reshape(6).reshape(2, 3),
        lambda x: x.unsqueeze(1).squeeze(1),
        lambda x: torch.cat([x]),
        lambda x: F.pad(x, (0, 0)),
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: F.dropout(x, 0.0, training=True),
        lambda x: x.detach(),
    ],
)
def test_what_computes_nothing_is_dropped(f, captured, run, ops):
    after, result = run(captured(lambda self, x: f(x.exp()).sin(), X), Canonicalize())
    assert ops(after) == ["exp", "sin"]
    assert not result.refusals


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x * 2,
        lambda x: x - 1e-30,
        lambda x: x // 1,
        lambda x: x.double(),
        lambda x: x.int() * 1.0,
        lambda x: x.half().float(),
        lambda x: x.reshape(3, 2),
        lambda x: x[:, 1:3],
        lambda x: x.t(),
        lambda x: x.t().contiguous(),
        lambda x: F.pad(x, (0, 1)),
    ],
)
def test_what_computes_something_is_kept(f, captured, run, ops):
    before = captured(lambda self, x: f(x.exp()).sin(), X)
    after, _ = run(before, Canonicalize())
    assert len(ops(after)) == len(ops(before))


def test_a_copy_that_settles_the_layout_stays(captured, run, ops):
    """transpose → contiguous → view: without the copy there is no such view."""
    after, _ = run(captured(lambda self, x: x.t().contiguous().view(6), X), Canonicalize())
    assert ops(after) == ["permute", "contiguous", "reshape"]


def test_dropout_in_train_mode_is_refused(captured, run):
    _, result = run(captured(nn.Dropout(0.5), X, train=True), Canonicalize())
    assert [reason for _, reason in result.refusals] == ["dropout in train mode draws random numbers"]


# -- signed zeros ----------------------------------------------------------------------------------------------------


def test_adding_zero_is_dropped_where_the_sign_of_a_zero_is_lost_anyway(captured, run, ops):
    after, _ = run(captured(lambda self, x: ((x.sin() + 0) * 2).softmax(-1), X), Canonicalize())
    assert ops(after) == ["sin", "mul", "softmax"]


@pytest.mark.parametrize("f", [lambda x: x.reciprocal(), lambda x: 1 / x, lambda x: (x * 2).rsqrt(), lambda x: x**-1,
                               lambda x: torch.atan2(x, x), lambda x: torch.copysign(x + 1, x)])  # fmt: skip
def test_adding_zero_is_kept_where_the_sign_of_a_zero_becomes_a_number(f, captured, run):
    _after, result = run(captured(lambda self, x: f(x + 0.0), X), Canonicalize())
    assert len(result.refusals) == 1
    assert result.refusals[0][0] == "add" and "may read the sign of a zero" in result.refusals[0][1]


def test_subtracting_zero_keeps_signs_and_goes(captured, run, ops):
    after, result = run(captured(lambda self, x: 1 / (x.sin() - 0.0), X), Canonicalize())
    assert "sub" not in ops(after) and not result.refusals


def test_integers_have_no_signed_zero(captured, run, ops):
    after, _ = run(captured(lambda self, x: 1 / (x.abs() + 0), torch.tensor([1, 2])), Canonicalize())
    assert "add" not in ops(after)


def test_python_sum_starts_with_zero(captured, run, ops):
    after, _ = run(captured(lambda self, x: sum([x.sin(), x.cos()]), X), Canonicalize())
    assert ops(after) == ["sin", "cos", "add"]


# -- aliasing --------------------------------------------------------------------------------------------------------


def test_an_output_that_was_fresh_stays_fresh(captured, run):
    """The caller may write into an output: it must not be the input then, unless it was before."""
    program = captured(lambda self, x: (x * 1, x.clone(), x.exp()), X)
    after, result = run(program, Canonicalize())
    outs = after(X)
    assert all(o.data_ptr() != X.data_ptr() for o in outs)
    assert len({o.data_ptr() for o in outs}) == 3
    assert {reason for _, reason in result.refusals} == {"an output would share memory with input_0"}


def test_two_outputs_stay_apart(captured, run):
    def f(self, x):
        y = x.exp()
        return y, y.clone()

    after, result = run(captured(f, X), Canonicalize())
    a, b = after(X)
    assert a.data_ptr() != b.data_ptr()
    assert "share memory" in result.refusals[0][1]


# -- shapes that vary, promises --------------------------------------------------------------------------------------


def test_sizes_that_vary_are_compared_without_fixing_them(captured, run, ops):
    def f(self, x):
        return x.exp().reshape(x.shape[0], 3).expand(x.shape[0], 3).reshape(-1, 3).sin()

    program = captured(f, X, dynamic="auto")
    after, _ = run(program, Canonicalize())
    assert "expand" not in ops(after)
    for n in (2, 5):
        x = torch.randn(n, 3)
        torch.testing.assert_close(after(x)[0], x.exp().sin())


def test_include_limits_it(captured, run, ops):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Dropout(), nn.Dropout()

        def forward(self, x):
            return self.b(self.a(x.exp()).sin()).cos()

    after, result = run(captured(Two(), X), Canonicalize(include=("a",)))
    assert ops(after) == ["exp", "sin", "dropout", "cos"]
    assert ("b", "left out by include / exclude") in result.refusals


_STEPS = {
    "t": lambda x: x.transpose(0, 1), "permute": lambda x: x.permute(2, 0, 1), "flat": lambda x: x.reshape(-1, x.shape[-1]).unsqueeze(0),
    "one": lambda x: x * 1, "zero": lambda x: x + 0, "same": lambda x: x.reshape(x.shape), "copy": lambda x: x.contiguous(),
    "sin": lambda x: x.sin(), "up": lambda x: x.double().float(), "squeeze": lambda x: x.unsqueeze(0).squeeze(0),
    "drop": lambda x: F.dropout(x, 0.3, False), "halves": lambda x: torch.cat(x.chunk(2, 0), 0) if x.shape[0] > 1 else x,
}  # fmt: skip


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(sorted(_STEPS)), min_size=1, max_size=7))
def test_any_chain_gives_the_same_numbers(captured, run, steps):
    def f(self, x):
        for step in steps:
            x = _STEPS[step](x)
        return x.cos()

    x = torch.randn(2, 3, 4)
    program = captured(f, x)
    after, _ = run(program, Canonicalize())
    assert torch.equal(after(x)[0], f(None, x))
    _, second = run(after, Canonicalize())
    assert not second.changes  # it settles at once


def test_a_copy_before_a_reshape_is_one_too_many(captured, run, ops):
    """reshape copies where it must; strides that change with it are inferred anew."""
    after, result = run(captured(lambda self, x: x.exp().t().contiguous().reshape(6).sin(), X), Canonicalize())
    assert ops(after) == ["exp", "permute", "reshape", "sin"] and not result.refusals
    torch.testing.assert_close(after(X)[0], X.exp().t().reshape(6).sin())
