"""What differs between two programs: renamed nodes never, every edit always, and the text a user reads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import graphwright as gw
from graphwright.capture import capture
from graphwright.ir import Program, Signature

aten = torch.ops.aten


def captured(model: nn.Module, *inputs: torch.Tensor) -> Program:
    torch.manual_seed(0)
    found = capture(model.eval(), inputs).program
    assert found is not None
    return found


def small() -> Program:
    torch.manual_seed(0)
    return captured(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Tanh()), torch.randn(2, 4))


def test_a_program_is_its_copy():
    program = small()
    found = program.diff(program.copy())
    assert not found and str(found) == "no difference: 4 ops the same" and found.same == 4


def test_the_text():
    before, after = small(), small()
    relu = after.nodes[1]
    with after.graph.inserting_before(relu):
        new = after.call(aten.gelu.default, relu.args[0], like=relu)
    after.replace(relu, new)
    found = before.diff(after)
    assert str(found) == (
        "--- before\n"
        "+++ after\n"
        "@@ 1 @@\n"
        "-relu_default: f32[2, 3] = aten.relu(linear_default)\n"
        "+gelu_default: f32[2, 3] = aten.gelu(linear_default, approximate='none')\n"
        "4 > 4 ops: 1 ops removed, 1 added, 0 changed, 3 the same; tensors 9.2e-05 > 9.2e-05 MB"
    )
    assert (found.removed, found.added, found.changed) == ([before.nodes[1]], [new], [])


def test_tensors_with_other_values_and_none_said_of_shared_ones():
    before, after = small(), small()
    after.graph_module.get_submodule("0").weight = nn.Parameter(after.tensor("0.weight") + 1)
    with torch.no_grad():
        before.tensor("2.bias")[0] = after.tensor("2.bias")[0] = math.nan
    found = before.diff(after)
    assert found.tensors == (" 0.weight: f32[3, 4] holds other values",)
    assert [c.node.name for c in found.changes] == ["linear_default"] and found.same == 3


def test_a_tensor_under_another_name_is_the_same_tensor():
    before, after = small(), small().copy()
    before = after.copy()
    (node,) = after.graph.find_nodes(op="get_attr", target="0.weight")
    with after.graph.inserting_before(node):
        fresh = after.add_tensor("moved", after.tensor("0.weight"))
    node.replace_all_uses_with(fresh)
    after.tidy()
    found = before.diff(after)
    assert not found.changes and found.tensors == ("-0.weight: f32[3, 4]", "+moved: f32[3, 4]")


def test_inputs_outputs_and_writes():
    one = captured(nn.ReLU(), torch.randn(2, 4))
    assert "inputs: (f32[2, 4]) > (f32[3, 4])" in str(one.diff(captured(nn.ReLU(), torch.randn(3, 4))))
    other = one.copy()
    other.output.args = ((other.placeholders[0],),)
    assert "outputs: (relu_default) > (input_1)" in str(one.diff(other))

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.n += 1
            return x.relu()

    assert "other buffers or inputs are written" in str(one.diff(captured(Counting(), torch.randn(2, 4))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.conv(x)).relu()


def test_blocks_are_told_once():
    x = torch.randn(2, 4, 8, 8)
    fast = gw.optimize(nn.Sequential(*(Block() for _ in range(5))).eval(), x, goal=gw.Goal(size_mb=100))
    found = fast.captured.diff(fast.program)
    first = str(found)
    assert first.count("-batch_norm") == 1 and "the same at 4 more: 1.conv, 2.conv, 3.conv, …" in first
    assert found.text(full=True).count("-batch_norm") == 5
    assert (len(found.removed), len(found.added), found.same) == (15, 5, 5)  # the sums stay
    assert first.splitlines()[-1] == found.summary()


def test_a_result_that_was_loaded_holds_no_captured_program(tmp_path):
    x = torch.randn(2, 4)
    fast = gw.optimize(nn.Linear(4, 3).eval(), x)
    assert fast.captured.nodes
    fast.save(tmp_path / "m.gw")
    with pytest.raises(gw.InputError, match="captured program is not held"):
        _ = gw.load(tmp_path / "m.gw").captured


# -- random programs -------------------------------------------------------------------------------------------------

OPS = [aten.relu.default, aten.tanh.default, aten.neg.default]


def build(recipe: list[tuple[int, int, bool]], names: str = "n") -> Program:
    """Unary ops and sums over earlier values, named ``names0``, ``names1``, …"""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(2)
    made = [x]
    for k, (op, operand, sited) in enumerate(recipe):
        a, b = made[operand % len(made)], made[-1]
        node = graph.call_function(OPS[op], (a,)) if op < 3 else graph.call_function(aten.add.Tensor, (a, b), {"alpha": 1})
        node.name = f"{names}{k}"
        node.meta = {"val": torch.zeros(2), "sites": (f"block.{k // 3}.op{k}",) if sited else ()}
        made.append(node)
    graph.output((made[-1],))
    return Program(fx.GraphModule(nn.Module(), graph), Signature(), None)


RECIPE = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 50), st.booleans()), max_size=25)


@settings(max_examples=80, deadline=None)
@given(RECIPE)
def test_names_do_not_matter(recipe):
    assert not build(recipe).diff(build(recipe, names="other"))


@settings(max_examples=80, deadline=None)
@given(RECIPE, RECIPE)
def test_the_counts_add_up_either_way(one, other):
    a, b = build(one), build(other, names="m")
    there, back = a.diff(b), b.diff(a)
    for found, before, after in ((there, a, b), (back, b, a)):
        assert found.same + len(found.changed) + len(found.removed) == len(before.nodes)
        assert found.same + len(found.changed) + len(found.added) == len(after.nodes)
        everything = [n for h in found.hunks for c in h.changes for n in (c.before, c.after) if n is not None]
        assert len(everything) == len(set(everything))
        assert str(found).splitlines()[-1] == found.summary()
        lines = found.text(full=True).splitlines()
        assert sum(line.startswith("-") and not line.startswith("---") for line in lines) == len(found.removed) + len(found.changed)
    assert bool(there) == bool(back)


@settings(max_examples=80, deadline=None)
@given(RECIPE.filter(bool), st.data())
def test_an_edit_is_always_seen(recipe, data):
    k = data.draw(st.integers(0, len(recipe) - 1))
    op, operand, sited = recipe[k]
    edited = [*recipe[:k], ((op + 1) % 4, operand, sited), *recipe[k + 1 :]]
    assert build(recipe).diff(build(edited))




def test_thousands_of_nodes():
    recipe = [(k % 4, 7 * k, True) for k in range(4000)]
    edited = [*recipe[:2000], (0, 3, True), *recipe[2000:]]
    assert not build(recipe).diff(build(recipe, names="m"))
    assert build(recipe).diff(build(edited)).added
