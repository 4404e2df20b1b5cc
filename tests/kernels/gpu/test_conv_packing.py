"""What the Triton convolutions read: weights with narrow groups side by side, sums as digits, packed once while nobody writes them."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from graphwright.kernels.gpu import conv_parts
from graphwright.kernels.gpu.prepared import once


def _weight(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)


@pytest.mark.parametrize(("groups", "channels", "out", "wanted"), [(1, 3, 8, 1), (2, 64, 64, 1), (32, 4, 4, 8), (6, 4, 6, 6), (7, 1, 1, 7), (33, 1, 2, 33)])
def test_narrow_groups_are_merged(groups: int, channels: int, out: int, wanted: int) -> None:
    assert conv_parts.merged(groups, channels, out) == wanted


@pytest.mark.parametrize(("groups", "channels", "out"), [(1, 5, 7), (32, 4, 4), (6, 4, 6), (4, 40, 33)])
def test_a_packed_weight_is_the_same_convolution(groups: int, channels: int, out: int) -> None:
    weight = _weight(groups * out, channels, 3, 2)
    packed = conv_parts.pack(weight, torch.ones(1), None, groups)
    x = torch.randint(-128, 128, (2, groups * channels, 5, 4)).double()
    rows = packed.weight[:, : 6 * packed.channels].reshape(-1, 3, 2, packed.channels).permute(0, 3, 1, 2)
    assert not packed.weight[:, 6 * packed.channels :].any() and packed.weight.shape[1] % conv_parts.PITCH == 0
    assert torch.equal(F.conv2d(x, rows.double(), groups=packed.groups), F.conv2d(x, weight.double(), groups=groups))
    assert torch.equal(packed.sums, weight.sum((1, 2, 3), dtype=torch.int32))
    digits = packed.digits.long()
    taps = (digits[0] * 256 + digits[1]) * 256 + digits[2]
    assert torch.equal(taps[:, :6], weight.long().sum(1).flatten(1)) and not taps[:, 6:].any()


def test_digits_of_large_sums() -> None:
    x = torch.tensor([[0, 1, -1, 127, 128, -128, -129, 32767, 32896, -32897, 8322945, -8323072]], dtype=torch.int32)
    digits = conv_parts._digits(x).long()
    assert torch.equal((digits[0] * 256 + digits[1]) * 256 + digits[2], x.long())


def test_a_weight_is_packed_once_until_it_is_written() -> None:
    made: list[int] = []

    def pack(weight: Tensor, scales: Tensor | None, factor: int) -> Tensor:
        made.append(factor)
        return weight.clone() * factor

    weight, scales = torch.ones(3), torch.ones(3)
    first = once(pack, weight, scales, options=(2,))
    assert once(pack, weight, scales, options=(2,)) is first and made == [2]
    assert once(pack, weight, None, options=(2,)) is not first and once(pack, weight, scales, options=(3,))[0] == 3
    weight.add_(1)
    assert once(pack, weight, scales, options=(2,))[0] == 4
    scales.add_(1)
    once(pack, weight, scales, options=(2,))
    assert made == [2, 2, 3, 2, 2]


def test_nothing_is_remembered_of_a_weight_that_is_gone_or_that_nobody_watches() -> None:
    from graphwright.kernels.gpu import prepared

    before = len(prepared._made)
    weight = torch.ones(3)
    once(torch.clone, weight)
    assert len(prepared._made) == before + 1
    del weight
    gc.collect()
    assert len(prepared._made) == before
    with torch.inference_mode():
        silent = torch.ones(2)
        assert once(torch.clone, silent) is not once(torch.clone, silent)
    once(torch.clone, torch.ones(2, device="meta"))
    assert len(prepared._made) == before
