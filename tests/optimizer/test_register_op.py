"""Ops from outside: defined or described, captured, matched, saved and loaded; what is refused and why."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright import cost, ops
from graphwright.errors import InputError, LoadError, RecipeError, SaveError
from graphwright.manager import Pipeline
from graphwright.ops import registry
from graphwright.ops.extend import unregister_op
from graphwright.passes.common_subexpressions import CommonSubexpressions


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    for row in ops.rows():
        if row.owner:
            unregister_op(row.name)


def softsign(x: Tensor, scale: float = 1.0) -> Tensor:
    """A scaled softsign."""
    return scale * x / (1 + x.abs())


def affine(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x times the transposed w, and b."""
    return torch.nn.functional.linear(x, w, b)


class Model(nn.Module):
    def __init__(self, op) -> None:
        super().__init__()
        self.op, self.linear = op, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.linear(x), 2.0)


def captured(model: nn.Module, *args: Tensor) -> gw.Program:
    from graphwright.capture import capture

    program = capture(model.eval(), args, {}).program
    assert program is not None
    program.example = args
    return program


def test_an_op_of_ones_own_is_defined_from_its_reference():
    op = gw.register_op("gwtest.softsign", traits={"elementwise"})(softsign)
    assert op is torch.ops.gwtest.softsign
    row = ops.row(op.default)
    assert row.name == "gwtest.softsign" and row.owner == __name__ and row.summary == "A scaled softsign."
    x = torch.randn(3, 4, requires_grad=True)
    torch.testing.assert_close(op(x, 3.0), softsign(x, 3.0))
    torch.autograd.gradcheck(lambda v: op(v, 3.0), x.detach().double().requires_grad_())
    program = captured(Model(op), torch.randn(2, 8))
    (node,) = (n for n in program.nodes if n.target is op.default)
    found = cost.cost(node)
    assert (found.flops, found.read, found.written) == (16, 64, 64) and node.args[1] == 2.0
    assert "gwtest.softsign" in program.text()


def test_axes_and_flops_of_ones_own():
    op = gw.register_op("gwtest.affine", axes="* i, o i, o -> * o", traits={"contraction"})(affine)
    program = captured(type("M", (nn.Module,), {"forward": lambda self, x, w: op(x, w)})(), torch.randn(2, 8), torch.randn(3, 8))
    assert cost.cost(program.nodes[-1]).flops == 2 * 2 * 3 * 8
    unregister_op("gwtest.affine")
    op = gw.register_op("gwtest.affine", flops=lambda args, out: 7 * out.numel())(affine)
    program = captured(type("M", (nn.Module,), {"forward": lambda self, x, w: op(x, w)})(), torch.randn(2, 8), torch.randn(3, 8))
    assert cost.cost(program.nodes[-1]).flops == 42


def test_a_spelling_that_does_not_fit_is_the_authors_affair():
    op = gw.register_op("gwtest.affine", axes="i, o i, o -> o", traits={"contraction"})(affine)
    program = captured(type("M", (nn.Module,), {"forward": lambda self, x, w: op(x, w)})(), torch.randn(2, 8), torch.randn(3, 8))
    with pytest.raises(InputError, match=rf"register_op\('gwtest.affine', axes=...\) in {__name__}: a tensor with 2 axes does not fit"):
        cost.cost(program.nodes[-1])


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    """An op of another library: no shape rule, and computed on no device but by what is registered."""
    made = torch.library.Library("gwother", "FRAGMENT")
    made.define("softsign(Tensor x, float scale=1.0) -> Tensor")
    made.define("into(Tensor(a!) x) -> Tensor")
    yield made
    made._destroy()


def test_an_op_of_another_library_gets_a_row_and_what_it_lacks(library):
    op = gw.register_op("gwother::softsign")(softsign)
    assert op is torch.ops.gwother.softsign and ops.row(op.default).owner == __name__
    x = torch.randn(2, 8)
    torch.testing.assert_close(op(x, 2.0), softsign(x, 2.0))
    fast = gw.optimize(Model(op).eval(), x)
    assert any(r.op == "gwother.softsign" and r.flops == 16 for r in fast.report.sites)


def test_an_op_of_another_library_keeps_what_it_has():
    @torch.library.custom_op("gwcustom::halve", mutates_args=())
    def halve(x: Tensor) -> Tensor:
        return x * 0.5

    @halve.register_fake
    def _(x):
        return torch.empty_like(x)

    calls = []

    def reference(x):
        calls.append(1)
        return x / 2

    op = gw.register_op("gwcustom.halve", traits=["elementwise"])(reference)
    program = captured(type("M", (nn.Module,), {"forward": lambda self, x: op(x)})(), torch.randn(2, 8))
    program(torch.randn(2, 8))
    assert [n.target for n in program.nodes] == [op.default] and not calls
    assert ops.row(op.default).reference is reference


def test_an_op_of_another_library_without_a_shape_rule_gets_the_reference_for_it():
    @torch.library.custom_op("gwcustom::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)

    op = gw.register_op("gwcustom.twice")(lambda x: x * 2)
    program = captured(type("M", (nn.Module,), {"forward": lambda self, x: op(x)})(), torch.randn(2, 8))
    assert [n.target for n in program.nodes] == [op.default]


def test_a_reference_that_leaves_torch_is_told_about_fake():
    @gw.register_op("gwtest.outside")
    def outside(x: Tensor) -> Tensor:
        """Leaves torch."""
        return torch.from_numpy(x.numpy() * 2)

    model, x = type("M", (nn.Module,), {"forward": lambda self, x: outside(x) + 1})(), torch.randn(2, 8)
    fast = gw.optimize(model, x)
    assert any("pass fake= to gw.register_op" in r.what for r in fast.report.regions)
    torch.testing.assert_close(fast(x), x * 2 + 1)


def test_patterns_match_it_and_put_it_in():
    op = gw.register_op("gwtest.softsign", traits={"elementwise"})(softsign)

    class Written(gw.RewritePass):
        """Replace x / (1 + abs(x)) by softsign."""

        name = "written"

        def pattern(self, op, x):
            return x / (op.abs(x) + 1)

        def replace(self, op, x):
            return op.gwtest.softsign(x)

    class Twice(gw.RewritePass):
        """Replace softsign(relu(x)) by relu(softsign(x))."""

        name = "twice"

        def pattern(self, op, x):
            return op.gwtest.softsign(op.relu(x))

        def replace(self, op, x):
            return op.relu(op.gwtest.softsign(x))

    program = captured(type("M", (nn.Module,), {"forward": lambda self, x: torch.relu(x) / (torch.relu(x).abs() + 1)})(), torch.randn(2, 8))
    after, records = Pipeline((CommonSubexpressions(), Written(), Twice()), strict=True).run(program)
    assert [n.target for n in after.nodes] == [op.default, torch.ops.aten.relu.default]
    assert all(r.result.changes for r in records)


@pytest.mark.parametrize(("name", "words"), [("reluu", "no op aten.reluu.*\n.*'relu'"), ("nowhere.op", "Import the package that defines it"), ("add.Tensor.out", "there is no op add.Tensor.out")])
def test_a_pattern_with_an_op_that_does_not_exist(name, words):
    class Bad(gw.RewritePass):
        """Bad."""

        name = "bad"

        def pattern(self, op, x):
            for part in name.split("."):
                op = getattr(op, part)
            return op(x)

    with pytest.raises(RecipeError, match=words):
        Bad().run(captured(nn.ReLU(), torch.randn(2)))


def test_a_commutative_op_fits_both_ways():
    op = gw.register_op("gwtest.larger", traits={"commutative", "elementwise"})(lambda_hinted)

    class Fuse(gw.RewritePass):
        """Larger of relu and anything."""

        name = "fuse"

        def pattern(self, op, x, y):
            return op.gwtest.larger(op.relu(x), y)

        def replace(self, op, x, y):
            return op.gwtest.larger(y, op.relu(x))

    program = captured(type("M", (nn.Module,), {"forward": lambda self, x, y: op(y, torch.relu(x))})(), torch.randn(2), torch.randn(2))
    assert Fuse().run(program).modified


def lambda_hinted(a: Tensor, b: Tensor) -> Tensor:
    """The larger of two."""
    return torch.maximum(a, b)


# -- files -----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_here_and_refused_where_it_is_unknown(tmp_path):
    op = gw.register_op("gwtest.softsign", traits={"elementwise"})(softsign)
    model, x, path = Model(op).eval(), torch.randn(2, 8), tmp_path / "m.gw"
    fast = gw.optimize(model, x)
    fast.save(path)
    assert torch.equal(gw.load(path)(x), fast(x))
    code = f"import graphwright as gw; gw.load({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode and f"needs the op 'gwtest.softsign', which is not registered in this process\n  First import {__name__}" in done.stderr
    unregister_op("gwtest.softsign")
    with pytest.raises(LoadError, match=r"gwtest\.softsign"):
        gw.load(path)
    gw.register_op("gwtest.softsign", traits={"elementwise"})(softsign)
    assert torch.equal(gw.load(path)(x), fast(x))


def test_an_op_without_a_row_is_told_how_to_get_one(tmp_path, library):
    library.define("plain(Tensor x, float scale=1.0) -> Tensor")
    library.impl("plain", softsign, "CompositeExplicitAutograd")
    fast = gw.optimize(Model(torch.ops.gwother.plain).eval(), torch.randn(2, 8))
    with pytest.raises(SaveError, match=r"gw\.register_op"):
        fast.save(tmp_path / "m.gw")


def test_what_a_file_says_it_needs_is_shown_only_if_it_is_plain():
    from graphwright.store.foreign import require

    for wanted in ({"a.b": ["os; rm", ""]}, {"a.b": 3}, {"\x1b[31m.x": ["m", "d"]}, {"a.b": ["x" * 500, "y\n"]}):
        with pytest.raises(LoadError) as error:
            require(wanted, "file")
        text = str(error.value)
        assert "rm" not in text and "\x1b" not in text and "xxx" not in text and "y\n" not in text
    require({}, "file"), require(None, "file"), require([], "file")
    require({"aten.relu": ["m", ""]}, "file")


# -- refused ---------------------------------------------------------------------------------------------------------


def untyped(x):
    return x


@pytest.mark.parametrize(
    ("name", "options", "body", "words"),
    [
        ("softsign", {}, softsign, "is no name of an op"),
        (3, {}, softsign, "is no name of an op"),
        ("graphwright.softsign", {}, softsign, "taken by Graphwright itself"),
        ("aten.softsignn", {}, softsign, "has no op aten.softsignn"),
        ("aten.relu", {}, softsign, "has a row already: it is one of Graphwright's own\n.*register_kernel"),
        ("aten.relu_", {}, softsign, "writes into its arguments"),
        ("aten.relu", {"overload": "other"}, softsign, "no overload 'other'\n.*It has default, out"),
        ("gwtest.a", {"traits": {"elementwis"}}, softsign, "did you mean 'elementwise'"),
        ("gwtest.bb", {"axes": "* -> *, *"}, softsign, "spell 1 arguments and 2 results"),
        ("gwtest.c", {"axes": "(* -> *"}, softsign, "brackets do not match"),
        ("gwtest.d", {"axes": 4}, softsign, "spells no axes"),
        ("gwtest.e", {}, untyped, "no op can be made of 'untyped'"),
        ("gwtest.f", {}, 42, "is no function"),
        ("aten.cosine_embedding_loss", {}, softsign, r"the reference takes \(x, scale\), the op takes \(input1, input2"),
    ],
)
def test_refusals(name, options, body, words):
    before = registry._ROWS.copy()
    with pytest.raises(InputError, match=words):
        gw.register_op(name, **options)(body)
    assert before == registry._ROWS


def test_again_by_the_same_package_replaces_and_by_another_clashes():
    first = gw.register_op("gwtest.softsign")(softsign)

    def again(x: Tensor, scale: float = 2.0) -> Tensor:
        return scale * x

    second = gw.register_op("gwtest.softsign")(again)
    assert first is second is torch.ops.gwtest.softsign and first.default is torch.ops.gwtest.softsign.default
    assert float(second(torch.ones(()))) == 2.0 == float(first(torch.ones(()))) and len([r for r in ops.rows() if r.name == "gwtest.softsign"]) == 1
    def theirs(x: Tensor, scale: float = 2.0) -> Tensor:
        return x

    theirs.__module__ = "theirs.ops"
    with pytest.raises(InputError, match=rf"has a row already, registered by {__name__}"):
        gw.register_op("gwtest.softsign")(theirs)
