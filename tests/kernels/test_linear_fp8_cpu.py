"""8-bit floats on the CPU: rounded as PyTorch rounds them, and widened to what they are."""

from __future__ import annotations

import math

import pytest
import torch

from graphwright.kernels import linear_fp8
from graphwright.kernels.native import threads_for
from graphwright.kernels.vnni import unfit
from graphwright.ops.fp8 import quantize_fp8

pytestmark = pytest.mark.skipif(unfit() is not None, reason=str(unfit()))
KIND = torch.float8_e4m3fn


def rounded(x: torch.Tensor, most: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.empty(x.shape)
    linear_fp8._ROUNDED(threads_for(x.numel()), x.data_ptr(), x.stride(0) * 4, *x.shape, out.data_ptr(), 0 if most is None else most.data_ptr())
    return out


def test_numbers_are_rounded_as_by_pytorch() -> None:
    """Every number of e4m3, what lies halfway between two, and their neighbours, under scales of any size."""
    numbers = torch.arange(127, dtype=torch.uint8).view(KIND).float()
    halves = (numbers[1:] + numbers[:-1]) / 2
    row = torch.cat([numbers, halves, halves.nextafter(torch.tensor(0.0)), halves.nextafter(torch.tensor(500.0)), -numbers, -halves])
    x = torch.stack([row * scale for scale in (1.0, 0.3, 2.0**-30, 1e20, 1e-38, 2.0**-140)])
    for by_row in (True, False):
        q, scales = quantize_fp8(x, by_row, KIND)
        wanted = q.float() * scales
        assert torch.equal(rounded(x, None if by_row else x.abs().amax()), wanted)


def test_rows_of_zeros_and_without_a_finite_number() -> None:
    x = torch.randn(5, 33)
    x[1], x[2, 3], x[3, 32], x[4] = 0, math.inf, math.nan, -0.0
    got = rounded(x)
    assert got[2:4].isnan().all() and torch.equal(got[[1, 4]], torch.zeros(2, 33)) and got[0].isfinite().all()


@pytest.mark.parametrize("rows", [1, 3, 20, 130])
def test_every_byte_of_a_weight_is_the_number_that_it_stands_for(rows: int) -> None:
    """One input at a time, so that nothing is added; a NaN makes its channel NaN."""
    weight = torch.arange(256, dtype=torch.uint8).view(KIND).reshape(16, 16).repeat(2, 1)[:31].contiguous()
    x = torch.zeros(rows, 16)
    x[:, 5] = 448.0
    ones = torch.ones(31)
    y = linear_fp8.run_cpu(x, weight, ones, None, None, "none", (), True, KIND, None)
    wanted = (weight.float()[:, 5] * 448).masked_fill(weight.float().isnan().any(1), math.nan).expand(rows, -1)
    assert torch.equal(y.nan_to_num(7.25), wanted.nan_to_num(7.25))
