"""Slices, selections and means in front of what they follow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.select_early import SelectEarly

X, I = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(1)), torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(2))


def tensors():
    g = torch.Generator().manual_seed(3)
    return {"w": torch.randn(64, 8, generator=g), "b": torch.randn(64, generator=g), "k": torch.randn(12, 8, 1, 1, generator=g), "kb": torch.randn(12, generator=g),
            "n": torch.randn(4, 8, 1, 1, generator=g), "k3": torch.randn(12, 8, 3, 3, generator=g), "v": torch.randn(8, 64, generator=g)}  # fmt: skip


def test_golden(captured, run, body):
    """Only the last token's logits are wanted."""
    program = captured(lambda s, x: F.linear(F.gelu(F.layer_norm(x, (8,))), s.w, s.b)[:, -1], X, **tensors())
    assert body(program) == (
        "layer_norm_default: f32[2, 16, 8] = aten.layer_norm(input_0, [8], None, None, 1e-05, False)  # layer_norm\n"
        "gelu_default: f32[2, 16, 8] = aten.gelu(layer_norm_default, approximate='none')  # gelu\n"
        "linear_default: f32[2, 16, 64] = aten.linear(gelu_default, w, b)  # linear\n"
        "select_int: f32[2, 64] = aten.select.int(linear_default, 1, -1)  # select\n"
        "return (select_int)"
    )
    after, result = run(program, SelectEarly())
    assert body(after) == (
        "select_int_3: f32[2, 8] = aten.select.int(input_0, 1, -1)  # select\n"
        "layer_norm_default_1: f32[2, 8] = aten.layer_norm(select_int_3, [8], None, None, 1e-05, False)  # layer_norm, select\n"
        "gelu_default_1: f32[2, 8] = aten.gelu(layer_norm_default_1, approximate='none')  # gelu, select\n"
        "linear_default_1: f32[2, 64] = aten.linear(gelu_default_1, w, b)  # linear, select\n"
        "return (linear_default_1)"
    )
    assert result.changes == [("select", "select moved before linear"), ("select", "select moved before gelu"), ("select", "select moved before layer_norm")]


@pytest.mark.parametrize(
    ("f", "x", "left"),
    [
        (lambda s, x: F.linear(x, s.w, s.b).mean(1), X, ["mean", "linear"]),
        (lambda s, x: F.linear(x, s.w, s.b).mean(1, keepdim=True), X, ["mean", "linear"]),
        (lambda s, x: F.avg_pool2d(F.conv2d(x, s.k, s.kb), 2), I, ["avg_pool2d", "conv2d"]),
        (lambda s, x: F.avg_pool2d(F.conv2d(x, s.k, s.kb), 2, padding=1, count_include_pad=False), I, ["avg_pool2d", "conv2d"]),
        (lambda s, x: F.avg_pool2d(F.conv2d(x, s.k), 2, padding=1), I, ["avg_pool2d", "conv2d"]),
        (lambda s, x: F.avg_pool2d(F.conv2d(x, s.k, s.kb), 3, ceil_mode=True), I, ["avg_pool2d", "conv2d"]),
        (lambda s, x: F.adaptive_avg_pool2d(F.conv2d(x, s.k, s.kb), 1), I, ["adaptive_avg_pool2d", "conv2d"]),
        (lambda s, x: F.conv2d(x, s.k, s.kb).mean((2, 3), keepdim=True), I, ["mean", "conv2d"]),
        (lambda s, x: F.conv2d(x, s.k, s.kb).mean((2, 3)), I, ["mean", "conv2d", "squeeze"]),
        (lambda s, x: F.conv2d(x, s.k, s.kb).mean(-1), I, ["mean", "conv2d", "squeeze"]),
        (lambda s, x: F.conv2d(x, s.k, s.kb)[:, :, ::2, ::2] + 1, I, ["conv2d", "add"]),
        (lambda s, x: F.conv2d(x, s.k, s.kb, stride=2)[:, :, ::2] + 1, I, ["conv2d", "add"]),
        (lambda s, x: F.conv2d(x, s.k3, padding=1)[:1] + 1, I, ["slice", "conv2d", "add"]),
        (lambda s, x: (x + F.linear(F.gelu(F.linear(F.layer_norm(x, (8,)), s.w)), s.v))[:, 0], X, ["select", "layer_norm", "linear", "gelu", "linear", "add"]),
        (lambda s, x: F.linear(x, s.w, s.b)[:, 2:4].exp(), X, ["slice", "linear", "exp"]),
    ],
)  # fmt: skip
def test_it_moves(f, x, left, captured, run, ops):
    program = captured(f, x, **tensors())
    after, result = run(program, Canonicalize(), SelectEarly())
    assert sorted(ops(after)) == sorted(left) and result.changes
    y = torch.randn(x.shape)
    torch.testing.assert_close(after(y)[0], program(y)[0], rtol=1e-4, atol=1e-5)
    assert all(o.is_contiguous() for o in after(y))


@pytest.mark.parametrize(
    ("f", "x", "reason"),
    [
        (lambda s, x: F.avg_pool2d(F.conv2d(x, s.k, s.kb), 2, padding=1), I, "it counts padding, to which no bias was added"),
        (lambda s, x: F.avg_pool2d(F.conv2d(x, s.k, s.kb), 2, divisor_override=3), I, "it counts padding, to which no bias was added"),
        (lambda s, x: (lambda y: y[:, 0] + y.sum())(F.linear(x, s.w)), X, "linear is read by sum too"),  # noqa: PLC3002
        (lambda s, x: F.conv2d(x, s.k)[:, :, 1::2], I, "conv2d is a convolution: only a slice of every n-th pixel is a stride"),
        (lambda s, x: F.conv2d(x, s.k)[:, :, :3], I, "conv2d is a convolution: only a slice of every n-th pixel is a stride"),
        (lambda s, x: F.avg_pool2d(F.conv2d(x, s.n), 3, 1), I, "it would not save work"),
        (lambda s, x: F.linear(x, s.v[:, :8])[:, 1:], X, "it would not save work"),
    ],
)  # fmt: skip
def test_it_stays(f, x, reason, captured, run):
    from graphwright.passes.fold_constants import FoldConstants

    _, result = run(captured(f, x, **tensors()), FoldConstants(), SelectEarly())
    assert not result.changes and any(r.startswith(reason) for _, r in result.refusals), result.refusals


@pytest.mark.parametrize(
    "f",
    [
        lambda s, x: F.conv2d(x, s.k3)[:, :, 0],
        lambda s, x: F.conv2d(x, s.k)[:, :, 0],
        lambda s, x: F.conv2d(x, s.k)[0],
        lambda s, x: F.conv2d(x, s.k).mean(1),
        lambda s, x: F.conv2d(x, s.k).mean((0, 2)),
        lambda s, x: F.linear(x, s.w)[..., 0],
        lambda s, x: F.layer_norm(x, (8,))[..., 0],
        lambda s, x: x.softmax(1)[:, 0],
        lambda s, x: F.linear(x, s.w).relu().mean(1),
    ],
)
def test_what_mixes_its_rows_stays_without_a_word(f, captured, run):
    _, result = run(captured(f, I, **tensors()), SelectEarly())
    assert not result.changes


def test_twins_are_one_and_move_on(captured, run, ops):
    """Both readers of the norm want its first row: so does the norm."""

    def f(s, x):
        y = F.layer_norm(x, (8,))
        return (F.silu(F.linear(y, s.w)) * F.linear(y, s.w + 1))[:, 0]

    after, _ = run(captured(f, X, **tensors()), SelectEarly())
    assert ops(after).count("select") == 1 and ops(after).index("select") < ops(after).index("layer_norm")


def test_sizes_that_vary(captured, run, ops):
    program = captured(lambda s, x: (F.linear(x, s.w, s.b).relu()[:, -1], F.linear(x, s.w).mean(1)), X, dynamic={"input_0": {0: "batch", 1: "length"}}, **tensors())
    after, _ = run(program, Canonicalize(), SelectEarly())
    assert ops(after)[0] in ("select", "mean")
    for shape in ((1, 3, 8), (5, 40, 8)):
        x = torch.randn(shape)
        for a, b in zip(after(x), program(x), strict=True):
            torch.testing.assert_close(a, b)


def test_a_slice_by_a_size_that_is_computed(captured, run):
    """Its end must stand before it."""
    program = captured(lambda s, x: F.linear(F.gelu(x), s.w)[:, : x.shape[1] // 4].exp(), X, dynamic={"input_0": {1: "length"}}, **tensors())
    after, _ = run(program, Canonicalize(), SelectEarly())
    for length in (4, 16, 40):
        x = torch.randn(2, length, 8)
        torch.testing.assert_close(after(x)[0], program(x)[0])


def test_left_out_sites_stay(captured, run, ops):
    after, result = run(captured(lambda s, x: F.linear(x, s.w)[:, 0], X, **tensors()), SelectEarly(exclude=("select",)))
    assert ops(after) == ["linear", "select"] and result.refusals == [("select", "left out by include / exclude")]
