"""Every kernel against its op's reference in float64, on all of its samples, with one thread and with two."""

from __future__ import annotations

from typing import Any

import pytest

from graphwright import kernels, ops
from graphwright.kernel import Kernel, Sample
from graphwright.testing import check_kernel

CPU = [(k, s) for found in kernels.load().values() for k in found if k.device == "cpu" for s in k.samples()]


def _name(pair: Any) -> str:
    return f"{pair[0].op.removeprefix('graphwright.')}: {pair[1].name}" if isinstance(pair, tuple) else f"{pair} threads"


def test_there_are_kernels_for_every_lowered_op() -> None:
    served = {k.op for k, _ in CPU}
    rows = {row.name for row in ops.rows() if row.reference.__module__ == "graphwright.ops.lowered"}
    assert rows <= served and {"graphwright.quantize", "graphwright.dequantize"} <= served


# The large samples are there for the clock, and need their two threads; the odd ones are small enough for both.
@pytest.mark.parametrize(("pair", "threads"), [(p, t) for p in CPU for t in ((2,) if p[1].bench else (1, 2))], ids=_name)
def test_kernel_against_reference(pair: tuple[Kernel, Sample], threads: int) -> None:
    kernel, sample = pair
    assert check_kernel(kernel, samples=[sample], threads=(threads,)) == 1
