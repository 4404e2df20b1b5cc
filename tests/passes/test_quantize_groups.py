"""Weights in 8 and 4 bits by groups: numbers, what stands in the IR, what is stored how, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphwright.errors import RecipeError, SiteError
from graphwright.numerics import sqnr_db
from graphwright.ops.weight_only import by_group, pack, unpack
from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.fuse_epilogue import FuseEpilogue
from graphwright.passes.quantize import Quantize
from graphwright.passes.quantize_weights import mean_error, quantize_groups

START = (Canonicalize(), FuseEpilogue())


def four(**options: Any) -> Quantize:
    return Quantize(**{"mode": "weight-only", "bits": 4, **options})


# -- numbers ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 70), st.sampled_from([1, 3, 8, 32, 1000]), st.sampled_from([8, 4]), st.booleans(),
       st.floats(-20, 20), st.floats(-3, 3))  # fmt: skip
def test_rounding_stays_within_half_a_step(seed: int, out: int, half: int, group: int, bits: int, symmetric: bool, exponent: float, shift: float) -> None:
    w = (torch.randn(out, 2 * half, generator=torch.Generator().manual_seed(seed)) + shift) * 10.0**exponent
    q = quantize_groups(w, bits, group, symmetric)
    assert q.scales.shape == (out, -(-2 * half // min(group, 2 * half))) and (q.zero_points is None) == symmetric
    assert q.values.shape == ((out, half) if bits == 4 else w.shape)
    numbers = unpack(q.values) if bits == 4 else q.values
    if symmetric:
        assert int(numbers.min()) >= (1 if bits == 4 else -127), "the middle is the middle"
    else:
        assert q.zero_points is not None and q.zero_points.dtype == q.values.dtype
    # the zero point is rounded as well: at the ends of a group half a step may be added
    steps = by_group(q.scales, group, 2 * half) * (0.501 if symmetric else 1.002)
    assert bool(((q.real() - w).abs() <= steps).all())


def test_more_groups_and_zero_points_err_less() -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 256) * torch.rand(64, 256).exp() + 0.3

    def error(bits: int, group: int, symmetric: bool) -> float:
        return sqnr_db(w, quantize_groups(w, bits, group, symmetric).real())

    assert error(4, 32, False) > error(4, 128, False) + 1 > error(4, 256, False) + 1.5
    assert error(4, 64, False) > error(4, 64, True) + 1
    assert error(8, 64, False) > error(4, 64, False) + 22 and error(4, 128, False) > 18


def test_zeros_tiny_and_huge_groups_stay_finite() -> None:
    top = torch.finfo(torch.float32).max / 2
    w = torch.stack([torch.zeros(8), torch.full((8,), 1e-42), torch.tensor([top, -top] * 4), torch.full((8,), 3.0), torch.full((8,), -2.0)])
    for bits in (8, 4):
        for symmetric in (True, False):
            q = quantize_groups(w, bits, 4, symmetric)
            assert bool(torch.isfinite(q.scales).all()) and bool((q.scales > 0).all())
            assert torch.allclose(q.real()[[0, 1, 3, 4]], w[[0, 1, 3, 4]], atol=1e-30), "a group of one number is exact"
            assert bool(((q.real()[2] / w[2] - 1).abs() < 0.1).all())


def test_packing_and_unpacking_are_inverse() -> None:
    numbers = torch.randint(0, 16, (3, 5, 8), dtype=torch.uint8)
    assert torch.equal(unpack(pack(numbers)), numbers) and pack(numbers).shape == (3, 5, 4)
    assert pack(torch.tensor([[1, 2]])).item() == 0x21, "the lower half is the even one"
    bytes_ = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    assert torch.equal(pack(unpack(bytes_)), bytes_)


def test_large_weights_are_rounded_in_parts_alike() -> None:
    torch.manual_seed(0)
    w = torch.randn(40, 9000)  # more than is looked at together
    whole, parts = quantize_groups(w, 4, 64, False), [quantize_groups(row[None], 4, 64, False) for row in w]
    assert torch.equal(whole.values, torch.cat([p.values for p in parts])) and torch.equal(whole.scales, torch.cat([p.scales for p in parts]))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_mean_error_is_what_a_linear_shows(bits: int) -> None:
    torch.manual_seed(0)
    w, x = torch.randn(7, 50), torch.rand(100, 50)
    q = quantize_groups(w, bits, 16, False)
    shown = (x @ q.real().T - x @ w.T).double().mean(0)
    assert torch.allclose(mean_error(w, q, x.double().mean(0), 1), shown, atol=1e-5)


# -- the program -----------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A look-up, a convolution, linears that are wide, odd, and tied to the look-up."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(50, 64), nn.Conv1d(64, 64, 1)
        self.up, self.odd, self.down = nn.Linear(64, 33), nn.Linear(33, 128), nn.Linear(128, 64)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
        return F.linear(self.down(F.gelu(self.odd(self.up(h)))), self.table.weight)


IDS = torch.arange(12).reshape(2, 6)


def test_golden_four_bits(captured: Any, run: Any, body: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 3), nn.GELU(), nn.Linear(3, 2))
    after, _ = run(captured(model, torch.randn(2, 64)), *START, four(group=32))
    text = body(after)
    assert "f32[3, 64] = graphwright.dequantize_packed(_0_weight_int4, _0_weight_scale, _0_weight_zero_point, 32, torch.float32)  # 0, 1" in text
    assert "f32[2, 3] = graphwright.dequantize_channel(_2_weight_int8, _2_weight_scale, None, 0, torch.float32)  # 2" in text
    tensors = after.tensors()
    assert tensors["0.weight_int4"].dtype == tensors["0.weight_zero_point"].dtype == torch.uint8
    assert tensors["0.weight_int4"].shape == (3, 32) and tensors["0.weight_scale"].shape == (3, 2) == tensors["0.weight_zero_point"].shape
    assert "0.weight" in after.provenance["0.weight_int4"] and "0.weight" not in tensors


def test_golden_eight_bits_by_groups(captured: Any, run: Any, body: Any) -> None:
    after, result = run(captured(nn.Linear(64, 3), torch.randn(2, 64)), *START, Quantize(mode="weight-only", group=16, symmetric=False))
    assert "graphwright.dequantize_channel(weight_int8, weight_scale, weight_zero_point, 0, torch.float32)" in body(after)
    assert after.tensors()["weight_scale"].shape == (3, 4) and after.tensors()["weight_zero_point"].dtype == torch.int8
    assert "weight 3x64 as int8, a scale and a zero point per 16 inputs, SQNR" in result.changes[0][1]


def test_every_weight_is_accounted_for(captured: Any, run: Any) -> None:
    program = captured(Mixed(), IDS)
    after, result = run(program, *START, four(group=32, embeddings=True))
    said = dict(result.changes)
    assert len(said) == 6 and not result.refusals
    assert "64x128 as int4, a scale and a zero point per 32 inputs, SQNR" in said["down"]
    assert "128x33 as int8, a scale per channel (4-bit numbers go in pairs, and it has 33 inputs)" in said["odd"]
    assert "as int8, a scale per channel (groups are for linears)" in said["conv"]
    assert "50x64 as int8, a scale per channel" in said["table"] and "(" not in said["table"]
    assert "50x64 as int8, a scale per channel (a look-up reads it too)" in said["linear"]
    assert not any(t.dtype == torch.float32 and t.numel() > 300 for t in after.tensors().values()), "one copy of each, in integers"
    assert 12 < sqnr_db(program(IDS)[0], after(IDS)[0]) < 40


def test_tables_in_four_bits_where_asked(captured: Any, run: Any) -> None:
    program = captured(Mixed(), IDS)
    after, result = run(program, *START, four(group=32, embeddings=True, embedding_bits=4))
    said = dict(result.changes)
    assert all("50x64 as int4" in said[site] for site in ("table", "linear"))
    assert after.tensors()["table.weight_int4"].shape == (50, 32)
    assert sqnr_db(program(IDS)[0], after(IDS)[0]) > 10
    alone, result = run(program, *START, four(group=32))
    assert alone.tensors()["table.weight"].dtype == torch.float32 and "the float weight stays for table" in dict(result.changes)["linear"]


def test_four_bits_are_an_eighth(captured: Any, run: Any) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(3)))
    program = captured(model, torch.randn(2, 256))
    sizes = {group: run(program, *START, four(group=group, symmetric=symmetric))[0].size_bytes() / program.size_bytes()
             for group, symmetric in ((128, True), (64, False))}  # fmt: skip
    assert sizes[128] == (1 / 2 + 4 / 128) / 4 and sizes[64] == (1 / 2 + 5 / 64) / 4


def test_bias_is_corrected_where_there_are_data(captured: Any, run: Any) -> None:
    x = torch.rand(64, 128) + 1
    program = captured(nn.Linear(128, 16), x)
    program.calibration = [(x,)]
    after, result = run(program, *START, four(group=64))
    assert "bias corrected" in result.changes[0][1]
    assert float((after(x)[0] - program(x)[0]).detach().mean(0).abs().max()) < 1e-5


def test_rows_of_int8_by_four_bits(captured: Any, run: Any, body: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 5))
    program = captured(model, torch.randn(6, 64))
    after, result = run(program, *START, Quantize(mode="dynamic", bits=4, group=32))
    said = dict(result.changes)
    assert "64 as int4, a scale and a zero point per 32 inputs, input as int8, a scale per row at run time, SQNR" in said["0"]
    text = body(after)
    assert text.count("quantize_dynamic(") == 4 and text.count("True, True, -128, 127, torch.int8") == 2 and text.count("dequantize_packed(") == 2
    x = torch.randn(6, 64)
    assert sqnr_db(program(x)[0], after(x)[0]) > 12


def test_halves_stay_halves(captured: Any, run: Any) -> None:
    x = torch.randn(3, 64)
    program = captured(nn.Linear(64, 8).bfloat16(), x.bfloat16())
    after, _ = run(program, *START, four(group=32))
    assert after(x.bfloat16())[0].dtype == torch.bfloat16 and sqnr_db(program(x.bfloat16())[0].float(), after(x.bfloat16())[0].float()) > 14


def test_include_exclude_and_second_run(captured: Any, run: Any) -> None:
    program = captured(Mixed(), IDS)
    after, result = run(program, *START, four(group=32, include=("down",)), Quantize(mode="weight-only", group=16, exclude=("down",)))
    assert {k for k in after.tensors() if "_int" in k} == {"conv.weight_int8", "up.weight_int8", "odd.weight_int8", "down.weight_int4", "table.weight_int8"}
    assert after.tensors()["up.weight_scale"].shape == (33, 4)
    assert any(site == "down" and why == "left out by include / exclude" for site, why in result.refusals)
    again, result = run(after, four(group=32))
    assert again.text() == after.text() and {why for _, why in result.refusals} == {"its weight is quantized already"}
    with pytest.raises(SiteError, match="matches no site"):
        run(program, four(exclude=("dwon",)))


def test_eight_bits_without_whole_groups_have_a_scale_per_channel(captured: Any, run: Any) -> None:
    model = nn.Sequential(nn.Linear(48, 40), nn.Linear(40, 8))
    after, result = run(captured(model, torch.randn(2, 48)), *START, Quantize(mode="weight-only", group=48))
    assert all("as int8, a scale per channel, SQNR" in said for _, said in result.changes)
    after, result = run(captured(model, torch.randn(2, 48)), *START, Quantize(mode="weight-only", group=16))
    assert "a scale per 16 inputs" in dict(result.changes)["0"] and "(its 40 inputs are no multiple of 16)" in dict(result.changes)["1"]
    assert after.tensors()["1.weight_scale"].shape == (8,)


@pytest.mark.parametrize(("options", "told"), [
    ({"bits": 4}, "no product takes 4 bits"), ({"group": 64}, "or groups with inputs under one scale"), ({"mode": "dynamic", "group": 64}, "groups of 8 bits are for weights alone"),
    ({"mode": "weight-only", "bits": 3}, "bits=3.*there are 8, 4"), ({"mode": "weight-only", "group": 0}, "group=0"),
    ({"mode": "weight-only", "group": 64.0}, "group=64.0"), ({"mode": "weight-only", "symmetric": False}, "belong to groups"),
    ({"mode": "weight-only", "bits": 4, "per_channel": False}, "groups are finer"), ({"mode": "weight-only", "bits": 4, "embedding_bits": 4}, "embeddings=True"),
    ({"mode": "weight-only", "bits": 8, "group": 64, "embeddings": True, "embedding_bits": 4}, "bits=4"),
])  # fmt: skip
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        Quantize(**options)
