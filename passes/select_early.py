"""Choose and average before computing, not after.

``linear(x)[:, -1]`` computes every row to keep one, ``avg_pool2d(conv1x1(x))`` every pixel to keep a quarter. Ops that treat the
rows (or pixels) apart from each other change places with what follows: a slice or a selection passes all of them, a mean those that are
linear, wherever that leaves less to compute and to move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright import ops
from graphwright.cost import Cost, cost, number
from graphwright.ir import Program, arg, args_by_name, op_name, set_arg, site_of, walk_nodes
from graphwright.manager import Pass, PassResult
from graphwright.passes import _affine as affine
from graphwright.passes import _trial as trial
from graphwright.passes._nodes import (
    base,
    escapes,
    is_op,
    is_tensor,
    only_user,
    rank,
    readers,
    renew,
    same_sizes,
    sweep,
    val,
)

_SELECTIONS = ("aten.slice", "aten.select")
_MEANS = ("aten.mean", "aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d", "aten.adaptive_avg_pool1d", "aten.adaptive_avg_pool2d",
          "aten.adaptive_avg_pool3d")  # fmt: skip
#: An operation weighs as much as this many bytes: what ordinary machines compute while they move them.
FLOPS_PER_BYTE = 8.0


@dataclass(frozen=True)
class SelectEarly(Pass):
    """Move slices, selections, strides and means in front of the linears, pointwise convolutions and elementwise ops before them."""

    name = "select-early"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        inputs, moved = self._inputs(program), []
        todo = [n for n in program.nodes if is_op(n, *_SELECTIONS, *_MEANS)]
        while todo:  # what has moved may move on
            last = todo.pop()
            if last._erased or not last.users:
                continue
            todo += self._move(program, last, inputs, moved, result)
        if moved:
            renew(program, [n for n in moved if not n._erased])
        sweep(program, result)
        return result

    def _inputs(self, program: Program) -> dict[fx.Node, Tensor]:
        """What the products before a mean read on the example: means are tried first."""
        means = [n for n in program.nodes if is_op(n, *_MEANS) and affine.is_contraction(n.args[0])]
        movable = [n.args[0] for n in means if (axes := _axes(n)) and _places(n, n.args[0], axes) and only_user(n.args[0]) is n]  # type: ignore[arg-type]
        return trial.values(program, {arg(p, "input") for p in movable}) if program.example is not None else {}  # type: ignore[arg-type]

    def _move(self, program: Program, last: fx.Node, inputs: dict[fx.Node, Tensor], moved: list[fx.Node],
              result: PassResult) -> list[fx.Node]:  # fmt: skip
        op = last.args[0]
        if not is_tensor(op) or op.op != "call_function":  # type: ignore[union-attr]
            return []
        axes = _axes(last)
        places = _places(last, op, axes) if axes is not None else None
        if places is None or axes is None:
            return []
        mean = is_op(last, *_MEANS)
        if mean and not affine.is_contraction(op):
            return []
        if reason := self._reason(program, last, op, axes):
            result.refuse(site_of(last), reason)
            return []
        if self.refused(result, last):
            return []
        made = {n: _again(program, last, n, axes) for n in dict.fromkeys(places)}
        with program.graph.inserting_before(last):
            new = program.graph.node_copy(op, lambda n: made.get(n, n))
            new.meta = {k: v for k, v in op.meta.items() if k in ("sites", "trace")}
            if _becomes_stride(last, op, axes):
                _step(new, last, axes[0], op)
            try:
                new.meta["val"] = program.infer(new)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                self._undo(program, new, made)
                result.refuse(site_of(last), f"{site_of(op)} does not take less: {str(error).splitlines()[0]}")
                return []
            end = new
            if is_op(last, "aten.mean") and rank(new) != rank(last):
                end = program.call(torch.ops.aten.squeeze.dims, new, list(axes), like=last)
        lost = escapes(program, last) and val(last).is_contiguous() and not val(end).is_contiguous()
        if reason := ("an output would not be contiguous any more" if lost else None) or _not_cheaper(op, last, new, made) or (self._measured(program, last, op, end, inputs) if mean else None):
            if end is not new:
                program.graph.erase_node(end)
            self._undo(program, new, made)
            result.refuse(site_of(last), reason)
            return []
        result.change(site_of(last), f"{op_name(last.target).split('.')[1]} moved before {site_of(op)}")
        moved += dict.fromkeys((new, end))
        program.replace(last, end)
        program.graph.erase_node(op)
        return [m for m in (*made.values(), *end.users) if is_op(m, *_SELECTIONS, *_MEANS)]

    def _undo(self, program: Program, new: fx.Node, made: dict[fx.Node, fx.Node]) -> None:
        program.graph.erase_node(new)
        for old, m in made.items():
            if m is not old and not m.users and not m._erased:
                program.graph.erase_node(m)

    def _reason(self, program: Program, last: fx.Node, op: fx.Node, axes: Sequence[int]) -> str | None:
        if only_user(op) is not last:
            return f"{site_of(op)} is read by {readers(op, [last]) or 'it twice'} too" if affine.is_contraction(op) else "it shares what it reads"
        if _becomes_stride(last, op, axes):
            given = args_by_name(last)
            if (given["start"] or 0) != 0 or not _whole(last):
                return f"{site_of(op)} is a convolution: only a slice of every n-th pixel is a stride"
        if is_op(last, *_MEANS) and arg(op, "bias") is not None:
            given = args_by_name(last)
            pads = any(_listed(given.get("padding", 0))) and given.get("count_include_pad", True)
            if pads or given.get("divisor_override") is not None:
                return "it counts padding, to which no bias was added"
        return None

    def _measured(self, program: Program, last: fx.Node, op: fx.Node, new: fx.Node, inputs: dict[fx.Node, Tensor]) -> str | None:
        x = arg(op, "input")
        if x not in inputs:
            return None  # the manager's own check still stands
        problem = trial.failure(program, last, {x: inputs[x]}, trial.evaluate(program, new, {x: inputs[x]}))
        return f"measured on the example: {problem}" if problem else None


def _becomes_stride(last: fx.Node, op: fx.Node, axes: Sequence[int]) -> bool:
    """A slice of a convolution's pixels, which its own stride can leave out."""
    spatial = affine.spatial_axes(op)
    return spatial is not None and is_op(last, "aten.slice") and axes[0] >= rank(op) - spatial


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _whole(last: fx.Node) -> bool:
    """Whether a slice goes to the end."""
    end, size = args_by_name(last)["end"], val(last.args[0]).shape[arg(last, "dim")]
    return end is None or (isinstance(end, int) and (end >= 1 << 62 or (isinstance(size, int) and end >= size)))


def _axes(last: fx.Node) -> list[int] | None:
    """The axes, from the front, that are chosen from or averaged over."""
    n = rank(last.args[0])  # type: ignore[arg-type]
    if is_op(last, *_SELECTIONS):
        return [arg(last, "dim") % n] if n and isinstance(arg(last, "dim"), int) else None
    if is_op(last, "aten.mean"):
        given = args_by_name(last)
        if not given.get("dim") or given.get("dtype") is not None:
            return None
        return [d % n for d in _listed(given["dim"])]
    spatial = int(base(last)[-2])
    return list(range(n - spatial, n))


def _places(last: fx.Node, op: fx.Node, axes: Sequence[int]) -> list[fx.Node] | None:
    """The inputs of ``op`` that are to be chosen from in its stead; None where it mixes what lies along the axes."""
    if is_op(op, "aten.linear"):
        return [op.args[0]] if max(axes) < rank(op) - 1 else None  # type: ignore[list-item]
    spatial = affine.spatial_axes(op)
    if spatial is not None:
        x, given = op.args[0], args_by_name(op)
        if is_op(last, "aten.select"):
            return None  # a convolution needs every axis
        if list(axes) == [0] and rank(op) == spatial + 2 and is_op(last, "aten.slice"):
            return [x]  # type: ignore[list-item]
        pointwise = is_op(op, *affine.CONVOLUTIONS) and all(k == 1 for k in val(given["weight"]).shape[2:])
        plain = given["padding"] == "valid" or not isinstance(given["padding"], str) and not any(given["padding"])
        unit = all(s == 1 for s in _listed(given["stride"])) or _becomes_stride(last, op, axes)
        return [x] if pointwise and plain and unit and min(axes) >= rank(op) - spatial else None  # type: ignore[list-item]
    if is_op(op, "aten.layer_norm", "aten.rms_norm"):
        return [op.args[0]] if max(axes) < rank(op) - len(arg(op, "normalized_shape")) else None  # type: ignore[list-item]
    row = ops.row(op.target)
    if row is None or ops.ELEMENTWISE not in row.traits or ops.RANDOM in row.traits or ops.QUANT in row.traits:
        return None
    found = []
    for n in op.all_input_nodes:
        if not is_tensor(n) or val(n).ndim == 0:
            continue
        if not same_sizes(val(n).shape, val(op).shape):
            shape = [1] * (rank(op) - rank(n)) + list(val(n).shape)
            if any(shape[a] != 1 for a in axes):
                return None
            if max(axes) >= rank(op) - rank(n):
                return None  # a selection would have to take away an axis of size 1 from it
            continue
        found.append(n)
    return found or None


def _again(program: Program, last: fx.Node, x: fx.Node, axes: Sequence[int]) -> fx.Node:
    """``last`` on another value; strides of a convolution's own take the place of a slice's."""
    if _becomes_stride(last, last.args[0], axes):  # type: ignore[arg-type]
        return x
    given = args_by_name(last)
    if is_op(last, "aten.mean"):
        keep = arg(last, "keepdim") or affine.spatial_axes(last.args[0]) is not None  # type: ignore[arg-type]  # a convolution needs every axis
        given |= {"dim": list(axes), "keepdim": keep}
    elif is_op(last, *_SELECTIONS):
        given["dim"] = axes[0]
    names = [a.name for a in last.target._schema.arguments if not a.kwarg_only]  # type: ignore[union-attr]
    args, kwargs = (x, *(given[k] for k in names[1:])), {k: given[k] for k in last.kwargs}
    for other in x.users:  # its twin may have come this way before
        if other is not last and other.target is last.target and (other.args, dict(other.kwargs)) == (args, kwargs) and other < last:
            return other
    sized = any(n is not x for n in walk_nodes((args, kwargs)))  # by a size that is computed, maybe after x
    with program.graph.inserting_before(last) if sized else program.graph.inserting_after(_after(program, x)):
        return program.call(last.target, *args, like=last, **kwargs)  # type: ignore[arg-type]


def _after(program: Program, x: fx.Node) -> fx.Node:
    """Where what reads ``x`` may stand, as early as can be: inputs and constants come first of all."""
    return x if x.op == "call_function" else next(n for n in reversed(program.graph.nodes) if n.op in ("placeholder", "get_attr"))


def _step(new: fx.Node, last: fx.Node, axis: int, op: fx.Node) -> None:
    """Let a pointwise convolution step over the pixels that the slice leaves out."""
    spatial = affine.spatial_axes(op) or 0
    place = axis - (rank(op) - spatial)
    strides = _listed(arg(op, "stride")) * (spatial if len(_listed(arg(op, "stride"))) == 1 else 1)
    strides[place] *= int(arg(last, "step"))
    set_arg(new, "stride", strides)


def _not_cheaper(op: fx.Node, last: fx.Node, new: fx.Node, made: dict[fx.Node, fx.Node]) -> str | None:
    """The figures, where moving does not pay."""
    views = is_op(last, *_SELECTIONS)
    was = cost(op) + (Cost() if views else cost(last))
    now = cost(new) + (Cost() if views else sum((cost(m) for m in made.values()), Cost()))
    for old, m in made.items():
        if views and m is not old and ops.ELEMENTWISE not in _traits(op) and not val(m).is_contiguous():
            now += Cost(read=_bytes(m), written=_bytes(m))  # matrix products and norms want their input in one piece
    if _weight(now) < _weight(was):
        return None
    return f"it would not save work: {now.flops:,} operations and {now.bytes:,} bytes after, {was.flops:,} and {was.bytes:,} before"


def _traits(op: fx.Node) -> frozenset[str]:
    row = ops.row(op.target)
    return frozenset() if row is None else row.traits


def _bytes(node: fx.Node) -> int:
    return number(val(node).numel()) * val(node).element_size()


def _weight(c: Cost) -> float:
    return c.flops + FLOPS_PER_BYTE * c.bytes
