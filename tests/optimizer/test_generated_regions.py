"""Chains of ops that become one generated kernel: found, raced, reported, saved and loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.kernels.native import unavailable
from graphwright.lower import regions, spaces
from graphwright.numerics import Exact

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


class Rotary(nn.Module):
    """Queries and keys of a decoder, turned by their positions; a gate over the last axis; a tail that nothing fuses."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.out = nn.Linear(32, 64), nn.Linear(32, 32), nn.Linear(64, 8)
        angles = torch.outer(torch.arange(12.0), 1 / 100 ** (torch.arange(0, 16, 2) / 16)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def turn(self, x):
        a, b = x[..., :8], x[..., 8:]
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def forward(self, x):
        q = self.turn(self.q(x).view(*x.shape[:2], -1, 16).transpose(1, 2))
        k = self.turn(self.k(x).view(*x.shape[:2], -1, 16).transpose(1, 2))
        scores = torch.where((q @ k.repeat_interleave(2, 1).transpose(-1, -2)) > 0, 1.0, 0.0).sum(-1, keepdim=True)
        y = (q * torch.sigmoid(scores) + 0.5) / (1 + q.abs())
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.fixture
def always(monkeypatch):
    """Take every region that is right: what is faster on a busy machine is a matter of luck."""
    monkeypatch.setattr(regions, "race", lambda calls, reads: [1.0, 0.5, *[1.0] * len(calls[2:])][: len(calls)])
    real = regions.interleaved
    monkeypatch.setattr(regions, "interleaved", lambda calls, **k: sorted(real(calls, **k), key=lambda t: -t.minimum))
    monkeypatch.setattr("graphwright.search.revert", lambda built, why: built)
    monkeypatch.setattr(regions, "_WORTH", 0.0)


def test_rotary_embeddings_are_two_kernels_and_one_text(always):
    torch.manual_seed(0)
    model, x = Rotary().eval(), torch.randn(2, 12, 32)
    fast = gw.optimize(model, x)
    lowered = fast._variants[0].built.lowered
    names = [f.name for f in lowered.fused]
    assert len(names) == len(lowered.regions) >= 2 and all(n.startswith("llvm.region") for n in names)
    sizes = sorted(len(f.region.works) for f in lowered.fused)
    assert sizes[-1] >= 6
    steps = {s.name for s in lowered.runner.steps}
    assert set(names) <= steps and not any("cat" in s.site and s.name == "aten.native" for s in lowered.runner.steps)
    with torch.no_grad():
        twice = Rotary().double()
        twice.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
        assert Exact().failure(twice(x.double()), model(x), fast(x)) is None
    assert any("through a kernel of our own" in n for n in fast.report.notes)


def test_the_report_and_explain_name_the_kernel(always):
    model, x = Rotary().eval(), torch.randn(2, 12, 32)
    fast = gw.optimize(model, x)
    row = next(r for r in fast.report.sites if r.kernel.startswith("llvm.region"))
    assert row.kernel in fast.explain(row.site)


LOAD = """
import sys, torch, graphwright as gw
fast = gw.load(sys.argv[1])
torch.save(fast(torch.load(sys.argv[2])), sys.argv[3])
print(sum(f.name.startswith("llvm.region") for f in fast._variants[0].built.lowered.fused))
"""


@pytest.mark.parametrize("known", [True, False], ids=["same machine", "new machine"])
def test_a_saved_result_has_them_again(always, tmp_path, known):
    model, x = Rotary().eval(), torch.randn(2, 12, 32)
    fast = gw.optimize(model, x)
    fast.save(tmp_path / "m.gw")
    torch.save(x, tmp_path / "x.pt")
    env = {**os.environ} if known else {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    files = [str(tmp_path / n) for n in ("m.gw", "x.pt", "y.pt")]
    said = subprocess.run([sys.executable, "-c", LOAD, *files], env=env, capture_output=True, text=True, check=True).stdout
    assert int(said) == len(fast._variants[0].built.lowered.fused) >= 2
    assert torch.equal(torch.load(files[2]), fast(x))


def test_a_file_of_a_day_when_more_could_be_generated(always, tmp_path, monkeypatch):
    model, x = Rotary().eval(), torch.randn(2, 12, 32)
    gw.optimize(model, x).save(tmp_path / "m.gw")

    def refuse(fragment, who):
        raise spaces.Unfit("no longer")

    monkeypatch.setattr(spaces, "make", refuse)
    again = gw.load(tmp_path / "m.gw")
    assert any("no kernel can be generated" in w and "no longer" in w for w in again.report.warnings)
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)


def test_wrong_code_is_not_taken(always, monkeypatch):
    real = spaces.make

    def spoiled(fragment, who):
        run = real(fragment, who)
        return lambda tensors: [t * 1.001 for t in run(tensors)]

    monkeypatch.setattr(spaces, "make", spoiled)
    fast = gw.optimize(Rotary().eval(), torch.randn(2, 12, 32))
    assert not fast._variants[0].built.lowered.fused
    assert any("is not right" in n for n in fast.report.notes)


def test_what_is_no_faster_is_left_out(always, monkeypatch):
    monkeypatch.setattr(regions, "race", lambda calls, reads: [1.0, 0.95])
    fast = gw.optimize(Rotary().eval(), torch.randn(2, 12, 32))
    assert not fast._variants[0].built.lowered.fused
    assert any("not clearly below" in n for n in fast.report.notes)


def test_inputs_of_other_strides(always):
    class Gate(nn.Module):
        def forward(self, x, y):
            return torch.tanh(x) * torch.sigmoid(y) + x * 2

    x, y = torch.randn(5, 7, 9), torch.randn(5, 7, 9)
    fast = gw.optimize(Gate().eval(), (x, y))
    assert fast._variants[0].built.lowered.fused
    other = torch.randn(9, 7, 5).permute(2, 1, 0)
    torch.testing.assert_close(fast(other, y), Gate()(other, y))
    expanded = torch.randn(1, 7, 9).expand(5, 7, 9)
    torch.testing.assert_close(fast(expanded, y), Gate()(expanded, y))


class Channels(nn.Module):
    """A norm over channels written by hand, a gate from the mean of an image, and the mean of tokens, weighed by angles."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate, self.out = nn.Conv2d(3, 24, 3, padding=1), nn.Linear(24, 24), nn.Linear(24, 5)
        self.weight, self.bias = nn.Parameter(torch.randn(24)), nn.Parameter(torch.randn(24))

    def forward(self, x):
        y = self.conv(x)
        centre = y.mean(1, keepdim=True)
        spread = (y - centre).pow(2).mean(1, keepdim=True)
        y = (y - centre) / torch.sqrt(spread + 1e-6) * self.weight[:, None, None] + self.bias[:, None, None]
        gate = torch.sigmoid(self.gate(torch.log1p(y.abs()).mean((2, 3))))
        tokens = (y * gate[:, :, None, None]).flatten(2).transpose(1, 2)
        return self.out((tokens * torch.sin(3 * tokens)).sum(1) / 7)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_reductions_along_other_axes_join_regions(always, memory_format):
    torch.manual_seed(0)
    model, x = Channels().eval().to(memory_format=memory_format), torch.randn(2, 3, 12, 10).to(memory_format=memory_format)
    fast = gw.optimize(model, x)
    ops = [{w.op.split(".")[1] for w in f.region.works} for f in fast._variants[0].built.lowered.fused]
    assert any({"mean", "sqrt", "log1p"} <= o for o in ops) and any({"sum", "sin"} <= o for o in ops)
    with torch.no_grad():
        twice = Channels().double()
        twice.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
        assert Exact().failure(twice(x.double()), model(x), fast(x)) is None


class Pictures(nn.Module):
    """A norm between transposes, and one between linears, with nothing that would join them."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.up = nn.Conv2d(3, 20, 3), nn.LayerNorm(20), nn.Linear(20, 33)
        self.middle, self.down = nn.LayerNorm(33), nn.Linear(33, 5)

    def forward(self, x):
        return self.down(self.middle(self.up(self.norm(self.conv(x).permute(0, 2, 3, 1)))))


def test_a_norm_by_itself_is_a_region(always, tmp_path):
    torch.manual_seed(0)
    model, x = Pictures().eval(), torch.randn(2, 3, 12, 10)
    fast = gw.optimize(model, x)
    fused = fast._variants[0].built.lowered.fused
    assert sorted([w.op for w in f.region.works if "norm" in w.op] for f in fused) == [["aten.layer_norm"]] * 2
    with torch.no_grad():
        twice = Pictures().double()
        twice.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
        assert Exact().failure(twice(x.double()), model(x), fast(x)) is None
        fast.save(tmp_path / "norms.gw")
        again = gw.load(tmp_path / "norms.gw")
        assert torch.equal(again(x), fast(x)) and len(again._variants[0].built.lowered.fused) == 2
