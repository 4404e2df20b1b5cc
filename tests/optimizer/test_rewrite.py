"""Patterns: what they find, what they refuse, what they leave behind."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from graphwright.capture import capture
from graphwright.errors import InternalError
from graphwright.ir import Program, op_name
from graphwright.manager import Pipeline
from graphwright.rewrite import RewritePass

X = torch.tensor([[-1.0, 2.0], [3.0, -4.0]])


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def program(function, *args) -> Program:
    args = args or (X,)
    found = capture(Function(function), args).program
    found.example = args
    return found


def apply(p, prog):
    after, (record,) = Pipeline((p,), strict=True).run(prog)
    return [op_name(n.target) for n in after.nodes], record.result


@dataclass(frozen=True)
class SquaredRelu(RewritePass):
    """Replace relu(x) * relu(x)."""

    name = "squared-relu"

    def pattern(self, op, x):
        return op.relu(x) * op.relu(x)

    def check(self, match):
        return None if match.val("x").dtype == torch.float32 else f"x is {match.val('x').dtype}"

    def replace(self, op, x):
        return op.square(op.relu(x))


def test_a_pattern_is_found_and_replaced():
    ops, result = apply(SquaredRelu(), program(lambda x: torch.relu(x) * torch.relu(x)))
    assert ops == ["aten.relu", "aten.square"]
    assert [what for _, what in result.changes] == ["relu + relu + mul → aten.square"]
    assert result.modified and not result.refusals


def test_one_node_may_stand_for_both_sides():
    def f(x):
        y = torch.relu(x)
        return y * y

    ops, _ = apply(SquaredRelu(), program(f))
    assert ops == ["aten.relu", "aten.square"]


def test_a_wildcard_stands_for_one_thing():
    ops, result = apply(SquaredRelu(), program(lambda x, y: torch.relu(x) * torch.relu(y), X, X + 1))
    assert ops == ["aten.relu", "aten.relu", "aten.mul.Tensor"]
    assert not result.modified and not result.refusals


def test_check_refuses_with_its_reason():
    _, result = apply(SquaredRelu(), program(lambda x: torch.relu(x) * torch.relu(x), X.double()))
    assert result.refusals == [("mul", "x is torch.float64")]


def test_a_value_read_outside_is_left_alone_with_the_reader_named():
    def f(x):
        y = torch.relu(x)
        return y * y, y.exp()

    ops, result = apply(SquaredRelu(), program(f))
    assert "aten.mul.Tensor" in ops
    assert result.refusals == [("mul", "relu is read by exp too")]


def test_an_output_counts_as_a_reader():
    def f(x):
        y = torch.relu(x)
        return y * y, y

    _, result = apply(SquaredRelu(), program(f))
    assert result.refusals == [("mul", "relu is read by output too")]


@pytest.mark.parametrize(("option", "value", "changed"), [("include", ("nothing*", "mul"), True), ("exclude", ("mul",), False)])
def test_include_and_exclude(option, value, changed):
    prog = program(lambda x: (torch.relu(x) * torch.relu(x)).exp())
    if option == "include":
        value = ("mul",)
    _, result = apply(SquaredRelu(**{option: value}), prog)
    assert result.modified == changed
    assert result.refusals == ([] if changed else [("mul", "left out by include / exclude")])


@dataclass(frozen=True)
class AddOfProduct(RewritePass):
    """x * y + z in any order, z no product."""

    name = "add-of-product"

    def pattern(self, op, x, y, z):
        return x * y + z

    def check(self, match):
        z = match["z"]
        return "z is a product" if op_name(z.target).startswith("aten.mul") else None

    def replace(self, op, x, y, z):
        return op.addcmul(z, x, y)


@pytest.mark.parametrize("f", [lambda x, y: x * y + y.exp(), lambda x, y: y.exp() + x * y])
def test_sums_and_products_fit_in_any_order(f):
    ops, _ = apply(AddOfProduct(), program(f, X, X + 1))
    assert ops == ["aten.exp", "aten.addcmul"]


def test_every_order_is_tried_before_a_match_is_refused():
    @dataclass(frozen=True)
    class Later(AddOfProduct):
        def check(self, match):
            return None if "exp" in op_name(match["x"].target) else "x is no exp"

    ops, result = apply(Later(), program(lambda x, y: (y * x.exp()) + y.sin(), X, X + 1))
    assert "aten.addcmul" in ops and not result.refusals


def test_a_sum_with_alpha_is_no_plain_sum():
    ops, _ = apply(AddOfProduct(), program(lambda x, y: torch.add(y.exp(), x * y, alpha=2), X, X + 1))
    assert "aten.addcmul" not in ops


@dataclass(frozen=True)
class Numbers(RewritePass):
    """clamp(x, 0, 6): numbers in patterns are compared, missing arguments match anything."""

    name = "numbers"

    def pattern(self, op, x):
        return op.clamp(x, 0, 6), op.hardtanh(x, min_val=0.0)

    def replace(self, op, x):
        return op.relu6(x)


@pytest.mark.parametrize(
    ("f", "fits"),
    [
        (lambda x: x.clamp(0, 6), True),
        (lambda x: x.clamp(0, 5), False),
        (lambda x: x.clamp(0), False),
        (lambda x: torch.nn.functional.hardtanh(x, 0.0, 6.0), True),
        (lambda x: torch.nn.functional.hardtanh(x, -1.0, 6.0), False),
    ],
)
def test_numbers_keywords_and_alternatives(f, fits):
    ops, _ = apply(Numbers(), program(f))
    assert (ops == ["aten.relu6"]) == fits


@dataclass(frozen=True)
class DropNeg(RewritePass):
    """A replacement may be one of the wildcards."""

    name = "drop-double-neg"

    def pattern(self, op, x):
        return op.neg(op.neg(x))

    def replace(self, op, x):
        return x


def test_a_replacement_may_be_what_was_matched():
    ops, result = apply(DropNeg(), program(lambda x: x.neg().neg().exp()))
    assert ops == ["aten.exp"] and result.modified


def test_nothing_found_changes_nothing_even_beside_dead_code():
    prog = program(lambda x: x.exp())
    with prog.graph.inserting_before(prog.output):
        prog.call(torch.ops.aten.sin.default, prog.placeholders[0], sites=["dead"])
    ops, result = apply(DropNeg(), prog)
    assert ops == ["aten.exp", "aten.sin"] and not result.modified


@dataclass(frozen=True)
class NewTensor(RewritePass):
    """Replace exp(x) by x plus a constant."""

    name = "new-tensor"

    def pattern(self, op, x):
        return op.exp(x)

    def replace(self, op, x):
        return op.add(x, op.tensor("added", torch.ones(2)))


def test_a_replacement_may_bring_constants():
    prog = program(lambda x: x.exp() * 0)
    after, _ = Pipeline((NewTensor(),), strict=True).run(prog)
    assert list(after.tensors()) == ["added"]


def test_our_own_ops_are_named_by_their_namespace():
    @dataclass(frozen=True)
    class Ours(RewritePass):
        name = "ours"

        def pattern(self, op, x, w, b):
            return op.linear(x, w, b)

        def replace(self, op, x, w, b):
            return op.graphwright.linear(x, w, b, None, "none", [])

    found = capture(nn.Linear(2, 3).eval(), (X,)).program
    found.example = (X,)
    ops, _ = apply(Ours(), found)
    assert ops == ["graphwright.linear"]


def test_impossible_replacements_say_so():
    @dataclass(frozen=True)
    class Bad(DropNeg):
        def replace(self, op, x):
            return op.linear(x, x, x, x)

    with pytest.raises(InternalError, match="no overload"):
        Bad().run(program(lambda x: x.neg().neg()))


def test_a_pass_without_pattern_says_so():
    @dataclass(frozen=True)
    class Empty(RewritePass):
        name = "empty"

    with pytest.raises(InternalError, match="has no pattern"):
        Empty().run(program(lambda x: x.exp()))
