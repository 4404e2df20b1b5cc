"""Slices, splits and concatenations that meet."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.simplify_parts import SimplifyParts

X = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))


def test_golden(captured, run, body):
    """A part taken out of a concatenation, and adjacent pieces put together again."""

    def f(s, x):
        y = torch.cat([x.sin(), x.cos()], 1)
        a, b, c = x.split([2, 3, 1], 1)
        return y[:, 7:9] * 2, torch.cat([a, b, c.neg()], 1)

    after, result = run(captured(f, X), SimplifyParts())
    assert body(after) == (
        "cos_default: f32[2, 6, 4] = aten.cos(input_0)  # cos\n"
        "split_with_sizes_default: (f32[2, 2, 4], f32[2, 3, 4], f32[2, 1, 4]) = aten.split_with_sizes(input_0, [2, 3, 1], 1)  # split_with_sizes\n"
        "getitem_2: f32[2, 1, 4] = operator.getitem(split_with_sizes_default, 2)\n"
        "slice_tensor_1: f32[2, 2, 4] = aten.slice.Tensor(cos_default, 1, 1, 3, 1)  # slice\n"
        "mul_tensor: f32[2, 2, 4] = aten.mul.Tensor(slice_tensor_1, 2)  # mul\n"
        "neg_default: f32[2, 1, 4] = aten.neg(getitem_2)  # neg\n"
        "slice_tensor_2: f32[2, 5, 4] = aten.slice.Tensor(input_0, 1, 0, 5, 1)  # cat#2\n"
        "cat_default_2: f32[2, 6, 4] = aten.cat([slice_tensor_2, neg_default], 1)  # cat#2\n"
        "return (mul_tensor, cat_default_2)"
    )
    assert [w for _, w in result.changes] == ["taken from a part of cat", "2 adjacent pieces joined"]


@pytest.mark.parametrize(
    ("f", "left"),
    [
        (lambda x: torch.cat(x.chunk(3, 1), 1).sin(), ["sin"]),
        (lambda x: torch.cat(x.chunk(3, 1), 0).sin(), ["chunk", "getitem", "getitem", "getitem", "cat", "sin"]),
        (lambda x: torch.cat([x[:, :2], x[:, 2:]], 1).sin(), ["sin"]),
        (lambda x: torch.cat([x[:, 1:2], x[:, 2:4]], 1).sin(), ["slice", "sin"]),
        (lambda x: torch.cat([x[:, 2:], x[:, :2]], 1).sin(), ["slice", "slice", "cat", "sin"]),
        (lambda x: torch.cat([torch.cat([x, x.sin()], 1), x.cos()], 1), ["sin", "cos", "cat"]),
        (lambda x: torch.cat([torch.cat([x, x.sin()], 2), torch.cat([x, x], 2)], 1), ["sin", "cat", "cat", "cat"]),
        (lambda x: [p * 2 for p in torch.cat([x.sin(), x.cos()], 1).chunk(2, 1)], ["sin", "cos", "mul", "mul"]),
        (lambda x: torch.cat([x.sin(), x.cos(), x.exp()], 1)[:, 6:] * 2, ["cos", "exp", "cat", "mul"]),
        (lambda x: x[:, 1:][:, 1:3].sin(), ["slice", "sin"]),
        (lambda x: x.split(2, 1)[1][:, 1:].sin(), ["slice", "sin"]),
        (lambda x: torch.stack([x.sin(), x.cos()])[1].exp(), ["cos", "exp"]),
        (lambda x: torch.stack(x.unbind(1), 1).exp(), ["exp"]),
        (lambda x: torch.stack([x.sin(), x.cos()], 1).unbind(1)[0].exp(), ["sin", "exp"]),
        (lambda x: torch.cat([x, x[:, :0]], 1).sin(), ["sin"]),
        (lambda x: torch.cat([x, x], 1).narrow(1, 6, 6).sin(), ["sin"]),
        (lambda x: torch.cat([x, x], 1)[:, ::2].sin(), ["cat", "slice", "sin"]),
    ],
)  # fmt: skip
def test_what_is_left(f, left, captured, run, ops):
    after, _ = run(captured(lambda s, x: f(x), X), Canonicalize(), SimplifyParts(), Canonicalize())
    assert sorted(ops(after)) == sorted(left)


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda x: torch.cat([x.sin(), x.cos()], 1)[:, 4:8] * 2, "it cuts through parts of cat"),
        (lambda x: (lambda y: (y[:, 6:] * 2, y.sum()))(torch.cat([x.sin(), x.cos(), x.exp()], 1)), "cat is read by sum too"),  # noqa: PLC3002
        (lambda x: torch.cat([x, x.sin()], 1)[:, :6], "an output would share memory with input_0"),
        (lambda x: torch.cat([x[:, :2], x[:, 2:5]], 1), "an output would share memory with input_0"),
        (lambda x: torch.cat([x.sin(), x.long()], 1)[:, 6:] + 1, "cat also changes the dtype"),
    ],
)  # fmt: skip
def test_what_stays(f, reason, captured, run):
    _, result = run(captured(lambda s, x: f(x), X), SimplifyParts())
    assert not result.changes and reason in [r for _, r in result.refusals]


def test_sizes_that_vary(captured, run, ops):
    """Along an axis of unknown size too, as far as the pieces' own numbers are known."""

    def f(s, x):
        y = torch.cat([x.sin(), x.cos()], 2)
        a, b = y.chunk(2, 2)
        return a * b, torch.cat([x.exp(), x[:, :1]], 1)[:, :-1] + 1, x[:, 1:][:, 1:].sin()

    after, _ = run(captured(f, X, dynamic={"input_0": {0: "batch", 1: "length"}}), Canonicalize(), SimplifyParts())
    assert ops(after).count("chunk") == 0
    for shape in ((1, 5, 4), (3, 9, 4)):
        x = torch.randn(shape)
        for a, b in zip(after(x), f(None, x), strict=True):
            torch.testing.assert_close(a, b)


def test_strides_change_and_views_become_reshapes(captured, run, ops):
    after, _ = run(captured(lambda s, x: torch.cat([x[:, 1:2], x[:, 2:4]], 1).view(2, 12).sin(), X), SimplifyParts())
    assert ops(after) == ["slice", "reshape", "sin"]


def test_left_out_sites_stay(captured, run, ops):
    after, result = run(captured(lambda s, x: x[:, 1:][:, 1:3].sin(), X), SimplifyParts(exclude=("slice*",)))
    assert ops(after) == ["slice", "slice", "sin"] and result.refusals == [("slice#2", "left out by include / exclude")]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None, phases=[Phase.generate])
@given(cuts=st.lists(st.integers(1, 5), max_size=3), order=st.randoms(use_true_random=False), axis=st.integers(0, 1))
def test_any_cutting_and_joining_gives_the_same(captured, run, cuts, order, axis):
    x = torch.randn(6, 6)
    bounds = [0, *sorted(set(cuts)), 6]
    places, start = list(range(len(bounds) - 1)), order.randrange(6)
    if order.random() < 0.4:
        order.shuffle(places)

    def f(s, x):
        pairs = list(itertools.pairwise(bounds))
        y = torch.cat([x.narrow(axis, pairs[k][0], pairs[k][1] - pairs[k][0]) for k in places], axis)
        z = torch.cat([y, x.sin()], axis)
        return y.cos(), z.narrow(axis, start, 5) * 2

    program = captured(f, x)
    after, _ = run(program, SimplifyParts())
    assert all(torch.equal(a, b) for a, b in zip(after(x), program(x), strict=True))
