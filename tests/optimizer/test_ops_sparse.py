"""The storage of weights without their zeros: there and back, and what is refused, by name of the place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphwright.errors import GraphwrightError
from graphwright.ops.sparse import by_column, compress, expand, from_blocks, places_of, to_blocks


def _two_of_four(rows: int, columns: int, kept: int = 2) -> Tensor:
    g = torch.Generator().manual_seed(rows)
    keep = torch.rand(rows, columns // 4, 4, generator=g).argsort(-1) < kept
    return torch.randn(rows, columns, generator=g) * keep.flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_compressing_loses_nothing(dtype: torch.dtype, kept: int) -> None:
    weight = (_two_of_four(7, 40, kept) * 20).to(dtype)
    values, indices = compress(weight)
    assert (values.shape, values.dtype, indices.shape, indices.dtype) == ((7, 20), dtype, (7, 5), torch.uint8)
    assert torch.equal(expand(values, indices), weight)


def test_format_of_two_of_four() -> None:
    values, indices = compress(torch.tensor([[0.0, 5, 0, 6, 0, 0, 7, 0]]))
    assert values.tolist() == [[5, 6, 0, 7]]
    assert places_of(indices).tolist() == [[1, 3, 0, 2]] and indices.tolist() == [[1 | 3 << 2 | 0 << 4 | 2 << 6]]


def test_a_broken_pattern_is_named() -> None:
    weight = _two_of_four(4, 16)
    weight[2, 8:12] = torch.tensor([1.0, float("nan"), 0.0, 2.0])
    weight[3] = 1
    with pytest.raises(GraphwrightError, match=r"row 2 has 3 numbers other than zero in columns 8 to 11"):
        compress(weight)
    with pytest.raises(GraphwrightError, match="multiple of 8"):
        compress(weight[:, :12])


def test_broken_places_are_named() -> None:
    values, indices = compress(_two_of_four(3, 16))
    indices[1, 1] = 0b11_10_01_01
    with pytest.raises(GraphwrightError, match=r"row 1 has places \[1, 1\] for columns 8 to 11"):
        expand(values, indices)
    with pytest.raises(GraphwrightError, match="do not belong together"):
        expand(values, indices[:, :1])


@pytest.mark.parametrize("side", [16, 32, 64])
def test_blocks_there_and_back(side: int) -> None:
    g = torch.Generator().manual_seed(side)
    mask = torch.rand(3, 4, generator=g) < 0.5
    mask[1] = False
    weight = torch.randn(3 * side, 4 * side, generator=g) * mask.repeat_interleave(side, 0).repeat_interleave(side, 1)
    values, columns, starts = to_blocks(weight, side)
    assert len(values) == int(mask.sum()) and starts[1] == starts[2]
    assert torch.equal(from_blocks(values, columns, starts, 4 * side), weight)
    every = to_blocks(weight, side, torch.ones(3, 4, dtype=torch.bool))
    assert len(every[0]) == 12 and torch.equal(from_blocks(*every, 4 * side), weight)
    order, rows, begins = by_column(columns, starts, 4)
    turned = to_blocks(weight.t().contiguous(), side)
    assert torch.equal(values[order.long()].transpose(1, 2), turned[0]) and torch.equal(rows, turned[1]) and torch.equal(begins, turned[2])


def test_blocks_that_do_not_fit_are_named() -> None:
    weight = torch.ones(32, 64)
    with pytest.raises(GraphwrightError, match="blocks of 48x48"):
        to_blocks(weight, 48)
    with pytest.raises(GraphwrightError, match="32, 60"):
        to_blocks(weight[:, :60], 16)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 2] = False
    with pytest.raises(GraphwrightError, match="rows 16 and columns 32"):
        to_blocks(weight, 16, mask)
    with pytest.raises(GraphwrightError, match="one entry per block"):
        to_blocks(weight, 16, mask[:1])


@pytest.mark.parametrize(("part", "place", "value", "said"), [
    (1, 3, 9, "block 3, in row 0, claims column 9"), (1, 1, 0, "block 1, in row 0, claims column 0"), (2, 1, 9, r"starts\[1\] is 9"), (2, 0, 1, r"starts\[0\] is 1"),
])  # fmt: skip
def test_broken_blocks_are_named(part: int, place: int, value: int, said: str) -> None:
    parts = to_blocks(torch.ones(32, 64), 16)
    parts[part][place] = value
    with pytest.raises(GraphwrightError, match=said):
        from_blocks(*parts, 64)
