"""What a plan for int8 products does beside the product: sums of the weight's rows, padding, refusals. Nothing runs here."""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.kernels.gpu import linear_int8, linear_int8_few
from graphwright.kernels.gpu.launch import Launch


def arguments(x: Tensor, weight: Tensor, zero_point: int = 5) -> tuple[object, ...]:
    scales = torch.ones(weight.shape[0], device=weight.device)
    return x, 0.1, zero_point, weight, scales, None, None, "none", (), 1.0, 0, 0, 0, None, None, None


def launches(*args: object) -> list[str]:
    config = linear_int8.CONFIGS[-1]
    return [launch.fn.__name__ for launch in linear_int8.plan(*args, config=config).launches]


def test_the_sums_of_a_weight_are_added_up_once_and_again_when_it_changes() -> None:
    x, weight = torch.zeros(4, 32, dtype=torch.int8), torch.ones(16, 32, dtype=torch.int8)

    def sums(zero_point: int = 5, x: Tensor = x) -> Tensor | None:
        launch = linear_int8.plan(*arguments(x, weight, zero_point), config=linear_int8.CONFIGS[-1]).launches[-1]
        return launch.args[launch.fn.arg_names.index("sums")]

    first = sums()
    assert first is not None and torch.equal(first, torch.full((16,), 32, dtype=torch.int32))
    assert sums() is first
    weight[0, 0] = 7
    again = sums()
    assert again is not None and again[0] == 38
    assert sums(zero_point=0) is None, "without a zero point they are not needed"
    assert sums(zero_point=0, x=x.view(torch.uint8)) is again, "uint8 is shifted by 128"
    assert launches(*arguments(x.float(), weight)) == ["round_rows_kernel", "linear_int8_kernel"]


def test_rows_begin_and_end_at_multiples_of_16_bytes() -> None:
    for width, step in ((32, 32), (33, 33), (32, 40), (7, 7)):
        x, weight = (torch.zeros(n, step, dtype=torch.int8)[:, :width] for n in (4, 16))
        plans = [linear_int8.plan(*arguments(x, weight), config=linear_int8.CONFIGS[-1]) for _ in range(2)]
        assert plans[0].launches[-1].args[1] is plans[1].launches[-1].args[1], "the weight is copied once"
        launch: Launch = plans[0].launches[-1]
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
