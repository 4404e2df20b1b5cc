"""The IR: its invariants are found out when broken, and its edits keep them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphwright.capture import capture
from graphwright.errors import InternalError
from graphwright.ir import Program, arg, args_by_name, normalise, op_name, set_arg, site_of

aten = torch.ops.aten


def program() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    found = capture(model, (torch.randn(2, 4),)).program
    assert found is not None
    return found


def test_text_is_a_line_per_node():
    assert program().text() == (
        "input_1: f32[2, 4] = input\n"
        "_0_weight: f32[3, 4] = tensor 0.weight\n"
        "_0_bias: f32[3] = tensor 0.bias\n"
        "linear_default: f32[2, 3] = aten.linear(input_1, _0_weight, _0_bias)  # 0\n"
        "relu_default: f32[2, 3] = aten.relu(linear_default)  # 1\n"
        "return (relu_default)"
    )


def test_verify_accepts_a_captured_program():
    program().verify()


def _lose_value(p: Program) -> None:
    del p.nodes[0].meta["val"]


def _wrong_shape(p: Program) -> None:
    p.nodes[0].meta["val"] = p.fake(torch.zeros(2, 9))


def _lose_sites(p: Program) -> None:
    del p.nodes[0].meta["sites"]


def _mutate(p: Program) -> None:
    p.nodes[1].target = aten.relu_.default


def _incomplete(p: Program) -> None:
    p.nodes[0].args = p.nodes[0].args[:2]


def _unknown_function(p: Program) -> None:
    p.nodes[1].target = torch.relu


def _stale_tensor(p: Program) -> None:
    p.graph_module.get_submodule("0").weight = nn.Parameter(torch.zeros(7, 4))


def _other_op(p: Program) -> None:
    p.nodes[1].target = aten.argmax.default
    p.nodes[1].args = (p.nodes[0], None, False)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_lose_value, "meta['val'] is missing"),
        (_wrong_shape, "meta['val'] says f32[2, 9], the op gives f32[2, 3]"),
        (_lose_sites, "meta['sites'] is missing"),
        (_mutate, "writes into its arguments"),
        (_incomplete, "not complete"),
        (_unknown_function, "neither an op nor a scalar function"),
        (_stale_tensor, "the tensor is f32[7, 4]"),
        (_other_op, "the op gives i64[]"),
    ],
)
def test_verify_names_what_is_broken(damage, words):
    p = program()
    p.verify()  # remembers what it found right: damage done afterwards must still be seen
    damage(p)
    with pytest.raises(InternalError) as error:
        p.verify()
    assert words in str(error.value)
    assert "aten.linear" in str(error.value)  # the program's text is attached


def test_call_normalises_and_infers():
    p = program()
    last = p.nodes[-1]
    with p.graph.inserting_after(last):
        new = p.call(aten.add.Tensor, last, 1, like=last)
    assert new.kwargs == {"alpha": 1}
    assert tuple(new.meta["val"].shape) == (2, 3)
    assert new.meta["sites"] == ("1",)
    p.verify()


def test_normalise_refuses_unknown_and_missing_arguments():
    with pytest.raises(InternalError, match="unknown arguments"):
        normalise(aten.relu.default, (1,), {"nonsense": 2})
    with pytest.raises(InternalError, match="is missing"):
        normalise(aten.linear.default, (1,), {})


def test_arguments_by_name():
    node = program().nodes[0]
    assert list(args_by_name(node)) == ["input", "weight", "bias"]
    assert arg(node, "weight").target == "0.weight"
    set_arg(node, "bias", None)
    assert node.args[2] is None
    with pytest.raises(InternalError, match="has no argument"):
        arg(node, "stride")


def test_replace_moves_readers_and_sites():
    p = program()
    old = p.nodes[-1]
    with p.graph.inserting_before(old):
        new = p.call(aten.tanh.default, p.nodes[0], sites=["mine"])
    p.replace(old, new)
    assert p.output.args[0] == (new,)
    assert new.meta["sites"] == ("mine", "1")
    p.verify()


def test_tidy_erases_what_nothing_reads():
    p = program()
    relu = p.nodes[1]
    relu.args = (p.placeholders[0],)
    relu.meta["val"] = p.infer(relu)
    assert p.tidy()
    assert [op_name(n.target) for n in p.nodes] == ["aten.relu"]
    assert p.tensors() == {} and list(p.graph_module.named_parameters()) == []
    assert not p.tidy()


def test_added_tensors_get_free_names_and_remember_where_they_came_from():
    p = program()
    first = p.add_tensor("0.weight", torch.zeros(1), origin=["0.weight"])
    second = p.add_tensor("0.weight", torch.zeros(1), origin=[str(first.target)])
    assert (first.target, second.target) == ("0.weight_2", "0.weight_3")
    assert p.provenance[str(second.target)] == ("0.weight",)
    p.verify()


@pytest.mark.parametrize("name", ["0.weight.inner", "forward", "a.b.c", "training"])
def test_a_tensor_may_be_called_anything(name):
    """Where a tensor or a method of the module stands in the way, the name gives way."""
    p = program()
    node = p.add_tensor(name, torch.ones(2))
    assert torch.equal(p.tensor(str(node.target)), torch.ones(2))
    assert p.add_tensor("trained", torch.ones(2), trainable=True).op == "get_attr"
    assert isinstance(p.tensor("trained"), nn.Parameter)


def test_copies_share_tensors_but_no_graph():
    p = program()
    twin = p.copy()
    twin.nodes[0].meta["sites"] = ("changed",)
    with twin.graph.inserting_after(twin.nodes[-1]):
        twin.call(aten.neg.default, twin.nodes[-1], like=twin.nodes[-1])
    assert len(p.nodes) == 2 and site_of(p.nodes[0]) == "0"
    assert twin.tensor("0.weight").data_ptr() == p.tensor("0.weight").data_ptr()
    x = torch.randn(2, 4)
    assert torch.equal(p(x)[0], twin(x)[0])


def test_sizes_count_shared_storage_once():
    p = program()
    before = p.size_bytes()
    node = p.add_tensor("view", p.tensor("0.weight").view(4, 3))
    with p.graph.inserting_before(p.output):
        p.call(aten.neg.default, node)
    assert p.size_bytes() == before == 4 * (12 + 3)


def test_mutated_buffers_are_no_constants_and_are_written_back():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return x + self.count

    p = capture(Counter().eval(), (torch.zeros(2),)).program
    (node,) = p.graph.find_nodes(op="get_attr")
    assert p.constant(node) is None
    assert [float(p(torch.zeros(2))[0][0]) for _ in range(2)] == [1.0, 2.0]
