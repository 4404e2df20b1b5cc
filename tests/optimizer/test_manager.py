"""The pass manager: it checks what passes claim, and blames precisely."""

from __future__ import annotations

import fnmatch
import glob
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graphwright.capture import capture
from graphwright.errors import CalibrationError, PassError, SiteError
from graphwright.ir import Program, set_arg, site_of
from graphwright.manager import Pass, PassResult, Pipeline, fingerprint, matcher
from graphwright.numerics import Lossy

aten = torch.ops.aten


def program(example: bool = True) -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    x = torch.randn(5, 4)
    found = capture(model, (x,)).program
    found.example = (x,) if example else None
    return found


@dataclass(frozen=True)
class Scale(Pass):
    """Multiply the relu's value.

    Args:
        by: the factor.
    """

    name = "scale"
    by: float = 1.0

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        node = next(n for n in program.nodes if n.target is aten.relu.default)
        if self.refused(result, node):
            return result
        with program.graph.inserting_after(node):
            new = program.call(aten.mul.Tensor, node, self.by, like=node)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        result.change(site_of(node), f"times {self.by}")
        return result


@dataclass(frozen=True)
class LossyScale(Scale):
    """Multiply, and say that numbers change."""

    name = "lossy-scale"
    numerics = Lossy(20.0)


@dataclass(frozen=True)
class Nothing(Pass):
    """Change nothing."""

    name = "nothing"

    def run(self, program: Program) -> PassResult:
        return PassResult()


def test_a_run_leaves_the_program_alone_and_records_what_was_done():
    before = program()
    mark = fingerprint(before)
    after, (record,) = Pipeline((Scale(),)).run(before)
    assert fingerprint(before) == mark != fingerprint(after)
    assert record.name == "scale" and record.numerics == "exact" and record.undone is None
    assert record.result.changes == [("1", "times 1.0")]
    assert (record.nodes_before, record.nodes_after) == (3, 4)
    assert record.error > 100 and record.seconds > 0
    assert record.bytes_after == before.size_bytes()


def test_an_inexact_exact_pass_is_undone_and_says_why():
    before = program()
    after, (record,) = Pipeline((Scale(by=1.001),)).run(before)
    assert fingerprint(after) == fingerprint(before)
    assert "undone: output 0: RMS error" in record.undone
    assert record.result.changes == [] and record.result.refusals[0][0] == "1"
    assert "undone" in record.result.refusals[0][1]


def test_strict_raises_and_names_pass_predecessors_and_first_bad_node():
    with pytest.raises(PassError) as error:
        Pipeline((Nothing(), Scale(by=1.001)), strict=True).run(program())
    assert "pass scale (after nothing)" in str(error.value)
    assert "First bad node: 1" in str(error.value)


def test_lossy_passes_have_their_own_floor():
    _, (record,) = Pipeline((LossyScale(by=1.001),)).run(program())
    assert record.undone is None and record.numerics == "lossy" and 80 < record.error < 100
    _, (record,) = Pipeline((LossyScale(by=1000.0),)).run(program())
    assert "lies below 20.0 dB" in record.undone


def test_exact_passes_after_a_lossy_one_are_held_to_its_numbers():
    passes = (LossyScale(by=1.1), Scale())
    _, records = Pipeline(passes, strict=True).run(program())
    assert [r.undone for r in records] == [None, None]
    assert records[1].error == pytest.approx(records[0].error)  # shown against the original all the same
    with pytest.raises(PassError):
        Pipeline((LossyScale(by=1.1), Scale(by=1.001)), strict=True).run(program())


def test_without_an_example_the_structure_alone_is_checked():
    _, (record,) = Pipeline((Scale(by=2.0),)).run(program(example=False))
    assert record.undone is None and record.error is None


@dataclass(frozen=True)
class Silent(Pass):
    """Change and keep quiet, or boast and do nothing."""

    name = "silent"
    boast: bool = False

    def run(self, program: Program) -> PassResult:
        if self.boast:
            return PassResult(touched=True)
        program.nodes[0].meta["sites"] = ("elsewhere",)
        return PassResult()


@pytest.mark.parametrize(("boast", "words"), [(False, "does not say so"), (True, "it did not")])
def test_modified_must_be_told_truthfully(boast, words):
    with pytest.raises(PassError, match=words):
        Pipeline((Silent(boast),)).run(program())


def test_changed_tensors_count_as_a_change():
    @dataclass(frozen=True)
    class Poke(Pass):
        """Write into a weight."""

        name = "poke"

        def run(self, program: Program) -> PassResult:
            with torch.no_grad():
                program.tensor("0.weight").add_(0.0)
            return PassResult()

    with pytest.raises(PassError, match="does not say so"):
        Pipeline((Poke(),)).run(program())


def test_a_broken_program_is_blamed_on_its_pass():
    @dataclass(frozen=True)
    class Break(Pass):
        """Forget an argument."""

        name = "break"

        def run(self, program: Program) -> PassResult:
            program.nodes[0].args = program.nodes[0].args[:1]
            return PassResult(touched=True)

    with pytest.raises(PassError) as error:
        Pipeline((Scale(), Break())).run(program())
    assert "pass break (after scale)" in str(error.value) and "'weight' is missing" in str(error.value)


def test_a_pass_that_raises_is_named():
    @dataclass(frozen=True)
    class Clumsy(Pass):
        """Ask for a product of shapes that do not fit."""

        name = "clumsy"

        def run(self, program: Program) -> PassResult:
            with program.graph.inserting_before(program.output):
                program.call(aten.mm.default, program.nodes[0], program.nodes[0])
            return PassResult(touched=True)

    with pytest.raises(PassError) as error:
        Pipeline((Nothing(), Clumsy())).run(program())
    assert "pass clumsy (after nothing): the pass failed: RuntimeError" in str(error.value)


def test_errors_meant_for_the_user_pass_through():
    @dataclass(frozen=True)
    class Picky(Pass):
        """Want calibration data."""

        name = "picky"

        def run(self, program: Program) -> PassResult:
            raise CalibrationError("there are none")

    with pytest.raises(CalibrationError):
        Pipeline((Picky(),)).run(program())


def test_a_program_that_no_longer_runs_is_put_back():
    @dataclass(frozen=True)
    class OutOfRange(Pass):
        """Select a row by a constant index that no fake value shows to be too large."""

        name = "out-of-range"

        def run(self, program: Program) -> PassResult:
            last = program.nodes[-1]
            index = program.add_tensor("index", torch.full((5,), 99))
            with program.graph.inserting_after(last):
                new = program.call(aten.index_select.default, last, 0, index, like=last)
            last.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
            return PassResult(touched=True)

    before = program()
    after, (record,) = Pipeline((OutOfRange(),)).run(before)
    assert "no longer runs: IndexError" in record.undone
    assert fingerprint(after) == fingerprint(before)


def test_a_pass_must_give_a_result():
    @dataclass(frozen=True)
    class Mute(Pass):
        """Give None."""

        name = "mute"

        def run(self, program: Program):
            return None

    with pytest.raises(PassError, match="returned NoneType"):
        Pipeline((Mute(),)).run(program())


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_patterns_that_match_nothing_are_an_error(option):
    with pytest.raises(SiteError) as error:
        Pipeline((Scale(**{option: ("0.weigth*",)}),)).run(program())
    assert "matches no site" in str(error.value) and "'0'" in str(error.value).replace("are 0", "'0'")


def test_include_and_exclude_are_refusals():
    _, (record,) = Pipeline((Scale(exclude=("1",)),)).run(program())
    assert record.result.refusals == [("1", "left out by include / exclude")]
    _, (record,) = Pipeline((Scale(include="1"),)).run(program())
    assert record.result.changes


def test_options_and_summary():
    assert Scale(by=2.0).options() == {"include": (), "exclude": (), "by": 2.0}
    assert Scale.summary() == "Multiply the relu's value."


def test_progress_names_each_pass():
    said = []
    Pipeline((Nothing(), Scale())).run(program(), progress=said.append)
    assert said == ["pass nothing", "pass scale"]


def test_shapes_that_change_are_failures():
    @dataclass(frozen=True)
    class Drop(Pass):
        """Give one column less."""

        name = "drop"

        def run(self, program: Program) -> PassResult:
            last = program.nodes[-1]
            for name in ("weight", "bias"):
                node = last.args[1 if name == "weight" else 2]
                set_arg(last, name, program.add_tensor(f"cut.{name}", program.tensor(node.target).detach()[:1]))
            last.meta["val"] = program.infer(last)
            return PassResult(touched=True)

    _, (record,) = Pipeline((Drop(),)).run(program())
    assert "(5, 1)" in record.undone


@given(st.lists(st.text("ab.*?[]!0#", max_size=6), max_size=4), st.text("ab.*?[]!0#", max_size=6))
def test_many_patterns_match_as_each_would(several, site):
    assert matcher(tuple(several))(site) == any(fnmatch.fnmatchcase(site, p) for p in several)
    assert matcher((*several, glob.escape(site)))(site)
