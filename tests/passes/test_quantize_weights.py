"""Int8 weights and bias correction against brute force."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.passes.quantize_weights import ChannelMean, mean_error, quantize_weight


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(4, 6), (3, 2, 3), (8, 1, 3, 3), (2, 700), (5, 1)]), st.sampled_from([0, 1, None]),
       st.floats(-6, 6))  # fmt: skip
def test_rounding_stays_within_half_a_step(seed: int, shape: tuple[int, ...], axis: int | None, exponent: float) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    q = quantize_weight(w, axis)
    assert q.values.dtype == torch.int8 and q.values.shape == w.shape and int(q.values.min()) >= -127
    assert q.scales.shape == (() if axis is None else (w.shape[axis],))
    steps = q.scales if axis is None else q.scales.reshape([-1 if k == axis else 1 for k in range(w.ndim)])
    assert bool(((q.real() - w).abs() <= 0.5001 * steps).all())
    assert int(q.values.abs().max()) == 127


def test_zeros_and_tiny_channels_are_finite() -> None:
    w = torch.stack([torch.zeros(5), torch.full((5,), 1e-42), torch.ones(5)])
    q = quantize_weight(w, 0)
    assert bool(torch.isfinite(q.scales).all()) and bool((q.scales > 0).all())
    assert torch.allclose(q.real(), w, atol=1e-30)
    assert quantize_weight(torch.zeros(2, 2), None).real().equal(torch.zeros(2, 2))


@pytest.mark.parametrize("axis, shape", [(-1, (4, 5, 6)), (-3, (2, 6, 5, 5)), (-3, (6, 5, 5)), (-1, (6,))])
def test_channel_means_over_batches(axis: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(shape) + k for k in range(3)]
    mean = ChannelMean(axis)
    for x in batches:
        mean.update(x)
    every = torch.stack([x.movedim(axis, 0).reshape(6, -1).double() for x in batches], 1).flatten(1)
    assert torch.allclose(mean.mean, every.mean(1))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_mean_error_is_what_a_convolution_shows(groups: int) -> None:
    torch.manual_seed(0)
    w, x = torch.randn(12, 6 // groups, 3, 3), torch.rand(4, 6, 3, 3) + torch.arange(6.0)[:, None, None]
    x = x.mean((2, 3), keepdim=True).expand_as(x)  # each window sees every pixel: the means are exact
    q = quantize_weight(w, 0)
    shown = (F.conv2d(x, q.real(), groups=groups) - F.conv2d(x, w, groups=groups)).double().mean((0, 2, 3))
    told = mean_error(w, q, x.double().mean((0, 2, 3)), groups)
    assert torch.allclose(told, shown, atol=1e-4) and float(shown.abs().max()) > 1e-3


def test_the_mean_error_of_a_linear() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(7, 5), torch.rand(100, 5)
    q = quantize_weight(w, 0)
    shown = (x @ q.real().T - x @ w.T).double().mean(0)
    assert torch.allclose(mean_error(w, q, x.double().mean(0), 1), shown, atol=1e-5)
