"""Generated kernels: what they compute, what they look like, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings

from graphwright.backends.inductor import FragmentModule
from graphwright.kernels.generate import generate
from graphwright.kernels.generated import Generated
from graphwright.kernels.native import unavailable
from graphwright.kernels.trees import Unfit
from graphwright.numerics import Exact, rms
from graphwright.testing.regions import F, fragments, inputs_of, region, v

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

def source_of(fragment):
    with torch.no_grad():
        return generate(fragment.inputs, fragment.steps, fragment.outputs, FragmentModule(fragment).trace(fragment.zeros()))


def check(fragment, inputs=None, slack=0.0):
    """The kernel against the ops, by the fp64 rule; ``slack`` times the rounding unit more where chains amplify what is rounded first."""
    made = Generated(source_of(fragment))
    inputs = inputs_of(fragment) if inputs is None else inputs
    before = [x.clone() for x in inputs]
    with torch.no_grad():
        reference, was = FragmentModule(fragment, double=True)(*inputs), FragmentModule(fragment)(*inputs)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for ref, old, new in zip(reference, was, made(inputs), strict=True):
            problem = Exact().failure(ref, old, new)
            assert problem is None or slack and rms(new.double() - ref) <= slack * torch.finfo(torch.float32).eps * rms(ref), problem
            assert new.dtype == old.dtype
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, inputs, strict=True))
    return made


ROTARY = region(
    [(F, (2, 3, 17, 8), (3 * 17 * 8 * 2, 8, 48, 1)), (1, 1, 17, 8), (1, 1, 17, 8)],
    [("mul.Tensor", [v(0), v(1)]), ("slice.Tensor", [v(0), 3, 0, 4, 1]), ("slice.Tensor", [v(0), 3, 4, 2**63 - 1, 1]),
     ("neg.default", [v(5)]), ("cat.default", [[v(6), v(4)], -1]), ("mul.Tensor", [v(7), v(2)]), ("add.Tensor", [v(3), v(8)], {"alpha": 1})],
)  # fmt: skip


def test_the_text_of_a_kernel():
    text = source_of(ROTARY).text
    body = text[text.index("        for i in"): text.index("        i2 += 1")]
    assert body == """\
        for i in independent(0, 4):
            v1 = x0[i]
            v2 = x1[i]
            v3 = v1 * v2
            v4 = x2[i]
            v5 = -v4
            v6 = x3[i]
            v7 = v5 * v6
            v8 = v3 + v7
            y0[i] = v8
        for i in independent(4, 8):
            v9 = x0[i]
            v10 = x1[i]
            v11 = v9 * v10
            v12 = x0[i - 4]
            v13 = x3[i]
            v14 = v12 * v13
            v15 = v11 + v14
            y0[i] = v15
"""
    check(ROTARY)


def test_equal_regions_of_other_sizes_share_a_kernel():
    def pair(rows):
        return source_of(region([(rows, 300), (300,)], [("mul.Tensor", [v(0), v(1)]), ("tanh.default", [v(2)])]))

    assert pair(5).name == pair(70).name
    assert pair(5).sizes != pair(70).sizes


def test_costly_numbers_are_kept_and_cheap_ones_computed_again():
    inner = [("tanh.default", [v(0)]), ("softmax.int", [v(1), -1, None])]
    assert "kept0" in source_of(region([(6, 40)], inner)).text
    cheap = [("mul.Tensor", [v(0), 2.0]), ("sum.dim_IntList", [v(1), [-1], True], {"dtype": None}), ("div.Tensor", [v(1), v(2)])]
    assert "kept" not in source_of(region([(6, 40)], cheap)).text
    check(region([(6, 40)], inner))
    check(region([(6, 40)], cheap))


def test_what_is_evenly_laid_out_is_one_long_row():
    last = (F, (2, 8, 5, 7), (280, 1, 56, 8))
    source = source_of(region([last, last], [("mul.Tensor", [v(0), v(1)]), ("silu.default", [v(2)])]))
    assert source.sizes[:2] == (1, 560)
    made = check(region([last, (1, 8, 1, 1)], [("mul.Tensor", [v(0), v(1)]), ("silu.default", [v(2)])]))
    assert made(inputs_of(region([last, (1, 8, 1, 1)], [])))[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 129, 513, 4096, 9001, 20011])
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_every_length(rows, columns):
    check(region([(rows, columns), (columns,)], [("add.Tensor", [v(0), v(1)], {"alpha": 0.5}), ("layer_norm.default", [v(2), [columns], v(1), None, 1e-5, False]),
                                                 ("gelu.default", [v(3)], {"approximate": "none"})], 2, 4))  # fmt: skip


SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 88.5, 89.0, -104.0, 1e-38, 3e38, -3e38, 0.5, 20.0, -20.0])


@pytest.mark.parametrize("op", ["exp", "log", "relu", "sigmoid", "tanh", "abs", "neg", "sqrt", "rsqrt", "reciprocal", "square", "floor", "erf",
                                "hardsigmoid", "relu6", "ceil", "trunc", "round", "sign", "frac", "sin", "cos", "tan", "exp2", "expm1", "log1p", "log2", "log10",
                                "log_sigmoid", "softplus", "mish"])  # fmt: skip
def test_the_ends_of_the_range(op):
    fragment = region([(16,)], [(f"{op}.default", [v(0)]), ("mul.Tensor", [v(1), 1.0])])
    got, want = Generated(source_of(fragment))([SPECIAL])[0], FragmentModule(fragment)(SPECIAL)[0]
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-37, equal_nan=True)


def test_logarithms():
    x = torch.exp(torch.linspace(-103.0, 88.7, 4099, dtype=torch.float64)).float()
    x[:2000] = torch.linspace(0.5, 1.5, 2000)
    fragment = region([(4099,)], [("log.default", [v(0)]), ("mul.Tensor", [v(1), 1.0])])
    torch.testing.assert_close(Generated(source_of(fragment))([x])[0].double(), x.double().log(), rtol=1.2e-7, atol=0.0)
    check(region([(5, 33)], [("mul.Tensor", [v(0), 9.0]), ("log_softmax.int", [v(1), -1, None])]))
    check(region([(700,)], [("abs.default", [v(0)]), ("log.default", [v(1)])]))


def test_comparisons_and_choices_with_nan():
    mask = ("bool", (16,), (1,))
    steps = [("lt.Scalar", [v(0), 1.0]), ("logical_and.default", [v(2), v(1)]), ("where.self", [v(3), v(0), v(0)]), ("masked_fill.Scalar", [v(0), v(3), -math.inf]),
             ("maximum.default", [v(4), v(5)]), ("clamp.default", [v(6), -2.0, None]), ("ne.Tensor", [v(0), v(0)]), ("logical_not.default", [v(8)])]  # fmt: skip
    fragment = region([(16,), mask], steps, 3, 5, 7, 8, 9)
    inputs = [SPECIAL, torch.arange(16) % 3 == 0]
    for got, want in zip(Generated(source_of(fragment))(inputs), FragmentModule(fragment)(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_rows_without_a_finite_number():
    x = torch.randn(4, 33)
    x[0], x[1, 5], x[2, 7] = -math.inf, math.nan, math.inf
    fragment = region([(4, 33)], [("mul.Tensor", [v(0), 1.0]), ("softmax.int", [v(1), -1, None]), ("amax.default", [v(1), [-1], True])], 2, 3)
    for got, want in zip(Generated(source_of(fragment))([x]), FragmentModule(fragment)(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_whole_numbers_and_casts():
    ids = ("int64", (3, 20), (20, 1))
    fragment = region([ids, (3, 20)], [("add.Tensor", [v(0), 3], {"alpha": 2}), ("_to_copy.default", [v(2)], {"dtype": {"dtype": "float32"}}),
                                       ("mul.Tensor", [v(3), v(1)]), ("ge.Scalar", [v(0), 1]), ("mul.Tensor", [v(4), v(5)])], 2, 5, 6)  # fmt: skip
    check(fragment)


@pytest.mark.parametrize(("fragment", "why"), [
    (region([(4, 5)], [("sum.dim_IntList", [v(0), [1], True]), ("sum.dim_IntList", [v(0), [0], True])], 1, 2), "axes \\[1\\] and \\[0\\]"),
    (region([(4, 5)], [("sum.dim_IntList", [v(0), [0]]), ("add.Tensor", [v(0), v(1)])]), "spread"),
    (region([(4, 5)], [("lgamma.default", [v(0)]), ("neg.default", [v(1)])]), "lgamma"),
    (region([(4, 5)], [("pow.Tensor_Scalar", [v(0), 2.5])]), "the power 2.5"),
    (region([(2, 8, 5, 5), (2, 8, 1, 1)], [("sigmoid.default", [v(1)]), ("mul.Tensor", [v(0), v(2)])]), "beside"),
    (region([(4, 5), (4, 5)], [("cat.default", [[v(0), v(1)], 0]), ("neg.default", [v(2)])]), "another axis"),
    (region([("float64", (4, 5), (5, 1))], [("neg.default", [v(0)]), ("neg.default", [v(1)])]), "float64"),
    (region([(4, 5)], [("view.default", [v(0), [20]])]), "nothing is computed"),
    (region([(0, 5)], [("neg.default", [v(0)]), ("neg.default", [v(1)])]), "no elements"),
])  # fmt: skip
def test_what_is_refused_and_why(fragment, why):
    with pytest.raises(Unfit, match=why):
        source_of(fragment)


# -- rows along other axes -----------------------------------------------------------------------------------------


def last(*shape):
    """A tensor of channels last."""
    _, c, h, w = shape
    return F, shape, (h * w * c, 1, w * c, c)


def test_the_text_of_a_sum_over_rows():
    text = source_of(region([(3, 130, 40), (40,)], [("mul.Tensor", [v(0), v(1)]), ("mean.dim", [v(2), [1]])])).text
    assert text[text.index("        x0 ="): text.index("        at +=")] == """\
        x0 = f32(p[7] + i0 * p[8] + at * 4)
        x1 = f32(p[10] + i0 * p[11] + at * 4)
        y0 = f32(p[12] + i0 * p[13] + at * 4)
        count = min(tile, columns - at)
        for i in independent(0, count):
            row1[i] = real(0.0)
        for first in range(0, m0, 64):
            for i in independent(0, count):
                part2[i] = real(0.0)
            for k0 in range(first, min(first + 64, m0)):
                for i in independent(0, count):
                    v3 = x0[k0 * x0_m0 + i]
                    v4 = x1[i]
                    v5 = v3 * v4
                    part2[i] = plus(part2[i], v5)
            for i in independent(0, count):
                row1[i] = plus(row1[i], part2[i])
        for i in independent(0, count):
            v6 = row1[i]
            v7 = v6 * real(0.007692307692307693)
            y0[i] = v7
"""


CHANNEL_NORM = [("mean.dim", [v(0), [1], True]), ("sub.Tensor", [v(0), v(3)]), ("pow.Tensor_Scalar", [v(4), 2]), ("mean.dim", [v(5), [1], True]),
                ("add.Tensor", [v(6), 1e-6]), ("rsqrt.default", [v(7)]), ("mul.Tensor", [v(4), v(8)]), ("mul.Tensor", [v(1), v(9)]), ("add.Tensor", [v(10), v(2)])]
GROUP_NORM = [("var.correction", [v(0), [2, 3, 4]], {"correction": 0, "keepdim": True}), ("mean.dim", [v(0), [2, 3, 4], True]), ("sub.Tensor", [v(0), v(4)]),
              ("add.Tensor", [v(3), 1e-5]), ("rsqrt.default", [v(6)]), ("mul.Tensor", [v(5), v(7)]), ("mul.Tensor", [v(8), v(1)]), ("add.Tensor", [v(9), v(2)])]


@pytest.mark.parametrize("fragment", [
    region([(2, 5, 7, 9)], [("relu.default", [v(0)]), ("mean.dim", [v(1), [2, 3]]), ("sigmoid.default", [v(2)])]),
    region([last(2, 37, 7, 9)], [("relu.default", [v(0)]), ("mean.dim", [v(1), [-1, -2], True]), ("mul.Tensor", [v(1), v(2)])]),
    region([(2, 130, 700), (2, 130, 1)], [("mul.Tensor", [v(0), v(1)]), ("sum.dim_IntList", [v(2), [1]]), ("div.Tensor", [v(3), 7.0])]),
    region([(2, 24, 5, 6), (24, 1, 1), (24, 1, 1)], CHANNEL_NORM),
    region([last(2, 24, 5, 6), (24, 1, 1), (24, 1, 1)], CHANNEL_NORM),
    region([(2, 3, 4, 5, 6), (3, 4, 1, 1), (3, 4, 1, 1)], GROUP_NORM),
    region([(2, 3, 4, 5, 6), (3, 4, 1, 1), (3, 4, 1, 1)], GROUP_NORM, 3, 4),
    region([(3, 13, 40)], [("mul.Tensor", [v(0), 2.0]), ("softmax.int", [v(1), 1, None]), ("log_softmax.int", [v(1), 1, None])], 2, 3),
    region([(3, 3000, 3)], [("tanh.default", [v(0)]), ("softmax.int", [v(1), 1, None]), ("amin.default", [v(1), [1]])], 2, 3),
    region([(12, 40, 110)], [("mul.Tensor", [v(0), v(0)]), ("sum.default", [v(1)]), ("sqrt.default", [v(2)])]),
    region([(33, 70)], [("abs.default", [v(0)]), ("amax.default", [v(1), [0]]), ("std.correction", [v(1), [0]], {"correction": 1})], 2, 3),
    region([(6, 7, 8)], [("exp.default", [v(0)]), ("mean.dim", [v(1), [0, 2], True]), ("sub.Tensor", [v(1), v(2)])]),
    region([(4, 6, 7), (6, 7)], [("mul.Tensor", [v(0), 0.5]), ("layer_norm.default", [v(2), [6, 7], v(1), None, 1e-5, False])]),
    region([(3, 20, 16)], [("linalg_vector_norm.default", [v(0), 2, [1], True]), ("clamp_min.default", [v(1), 1e-12]), ("div.Tensor", [v(0), v(2)])]),
    region([(3, 20, 16)], [("mul.Tensor", [v(0), 90.0]), ("logsumexp.default", [v(1), [1]])]),
    region([("bool", (3, 20, 16))], [("logical_not.default", [v(0)]), ("any.dim", [v(1), 1]), ("all.dim", [v(1), 1, True])], 2, 3),
])  # fmt: skip
def test_rows_along_other_axes(fragment):
    check(fragment)


def test_rows_are_done_beside_each_other_where_numbers_lie_so():
    steps = [("relu.default", [v(0)]), ("mean.dim", [v(1), [2, 3]])]
    assert "lanes()" in source_of(region([last(2, 37, 7, 9)], steps)).text
    assert "lanes()" not in source_of(region([(2, 37, 7, 9)], steps)).text


def test_long_sums_are_accurate():
    x = torch.rand(1, 40000, 20) + 1
    fragment = region([(1, 40000, 20)], [("mul.Tensor", [v(0), 1.0]), ("mean.dim", [v(1), [1]])])
    torch.testing.assert_close(Generated(source_of(fragment))([x])[0].double(), x.double().mean(1), rtol=1e-6, atol=0.0)


def test_angles_of_any_size():
    x = torch.cat([torch.linspace(-30.0, 30.0, 5001), torch.logspace(-30, 38.4, 5001), torch.arange(1, 4001) * torch.pi, 16367173.0 * 2.0 ** torch.arange(0, 70)])
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0, math.inf, math.nan])]).float()
    fragment = region([tuple(x.shape)], [("sin.default", [v(0)]), ("cos.default", [v(0)])], 1, 2)
    for got, want in zip(Generated(source_of(fragment))([x]), (x.double().sin(), x.double().cos()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-7, atol=0.0, equal_nan=True)


def test_a_large_angle_beside_small_ones():
    """In vectors of 16, and in what is left over: each keeps its sign of zero, its smallest numbers and its NaN."""
    x = torch.linspace(-3, 3, 16 * 9 + 7)
    x[[3, 17, 40, 150]], x[[4, 18]], x[[5, 19, 149]] = torch.tensor([65537.0, -3e38, math.inf, 1e9]), -0.0, 1e-42
    fragment = region([tuple(x.shape)], [("sin.default", [v(0)]), ("cos.default", [v(0)])], 1, 2)
    sine, cosine = Generated(source_of(fragment))([x])
    torch.testing.assert_close(sine.double(), x.double().sin(), rtol=2e-7, atol=0.0, equal_nan=True)
    torch.testing.assert_close(cosine.double(), x.double().cos(), rtol=2e-7, atol=0.0, equal_nan=True)
    assert torch.equal(sine.signbit()[[4, 18]], torch.tensor([True, True]))


def test_bits_and_whole_numbers():
    numbers = ("int64", (3, 8), (8, 1))
    steps = [("bitwise_and.Tensor", [v(0), v(1)]), ("bitwise_or.Scalar", [v(2), 8]), ("bitwise_xor.Tensor", [v(3), v(0)]), ("bitwise_not.default", [v(4)]),
             ("remainder.Scalar", [v(5), 3]), ("floor_divide.default", [v(5), {"value": 9}]), ("sign.default", [v(5)]), ("clamp.default", [v(5), -4, 5]),
             ("maximum.default", [v(5), v(0)]), ("lt.Scalar", [v(0), 1]), ("bitwise_not.default", [v(11)]), ("logical_xor.default", [v(11), v(1)])]  # fmt: skip
    steps[5] = ("floor_divide.Scalar", [v(5), 3]) if hasattr(torch.ops.aten.floor_divide, "Scalar") else steps[6]
    inputs = [torch.arange(-12, 12).view(3, 8), torch.arange(24).flip(0).view(3, 8)]
    fragment = region([numbers, numbers], steps, *range(2, 14))
    for got, want in zip(Generated(source_of(fragment))(inputs), FragmentModule(fragment)(*inputs), strict=True):
        assert torch.equal(got, want)


# -- any region ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(fragments())
def test_any_region_computes_what_its_ops_compute(fragment):
    try:
        source_of(fragment)
    except Unfit as why:
        assert "spread" in str(why) or "beside" in str(why) or "rows along 4 axes" in str(why), why
        return
    check(fragment, slack=256.0)


@settings(max_examples=25, deadline=None)
@given(fragments(beside=True))
def test_any_region_whose_rows_lie_beside_each_other(fragment):
    try:
        source_of(fragment)
    except Unfit as why:
        assert "spread" in str(why) or "beside" in str(why) or "rows along 4 axes" in str(why), why
        return
    check(fragment, slack=256.0)
