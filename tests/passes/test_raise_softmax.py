"""Written-out softmax becomes the op; what only looks like it does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.common_subexpressions import CommonSubexpressions
from graphwright.passes.raise_attention import RaiseAttention
from graphwright.passes.raise_softmax import RaiseSoftmax

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


def stable(x, dim=-1):
    e = torch.exp(x - x.amax(dim, keepdim=True))
    return e / e.sum(dim, keepdim=True)


def test_golden(captured, run, body):
    after, result = run(captured(lambda s, x: stable(x), X), RaiseSoftmax())
    assert body(after) == "softmax_int: f32[2, 3, 8] = aten.softmax.int(input_0, 2, None)  # sub, exp, sum, div\nreturn (softmax_int)"
    assert result.changes == [("div", "4 ops → softmax")]


def halves(x):
    e = torch.exp(x - x.max(-1, keepdim=True)[0])
    return e / e.sum(-1).unsqueeze(-1)


def inverse(x):
    e = (x - x.max(1, keepdim=True).values).exp()
    return e * torch.reciprocal(e.sum(1, keepdim=True))


@pytest.mark.parametrize(("f", "op"), [
    (lambda s, x: stable(x, 0), "softmax"),
    (lambda s, x: halves(x), "softmax"),
    (lambda s, x: inverse(x), "softmax"),
    (lambda s, x: torch.exp(x) / torch.exp(x).sum(-1, keepdim=True), "softmax"),
    (lambda s, x: torch.exp(x - 3) / torch.exp(x - 3).sum(-1, keepdim=True), "softmax"),
    (lambda s, x: F.log_softmax(x, -1).exp(), "softmax"),
    (lambda s, x: x - torch.logsumexp(x, -1, keepdim=True), "log_softmax"),
    (lambda s, x: x - torch.logsumexp(x, 1).unsqueeze(1), "log_softmax"),
    (lambda s, x: torch.exp(x - torch.logsumexp(x, -1, keepdim=True)), "softmax"),
])  # fmt: skip
def test_spellings(f, op, captured, run, ops):
    after, _ = run(captured(f, X), Canonicalize(), CommonSubexpressions(), RaiseSoftmax())
    assert ops(after) == [op]


def wrong_axis(s, x):
    e = x[..., :3].exp()
    return e / e.sum(-1).unsqueeze(-2)


@pytest.mark.parametrize("f", [
    lambda s, x: x.exp() / x.sum(-1, keepdim=True),
    lambda s, x: x.exp() / (2 * x).exp().sum(-1, keepdim=True),
    lambda s, x: x.exp() / (x.exp().sum(-1, keepdim=True) + 1),
    lambda s, x: torch.exp2(x) / torch.exp2(x).sum(-1, keepdim=True),
    lambda s, x: torch.div(x.exp(), x.exp().sum(-1, keepdim=True), rounding_mode="floor"),
    lambda s, x: x - torch.logsumexp(2 * x, -1, keepdim=True),
    wrong_axis,
])  # fmt: skip
def test_what_only_looks_like_it(f, captured, run):
    _, result = run(captured(f, X), Canonicalize(), CommonSubexpressions(), RaiseSoftmax())
    assert not result.modified


def test_a_shift_along_the_axis_stays(captured, run, ops):
    """What differs from place to place along the axis is not a shift that softmax ignores."""
    after, _ = run(captured(lambda s, x: torch.exp(x - s.w) / torch.exp(x - s.w).sum(-1, keepdim=True), X, w=torch.rand(8)), CommonSubexpressions(), RaiseSoftmax())
    assert ops(after) == ["sub", "softmax"]


def test_large_numbers_no_longer_overflow(captured, run):
    program = captured(lambda s, x: x.exp() / x.exp().sum(-1, keepdim=True), X)
    after, _ = run(program, CommonSubexpressions(), RaiseSoftmax())
    assert torch.equal(after(200 * X)[0], torch.softmax(200 * X, -1))


@pytest.mark.parametrize(("f", "reason"), [
    (lambda s, x: (e := x.exp()) / e.sum(-1, keepdim=True) + e, "exp is read by add too"),
    (lambda s, x: (e := x.exp()) / e.sum((1, 2), keepdim=True), "it sums over 2 axes"),
    (lambda s, x: (e := x.exp()) / e.sum(-1, keepdim=True, dtype=torch.float64), "it sums in another dtype"),
])  # fmt: skip
def test_reasons(f, reason, captured, run):
    _, result = run(captured(f, X), RaiseSoftmax())
    assert not result.modified and [r for _, r in result.refusals] == [f"it spells softmax, but {reason}"]


def test_sizes_may_be_open(captured, run, ops):
    program = captured(lambda s, x: stable(x), X, dynamic={"input_0": {0: "n", 2: "m"}})
    after, _ = run(program, RaiseSoftmax())
    assert ops(after) == ["softmax"] and torch.allclose(after(torch.ones(5, 3, 4))[0], torch.full((5, 3, 4), 0.25))


def test_attention_is_found_behind_it(captured, run, ops):
    q = torch.randn(2, 4, 5, 8)
    after, _ = run(captured(lambda s, q, k, v: stable(q @ k.transpose(-1, -2) / 8**0.5) @ v, q, q + 1, q - 1), Canonicalize(), RaiseSoftmax(), RaiseAttention())
    assert ops(after) == ["scaled_dot_product_attention"]
