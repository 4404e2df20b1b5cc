"""Two products in a row as one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from graphwright.passes.merge_products import MergeProducts

X, I = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)), torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(2))


def test_golden(captured, run, body):
    program = captured(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), X)
    assert body(program) == (
        "linear_default: f32[16, 16] = aten.linear(input_1, _0_weight, _0_bias)  # 0\n"
        "linear_default_1: f32[16, 4] = aten.linear(linear_default, _1_weight, _1_bias)  # 1\n"
        "return (linear_default_1)"
    )
    after, result = run(program, MergeProducts())
    assert body(after) == "linear_default_2: f32[16, 4] = aten.linear(input_1, _1_weight_merged, _1_bias_merged)  # 0, 1\nreturn (linear_default_2)"
    assert result.changes == [("1", "0 merged into it")]
    assert after.provenance["1.weight_merged"] == ("0.weight", "1.weight") and set(after.tensors()) == {"1.weight_merged", "1.bias_merged"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)),
        lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, stride=2)),
        lambda: nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 4, 3, padding=1, dilation=(1, 2))),
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, stride=(1, 2), padding=1), nn.Conv2d(8, 4, 1, stride=2)),
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1, bias=False)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolutions(make, dtype, captured, run, ops):
    after, _ = run(captured(make().to(dtype), I.to(dtype)), MergeProducts())
    assert ops(after) == ["conv2d"]


def test_three_in_a_row_and_one_dimension(captured, run, ops):
    after, _ = run(captured(nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 16), nn.Linear(16, 8)), X), MergeProducts())
    assert ops(after) == ["linear"]
    after, _ = run(captured(nn.Sequential(nn.Conv1d(4, 8, 1), nn.Conv1d(8, 4, 3)), torch.randn(2, 4, 9)), MergeProducts())
    assert ops(after) == ["conv1d"]


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.a(x)) + self.b(x)


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (nn.Sequential(nn.Linear(8, 1), nn.Linear(1, 64)), X, "one product would be no less work: 16,384 operations"),
        (nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, padding=1)), I, "it pads with zeros, where 0 would have given its bias"),
        (nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3)), I, "neither it nor 0 is pointwise"),
        (nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1, padding=1)), I, "it pads"),
        (nn.Sequential(nn.Conv2d(4, 8, 1, stride=2), nn.Conv2d(8, 4, 3)), I, "0 pads or strides"),
        (nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8)), I, "one of the two is grouped"),
        (nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, padding="same")), I, "one of the two sizes its own padding by its input ('same')"),
        (Shared(), X, "a weight is read elsewhere too: the product would be stored beside it"),
    ],
)  # fmt: skip
def test_what_stays(model, x, reason, captured, run):
    _, result = run(captured(model, x), MergeProducts())
    assert not result.modified and any(r.startswith(reason) for _, r in result.refusals), result.refusals


def test_a_first_product_with_another_reader_stays(captured, run):
    program = captured(lambda s, x: (lambda y: F.linear(y, s.v) + y.sum())(F.linear(x, s.w)), X, w=torch.randn(16, 8), v=torch.randn(4, 16))  # noqa: PLC3002
    _, result = run(program, MergeProducts())
    assert result.refusals == [("linear#2", "linear is read by sum too")]


def test_left_out_sites_stay(captured, run, ops):
    after, result = run(captured(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), X), MergeProducts(exclude=("0",)))
    assert ops(after) == ["linear", "linear"] and result.refusals == [("0", "left out by include / exclude")]


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None, phases=[Phase.generate])
@given(st.lists(st.tuples(st.integers(1, 12), st.sampled_from([1, 1, 3]), st.integers(1, 2), st.integers(0, 1), st.booleans()), min_size=2, max_size=4), st.booleans())
def test_rows_of_products(captured, run, layers, dynamic):
    """Whatever is merged, the float64 rule holds and the shape is the same; batches vary."""
    parts, channels = [], 4
    for out, kernel, stride, padding, bias in layers:
        parts.append(nn.Conv2d(channels, out, kernel, stride, padding, bias=bias))
        channels = out
    x = torch.randn(2, 4, 13, 13)
    program = captured(nn.Sequential(*parts), x, dynamic={"input": {0: "batch"}} if dynamic else None)
    after, _ = run(program, MergeProducts())
    y = torch.randn(3 if dynamic else 2, 4, 13, 13)
    torch.testing.assert_close(after(y)[0], program(y)[0], rtol=1e-3, atol=1e-4)
