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
    assert _same_sizes(program, value, same)
    assert not any(_same_sizes(program, value, other) for other in (longer, narrow, 3))


def test_what_torch_cannot_tell_is_tried_on_the_sizes_that_are_covered():
    """Padding to windows of four that is taken off again; and rounding down, which differs for odd sizes."""
    program = capture(Rows(), (torch.randn(8, 4),), {}, dynamic={"x": {0: "rows"}}).program
    value = program.placeholders[0].meta["val"]
    size = value.shape[0]
    with program.fake_mode:
        padded = torch.empty(size + (-size % 4) - (-size % 4 + 4) % 4, 4)  # what is added is taken away again
        rounded = torch.empty(size // 2 * 2, 4)
    assert _same_sizes(program, value, padded)
    assert not _same_sizes(program, value, rounded)  # 3 rows
