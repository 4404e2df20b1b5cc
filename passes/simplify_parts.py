"""What is put together only to be taken apart, and the other way round: slices, splits and concatenations that meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import Program, args_by_name, op_name, site_of
from graphwright.manager import Pass, PassResult
from graphwright.passes._nodes import (
    escapes,
    is_op,
    is_tensor,
    only_user,
    rank,
    readers,
    renew,
    root,
    same_kind,
    same_layout,
    same_size,
    same_sizes,
    sweep,
    val,
)

aten = torch.ops.aten
_SPLITS = ("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split")


@dataclass(frozen=True)
class Piece:
    """``source[start : start + length]`` along an axis."""

    source: fx.Node
    axis: int
    start: int
    length: int


@dataclass(frozen=True)
class SimplifyParts(Pass):
    """Take slices and splits of a concatenation from its parts, and join adjacent slices of one tensor again."""

    name = "simplify-parts"

    def run(self, program: Program) -> PassResult:
        result, moved, known = PassResult(), [], set(program.nodes)
        for node in program.nodes:
            if not is_tensor(node) or not node.users:
                continue
            with program.graph.inserting_before(node):
                found = _simplify(program, node)
            if found is None:
                continue
            if isinstance(found, str):
                result.refuse(site_of(node), found)
                continue
            new, what = found
            reason = _shares(program, node, new)
            if reason:
                result.refuse(site_of(node), reason)
            if reason or self.refused(result, node):
                for made in (new, *new.all_input_nodes):
                    if made not in known and not made.users:
                        program.graph.erase_node(made)
                continue
            result.change(site_of(node), what)
            if not same_layout(new, node):
                moved.append(new)
            if new in known:  # what stood there before keeps its own sites
                node.replace_all_uses_with(new)
                program.graph.erase_node(node)
            else:
                known.add(new)
                program.replace(node, new)
        if moved:
            renew(program, moved)
        sweep(program, result)
        return result


def _shares(program: Program, node: fx.Node, new: fx.Node) -> str | None:
    """The reason when an output would look into memory that it had for itself, or have other strides."""
    if not escapes(program, node):
        return None
    origin = root(new)
    if origin is not root(node) and (origin.op in ("placeholder", "get_attr") or escapes(program, origin)):
        return f"an output would share memory with {origin.name}"
    return None if same_layout(new, node) else "an output would have other strides"


def piece(node: Any) -> Piece | None:
    """``node`` as a piece of another tensor, where all of its numbers are known."""
    if is_op(node, "aten.slice", "aten.narrow"):
        given = args_by_name(node)
        source = node.args[0]
        axis, start = given["dim"] % max(1, rank(source)), given["start"]
        if given.get("step", 1) != 1:
            return None
        size, length = val(source).shape[axis], val(node).shape[axis]
        start = 0 if start is None else start
        if not isinstance(start, int) or not isinstance(length, int):
            return None
        if start < 0 or not isinstance(size, int):
            if start < 0 and not isinstance(size, int):
                return None
            start = start if start >= 0 else start + size
        return Piece(source, axis, max(0, start if not isinstance(size, int) else min(start, size)), length)
    if is_op(node, "operator.getitem") and is_op(node.args[0], *_SPLITS) and isinstance(node.args[1], int):
        split = node.args[0]
        axis = args_by_name(split)["dim"]
        parts = val(split)
        if not isinstance(axis, int) or not parts:
            return None
        axis %= max(1, parts[0].ndim)
        sizes = [p.shape[axis] for p in parts]
        place = node.args[1] % len(sizes)
        if all(isinstance(n, int) for n in sizes[: place + 1]):
            return Piece(split.args[0], axis, sum(sizes[:place]), sizes[place])
    return None


Found = tuple[fx.Node, str] | str | None


def _simplify(program: Program, node: fx.Node) -> Found:
    if is_op(node, "aten.cat"):
        return _join(program, node)
    if is_op(node, "aten.stack"):
        return _restack(node)
    if is_op(node, "aten.select") or (is_op(node, "operator.getitem") and is_op(node.args[0], "aten.unbind")):
        return _from_stack(node)
    found = piece(node)
    return None if found is None else _take(program, node, found)


def _slice(program: Program, like: fx.Node, p: Piece) -> fx.Node:
    """The node for a piece: the source itself where it is all of it."""
    if p.start == 0 and same_size(p.length, val(p.source).shape[p.axis]):
        return p.source
    return program.call(aten.slice.Tensor, p.source, p.axis, p.start, p.start + p.length, 1, like=like)


def _take(program: Program, node: fx.Node, p: Piece) -> Found:
    """A piece of a concatenation, or of another piece."""
    outer = piece(p.source)
    if outer is not None and outer.axis == p.axis:
        if is_op(p.source, "operator.getitem") and p.length == outer.length:
            return None  # all of it: canonicalize's business
        joined = Piece(outer.source, p.axis, outer.start + p.start, p.length)
        return _slice(program, node, joined), "slices joined"
    if not is_op(p.source, "aten.cat") or _axis(p.source) != p.axis:
        return None
    parts: list[fx.Node] = list(p.source.args[0])  # type: ignore[arg-type]
    sizes = [val(a).shape[p.axis] if rank(a) == rank(p.source) else 0 for a in parts]
    covered: list[fx.Node] = []
    at = 0
    for part, size in zip(parts, sizes, strict=True):
        if not isinstance(size, int):
            return None if at <= p.start else f"a part of {site_of(p.source)} has a size that is not known"
        if at <= p.start and p.start + p.length <= at + size and size:
            if val(part).dtype != val(node).dtype:
                return f"{site_of(p.source)} also changes the dtype"
            return _slice(program, node, Piece(part, p.axis, p.start - at, p.length)), f"taken from a part of {site_of(p.source)}"
        if at >= p.start and at + size <= p.start + p.length and size:
            covered.append(part)
        at += size
    if sum(val(a).shape[p.axis] for a in covered) != p.length:
        return f"it cuts through parts of {site_of(p.source)}"
    if only_user(p.source) is not node:
        return f"{site_of(p.source)} is read by {readers(p.source, [node])} too"
    return program.call(aten.cat.default, covered, p.axis, like=node), f"only {len(covered)} of {len(parts)} parts put together"


def _axis(cat: fx.Node) -> int:
    return int(cat.args[1]) % max(1, rank(cat))  # type: ignore[arg-type, call-overload]


def _join(program: Program, node: fx.Node) -> Found:
    """Nested concatenations become one, adjacent pieces of one tensor one piece, empty parts nothing."""
    axis, given = _axis(node), list(node.args[0])  # type: ignore[arg-type]
    if any(not is_tensor(a) or val(a).dtype != val(node).dtype for a in given):
        return None
    flat: list[fx.Node] = []
    for a in given:
        inner = is_op(a, "aten.cat") and rank(a) == rank(node) and _axis(a) == axis and only_user(a) is node
        flat += [b for b in (a.args[0] if inner else [a]) if not _empty(b, axis, rank(node))]
    if not flat or any(val(a).dtype != val(node).dtype for a in flat):
        return None
    joined: list[fx.Node | Piece] = []
    count = 0  # of parts that became one with the part before
    for a in flat:
        p, last = piece(a), joined[-1] if joined else None
        before = last if isinstance(last, Piece) else None
        if p is not None and p.axis == axis and before and (p.source, p.start) == (before.source, before.start + before.length):
            joined[-1], count = Piece(p.source, axis, before.start, before.length + p.length), count + 1
        else:
            joined.append(p if p is not None and p.axis == axis else a)
    if count == 0 and len(flat) == len(given) and all(a is b for a, b in zip(flat, given, strict=True)):
        return None
    if count == 0:  # pieces that did not meet stay the nodes that they are
        new_parts: list[fx.Node] = flat
    else:
        again = {_key(piece(a)): a for a in flat if piece(a) is not None}
        new_parts = [j if isinstance(j, fx.Node) else again.get(_key(j)) or _slice(program, node, j) for j in joined]
    what = [f"{count + 1} adjacent pieces joined"] if count else []
    what += ["nested concatenations made one"] if len(flat) > len(given) else []
    what += ["empty parts left out"] if len(flat) < len(given) else []
    if len(new_parts) == 1 and same_kind(new_parts[0], node):
        return new_parts[0], ", ".join(what) or "cat of one"
    return program.call(aten.cat.default, new_parts, axis, like=node), ", ".join(what) or "parts changed"


def _key(p: Piece | None) -> Any:
    return None if p is None else (p.source, p.axis, p.start, p.length)


def _empty(node: fx.Node, axis: int, ndim: int) -> bool:
    shape = val(node).shape
    return (len(shape) == 1 and ndim != 1 and same_size(shape[0], 0)) or (len(shape) == ndim and same_size(shape[axis], 0))


def _restack(node: fx.Node) -> Found:
    """stack of all that unbind gave, in order, along the same axis."""
    parts, axis = node.args[0], int(node.args[1]) % rank(node)  # type: ignore[arg-type, call-overload]
    first = parts[0]  # type: ignore[index]
    if not is_op(first, "operator.getitem") or not is_op(first.args[0], "aten.unbind"):
        return None
    unbound = first.args[0]
    source = unbound.args[0]
    whole = [a.args[:2] if is_op(a, "operator.getitem") else None for a in parts] == [(unbound, k) for k in range(len(val(unbound)))]  # type: ignore[union-attr]
    if whole and int(unbound.args[1]) % rank(source) == axis and same_kind(source, node):
        return source, "stack of all that unbind gave"
    return None


def _from_stack(node: fx.Node) -> Found:
    """One member of a stack."""
    holder = node.args[0] if is_op(node, "aten.select") else node.args[0].args[0]  # type: ignore[union-attr]
    if not is_op(holder, "aten.stack"):
        return None
    axis = node.args[1] if is_op(node, "aten.select") else node.args[0].args[1]  # type: ignore[union-attr]
    index = node.args[2] if is_op(node, "aten.select") else node.args[1]
    if not isinstance(axis, int) or not isinstance(index, int):
        return None
    parts = holder.args[0]  # type: ignore[union-attr]
    if axis % rank(holder) != int(holder.args[1]) % rank(holder) or not -len(parts) <= index < len(parts):  # type: ignore[union-attr, arg-type]
        return None
    part = parts[index]  # type: ignore[index]
    if val(part).dtype != val(node).dtype or not same_sizes(val(part).shape, val(node).shape):
        return f"{site_of(holder)} also changes the dtype"  # type: ignore[arg-type]
    return part, f"is member {index} of {op_name(holder.target)}"  # type: ignore[union-attr]
