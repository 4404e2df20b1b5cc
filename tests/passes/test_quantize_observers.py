"""Histograms, the rules that read ranges off them, and grids, against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.errors import RecipeError
from graphwright.passes.observers import BINS, SAMPLE, Histogram, MinMax, Mse, Percentile, grid, rule, thinned

FLOATS = st.floats(-1e6, 1e6, width=32).filter(lambda v: v == 0 or abs(v) > 1e-6)
BATCHES = st.lists(st.lists(FLOATS, min_size=1, max_size=40), min_size=1, max_size=6)


def seen(*batches: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    return histogram


def error(x: torch.Tensor, low: float, high: float, symmetric: bool) -> float:
    g = grid(low, high, symmetric=symmetric)
    q = (torch.round(x / g.scale) + g.zero_point).clamp(g.low, g.high)
    return float((((q - g.zero_point) * g.scale - x).double() ** 2).sum())


@settings(max_examples=60, deadline=None)
@given(BATCHES)
def test_counts_extremes_and_places_survive_widening(batches: list[list[float]]) -> None:
    tensors = [torch.tensor(b, dtype=torch.float32) for b in batches]
    histogram, everything = seen(*tensors), torch.cat(tensors)
    assert histogram.low == float(everything.min()) and histogram.high == float(everything.max())
    assert histogram.seen == everything.numel() and histogram.bad == 0
    assert float(histogram.counts.sum()) == pytest.approx(everything.numel())
    # No count strays further than a bin: cumulative counts bracket the true ones.
    edges = (torch.arange(BINS + 1, dtype=torch.float64) + histogram.start) * histogram.width
    total = torch.cumsum(histogram.counts, 0)
    for k in range(0, BINS, 97):
        assert float(total[k]) >= int((everything.double() < edges[max(k, 0)]).sum()) - 1e-6
        upper = edges[min(k + 2, BINS)]
        assert float(total[k]) <= int((everything.double() <= upper).sum()) + 1e-6


@settings(max_examples=30, deadline=None)
@given(BATCHES, BATCHES)
def test_merging_is_seeing_both(first: list[list[float]], second: list[list[float]]) -> None:
    a, b = (seen(*(torch.tensor(x) for x in batches)) for batches in (first, second))
    both = a.merged(b)
    assert (both.low, both.high, both.seen) == (min(a.low, b.low), max(a.high, b.high), a.seen + b.seen)
    assert float(both.counts.sum()) == pytest.approx(float(a.counts.sum() + b.counts.sum()))
    assert both.start * both.width <= both.low and both.high <= (both.start + BINS) * both.width
    assert a.merged(Histogram()).counts.equal(Histogram().merged(a).counts)


def test_large_tensors_are_thinned_without_losing_extremes_or_channels() -> None:
    x = torch.zeros(64, 32, 1024)  # channels last would be skipped by a stride that 1024 divides
    x[..., 7] = 1.0
    x[3, 5, 700] = -9.0
    histogram = seen(x)
    assert (histogram.low, histogram.high) == (-9.0, 1.0)
    assert float(histogram.counts.sum()) == pytest.approx(x.numel())
    ones = float(histogram.counts[int(1 / histogram.width) - histogram.start - 1 :].sum()) / x.numel()
    assert ones == pytest.approx(1 / 1024, rel=0.2)
    for shape in ((SAMPLE,), (SAMPLE + 1,), (8, 160, 1536), (4 * SAMPLE,)):
        flat = torch.arange(math.prod(shape))
        kept = thinned(flat)
        assert kept.numel() <= SAMPLE and kept.numel() >= min(flat.numel(), SAMPLE // 2)
        if len(shape) == 3:
            assert len(torch.unique(kept % shape[-1])) == shape[-1]


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    histogram = seen(torch.tensor([1.0, math.nan, math.inf]), torch.tensor([-math.inf]), torch.tensor([-2.0]), torch.empty(0))
    assert (histogram.low, histogram.high, histogram.bad, histogram.seen) == (-2.0, 1.0, 3, 5)
    assert float(histogram.counts.sum()) == 2


def test_other_float_types_and_constant_values() -> None:
    histogram = seen(torch.full((3, 4), 2.5, dtype=torch.bfloat16), torch.full((2,), 2.5, dtype=torch.float16))
    assert (histogram.low, histogram.high) == (2.5, 2.5) and float(histogram.counts.sum()) == 14
    low, high = Mse().range(histogram, False)
    assert grid(low, high, symmetric=False).scale == pytest.approx(2.5 / 255, rel=0.01)
    zeros = seen(torch.zeros(5))
    for how in (MinMax(), Percentile(), Mse()):
        assert how.range(zeros, False) == (0.0, 0.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([90.0, 99.0, 99.9]))
def test_percentile_against_sorting(seed: int, percent: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5000, generator=generator) * 10 ** float(torch.rand((), generator=generator) * 4 - 2)
    histogram = seen(*x.split(1234))
    low, high = Percentile(percent).range(histogram, False)
    ordered = torch.sort(x).values
    # Off by a bin at most.
    true_high, true_low = (float(torch.quantile(ordered, q)) for q in (percent / 100, 1 - percent / 100))
    gap = 2 * histogram.width + 1e-6 + max(float(ordered[k + 1] - ordered[k]) for k in (int(4999 * percent / 100), int(4999 * (1 - percent / 100))))
    assert abs(high - true_high) <= gap and abs(low - true_low) <= gap


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["normal", "relu", "outlier", "negative"])
def test_mse_is_no_worse_than_a_search_over_the_data(kind: str, symmetric: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(20000)
    x = {"normal": x, "relu": x.relu(), "outlier": torch.cat([x, torch.tensor([60.0])]), "negative": -x.abs() - 0.1}[kind]
    low, high = Mse().range(seen(x), symmetric)
    found = error(x, low, high, symmetric)
    shares = [0.25 + 0.05 * k for k in range(16)]
    bound = max(abs(float(x.min())), float(x.max()))
    pairs = [(-bound * s, bound * s) for s in shares] if symmetric else [
        (float(x.min()) * a, float(x.max()) * b) for a, b in itertools.product(shares, shares)]  # fmt: skip
    best = min(error(x, a, b, symmetric) for a, b in pairs)
    assert found <= 1.05 * best
    assert found <= error(x, float(x.min()), float(x.max()), symmetric) * 1.001


@settings(max_examples=100, deadline=None)
@given(FLOATS, FLOATS, st.booleans())
def test_grids_hold_zero_and_their_ends(a: float, b: float, symmetric: bool) -> None:
    low, high = min(a, b), max(a, b)
    g = grid(low, high, symmetric=symmetric)
    assert g.scale > 0 and g.low <= g.zero_point <= g.high
    assert g.scale == float(torch.tensor(g.scale, dtype=torch.float32))
    reach = ((g.low - g.zero_point) * g.scale, (g.high - g.zero_point) * g.scale)
    assert reach[0] <= min(low, 0) + 0.51 * g.scale and reach[1] >= max(high, 0) - 0.51 * g.scale
    assert (g.zero_point == 0 and g.dtype == torch.int8) if symmetric else g.dtype == torch.uint8


def test_rules_by_name() -> None:
    assert rule("percentile") == Percentile(99.99) and rule(Mse(power=3)) == Mse(power=3)
    with pytest.raises(RecipeError, match="min-max.*\n.*did you mean"):
        rule("minmax")
