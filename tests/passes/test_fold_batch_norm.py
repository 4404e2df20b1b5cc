"""Batch norm, padding and scale folded into contractions, and every reason not to."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from graphwright.capture import capture
from graphwright.manager import Pipeline
from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.fold_batch_norm import FoldBatchNorm
from graphwright.passes.fold_padding import FoldPadding
from graphwright.passes.fold_scale import FoldScale


def norm(cls, channels, seed=0, **kwargs):
    """A batch norm whose statistics are no longer those of a new one."""
    g = torch.Generator().manual_seed(seed)
    bn = cls(channels, **kwargs)
    if bn.running_mean is not None:
        bn.running_mean.copy_(torch.randn(channels, generator=g))
        bn.running_var.copy_(torch.rand(channels, generator=g) + 0.1)
    if bn.affine:
        with torch.no_grad():
            bn.weight.copy_(torch.randn(channels, generator=g))
            bn.bias.copy_(torch.randn(channels, generator=g))
    return bn


def test_golden(captured, run, body):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm(nn.BatchNorm2d, 4), nn.ReLU())
    after, result = run(captured(model, torch.randn(1, 3, 6, 6)), FoldBatchNorm())
    assert body(after) == (
        "conv2d_default: f32[1, 4, 4, 4] = aten.conv2d(input_1, _0_weight_folded, _0_bias_folded, [1, 1], [0, 0], [1, 1], 1)  # 0, 1\n"
        "relu_default: f32[1, 4, 4, 4] = aten.relu(conv2d_default)  # 2\n"
        "return (relu_default)"
    )
    assert result.changes == [("1", "batch norm folded into conv2d 0")]
    assert after.provenance["0.weight_folded"] == ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    assert set(after.tensors()) == {"0.weight_folded", "0.bias_folded"}


MODELS = {
    "conv1d": lambda: (nn.Sequential(nn.Conv1d(4, 6, 3), norm(nn.BatchNorm1d, 6)), torch.randn(2, 4, 9)),
    "conv2d grouped": lambda: (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1), norm(nn.BatchNorm2d, 6)), torch.randn(2, 4, 7, 5)),
    "conv2d depthwise": lambda: (nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, bias=False), norm(nn.BatchNorm2d, 8)), torch.randn(2, 4, 7, 5)),
    "conv3d": lambda: (nn.Sequential(nn.Conv3d(2, 3, 2, stride=2), norm(nn.BatchNorm3d, 3)), torch.randn(1, 2, 4, 4, 5)),
    "transposed 1d": lambda: (nn.Sequential(nn.ConvTranspose1d(4, 6, 3), norm(nn.BatchNorm1d, 6)), torch.randn(2, 4, 5)),
    "transposed 2d grouped": lambda: (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=2), norm(nn.BatchNorm2d, 6)), torch.randn(2, 4, 5, 4)),
    "transposed 3d": lambda: (nn.Sequential(nn.ConvTranspose3d(2, 3, 2, bias=False), norm(nn.BatchNorm3d, 3)), torch.randn(1, 2, 3, 3, 2)),
    "linear": lambda: (nn.Sequential(nn.Linear(4, 6), norm(nn.BatchNorm1d, 6)), torch.randn(5, 4)),
    "no affine": lambda: (nn.Sequential(nn.Conv2d(3, 4, 1), norm(nn.BatchNorm2d, 4, affine=False)), torch.randn(2, 3, 4, 4)),
    "words for padding": lambda: (nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), norm(nn.BatchNorm2d, 4)), torch.randn(2, 3, 4, 4)),
    "reflecting pad": lambda: (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), norm(nn.BatchNorm2d, 4)), torch.randn(2, 3, 5, 5)),
    "before conv": lambda: (nn.Sequential(norm(nn.BatchNorm2d, 4), nn.Conv2d(4, 6, 3, groups=2)), torch.randn(2, 4, 7, 5)),
    "before linear": lambda: (nn.Sequential(norm(nn.BatchNorm1d, 4), nn.Linear(4, 3, bias=False)), torch.randn(5, 4)),
    "float64": lambda: (nn.Sequential(nn.Conv2d(3, 4, 1), norm(nn.BatchNorm2d, 4)).double(), torch.randn(2, 3, 4, 4).double()),
    "bfloat16": lambda: (nn.Sequential(nn.Conv2d(3, 4, 1), norm(nn.BatchNorm2d, 4)).bfloat16(), torch.randn(2, 3, 4, 4).bfloat16()),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_is_folded(name, captured, run, ops):
    model, x = MODELS[name]()
    before = captured(model, x)
    twin = copy.deepcopy(before.tensors())
    after, result = run(before, FoldBatchNorm())
    assert "batch_norm" not in ops(after) and len(result.changes) == 1 and not result.refusals
    assert all(torch.equal(t, twin[n]) for n, t in before.tensors().items())  # the tensors themselves are never written
    assert {t.dtype for t in after.tensors().values()} == {x.dtype}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.sampled_from([1, 2]), inner=st.integers(1, 3), outer=st.integers(1, 3), kernel=st.integers(1, 3),
    bias=st.booleans(), affine=st.booleans(), transposed=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_the_fp64_rule_holds(captured, run, ops, groups, inner, outer, kernel, bias, affine, transposed, seed):
    torch.manual_seed(seed)
    cls = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = nn.Sequential(
        cls(groups * inner, groups * outer, kernel, groups=groups, bias=bias),
        norm(nn.BatchNorm2d, groups * outer, seed, affine=affine),
    )
    after, result = run(captured(model, torch.randn(2, groups * inner, 5, 4)), FoldBatchNorm())
    # strict: the manager compared with float64; a site where the rule breaks must have been refused by measurement
    assert ("batch_norm" not in ops(after)) or "measured on the example" in result.refusals[0][1]


def test_a_convolution_used_twice_gets_weights_for_each(captured, run, ops):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 3, 1), norm(nn.BatchNorm2d, 3, 1), norm(nn.BatchNorm2d, 3, 2)

        def forward(self, x):
            return self.b(self.conv(self.a(self.conv(x))))

    after, _result = run(captured(Shared(), torch.randn(2, 3, 4, 4)), FoldBatchNorm())
    assert ops(after) == ["conv2d", "conv2d"]
    assert len(after.tensors()) == 4 and len({t.data_ptr() for t in after.tensors().values()}) == 4


def test_a_tied_weight_stays_for_its_other_reader(captured, run):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.other = nn.Conv2d(3, 3, 1), norm(nn.BatchNorm2d, 3), nn.Conv2d(3, 3, 1)
            self.other.weight = self.conv.weight

        def forward(self, x):
            return self.other(self.bn(self.conv(x)).relu())

    before = captured(Tied(), torch.randn(2, 3, 4, 4))
    after, _ = run(before, FoldBatchNorm())
    assert "conv.weight" in after.tensors() and "conv.weight_folded" in after.tensors()
    assert torch.equal(after.tensor("conv.weight"), before.tensor("conv.weight"))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), norm(nn.BatchNorm2d, 4)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y.exp()


def test_refusals(captured, run):
    image, flat = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 6)
    cases = [
        (Branch(), image, "conv is read by exp too"),
        (
            norm(nn.BatchNorm2d, 3),
            image,
            "no convolution or linear stands before it (an input), nor after it: it is read by the output",
        ),
        (
            nn.Sequential(nn.ReLU(), norm(nn.BatchNorm2d, 3)),
            image,
            "no convolution or linear stands before it (aten.relu), nor after it: it is read by the output",
        ),
        (
            nn.Sequential(norm(nn.BatchNorm2d, 3), nn.Conv2d(3, 4, 3, padding=1)),
            image,
            "no convolution or linear stands before it (an input), and 1 pads with zeros, which the norm would shift",
        ),
        (
            nn.Sequential(norm(nn.BatchNorm2d, 3), nn.ConvTranspose2d(3, 4, 1)),
            image,
            "no convolution or linear stands before it (an input), and 1 is transposed",
        ),
        (
            nn.Sequential(nn.Linear(6, 6), norm(nn.BatchNorm1d, 3)),
            flat,
            "its channels (axis 1) are not those of 0 (axis 2)",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
            image,
            "batch norm in train mode computes its statistics from the input",
        ),
    ]
    for model, x, reason in cases:
        _, result = run(captured(model, x), FoldBatchNorm())
        assert not result.modified and [r for _, r in result.refusals] == [reason]


def test_a_variance_of_zero_without_eps_is_refused(captured, run):
    bn = norm(nn.BatchNorm2d, 4, eps=0.0)
    bn.running_var[1] = 0
    program = captured(nn.Sequential(nn.Conv2d(3, 4, 1), bn), torch.randn(1, 3, 2, 2))
    _, result = run(program, FoldBatchNorm())
    assert result.refusals == [("1", "its scale is not finite (variance + eps is not positive)")]


def test_weights_that_would_overflow_are_refused(captured, run):
    bn = norm(nn.BatchNorm2d, 4).half()
    with torch.no_grad():
        bn.weight.fill_(6e4)
        bn.running_var.fill_(1e-4)
    program = captured(nn.Sequential(nn.Conv2d(3, 4, 1).half(), bn), torch.randn(1, 3, 2, 2).half())
    program.example = None
    _, result = run(program, FoldBatchNorm())
    assert result.refusals == [("1", "the folded weight would not be finite in torch.float16")]


def test_weights_that_would_vanish_are_refused(captured, run):
    bn = norm(nn.BatchNorm2d, 4)
    with torch.no_grad():
        bn.weight.fill_(1e-30)
    conv = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        conv.weight.mul_(1e-12)
    program = captured(nn.Sequential(conv, bn), torch.randn(1, 3, 2, 2))
    _, result = run(program, FoldBatchNorm())
    assert result.refusals == [("1", "the folded weight is too small for torch.float32")]


def test_cancellation_is_measured_where_there_is_an_example_and_refused_where_not(captured, run):
    """A mean far above the spread: the folded bias and the product nearly cancel."""
    conv, bn = nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2, eps=0.0)
    with torch.no_grad():
        conv.weight.fill_(1 / 3)
        bn.running_mean.fill_(1e4 / 3)
        bn.running_var.fill_(1e-6)
        bn.bias.zero_()
    x = 1e4 + 1e-2 * torch.randn(1, 1, 8, 8)
    program = captured(nn.Sequential(conv, bn), x)
    _, measured = run(program, FoldBatchNorm())
    assert measured.changes or "measured on the example: RMS error" in measured.refusals[0][1]
    program.example = None
    _, blind = run(program, FoldBatchNorm())
    assert "there is no example to measure the error on" in blind.refusals[0][1]


# -- padding ---------------------------------------------------------------------------------------------------------


def test_golden_padding(captured, run, body):
    model = nn.Sequential(nn.ZeroPad2d((2, 2, 1, 1)), nn.Conv2d(3, 4, 3, padding=1))
    after, result = run(captured(model, torch.randn(1, 3, 6, 6)), FoldPadding())
    assert body(after) == (
        "conv2d_default: f32[1, 4, 8, 10] = aten.conv2d(input_1, _1_weight, _1_bias, [1, 1], [2, 3], [1, 1], 1)  # 1, 0\n"
        "return (conv2d_default)"
    )
    assert result.changes == [("0", "pad folded into 1")]


def test_padding_of_one_two_and_three_axes_for_several_readers(captured, run, ops):
    def f(s, x):
        y = F.pad(x, (1, 1, 2, 2))
        return F.conv2d(y, s.w) + F.conv2d(y, s.w, padding="valid")

    after, result = run(captured(f, torch.randn(1, 3, 6, 6), w=torch.randn(4, 3, 3, 3)), FoldPadding())
    assert ops(after) == ["conv2d", "conv2d", "add"] and len(result.changes) == 2
    for n, conv in ((1, F.conv1d), (3, F.conv3d)):
        program = captured(
            lambda s, x, n=n, conv=conv: conv(F.pad(x, (1, 1) * n), s.w),
            torch.randn(1, 2, *[4] * n),
            w=torch.randn(3, 2, *[3] * n),
        )
        after, _ = run(program, FoldPadding())
        assert ops(after) == [f"conv{n}d"]


def test_golden_padding_of_one_side(captured, run, body):
    f = lambda s, x: F.conv2d(F.pad(x, (0, 1, 0, 1)), s.u, stride=2, groups=3)
    after, result = run(captured(f, torch.randn(1, 3, 6, 6), u=torch.randn(3, 1, 3, 3)), FoldPadding())
    assert body(after) == (
        "conv2d_default: f32[1, 3, 3, 3] = aten.conv2d(input_0, u_padded, None, [2, 2], [1, 1], [1, 1], 3)  # conv2d, pad\n"
        "return (conv2d_default)"
    )
    assert result.changes == [("pad", "pad folded into conv2d")]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_padding_of_a_depthwise_convolution(data):
    small = st.integers(1, 3)
    kernel, stride, step = ((data.draw(small), data.draw(small)) for _ in range(3))
    own, pad = data.draw(st.integers(0, 2)), [data.draw(st.integers(0, 3)) for _ in range(data.draw(st.sampled_from([2, 4])))]
    weight = torch.randn(2, 1, *kernel)

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, x):
            return F.conv2d(F.pad(x, pad), self.weight, None, stride, own, step, 2)

    model, x = Padded().eval(), torch.randn(1, 2, 9, 8)
    program = capture(model, (x,)).program
    after, _ = Pipeline((FoldPadding(),), strict=True).run(program)
    torch.testing.assert_close(after.graph_module(x)[0], model(x))


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (
            lambda s, x: F.conv2d(F.pad(x, (0, 1)), s.w),
            "it pads one side more than the other: 0 and 1; conv2d multiplies more than each channel by itself",
        ),
        (
            lambda s, x: F.conv2d(F.pad(x, (0, 1)), s.u, dilation=2, groups=3),
            "it pads one side more than the other: 0 and 1; no whole number of steps in the window of conv2d",
        ),
        (lambda s, x: F.conv2d(F.pad(x, (1, 1), value=1.0), s.w), "it pads with 1.0, not with zeros"),
        (
            lambda s, x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), s.w),
            "it pads in mode 'reflect', not with zeros",
        ),
        (lambda s, x: F.conv2d(F.pad(x, (-1, -1)), s.w), "its widths are not known, or crop"),
        (lambda s, x: F.pad(x, (1, 1)).exp(), "it is read by exp, no convolution"),
        (
            lambda s, x: F.conv2d(F.pad(x, (1, 1, 1, 1)), s.w, padding="same"),
            "conv2d sizes its own padding by its input ('same')",
        ),
        (lambda s, x: F.conv2d(F.pad(x, (0, 0, 0, 0, 1, 1)), s.v), "it pads 3 axes, conv2d has 2"),
    ],
)
def test_padding_that_stays(f, reason, captured, run):
    weights = {"w": torch.randn(4, 3, 3, 3), "v": torch.randn(4, 5, 3, 3), "u": torch.randn(3, 1, 3, 3)}
    program = captured(f, torch.randn(1, 3, 6, 6), **weights)
    _, result = run(program, FoldPadding())
    assert not result.modified and [r for _, r in result.refusals] == [reason]


# -- scale -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "f",
    [
        lambda s, x: F.linear(x, s.w, s.b) * s.g,
        lambda s, x: s.g * F.linear(x, s.w),
        lambda s, x: F.linear(x, s.w, s.b) * 0.125,
        lambda s, x: F.linear(x, s.w, s.b) / 8,
        lambda s, x: F.linear(x, s.w, s.b) / s.g.reshape(1, 1, 4),
        lambda s, x: F.conv1d(x, s.v, s.b, groups=1) * s.g.reshape(1, 4, 1),
        lambda s, x: F.conv_transpose1d(x, s.t, s.b) * s.g.reshape(4, 1),
    ],
)
def test_scales_are_folded(f, captured, run, ops):
    from graphwright.passes.fold_constants import FoldConstants

    tensors = {
        "w": torch.randn(4, 8),
        "b": torch.randn(4),
        "g": torch.rand(4) + 0.5,
        "v": torch.randn(4, 5, 3),
        "t": torch.randn(5, 4, 3),
    }
    after, result = run(captured(f, torch.randn(2, 5, 8), **tensors), Canonicalize(), FoldConstants(), FoldScale())
    assert len(ops(after)) == 1 and len(result.changes) == 1


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (
            lambda s, x: F.linear(x, s.w) * s.g[:, None],
            "the factor has shape (4, 1): it varies along other axes than the channels",
        ),
        (lambda s, x: F.linear(x, s.w) / (s.g * 0), "the factor is not finite"),
        (lambda s, x: F.linear(x, s.w) * s.g.double(), "the factor changes dtype or shape"),
    ],
)
def test_scales_that_stay(f, reason, captured, run):
    from graphwright.passes.fold_constants import FoldConstants

    program = captured(f, torch.randn(4, 8), w=torch.randn(4, 8), g=torch.rand(4))
    _, result = run(program, FoldConstants(), FoldScale())
    assert [r for _, r in result.refusals] == [reason]


def test_a_factor_that_is_computed_is_none_of_its_business(captured, run):
    _, result = run(
        captured(lambda s, x: F.linear(x, s.w) * x[:, :4], torch.randn(2, 8), w=torch.randn(4, 8)), FoldScale()
    )
    assert not result.changes and not result.refusals


def test_a_pad_is_folded_where_the_batch_stays_open(captured, run, ops):
    """Some releases' shape rule gives a pad of a pad the example's batch: what reads it was made for that, and it stays."""

    def f(s, x):
        y = F.conv2d(F.pad(x, (0, 1, 0, 1)), s.w, stride=2).clamp(0, 6)
        return F.conv2d(F.pad(y, (1, 1, 1, 1)), s.v)

    program = captured(f, torch.randn(2, 3, 8, 8), dynamic="auto", w=torch.randn(4, 3, 3, 3), v=torch.randn(2, 4, 3, 3))
    pads = [n for n in program.nodes if "pad" in n.name]
    after, _ = run(program, FoldPadding())
    is_open = not isinstance(pads[-1].meta["val"].shape[0], int)
    assert ops(after).count("pad") == (1 if is_open else 2)  # the other one pads one side alone
    assert isinstance(after.output.args[0][0].meta["val"].shape[0], int) is not is_open
    for rows in (1, 2, 5):
        x = torch.randn(rows, 3, 8, 8)
        torch.testing.assert_close(after(x)[0], program(x)[0])
