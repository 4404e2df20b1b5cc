"""Properties over random shapes, strides and parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.kernels import attention, pointwise, pool, softmax
from graphwright.ops import lowered

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)


@QUICK
@given(
    seeds, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.randoms(use_true_random=False),
    st.sampled_from(["none", "relu", "silu"]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_pointwise_any_strides_and_broadcasts(seed, shape, random, activation, with_gate, quantized) -> None:
    g = torch.Generator().manual_seed(seed)
    order = random.sample(range(len(shape)), len(shape))
    x = torch.randn(shape, generator=g).permute(order)
    if random.random() < 0.5:
        x = torch.randn([2 * n for n in x.shape], generator=g)[tuple(slice(None, None, 2) for _ in shape)]
    other = torch.randn([random.choice([1, n]) for n in x.shape][random.randrange(len(shape)):], generator=g)
    gate = torch.randn(x.shape, generator=g).transpose(0, -1).contiguous().transpose(0, -1) if with_gate else None
    grid = (0.02, 100, 0, 255, torch.uint8) if quantized else (1.0, 0, 0, 0, None)
    args = (x, other, gate, activation, [], *grid)
    if pointwise.KERNELS[0].supports(*args) is not None:
        return
    got, want = pointwise.activate_quantize(*args), lowered.activate_quantize(*args)
    assert got.stride() == want.stride() and got.shape == want.shape
    if quantized:
        assert int((got.int() - want.int()).abs().max()) <= 1
    else:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@QUICK
@given(seeds, st.integers(-40000, 40000), st.floats(1e-3, 1e3), st.integers(0, 255))
def test_quantize_is_exact_on_the_grid_and_monotone(seed, offset, scale, zero) -> None:
    scale = float(torch.tensor(scale))
    x = (torch.arange(600) - 300 - zero) * scale + offset * 0.0
    got = pointwise.quantize(x, scale, zero, 0, 255, torch.uint8)
    want = (torch.arange(600) - 300).clamp(0, 255).to(torch.uint8)
    assert torch.equal(got, want)
    noisy = (40 * scale * torch.randn(500, generator=torch.Generator().manual_seed(seed))).sort().values
    assert bool((pointwise.quantize(noisy, scale, zero, 0, 255, torch.uint8).int().diff() >= 0).all())


def test_halves_round_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert pointwise.quantize(x, 1.0, 0, -128, 127, torch.int8).tolist() == [-2, -2, 0, 0, 2, 2, 4]
    assert pointwise.quantize(x, 1.0, 7, 0, 255, torch.uint8).tolist() == [5, 5, 7, 7, 9, 9, 11]


@given(seeds)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_bfloat16_rounds_as_torch_does(seed) -> None:
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    x = bits.view(torch.float32)
    got = pointwise.activate_quantize(x, None, None, "none", [], 1.0, 0, 0, 0, torch.bfloat16)
    assert torch.equal(got.float().nan_to_num(nan=123.0), x.to(torch.bfloat16).float().nan_to_num(nan=123.0))


@QUICK
@given(
    seeds, st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(3, 12), st.integers(3, 12)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)), st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)), st.tuples(st.integers(1, 2), st.integers(1, 2)), st.booleans(),
    st.sampled_from([torch.uint8, torch.int8, torch.float32]),
)  # fmt: skip
def test_max_pool_any_window(seed, shape, kernel, stride, padding, dilation, ceil_mode, dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=g) * 60 + 100).clamp(0, 127).to(dtype)
    args = (x, list(kernel), list(stride), list(padding), list(dilation), ceil_mode)
    if pool.KERNELS[0].supports(*args) is not None:
        return
    got, want = pool.max_pool2d(*args), lowered.max_pool2d(*args)
    assert got.shape == want.shape and got.stride() == want.stride() and torch.equal(got, want)


def test_max_pool_lets_nan_win() -> None:
    x = torch.randn(1, 3, 6, 6)
    x[0, 1, 2, 2] = torch.nan
    want = F.max_pool2d(x, 3, 1, 1)
    got = pool.max_pool2d(x, [3, 3], [1, 1], [1, 1], [1, 1], False)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())


@QUICK
@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(1, 200), st.sampled_from([None, "row", "full"]),
       st.booleans(), st.booleans())  # fmt: skip
def test_softmax_masks(seed, b, h, r, c, kind, is_bool, causal) -> None:
    g = torch.Generator().manual_seed(seed)
    x = 4 * torch.randn(b, h, r, c, generator=g)
    mask = None
    if kind is not None:
        mask = torch.rand((b, 1, 1, c) if kind == "row" else (r, c), generator=g) < 0.8
        mask = mask if is_bool else torch.where(mask, 0.0, -1e30)
    got, want = softmax.run(x, mask, 0.5, causal), lowered.softmax(x, mask, 0.5, causal)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-7, equal_nan=True)


@QUICK
@given(seeds, st.integers(1, 2), st.integers(1, 3), st.integers(1, 90), st.integers(1, 90), st.integers(1, 20), st.booleans(),
       st.booleans())  # fmt: skip
def test_attention_as_torch_has_it(seed, b, h, s, t, d, causal, masked) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, n, h, d, generator=g).transpose(1, 2) for n in (s, t, t))
    mask = None if causal or not masked else torch.rand(b, 1, s, t, generator=g) < 0.7
    want = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2).flatten(2)
    got = attention.run(q, k, v, mask, None, causal, True, 1.0, 0, 0, 0, None)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def test_attention_of_nan_is_nan_not_zero() -> None:
    q = torch.randn(1, 1, 3, 4)
    k = torch.randn(1, 1, 5, 4)
    q[0, 0, 1] = torch.inf
    q[0, 0, 1, 0] = -torch.inf  # scores of inf - inf, whose sign bit is set on x86
    k[:] = 1.0
    got = attention.run(q, k, k, None, None, False, False, 1.0, 0, 0, 0, None)
    assert got[0, 0, 1].isnan().all() and got[0, 0, 0].isfinite().all()
