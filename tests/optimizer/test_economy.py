"""Less memory at the peak: other orders, cheap values made again, and what the report says of it."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.capture import capture
from graphwright.lower import lower
from graphwright.lower.arrange import cheap, fixed
from graphwright.lower.economy import economize, restored
from graphwright.lower.liveness import run_poisoned
from graphwright.lower.runner import settle
from graphwright.memory import peak

_spec = importlib.util.spec_from_file_location("random_programs", Path(__file__).parents[1] / "passes" / "programs.py")
_programs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_programs)


def plain(model, *xs):
    program = capture(model.eval(), xs).program
    program.example = xs
    return lower(program, plan={})


class Branches(nn.Module):
    """Written so that four wide values wait for each other; one after the other, each could be reduced at once."""

    def forward(self, x):
        wide = [torch.softmax(x * k, -1) for k in (1.0, 2.0, 3.0, 4.0)]
        return sum(w.sum(0) for w in wide)


class Bias(nn.Module):
    """A table that is cheap to make, and held between its two readers while something larger is computed."""

    def forward(self, x, row):
        table = row[:, None] * row[None, :]
        first = torch.softmax(x @ table, -1).sum()
        wide = torch.cat([x, x, x], 1)
        middle = (torch.softmax(wide + first, -1) @ torch.softmax(wide, 0).t()).sum()
        return torch.softmax(x * middle + table, -1).sum(0)


X, ROW = torch.randn(256, 256), torch.randn(256)


def test_another_order_lowers_the_peak():
    lowered = plain(Branches(), X)
    before = peak(lambda: lowered.runner(X)).mb
    found = economize(lowered, (X,), 0.0)
    after = peak(lambda: found.runner(X)).mb
    assert after < before - 0.2 and found.sequence and sorted(found.sequence) == list(range(len(found.sequence)))
    assert torch.equal(found.runner(X)[0], lowered.runner(X)[0])
    assert torch.equal(found.runner(X)[0], run_poisoned(found.runner, (X,))[0])
    assert "not met: another order of the steps brings the peak" in found.notes[-1]


def test_cheap_values_are_made_again_instead_of_held():
    lowered = plain(Bias(), X, ROW)
    before = peak(lambda: lowered.runner(X, ROW)).mb
    found = economize(lowered, (X, ROW), 0.0)
    assert peak(lambda: found.runner(X, ROW)).mb < before - 0.2
    assert len(found.sequence) > len(set(found.sequence)) and "run again" in found.notes[-1]
    for got in (found.runner(X, ROW), run_poisoned(found.runner, (X, ROW))):
        assert torch.equal(got[0], lowered.runner(X, ROW)[0])


def test_a_limit_that_is_met_changes_nothing_and_a_higher_one_stops_the_search_early():
    lowered = plain(Branches(), X)
    assert economize(lowered, (X,), 100.0) is lowered
    before = peak(lambda: lowered.runner(X)).mb
    found = economize(lowered, (X,), before - 0.01)
    assert " met: " in found.notes[-1]


def test_what_can_not_be_lowered_says_so():
    lowered = plain(nn.Softmax(-1), X)
    found = economize(lowered, (X,), 0.1)
    assert found.runner is lowered.runner and "no other order" in found.notes[-1]


def test_random_numbers_keep_their_turn():
    class Noisy(nn.Module):
        def forward(self, x):
            a, b = torch.rand_like(x), torch.rand_like(x)
            return (torch.softmax(x + b, -1).sum(0) - torch.softmax(x * a, -1).sum(0)), (a - b).sum()

    lowered = plain(Noisy(), X)
    found = economize(lowered, (X,), 0.0)
    torch.manual_seed(1)
    wanted = lowered.runner(X)
    torch.manual_seed(1)
    got = found.runner(X)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
    base = lowered.runner.base
    draws = [k for k, s in enumerate(base.steps) if fixed(s)]
    assert len(draws) == 2
    swapped = list(range(len(base.steps)))
    swapped[draws[0]], swapped[draws[1]] = swapped[draws[1]], swapped[draws[0]]
    with pytest.raises(ValueError, match="lost its turn|not there yet"):
        settle(base, swapped)


@pytest.mark.parametrize("sequence,said", [([0, 1], "left out"), ([0, 1, 2, 99], "no step 99"), ([2, 1, 0], "not there yet"), ([0, 0, 1, 2], "can't run again"),
                                           ([0, 1, True, 2], "no step True"), (["0"], "no step")])  # fmt: skip
def test_a_sequence_that_is_none_is_refused(sequence, said):
    lowered = plain(nn.Sequential(nn.Softmax(-1), nn.Softmax(0), nn.Softmax(-1)), X)
    with pytest.raises(ValueError, match=said):
        settle(lowered.runner.base, sequence)
    found = restored(lowered, sequence)
    assert found.runner is lowered.runner and "does not fit here" in found.notes[-1]


def _shuffled(base, rng):
    """Any sequence that keeps the rules: ready steps in random order, cheap ones again now and then."""
    known = {*base.inputs, *(slot for slot, _ in base.buffers)}
    left, sequence, turn = set(range(len(base.steps))), [], [k for k, s in enumerate(base.steps) if fixed(s)]
    while left:
        ready = sorted(k for k in left if known.issuperset(base.steps[k].reads) and (not fixed(base.steps[k]) or k == turn[0]))
        k = rng.choice(ready)
        if fixed(base.steps[k]):
            turn.pop(0)
        left.discard(k)
        sequence.append(k)
        known.update(base.steps[k].writes)
        done = [j for j in dict.fromkeys(sequence) if cheap(base.steps[j], base.returned)]
        if done and rng.random() < 0.4:
            sequence.append(rng.choice(done))
    return sequence


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False), seed=st.integers(0, 9))
def test_every_sequence_gives_the_same_bits(rng, seed):
    torch.manual_seed(seed)
    model, x = _programs.random_model(rng)
    lowered = plain(model, x)
    wanted = [t.clone() for t in lowered.runner(x)]
    runner = settle(lowered.runner.base, _shuffled(lowered.runner.base, rng))
    for got in (runner(x), run_poisoned(runner, (x,)), economize(lowered, (x,), 0.0).runner(x)):
        assert all(torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(wanted, got, strict=True)), repr(model)


def test_the_goal_is_met_or_the_report_says_that_it_is_not(tmp_path):
    model = Branches().eval()
    free = gw.optimize(model, X, recipe=())
    limit = free.report.memory_after_mb - 0.3
    fast = gw.optimize(model, X, recipe=(), goal=gw.Goal(memory_mb=limit))
    said = [n for n in fast.report.notes if n.startswith("memory goal")]
    assert fast.report.memory_after_mb <= limit and any(" met: " in n for n in said)
    assert not any("peak memory" in w for w in fast.report.warnings)
    fast.save(tmp_path / "small.gw")
    again = gw.load(tmp_path / "small.gw")
    assert torch.equal(again(X), fast(X))
    assert peak(lambda: again(X)).mb <= limit
    assert torch.equal(copy.deepcopy(fast)(X), fast(X))
    strict = gw.optimize(model, X, recipe=(), goal=gw.Goal(memory_mb=0.01))
    assert any("goal missed: peak memory" in w for w in strict.report.warnings)
    assert any("not met" in n or "no other order" in n for n in strict.report.notes)
