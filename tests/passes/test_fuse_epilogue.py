"""Epilogues and merged linears."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphwright.ops.fused import ACTIVATIONS
from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.fuse_epilogue import FuseEpilogue
from graphwright.passes.merge_linears import MergeLinears

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))
W, B = torch.randn(8, 8), torch.randn(8)


def test_golden(captured, run, body):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return F.relu(self.a(x) + self.b(x))

    after, result = run(captured(Residual(), IMAGE), FuseEpilogue())
    assert body(after) == (
        "conv_default: f32[1, 4, 6, 6] = graphwright.conv(x, a_weight, a_bias, [1, 1], [0, 0], [1, 1], 1, None, 'none', [])  # a\n"
        "conv_default_3: f32[1, 4, 6, 6] = graphwright.conv(x, b_weight, b_bias, [1, 1], [1, 1], [1, 1], 1, conv_default, 'relu', [])  # b, add, relu\n"
        "return (conv_default_3)"
    )
    assert result.changes[-2:] == [("add", "residual add drawn into b"), ("relu", "relu drawn into b")]


_CALLS = {
    "relu": torch.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "sigmoid": torch.sigmoid,
    "tanh": torch.tanh, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "hardtanh": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2), "elu": F.elu, "selu": F.selu, "mish": F.mish, "softplus": F.softplus,
}  # fmt: skip


def test_every_activation_is_covered():
    assert set(_CALLS) == set(ACTIVATIONS) - {"none"}


@pytest.mark.parametrize("name", _CALLS)
def test_activations_are_drawn_in(name, captured, run):
    after, result = run(captured(lambda s, x: _CALLS[name](F.linear(x, s.w, s.b)), X, w=W, b=B), FuseEpilogue())
    (node,) = after.nodes
    assert node.args[4] == name and not result.refusals


def test_residual_then_activation_but_not_the_other_way_round(captured, run, ops):
    after, _ = run(captured(lambda s, x: F.gelu(F.linear(x, s.w) + x), X, w=W), FuseEpilogue())
    assert ops(after) == ["linear"]
    after, _ = run(captured(lambda s, x: F.gelu(F.linear(x, s.w)) + x, X, w=W), FuseEpilogue())
    assert ops(after) == ["linear", "add"]


def test_of_two_contractions_the_later_takes_the_sum(captured, run):
    after, _ = run(captured(lambda s, x: F.linear(x, s.w) + F.linear(x.exp(), s.w, s.b), X, w=W, b=B), FuseEpilogue())
    first, exp, last = after.nodes
    assert last.args[3] is first and last.args[0] is exp


def test_the_earlier_takes_it_where_the_later_cannot(captured, run):
    def f(s, x):
        a, b = F.linear(x, s.w), F.linear(x.exp(), s.w, s.b)
        return (a + b), b.sin()

    after, result = run(captured(f, X, w=W, b=B), FuseEpilogue())
    later, earlier = (n for n in after.nodes if len(n.args) == 6)
    assert earlier.args[0] is after.placeholders[0] and earlier.args[3] is later
    assert not result.refusals


CASES = [
    (lambda s, x: F.linear(x, s.w) + s.b, "the other operand has shape [8], not the output's [2, 8]"),
    (
        lambda s, x: x.reshape(1, 2, 8) + F.linear(x, s.w),
        "the other operand has shape [1, 2, 8], not the output's [2, 8]",
    ),
    (lambda s, x: torch.add(F.linear(x, s.w), x, alpha=2), "its alpha is 2, not 1"),
    (lambda s, x: F.linear(x, s.w) + x.double(), "it mixes torch.float32 and torch.float64"),
    (lambda s, x: (lambda y: y + y)(F.linear(x, s.w)), "it adds linear to itself"),  # noqa: PLC3002
    (lambda s, x: (lambda y: y + x + y.exp())(F.linear(x, s.w)), "linear is read by exp too"),  # noqa: PLC3002
    (lambda s, x: (lambda y: F.relu(y) + y.exp())(F.linear(x, s.w)), "linear is read by exp too"),  # noqa: PLC3002
    (lambda s, x: F.linear(x, x), "its weight is computed, or written to"),
    (lambda s, x: F.conv_transpose1d(x[None], s.t), "a transposed convolution has no fused form"),
    (
        lambda s, x: F.conv1d(x[None], s.e, padding="same"),
        "padding 'same' adds [1] in all: an odd number cannot stand on both sides alike",
    ),
]


@pytest.mark.parametrize(("f", "reason"), CASES)
def test_refusals(f, reason, captured, run):
    program = captured(f, X, w=W, b=B, t=torch.randn(2, 3, 3), e=torch.randn(3, 2, 2))
    _, result = run(program, FuseEpilogue())
    assert reason in [r for _, r in result.refusals]


def test_integers_are_left_alone(captured, run):
    program = captured(lambda s, x: F.linear(x.long(), s.i), X, i=torch.ones(4, 8, dtype=torch.int64))
    _, result = run(program, FuseEpilogue())
    assert [r for _, r in result.refusals] == ["its weight is torch.int64"]


@pytest.mark.parametrize("padding", ["same", "valid", 1, (1, 0)])
def test_convolutions_are_spelled_with_numbers_per_axis(padding, captured, run):
    model = nn.Conv2d(3, 4, 3, padding=padding, dilation=2)
    after, _ = run(captured(model, IMAGE), FuseEpilogue())
    expected = {"same": [2, 2], "valid": [0, 0], 1: [1, 1], (1, 0): [1, 0]}[padding]
    assert list(after.nodes[0].args[4]) == expected


@pytest.mark.parametrize("n", [1, 3])
def test_other_ranks_and_unbatched_input(n, captured, run, ops):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1](3, 4, 3, stride=2)
    after, _ = run(captured(nn.Sequential(conv, nn.ReLU()), torch.randn(3, *[7] * n)), FuseEpilogue())
    assert ops(after) == ["conv"]


def test_sizes_that_vary_still_match(captured, run, ops):
    program = captured(lambda s, x: F.relu(F.linear(x, s.w) + x), X, w=W, dynamic="auto")
    after, _ = run(program, FuseEpilogue())
    assert ops(after) == ["linear"]
    x = torch.randn(7, 8)
    torch.testing.assert_close(after(x)[0], F.relu(x @ W.t() + x))


# -- merged linears --------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    def __init__(self, bias=(True, False), act=None):
        super().__init__()
        self.q, self.k = nn.Linear(8, 4, bias=bias[0]), nn.Linear(8, 6, bias=bias[1])
        self.act = act

    def forward(self, x):
        q = self.q(x)
        return (q if self.act is None else self.act(q)).reshape(2, 2, 2).sum(-1), self.k(x).exp()


def test_golden_merge(captured, run, body):
    after, result = run(captured(Heads(), X), FuseEpilogue(), MergeLinears())
    assert body(after) == (
        "linear_default_4: f32[2, 10] = graphwright.linear(x, q_weight_merged, q_bias_merged, None, 'none', [])  # q, k\n"
        "split_with_sizes_default: (f32[2, 4], f32[2, 6]) = aten.split_with_sizes(linear_default_4, [4, 6], -1)  # q, k\n"
        "getitem: f32[2, 4] = operator.getitem(split_with_sizes_default, 0)  # q\n"
        "getitem_1: f32[2, 6] = operator.getitem(split_with_sizes_default, 1)  # k\n"
        "reshape_default: f32[2, 2, 2] = aten.reshape(getitem, [2, 2, 2])  # reshape\n"
        "sum_dim_int_list: f32[2, 2] = aten.sum.dim_IntList(reshape_default, [-1], False, dtype=None)  # sum\n"
        "exp_default: f32[2, 6] = aten.exp(getitem_1)  # exp\n"
        "return (sum_dim_int_list, exp_default)"
    )
    assert result.changes == [("q", "2 linears merged: q, k")]
    assert after.provenance["q.weight_merged"] == ("q.weight", "k.weight")
    assert torch.equal(after.tensor("q.bias_merged")[4:], torch.zeros(6))


@pytest.mark.parametrize("bias", [(False, False), (True, True), (False, True)])
def test_biases(bias, captured, run, ops):
    after, _ = run(captured(Heads(bias), X), MergeLinears())
    assert ops(after).count("linear") == 1 and len(after.tensors()) == 1 + any(bias)


def test_different_epilogues_stay_apart(captured, run, ops):
    after, result = run(captured(Heads(act=F.silu), X), FuseEpilogue(), MergeLinears())
    assert ops(after).count("linear") == 2 and not result.modified


def test_views_that_no_longer_fit_are_copied(captured, run, ops):
    """A part of the merged output is no contiguous tensor: flattening it needs a copy, and the IR says so."""

    def f(s, x):
        return F.linear(x, s.w).view(-1).exp(), F.linear(x, s.v).view(2, 2, 4).exp()

    program = captured(f, X, w=W, v=torch.randn(8, 8))
    for node in program.nodes:
        if node.target is torch.ops.aten.reshape.default:
            node.target = torch.ops.aten.view.default
    after, _ = run(program, MergeLinears())
    assert ops(after)[4:] == ["reshape", "exp", "view", "exp"]


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (
            lambda s, x: (F.linear(x, s.w), F.linear(x, s.v).exp()),
            "it leaves the program, and would share memory with the others",
        ),
        (
            lambda s, x: F.linear(x, s.w).exp() + F.linear(x, s.w, s.b).sin(),
            "its weight w is read elsewhere too: it would be stored twice",
        ),
        (lambda s, x: F.linear(x, s.w).exp() + F.linear(x, s.v * x.sum()).sin(), "its weight or bias is no constant"),
    ],
)
def test_merge_refusals(f, reason, captured, run):
    program = captured(f, X, w=W, v=torch.randn(8, 8), b=B)
    _, result = run(program, MergeLinears())
    assert reason in [r for _, r in result.refusals] and not result.changes


def test_merge_options(captured, run, ops):
    def f(s, x):
        return sum(F.linear(x, getattr(s, n)).sin() for n in "abcde")

    tensors = {n: torch.randn(4, 8) for n in "abcde"}
    after, _ = run(captured(f, X, **tensors), Canonicalize(), MergeLinears(most=3))
    assert ops(after).count("linear") == 2  # three and two
    after, result = run(captured(f, X, **tensors), MergeLinears(max_columns=4))
    assert ops(after).count("linear") == 5 and "fills the machine by itself" in result.refusals[0][1]
    after, _ = run(captured(f, X, **tensors), MergeLinears(exclude=("linear",)))
    assert ops(after).count("linear") == 2  # one left out, four merged


class Turned(nn.Module):
    """Two blocks of linears on the channels of pictures, each with the picture added as it came in."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.mix = nn.Linear(3, 3), nn.Linear(3, 3), nn.Conv2d(3, 3, 3, padding=1, groups=3)

    def forward(self, x):
        x = x + self.a(self.mix(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.b(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + x
        return x.sum((2, 3))


def test_residuals_are_drawn_in_past_transposes_where_that_moves_nothing(captured, run, ops):
    last = IMAGE.contiguous(memory_format=torch.channels_last)
    after, result = run(captured(Turned(), last), FuseEpilogue())
    assert "add" not in ops(after) and [c for c in result.changes if "past a transpose" in c[1]] == [
        ("add", "residual add drawn into a, past a transpose"), ("add#2", "residual add drawn into b, past a transpose")]  # fmt: skip
    first, second = (n for n in after.nodes if "linear" in str(n.target))
    assert second.args[3] is first, "what was turned there and back is read as it is"
    after, _ = run(captured(Turned(), IMAGE), FuseEpilogue())
    assert "add" in ops(after), "other strides would have to be copied"
