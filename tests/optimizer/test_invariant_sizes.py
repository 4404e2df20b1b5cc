"""Sizes that are spelled in two ways and known to be equal are no broken invariant; others are."""

import torch

from graphwright.capture import capture
from graphwright.invariants import _same_sizes


class Rows(torch.nn.Module):
    def forward(self, x):
        return x * 2


def test_equal_sizes_by_another_name():
    program = capture(Rows(), (torch.randn(3, 4),), {}, dynamic={"x": {0: "rows"}}).program
    value = program.placeholders[0].meta["val"]
    size = value.shape[0]
    with program.fake_mode:
        longer, same, narrow = torch.empty(size + 1, 4), torch.empty(2 * size - size, 4), torch.empty(size, 4, dtype=torch.float64)
    assert _same_sizes(value, same) and not _same_sizes(value, longer) and not _same_sizes(value, narrow) and not _same_sizes(value, 3)
