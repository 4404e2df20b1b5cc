"""What follows from rows: axes of reshapes, roles of a weight's dimensions, where channels go."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from graphwright.capture import capture
from graphwright.errors import InternalError
from graphwright.ir import Program, op_name
from graphwright.ops import facts
from graphwright.ops.axes import parse, regroup, sizes, total
from graphwright.ops.facts import Place


class Calls(nn.Module):
    """A function as a model, with weights."""

    def __init__(self, function: Any, *weights: Tensor):
        super().__init__()
        self.function, self.w = function, nn.ParameterList(weights)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *self.w)


def captured(function: Any, inputs: tuple[Tensor, ...], *weights: Tensor, **options: Any) -> Program:
    program = capture(Calls(function, *weights).eval(), inputs, **options).program
    assert program is not None
    return program


def node(program: Program, name: str, which: int = 0) -> Any:
    return [n for n in program.nodes if n.op == "call_function" and op_name(n.target) == name][which]


def only(name: str, function: Any, inputs: tuple[Tensor, ...], *weights: Tensor) -> Any:
    return node(captured(function, inputs, *weights), name)


# -- reshapes --------------------------------------------------------------------------------------------------------


@st.composite
def groupings(draw: Any) -> tuple[list[int], list[int]]:
    """Two shapes that group the same factors."""
    factors = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))

    def shape() -> list[int]:
        cuts = sorted(draw(st.sets(st.integers(0, len(factors)), max_size=4)) | {0, len(factors)})
        return [prod(factors[a:b]) for a, b in pairwise(cuts)]

    return shape(), shape()


@settings(max_examples=200, deadline=None)
@given(groupings())
def test_regroup_finds_the_common_factors(shapes: tuple[list[int], list[int]]) -> None:
    old, new = shapes
    found = parse(regroup(old, new), [old], [new])
    known = sizes(found, [old], [new])
    left, right = ([a for d in dims or () for a in d.atoms if a != "1"] for dims in (found.inputs[0], found.outputs[0]))
    assert left == right and not found.whole
    assert [total(d, known) for d in found.outputs[0]] == new
    assert [total(d, known) for d in found.inputs[0] or ()] == old


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=4), st.lists(st.integers(0, 6), max_size=4))
def test_regroup_of_any_two_shapes_is_consistent(old: list[int], new: list[int]) -> None:
    """Shapes with no common boundary, zeros, and even shapes of different length: never a contradiction."""
    if prod(old) != prod(new):
        return
    found = parse(regroup(old, new), [old], [new])
    known = sizes(found, [old], [new])
    assert all(total(d, known) in (n, None) for d, n in zip(found.outputs[0], new, strict=True))


def test_regroup_of_symbolic_sizes_adds_no_guard() -> None:
    env = ShapeEnv()
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    b, t, _ = FakeTensorMode(shape_env=env).from_tensor(torch.zeros(3, 7, 32), symbolic_context=context).shape
    assert regroup((b, t, 32), (b, t, 4, 8)) == "a0 a1 (a2 a3) -> a0 a1 a2 a3"
    assert regroup((b * t, 32), (b, t, 32)) == "(a0 a1) a2 -> a0 a1 a2"
    assert regroup((b, t, 4, 8), (b * t * 4, 8)) == "a0 a1 a2 a3 -> (a0 a1 a2) a3"
    assert not env.guards


def test_regroup_says_where_no_factor_is_common() -> None:
    assert regroup((2, 6, 4, 5), (2, 8, 3, 5)) == "a0 [a1] [a3] a5 -> a0 a2 a4 a5"
    assert regroup((1, 6), (6, 1)) == "1 a0 -> a0 1"


@pytest.mark.parametrize("text", ["a (b", "a) b", "a ((b) c)", "a b%", "a -> b -> c"])
def test_malformed_spellings_are_refused(text: str) -> None:
    with pytest.raises(InternalError):
        parse(f"{text} -> a", [(2, 3)], [(2,)])


def test_spellings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InternalError, match="does not fit"):
        parse("a b -> a", [(2, 3, 4)], [(2,)])
    with pytest.raises(InternalError, match="do not spell"):
        parse("a b -> a", [(2, 3), (4,)], [(2,)])
    with pytest.raises(InternalError, match="comes to"):
        sizes(parse("a b -> b a", [(2, 3)], [(2, 3)]), [(2, 3)], [(2, 3)])


# -- weights ---------------------------------------------------------------------------------------------------------


def r(*shape: int) -> Tensor:
    return torch.randn(shape)


WEIGHTS = {
    "linear": ("aten.linear", F.linear, (r(2, 3, 4),), r(5, 4), "weight", 0, (1,), True),
    "conv1d": ("aten.conv1d", F.conv1d, (r(2, 4, 9),), r(5, 4, 3), "weight", 0, (1, 2), True),
    "conv2d": ("aten.conv2d", F.conv2d, (r(2, 4, 9, 9),), r(5, 4, 3, 2), "weight", 0, (1, 2, 3), True),
    "conv2d grouped": (
        "aten.conv2d",
        lambda x, w: F.conv2d(x, w, groups=2),
        (r(2, 4, 9, 9),),
        r(6, 2, 3, 2),
        "weight",
        0,
        (1, 2, 3),
        False,
    ),
    "conv2d depthwise": (
        "aten.conv2d",
        lambda x, w: F.conv2d(x, w, groups=4),
        (r(2, 4, 9, 9),),
        r(4, 1, 3, 3),
        "weight",
        0,
        (1, 2, 3),
        False,
    ),
    "conv_transpose2d": (
        "aten.conv_transpose2d.input",
        F.conv_transpose2d,
        (r(2, 4, 9, 9),),
        r(4, 5, 3, 2),
        "weight",
        1,
        (0, 2, 3),
        True,
    ),
    "right factor": ("aten.matmul", torch.matmul, (r(2, 3, 4),), r(4, 5), "other", 1, (0,), True),
    "left factor": ("aten.matmul", lambda x, w: w @ x, (r(4, 3),), r(5, 4), "self", 0, (1,), True),
    "addmm": ("aten.addmm", lambda x, w: torch.addmm(torch.ones(5), x, w), (r(3, 4),), r(4, 5), "mat2", 1, (0,), True),
    "stack": ("aten.bmm", torch.bmm, (r(2, 3, 4),), r(2, 4, 5), "mat2", 2, (1,), False),
    "embedding": (
        "aten.embedding",
        lambda i, w: F.embedding(i, w),
        (torch.tensor([[1, 2], [3, 4]]),),
        r(9, 4),
        "weight",
        0,
        (),
        False,
    ),
    "layer_norm": (
        "aten.layer_norm",
        lambda x, w: F.layer_norm(x, (4,), w),
        (r(3, 4),),
        r(4),
        "weight",
        None,
        (),
        False,
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_roles_of_a_weights_dimensions(case: str) -> None:
    name, function, inputs, weight, operand, channel, summed, splits = WEIGHTS[case]
    found = only(name, function, inputs, weight)
    assert facts.channel_dim(found, operand) == channel
    assert facts.contraction_dims(found, operand) == summed
    assert facts.low_rank_dims(found, operand) == (((channel,), summed) if splits else None)


def test_no_facts_where_there_is_no_row_or_no_such_operand() -> None:
    found = only("aten.nonzero", torch.nonzero, (r(3, 4),))
    assert facts.axes_of(found) is None and facts.places(found) == {} and facts.sizes_of(found) == {}
    assert facts.channel_dim(found) is None and facts.flops(found) == 0
    linear = only("aten.linear", F.linear, (r(2, 4),), r(5, 4))
    assert facts.channel_dim(linear, "bias") is None and facts.contraction_dims(linear, "nothing") == ()


# -- where channels go -----------------------------------------------------------------------------------------------


def self_attention(x: Tensor, w: Tensor) -> Tensor:
    b, t, d = x.shape
    q, k, v = (y.view(b, t, 4, d // 4).transpose(1, 2) for y in F.linear(x, w).chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)


def test_heads_are_followed_from_the_projection_to_the_output() -> None:
    program = captured(self_attention, (r(2, 5, 16),), r(48, 16))
    chunk = facts.axes_of(node(program, "aten.chunk"))
    assert chunk is not None and chunk.inputs[0] is not None
    assert chunk.inputs[0][2].joined and len(chunk.inputs[0][2].atoms) == 3
    split = facts.places(node(program, "aten.reshape"))
    head, inner = [a for a, p in split.items() if p[0].dim == 2]
    assert split[head] == [Place("self", 2, 0), Place("out.0", 2, 0)]
    assert split[inner] == [Place("self", 2, 1), Place("out.0", 3, 0)]
    assert facts.sizes_of(node(program, "aten.reshape"))[head] == 4
    product = facts.axes_of(node(program, "aten.scaled_dot_product_attention"))
    assert product is not None and product.summed == {"d", "k"}
    merged = facts.axes_of(node(program, "aten.reshape", 3))
    assert merged is not None and len(merged.outputs[0][2].atoms) == 2


def test_depthwise_convolution_ties_its_channels() -> None:
    found = only("aten.conv2d", lambda x, w: F.conv2d(x, w, groups=4), (r(2, 4, 9, 9),), r(8, 1, 3, 3))
    assert facts.places(found)["g"] == [Place("input", 1, 0), Place("weight", 0, 0), Place("out.0", 1, 0)]
    assert facts.places(found)["s0"] == [Place("input", 2, 0), Place("out.0", 2, 0)]
    assert facts.sizes_of(found)["g"] == 4 and facts.sizes_of(found)["o"] == 2


def test_norms_and_softmax_handle_axes_whole() -> None:
    norm = facts.axes_of(only("aten.layer_norm", lambda x, w: F.layer_norm(x, (4,), w), (r(3, 4),), r(4)))
    soft = facts.axes_of(only("aten.softmax.int", lambda x: x.softmax(1), (r(3, 4, 5),)))
    group = facts.axes_of(only("aten.group_norm", lambda x: F.group_norm(x, 2), (r(3, 4, 5),)))
    batch = facts.axes_of(only("aten.batch_norm", F.batch_norm, (r(3, 4, 5), r(4), r(4).abs())))
    assert norm is not None and norm.whole == {"d0"}
    assert soft is not None and soft.whole == {"a1"}
    assert group is not None and group.whole == {"c", "*0"}
    assert batch is not None and batch.whole == set()


def test_dynamic_sizes_stay_symbolic() -> None:
    program = captured(self_attention, (r(2, 5, 16),), r(48, 16), dynamic="auto")
    known = facts.sizes_of(node(program, "aten.linear"))
    assert known["i"] == 16 and known["o"] == 48 and isinstance(known["*1"], torch.SymInt)
    view = facts.axes_of(node(program, "aten.reshape"))
    assert view is not None and not view.whole and [len(d.atoms) for d in view.inputs[0] or ()] == [1, 1, 2]
