"""Written-out activations, norms and attention become ops; what only looks like them does not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.fold_constants import FoldConstants
from graphwright.passes.raise_activations import RaiseActivations
from graphwright.passes.raise_attention import RaiseAttention
from graphwright.passes.raise_norms import RaiseNorms
from graphwright.passes.simplify_masks import SimplifyMasks

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
K = math.sqrt(2 / math.pi)


def test_golden_activation(captured, run, body):
    def new_gelu(s, x):
        return 0.5 * x * (1.0 + torch.tanh(K * (x + 0.044715 * torch.pow(x, 3.0))))

    after, result = run(captured(new_gelu, X), RaiseActivations())
    assert body(after) == (
        "gelu_default: f32[2, 3, 8] = aten.gelu(input_0, approximate='tanh')  # mul, pow, mul#2, add, mul#3, tanh, add#2, mul#4\n"
        "return (gelu_default)"
    )
    assert result.changes == [("mul#4", "8 ops → gelu")]


@pytest.mark.parametrize(
    ("f", "op"),
    [
        (lambda s, x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "gelu"),
        (lambda s, x: 0.5 * (x * (torch.erf(x * math.sqrt(0.5)) + 1)), "gelu"),
        (lambda s, x: x * (0.5 + 0.5 * torch.erf(x / 2**0.5)), "gelu"),
        (lambda s, x: x * (torch.erf(x / 2**0.5) + 1) / 2, "gelu"),
        (lambda s, x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))), "gelu"),
        (lambda s, x: 0.5 * x * (1 + torch.tanh(K * x + K * 0.044715 * x**3)), "gelu"),
        (lambda s, x: x * torch.sigmoid(x), "silu"),
        (lambda s, x: torch.sigmoid(x) * x, "silu"),
        (lambda s, x: x * F.relu6(x + 3) / 6, "hardswish"),
        (lambda s, x: x * (F.relu6(x + 3) / 6), "hardswish"),
        (lambda s, x: x * (torch.clamp(x + 3, 0, 6) * (1 / 6)), "hardswish"),
        (lambda s, x: F.hardtanh(x + 3, 0.0, 6.0) / 6, "hardsigmoid"),
        (lambda s, x: x * torch.tanh(F.softplus(x)), "mish"),
    ],
)
def test_activations(f, op, captured, run, ops):
    after, _ = run(captured(f, X), RaiseActivations())
    assert ops(after) == [op]


@pytest.mark.parametrize(
    "f",
    [
        lambda s, x: x * torch.sigmoid(-1.702 * x),
        lambda s, x: x * torch.sigmoid(x * x),
        lambda s, x: x * torch.sigmoid(x + 1),
        lambda s, x: 2 * x * torch.sigmoid(x),
        lambda s, x: 0.5 * x * (1 + torch.erf(x / 1.4)),
        lambda s, x: 0.5 * x * (1 + torch.tanh(K * (x + 0.04 * x**3))),
        lambda s, x: 0.5 * x * (2 + torch.erf(x / math.sqrt(2))),
        lambda s, x: x * F.relu6(x + 2) / 6,
        lambda s, x: x * torch.tanh(F.softplus(x, beta=2)),
        lambda s, x: x * torch.sigmoid(x.flip(0)),
    ],
)
def test_what_only_looks_like_an_activation(f, captured, run):
    _, result = run(captured(f, X), RaiseActivations())
    assert not result.modified


def test_golden_quick_gelu(captured, run, body):
    after, _ = run(captured(lambda s, x: x * torch.sigmoid(1.702 * x), X), RaiseActivations())
    assert body(after) == (
        "mul_tensor_2: f32[2, 3, 8] = aten.mul.Tensor(input_0, 1.702)  # mul, sigmoid, mul#2\n"
        "silu_default: f32[2, 3, 8] = aten.silu(mul_tensor_2)  # mul, sigmoid, mul#2\n"
        "div_tensor: f32[2, 3, 8] = aten.div.Tensor(silu_default, 1.702)  # mul, sigmoid, mul#2\n"
        "return (div_tensor)"
    )


def test_a_gated_activation_keeps_its_gate(captured, run, ops):
    after, _ = run(captured(lambda s, x: x * torch.sigmoid(x) * x.sin(), X), RaiseActivations())
    assert ops(after) == ["silu", "sin", "mul"] or ops(after) == ["sin", "silu", "mul"]


def test_values_read_elsewhere_are_a_reason(captured, run):
    def f(s, x):
        gate = torch.sigmoid(x)
        return x * gate + gate.exp()

    _, result = run(captured(f, X), RaiseActivations())
    assert result.refusals == [("mul", "it spells silu, but sigmoid is read by exp too")]


# -- norms -----------------------------------------------------------------------------------------------------------


def rms(x, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def test_golden_norm(captured, run, body):
    after, result = run(captured(lambda s, x: s.w * rms(x), X, w=torch.rand(8)), RaiseNorms())
    assert body(after) == (
        "rms_norm_default: f32[2, 3, 8] = aten.rms_norm(input_0, [8], w, 1e-06)  # pow, mean, add, rsqrt, mul, mul#2\n"
        "return (rms_norm_default)"
    )
    assert result.changes == [("mul#2", "6 ops → rms_norm")]


def layer(x, eps=1e-5):
    u = x.mean(-1, keepdim=True)
    return (x - u) / torch.sqrt((x - u).pow(2).mean(-1, keepdim=True) + eps)


def centred_once(x):
    z = x - x.mean(-1, keepdim=True)
    return z * torch.rsqrt((z * z).mean(-1, keepdim=True) + 1e-5)


def by_var(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize(
    ("f", "op"),
    [
        (lambda s, x: rms(x), "rms_norm"),
        (lambda s, x: rms(x) * s.w, "rms_norm"),
        (lambda s, x: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * s.w, "rms_norm"),
        (lambda s, x: x * (x.square().mean(2, keepdim=True) + 1e-6) ** -0.5, "rms_norm"),
        (lambda s, x: rms(x) * (1.0 + s.w), "rms_norm"),
        (lambda s, x: layer(x) * s.w + s.b, "layer_norm"),
        (lambda s, x: s.b + centred_once(x) * s.w, "layer_norm"),
        (lambda s, x: centred_once(x), "layer_norm"),
        (lambda s, x: s.w * by_var(x), "layer_norm"),
    ],
)
def test_norms(f, op, captured, run, ops):
    from graphwright.passes.common_subexpressions import CommonSubexpressions

    program = captured(f, X, w=torch.rand(8), b=torch.rand(8))
    after, _ = run(program, FoldConstants(), CommonSubexpressions(), RaiseNorms())
    assert ops(after) == [op]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_that_compute_in_float32(dtype, captured, run, ops):
    def llama(s, x):
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return s.w * y.to(x.dtype)

    after, _ = run(captured(llama, X.to(dtype), w=torch.rand(8).to(dtype)), Canonicalize(), RaiseNorms())
    assert ops(after) == ["rms_norm"]


def test_a_bias_after_rms_norm_stays_a_sum(captured, run, ops):
    after, _ = run(captured(lambda s, x: rms(x) * s.w + s.b, X, w=torch.rand(8), b=torch.rand(8)), RaiseNorms())
    assert ops(after) == ["rms_norm", "add"]


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (
            lambda s, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
            "it normalises over axes [1], not over the last one alone",
        ),
        (
            lambda s, x: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-6),
            "it normalises over axes [1, 2], not over the last one alone",
        ),
        (lambda s, x: (lambda r: x * r + r.sum())(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), None),  # noqa: PLC3002
        (
            lambda s, x: (lambda v: x * torch.rsqrt(v + 1e-6) + v.sum())(x.pow(2).mean(-1, keepdim=True)),  # noqa: PLC3002
            "it spells RMS norm, but mean is read by sum too",
        ),
        (lambda s, x: x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-6), None),
        (lambda s, x: x.exp() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), None),
        (lambda s, x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6), None),
        (lambda s, x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt(), None),
    ],
)
def test_what_is_no_norm_over_the_last_axis(f, reason, captured, run):
    _, result = run(captured(f, X), RaiseNorms())
    assert not result.modified and [r for _, r in result.refusals] == ([reason] if reason else [])


# -- attention -------------------------------------------------------------------------------------------------------

Q, KEYS, V = (torch.randn(2, 2, n, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 5, 6))
V = V[:, :, :5].contiguous()
HEADS = torch.tensor([0.5, 0.25]).reshape(2, 1, 1)
MASK = torch.where(torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(2)) > 0.3, 0.0, -1e30)


def test_golden_attention(captured, run, body):
    def eager(s, q, k, v, m):
        w = torch.matmul(q, k.transpose(2, 3)) * 0.25
        return torch.matmul(F.dropout(F.softmax(w + m, dim=-1, dtype=torch.float32).to(q.dtype), 0.1, False), v)

    after, result = run(captured(eager, Q, KEYS, V, MASK), Canonicalize(), RaiseAttention())
    assert body(after) == (
        "scaled_dot_product_attention_default: f32[2, 2, 4, 8] = aten.scaled_dot_product_attention("
        "input_0, input_1, input_2, input_3, 0.0, False, scale=0.25, enable_gqa=False)  # matmul, mul, add, softmax, matmul#2\n"
        "return (scaled_dot_product_attention_default)"
    )
    assert result.changes == [("matmul#2", "5 ops → scaled_dot_product_attention")]


@pytest.mark.parametrize(
    "f",
    [
        lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v,
        lambda q, k, v: torch.softmax(q @ k.mT / 8**0.5, -1) @ v,
        lambda q, k, v: torch.softmax((q * 0.125) @ k.mT, 3) @ v,
        lambda q, k, v: torch.softmax((q / 2) @ k.mT * 0.5, -1) @ v,
        lambda q, k, v: torch.softmax(q @ k.mT + MASK, -1) @ v,
        lambda q, k, v: torch.softmax(MASK + q @ k.mT * 0.3, -1) @ v,
        lambda q, k, v: torch.softmax(q @ k.mT + MASK + 0.5 * MASK.sign(), -1) @ v,
        lambda q, k, v: torch.softmax(q @ k.mT + torch.linspace(0, 1, 5), -1) @ v,
        lambda q, k, v: torch.softmax((q @ k.mT).masked_fill(MASK < 0, -1e30), -1) @ v,
        lambda q, k, v: torch.softmax((q @ k.mT * 0.2).masked_fill(MASK[:, :, :1] < 0, torch.finfo(torch.float32).min) + 1e-3 * MASK.sign(), -1) @ v,
        lambda q, k, v: torch.bmm(torch.softmax(torch.bmm(q[0], k[0].transpose(1, 2)), -1), v[0]),
    ],
)  # fmt: skip
def test_attention(f, captured, run, ops):
    after, _ = run(
        captured(lambda s, q, k, v: f(q, k, v), Q, KEYS, V), Canonicalize(), FoldConstants(), RaiseAttention()
    )
    assert ops(after).count("scaled_dot_product_attention") == 1
    assert not {"matmul", "bmm", "softmax"} & set(ops(after))


def test_masks_that_vary_are_turned_into_sums(captured, run):
    def f(s, q, k, v, m):
        return torch.softmax((q @ k.mT).masked_fill(m, -math.inf), -1) @ v

    m = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    m[:, :, :, 3:] = True
    after, _ = run(captured(f, Q, KEYS, V, m), Canonicalize(), RaiseAttention())
    torch.testing.assert_close(after(Q, KEYS, V, m)[0], f(None, Q, KEYS, V, m))


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda q, k, v: torch.softmax(q @ k.mT, -2) @ v, "its softmax runs over axis -2"),
        (
            lambda q, k, v: torch.softmax((q @ k.mT).masked_fill(MASK < 0, -100.0), -1) @ v,
            "it replaces scores by -100.0, which does not hide them altogether",
        ),
        (lambda q, k, v: torch.softmax(q[:1] @ k.mT, -1) @ v, "its operands are broadcast over the batch"),
        (
            lambda q, k, v: torch.softmax(torch.tanh(q @ k.mT / 50.0) * 50.0 + MASK, -1) @ v,
            "tanh (aten.tanh) stands between its products",
        ),
        (
            lambda q, k, v: torch.softmax((q @ k.mT + MASK) * 2.0, -1) @ v,
            "its scores are scaled by 2 after they are masked, which a hidden score may not survive",
        ),
        (
            lambda q, k, v: torch.softmax((q @ k.mT + MASK) * HEADS, -1) @ v,
            "its scores are scaled per head after they are masked",
        ),
        (
            lambda q, k, v: torch.softmax(q @ k.mT * torch.linspace(0.1, 1, 5), -1) @ v,
            "its scores are multiplied by linspace",
        ),
        (
            lambda q, k, v: torch.softmax(torch.where(MASK < 0, torch.tensor(-50.0), q @ k.mT), -1) @ v,
            "it replaces scores by -50.0, which does not hide them altogether",
        ),
        (lambda q, k, v: torch.softmax(q @ k.mT + MASK.double(), -1).float() @ v, "its mask is torch.float64"),
        (lambda q, k, v: (lambda w: w @ v + w.sum())(torch.softmax(q @ k.mT, -1)), "softmax is read by sum too"),  # noqa: PLC3002
        (lambda q, k, v: torch.softmax(q[0, 0] @ k[0, 0].mT, -1) @ v[0, 0], "its operands have other than 3 or 4 axes"),
    ],
)
def test_attention_that_stays(f, reason, captured, run):
    _, result = run(captured(lambda s, q, k, v: f(q, k, v), Q, KEYS, V), Canonicalize(), RaiseAttention())
    assert [r for _, r in result.refusals] == [f"it spells attention, but {reason}"]


def test_golden_attention_with_heads_joined_to_the_batch(captured, run, body):
    """BLOOM's: a bias added by baddbmm, a mask under another shape, heads taken apart at the end."""

    def alibi(s, q, k, v, m):
        scores = torch.baddbmm(s.bias, q.reshape(4, 4, 8), k.reshape(4, 5, 8).transpose(1, 2), beta=1.0, alpha=0.25)
        weights = torch.softmax(scores.view(2, 2, 4, 5) + m, -1)
        return torch.bmm(weights.view(4, 4, 5), v.reshape(4, 5, 8)).view(2, 2, 4, 8)

    after, result = run(captured(alibi, Q, KEYS, V, MASK, bias=torch.linspace(0, 1, 20).reshape(4, 1, 5)), Canonicalize(), RaiseAttention())
    assert body(after) == (
        "reshape_default_6: f32[2, 2, 1, 5] = aten.reshape(bias, [2, 2, 1, 5])  # baddbmm, reshape#3, add, softmax, reshape#4, bmm\n"
        "add_tensor_1: f32[2, 2, 4, 5] = aten.add.Tensor(reshape_default_6, input_3, alpha=1)  # baddbmm, reshape#3, add, softmax, reshape#4, bmm\n"
        "scaled_dot_product_attention_default: f32[2, 2, 4, 8] = aten.scaled_dot_product_attention("
        "input_0, input_1, input_2, add_tensor_1, 0.0, False, scale=0.25, enable_gqa=False)  # baddbmm, reshape#3, add, softmax, reshape#4, bmm, reshape#6\n"
        "return (scaled_dot_product_attention_default)"
    )
    assert result.changes == [("bmm", "6 ops → scaled_dot_product_attention")]


@pytest.mark.parametrize(
    "f",
    [
        lambda q, k, v: torch.softmax((q @ k.mT + MASK) * 0.5, -1) @ v,
        lambda q, k, v: torch.softmax((q @ k.mT + MASK.sign()) / 8**0.5, -1) @ v,
        lambda q, k, v: torch.softmax(q @ k.mT * HEADS + MASK, -1) @ v,
        lambda q, k, v: torch.softmax(q @ k.mT / HEADS, -1) @ v,
        lambda q, k, v: torch.softmax(q @ (k.mT / torch.tensor(8.0).sqrt()), -1) @ v,
        lambda q, k, v: torch.softmax(q @ k.mT - 1e6 * (MASK < 0).float(), -1) @ v,
        lambda q, k, v: torch.softmax(torch.where(MASK == 0, q @ k.mT, torch.tensor(torch.finfo(torch.float32).min)), -1) @ v,
        lambda q, k, v: torch.softmax(torch.where(MASK < 0, torch.tensor(-1e30), q @ k.mT), -1) @ v,
        lambda q, k, v: torch.softmax(q @ k[:, :1].mT, -1) @ v[:, :1],
        lambda q, k, v: torch.softmax((q.flatten(0, 1) @ k.flatten(0, 1).mT).view(2, 2, 4, 5) + MASK, -1).flatten(0, 1) @ v.flatten(0, 1),
        lambda q, k, v: torch.softmax(((q @ k.mT).view(1, 2, 2, 4, 5) + MASK[:, 0][None, :, None]).view(2, 2, 4, 5), -1) @ v,
        lambda q, k, v: torch.baddbmm(MASK[:, 0], q[0], k[0].mT, alpha=0.5).softmax(-1) @ v[0],
    ],
)  # fmt: skip
def test_attention_in_other_spellings(f, captured, run, ops):
    """The numbers are checked by ``run`` against float64; a second input shows that nothing of the first was built in."""
    program = captured(lambda s, q, k, v: f(q, k, v), Q, KEYS, V)
    after, _ = run(program, Canonicalize(), RaiseAttention())
    assert ops(after).count("scaled_dot_product_attention") == 1
    assert not {"matmul", "bmm", "baddbmm", "softmax"} & set(ops(after))
    others = [torch.randn(x.shape, generator=torch.Generator().manual_seed(9)) for x in (Q, KEYS, V)]
    torch.testing.assert_close(after(*others)[0], f(*others))


@pytest.mark.parametrize("hidden", [torch.finfo(torch.float32).min, -1e30])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_rows_that_may_attend_to_nothing_stay_uniform(hidden, scale, captured, run):
    """Where a finite number hides every key, each weighs the same: so it is, and so it stays."""
    mask = torch.zeros(2, 1, 4, 5)
    mask[1, :, 2] = hidden

    def f(s, q, k, v, m):
        return torch.softmax((q @ k.mT + m) * scale, -1) @ v

    after, result = run(captured(f, Q, KEYS, V, mask), Canonicalize(), RaiseAttention())
    assert result.changes
    torch.testing.assert_close(after(Q, KEYS, V, mask)[0][1, :, 2], V[1].mean(1))


# -- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "argument", "causal"),
    [
        (torch.ones(2, 1, 4, 4, dtype=torch.bool), None, False),
        (torch.zeros(4, 4), None, False),
        (torch.ones(4, 4, dtype=torch.bool).tril(), None, True),
        (torch.full((2, 1, 4, 4), -1e38).triu(1), None, True),
        (torch.full((4, 4), -math.inf).triu(1), None, True),
        (torch.full((4, 4), -5.0).triu(1), (4, 4), False),
        (torch.ones(4, 4, dtype=torch.bool).tril(1), (4, 4), False),
        (torch.eye(4).expand(2, 2, 4, 4).clone(), (1, 1, 4, 4), False),
        (torch.randn(2, 1, 4, 4), (2, 1, 4, 4), False),
    ],
)
def test_known_masks(mask, argument, causal, captured, run):
    program = captured(lambda s, q: F.scaled_dot_product_attention(q, q, q, s.m), Q, m=mask)
    after, _ = run(program, SimplifyMasks())
    node = after.nodes[-1]
    assert node.args[5] is causal
    assert node.args[3] is None if argument is None else tuple(node.args[3].meta["val"].shape) == argument


def test_a_mask_for_other_lengths_is_not_causal(captured, run):
    """With fewer queries than keys the lower triangle is not what is_causal means everywhere: it stays a mask."""
    mask = torch.ones(4, 5, dtype=torch.bool).tril()
    after, result = run(
        captured(lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, s.m), Q, KEYS, V, m=mask), SimplifyMasks()
    )
    assert not result.modified and after.nodes[-1].args[5] is False
