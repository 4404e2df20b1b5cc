"""Constants, common subexpressions, dead code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphwright.ir import site_of
from graphwright.passes.common_subexpressions import CommonSubexpressions
from graphwright.passes.dead_code import DeadCode
from graphwright.passes.fold_constants import FoldConstants

aten = torch.ops.aten
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def test_golden(captured, run, body):
    def f(self, x):
        return x + torch.arange(8).float() * self.w, self.w.exp()

    after, result = run(captured(f, X, w=torch.ones(8)), FoldConstants())
    assert body(after) == (
        "add_tensor: f32[3, 8] = aten.add.Tensor(input_0, w_folded, alpha=1)  # add\nreturn (add_tensor, w_folded_2)"
    )
    assert result.changes[0] == ("mul", "aten.mul.Tensor computed once, with 2 ops before it")
    assert after.provenance == {"w_folded": ("w",), "w_folded_2": ("w",)}
    assert isinstance(after.tensor("w_folded"), nn.Parameter)  # made from one: it may be trained


def test_random_and_undefined_numbers_are_never_folded(captured, run):
    def f(self, x):
        return x + torch.rand(8), x * torch.empty(8).fill_(2.0), torch.randperm(3)

    program = captured(f, X)
    program.example = None
    after, result = run(program, FoldConstants())
    reasons = {reason for _, reason in result.refusals}
    assert "it draws random numbers" in reasons
    assert not torch.equal(after(X)[0], after(X)[0])
    torch.testing.assert_close(after(X)[1], X * 2)


def test_what_would_grow_is_left_to_be_computed(captured, run, ops):
    def f(self, x):
        return x + self.w.exp().reshape(8, 1).expand(8, 100).sum(1)[:8] + self.w.reshape(1, 8).repeat(500, 1)[:3]

    after, result = run(captured(f, X, w=torch.ones(8)), FoldConstants(max_bytes=1000))
    assert ops(after) == ["add", "add"]  # big only on the way

    def g(self, x):
        return self.w.exp().reshape(1, 8).repeat(500, 1).reshape(4000) * x.sum()

    after, result = run(captured(g, X, w=torch.ones(8)), FoldConstants(max_bytes=100))
    assert "bytes larger than what it replaces" in result.refusals[0][1]
    assert "exp" not in ops(after) and "repeat" in ops(after)  # what comes before it is folded all the same


def test_a_transposed_weight_replaces_the_weight(captured, run):
    """As large as what it replaces: no matter how large."""
    program = captured(lambda self, x: x @ self.w.t().contiguous(), X, w=torch.randn(300, 8))
    after, result = run(program, FoldConstants(max_bytes=0))
    assert list(after.tensors()) == ["w_folded"] and result.modified
    assert after.size_bytes() == program.size_bytes()


def test_a_slice_does_not_keep_the_whole_alive(captured, run):
    program = captured(lambda self, x: x + self.table[:3], X, table=torch.randn(1000, 8))
    after, _ = run(program, FoldConstants())
    assert after.size_bytes() == 3 * 8 * 4


def test_a_mutated_buffer_is_no_constant(captured, run, ops):
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros(8))

        def forward(self, x):
            self.n += 1
            return x + self.n * 2

    after, _ = run(captured(Counter(), X), FoldConstants())
    assert "mul" in ops(after)


def test_sizes_that_vary_stay(captured, run, ops):
    program = captured(
        lambda self, x: x + torch.arange(x.shape[0]).reshape(-1, 1) * torch.arange(x.shape[1]), X, dynamic="auto"
    )
    after, _ = run(program, FoldConstants())
    x = torch.randn(6, 8)
    torch.testing.assert_close(after(x)[0], x + torch.arange(6).reshape(-1, 1) * torch.arange(8))


def test_quantize_pairs_are_how_a_constant_is_stored(captured, run):
    program = captured(lambda self, x: x + self.w, X, w=torch.randn(8))
    add = program.nodes[0]
    q = torch.ops.graphwright
    with program.graph.inserting_before(add):
        low = program.call(q.quantize.default, add.args[1], 0.1, 0, -128, 127, torch.int8, sites=["w"])
        high = program.call(q.dequantize.default, low, 0.1, 0, torch.float32, sites=["w"])
    add.args = (add.args[0], high)
    _, result = run(program, FoldConstants())
    assert not result.changes and "how a constant is stored" in result.refusals[0][1]


def test_left_out_sites_stay(captured, run, ops):
    program = captured(lambda self, x: x + self.w.exp(), X, w=torch.randn(8))
    after, result = run(program, FoldConstants(exclude=("exp",)))
    assert ops(after) == ["exp", "add"] and result.refusals == [("exp", "left out by include / exclude")]


# -- common subexpressions -------------------------------------------------------------------------------------------


def test_golden_common(captured, run, body):
    after, result = run(
        captured(lambda self, x: (x.exp() + 1) * (x.exp() + 1.0) * (x.exp() + 1), X), CommonSubexpressions()
    )
    assert body(after) == (
        "exp_default: f32[3, 8] = aten.exp(input_0)  # exp, exp#2, exp#3\n"
        "add_tensor: f32[3, 8] = aten.add.Tensor(exp_default, 1, alpha=1)  # add, add#3\n"
        "add_tensor_1: f32[3, 8] = aten.add.Tensor(exp_default, 1.0, alpha=1)  # add#2\n"
        "mul_tensor: f32[3, 8] = aten.mul.Tensor(add_tensor, add_tensor_1)  # mul\n"
        "mul_tensor_1: f32[3, 8] = aten.mul.Tensor(mul_tensor, add_tensor)  # mul#2\n"
        "return (mul_tensor_1)"
    )
    assert ("exp#2", "aten.exp shared with exp") in result.changes


def test_the_order_of_a_sum_makes_no_difference(captured, run, ops):
    def f(s, x):
        y = x.exp()
        return (x + y) * (y + x), x - y, y - x, torch.add(x, y, alpha=2), torch.add(y, x, alpha=2)

    after, _ = run(captured(f, X), CommonSubexpressions())
    assert ops(after) == ["exp", "add", "mul", "sub", "sub", "add", "add"]


def test_zero_and_minus_zero_are_two_numbers(captured, run, ops):
    after, _result = run(captured(lambda self, x: (x.exp() - 0.0) / (x.exp() - -0.0), X), CommonSubexpressions())
    assert ops(after).count("sub") == 2 and ops(after).count("exp") == 1


def test_random_calls_are_each_their_own(captured, run):
    program = captured(lambda self, x: torch.rand_like(x) - torch.rand_like(x), X)
    after, result = run(program, CommonSubexpressions())
    assert not result.modified and bool(after(X)[0].any())


def test_two_outputs_keep_memory_of_their_own(captured, run):
    program = captured(lambda self, x: (x.exp(), x.exp()), X)
    after, result = run(program, CommonSubexpressions())
    a, b = after(X)
    assert a.data_ptr() != b.data_ptr()
    assert result.refusals == [("exp#2", "it and exp leave the program: two outputs would share memory")]


def test_order_of_arguments_counts(captured, run, ops):
    after, _ = run(captured(lambda self, x: (x.exp() - x.sin()) * (x.sin() - x.exp()), X), CommonSubexpressions())
    assert ops(after) == ["exp", "sin", "sub", "sub", "mul"]


# -- dead code -------------------------------------------------------------------------------------------------------


def test_dead_code_is_erased_and_named(captured, run, ops):
    program = captured(lambda self, x: x.exp(), X, w=torch.randn(8))
    with program.graph.inserting_before(program.output):
        dead = program.call(aten.sin.default, program.placeholders[0], sites=["lost"])
        program.call(aten.cos.default, dead, sites=["lost#2"])
    after, result = run(program, DeadCode())
    assert ops(after) == ["exp"]
    assert sorted(result.changes)[-2:] == [
        ("lost", "aten.sin erased: nothing reads it"),
        ("lost#2", "aten.cos erased: nothing reads it"),
    ]


@pytest.mark.parametrize("p", [DeadCode(), FoldConstants(), CommonSubexpressions()])
def test_nothing_to_do_is_said(p, captured, run):
    program = captured(nn.Linear(8, 4), X)
    after, result = run(program, p)
    assert not result.modified and [site_of(n) for n in after.nodes] == [site_of(n) for n in program.nodes]
