"""What a pass changed is found node by node: nothing broken slips through, nothing unchanged is looked at again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn

from graphwright import invariants
from graphwright.capture import capture
from graphwright.errors import InternalError, PassError
from graphwright.ir import Program
from graphwright.manager import Pass, PassResult, Pipeline, fingerprint
from graphwright.numerics import Lossy, run_pure
from graphwright.snapshot import Snapshot

aten = torch.ops.aten


def program(layers: int = 3, example: bool = True) -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(*[part for _ in range(layers) for part in (nn.Linear(4, 4), nn.ReLU())]).eval()
    x = torch.randn(5, 4)
    found = capture(model, (x,)).program
    found.example = (x,) if example else None
    return found


@dataclass(frozen=True)
class Doing(Pass):
    """Do what a function says to the program, and say that it was changed."""

    name = "doing"
    do: Callable[[Program], object] = lambda program: None

    def run(self, program: Program) -> PassResult:
        self.do(program)
        return PassResult(touched=True)


@dataclass(frozen=True)
class Lossily(Doing):
    """The same, and numbers may change."""

    name = "lossily"
    numerics = Lossy(0.0)


def twice(program: Program) -> None:
    """A relu after the first relu, which changes no number."""
    relu = next(n for n in program.nodes if n.target is aten.relu.default)
    with program.graph.inserting_after(relu):
        new = program.call(aten.relu.default, relu, like=relu)
    relu.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def linear(program: Program, k: int = 1) -> fx.Node:
    return [n for n in program.nodes if n.target is aten.linear.default][k]


def relus(program: Program) -> list[fx.Node]:
    return [n for n in program.nodes if n.target is aten.relu.default]


def too_early(p: Program) -> None:
    p.nodes[0].prepend(relus(p)[-1])


def foreign(p: Program) -> None:
    linear(p).args = (fx.Graph().placeholder("y"), *linear(p).args[1:])


def erased(p: Program) -> None:
    relu = relus(p)[0]
    with p.graph.inserting_after(relu):
        gone = p.call(aten.relu.default, relu, like=relu)
    p.graph.erase_node(gone)
    linear(p).args = (gone, *linear(p).args[1:])


def other_value(p: Program) -> None:
    relus(p)[0].meta["val"] = p.fake(torch.zeros(7, 4))


def other_input(p: Program) -> None:
    p.placeholders[0].meta["val"] = p.fake(torch.zeros(5, 9))


def other_tensor(p: Program) -> None:
    p.graph_module.get_submodule("2").weight = nn.Parameter(torch.zeros(3, 3))


def written_op(p: Program) -> None:
    relus(p)[1].target = aten.relu_.default


def unknown_function(p: Program) -> None:
    relus(p)[1].target = torch.relu


def a_module(p: Program) -> None:
    with p.graph.inserting_before(p.output):
        p.graph.create_node("call_module", "2", (relus(p)[0],)).meta["val"] = relus(p)[0].meta["val"]


BREAKAGES = {
    "'weight' is missing": lambda p: setattr(linear(p), "args", linear(p).args[:1]),
    "arguments are not complete": lambda p: setattr(linear(p), "args", linear(p).args[:2]),
    "meta['val'] is missing": lambda p: relus(p)[1].meta.pop("val"),
    "meta['sites'] is missing": lambda p: relus(p)[1].meta.pop("sites"),
    "meta['val'] says f32[7, 4], the op gives f32[5, 4]": other_value,
    "the op does not take these arguments": other_input,
    "the tensor is f32[3, 3]": other_tensor,
    "there is no tensor 2.weight": lambda p: delattr(p.graph_module.get_submodule("2"), "weight"),
    "writes into its arguments": written_op,
    "neither an op nor a scalar function": unknown_function,
    "a call_module node may not stand in a program": a_module,
    "used before it has been defined": too_early,
    "no node of this graph": foreign,
    "argument 'relu_default_4' of node 'linear_default_1' is no node": erased,
    "two nodes have the same name": lambda p: setattr(relus(p)[2], "name", relus(p)[0].name),
    "the output is no flat tuple": lambda p: setattr(p.output, "args", (relus(p)[-1],)),
}


@pytest.mark.parametrize("words", BREAKAGES)
def test_every_kind_of_breakage_is_caught_at_its_pass(words):
    passes = (Doing(do=twice), Doing(do=BREAKAGES[words]), Doing(do=twice))
    with pytest.raises(PassError) as error:
        Pipeline(passes).run(program(example=False))
    assert "pass doing (after doing):" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("words", BREAKAGES)
def test_every_kind_of_breakage_is_caught_where_all_is_checked(words):
    broken = program()
    BREAKAGES[words](broken)
    with pytest.raises(InternalError):
        broken.verify()


def test_all_is_checked_where_a_kind_of_pass_ends(monkeypatch):
    seen = []
    whole = invariants.verify
    monkeypatch.setattr(invariants, "verify", lambda p, nodes=None: (seen.append(nodes is None), whole(p, nodes)))
    Pipeline((Doing(do=twice), Doing(do=twice), Lossily(do=twice), Doing(do=twice))).run(program())
    assert seen == [False, False, True, False, True, False, True]


def test_a_program_that_was_broken_before_is_no_pass_s_fault():
    given = program(example=False)
    relus(given)[2].meta["val"] = given.fake(torch.zeros(7, 4))
    with pytest.raises(PassError) as error:
        Pipeline((Doing(do=twice),)).run(given)
    assert str(error.value).startswith("the program that the passes were given: the program is broken")


def test_only_what_changed_is_checked_again(monkeypatch):
    looked = []
    broken = invariants._broken
    monkeypatch.setattr(invariants, "_broken", lambda p, node: (looked.append(node), broken(p, node))[1])
    counts = []
    for layers in (4, 8):
        given = program(layers, example=False)
        now, before = given.copy(), None
        before = Snapshot.of(now)
        twice(now)
        looked.clear()
        now.verify(Snapshot.of(now, before).since(before).nodes)
        counts.append(len(looked))
    assert counts[0] == counts[1] == 3  # the new relu, the linear that reads it, the relu after that


def test_a_snapshot_gives_the_program_back_as_it_was():
    given = program()
    before, text = Snapshot.of(given), given.text()
    outputs = run_pure(given, given.example)
    twice(given)
    given.replace(linear(given, 2), relus(given)[0])
    given.add_tensor("more", torch.ones(3))
    given.tidy()
    back = before.restore()
    assert back.text() == text != given.text()
    back.verify()
    assert [torch.equal(a, b) for a, b in zip(outputs, run_pure(back, back.example), strict=True)] == [True]
    assert back.tensor("0.weight") is given.tensor("0.weight")


def test_what_does_not_change_is_shared_between_snapshots():
    given = program()
    first = Snapshot.of(given)
    twice(given)
    second = Snapshot.of(given, first)
    shared = {id(h) for h in first.nodes}
    assert len([h for h in second.nodes if id(h) not in shared]) == 2
    relus(given)[0].meta["mine"] = 1
    third = Snapshot.of(given, second)
    assert not third.since(second).modified
    assert next(h for h in third.nodes if h.node is relus(given)[0]).meta["mine"] == 1


def test_what_reads_the_same_is_no_change():
    given = program()
    before = Snapshot.of(given)
    node = linear(given)
    node.args = tuple(node.args)
    node.meta["val"] = given.infer(node)
    assert not Snapshot.of(given, before).since(before).modified
    node.meta["sites"] = ("elsewhere",)
    assert Snapshot.of(given, before).since(before).modified


def test_undone_work_leaves_no_trace():
    def worse(p: Program) -> None:
        relu = relus(p)[0]
        with p.graph.inserting_after(relu):
            new = p.call(aten.mul.Tensor, relu, 1.01, like=relu)
        relu.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    given = program()
    after, records = Pipeline((Doing(do=worse), Doing(do=twice), Doing(do=worse))).run(given)
    assert [bool(r.undone) for r in records] == [True, False, True]
    once, _ = Pipeline((Doing(do=twice),)).run(given)
    assert fingerprint(after) == fingerprint(once)
