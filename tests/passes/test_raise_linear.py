"""Products with constant matrices become linear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.raise_linear import RaiseLinear

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
W, B = torch.randn(8, 4), torch.randn(4)


def test_golden(captured, run, body):
    def conv1d_of_gpt2(self, x):
        return torch.addmm(self.b, x.view(-1, 8), self.w).view(2, 3, 4)

    after, result = run(captured(conv1d_of_gpt2, X, w=W, b=B), RaiseLinear())
    assert body(after) == (
        "linear_default_1: f32[2, 3, 4] = aten.linear(input_0, w_transposed, b)  # addmm, reshape#2\n"
        "return (linear_default_1)"
    )
    assert after.provenance["w_transposed"] == ("w",)
    assert [what for _, what in result.changes] == ["aten.addmm → linear", "aten.reshape → linear"]


@pytest.mark.parametrize(
    "f",
    [
        lambda s, x: x @ s.w,
        lambda s, x: torch.mm(x[0], s.w),
        lambda s, x: x @ s.w + s.b,
        lambda s, x: s.b + x @ s.w,
        lambda s, x: x @ s.w + s.b.reshape(1, 1, 4),
        lambda s, x: torch.addmm(s.b, x[0], s.w),
        lambda s, x: x[0, 0] @ s.w,
        lambda s, x: x @ s.v.t(),
        lambda s, x: x @ s.v.t() + s.b,
        lambda s, x: F.linear(x, s.v) + s.b,
    ],
)
def test_forms(f, captured, run, ops):
    from graphwright.passes.fold_constants import FoldConstants

    program = captured(f, X, w=W, v=torch.randn(4, 8), b=B)
    after, _ = run(program, Canonicalize(), RaiseLinear(), FoldConstants(), RaiseLinear())
    assert [o for o in ops(after) if o != "select"] == ["linear"]


def test_a_weight_that_is_transposed_already_is_taken_as_it_stands(captured, run):
    program = captured(lambda s, x: x @ s.v.t(), X, v=torch.randn(4, 8))
    after, _ = run(program, Canonicalize(), RaiseLinear())
    assert list(after.tensors()) == ["v"]


def test_one_matrix_read_by_two_products_is_stored_once(captured, run, ops):
    after, _ = run(captured(lambda s, x: (x @ s.w).exp() + x[:, :1] @ s.w, X, w=W), RaiseLinear())
    assert ops(after).count("linear") == 2 and list(after.tensors()) == ["w_transposed"]


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda s, x: x @ s.w + s.w.sum(), "its matrix is read by sum too: it would be stored twice"),
        (lambda s, x: torch.addmm(s.b, x[0], s.w, beta=2), "beta is 2 and alpha 1, not 1"),
        (lambda s, x: torch.addmm(x[1, :, :4], x[0], s.w), "what it adds is no vector with a number per column"),
        (lambda s, x: x.long() @ s.i, "its numbers are torch.int64, no floats"),
        (lambda s, x: F.linear(x, s.v, s.b) + s.b, "linear has a bias already"),
        (lambda s, x: F.linear(x, s.v) + s.c, "the constant has shape (3, 4), not a number per column"),
    ],
)
def test_refusals(f, reason, captured, run):
    program = captured(f, X, w=W, b=B, v=torch.randn(4, 8), c=torch.randn(3, 4), i=torch.ones(8, 4, dtype=torch.int64))
    _, result = run(program, RaiseLinear())
    assert reason in [r for _, r in result.refusals]


def test_a_bias_is_not_drawn_in_past_another_reader(captured, run):
    def f(s, x):
        y = F.linear(x, s.v)
        return y + s.b, y.exp()

    _, result = run(captured(f, X, v=torch.randn(4, 8), b=B), RaiseLinear())
    assert result.refusals == [("add", "linear is read by exp too")]


def test_products_of_two_values_are_none_of_its_business(captured, run):
    _, result = run(captured(lambda s, x: x @ x.transpose(1, 2), X), RaiseLinear())
    assert not result.changes and not result.refusals


def test_sizes_that_vary(captured, run, ops):
    def f(s, x):
        return torch.addmm(s.b, x.reshape(-1, 8), s.w).reshape(x.shape[0], x.shape[1], 4)

    after, _ = run(captured(f, X, w=W, b=B, dynamic="auto"), RaiseLinear())
    assert ops(after)[-1] == "linear"
    x = torch.randn(5, 7, 8)
    torch.testing.assert_close(after(x)[0], x @ W + B)
