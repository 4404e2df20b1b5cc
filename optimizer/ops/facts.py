"""What follows from a row and a node: axes with their names, where channels go, what to quantize along, work, traffic.

Every function takes a normalised node of the graph with ``meta["val"]`` on itself and its arguments, and needs
nothing else. An op without a row, or whose row spells no axes, has no such facts: None or an empty answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from graphwright.errors import InputError, InternalError
from graphwright.ops import axes as spelling
from graphwright.ops.axes import Axes
from graphwright.ops.registry import CAST, CONTRACTION, NORM, POOL, REDUCTION, SHAPE, SOFTMAX, VIEW, OpRow, row

OUT = "out"


@dataclass(frozen=True)
class Operand:
    """A tensor argument or result of a node.

    Attributes:
        name: the argument's name in the schema, ``"tensors.1"`` within a list; ``"out.0"`` for a result.
        node: the node that gives it; None for results.
        value: its fake tensor.
    """

    name: str
    node: fx.Node | None
    value: Tensor


@dataclass(frozen=True)
class Place:
    """Where an axis stands: in which operand, in which of its dimensions, as which of that dimension's atoms."""

    operand: str
    dim: int
    position: int


def _value(x: Any) -> Any:
    return fx.node.map_arg(x, lambda n: n.meta["val"])


def values(node: fx.Node, found: OpRow) -> dict[str, Any]:
    """The node's arguments by schema name, with fake values in place of nodes."""
    return _value(found.bind(node.args, node.kwargs))


def _slots(node: fx.Node, found: OpRow) -> Iterator[tuple[str, Any]]:
    """Every place of the schema that holds a tensor, with what stands there: a node or None."""
    given = found.bind(node.args, node.kwargs)
    for argument in found.overload._schema.arguments:
        kind, value = str(argument.type), given.get(argument.name)
        if "Tensor" not in kind:
            continue
        if isinstance(value, (tuple, list)):
            yield from ((f"{argument.name}.{k}", v) for k, v in enumerate(value))
        else:
            yield argument.name, value


def operands(node: fx.Node) -> list[Operand | None]:
    """The tensor arguments in schema order, those of a list each by itself; None for an absent one, or a number in its place."""
    found = row(node.target)
    if found is None:
        return []
    return [Operand(name, v, v.meta["val"]) if isinstance(v, fx.Node) and isinstance(v.meta["val"], Tensor) else None
            for name, v in _slots(node, found)]  # fmt: skip


def results(node: fx.Node) -> list[Operand]:
    """The tensors that a node gives: ``out.0`` and so on."""
    value = node.meta["val"]
    given = value if isinstance(value, (tuple, list)) else [value]
    return [Operand(f"{OUT}.{k}", None, v) for k, v in enumerate(given) if isinstance(v, Tensor)]


def axes_of(node: fx.Node) -> Axes | None:
    """The node's axes, names for every dimension of every operand; None where the row does not spell them."""
    found = row(node.target)
    if found is None or found.axes is None:
        return None
    given = values(node, found)
    text = found.axes(**given) if callable(found.axes) else found.axes
    if text is None:
        return None
    inputs = [None if o is None else o.value.shape for o in operands(node)]
    try:
        return spelling.parse(text, inputs, [r.value.shape for r in results(node)])
    except InternalError as error:
        raise _foreign(found, error) from None


def _foreign(found: OpRow, error: InternalError) -> Exception:
    """What is wrong with a row: its author's affair where it came from outside."""
    if not found.owner:
        return error
    return InputError(error.what, where=f"register_op({found.name!r}, axes=...) in {found.owner}", hint="Mend the spelling, or leave it out.")


def sizes_of(node: fx.Node) -> dict[str, Any]:
    """The size of every axis of ``axes_of(node)`` that the shapes determine; symbolic ones as SymInt."""
    found = axes_of(node)
    if found is None:
        return {}
    shapes = [None if o is None else o.value.shape for o in operands(node)]
    try:
        return spelling.sizes(found, shapes, [r.value.shape for r in results(node)])
    except InternalError as error:
        raise _foreign(row(node.target), error) from None  # type: ignore[arg-type]


def places(node: fx.Node) -> dict[str, list[Place]]:
    """Every named axis and where it stands: what is cut from one place is to be cut from all of them.

    A window's axis (``h'``) counts as the axis that it looks at; whether cutting is sound where the axis is handled as
    a whole is for ``axes_of(node).whole`` to say.
    """
    found = axes_of(node)
    if found is None:
        return {}
    spread: dict[str, list[Place]] = defaultdict(list)
    named = [(o.name, d) for o, d in zip(operands(node), found.inputs, strict=True) if o is not None and d is not None]
    named += [(r.name, d) for r, d in zip(results(node), found.outputs, strict=True)]
    for operand, dims in named:
        for k, dim in enumerate(dims):
            for position, atom in enumerate(dim.atoms):
                if not atom.isdigit():
                    spread[atom.rstrip("'")].append(Place(operand, k, position))
    return dict(spread)


# -- weights ---------------------------------------------------------------------------------------------------------


def _dims_of(node: fx.Node, operand: str) -> tuple[Axes, spelling.Dims, int] | None:
    found = axes_of(node)
    if found is None:
        return None
    for k, o in enumerate(operands(node)):
        dims = found.inputs[k]
        if o is not None and dims is not None and o.name == operand:
            return found, dims, k
    return None


def contraction_dims(node: fx.Node, operand: str = "weight") -> tuple[int, ...]:
    """The dimensions of an operand that are multiplied and summed over: ``(1,)`` of a linear's weight."""
    at = _dims_of(node, operand)
    if at is None or not _contracts(node):
        return ()
    found, dims, _ = at
    return tuple(k for k, d in enumerate(dims) if any(a in found.summed for a in d.atoms))


def channel_dim(node: fx.Node, operand: str = "weight") -> int | None:
    """The dimension of a weight along which scales may differ: 0 for linear, convolution and embedding, 1 for a
    transposed convolution and for the right factor of a product.

    Of a contraction it is the dimension that reaches the result and comes from this operand alone; of a look-up the one
    that is picked from.
    """
    at = _dims_of(node, operand)
    if at is None:
        return None
    found, dims, index = at
    if found.picked:
        return next((k for k, d in enumerate(dims) if set(d.atoms) & found.picked), None)
    if not _contracts(node):
        return None
    reached, foreign = found.named(found.outputs), found.named(_partners(found, index))
    own = [k for k, d in enumerate(dims) if all(a in reached for a in d.atoms) and set(d.atoms) - foreign]
    return own[-1] if own else None


def low_rank_dims(node: fx.Node, operand: str = "weight") -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """``(result dimensions, summed dimensions)`` of a weight that may be written as a product of two smaller ones.

    None where it may not be: no contraction, or an axis that runs through input and result alike (groups, batches).
    """
    at = _dims_of(node, operand)
    channel = channel_dim(node, operand)
    if at is None or channel is None or not _contracts(node):
        return None
    found, dims, index = at
    summed = contraction_dims(node, operand)
    shared = set(dims[channel].atoms) & found.named(_partners(found, index))
    return ((channel,), summed) if {channel, *summed} == set(range(len(dims))) and not shared else None


def _partners(axes: Axes, index: int) -> list[spelling.Dims]:
    """The other operands that an operand is multiplied and summed with."""
    return [d for k, d in enumerate(axes.inputs) if k != index and d is not None and axes.named([d]) & axes.summed]


def _contracts(node: fx.Node) -> bool:
    found = row(node.target)
    return found is not None and CONTRACTION in found.traits


# -- work and traffic ------------------------------------------------------------------------------------------------

#: Arithmetic operations per element of the input, for ops that make several passes over it.
_PASSES = {NORM: 5, SOFTMAX: 5, REDUCTION: 1, POOL: 1}


def flops(node: fx.Node) -> Any:
    """Arithmetic operations of a node, a multiply-add as two; an int, or a SymInt where sizes are symbolic.

    From the row's own count if it has one; else twice the product of all axes for a contraction, a few per input
    element for norms, softmax and reductions, none for views, casts and sizes, and one per element of the result.
    """
    found = row(node.target)
    if found is None:
        return 0
    if found.flops is not None:
        return found.flops(values(node, found), node.meta["val"])
    if CONTRACTION in found.traits and (spelled := axes_of(node)) is not None:
        wanted = {a for dims in spelled.outputs for d in dims for a in d.atoms} | spelled.summed
        known = sizes_of(node)
        return 2 * prod(known[a] for a in wanted if a in known)
    for trait, passes in _PASSES.items():
        if trait in found.traits:
            return passes * max((o.value.numel() for o in operands(node) if o is not None), default=0)
    if found.traits & {VIEW, CAST, SHAPE}:
        return 0
    return sum(r.value.numel() for r in results(node))


@dataclass(frozen=True)
class Traffic:
    """Bytes that a node moves at the least, each tensor once.

    Attributes:
        read: per tensor argument; of a table that is picked from, only as much as the result holds.
        written: the results together; 0 for what only looks at its input in another way.
    """

    read: dict[str, Any]
    written: Any

    @property
    def total(self) -> Any:
        return sum(self.read.values()) + self.written


def size_in_bytes(value: Tensor) -> Any:
    """Elements times their width; an expanded tensor's repeated axes (stride 0) count once."""
    held = [n for n, s in zip(value.shape, value.stride(), strict=True) if not (isinstance(s, int) and s == 0)]
    return prod(held) * value.dtype.itemsize


def aliases(node: fx.Node) -> bool:
    """Whether a node gives another look at its first operand's memory, without moving anything."""
    found = row(node.target)
    inputs = operands(node)
    if (
        found is None
        or not inputs
        or inputs[0] is None
        or not any(r.alias_info for r in found.overload._schema.returns)
    ):
        return False
    x, outs = inputs[0].value, results(node)
    if found.name in ("aten.reshape", "aten.flatten", "aten.reshape_as"):
        return x.is_contiguous() or not outs[0].value.is_contiguous()  # a copy would be contiguous
    if found.name in ("aten.contiguous", "aten.to", "aten.type_as"):
        y = outs[0].value
        return x.dtype == y.dtype and x.device == y.device and x.stride() == y.stride()
    return True


def traffic(node: fx.Node) -> Traffic:
    """What a node reads and writes, in bytes; an op without a row reads and writes every tensor it has."""
    found = row(node.target)
    if not isinstance(node.target, OpOverload):  # access to a tuple, arithmetic on sizes
        return Traffic({}, 0)
    if found is None:
        inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        return Traffic({n.name: size_in_bytes(n.meta["val"]) for n in inputs}, _written(node))
    if SHAPE in found.traits or aliases(node):
        return Traffic({}, 0)
    spelled = axes_of(node)
    read = {}
    for k, o in enumerate(operands(node)):
        if o is None:
            continue
        size = size_in_bytes(o.value)
        dims = spelled.inputs[k] if spelled is not None else None
        if dims and spelled is not None and spelled.named([dims]) & spelled.picked:
            size = torch.sym_min(size, sum(r.value.numel() for r in results(node)) * o.value.dtype.itemsize)
        read[o.name] = size
    return Traffic(read, _written(node))


def _written(node: fx.Node) -> Any:
    return sum(size_in_bytes(r.value) for r in results(node))
