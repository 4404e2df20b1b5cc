"""Bytes and arithmetic of nodes, sites and programs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphwright import cost
from graphwright.capture import capture
from graphwright.cost import Cost
from graphwright.ir import Program, op_name


def program(model: nn.Module, *inputs: Tensor, **options: Any) -> Program:
    found = capture(model.eval(), inputs, **options).program
    assert found is not None
    return found


def of(found: Program, name: str, sizes: dict[str, int] | None = None) -> Cost:
    return next(c for n, c in cost.by_node(found, sizes).items() if op_name(n.target) == name)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 8)
        self.dense = nn.Linear(8, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dense(self.table(ids)).relu()
        return torch.cat([x.transpose(1, 2)[:, :4], x.transpose(1, 2)[:, 4:]], 1).softmax(-1)


def test_each_kind_of_op() -> None:
    found = program(Net(), torch.zeros(2, 5, dtype=torch.int64))
    assert of(found, "aten.linear") == Cost(2 * 10 * 8 * 6, 4 * (80 + 48 + 6), 4 * 60, parameters=4 * 54)
    assert of(found, "aten.relu") == Cost(60, 240, 240)
    assert of(found, "aten.embedding") == Cost(80, 4 * 80 + 8 * 10, 4 * 80, parameters=4 * 80)  # the rows that are read
    assert of(found, "aten.transpose.int") == of(found, "aten.slice.Tensor") == Cost()
    assert of(found, "aten.cat") == Cost(0, 240, 240)
    assert of(found, "aten.softmax.int") == Cost(300, 240, 240)


def test_sums() -> None:
    found = program(Net(), torch.zeros(2, 5, dtype=torch.int64))
    assert cost.total(found) == sum(cost.by_site(found).values(), Cost()) == sum(cost.by_node(found).values(), Cost())
    assert cost.by_site(found)["dense"] == of(found, "aten.linear")
    assert Cost(6, 2, 1).intensity == 2.0 and Cost().intensity == 0.0
    assert Cost(100, 30, 20).seconds(flops_per_second=10, bytes_per_second=1) == 50


def test_reduced_precision_moves_less() -> None:
    wide = program(nn.Linear(8, 6), torch.zeros(4, 8))
    narrow = program(nn.Linear(8, 6).bfloat16(), torch.zeros(4, 8, dtype=torch.bfloat16))
    assert cost.total(wide).bytes == 2 * cost.total(narrow).bytes
    assert cost.total(wide).flops == cost.total(narrow).flops


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        free = x.reshape(2, 15, 8)
        free = torch.cat([free, free], -1)[..., :8].reshape(2, 3, 5, 2, 4).reshape(2, 3, 5, 8)
        copied = x.transpose(1, 2).reshape(2, -1)
        return (free @ self.w.T.T).sum() + copied.sum() + x.expand(4, 2, 3, 5, 8).amax()


def test_views_are_free_and_copies_are_not() -> None:
    found = program(Views(), torch.randn(2, 3, 5, 8))
    *free, copied = [c for n, c in cost.by_node(found).items() if op_name(n.target) == "aten.reshape"]
    assert free == [Cost()] * 3 and copied == Cost(0, 960, 960)
    assert of(found, "aten.matmul").parameters == 4 * 48  # through both transposes
    assert of(found, "aten.slice.Tensor") == Cost()
    assert of(found, "aten.amax").read == 960  # the expanded axis holds nothing of its own
    assert of(found, "aten.amax").flops == 960


def test_symbolic_sizes() -> None:
    found = program(nn.Linear(8, 6), torch.zeros(4, 8), dynamic="auto")
    (symbol,) = found.signature.symbols
    assert cost.total(found) == Cost(2 * 4 * 48, 4 * (32 + 54), 4 * 24, parameters=4 * 54)
    assert cost.total(found, {symbol: 100}) == Cost(2 * 100 * 48, 4 * (800 + 54), 4 * 600, parameters=4 * 54)
    assert cost.number(3) == 3


def test_sizes_that_the_data_decide_count_as_nothing() -> None:
    class Picks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0] * 2

    found = program(Picks(), torch.randn(3, 4))
    found.verify()
    assert of(found, "aten.index.Tensor").written == 0 and of(found, "aten.mul.Tensor") == Cost()


def test_opaque_ops_and_tuples() -> None:
    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Any:
            values, _ = torch.mode(x, 1)
            return values, F.pad(x, (1, 1))

    found = program(Opaque(), torch.zeros(3, 4))
    assert of(found, "aten.mode").read == 48 and of(found, "aten.mode").flops == 0
    assert of(found, "operator.getitem") == Cost()
