"""Cheaper arithmetic that gives the same bits."""

from __future__ import annotations

import pytest
import torch

from graphwright.passes.simplify_arithmetic import SimplifyArithmetic

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
#: What numbers may be: signed zeros, infinities, NaN, the largest and the smallest ones.
ODD = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.0e38, -3.0e38, 1.0e-38, 1.0e-45, float("inf"), float("-inf"), float("nan")])

#: Bit by bit the same.
EXACT = {
    "double negation": (lambda x: (-(-(x * 3))) * 3 + 1, ["mul", "mul", "add"]),  # noqa: B002
    "square": (lambda x: x.pow(2), ["mul"]),
    "root": (lambda x: x.pow(0.5), ["sqrt"]),
    "inverse": (lambda x: x.pow(-1), ["reciprocal"]),
    "quotient": (lambda x: x / 8, ["mul"]),
    "small quotient": (lambda x: x / 0.25, ["mul"]),
    "negative quotient": (lambda x: x / -2.0, ["mul"]),
    "adding a negation": (lambda x: x.exp() + -x, ["exp", "sub"]),
    "adding to a negation": (lambda x: -x + x.exp(), ["exp", "sub"]),
    "subtracting a negation": (lambda x: x.exp() - -x, ["exp", "add"]),
    "negation times a number": (lambda x: -x * 3, ["mul"]),
    "relu of relu": (lambda x: x.relu().relu() + 1, ["relu", "add"]),
    "abs of abs": (lambda x: x.abs().abs() + 1, ["abs", "add"]),
    "abs of a negation": (lambda x: (-x).abs(), ["abs"]),
    "factors of two": (lambda x: x / 2 * 0.25, ["mul"]),
}


def test_golden(captured, run, body):
    program = captured(lambda s, x: x.pow(2).neg().neg() / 4 + 1, X)
    after, result = run(program, SimplifyArithmetic())
    assert body(program) == (
        "pow_tensor_scalar: f32[3, 8] = aten.pow.Tensor_Scalar(input_0, 2)  # pow\n"
        "neg_default: f32[3, 8] = aten.neg(pow_tensor_scalar)  # neg\n"
        "neg_default_1: f32[3, 8] = aten.neg(neg_default)  # neg#2\n"
        "div_tensor: f32[3, 8] = aten.div.Tensor(neg_default_1, 4)  # div\n"
        "add_tensor: f32[3, 8] = aten.add.Tensor(div_tensor, 1, alpha=1)  # add\n"
        "return (add_tensor)"
    )
    assert body(after) == (
        "mul_tensor: f32[3, 8] = aten.mul.Tensor(input_0, input_0)  # pow\n"
        "mul_tensor_1: f32[3, 8] = aten.mul.Tensor(mul_tensor, 0.25)  # div\n"
        "add_tensor: f32[3, 8] = aten.add.Tensor(mul_tensor_1, 1, alpha=1)  # add\n"
        "return (add_tensor)"
    )
    assert result.changes == [("pow", "pow → mul"), ("neg#2", "neg → mul"), ("div", "div → mul")]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_same_bits(name, dtype, captured, run, ops):
    f, left = EXACT[name]
    program = captured(lambda s, x: f(x), X.to(dtype))
    after, _ = run(program, SimplifyArithmetic())
    if name != "double negation":
        assert ops(after) == left
    for x in (X.to(dtype), ODD.to(dtype).repeat(24)[:24].reshape(3, 8), ODD.to(dtype).flip(0).repeat(24)[:24].reshape(3, 8)):
        assert torch.equal(after(x)[0].nan_to_num(7.0), program(x)[0].nan_to_num(7.0))
        assert torch.equal(after(x)[0].isnan(), program(x)[0].isnan())


@pytest.mark.parametrize(
    ("f", "left"),
    [
        (lambda x: x * 3 * 5, ["mul"]),
        (lambda x: x * 0.1 * 0.3, ["mul"]),
        (lambda x: x + 1 + 2.5, ["add"]),
        (lambda x: x - 1 - 2.5, ["add"]),
    ],
)
def test_constants_are_joined(f, left, captured, run, ops):
    after, _ = run(captured(lambda s, x: f(x), X), SimplifyArithmetic())
    assert ops(after) == left
    torch.testing.assert_close(after(X)[0], f(X))


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda x: x * 1e30 * 1e-30, "one factor grows what the other shrinks: in between it might overflow or vanish"),
        (lambda x: x * 1e-30 * 1e-30, "the product of the factors is out of the range of torch.float32"),
        (lambda x: x + 8388608.0 - 8388608.0, "two constants of opposite signs: what the first rounds away may be meant"),
        (lambda x: (lambda y: y * 2 + y)(x * 3), "mul is read elsewhere too"),  # noqa: PLC3002
        (lambda x: x / 2.0**127, f"1/{2.0**127} is out of the range of torch.float32"),
        (lambda x: x / 3, None),
        (lambda x: x / 0, None),
        (lambda x: x.long() + 1 + 2, None),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), None),
        (lambda x: x.relu().relu().neg().neg(), None),
    ],
)  # fmt: skip
def test_what_stays(f, reason, captured, run):
    program = captured(lambda s, x: f(x), X)
    program.example = None
    after, result = run(program, SimplifyArithmetic())
    if reason:
        assert not result.changes and [r for _, r in result.refusals] == [reason]
    assert torch.equal(after(X)[0], f(X))


def test_left_out_sites_stay(captured, run, ops):
    after, result = run(captured(lambda s, x: x.pow(2) + 1, X), SimplifyArithmetic(exclude=("pow",)))
    assert ops(after) == ["pow", "add"] and result.refusals == [("pow", "left out by include / exclude")]


def test_sizes_that_vary(captured, run, ops):
    after, _ = run(captured(lambda s, x: x.pow(2) / 4, X, dynamic="auto"), SimplifyArithmetic())
    assert ops(after) == ["mul", "mul"] and torch.equal(after(X[:2])[0], X[:2].pow(2) / 4)
