"""Kernels whose weight has scales by groups: any shapes, groups and strides; what odd numbers do; refusals."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.kernels import linear_w4, linear_w4a8, linear_w8_groups
from graphwright.kernels.vnni import unfit
from graphwright.ops import weight_only

pytestmark = pytest.mark.skipif(unfit() is not None, reason=str(unfit()))
KINDS = {"linear_w4": linear_w4, "linear_w4a8": linear_w4a8, "linear_w8_groups": linear_w8_groups}


def arguments(kind: str, g: torch.Generator, rows: int, width: int, out: int, group: int, points: bool = True, stride: int = 1) -> list[Any]:
    """Of a linear; ``x`` has gaps between its rows, or between its columns where the stride is not 1."""
    groups = -(-width // group)
    scales = torch.rand(out, groups, generator=g) + 0.1
    if kind == "linear_w8_groups":
        weight = torch.randint(-128, 128, (out, width), generator=g).to(torch.int8)
        zero = torch.randint(-128, 128, (out, groups), generator=g).to(torch.int8)
    else:
        weight = torch.randint(0, 256, (out, width // 2), generator=g, dtype=torch.uint8)
        zero = torch.randint(0, 16, (out, groups), generator=g, dtype=torch.uint8)
    x = torch.randn(rows, width * stride + 5, generator=g)
    whole = [(x * 40).clamp(-128, 127).to(torch.int8), torch.rand(rows, 1, generator=g)] if kind == "linear_w4a8" else [x]
    whole[0] = whole[0][:, 3 : 3 + width * stride : stride]
    return [*whole, weight, scales, zero if points else None, torch.randn(out, generator=g), torch.randn(rows, out, generator=g), "relu", (), group, None]


def agrees(kind: str, args: list[Any]) -> None:
    module = KINDS[kind]
    assert module.supports(*args) is None
    double = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    got, want, plain = module.run(*args), getattr(weight_only, kind)(*double), getattr(weight_only, kind)(*args)
    assert got.shape == want.shape and got.dtype == torch.float32
    limit = 2 * (plain.double() - want).square().mean().sqrt() + 1e-6 * want.square().mean().sqrt()
    assert (got.double() - want).square().mean().sqrt() <= limit


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 90), st.integers(1, 90), st.sampled_from([8, 16, 32, 64, 128, 5000]), st.booleans(), st.integers(1, 2))
def test_any_shape_group_and_stride(kind: str, seed: int, rows: int, half: int, out: int, group: int, points: bool, stride: int) -> None:
    agrees(kind, arguments(kind, torch.Generator().manual_seed(seed), rows, 2 * half, out, group, points, stride))


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_rows_and_threads(kind: str) -> None:
    args = arguments(kind, torch.Generator().manual_seed(0), 1, 256, 200, 64)
    args[0] = args[0].expand(50, 256)
    if kind == "linear_w4a8":
        args[1] = args[1].expand(50, 1)
    args[-5] = args[-5].expand(50, 200)
    agrees(kind, args)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = KINDS[kind].run(*args)
        torch.set_num_threads(2)
        assert torch.equal(one, KINDS[kind].run(*args)), "each sum is one thread's"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["linear_w4", "linear_w8_groups"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(kind: str, bad: float) -> None:
    args = arguments(kind, torch.Generator().manual_seed(0), 7, 64, 33, 32)
    args[-4] = "none"
    whole = KINDS[kind].run(*args)
    args[0] = args[0].clone()
    args[0][3, 40] = bad
    got = KINDS[kind].run(*args)
    others = [k for k in range(7) if k != 3]
    assert torch.equal(got[others], whole[others]) and not torch.isfinite(got[3]).any()


REFUSED: dict[str, tuple[dict[int, Any], str | None]] = {  # arguments counted from the end: -1 dtype, -2 group, -8 scales, -9 weight
    "group of 12": ({-2: 12, -8: torch.ones(5, 8)}, "groups of 12 inputs; multiples of 8 up to 512"),
    "group of 1024": ({-2: 1024, -8: torch.ones(5, 1)}, None),
    "no group": ({-2: 0}, "groups of 0 inputs"),
    "scales": ({-8: torch.ones(5, 2)}, r"scales have shape \(5, 2\); wanted \(5, 3\)"),
    "weight": ({-9: torch.ones(5, 48)}, "the weight torch.float32"),
    "dtype": ({-1: torch.int8}, "the result torch.int8"),
    "activation": ({-4: "softplus"}, "'softplus' is not fused"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_refusals_name_the_limit(kind: str, case: str) -> None:
    changed, told = REFUSED[case]
    args = arguments(kind, torch.Generator().manual_seed(0), 2, 96, 5, 32, points=False)
    for k, value in changed.items():
        args[k] = value
    said = KINDS[kind].supports(*args)
    assert said is None if told is None else said is not None and re.search(told, said), said
