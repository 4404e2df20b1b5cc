"""Which ops and values of a program are quantized: a decision over the graph alone, before any number is looked at.

Anchors are matrix ops with constant weights. Their inputs are quantized, and from there the wish travels backwards
through ops that integers can flow through (pooling, concatenation, views, adds of convolutions) as far as every
operand of such an op comes from a quantized op too. Where it stops, the value is quantized from float.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from graphwright import ops
from graphwright.ir import Program, arg, args_by_name, op_name
from graphwright.ops import CONTRACTION, QUANT, VIEW
from graphwright.ops.facts import channel_dim

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_MAX_POOLS = {"aten.max_pool1d", "aten.max_pool2d", "aten.max_pool3d"}
_PADS = {"aten.constant_pad_nd", "aten.pad"}
_COPIES = {"aten.cat", "aten.upsample_nearest1d.vec", "aten.upsample_nearest2d.vec", "aten.upsample_nearest3d.vec"}
#: Ops that integers flow through with a scale of their own on the output.
_RESCALING = {
    "aten.relu", "aten.relu6", "aten.hardtanh", "aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d",
    "aten.adaptive_avg_pool1d", "aten.adaptive_avg_pool2d", "aten.adaptive_avg_pool3d", "aten.mean.dim",
    "aten.upsample_bilinear2d.vec", "aten.add.Tensor", "aten.mul.Tensor",
}  # fmt: skip


@dataclass(frozen=True)
class Anchor:
    """A matrix op with a constant weight, or a look-up in one.

    Attributes:
        node: the op; source: the value it reads; weight: the ``get_attr`` node of its weight.
        axis: the weight's axis of output channels.
        reads, other: names of the arguments that hold the input and, where there is one, the residual operand.
        conv: whether it is a convolution.
    """

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    axis: int
    reads: str
    other: str | None
    conv: bool

    @property
    def table(self) -> bool:
        """Whether it is a look-up in the weight, which multiplies nothing."""
        return self.source is self.weight


@dataclass
class Plan:
    """What is to be quantized.

    Attributes:
        anchors: matrix ops to quantize.
        values: values that get a quantize/dequantize pair, in graph order.
        flow: ops between them that read their float inputs through the pairs too.
        others: anchors whose residual operand is read through its pair.
        shared: pairs ``(value, value)`` that should have the same scale and zero point.
        conv: values made by convolutions (or by flow between them, or inputs of the program) and read by no linear.
    """

    anchors: list[Anchor]
    values: list[fx.Node] = field(default_factory=list)
    flow: list[fx.Node] = field(default_factory=list)
    others: list[Anchor] = field(default_factory=list)
    shared: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    conv: set[fx.Node] = field(default_factory=set)


# -- anchors ---------------------------------------------------------------------------------------------------------


def is_matrix_op(node: fx.Node) -> bool:
    row = ops.row(node.target)
    return row is not None and CONTRACTION in row.traits


def is_table(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.embedding.default


def is_attention(node: fx.Node) -> bool:
    return node.target in (torch.ops.graphwright.attention.default, torch.ops.aten.scaled_dot_product_attention.default)


def attention_unfit(node: fx.Node) -> str | None:
    """None, or why the products of an attention op can't be rounded."""
    args = args_by_name(node)
    tensors = [args[k].meta["val"] for k in ("query", "key", "value")]
    if any(t.dim() != 4 or t.dtype not in (FLOATS if t.device.type == "cuda" else (torch.float32,)) for t in tensors):
        return "int8 products inside attention need tensors with 4 axes, of float32 or, on a GPU, of a shorter float"
    if args.get("dropout_p"):
        return "it drops probabilities at random"
    return None


def find_anchor(program: Program, node: fx.Node) -> Anchor | str:
    """The anchor that a matrix op is, or the reason why it is none."""
    args = args_by_name(node)
    if "weight" not in args or not isinstance(args["weight"], fx.Node):
        return "both operands are computed at run time; only a constant weight is quantized"
    weight, reads = args["weight"], next(iter(args))
    if is_dequantize(weight):
        return "its weight is quantized already"
    value = program.constant(weight)
    if value is None:
        return "its weight is computed at run time"
    source = args[reads]
    if not isinstance(source, fx.Node) or not isinstance(source.meta["val"], Tensor):
        return "its input is no tensor"
    dtypes = {source.meta["val"].dtype, value.dtype}
    if not dtypes <= set(FLOATS):
        return f"its dtype is {', '.join(sorted(str(d) for d in dtypes - set(FLOATS)))}; int8 replaces float32 and shorter floats"
    if value.numel() == 0:
        return "its weight is empty"
    if not all(bool(torch.isfinite(end)) for end in torch.aminmax(value)):  # faster than looking at each; NaN wins
        return "its weight holds NaN or infinity"
    axis = channel_dim(node)
    if axis is None:
        return "the op table does not say which axis of its weight holds the output channels"
    other = "other" if isinstance(args.get("other"), fx.Node) else None
    return Anchor(node, source, weight, axis, reads, other, conv="conv" in op_name(node.target))


def is_dequantize(value: Any) -> bool:
    row = ops.row(value.target) if isinstance(value, fx.Node) and value.op == "call_function" else None
    return row is not None and QUANT in row.traits


def pair_of(value: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The quantize and the dequantize that an earlier run of the pass put behind a value."""
    for q in value.users:
        if q.target is torch.ops.graphwright.quantize.default:
            for real in q.users:
                if real.target is torch.ops.graphwright.dequantize.default:
                    return q, real
    return None


# -- flow ------------------------------------------------------------------------------------------------------------


def float_inputs(node: fx.Node) -> list[fx.Node]:
    """The floating tensors that a node reads, each once, constants included."""
    return [n for n in node.all_input_nodes if isinstance(v := n.meta.get("val"), Tensor) and v.is_floating_point()]


def shares_scale(node: fx.Node) -> bool:
    """Whether the op's results are numbers of its inputs, or zeros: integers pass through it unchanged."""
    if not isinstance(node.target, OpOverload) or not isinstance(node.meta.get("val"), Tensor):
        return False
    name, row = op_name(node.target), ops.row(node.target)
    if name in _PADS:
        args = args_by_name(node)
        return args.get("mode", "constant") != "constant" or not args.get("value")
    known = name in _MAX_POOLS or name in _COPIES or (row is not None and VIEW in row.traits)
    sources = float_inputs(node)
    return known and bool(sources) and all(s.meta["val"].dtype == node.meta["val"].dtype for s in sources)


def rescales(node: fx.Node) -> bool:
    """Whether integers flow through the op with a new scale."""
    if node.op != "call_function" or op_name(node.target) not in _RESCALING or len(node.all_input_nodes) != len(float_inputs(node)):
        return False
    return all(s.meta["val"].dtype == node.meta["val"].dtype for s in float_inputs(node))


def plan(anchors: Iterable[Anchor], order: Iterable[fx.Node], residual: str, barred: Collection[fx.Node] = ()) -> Plan:
    """Decide what is quantized.

    Args:
        order: all nodes in graph order.
        residual: ``"auto"``, ``"float"`` or ``"int8"``: how adds, products and means read their operands; ``"auto"``
            is int8 where all operands come from or go to convolutions.
        barred: values that have no scale.
    """
    anchors = list(anchors)
    made = {a.node: a for a in anchors}
    wanted = {a.source: True for a in anchors}
    for_conv = {a.source for a in anchors if a.conv}
    seen: dict[fx.Node, tuple[bool, bool]] = {}

    def origin(value: fx.Node) -> tuple[bool, bool]:
        """Whether the value is at hand in int8, and whether it belongs to convolutions."""
        if value not in seen:
            if value in barred:
                seen[value] = (False, False)
            elif value in made:
                seen[value] = (True, made[value].conv)
            elif shares_scale(value) or rescales(value):
                inner = [origin(s) for s in float_inputs(value)]
                conv = all(c for _, c in inner)
                seen[value] = (all(q for q, _ in inner) and (shares_scale(value) or mixes(inner)), conv)
            else:
                seen[value] = (pair_of(value) is not None, "conv" in op_name(value.target) if value.op == "call_function" else False)
            if value in wanted_by_anchor:
                seen[value] = (True, seen[value][1] or value in for_conv)
        return seen[value]

    def mixes(origins: list[tuple[bool, bool]]) -> bool:
        """Whether operands of these origins may be read as int8 by an add, a product or a mean."""
        if residual == "auto":
            return all(q and c for q, c in origins)
        return residual == "int8" and all(q for q, _ in origins)

    wanted_by_anchor = set(wanted)
    found = Plan(anchors)
    flow: dict[fx.Node, bool] = {}
    queue = list(wanted)
    for a in anchors:
        if a.other is not None:
            operand = arg(a.node, a.other)
            state = origin(operand)
            if mixes([state, (True, a.conv)]):
                found.others.append(a)
                queue.append(operand)
    while queue:
        value = queue.pop()
        wanted[value] = True
        if value in flow or value in made or value.op != "call_function":
            continue
        inner = [origin(s) for s in float_inputs(value)]
        if shares_scale(value) and all(q for q, _ in inner) or rescales(value) and mixes(inner):
            flow[value] = True
            queue += float_inputs(value)
    order = list(order)
    found.values = [n for n in order if n in wanted]
    found.flow = [n for n in order if n in flow]
    found.shared = [(s, n) for n in found.flow if shares_scale(n) for s in float_inputs(n)]
    for n in found.values:
        by_flow = n in flow and all(s in found.conv for s in float_inputs(n))
        if n.op == "placeholder" or (n in made and made[n].conv) or by_flow:
            found.conv.add(n)
    found.conv -= {a.source for a in anchors if not a.conv}
    return found


def groups(values: Iterable[fx.Node], pairs: Iterable[tuple[fx.Node, fx.Node]]) -> list[list[fx.Node]]:
    """The values in classes that the pairs connect, in order."""
    parent = {v: v for v in values}

    def root(v: fx.Node) -> fx.Node:
        while parent[v] is not v:
            parent[v] = v = parent[parent[v]]
        return v

    for a, b in pairs:
        parent[root(b)] = root(a)
    found: dict[fx.Node, list[fx.Node]] = {}
    for v in parent:
        found.setdefault(root(v), []).append(v)
    return list(found.values())


