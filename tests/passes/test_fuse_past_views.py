"""What stands behind views, or beside another branch, reaches its linear all the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.fold_batch_norm import FoldBatchNorm
from graphwright.passes.fold_constants import FoldConstants
from graphwright.passes.fuse_epilogue import FuseEpilogue
from graphwright.passes.merge_linears import MergeLinears
from graphwright.passes.raise_linear import RaiseLinear

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3))


def matrices(count: int, rows: int = 8) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return {name: torch.randn(rows, 8) / 3 for name in "abcd"[:count]}


def linear(x, w):
    return nn.functional.linear(x, w)


def test_golden_activation_behind_views(captured, run, body):
    after, result = run(captured(lambda s, x: linear(x, s.a).transpose(1, 2).reshape(2, 2, 4, 3).relu(), X, **matrices(1)), Canonicalize(), FuseEpilogue())
    assert body(after) == (
        "linear_default_2: f32[2, 3, 8] = graphwright.linear(input_0, a, None, None, 'relu', [])  # linear, relu\n"
        "permute_default: f32[2, 8, 3] = aten.permute(linear_default_2, [0, 2, 1])  # transpose\n"
        "reshape_default: f32[2, 2, 4, 3] = aten.reshape(permute_default, [2, 2, 4, 3])  # reshape\n"
        "return (reshape_default)"
    )
    assert result.changes[-1] == ("relu", "relu drawn into linear, past views")


def test_an_activation_behind_a_view_that_others_read_stays(captured, run, ops):
    def f(s, x):
        y = linear(x, s.a).transpose(1, 2)
        return y.relu() + y.cos()

    after, _ = run(captured(f, X, **matrices(1)), Canonicalize(), FuseEpilogue())
    assert "relu" in ops(after)


def test_golden_parallel_branches_and_their_residual(captured, run, body):
    """(attention + feed-forward) + x, as GPT-J adds them: the earlier linear takes x, the later one the earlier one's result."""
    after, result = run(captured(lambda s, x: linear(x.sin(), s.a) + linear(x.cos(), s.b) + x, X, **matrices(2)), FuseEpilogue())
    assert body(after) == (
        "sin_default: f32[2, 3, 8] = aten.sin(input_0)  # sin\n"
        "linear_default_4: f32[2, 3, 8] = graphwright.linear(sin_default, a, None, input_0, 'none', [])  # linear\n"
        "cos_default: f32[2, 3, 8] = aten.cos(input_0)  # cos\n"
        "linear_default_5: f32[2, 3, 8] = graphwright.linear(cos_default, b, None, linear_default_4, 'none', [])  # linear#2, add\n"
        "return (linear_default_5)"
    )
    assert [c for c in result.changes if "residual" in c[1]] == [
        ("add#2", "residual add drawn into linear"),
        ("add", "residual add drawn into linear#2"),
    ]


def test_what_is_computed_after_the_earlier_branch_is_not_added_to_it(captured, run, ops):
    def f(s, x):
        first, second = linear(x.sin(), s.a), linear(x.cos(), s.b)
        return (first + second) + x.exp()

    after, _ = run(captured(f, X, **matrices(2)), FuseEpilogue())
    assert ops(after) == ["sin", "linear", "cos", "linear", "exp", "add"]


class Normed(nn.Module):
    """LeViT's: linear, then batch norm over all places of all examples at once."""

    def __init__(self, mean: float = 0.1):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 6), nn.BatchNorm1d(6)
        self.norm.running_mean.fill_(mean)
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x):
        y = self.linear(x)
        return self.norm(y.flatten(0, 1)).reshape_as(y)


def test_golden_batch_norm_behind_a_view(captured, run, body):
    after, result = run(captured(Normed(), X), Canonicalize(), FoldBatchNorm())
    assert body(after) == (
        "linear_default: f32[2, 3, 6] = aten.linear(x, linear_weight_folded, linear_bias_folded)  # linear, norm\n"
        "return (linear_default)"
    )
    assert result.changes == [("norm", "batch norm folded into linear linear, past views")]


def test_a_batch_norm_that_takes_most_away_stays_behind_its_view(captured, run, ops):
    after, result = run(captured(Normed(mean=1e3), X), Canonicalize(), FoldBatchNorm())
    assert "batch_norm" in ops(after)
    assert result.refusals == [("norm", "the folded bias would take away most of what is left")]


def test_rows_that_were_heads_keep_their_batch(captured, run, body):
    """GPT-2's: heads are merged into rows of a matrix, and the rows become a batch again behind the product."""

    def f(s, x):
        return torch.addmm(s.b, x.transpose(1, 2).reshape(-1, 8), s.w).view(2, 3, 5)

    after, _ = run(captured(f, torch.randn(2, 2, 3, 4), w=torch.randn(8, 5), b=torch.randn(5)), Canonicalize(), RaiseLinear())
    lines = body(after).splitlines()
    assert "aten.reshape(permute_default, [2, 3, 8])" in lines[1] and "f32[2, 3, 5] = aten.linear" in lines[2] and len(lines) == 4


def test_layers_that_share_their_weights_share_the_merged_ones(captured, run, ops):
    """ALBERT's: one layer, used several times."""

    def f(s, x):
        for _ in range(3):
            x = linear(x, s.a) * linear(x, s.b).sin() + linear(x, s.c)
        return x

    after, result = run(captured(f, X, **matrices(3)), FuseEpilogue(), MergeLinears())
    assert sum(what.startswith("2 linears merged") for _, what in result.changes) == 3
    assert ops(after).count("linear") == 6 and [n for n in after.tensors() if "merged" in n] == ["a_merged"]


def test_weights_that_another_reads_alone_are_not_merged(captured, run):
    def f(s, x):
        return linear(x, s.a).sin() * linear(x, s.b).cos() * linear(x.exp(), s.a).tan()

    _, result = run(captured(f, X, **matrices(2)), MergeLinears())
    assert not result.modified
    assert result.refusals == [("linear", "its weight a is read elsewhere too: it would be stored twice")]


def test_parts_of_a_constant_are_constants(captured, run, body):
    """The bias of ``torch.nn.functional.multi_head_attention_forward``: three joined, then taken apart again."""

    def f(s, x):
        parts = torch.cat([s.a[0], s.b[0], s.a[1]]).chunk(3)
        return x * parts[0] + parts[2]

    after, _ = run(captured(f, X, **matrices(2)), FoldConstants())
    assert "chunk" not in body(after) and body(after).count(" = ") == 2


def test_golden_gate_and_up_projection_are_one_product(captured, run, body):
    """SwiGLU: what the epilogue had taken in comes out again, and both parts come of one linear."""
    after, result = run(captured(lambda s, x: nn.functional.silu(linear(x, s.a)) * linear(x, s.b), X, **matrices(2)), FuseEpilogue(), MergeLinears())
    assert body(after) == (
        "linear_default_6: f32[2, 3, 16] = graphwright.linear(input_0, a_merged, None, None, 'none', [])  # linear, silu, linear#2\n"
        "split_with_sizes_default: (f32[2, 3, 8], f32[2, 3, 8]) = aten.split_with_sizes(linear_default_6, [8, 8], -1)  # linear, silu, linear#2\n"
        "getitem: f32[2, 3, 8] = operator.getitem(split_with_sizes_default, 0)  # linear, silu\n"
        "getitem_1: f32[2, 3, 8] = operator.getitem(split_with_sizes_default, 1)  # linear#2\n"
        "silu_default_1: f32[2, 3, 8] = aten.silu(getitem)  # linear, silu\n"
        "mul_tensor: f32[2, 3, 8] = aten.mul.Tensor(silu_default_1, getitem_1)  # mul\n"
        "return (mul_tensor)"
    )
    assert result.changes == [("linear", "silu taken out, to compute linear#2 with it"), ("linear", "2 linears merged: linear, silu, linear#2")]


def test_gates_are_merged_by_themselves_where_more_reads_their_input(captured, run):
    """Cohere's: query, key and value read what gate and up read; each kind is one product."""

    def f(s, x):
        return linear(x, s.c).sin() + linear(x, s.d).cos(), linear(x, s.b) * nn.functional.gelu(linear(x, s.a))

    after, _ = run(captured(f, X, **matrices(4)), FuseEpilogue(), MergeLinears())
    assert sorted(n for n in after.tensors() if "merged" in n) == ["b_merged", "c_merged"]


@pytest.mark.parametrize(
    "f",
    [
        lambda s, x: nn.functional.silu(linear(x, s.a)) * linear(x.sin(), s.b),  # of two inputs
        lambda s, x: nn.functional.silu(linear(x, s.a)) * nn.functional.silu(linear(x, s.b)).exp(),  # no product of linears
        lambda s, x: (lambda u: nn.functional.silu(linear(x, s.a)) * u + u)(linear(x, s.b)),  # noqa: PLC3002  read twice
        lambda s, x: nn.functional.silu(linear(x, s.a)) * linear(x, s.a.sin()),  # a weight that is computed
    ],
)
def test_gates_that_keep_their_activation(f, captured, run):
    after, _ = run(captured(f, X, **matrices(2)), FuseEpilogue(), MergeLinears())
    assert "'silu'" in after.text()


def test_wide_gates_stay_apart(captured, run):
    after, result = run(captured(lambda s, x: nn.functional.silu(linear(x, s.a)) * linear(x, s.b), X, **matrices(2)), FuseEpilogue(), MergeLinears(max_columns=8))
    assert not result.changes and "'silu'" in after.text()
