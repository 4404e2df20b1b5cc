"""The op table's registry: what may be added, what is missing, look-up."""

from __future__ import annotations

import pytest
import torch

from graphwright import ops
from graphwright.errors import InternalError
from graphwright.ops import registry


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older versions may lack some")
def test_no_row_names_an_op_that_does_not_exist() -> None:
    assert registry.missing() == ()


def test_a_row_may_not_stand_twice_and_own_ops_must_not_collide() -> None:
    with pytest.raises(InternalError, match="two rows"):
        ops.op("aten.linear")(lambda *a: None)
    before = registry.missing()
    ops.op("aten.no_such_op_at_all")(lambda *a: None)
    assert set(registry.missing()) - set(before) == {"aten.no_such_op_at_all.default"}
    registry._MISSING.remove("aten.no_such_op_at_all.default")


def test_look_up() -> None:
    assert ops.resolve("aten.add.Tensor") is torch.ops.aten.add.Tensor
    assert ops.resolve("graphwright.quantize") is torch.ops.graphwright.quantize.default
    assert ops.resolve("aten.nothing") is None and ops.row(len) is None
    found = ops.row(torch.ops.aten.linear.default)
    assert found is not None and found.summary.startswith("Linear")
    assert all(r.summary and not r.summary.startswith("lambda") for r in ops.rows())
