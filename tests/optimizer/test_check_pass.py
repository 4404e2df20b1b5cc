"""gw.testing.check_pass: what it lets through and what it finds."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.errors import CheckError, InputError
from graphwright.ir import Program, site_of
from graphwright.manager import Pass, PassResult
from graphwright.passes.pipeline import DEFAULT
from graphwright.testing import models

aten = torch.ops.aten


class Squared(gw.RewritePass):
    """Replace relu(x) * relu(x) by relu(x) squared."""

    name = "squared"

    def pattern(self, op, x):
        return op.relu(x) * op.relu(x)

    def replace(self, op, x):
        return op.square(op.relu(x))


def test_a_good_pass_and_what_it_changed():
    found = gw.testing.check_pass(Squared())
    assert found.programs >= 24 and "two results" in found.changed
    assert "relu + relu + mul → aten.square" in str(found)


def test_programs_models_and_lists_of_them():
    class M(nn.Module):
        def forward(self, x):
            return x.relu() * x.relu()

    x = torch.randn(2, 4)
    program = models.program_of(M(), (x,))
    for given in ((M(), x), (M(), (x,)), program, [program, (M(), x)], {"mine": program}):
        assert gw.testing.check_pass(Squared(), given).changed
    with pytest.warns(UserWarning, match="pass squared changed none of 1 programs"):
        gw.testing.check_pass(Squared(), (nn.Linear(4, 4), x))
    program.example = None
    for bad in (program, 3, [nn.Linear(2, 2)], (nn.Linear(4, 4), "x")):
        with pytest.raises(InputError, match="check_pass"):
            gw.testing.check_pass(Squared(), bad)
    with pytest.raises(InputError, match=r"Write Squared\(\)"):
        gw.testing.check_pass(Squared)


def test_built_in_programs_are_what_they_say_and_the_same_each_time():
    found = models.programs()
    assert sum(name.startswith("random") for name in found) == 12
    for program in found.values():
        program.verify()
        assert program.example is not None
    models.programs.cache_clear()
    assert {n: p.text() for n, p in models.programs().items()} == {n: p.text() for n, p in found.items()}
    other = models.programs(1)
    assert other["random 1.0"].text() != found["random 0.0"].text()


@dataclass(frozen=True)
class Bad(Pass):
    """Breaks one promise.

    Args:
        how: which.
    """

    name = "bad"
    how: str = ""

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        nodes = [n for n in program.nodes if n.target is aten.relu.default]
        if self.how == "raise" and nodes:
            raise ValueError("no luck")
        if self.how == "lie" and nodes:
            result.change(site_of(nodes[0]), "nothing")
        if self.how == "tensors":
            with torch.no_grad():
                for tensor in program.tensors().values():
                    tensor.add_(0)
                    result.touched = True
        for node in nodes if self.how in ("numbers", "again", "patterns", "chance", "include") else ():
            if (self.how == "include" and "*" in self.exclude) or (node.args[0].op == "call_function" and node.args[0].target is aten.neg.default):
                continue
            scale = 1.001 if self.how == "numbers" else 1.0
            if self.how == "chance":
                scale = 1.0 + 0 * float(torch.rand(()))
                COUNT.append(1)
            with program.graph.inserting_after(node):
                new = program.call(aten.mul.Tensor, node, scale if self.how != "chance" else scale + len(COUNT) * 1e-12, like=node)
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
            result.change(site_of(node), "times one")
            if self.how in ("patterns", "include"):
                with program.graph.inserting_before(node):
                    node.update_arg(0, program.call(aten.neg.default, program.call(aten.neg.default, node.args[0], like=node), like=node))
        return result


COUNT: list[int] = []


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", r"two results: the pass failed: ValueError: no luck \(pass bad\)"),
        ("lie", "says that it changed the program, and it did not"),
        ("numbers", "two results: output 0: RMS error"),
        ("tensors", "it writes into tensors"),
        ("again", r"a second run changes more \(.*times one.*\) and its notes don't say why"),
        ("chance", "two runs on the same program give two results"),
        ("patterns", r"exclude='\*' is not honoured: it changes"),
        ("include", "include='.*' is not honoured: it changes"),
    ],
)
def test_a_broken_promise_is_named(how, words):
    given = None if how != "tensors" else (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckError, match=words):
            gw.testing.check_pass(Bad(how), given)


@pytest.mark.parametrize("p", DEFAULT, ids=lambda p: p.name)
def test_the_default_passes_keep_their_promises(p):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not each of them has work in these programs
        gw.testing.check_pass(p)
