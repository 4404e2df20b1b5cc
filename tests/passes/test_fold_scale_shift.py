"""Constant factors and summands folded into contractions before and after them, through views and sums, and every reason not to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.fold_constants import FoldConstants
from graphwright.passes.fold_scale import FoldScale
from graphwright.passes.fold_shift import FoldShift

IMAGE, TOKENS = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
PASSES = (Canonicalize(), FoldConstants(), FoldShift(), FoldScale())


def tensors():
    g = torch.Generator().manual_seed(3)
    return {
        "mean": torch.tensor([0.48, 0.45, 0.4]).reshape(3, 1, 1), "std": torch.tensor([0.22, 0.22, 0.25]).reshape(3, 1, 1),
        "k": torch.randn(4, 3, 3, 3, generator=g), "kb": torch.randn(4, generator=g), "t": torch.randn(3, 4, 2, 2, generator=g),
        "w": torch.randn(6, 8, generator=g), "wb": torch.randn(6, generator=g), "v": torch.randn(6, 8, generator=g), "h": torch.rand(2, 1, 1, generator=g) + 0.5,
        "g": torch.rand(6, generator=g) + 0.5,
    }  # fmt: skip


def test_golden(captured, run, body):
    """Image preprocessing goes into the first convolution."""
    program = captured(lambda s, x: F.conv2d((x - s.mean) / s.std, s.k, s.kb), IMAGE, **tensors())
    assert body(program) == (
        "sub_tensor: f32[2, 3, 8, 8] = aten.sub.Tensor(input_0, mean, alpha=1)  # sub\n"
        "div_tensor: f32[2, 3, 8, 8] = aten.div.Tensor(sub_tensor, std)  # div\n"
        "conv2d_default: f32[2, 4, 6, 6] = aten.conv2d(div_tensor, k, kb, [1, 1], [0, 0], [1, 1], 1)  # conv2d\n"
        "return (conv2d_default)"
    )
    after, result = run(program, FoldShift(), FoldScale())
    assert body(after) == (
        "conv2d_default: f32[2, 4, 6, 6] = aten.conv2d(input_0, k_scaled, kb_shifted, [1, 1], [0, 0], [1, 1], 1)  # conv2d, sub, div\n"
        "return (conv2d_default)"
    )
    assert result.changes == [("div", "factor folded into conv2d")]
    assert after.provenance["k_scaled"] == ("k", "std") and after.provenance["kb_shifted"] == ("kb", "mean")
    assert set(after.tensors()) == {"k_scaled", "kb_shifted"}


ALL_IN = {
    "standardised pixels": (lambda s, x: F.conv2d((x / 255 - s.mean) / s.std, s.k), IMAGE, 1),
    "2x - 1": (lambda s, x: F.conv2d(2 * x - 1, s.k), IMAGE, 1),
    "1 - x": (lambda s, x: F.conv2d(1 - x, s.k), IMAGE, 1),
    "factor before padding": (lambda s, x: F.conv2d(x / s.std, s.k, padding=1), IMAGE, 1),
    "factor before a transposed one": (lambda s, x: F.conv_transpose2d(x / s.std, s.t), IMAGE, 1),
    "factor for several readers": (lambda s, x: F.linear(x * 3, s.w) + F.linear(x * 3, s.v), TOKENS, 3),
    "through a permute": (lambda s, x: F.linear((x * 3 + 1).permute(1, 0, 2), s.w), TOKENS, 2),
    "bias apart": (lambda s, x: F.conv2d(x, s.k, s.kb) + s.kb.reshape(4, 1, 1), IMAGE, 1),
    "negative bias": (lambda s, x: s.kb.reshape(4, 1, 1) - F.conv2d(x, s.k, s.kb), IMAGE, 1),
    "scale and shift after": (lambda s, x: F.linear(x, s.w, s.wb) * s.g + s.g, TOKENS, 1),
    "shift and scale after": (lambda s, x: (F.linear(x, s.w, s.wb) + s.g) * s.g, TOKENS, 1),
    "scaled heads": (lambda s, x: F.linear(x, s.w, s.wb).reshape(2, 5, 2, 3).permute(0, 2, 1, 3) * s.h, TOKENS, 3),
    "scaled queries": (lambda s, x: F.linear(x, s.w).reshape(2, 5, 2, 3).permute(0, 2, 1, 3) * 0.125, TOKENS, 3),
    "a sum of two": (lambda s, x: (F.linear(x, s.w) + F.linear(x, s.v)) * s.g, TOKENS, 3),
    "a difference shifted": (lambda s, x: (F.linear(x, s.w) - F.linear(x, s.v)) + s.g, TOKENS, 3),
    "negated": (lambda s, x: -F.linear(x, s.w, s.wb), TOKENS, 1),
    "behind relu": (lambda s, x: F.relu(F.linear(x, s.w, s.wb)) * 0.5, TOKENS, 2),
    "alpha": (lambda s, x: torch.add(F.linear(x, s.w, s.wb), s.g, alpha=3), TOKENS, 1),
    "alpha on the other": (lambda s, x: torch.add(s.g, F.linear(x, s.w, s.wb), alpha=3), TOKENS, 1),
    "alpha subtracted": (lambda s, x: torch.sub(s.g, F.linear(x, s.w, s.wb), alpha=3), TOKENS, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL_IN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_of_it_is_folded(name, dtype, captured, run, ops):
    f, x, left = ALL_IN[name]
    program = captured(f, x.to(dtype), **{k: t.to(dtype) for k, t in tensors().items()})
    kept = {k: t.clone() for k, t in program.tensors().items()}
    after, _ = run(program, *PASSES)
    assert len(ops(after)) == left, ops(after)
    assert all(torch.equal(t, kept[k]) for k, t in program.tensors().items())
    torch.testing.assert_close(after(x.to(dtype))[0], program(x.to(dtype))[0])


@pytest.mark.parametrize("name", ["standardised pixels", "scaled heads", "through a permute"])
def test_sizes_that_vary(name, captured, run):
    f, x, _ = ALL_IN[name]
    if "heads" in name:
        f = lambda s, x: F.linear(x, s.w, s.wb).reshape(x.shape[0], x.shape[1], 2, 3).permute(0, 2, 1, 3) * s.h
    program = captured(f, x, dynamic={"input_0": {0: "batch"}}, **tensors())
    after, result = run(program, *PASSES)
    assert result.changes
    for batch in (1, 2, 7):
        y = torch.randn(batch, *x.shape[1:])
        torch.testing.assert_close(after(y)[0], f(type("S", (), tensors()), y), rtol=1e-4, atol=1e-5)


def tied(s, x):
    return F.linear(x * 3, s.w) + F.linear(x, s.w)


@pytest.mark.parametrize(
    ("f", "x", "reason"),
    [
        (lambda s, x: F.conv2d(x - s.mean, s.k, padding=1), IMAGE, "conv2d pads with zeros, which the constant would shift"),
        (lambda s, x: F.conv_transpose2d(x - s.mean, s.t), IMAGE, "conv_transpose2d is transposed"),
        (lambda s, x: F.linear(x, s.w) + s.g[:5].reshape(5, 1), TOKENS, "the constant has shape (5, 1): it varies along other axes than the channels"),
        (lambda s, x: (lambda y: (y + s.g) * y.sum())(F.linear(x, s.w)), TOKENS, "linear is read by sum too"),  # noqa: PLC3002
        (lambda s, x: F.linear(x + 1, s.w) + F.linear(x, s.w), TOKENS, "the weight of linear is read elsewhere too: it would be stored twice"),
        (lambda s, x: (F.linear(x, s.w) * 0) + s.g, TOKENS, "mul multiplies by zero"),
    ],
)  # fmt: skip
def test_shifts_that_stay(f, x, reason, captured, run):
    program = captured(f, x, **tensors())
    _, result = run(program, Canonicalize(), FoldConstants(), FoldShift())
    assert reason in [r for _, r in result.refusals] and not result.changes


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda s, x: F.relu(F.linear(x, s.w)) * -0.5, "a factor that is not positive does not pass relu"),
        (tied, "the weight of linear is read elsewhere too: it would be stored twice"),
        (lambda s, x: F.linear(x * s.v[0, :5].reshape(5, 1), s.w), "the factor has shape (5, 1): it varies along other axes than the channels"),
        (lambda s, x: (lambda y: F.linear(y, s.w).sum() + y)(x * 3), None),  # noqa: PLC3002
    ],
)  # fmt: skip
def test_scales_that_stay(f, reason, captured, run):
    _, result = run(captured(f, TOKENS, **tensors()), Canonicalize(), FoldConstants(), FoldScale())
    assert not result.changes and (reason is None or reason in [r for _, r in result.refusals])


def test_a_mean_that_cancels_is_measured(captured, run):
    """Far from zero the bias would take away what the weights bring; the exact rule decides."""
    g = torch.Generator().manual_seed(1)
    x = 1e4 + torch.randn(2, 3, 8, 8, generator=g)
    program = captured(lambda s, x: F.conv2d(x - 1e4, s.k), x, k=torch.randn(4, 3, 3, 3, generator=g))
    _, result = run(program, FoldShift())
    assert not result.changes and "measured on the example: RMS error" in result.refusals[0][1]
    program.example = None
    _, blind = run(program, FoldShift())
    assert "there is no example to measure the error on" in blind.refusals[0][1]


def test_left_out_sites_stay(captured, run, ops):
    program = captured(lambda s, x: F.linear(x, s.w) * 2 + 1, TOKENS, w=tensors()["w"])
    after, result = run(program, FoldShift(exclude=("add",)), FoldScale(exclude=("mul",)))
    assert ops(after) == ["linear", "mul", "add"] and result.refusals == [("mul", "left out by include / exclude")]
