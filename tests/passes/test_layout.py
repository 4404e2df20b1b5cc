"""Transposes that meet."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.layout import Layout
from graphwright.passes.merge_heads import MergeHeads

X = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))


def test_golden(captured, run, body):
    after, result = run(captured(lambda s, x: F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), X), Layout())
    assert body(after) == (
        "gelu_default: f32[2, 3, 4, 5] = aten.gelu(input_0, approximate='none')  # gelu, permute#2\n"
        "return (gelu_default)"
    )
    assert result.changes == [("permute#2", "transposes joined across 1 elementwise op")]


@pytest.mark.parametrize(
    ("f", "left"),
    [
        (lambda x: (x.permute(0, 2, 3, 1).sin() * 2).permute(0, 3, 1, 2), ["sin", "mul"]),
        (lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 2, 3, 1), ["relu", "permute"]),
        (lambda x: (lambda y: y.permute(0, 3, 1, 2).sin() + y.permute(0, 2, 1, 3).sum(3, keepdim=True).sum())(x.permute(0, 2, 3, 1).exp()),  # noqa: PLC3002
         ["exp", "permute", "sin", "sum", "sum", "add"]),
        (lambda x: x.permute(0, 2, 3, 1).relu() + 1, ["permute", "relu", "add"]),
        (lambda x: x.permute(0, 2, 3, 1).softmax(-1).permute(0, 3, 1, 2), ["permute", "softmax", "permute"]),
        (lambda x: (x.permute(0, 2, 3, 1) + torch.ones(3)).permute(0, 3, 1, 2), ["ones", "permute", "add", "permute"]),
        (lambda x: (lambda y: y.relu().permute(0, 3, 1, 2) + y.sum())(x.permute(0, 2, 3, 1)), ["permute", "relu", "permute", "sum", "add"]),  # noqa: PLC3002
    ],
)  # fmt: skip
def test_where_it_moves_and_where_not(f, left, captured, run, ops):
    after, _ = run(captured(lambda s, x: f(x), X), Canonicalize(), Layout())
    assert sorted(ops(after)) == sorted(left)


def test_strides_are_known_afterwards(captured, run):
    """What follows reads other strides now: every value in the IR says so, and views that no longer fit are reshapes."""

    def f(s, x):
        return x.permute(0, 2, 3, 1).contiguous().sin().permute(0, 3, 1, 2).reshape(2, -1).cos()

    after, _ = run(captured(f, X), Canonicalize(), Layout())
    from torch import fx

    seen = {}

    class Strides(fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n.op == "call_function":
                seen[n] = tuple(value.stride())
            return value

    Strides(after.graph_module).run(X)
    assert seen == {n: tuple(n.meta["val"].stride()) for n in after.nodes}
    torch.testing.assert_close(after(X)[0], f(None, X))


def test_left_out_sites_stay(captured, run, ops):
    program = captured(lambda s, x: x.permute(0, 2, 3, 1).sin().permute(0, 3, 1, 2), X)
    after, result = run(program, Layout(exclude=("permute",)))
    assert ops(after) == ["permute", "sin", "permute"] and result.refusals


# -- merged heads ----------------------------------------------------------------------------------------------------


def attend(s, x, order=(0, 2, 1, 3)):
    y = F.scaled_dot_product_attention(x, x, x)
    return y.permute(order).reshape(y.shape[0], y.shape[2], -1).sin()


def test_merged_heads(captured, run, ops):
    after, result = run(captured(attend, X), Canonicalize(), MergeHeads())
    assert ops(after) == ["attention", "sin"] and len(result.changes) == 1


def test_merged_heads_with_sizes_that_vary(captured, run, ops):
    after, _ = run(captured(attend, X, dynamic={"input_0": {0: "batch"}}), Canonicalize(), MergeHeads())
    assert "attention" in ops(after)
    x = torch.randn(7, 3, 4, 5)
    torch.testing.assert_close(after(x)[0], attend(None, x))


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (
            lambda s, x: attend(s, x.bfloat16()),
            "it gives torch.bfloat16: the merged form is computed in float32 and stays there",
        ),
        (
            lambda s, x: attend(s, x, (0, 2, 3, 1)),
            "the permutation [0, 2, 3, 1] does not bring heads behind the sequence",
        ),
        (
            lambda s, x: F.scaled_dot_product_attention(x, x, x).permute(0, 2, 1, 3).reshape(4, -1),
            "the reshape gives (4, 30), not (2, 4, 15)",
        ),
    ],
)
def test_heads_that_stay(f, reason, captured, run):
    _, result = run(captured(f, X), Canonicalize(), MergeHeads())
    assert [r for _, r in result.refusals] == [reason]
