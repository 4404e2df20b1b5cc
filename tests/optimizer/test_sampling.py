"""Tokens drawn from logits: the filters on known logits, and the distribution that is drawn."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.decode.sampling import Sampling, greedy
from graphwright.errors import InputError

PROBABILITIES = torch.tensor([[0.5, 0.25, 0.15, 0.07, 0.03], [0.03, 0.07, 0.15, 0.25, 0.5]])
LOGITS = PROBABILITIES.log() + torch.tensor([[3.0], [-2.0]])


def left(sampling, logits=LOGITS):
    return [torch.isfinite(row).nonzero().flatten().tolist() for row in sampling.filtered(logits)]


@pytest.mark.parametrize(
    "sampling,first",
    [
        (Sampling(), [0, 1, 2, 3, 4]), (Sampling(top_k=2), [0, 1]), (Sampling(top_k=9), [0, 1, 2, 3, 4]), (Sampling(top_p=1.0), [0, 1, 2, 3, 4]),
        (Sampling(top_p=0.4), [0]), (Sampling(top_p=0.51), [0, 1]), (Sampling(top_p=0.74), [0, 1]), (Sampling(top_p=0.76), [0, 1, 2]),
        (Sampling(top_p=1e-9), [0]), (Sampling(top_k=3, top_p=0.9), [0, 1, 2]), (Sampling(top_k=3, top_p=0.8), [0, 1]),
        (Sampling(min_p=0.0), [0, 1, 2, 3, 4]), (Sampling(min_p=0.2), [0, 1, 2]), (Sampling(min_p=0.49), [0, 1]), (Sampling(min_p=1.0), [0]),
    ],
)  # fmt: skip
def test_filters_leave_the_right_tokens(sampling, first):
    """top-p works on what top-k left: of 0.5, 0.25, 0.15 the shares are 0.556, 0.278, 0.167."""
    assert left(sampling) == [first, sorted(4 - t for t in first)]


def test_temperature_comes_before_the_filters():
    assert left(Sampling(temperature=0.5, top_p=0.7)) == [[0], [4]]  # 0.25 / (0.25 + 0.0625 + …) = 0.725
    assert left(Sampling(temperature=2.0, top_p=0.4)) == [[0, 1], [3, 4]]
    torch.testing.assert_close(Sampling(temperature=2.0).filtered(LOGITS), LOGITS / 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.floats(0.01, 1.0), st.floats(0.2, 4.0), st.integers(0, 10**6))
def test_top_p_keeps_the_smallest_set_that_reaches_it(batch, count, p, temperature, seed):
    logits = torch.randn(batch, count, generator=torch.Generator().manual_seed(seed)) * 3
    kept = torch.isfinite(Sampling(temperature=temperature, top_p=p).filtered(logits))
    shares = (logits.double() / temperature).softmax(-1)
    for row, inside in zip(shares, kept, strict=True):
        assert bool(inside.any()) and float(row[inside].sum()) >= p - 1e-5
        if bool((~inside).any()):
            assert float(row[inside].min()) >= float(row[~inside].max())
        if int(inside.sum()) > 1:
            assert float(row[inside].sum() - row[inside].min()) < p + 1e-5  # one fewer would not do


def test_what_is_drawn_follows_the_distribution():
    generator, draws = torch.Generator().manual_seed(0), 20_000
    sampling = Sampling(top_k=4, top_p=0.95)
    wanted = PROBABILITIES[0] * torch.tensor([1, 1, 1, 1, 0])
    wanted = wanted / wanted.sum()
    seen = torch.bincount(sampling.draw(LOGITS[:1].expand(draws, -1), generator), minlength=5)
    assert seen[4] == 0
    for count, share in zip(seen[:4].tolist(), wanted[:4].tolist(), strict=True):
        assert abs(count - draws * share) < 5 * math.sqrt(draws * share * (1 - share))


def test_ties_infinities_and_greedy():
    tied = torch.tensor([[1.0, 1.0, 1.0, -math.inf]])
    assert left(Sampling(top_p=0.5), tied) == [[0, 1]]
    assert greedy(tied).tolist() == [0]
    assert left(Sampling(top_k=1), torch.tensor([[-math.inf, 2.0, 1.0]])) == [[1]]
    assert Sampling(top_p=0.9).filtered(LOGITS.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": "hot"}, {"top_k": 0}, {"top_k": 1.5},
                                   {"top_k": True}, {"top_p": 0}, {"top_p": 1.1}, {"top_p": math.nan}])  # fmt: skip
def test_values_out_of_range(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_min_p_out_of_range():
    for value in (-0.1, 1.1, True, "0.5"):
        with pytest.raises(InputError, match="min_p="):
            Sampling(min_p=value)
