"""Masks of ones, sums with zeros: whatever their size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphwright.passes._uniform import uniform
from graphwright.passes.fold_uniform import FoldUniform

X, Q = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)), torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(2))


def extended(s, x):
    """The mask that a transformer makes when none is given."""
    mask = torch.ones(x.shape[0], x.shape[2])[:, None, None, :]
    return F.scaled_dot_product_attention(x, x, x, attn_mask=(1.0 - mask) * torch.finfo(x.dtype).min)


def test_golden(captured, run, body):
    program = captured(extended, Q)
    assert "attn" in body(program) or "aten.ones" in body(program)
    after, result = run(program, FoldUniform())
    assert body(after) == (
        "scaled_dot_product_attention_default: f32[2, 2, 5, 4] = aten.scaled_dot_product_attention(input_0, input_0, input_0, None, 0.0, False, "
        "scale=None, enable_gqa=False)  # scaled_dot_product_attention\nreturn (scaled_dot_product_attention_default)"
    )
    assert result.changes == [("scaled_dot_product_attention", "a mask that hides nothing dropped")]


def test_sizes_that_vary(captured, run, ops):
    after, _ = run(captured(extended, Q, dynamic={"input_0": {0: "batch", 2: "length"}}), FoldUniform())
    assert [o for o in ops(after) if o != "sym_size"] == ["scaled_dot_product_attention"]
    x = torch.randn(3, 2, 9, 4)
    torch.testing.assert_close(after(x)[0], F.scaled_dot_product_attention(x, x, x))


@pytest.mark.parametrize(
    ("f", "left"),
    [
        (lambda x: (x + torch.zeros(x.shape)).exp(), ["exp"]),
        (lambda x: (torch.zeros_like(x) + x).exp(), ["exp"]),
        (lambda x: (x - torch.zeros(8)).exp(), ["exp"]),
        (lambda x: (x * torch.ones(x.shape[0], 1, 1)).exp(), ["exp"]),
        (lambda x: (x / torch.full((8,), 1.0)).exp(), ["exp"]),
        (lambda x: x.masked_fill(torch.ones(5, 1) == 0, -1.0).exp(), ["exp"]),
        (lambda x: torch.where(torch.ones(8, dtype=torch.bool), x, x * 2).exp(), ["exp"]),
        (lambda x: ((x > 0) & torch.ones_like(x, dtype=torch.bool)).float(), ["gt", "to"]),
        (lambda x: ((x > 0) | torch.zeros_like(x, dtype=torch.bool)).float(), ["gt", "to"]),
        (lambda x: (x * torch.cat([torch.ones(4), torch.ones(4)])).exp(), ["exp"]),
    ],
)  # fmt: skip
def test_what_is_left(f, left, captured, run, ops):
    after, _ = run(captured(lambda s, x: f(x), X), FoldUniform())
    assert ops(after) == left and torch.equal(after(X)[0], f(X))


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda x: 1 / (x + torch.zeros(8)), "adding 0 turns -0.0 into 0.0, and reciprocal (aten.reciprocal) may read the sign of a zero"),
        (lambda x: (x * torch.ones(3, 1, 1, 1)).exp(), "it also changes shape or dtype"),
        (lambda x: x * torch.ones(8), "it also gives memory of its own, in a layout of its own"),
        (lambda x: (x.long() * torch.ones(8)).exp(), "it also changes shape or dtype"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.zeros(5, 5, dtype=torch.bool)), "its mask hides everything"),
    ],
)  # fmt: skip
def test_what_stays(f, reason, captured, run):
    _, result = run(captured(lambda s, x: f(x), X), FoldUniform())
    assert not result.changes and [r for _, r in result.refusals] == [reason]


def test_a_parameter_of_ones_may_be_trained(captured, run):
    _, result = run(captured(lambda s, x: (x * s.g).exp(), X, g=torch.ones(8)), FoldUniform())
    assert not result.changes


def test_numbers_are_those_of_the_dtype(captured):
    program = captured(lambda s, x: (torch.full((2,), 0.1), torch.full((2,), 300).to(torch.uint8), ~torch.ones(2, dtype=torch.bool), torch.ones(2) * 3 - 1, torch.ones(2) * x.sum(),
                                      torch.ones(2).view(torch.int32)), X)
    found = [uniform(program).get(o) for o in program.output.args[0]]
    assert found[0] == torch.tensor(0.1).item() and found[1] == 44 and found[3] == 2.0 and found[4:] == [None, None]


def test_left_out_sites_stay(captured, run, ops):
    after, result = run(captured(lambda s, x: (x + torch.zeros(8)).exp(), X), FoldUniform(exclude=("add",)))
    assert ops(after) == ["zeros", "add", "exp"] and result.refusals == [("add", "left out by include / exclude")]
