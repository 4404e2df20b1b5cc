"""What a plan for int8 products does beside the product: sums of the weight's rows, padding, refusals. Nothing runs here."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from graphwright.kernels.gpu import int8_parts, linear_int8, linear_int8_few
from graphwright.kernels.gpu.launch import Launch


def arguments(x: Tensor, weight: Tensor, zero_point: int = 5) -> tuple[object, ...]:
    scales = torch.ones(weight.shape[0], device=weight.device)
    return x, 0.1, zero_point, weight, scales, None, None, "none", (), 1.0, 0, 0, 0, None, None, None


def launches(*args: object) -> list[str]:
    config = linear_int8.CONFIGS[-1]
    return [launch.fn.__name__ for launch in linear_int8.plan(*args, config=config).launches]


def test_known_sums_save_a_launch_until_the_weight_changes() -> None:
    x, weight = torch.zeros(4, 32, dtype=torch.int8), torch.ones(16, 32, dtype=torch.int8)
    args = arguments(x, weight)
    both, one = ["column_sums_kernel", "linear_int8_kernel"], ["linear_int8_kernel"]
    assert launches(*args) == both
    assert torch.equal(int8_parts.prepare(weight), torch.full((16,), 32, dtype=torch.int32))
    assert launches(*args) == one
    assert launches(*arguments(x, weight.clone())) == both, "another tensor's sums"
    weight[0, 0] = 7
    assert launches(*args) == both, "the sums are those of the weight as it was"
    key = id(weight)
    int8_parts.prepare(weight)
    del args, weight
    gc.collect()
    assert key not in int8_parts._ahead


def test_numbers_without_zero_points_need_no_sums() -> None:
    x, weight = torch.zeros(4, 32, dtype=torch.int8), torch.ones(16, 32, dtype=torch.int8)
    assert launches(*arguments(x, weight, zero_point=0)) == ["linear_int8_kernel"]
    assert launches(*arguments(x.view(torch.uint8), weight, zero_point=0)) == ["column_sums_kernel", "linear_int8_kernel"], "uint8 is shifted by 128"
    assert launches(*arguments(x.float(), weight)) == ["round_rows_kernel", "column_sums_kernel", "linear_int8_kernel"]


def test_rows_begin_and_end_at_multiples_of_16_bytes() -> None:
    for width, step in ((32, 32), (33, 33), (32, 40), (7, 7)):
        x, weight = (torch.zeros(n, step, dtype=torch.int8)[:, :width] for n in (4, 16))
        launch: Launch = linear_int8.plan(*arguments(x, weight), config=linear_int8.CONFIGS[-1]).launches[-1]
        for held in launch.args[:2]:
            assert held.stride(0) % 16 == 0 and held.shape[1] % 16 == 0 and held.data_ptr() % 16 == 0
        assert launch.args[0].shape[1] == launch.args[1].shape[1] == -(-width // 16) * 16


def test_refusals_name_the_limit() -> None:
    weight = torch.ones(16, 32, dtype=torch.int8, device="meta")

    def meta(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    assert linear_int8_few.supports(*arguments(meta(256, 32), weight)) is None
    assert "up to 256" in str(linear_int8_few.supports(*arguments(meta(257, 32), weight)))
    assert "do not belong together" in str(linear_int8.supports(*arguments(meta(4, 31), weight)))
    assert "wanted int8, uint8" in str(linear_int8.supports(*arguments(meta(4, 32, dtype=torch.int32), weight)))
    wide = torch.ones(16, 40000, dtype=torch.int8, device="meta")
    assert "more where x is quantized ahead" in str(linear_int8.supports(*arguments(meta(4, 40000, dtype=torch.float16), wide)))
    assert linear_int8.supports(*arguments(meta(4, 40000), wide)) is None
