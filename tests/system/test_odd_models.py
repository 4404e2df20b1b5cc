"""Models with unusual values inside: numbers read off tensors, spectra, memory read as another type, sizes that the data decide."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw


class Scaling(nn.Module):
    """Numbers read off tensors stand where ops take tensors."""

    def forward(self, x):
        scale = x.abs().max().item() / 127
        return torch.clamp(torch.round(x / scale), -127, 127) * scale, x * x.max().item()


@pytest.mark.parametrize("dynamic", [None, "auto"])
def test_numbers_read_off_tensors(dynamic, tmp_path):
    model, x = Scaling().eval(), torch.randn(3, 4)
    fast = gw.optimize(model, x, dynamic=dynamic)
    fast.save(tmp_path / "m.gw")
    for value in (x, x * 3):
        for got, again, wanted in zip(fast(value), gw.load(tmp_path / "m.gw")(value), model(value), strict=True):
            torch.testing.assert_close(got, wanted)
            assert torch.equal(got, again)


class Spectrum(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(40, 8)

    def forward(self, wave):
        spectrum = torch.stft(wave, 78, 20, window=torch.hann_window(78), center=True, return_complex=True)
        return self.proj(spectrum.abs().transpose(1, 2))


def test_a_spectrum_of_any_batch():
    model = Spectrum().eval()
    fast = gw.optimize(model, torch.randn(2, 600), dynamic="auto")
    for batch in (2, 1, 5):
        wave = torch.randn(batch, 600)
        torch.testing.assert_close(fast(wave), model(wave))
    assert len(fast._variants) == 1


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(16, 16)
        angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.01]))
        self.register_buffer("turn", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x):
        heads = self.proj(x).view(2, -1, 4, 4).transpose(1, 2)
        turned = torch.view_as_complex(heads.reshape(*heads.shape[:-1], -1, 2)) * self.turn
        return torch.view_as_real(turned).flatten(-2), heads.flip(-1).view(torch.int32)


def test_memory_read_as_another_type(tmp_path):
    model, x = Rotary().eval(), torch.randn(2, 5, 16)
    fast = gw.optimize(model, x)
    for got, wanted in zip(fast(x), model(x), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5 if got.is_floating_point() else 64, rtol=0)


class Experts(nn.Module):
    """Each row through one of several layers: how many rows each gets, the data decide."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 3), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        weight = self.gate(x).softmax(-1)
        chosen, out = weight.argmax(-1), torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            mine = chosen == k
            out[mine] = expert(x[mine]) * weight[mine, k : k + 1]
        return out


def test_sizes_that_the_data_decide_survive_the_disk(tmp_path):
    model, x = Experts().eval(), torch.randn(6, 8)
    fast = gw.optimize(model, x)
    fast.save(tmp_path / "m.gw")
    loaded = gw.load(tmp_path / "m.gw")
    for value in (x, torch.randn(6, 8), torch.ones(6, 8)):
        torch.testing.assert_close(fast(value), model(value))
        assert torch.equal(loaded(value), fast(value))
