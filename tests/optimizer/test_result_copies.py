"""Copies of a result: of its memory, and only of its memory."""

import copy

import pytest
import torch
from torch import nn

import graphwright as gw


class Counting(nn.Module):
    """Keeps a mean of what it has seen."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x, scale=None):
        self.seen.mul_(0.5).add_(x.mean(0))
        y = self.inner(x) + self.seen
        return y if scale is None else y * scale


X, OTHER = torch.ones(3, 4), (torch.full((3, 4), 2.0), torch.tensor(3.0))


def result():
    torch.manual_seed(0)
    model = Counting().eval()
    return model, copy.deepcopy(model), gw.optimize(model, X)


def agree(fast, eager, *calls):
    with torch.no_grad():
        for call in calls:
            torch.testing.assert_close(fast(*call), eager(*call))


def test_programs_of_a_copy_share_what_they_write():
    _model, eager, fast = result()
    agree(fast, eager, (X,), OTHER)
    made, state = copy.deepcopy(fast), copy.deepcopy(eager)
    agree(made, state, (X,), OTHER, (X,), OTHER)
    agree(fast, eager, OTHER, (X,))


def test_a_copy_that_captures_anew_goes_on_from_its_own_state():
    _model, eager, fast = result()
    made, state = copy.deepcopy(fast), copy.deepcopy(eager)
    agree(made, state, (X,), (X,))
    agree(made, state, OTHER, (X,), OTHER)
    agree(fast, eager, (X,), OTHER)


def test_a_copy_made_before_the_first_call_has_a_report_of_its_own():
    model = Counting().eval()
    fast = gw.optimize(model)
    made = copy.deepcopy(fast)
    made(X)
    assert made.report.model == "Counting"
    with pytest.raises(gw.errors.InputError, match="nothing has been optimized yet"):
        fast.report  # noqa: B018


class BySize(nn.Module):
    """Each size has code of its own, so that it can't vary."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        scale = {8: 1.0, 9: 2.0, 10: 3.0}[int(x.shape[2])]
        return self.conv(x).relu() * scale


def test_a_file_of_several_programs_names_what_they_cover(tmp_path):
    model = BySize().eval()
    fast = gw.optimize(model, torch.randn(1, 3, 8, 8))
    fast(torch.randn(1, 3, 9, 9))
    fast.save(tmp_path / "two.gw")
    with pytest.raises(gw.errors.CoverageError) as caught:
        gw.load(tmp_path / "two.gw")(torch.randn(1, 3, 10, 10))
    assert "3, 8, 8]" in str(caught.value) and "3, 9, 9]" in str(caught.value)
    assert "by name" in str(caught.value)


class Branching(nn.Module):
    """Control flow that depends on values: its linear is captured with what it writes, the rest runs as it is."""

    def __init__(self):
        super().__init__()
        self.inner = Counting()
        self.wide = nn.Sequential(nn.Linear(4, 256), nn.GELU(), nn.Linear(256, 4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        h = self.wide(self.inner(x)) + self.inner.seen
        return h * self.calls if h.sum() > 0 else h - self.calls


@pytest.mark.parametrize("kept", [True, False], ids=["pieces", "as it was"])
def test_a_copy_in_pieces_writes_its_own_memory(kept):
    torch.manual_seed(0)
    model = Branching().eval()
    eager, fast = copy.deepcopy(model), gw.optimize(model, X)
    variant = fast._variants[0]
    if kept:  # whether or not the pieces were found to be faster here
        job = fast._compile.__self__
        variant = job.again(model, (X,), {}, near=[])
        fast.__dict__["_variants"] = [variant]
        assert variant.parts and any(slot.run is variant.parts[0].lowered.runner for piece in variant.capture.pieces for slot in piece.variants)
    agree(fast, eager, (X,), (2 * X,))
    made, state = copy.deepcopy(fast), copy.deepcopy(eager)
    agree(made, state, (X,), (-X,), (3 * X,))
    agree(fast, eager, (-X,), (X,))
    if kept:
        assert len(made._variants[0].parts) == len(variant.parts)
