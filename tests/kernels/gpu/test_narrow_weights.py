"""Weights of 8 and 4 bits as the Triton kernels read them: what packing remembers, and what is refused. Numbers are tested with the families."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from graphwright.kernels.gpu import families, weight_tiles
from graphwright.kernels.gpu.weight_tiles import pack, packed
from graphwright.ops.weight_only import pack as two_a_byte


def four_bits(out: int, width: int) -> Tensor:
    return two_a_byte(torch.randint(0, 16, (out, width), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("form", ["w4", "w8", "w4a8"])
@pytest.mark.parametrize("group", [32, 128, 300])
def test_every_number_lies_somewhere_once(form: str, group: int) -> None:
    """Packing only moves numbers (and pads): histograms of the numbers agree."""
    out, width = 48, 300
    weight = torch.randint(-128, 128, (out, width)).to(torch.int8) if form == "w8" else four_bits(out, width)
    made = pack(weight, torch.ones(out, -(-width // group)), None, group, form)
    raw = made.weight.contiguous().view(torch.uint8)
    if form == "w8":
        numbers, wanted, fill = raw.int() - 128, weight.int(), 0
    else:
        numbers = torch.stack((raw & 15, raw >> 4)).int()
        numbers = numbers if form == "w4" else (numbers + 8) % 16
        wanted, fill = torch.stack((weight & 15, weight >> 4)).int(), 0
    counts = torch.bincount(numbers.flatten() + 128, minlength=256)
    counts[fill + 128] -= numbers.numel() - wanted.numel()
    assert torch.equal(counts, torch.bincount(wanted.flatten() + 128, minlength=256))


def test_packing_is_remembered_until_something_changes() -> None:
    weight, scales, points = four_bits(16, 64), torch.ones(16, 2), torch.full((16, 2), 7.0)
    first = packed(weight, scales, points, 32, "w4")
    assert packed(weight, scales, points, 32, "w4") is first
    assert packed(weight, scales.clone(), points, 32, "w4") is not first
    again = packed(weight, scales, points, 32, "w4")
    scales.mul_(2)
    assert torch.equal(packed(weight, scales, points, 32, "w4").scales, again.scales * 2)
    weight.zero_()
    assert not packed(weight, scales, points, 32, "w4").weight.any()


def test_packing_is_forgotten_with_the_weight() -> None:
    weight, scales = four_bits(16, 64), torch.ones(16, 1)
    before = len(weight_tiles._KNOWN)
    packed(weight, scales, None, 64, "w4")
    assert len(weight_tiles._KNOWN) == before + 1
    del weight
    gc.collect()
    assert len(weight_tiles._KNOWN) == before


def test_zero_points_are_whole_numbers_and_what_is_left() -> None:
    weight, scales = four_bits(16, 64), torch.ones(16, 2)
    whole = pack(weight, scales, torch.full((16, 2), 5.0), 32, "w4")
    assert whole.whole is not None and whole.rest is None
    for value in (5.25, 1000.0, -1000.0):
        parts = pack(weight, scales, torch.full((16, 2), value), 32, "w4")
        assert parts.whole is not None and parts.rest is not None
        assert bool((parts.whole[0, :, :2].float() + parts.rest[0, :, :2] == value).all())


@pytest.mark.parametrize(("change", "reason"), [
    ({"group": 48, "scales": torch.ones(16, 3)}, "groups of 48"),
    ({"scales": torch.ones(16, 5)}, "scales have shape"),
    ({"x": torch.ones(2, 130)}, "do not belong together"),
    ({"x": torch.ones(2, 128, dtype=torch.float64)}, "float64"),
    ({"bias": torch.ones(16, dtype=torch.int32)}, "bias"),
    ({"activation": "swoosh"}, "swoosh"),
    ({"dtype": torch.int8}, "result of torch.int8"),
])  # fmt: skip
def test_refusals_name_the_limit(change: dict[str, Any], reason: str) -> None:
    given: dict[str, Any] = {"x": torch.ones(2, 128), "weight": four_bits(16, 128), "scales": torch.ones(16, 4), "zero_points": None, "bias": None,
                             "other": None, "activation": "none", "scalars": (), "group": 32, "dtype": None}  # fmt: skip
    supports = families()["linear_w4"].supports
    assert supports(*given.values()) is None
    assert reason in str(supports(*(given | change).values()))


def test_rows_whose_sums_could_overflow_are_refused() -> None:
    width = 131200
    x, steps, weight = (torch.empty(*shape, dtype=dtype, device="meta") for shape, dtype in (
        ((1, width), torch.int8), ((1, 1), torch.float32), ((16, width // 2), torch.uint8)))  # fmt: skip
    supports = families()["linear_w4a8"].supports
    assert "131072" in str(supports(x, steps, weight, torch.ones(16, 1), None, None, None, "none", (), width, None))
    assert supports(x, steps, weight, torch.ones(16, width // 64), None, None, None, "none", (), 64, None) is None
