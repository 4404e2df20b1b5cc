"""Timing in turns."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from graphwright import measure


@pytest.fixture
def took(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], None]]:
    """Calls that take what they say, by a clock of their own."""
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def of(*seconds: float) -> Callable[[], None]:
        turns = iter(seconds * 100)

        def call() -> None:
            now[0] += next(turns)

        return call

    return of


def test_rounds_end_once_one_is_faster_in_all_its_turns(took: Callable[..., Callable[[], None]]) -> None:
    apart = measure.interleaved([took(1.0, 1.4), took(1.5, 1.9)], rounds=20, settled=5)
    assert [t.rounds for t in apart] == [5, 5] and [t.minimum for t in apart] == [1000.0, 1500.0]
    assert [t.rounds for t in measure.interleaved([took(1.0, 1.6), took(1.5, 1.9)], rounds=20, settled=5)] == [20, 20]
    assert [t.rounds for t in measure.interleaved([took(1.0)], rounds=6, settled=2)] == [6]
    assert [t.rounds for t in measure.interleaved([took(3.0), took(1.0), took(2.0)], rounds=20, settled=4)] == [4] * 3


def test_a_budget_leaves_three_rounds(took: Callable[..., Callable[[], None]]) -> None:
    assert [t.rounds for t in measure.interleaved([took(1.0), took(2.0)], rounds=20, budget_s=0.5)] == [3, 3]
    assert measure.interleaved([took(1.0)], rounds=20, budget_s=6.5)[0].rounds == 6
