"""Generated Triton kernels: what they look like, what they refuse, what they compute (in Triton's interpreter, in a process of its own,
which runs the tests of this file that need it), and that they compile."""

from __future__ import annotations

import ast
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings

from graphwright.backends.inductor import FragmentModule
from graphwright.kernels import gpu
from graphwright.kernels.formulas import ROWS
from graphwright.kernels.trees import Unfit
from graphwright.testing.regions import F, fragments, region, v

pytestmark = pytest.mark.skipif(gpu.unavailable() is not None, reason=str(gpu.unavailable()))
interpreted = pytest.mark.skipif(not gpu.interpreting(), reason="runs in the process that interprets")

if gpu.unavailable() is None:
    from graphwright.kernels.gpu.dialect import translated
    from graphwright.kernels.gpu.generated import functions
    from graphwright.testing.generated import check, made_of, small

H, B = "float16", "bfloat16"


def _run(*command: str, interpret: bool) -> None:
    env = {k: w for k, w in os.environ.items() if k != "TRITON_INTERPRET"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.skipif(gpu.interpreting(), reason="starts the process that interprets")
def test_in_the_interpreter():
    _run("pytest", "-q", "-p", "no:cacheprovider", __file__, interpret=True)


@pytest.mark.skipif(gpu.interpreting(), reason="starts the process that interprets")
def test_numbers_of_what_programs_have():
    _run("graphwright.testing.generated", "--first", "2", interpret=True)


@pytest.mark.slow
@pytest.mark.skipif(gpu.interpreting(), reason="compiles")
def test_machine_code():
    _run("graphwright.testing.generated", "--machine-code", "--first", "1", interpret=False)


@pytest.mark.soak
@pytest.mark.skipif(gpu.interpreting(), reason="compiles")
def test_machine_code_of_every_config():
    _run("graphwright.testing.generated", "--machine-code", interpret=False)


# -- text ------------------------------------------------------------------------------------------------------------


def test_the_text_of_a_kernel():
    source = made_of(region([(H, (5, 300)), (H, (300,))], [("mul.Tensor", [v(0), v(1)]), ("tanh.default", [v(2)])])).source
    assert source.text == f'''"""A generated kernel: tiles of rows and columns.

Reads and writes x0 float16, x1 float16, y0 float16.
Reference, in ATen's ops on float32:

    v2 = mul(v0, v1)
    v3 = tanh(v2)
    return v3
"""

import triton
import triton.language as tl

from graphwright.kernels.gpu.scalar import tanh


@triton.jit
def {source.name}(x0, x1, y0, rows, columns, x0_s0, y0_s0, ROWS: tl.constexpr, BLOCK: tl.constexpr, BIG: tl.constexpr):
    program = tl.program_id(0).to(tl.int64) if BIG else tl.program_id(0)
    across = tl.cdiv(columns, BLOCK)
    r = (program // across * ROWS + tl.arange(0, ROWS))[:, None]
    c = (program % across * BLOCK + tl.arange(0, BLOCK))[None, :]
    here = r < rows
    i0 = r
    inside = here & (c < columns)
    v1 = tl.load(x0 + i0 * x0_s0 + c, inside, other=0).to(tl.float32)
    v2 = tl.load(x1 + c, (c < columns), other=0).to(tl.float32)
    v3 = v1 * v2
    v4 = tanh(v3)
    tl.store(y0 + i0 * y0_s0 + c, v4, inside)
'''
    assert source.numbers == (5, 300, 300, 300)


def test_the_text_lies_in_a_file_that_is_mended():
    made = made_of(region([(4, 8)], [("neg.default", [v(0)]), ("exp.default", [v(1)])]))
    assert made.path.read_text() == made.source.text and made.path.stat().st_mode & 0o077 == 0 and made.path.parent.stat().st_mode & 0o077 == 0
    made.path.write_text("raise SystemExit")
    functions.cache_clear()
    assert made.path.read_text() == made.source.text


def test_equal_regions_of_other_sizes_share_a_kernel():
    def kernel(rows, columns):
        steps = [("add.Tensor", [v(0), v(1)]), ("layer_norm.default", [v(2), [columns], v(1), None, 1e-5, False])]
        return made_of(region([(H, (rows, columns)), (H, (columns,))], steps)).source

    assert kernel(5, 64).name == kernel(70, 64).name
    assert kernel(5, 64).numbers != kernel(70, 64).numbers
    assert kernel(5, 64).name != kernel(5, 80).name  # a mean divides by a constant


def test_sizes_past_two_to_the_31_are_64_bit_numbers():
    steps = [("mul.Tensor", [v(0), 2.0]), ("relu.default", [v(1)])]
    assert not made_of(region([(H, (2**20, 2**10))], steps)).source.big
    assert made_of(region([(H, (2**21, 2**10))], steps)).source.big


def test_every_formula_has_a_form_in_triton():
    """What the rows of ``formulas`` call, over operands of each kind, is known to Triton's dialect."""
    from graphwright.kernels.trees import Call, Term

    def texts(term):
        yield from ([term.text] if term.op == "call" else [])
        for a in term.args:
            yield from texts(a)

    met = set()
    for name, rule in ROWS.items():
        for family in "fbi":
            operands = dict.fromkeys(("self", "other", "end", "condition", "mask", "value", "input", "tensor1", "tensor2"), Term("read", family, text="0"))
            plain = {"dim": [-1], "exponent": 2, "negative_slope": 0.1, "alpha": 1, "scale": 1, "min": 0.0, "normalized_shape": [4], "eps": 1e-5, "value": 1.0, "threshold": 20.0, "weight": 0.3}
            operands |= {"other": 3} if name in ("remainder", "floor_divide") else {}
            try:
                found = rule(Call({**plain, **{k: t for k, t in operands.items() if k not in ("value", "weight") or name == "masked_fill"}}, family, 4))
            except (Unfit, KeyError):
                continue
            met.add(name)
            for text in texts(found):
                assert ast.parse(translated(text.format("v0", "v1", "v2", "v3")))
    assert met == set(ROWS), set(ROWS) - met


@pytest.mark.parametrize(("fragment", "why"), [
    (region([(4, 5)], [("sum.dim_IntList", [v(0), [1], True]), ("sum.dim_IntList", [v(0), [0], True])], 1, 2), "axes \\[1\\] and \\[0\\]"),
    (region([("float64", (4, 5))], [("neg.default", [v(0)]), ("neg.default", [v(1)])]), "float64"),
    (region([(0, 5)], [("neg.default", [v(0)]), ("neg.default", [v(1)])]), "no elements"),
    (region([(2, 8, 5, 5), (2, 8, 1, 1)], [("sigmoid.default", [v(1)]), ("mul.Tensor", [v(0), v(2)])]), "beside"),
])  # fmt: skip
def test_what_is_refused_and_why(fragment, why):
    with pytest.raises(Unfit, match=why):
        made_of(fragment)


def test_another_device_is_refused():
    made = made_of(region([(4, 8)], [("neg.default", [v(0)]), ("exp.default", [v(1)])]))
    wrong = torch.empty(4, 8, device="cpu")
    assert made.refuses(torch.empty(4, 8, device="meta")) is None
    assert gpu.interpreting() or "cpu" in str(made.refuses(wrong))


# -- numbers ---------------------------------------------------------------------------------------------------------

SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 88.5, 89.0, -104.0, 1e-37, 3e38, -3e38, 0.5, 20.0, -20.0])


@interpreted
@pytest.mark.parametrize("op", ["exp", "log", "relu", "sigmoid", "tanh", "abs", "neg", "sqrt", "rsqrt", "reciprocal", "square", "floor", "erf", "silu", "relu6", "hardsigmoid",
                                "ceil", "trunc", "round", "sign", "frac", "sin", "cos", "tan", "exp2", "expm1", "log1p", "log2", "softplus"])  # fmt: skip
def test_the_ends_of_the_range(op):
    fragment = region([(16,)], [(f"{op}.default", [v(0)]), ("mul.Tensor", [v(1), 1.0])])
    got, want = made_of(fragment)([SPECIAL])[0], FragmentModule(fragment)(SPECIAL)[0]
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-37, equal_nan=True)


@interpreted
def test_comparisons_and_choices_with_nan():
    steps = [("lt.Scalar", [v(0), 1.0]), ("logical_and.default", [v(2), v(1)]), ("where.self", [v(3), v(0), v(0)]), ("masked_fill.Scalar", [v(0), v(3), -math.inf]),
             ("maximum.default", [v(4), v(5)]), ("clamp.default", [v(6), -2.0, None]), ("ne.Tensor", [v(0), v(0)]), ("logical_or.default", [v(8), v(3)])]  # fmt: skip
    fragment = region([(16,), ("bool", (16,))], steps, 3, 5, 7, 8, 9)
    inputs = [SPECIAL, torch.arange(16) % 3 == 0]
    for got, want in zip(made_of(fragment)(inputs), FragmentModule(fragment)(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@interpreted
@pytest.mark.parametrize("long", [False, True])
def test_rows_without_a_finite_number(long):
    x = torch.randn(4, 33)
    x[0], x[1, 5], x[2, 7] = -math.inf, math.nan, math.inf
    fragment = region([(4, 33)], [("mul.Tensor", [v(0), 1.0]), ("softmax.int", [v(1), -1, None]), ("amax.default", [v(1), [-1], True])], 2, 3)
    made = made_of(fragment)
    config = small(fragment)[0] if long else made.family.configs[0]
    for got, want in zip(made.family.under(config, x), FragmentModule(fragment)(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7, equal_nan=True)


@interpreted
@pytest.mark.parametrize("columns", [1, 2, 17, 129, 1500])
@pytest.mark.parametrize("rows", [1, 5])
def test_rows_of_every_length(rows, columns):
    fragment = region([(H, (rows, columns)), (H, (columns,))],
                      [("add.Tensor", [v(0), v(1)], {"alpha": 0.5}), ("layer_norm.default", [v(2), [columns], v(1), None, 1e-5, False]),
                       ("gelu.default", [v(3)], {"approximate": "tanh"}), ("mean.dim", [v(4), [-1], True])], 2, 4, 5)  # fmt: skip
    assert check(fragment) is None
    assert check(fragment, small(fragment)[0]) is None


@interpreted
def test_operands_that_begin_inside_their_memory():
    fragment = region([(F, (6, 24), (24, 1))], [("slice.Tensor", [v(0), 1, 5, 17, 1]), ("slice.Tensor", [v(0), 1, 6, 18, 1]), ("mul.Tensor", [v(1), v(2)]), ("neg.default", [v(3)])])
    whole = torch.randn(7, 24)
    assert check(fragment, inputs=[whole[1:]]) is None


@interpreted
@settings(max_examples=20, deadline=None)
@given(fragments(("float32", "float32", "float16", "bfloat16", "bool", "int32")))
def test_any_region_computes_what_its_ops_compute(fragment):
    try:
        made_of(fragment)
    except Unfit as why:
        assert any(word in str(why) for word in ("axes", "spread", "beside", "float", "kind", "whole")), why
        return
    for config in (None, *small(fragment)):
        problem = check(fragment, config, slack=256.0)
        assert problem is None, (config, problem)
