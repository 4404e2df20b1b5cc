"""A depthwise convolution and the 1x1 one behind it become one kernel: found, refused, saved and loaded."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.backends import llvm_f32
from graphwright.lower import pairs, regions
from graphwright.numerics import Exact

pytestmark = pytest.mark.skipif(llvm_f32.reason() is not None, reason=str(llvm_f32.reason()))


class Inverted(nn.Module):
    """Inverted residuals of MobileNetV2, with odd widths; ``taps`` reads what lies between two convolutions."""

    def __init__(self, widths=(19, 19, 33), taps: bool = False):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, 2, 1)
        self.taps = taps
        self.parts = nn.ModuleList()
        for k, (a, b) in enumerate(itertools.pairwise(widths)):
            norm = nn.BatchNorm2d(3 * a)
            norm.running_mean.normal_()
            self.parts.append(nn.Sequential(nn.Conv2d(a, 3 * a, 1), nn.ReLU6(), nn.Conv2d(3 * a, 3 * a, 3, 1 + k, 1, groups=3 * a, bias=False),
                                            norm, nn.Hardswish(), nn.Conv2d(3 * a, b, 1)))  # fmt: skip

    def forward(self, x):
        x, seen = self.stem(x), []
        for part in self.parts:
            z = part[:5](x)
            y = part[5](z)
            x = x + y if x.shape == y.shape else y
            seen.append(z.mean((2, 3)))
        return (x, *seen) if self.taps else x


@pytest.fixture
def always(monkeypatch):
    """Take every region that is right, and channels last wherever the kernel could serve."""
    monkeypatch.setattr(regions, "race", lambda calls, reads: [1.0, 0.5, *[1.0] * len(calls[2:])][: len(calls)])
    real = regions.interleaved
    monkeypatch.setattr(regions, "interleaved", lambda calls, **k: sorted(real(calls, **k), key=lambda t: -t.minimum))
    monkeypatch.setattr("graphwright.search.revert", lambda built, why: built)
    monkeypatch.setattr(regions, "_WORTH", 0.0)
    from graphwright.lower import stopwatch

    plain = stopwatch.Stopwatch.work

    def work(self, work, several):
        found = plain(self, work, several)
        last = [k for k, c in enumerate(several) if "-last" in c.name]
        return [t if not last or k in last or not isinstance(t, float) else t + 1e3 for k, t in enumerate(found)]

    monkeypatch.setattr(stopwatch.Stopwatch, "work", work)


def names(fast) -> list[str]:
    return [f.name for f in fast._variants[0].built.lowered.fused]


def right(model, fast, *inputs) -> None:
    with torch.no_grad():
        before, after = model(*inputs), fast(*inputs)
        reference = model.double()(*(x.double() for x in inputs))
        model.float()
    for ref, old, new in zip(*(v if isinstance(v, tuple) else (v,) for v in (reference, before, after)), strict=True):
        assert Exact().failure(ref, old, new) is None


def test_pairs_are_found_run_right_and_come_back_from_a_file(always, tmp_path):
    torch.manual_seed(0)
    model, x = Inverted().eval(), torch.randn(2, 3, 37, 45)
    fast = gw.optimize(model, x)
    assert sum(n.startswith(pairs.MAKER) for n in names(fast)) == 2
    right(model, fast, x)
    fast.save(tmp_path / "m.gw")
    loaded = gw.load(tmp_path / "m.gw")
    assert sum(n.startswith(pairs.MAKER) for n in names(loaded)) == 2
    with torch.no_grad():
        assert torch.equal(fast(x), loaded(x))


def test_open_sizes(always):
    torch.manual_seed(1)
    model = Inverted().eval()
    fast = gw.optimize(model, torch.randn(2, 3, 40, 48), dynamic={"x": {0: "n", 2: "h"}})
    assert sum(n.startswith(pairs.MAKER) for n in names(fast)) == 2
    for shape in ((1, 3, 40, 48), (3, 3, 64, 48)):
        right(model, fast, torch.randn(shape))


def test_what_others_read_is_kept(always):
    torch.manual_seed(2)
    model, x = Inverted(taps=True).eval(), torch.randn(1, 3, 21, 30)
    fast = gw.optimize(model, x)
    assert not any(n.startswith(pairs.MAKER) for n in names(fast))
    right(model, fast, x)


def test_too_few_channels(always):
    model, x = Inverted(widths=(5, 7)).eval(), torch.randn(1, 3, 21, 30)
    fast = gw.optimize(model, x)
    assert not any(n.startswith(pairs.MAKER) for n in names(fast))
