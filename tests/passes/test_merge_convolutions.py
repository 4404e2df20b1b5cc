"""Parallel convolutions that read one input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphwright.passes.fuse_epilogue import FuseEpilogue
from graphwright.passes.merge_convolutions import MergeConvolutions
from graphwright.passes.simplify_parts import SimplifyParts

X = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(1))


class Inception(nn.Module):
    """Three branches that start with a pointwise convolution, one with a pool."""

    def __init__(self, channels=16, **kwargs):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(channels, n, 1, **kwargs) for n in (4, 3, 2))
        self.b3, self.c3 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
        self.d = nn.Conv2d(channels, 4, 1)

    def forward(self, x):
        pooled = torch.max_pool2d(x, 3, 1, 1)
        return torch.cat([self.a(x).relu(), self.b3(self.b(x).relu()), self.c3(self.c(x).relu()), self.d(pooled)], 1)


def test_golden(captured, run, body):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 2, 1, bias=False)

        def forward(self, x):
            return torch.cat([self.a(x), self.b(x).exp()], 1)

    program, _ = run(captured(Two(), X), FuseEpilogue())
    assert body(program) == (
        "conv_default: f32[2, 4, 6, 6] = graphwright.conv(x, a_weight, a_bias, [1, 1], [0, 0], [1, 1], 1, None, 'none', [])  # a\n"
        "conv_default_1: f32[2, 2, 6, 6] = graphwright.conv(x, b_weight, None, [1, 1], [0, 0], [1, 1], 1, None, 'none', [])  # b\n"
        "exp_default: f32[2, 2, 6, 6] = aten.exp(conv_default_1)  # exp\n"
        "cat_default: f32[2, 6, 6, 6] = aten.cat([conv_default, exp_default], 1)  # cat\n"
        "return (cat_default)"
    )
    after, result = run(program, MergeConvolutions())
    assert body(after) == (
        "conv_default_2: f32[2, 6, 6, 6] = graphwright.conv(x, a_weight_merged, a_bias_merged, [1, 1], [0, 0], [1, 1], 1, None, 'none', [])  # a, b\n"
        "split_with_sizes_default: (f32[2, 4, 6, 6], f32[2, 2, 6, 6]) = aten.split_with_sizes(conv_default_2, [4, 2], 1)  # a, b\n"
        "getitem: f32[2, 4, 6, 6] = operator.getitem(split_with_sizes_default, 0)  # a\n"
        "getitem_1: f32[2, 2, 6, 6] = operator.getitem(split_with_sizes_default, 1)  # b\n"
        "exp_default: f32[2, 2, 6, 6] = aten.exp(getitem_1)  # exp\n"
        "cat_default: f32[2, 6, 6, 6] = aten.cat([getitem, exp_default], 1)  # cat\n"
        "return (cat_default)"
    )
    assert result.changes == [("a", "2 convolutions merged: a, b")]
    assert after.provenance["a.weight_merged"] == ("a.weight", "b.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dynamic", [None, {"x": {0: "batch"}}])
def test_an_inception_block(dtype, dynamic, captured, run, ops):
    program = captured(Inception().to(dtype), X.to(dtype), dynamic=dynamic)
    after, result = run(program, FuseEpilogue(), MergeConvolutions())
    assert ops(after).count("conv") == 4 and len(result.changes) == 1
    x = torch.randn(5 if dynamic else 2, 16, 6, 6).to(dtype)
    torch.testing.assert_close(after(x)[0], program(x)[0])


def test_adjacent_parts_need_no_concatenation(captured, run, ops):
    """What was computed side by side, and is put side by side, is there already."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.last = nn.Conv2d(16, 4, 3), nn.Conv2d(16, 2, 3), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.last(torch.cat([self.a(x), self.b(x)], 1))

    after, _ = run(captured(Wide(), X), FuseEpilogue(), MergeConvolutions(), SimplifyParts())
    assert ops(after) == ["conv", "conv"]


class Pair(nn.Module):
    def __init__(self, a, b, then=None):
        super().__init__()
        self.a, self.b, self.then = a, b, then or (lambda a, b: a.exp().mean() + b.exp().mean())

    def forward(self, x):
        return self.then(self.a(x), self.b(x))


class Tied(Pair):
    def forward(self, x):
        return super().forward(x) + self.a(x.exp()).exp().mean()


C = nn.Conv2d


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Pair(C(16, 4, 1), C(16, 4, 1), lambda a, b: (a, b.exp())), "it leaves the program, and would share memory with the others"),
        (Pair(C(16, 512, 1), C(16, 4, 1)), "it has 512 channels and fills the machine by itself"),
        (Pair(C(16, 16, 2, groups=16), C(16, 16, 2, groups=16)), "it is grouped"),
        (Pair(C(16, 4, 1), C(16, 4, 1), lambda a, b: (a + b).exp()), "it adds a residual of its own"),
        (Tied(C(16, 4, 1), C(16, 4, 1)), "its weight a.weight is read elsewhere too: it would be stored twice"),
        (Pair(nn.Sequential(C(16, 8, 1), C(8, 8, 3)), nn.Sequential(C(16, 8, 1), C(8, 8, 3))), "merging a.0, b.0 would save 4,608 bytes of reading and cost 9,216 of copying parts"),
    ],
)  # fmt: skip
def test_what_stays(model, reason, captured, run):
    _, result = run(captured(model, X), FuseEpilogue(), MergeConvolutions())
    assert not result.changes and reason in [r for _, r in result.refusals], result.refusals


@pytest.mark.parametrize("other", [C(16, 4, 3, padding=1), C(16, 4, 1, stride=2), C(16, 4, 1, padding=1), nn.Sequential(C(16, 4, 1), nn.ReLU())])
def test_other_windows_and_activations_are_no_match(other, captured, run):
    _, result = run(captured(Pair(C(16, 4, 1), other), X), FuseEpilogue(), MergeConvolutions())
    assert not result.changes and not result.refusals


def test_left_out_sites_stay(captured, run):
    _, result = run(captured(Pair(C(16, 4, 1), C(16, 4, 1)), X), FuseEpilogue(), MergeConvolutions(exclude=("a",)))
    assert not result.changes and result.refusals == [("a", "left out by include / exclude")]
