"""Results under demanding use: state across shapes, edits behind the back, threads, inputs that the model writes."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright import reporting
from graphwright.measure import Timing


@pytest.fixture
def faster(monkeypatch):
    """The stopwatch at the end always finds the result twice as fast."""
    before, after = Timing(10.0, 10.0, 10.0, 3), Timing(5.0, 5.0, 5.0, 3)
    monkeypatch.setattr(reporting, "interleaved", lambda calls, **options: [before, after])


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x):
        self.calls += 1
        y = x + self.calls + self.last
        self.last.copy_(x.mean(0))
        return y


def test_state_goes_on_across_shapes(faster, tmp_path):
    model, other = Counter().eval(), Counter().eval()
    fast = gw.optimize(model, torch.randn(2, 4))
    for size in (2, 3, 2, 5, 3):
        x = torch.randn(size, 4)
        torch.testing.assert_close(fast(x), other(x))
    assert model.calls == 0 and not model.last.any()
    assert all(v.built is not None for v in fast._variants)
    fast.save(tmp_path / "m.gw")
    loaded, twin = gw.load(tmp_path / "m.gw"), copy.deepcopy(fast)
    for size in (5, 2, 3):
        x = torch.randn(size, 4)
        wanted = other(x)
        for result in (fast, loaded, twin):
            torch.testing.assert_close(result(x), wanted)


class Scaled(nn.Module):
    scale = 2.0

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize("edit", [lambda m: setattr(m, "scale", 5.0), lambda m: m.train()])
def test_an_edited_model_is_not_captured_anew(edit, faster):
    model, x = Scaled().eval(), torch.randn(3)
    fast = gw.optimize(model, x)
    edit(model)
    torch.testing.assert_close(fast(x), x * 2)
    with pytest.raises(gw.CoverageError, match="edited"):
        fast(torch.randn(4))


def test_the_reported_variant_is_kept(faster):
    model = nn.Linear(4, 4).eval()
    fast = gw.optimize(model, torch.randn(2, 4))
    program = fast.program
    for size in range(3, 14):
        fast(torch.randn(*[1] * size, 4))
    assert fast.program is program


def test_threads_may_bring_new_shapes(faster):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    fast = gw.optimize(model, torch.randn(2, 4))
    wrong: list[object] = []

    def work(rank: int) -> None:
        x = torch.randn(*[1] * rank, 3, 4)
        try:
            if not torch.allclose(fast(x), model(x), atol=1e-5):
                wrong.append(rank)
        except Exception as error:  # noqa: BLE001 - whatever a thread raises is the finding
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (1, 2, 3, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(fast._variants) == 4
