"""Transposes that meet."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.fold_constants import FoldConstants
from graphwright.passes.layout import Layout
from graphwright.passes.merge_heads import MergeHeads

X = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
s_weight, s_square, s_wide = torch.tensor([0.5, 2.0, 3.0]), torch.eye(5) + 0.1, torch.linspace(-1, 1, 30).reshape(6, 5)


def test_golden(captured, run, body):
    after, result = run(captured(lambda s, x: F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), X), Layout())
    assert body(after) == (
        "gelu_default: f32[2, 3, 4, 5] = aten.gelu(input_0, approximate='none')  # gelu, permute#2\n"
        "return (gelu_default)"
    )
    assert result.changes == [("permute#2", "transposes joined across 1 op")]


@pytest.mark.parametrize(
    ("f", "left"),
    [
        (lambda x: (x.permute(0, 2, 3, 1).sin() * 2).permute(0, 3, 1, 2), ["sin", "mul"]),
        (lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 2, 3, 1), ["relu", "permute"]),
        (lambda x: (lambda y: y.permute(0, 3, 1, 2).sin() + y.permute(0, 2, 1, 3).sum(3, keepdim=True).sum())(x.permute(0, 2, 3, 1).exp()),  # noqa: PLC3002
         ["exp", "permute", "sin", "sum", "sum", "add"]),
        (lambda x: x.permute(0, 2, 3, 1).relu() + 1, ["permute", "relu", "add"]),
        (lambda x: x.permute(0, 2, 3, 1).softmax(-1).permute(0, 3, 1, 2), ["softmax"]),
        (lambda x: x.permute(0, 2, 3, 1).mean((1, 2)), ["mean"]),
        (lambda x: x.permute(0, 2, 3, 1).sum(1), ["permute", "sum"]),
        (lambda x: x.permute(0, 3, 1, 2).sum(1), ["sum"]),
        (lambda x: x.permute(0, 2, 3, 1).select(3, 1) + 1, ["select", "add"]),
        (lambda x: (lambda y: torch.cat([y.sin(), y], 3).permute(0, 3, 1, 2))(x.permute(0, 2, 3, 1)), ["sin", "cat"]),  # noqa: PLC3002
        (lambda x: torch.cat([p.exp() for p in x.permute(0, 2, 3, 1).split(1, 3)], 3).permute(0, 3, 1, 2), ["split", *["getitem", "exp"] * 3, "cat"]),
        (lambda x: (x.permute(0, 2, 3, 1) + x.sin().permute(0, 2, 3, 1)).permute(0, 3, 1, 2), ["sin", "add"]),
        (lambda x: (x[:, :, :3, :3].permute(0, 2, 3, 1) + x[:, :, :3, :3].sin().permute(0, 3, 2, 1)).permute(0, 3, 1, 2),
         ["slice", "slice", "slice", "slice", "sin", "permute", "permute", "add", "permute"]),
        (lambda x: (x.permute(0, 2, 3, 1) * s_weight).permute(0, 3, 1, 2), ["mul"]),
        (lambda x: F.linear(x.permute(0, 2, 1, 3), s_square).permute(0, 2, 1, 3), ["linear"]),
        (lambda x: F.layer_norm(x.permute(0, 3, 2, 1), (3,)).permute(0, 3, 2, 1), ["permute", "layer_norm", "permute"]),
        (lambda x: x.reshape(6, 4, 5).relu().reshape(2, 3, 4, 5) + 1, ["relu", "add"]),
        (lambda x: F.linear(F.linear(x.reshape(-1, 5), s_wide).relu(), s_wide.T).reshape(2, 3, 4, 5) + 1, ["linear", "relu", "linear", "add"]),
        (lambda x: F.linear(x.reshape(-1, 5), s_wide).sum() + 1, ["reshape", "linear", "sum", "add"]),
        (lambda x: x.permute(0, 2, 3, 1).sin().permute(0, 3, 1, 2).cos().permute(0, 2, 3, 1).exp().permute(0, 3, 1, 2), ["sin", "cos", "exp"]),
        (lambda x: (x.permute(0, 2, 3, 1) + torch.ones(3)).permute(0, 3, 1, 2), ["add"]),
        (lambda x: (lambda y: y.relu().permute(0, 3, 1, 2) + y.sum())(x.permute(0, 2, 3, 1)), ["permute", "relu", "sum", "add"]),  # noqa: PLC3002
    ],
)  # fmt: skip
def test_where_it_moves_and_where_not(f, left, captured, run, ops):
    program = captured(lambda s, x: f(x), X)
    after, _ = run(program, Canonicalize(), FoldConstants(), Layout())
    assert sorted(ops(after)) == sorted(left)
    assert [o.is_contiguous() for o in after(X)] >= [o.is_contiguous() for o in program(X)]


def test_regions_that_follow_each_other(captured, run, ops):
    """Where one ends another starts: they move one after the other."""
    turn = (0, 3, 2, 1)

    def f(s, x):
        y = x.permute(turn).sin().permute(turn).cos().permute(turn) * s.g
        return y.permute(0, 2, 1, 3)

    program = captured(f, X, g=torch.rand(4, 1))
    after, _ = run(program, Layout())
    assert sorted(ops(after)) == ["cos", "mul", "permute", "sin"]
    assert torch.equal(after(X)[0], program(X)[0])


def test_sizes_that_vary(captured, run, ops):
    def f(s, x):
        y = x.permute(0, 2, 3, 1)
        z = torch.cat([y.softmax(1), y], 3).permute(0, 3, 1, 2)
        return z, F.linear(x.reshape(-1, 5), s.w).relu().reshape(*x.shape[:3], 6) * 2

    program = captured(f, X, dynamic={"input_0": {0: "batch", 2: "height"}}, w=s_wide)
    after, _ = run(program, Canonicalize(), Layout())
    assert "permute" not in ops(after) and "reshape" not in ops(after)
    for shape in ((1, 3, 4, 5), (3, 3, 7, 5)):
        x = torch.randn(shape)
        for a, b in zip(after(x), program(x), strict=True):
            torch.testing.assert_close(a, b)


def test_a_shared_constant_is_turned_for_its_reader_alone(captured, run, ops):
    program = captured(lambda s, x: (x.permute(0, 2, 3, 1) * s.g).permute(0, 3, 1, 2) + s.g.sum(), X, g=torch.randn(4, 5, 3))
    after, _ = run(program, Layout())
    assert ops(after) == ["mul", "sum", "add"] and set(after.tensors()) == {"g", "g_turned"}
    assert torch.equal(after.tensor("g"), program.tensor("g"))


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
