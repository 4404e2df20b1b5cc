"""Einsum over two operands becomes the product it is; what no single product computes is left alone, with the reason."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.raise_attention import RaiseAttention
from graphwright.passes.raise_einsum import RaiseEinsum
from graphwright.passes.raise_linear import RaiseLinear

SIZES = dict(zip("abcdefgh", (2, 3, 4, 5, 6, 7, 2, 3), strict=True))


def operand(letters: str) -> torch.Tensor:
    return torch.randn([SIZES[x] for x in letters], generator=torch.Generator().manual_seed(len(letters)))


def test_golden(captured, run, body):
    after, result = run(captured(lambda s, x, y: torch.einsum("bchd,behd->bhce", x, y), torch.randn(2, 3, 4, 5), torch.randn(2, 6, 4, 5)), RaiseEinsum())
    assert body(after) == (
        "permute_default: f32[2, 4, 3, 5] = aten.permute(input_0, [0, 2, 1, 3])  # einsum\n"
        "permute_default_1: f32[2, 4, 5, 6] = aten.permute(input_1, [0, 2, 3, 1])  # einsum\n"
        "matmul_default: f32[2, 4, 3, 6] = aten.matmul(permute_default, permute_default_1)  # einsum\n"
        "return (matmul_default)"
    )
    assert result.changes == [("einsum", "einsum 'bchd,behd->bhce' → matmul")]


@settings(deadline=None, max_examples=25)
@given(st.permutations("ab"), st.permutations("abce"), st.permutations("abde"), st.permutations("abcd"))
def test_any_order_of_axes(batch, left, right, out):
    """Two common axes, one that is summed over, one of each operand's own, all in any order."""
    from graphwright.capture import capture
    from graphwright.manager import Pipeline

    equation = f"{''.join(left)},{''.join(right)}->{''.join(out)}"

    class Model(torch.nn.Module):
        def forward(self, x, y):
            return torch.einsum(equation, x, y)

    x, y = operand("".join(left)), operand("".join(right))
    program = capture(Model(), (x, y), {}).program
    program.example = (x, y)
    after, records = Pipeline((RaiseEinsum(),), strict=True).run(program)
    assert records[0].result.changes
    torch.testing.assert_close(after(x, y)[0], torch.einsum(equation, x, y))


@pytest.mark.parametrize("equation", ["abe,ce->abc", "abe,ec", "ae,ec->ca", "bae,bec->bac"])
def test_products(equation, captured, run, ops):
    left, right = equation.partition("->")[0].split(",")
    after, _ = run(captured(lambda s, x, y: torch.einsum(equation, x, y), operand(left), operand(right)), RaiseEinsum())
    assert "matmul" in ops(after) and "einsum" not in ops(after)


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("ab,ab->ab", "sums over 0 axes and keeps 2 common, 0 and 0 own ones: no single product without copies"),
        ("abe,abe->ab", "sums over 1 axes and keeps 2 common, 0 and 0 own ones: no single product without copies"),
        ("abc,abc->a", "sums over 2 axes and keeps 1 common, 0 and 0 own ones: no single product without copies"),
        ("abce,ade->abcd", "sums over 1 axes and keeps 1 common, 2 and 1 own ones: no single product without copies"),
        ("abf,fc->ac", "sums over an axis of one operand alone"),
        ("aa,ac->ac", "takes a diagonal"),
        ("...e,ec->...c", "leaves axes unnamed"),
    ],
)
def test_what_is_no_single_product(equation, reason, captured, run):
    left, right = equation.replace("...", "ab").partition("->")[0].split(",")
    _, result = run(captured(lambda s, x, y: torch.einsum(equation, x, y), operand(left), operand(right)), RaiseEinsum())
    assert not result.modified and result.refusals == [("einsum", f"{equation!r} {reason}")]


def test_sums_over_one_or_three_operands_are_left_alone(captured, run):
    _, result = run(captured(lambda s, x, y: torch.einsum("ab,bc,cd->ad", x, y, y.mT[:4]), operand("ab"), operand("bc")), RaiseEinsum())
    assert result.refusals == [("einsum", "einsum over 3 operands: no single product")]


def test_attention_in_einsum_becomes_attention(captured, run, ops):
    def f(s, q, k, v):
        weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.25, -1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    q, k, v = (torch.randn(2, n, 3, 8) for n in (4, 5, 5))
    after, _ = run(captured(f, q, k, v), RaiseEinsum(), RaiseAttention())
    assert ops(after).count("scaled_dot_product_attention") == 1 and "softmax" not in ops(after)


def test_a_constant_operand_becomes_a_linears_weight(captured, run, ops):
    after, _ = run(captured(lambda s, x: torch.einsum("abe,ec->abc", x, s.w), operand("abe"), w=operand("ec")), Canonicalize(), RaiseEinsum(), RaiseLinear())
    assert ops(after) == ["linear"]
