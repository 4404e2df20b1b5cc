"""Making a graph functional: who shares memory with whom, and what a write to one of them does to the others.

Every tensor value of the traced program is a ``Ref``: a chain of views above a ``Base``. A write through a ref makes
a new value of the base by undoing the views one by one (``slice_scatter`` for a slice, an inverse permutation for a
permutation, ...); other refs of the same base notice that they are out of date when they are next read, and are
computed anew from the base.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

aten = torch.ops.aten


class Refused(Exception):
    """A mutation that cannot be written functionally; the text says which and why."""


@dataclass(eq=False)
class ViewStep:
    """One view: ``target(*args)`` with its input at ``args[slot]`` and, for ops of several outputs, ``index``."""

    target: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None = None
    identity: bool = False  # same elements at the same places: detach, contiguous on contiguous data, ...


@dataclass(eq=False)
class Base:
    """A piece of memory: the node that holds its present value, and how often it was written.

    Attributes:
        buffer, input: what it is outside the graph, if it is the model's or the caller's.
    """

    node: fx.Node
    buffer: str | None = None
    input: int | None = None
    version: int = 0
    views: dict[tuple[ViewStep, ...], fx.Node] = field(default_factory=dict)


@dataclass(eq=False)
class Ref:
    """One tensor value of the traced program."""

    base: Base
    chain: tuple[ViewStep, ...]
    node: fx.Node
    version: int


Emit = Callable[..., fx.Node]


def read(ref: Ref, emit: Emit) -> fx.Node:
    """The node that holds ``ref``'s present value; views of a base that was written are computed anew."""
    if ref.version != ref.base.version:
        ref.node = _replay(ref.base, ref.chain, emit)
        ref.version = ref.base.version
    return ref.node


def _replay(base: Base, chain: tuple[ViewStep, ...], emit: Emit) -> fx.Node:
    if not chain:
        return base.node
    if chain not in base.views:
        step = chain[-1]
        node = emit(step.target, _replay(base, chain[:-1], emit), *step.args[1:], **step.kwargs)
        base.views[chain] = node if step.index is None else emit(operator.getitem, node, step.index)
    return base.views[chain]


def write(ref: Ref, value: fx.Node, emit: Emit) -> None:
    """Let ``ref``'s memory hold ``value`` (of the same shape and dtype) from now on.

    Raises:
        Refused: one of the views between the ref and its base cannot be undone.
    """
    below = [_replay(ref.base, ref.chain[:k], emit) for k in range(len(ref.chain))]
    new = value
    for step, under in zip(reversed(ref.chain), reversed(below), strict=True):
        new = _undo(step, under, new, emit)
    ref.base.node = new
    ref.base.version += 1
    ref.base.views.clear()
    ref.node, ref.version = value, ref.base.version
    if ref.chain:
        ref.base.views[ref.chain] = value


# -- undoing views ---------------------------------------------------------------------------------------------------


def _undo(step: ViewStep, under: fx.Node, new: fx.Node, emit: Emit) -> fx.Node:
    """The value below the view after ``new`` was written through it; ``under`` is the value before."""
    if step.identity:
        return new
    name = step.target._schema.name.partition("::")[2]
    undo = _UNDO.get(name)
    if undo is None:
        raise Refused(f"writing through {name}")
    return undo(step, under, new, emit)


def _named(step: ViewStep) -> dict[str, Any]:
    names = [a.name for a in step.target._schema.arguments]
    return {**dict(zip(names, step.args, strict=False)), **step.kwargs}


def _sizes(node: fx.Node, emit: Emit) -> list[Any]:
    shape = node.meta["val"].shape
    return [s if isinstance(s, int) else emit(aten.sym_size.int, node, k) for k, s in enumerate(shape)]


def _slice(step: ViewStep, under: fx.Node, new: fx.Node, emit: Emit) -> fx.Node:
    a = _named(step)
    if a["step"] == 1 and _same_sizes(under, new):
        return new
    return emit(aten.slice_scatter.default, under, new, a["dim"], a["start"], a["end"], a["step"])


def _select(step: ViewStep, under: fx.Node, new: fx.Node, emit: Emit) -> fx.Node:
    return emit(aten.select_scatter.default, under, new, _named(step)["dim"], _named(step)["index"])


def _diagonal(step: ViewStep, under: fx.Node, new: fx.Node, emit: Emit) -> fx.Node:
    a = _named(step)
    return emit(aten.diagonal_scatter.default, under, new, a["offset"], a["dim1"], a["dim2"])


def _as_strided(step: ViewStep, under: fx.Node, new: fx.Node, emit: Emit) -> fx.Node:
    a = _named(step)
    return emit(aten.as_strided_scatter.default, under, new, a["size"], a["stride"], a["storage_offset"])


def _reshape(step: ViewStep, under: fx.Node, new: fx.Node, emit: Emit) -> fx.Node:
    return emit(aten.reshape.default, new, _sizes(under, emit))


def _transpose(step: ViewStep, under: fx.Node, new: fx.Node, emit: Emit) -> fx.Node:
    return emit(step.target, new, *step.args[1:], **step.kwargs)


def _permute(step: ViewStep, under: fx.Node, new: fx.Node, emit: Emit) -> fx.Node:
    dims = [d % len(step.args[1]) for d in step.args[1]]
    return emit(aten.permute.default, new, [dims.index(k) for k in range(len(dims))])


def _movedim(step: ViewStep, under: fx.Node, new: fx.Node, emit: Emit) -> fx.Node:
    return emit(step.target, new, step.args[2], step.args[1])


def _part(step: ViewStep, under: fx.Node, new: fx.Node, emit: Emit) -> fx.Node:
    """split, split_with_sizes, chunk, tensor_split: the part's offset is the sum of the sizes before it."""
    dim = _named(step)["dim"]
    sizes = [v.shape[dim] for v in step_values(step, under)]
    if not all(isinstance(s, int) for s in sizes) or step.index is None:
        raise Refused("writing through a split along a size that varies")
    start = sum(sizes[: step.index])
    return emit(aten.slice_scatter.default, under, new, dim, start, start + sizes[step.index], 1)


def _unbind(step: ViewStep, under: fx.Node, new: fx.Node, emit: Emit) -> fx.Node:
    return emit(aten.select_scatter.default, under, new, _named(step)["dim"], step.index)


def _narrow(step: ViewStep, under: fx.Node, new: fx.Node, emit: Emit) -> fx.Node:
    a = _named(step)
    if not isinstance(a["start"], int) or not isinstance(a["length"], int):
        raise Refused("writing through a narrow whose place varies")
    start = a["start"] % under.meta["val"].shape[a["dim"]] if a["start"] < 0 else a["start"]
    return emit(aten.slice_scatter.default, under, new, a["dim"], start, start + a["length"], 1)


def _real(step: ViewStep, under: fx.Node, new: fx.Node, emit: Emit) -> fx.Node:
    return emit(aten.view_as_complex.default, new)


def _complex(step: ViewStep, under: fx.Node, new: fx.Node, emit: Emit) -> fx.Node:
    return emit(aten.view_as_real.default, new)


def step_values(step: ViewStep, under: fx.Node) -> Sequence[torch.Tensor]:
    """What the view's op gives, as fakes."""
    value = under.meta["val"]
    args, kwargs = fx.node.map_arg((step.args[1:], step.kwargs), lambda n: n.meta["val"])
    with value.fake_mode, torch.no_grad():
        return step.target(value, *args, **kwargs)


def _same_sizes(a: fx.Node, b: fx.Node) -> bool:
    pairs = zip(a.meta["val"].shape, b.meta["val"].shape, strict=True)
    return all(x is y or (isinstance(x, int) and isinstance(y, int) and x == y) or str(x) == str(y) for x, y in pairs)


_UNDO: dict[str, Callable[..., fx.Node]] = {
    "slice": _slice, "select": _select, "diagonal": _diagonal, "as_strided": _as_strided, "narrow": _narrow,
    "permute": _permute, "movedim": _movedim, "moveaxis": _movedim, "unbind": _unbind,
    "split": _part, "split_with_sizes": _part, "chunk": _part, "tensor_split": _part,
    "view_as_real": _real, "view_as_complex": _complex,
    **dict.fromkeys(("transpose", "t", "numpy_T", "mT", "matrix_H", "swapaxes", "swapdims", "adjoint"), _transpose),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
                     "reshape_as", "ravel", "_reshape_alias", "atleast_1d", "atleast_2d", "atleast_3d"), _reshape),
}  # fmt: skip
for _gone in ("matrix_H", "adjoint"):  # conjugating views of complex numbers: rare, refused instead
    _UNDO.pop(_gone)


# -- functional twins of ops that write -------------------------------------------------------------------------------

#: Ops that change what a tensor looks like, not what it holds: the value is a new view of the same memory.
METADATA = frozenset(["unsqueeze_", "squeeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "detach_", "as_strided_"])


#: Ops whose result is always memory of its own.
_FRESH = frozenset((
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear",
    "batch_norm", "layer_norm", "group_norm", "instance_norm", "add", "sub", "mul", "div", "matmul", "mm", "bmm", "addmm",
    "cat", "embedding", "max_pool2d", "avg_pool2d", "relu", "gelu", "sigmoid", "softmax",
))  # fmt: skip


def calm(module: fx.GraphModule) -> bool:
    """Whether nothing is written but fresh tensors that nobody else reads (``relu_`` after a convolution)."""
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            if isinstance(node.target, OpOverload) and node.target._schema.is_mutable and not _private(node):
                return False
    return True


def _private(node: fx.Node) -> bool:
    source = node.args[0]
    if not isinstance(source, fx.Node) or not isinstance(source.target, OpOverload) or len(source.users) > 1:
        return False
    return written(node.target) == [0] and source.target._schema.name.partition("::")[2] in _FRESH


def written(target: OpOverload) -> list[int]:
    """Positions of the arguments that the op writes."""
    return [k for k, a in enumerate(target._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


def twin(target: OpOverload) -> OpOverload:
    """The functional op that computes what ``target`` (``add_``, ``add.out``, ``normal_``) writes.

    Raises:
        Refused: there is none.
    """
    name = target._schema.name.partition("::")[2]
    namespace = getattr(torch.ops, target.namespace)
    wanted = _kinds(a for a in target._schema.arguments if not a.is_out)
    for candidate in (name.rstrip("_"), f"{name}_functional", f"{name.rstrip('_')}_functional"):
        packet = getattr(namespace, candidate, None)
        for overload in packet.overloads() if packet is not None else ():
            found = getattr(packet, overload)
            if _kinds(found._schema.arguments) == wanted and not found._schema.is_mutable:
                return found
    raise Refused(f"{name} writes into its argument and has no functional form")


def _kinds(arguments: Iterable[Any]) -> list[tuple[str, str]]:
    """Names and types of arguments; the first one's name may differ (``self`` in ``dropout_``, ``input`` in ``dropout``)."""
    return [(a.name if k else "", str(a.type)) for k, a in enumerate(arguments)]


# -- values ----------------------------------------------------------------------------------------------------------


def is_float(value: Any) -> bool:
    """Whether a fake value, or one of several, is a tensor of real or complex numbers."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in parts)


def plain_number(value: Any) -> Any:
    """A symbolic size that is a constant as that constant."""
    constant = isinstance(value, torch.SymInt) and value.node.expr.is_number
    return int(value.node.expr) if constant else value


def layout(value: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors on the same memory that read it alike; symbols are compared as written, never assumed."""
    sizes = [*value.shape, *value.stride(), value.storage_offset()]
    return value.dtype, tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes)


def shape_text(node: fx.Node) -> tuple[str, ...]:
    """A node's shape as written, comparable without a guard on its symbols."""
    return tuple(map(str, node.meta["val"].shape))
