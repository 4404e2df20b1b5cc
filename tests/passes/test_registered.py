"""Where registered passes stand, clashes and circles, and plug-ins that fail."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.errors import PassError, RecipeError
from graphwright.ir import Program
from graphwright.manager import Origin, Pass, PassResult, Pipeline
from graphwright.numerics import Lossy
from graphwright.passes import pipeline
from graphwright.passes.pipeline import DEFAULT, STAGES, default_recipe, register_pass, resolve, stage_of
from graphwright.passes.registered import Added, Order


@pytest.fixture(autouse=True)
def clean(monkeypatch) -> Iterator[None]:
    """Every test has a registry of its own."""
    old = pipeline._registry
    monkeypatch.setattr(pipeline, "_registry", type(old)(old.order, old.taken))
    pipeline._registry._loaded = True
    yield


@dataclass(frozen=True)
class Note(Pass):
    """Says something."""

    name = "note"

    def run(self, program: Program) -> PassResult:
        return PassResult(notes=["here"])


def make(label: str, module: str = "mine", base: type[Pass] = Note, **more) -> type[Pass]:
    return type(label, (base,), {"name": label, "__doc__": "One of several.", "__module__": module, **more})


def names() -> list[str]:
    return [p.name for p in default_recipe()]


# -- order -----------------------------------------------------------------------------------------------------------


def test_after_and_before_together_and_several_of_each():
    register_pass(make("between"), after=("canonicalize", "fold-constants"), before=["fuse-epilogue", "fold-scale"])
    found = names()
    assert found[found.index("fold-constants") + 1] == "between"  # right behind the last that it waits for
    register_pass(make("early"), before=("fold-scale", "fold-padding"))
    found = names()
    assert found[found.index("fold-padding") - 1] == "early"  # right in front of the first


def test_a_stage_is_run_in_at_its_end_or_where_a_neighbour_says():
    register_pass(make("last-fold"), stage="fold")
    register_pass(make("first-fold"), stage="fold", before="fold-padding")
    found = names()
    assert found[found.index("layout") - 1] == "last-fold" and found[found.index("fold-padding") - 1] == "first-fold"
    assert stage_of("last-fold") == stage_of("first-fold") == stage_of("fold-batch-norm") == "fold"
    assert stage_of("quantize") is None
    register_pass(make("final"), stage="finish")
    assert names()[-1] == "final" and stage_of("final") == "finish"


def test_every_built_in_pass_has_a_stage_and_stages_are_in_order():
    order = pipeline._registry.order
    found = [order.stage_of(n) for n in order.fixed]
    assert list(dict.fromkeys(found)) == list(STAGES)
    assert sorted(found, key=list(STAGES).index) == found


def test_a_neighbour_in_another_stage_is_a_circle():
    with pytest.raises(RecipeError) as error:
        register_pass(make("torn"), stage="raise", after="layout")
    assert "torn -> fold-padding -> layout -> torn" in str(error.value)
    assert "torn before fold-padding: register_pass(torn, after='layout', stage='raise')" in str(error.value)


def test_a_circle_is_shown_with_who_asked_for_each_edge_and_changes_nothing():
    register_pass(make("a"), after="canonicalize")
    register_pass(make("b"), after="a")
    before = names()
    with pytest.raises(RecipeError) as error:
        register_pass(make("a"), after="b")  # replaces the first
    text = str(error.value)
    assert "a -> b -> a" in text or "b -> a -> b" in text
    assert "a before b: register_pass(b, after='a')" in text and "b before a: register_pass(a, after='b')" in text
    assert names() == before
    with pytest.raises(RecipeError, match=r"late -> canonicalize -> dead-code -> late"):
        register_pass(make("late"), after="dead-code", before="canonicalize")


def test_a_circle_between_two_passes_that_meet_only_when_one_is_replaced():
    register_pass(make("a"), after="canonicalize")
    register_pass(make("b"), before="a")
    assert names()[:3] == ["canonicalize", "b", "a"] or names()[:2] == ["b", "canonicalize"]
    with pytest.raises(RecipeError, match="goes round in a circle"):
        register_pass(make("a"), before="b")


def test_passes_whose_neighbour_was_unregistered_are_left_out_one_after_the_other():
    for name, after in (("one", "dead-code"), ("two", "one"), ("three", "two")):
        register_pass(make(name), after=after)
    pipeline.unregister_pass("one")
    with pytest.warns(UserWarning, match="pass 'three' is left out"), pytest.warns(UserWarning, match="'two' is left out: its neighbour 'one' is gone"):
        assert names() == [p.name for p in DEFAULT]
    register_pass(make("one"), after="dead-code")
    register_pass(make("one"))  # replaced by one that does not join
    with pytest.warns(UserWarning, match="'two' is left out"), pytest.warns(UserWarning, match="'three'"):
        assert names() == [p.name for p in DEFAULT]


@pytest.mark.parametrize("bad", [{"after": 3}, {"before": ("canonicalize", None)}, {"after": ""}, {"stage": "folding"}, {"stage": 1}])
def test_wishes_that_are_none(bad):
    with pytest.raises(RecipeError, match="is no name of a pass|there is no stage|The stages are prepare, raise"):
        register_pass(make("one"), **bad)


def test_a_name_that_another_package_has_taken():
    register_pass(make("shared", "theirs.passes"), after="canonicalize")
    register_pass(make("shared", "theirs.more"), before="canonicalize")  # their own: replaced
    assert names()[0] == "shared"
    with pytest.raises(RecipeError, match=r"the name 'shared' is taken by theirs.more.shared\n.*unregister_pass\('shared'\)"):
        register_pass(make("shared", "ours"))
    assert pipeline._registry.added["shared"].cls.__module__ == "theirs.more"
    with pytest.raises(RecipeError, match="numerics is 'exact'"):
        register_pass(make("odd", numerics="exact"))


FIXED = ("p", "q", "r", "s", "t")
ORDER = Order(FIXED, {"first": "p", "second": "r", "third": "t"})


@given(st.data())
def test_whatever_is_asked_for_holds_or_is_a_circle(data):
    added: dict[str, Added] = {}
    for name in ("a", "b", "c", "d"):
        known = [*FIXED, *(n for n, a in added.items() if a.joins)]
        some = st.lists(st.sampled_from(known), max_size=2, unique=True).map(tuple)
        entry = Added(Note, data.draw(some), data.draw(some), data.draw(st.sampled_from([None, "first", "second", "third"])))
        try:
            ORDER.sorted({**added, name: entry})
        except RecipeError as error:
            assert "goes round in a circle" in str(error) and f"{name} " in str(error)
        else:
            added[name] = entry
    found = ORDER.sorted(added)
    assert [n for n in found if n in FIXED] == list(FIXED)
    assert set(found) == {*FIXED, *(n for n, a in added.items() if a.joins)}
    at = {n: k for k, n in enumerate(found)}
    stages = list(ORDER.stages)
    for name, a in added.items():
        if not a.joins:
            continue
        assert all(at[n] < at[name] for n in a.after) and all(at[name] < at[n] for n in a.before)
        if a.stage:
            place = stages.index(a.stage)
            assert all((stages.index(ORDER.stage_of(n)) < place) <= (at[n] < at[name]) for n in FIXED)
            assert all((stages.index(ORDER.stage_of(n)) > place) <= (at[n] > at[name]) for n in FIXED)


# -- plug-ins --------------------------------------------------------------------------------------------------------


class Point:
    """An entry point, as importlib.metadata gives it."""

    def __init__(self, name, load, package="faster-relu", value="faster_relu:thing"):
        self.name, self.value, self._load = name, value, load
        self.dist = SimpleNamespace(name=package, version="1.2")

    def load(self):
        if isinstance(self._load, BaseException):
            raise self._load
        return self._load


@pytest.fixture
def installed(monkeypatch):
    """``installed(*points)``: what is installed beside Graphwright."""

    def install(*points: Point) -> None:
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: list(points) if group == "graphwright.passes" else [])
        pipeline._registry._loaded = False

    return install


@dataclass(frozen=True)
class Guest(Note):
    """Fails in one of several ways.

    Args:
        how: which.
    """

    name = "guest"
    how: str = "raise"

    def run(self, program: Program) -> PassResult:
        if self.how == "raise":
            program.nodes[-1].meta.clear()
            raise ValueError("no luck")
        if self.how == "input":
            raise gw.InputError("bad luck")
        if self.how == "break":
            del program.nodes[-1].meta["val"]
            return PassResult(touched=True)
        if self.how == "lie":
            return PassResult(touched=True)
        if self.how == "say":
            return PassResult(changes=["something"])  # type: ignore[list-item]
        return None  # type: ignore[return-value]


HOW = {"raise": "ValueError: no luck", "input": "bad luck", "break": "the program is broken", "lie": "did not",
       "say": "not all", "none": "returned NoneType"}  # fmt: skip


@pytest.mark.parametrize("how", HOW)
def test_a_plug_in_that_fails_is_left_out_unless_it_was_asked_for(how, installed, captured):
    program = captured(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))
    guest = Guest(how=how, origin=Origin("faster-relu 1.2", asked=False))
    after, (first, _, last) = Pipeline((DEFAULT[0], guest, DEFAULT[0])).run(program)
    assert after.verify() is None and after.text() == program.text() and first.undone is last.undone is None
    _, records = Pipeline((guest,)).run(program)
    assert records[0].undone and records[0].undone.startswith("left out: a plug-in of faster-relu 1.2 that failed") and HOW[how] in records[0].undone
    with pytest.raises(PassError) as error:
        Pipeline((Guest(how=how, origin=Origin("faster-relu 1.2")),)).run(program)
    assert "pass guest of faster-relu 1.2" in str(error.value) and HOW[how] in str(error.value)
    with pytest.raises(gw.GraphwrightError, match="faster-relu"):
        Pipeline((guest,), strict=True).run(program)


def test_optimizing_goes_on_without_a_plug_in_that_fails(installed):
    installed(Point("guest", lambda: register_pass(Guest, after="canonicalize")))
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4)
    fast = gw.optimize(model, x)
    (said,) = (w for w in fast.report.warnings if "guest" in w)
    assert said == "pass guest was left out: a plug-in of faster-relu 1.2 that failed (the pass failed: ValueError: no luck)"
    torch.testing.assert_close(fast(x), model(x))
    for asked in (["default", "guest"], [Guest()], Guest()):  # asked for, it is an error
        with pytest.raises(gw.GraphwrightError, match=r"pass guest of faster-relu 1\.2.*no luck"):
            gw.optimize(model, x, recipe=asked)


def test_a_plug_ins_numbers_that_are_wrong_are_undone_and_named(installed):
    class Spoil(gw.RewritePass):
        """Double."""

        name = "spoil"

        def pattern(self, op, x):
            return op.relu(x)

        def replace(self, op, x):
            return op.mul(op.relu(x), 2.0)

    installed(Point("spoil", lambda: register_pass(Spoil, stage="raise")))
    x = torch.randn(2, 4)
    fast = gw.optimize(nn.ReLU(), x)
    assert any("spoil was undone" in w and "a plug-in of faster-relu 1.2" in w for w in fast.report.warnings)
    torch.testing.assert_close(fast(x), x.relu())


def test_a_plug_in_that_writes_into_tensors_and_fails_is_an_error(installed, captured):
    @dataclass(frozen=True)
    class Vandal(Note):
        """Write into a parameter."""

        name = "vandal"

        def run(self, program: Program) -> PassResult:
            with torch.no_grad():
                next(iter(program.tensors().values())).zero_()
            raise ValueError("and gone")

    program = captured(nn.Linear(4, 3), torch.randn(2, 4))
    with pytest.raises(PassError, match="vandal of faster-relu 1.2.*wrote into the program's tensors"):
        Pipeline((Vandal(origin=Origin("faster-relu 1.2", asked=False)),)).run(program)


def test_a_plug_in_with_options_that_fit_no_model_or_without_calibration_breaks_nothing(installed):
    kind = make("picky", include=("encoder.*",), needs_calibration=True)
    installed(Point("picky", lambda: register_pass(kind, stage="fold")))
    assert "picky" in names()
    fast = gw.optimize(nn.Linear(4, 3), torch.randn(2, 4))
    assert not [w for w in fast.report.warnings if "picky" in w]
    with pytest.raises(gw.CalibrationError):
        gw.optimize(nn.Linear(4, 3), torch.randn(2, 4), "picky")


def test_plug_ins_that_cannot_be_loaded_or_registered_are_named_and_the_others_stay(installed):
    def half() -> None:
        register_pass(make("half-one", "faster_relu"), after="canonicalize")
        register_pass(make("half-two", "faster_relu"), after="no-such-pass")

    installed(
        Point("gone", ImportError("no module named gone"), "gone-lib"),
        Point("quits", SystemExit(3), "quits-lib"),
        Point("half", half, "half-lib"),
        Point("number", 42, "number-lib"),
        Point("lossy", lambda: register_pass(make("lossy", numerics=Lossy(10.0)), stage="fold"), "lossy-lib"),
        Point("good", make("good", "good_lib"), "good-lib"),
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert names() == [p.name for p in DEFAULT]
    said = [str(w.message) for w in seen]
    assert len(said) == 5
    for name, package, reason in (("gone", "gone-lib", "ImportError"), ("quits", "quits-lib", "SystemExit"), ("half", "half-lib", "no-such-pass"),
                                  ("number", "number-lib", "is a int"), ("lossy", "lossy-lib", "must not")):  # fmt: skip
        (line,) = (s for s in said if f"plug-in {name!r}" in s)
        assert f"of {package} 1.2 is left out" in line and reason in line
    assert set(pipeline._registry.added) == {"good"}  # half-one went with its plug-in
    assert pipeline.distributions() == {"good": "good-lib 1.2"}
    assert {b.name for b in pipeline.broken_plugins()} == {"gone", "quits", "number", "half", "lossy"}
    assert resolve("good")[0].origin == Origin("good-lib 1.2")
    with pytest.raises(RecipeError, match="no recipe or pass 'gone'\n.*gone-lib 1.2.*no module named gone"):
        resolve("gone")


def test_a_plug_in_may_name_a_pass_of_one_that_is_loaded_later(installed):
    installed(
        Point("second", lambda: register_pass(make("second", "b_lib"), after="first"), "b-lib"),
        Point("first", lambda: register_pass(make("first", "a_lib"), after="canonicalize"), "a-lib"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names()[:3] == ["canonicalize", "first", "second"]
    assert pipeline.distributions() == {"first": "a-lib 1.2", "second": "b-lib 1.2"}


def test_a_plug_in_that_was_imported_before_is_known_by_its_package(installed):
    kind = make("early", "faster_relu.passes")
    register_pass(kind, after="canonicalize")
    installed(Point("early", kind, value="faster_relu.passes:early"))
    assert names()[1] == "early" and pipeline.distributions() == {"early": "faster-relu 1.2"}


def test_plug_ins_are_listed_with_their_package(installed):
    from typer.testing import CliRunner

    from graphwright.cli import app

    installed(Point("gone", ImportError("no module named gone"), "gone-lib"),
              Point("here", lambda: register_pass(make("here", "faster_relu"), stage="fold")))  # fmt: skip
    with pytest.warns(UserWarning, match="gone-lib"):
        text = CliRunner().invoke(app, ["passes"], env={"COLUMNS": "200"}).output
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "here faster-relu 1.2 in the default pipeline, stage fold" in lines
    assert any(line.startswith("gone gone-lib 1.2 left out, it could not be loaded: ImportError") for line in lines)
    assert any(line.startswith("here fold exact One of several.") for line in lines)
    assert "a plug-in of faster-relu 1.2" in CliRunner().invoke(app, ["passes", "here"], env={"COLUMNS": "200"}).output
