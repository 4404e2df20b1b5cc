"""Models given in half precision: as good as they were, in the dtype that they had, by every recipe."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright import accelerator, reporting
from graphwright.numerics import sqnr_db
from graphwright.testing.pretend import Pretend

DTYPES = [torch.float16, torch.bfloat16]


class Norm(nn.Module):
    """As language models have it: statistics in float32, the rest in the model's dtype."""

    def __init__(self, wide: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(wide) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


class Layer(nn.Module):
    """Attention written out with its softmax in float32, and a gated perceptron."""

    def __init__(self, wide: int = 32):
        super().__init__()
        self.norm, self.qkv, self.out = Norm(wide), nn.Linear(wide, 3 * wide, bias=False), nn.Linear(wide, wide, bias=False)
        self.after, self.gate, self.up, self.down = Norm(wide), nn.Linear(wide, 48), nn.Linear(wide, 48), nn.Linear(48, wide)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        mask = torch.full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
        weights = torch.softmax((q @ k.transpose(-1, -2) / 4 + mask).float(), -1).to(x.dtype)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        h = self.after(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Picture(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.three, self.head = nn.Conv2d(8, 16, 1), nn.Linear(16, 5)
        self.norm.running_mean.uniform_(-0.5, 0.5)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm(self.one(x)))
        y = F.hardswish(self.three(y + self.two(y)))
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


def _models() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(1)
    return {"layer": (Layer().eval(), torch.randn(2, 9, 32)), "picture": (Picture().eval(), torch.randn(2, 3, 12, 12))}


def _hold(name: str, dtype: torch.dtype, recipe: str) -> gw.Optimized:
    """The recipe's result, held to the float64 rule against the model in its own dtype."""
    model, x = _models()[name]
    model, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fast = gw.optimize(model, x, recipe, calibration=[x, x + 0.1] if recipe == "int8" else None)
    with torch.no_grad():
        truth, eager = copy.deepcopy(model).double()(x.double()), model(x)
        got = fast(x)
        assert got.dtype == dtype and got.shape == eager.shape
        least = sqnr_db(truth, eager) - 6 if recipe == "default" else 25.0
        assert sqnr_db(truth, got) >= least, f"{sqnr_db(truth, got):.1f} dB, eager {sqnr_db(truth, eager):.1f}"
    assert all(torch.equal(v, model.state_dict()[k]) and v.dtype == model.state_dict()[k].dtype for k, v in before.items())
    assert not fast.report.warnings
    return fast


@pytest.mark.parametrize("recipe", ["default", "half", "int8", "int8-dynamic", "w8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["layer", "picture"])
def test_on_the_cpu(name, dtype, recipe, monkeypatch):
    monkeypatch.setattr(reporting, "_declined", lambda job, variant, report: False)  # faster or not: its numbers are asked for here
    _hold(name, dtype, recipe)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "recipe"), [("layer", "default"), ("layer", "int8"), ("picture", "w8"), ("picture", "half")])
def test_as_on_a_gpu(name, dtype, recipe, monkeypatch):
    found = Pretend(wall=True)
    monkeypatch.setattr(accelerator, "of", lambda device: found)
    monkeypatch.setattr(reporting, "_declined", lambda job, variant, report: False)
    fast = _hold(name, dtype, recipe)
    x = _models()[name][1].to(dtype)
    found.log.clear()
    with torch.no_grad():
        wanted = fast(x)
        assert found.log == ["order", "replay", "mark"]
        assert torch.equal(copy.deepcopy(fast)(x), wanted)
