"""ATen rows: parts of tensors and tensors joined: slice, select, split, cat, stack, flip, roll."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from graphwright.ops.axes import names
from graphwright.ops.registry import VIEW, described, op
from graphwright.ops.view import Words, spell, view

# -- parts -----------------------------------------------------------------------------------------------------------


def _bounds(size: Any, start: Any, end: Any) -> tuple[Any, Any]:
    """Start and end of a slice as Python has them, within the axis."""

    def fit(v: Any, default: Any) -> Any:
        v = default if v is None else v
        if isinstance(v, int) and isinstance(size, int):
            return min(max(v + size if v < 0 else v, 0), size)
        return torch.sym_min(torch.sym_max(v + size if v < 0 else v, 0), size)

    start = fit(start, 0)
    return start, torch.sym_max(fit(end, size), start)


def _part(axes: Words, dim: int, size: Any, start: Any, end: Any) -> str:
    """The spelling of ``start:end`` of an axis: what is left out stands in the input as literal sizes."""
    plain = all(isinstance(v, int) for v in (size, start, end))
    if not plain:
        return spell(
            [f"[{a}]" if k == dim else a for k, a in enumerate(axes)],
            [f"{a}_part" if k == dim else a for k, a in enumerate(axes)],
        )
    pieces = [str(start)] * (start > 0) + [axes[dim]] + [str(size - end)] * (end < size)
    word = pieces[0] if len(pieces) == 1 else f"({' + '.join(pieces)})"
    return spell([word if k == dim else a for k, a in enumerate(axes)], axes)


def _sliced(**args: Any) -> str:
    x, dim = args["self"], args["dim"] % args["self"].ndim
    axes = names(x.ndim)
    if args["step"] != 1:
        return spell(
            [f"[{a}]" if k == dim else a for k, a in enumerate(axes)],
            [f"{a}_part" if k == dim else a for k, a in enumerate(axes)],
        )
    return _part(axes, dim, x.shape[dim], *_bounds(x.shape[dim], args["start"], args["end"]))


def _slice(x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Tensor:
    start, end = _bounds(x.shape[dim], start, end)
    x = torch.narrow(x, dim, start, end - start)
    return x if step == 1 else x.unfold(dim, 1, step).squeeze(-1)


def _narrowed(**args: Any) -> str:
    x, dim = args["self"], args["dim"] % args["self"].ndim
    start = args["start"]
    start = start + x.shape[dim] if isinstance(start, int) and start < 0 else start
    return _part(names(x.ndim), dim, x.shape[dim], start, start + args["length"])


def _selected(**args: Any) -> str:
    axes = names(args["self"].ndim)
    dim = args["dim"] % len(axes)
    return spell([f"[{a}]" if k == dim else a for k, a in enumerate(axes)], axes[:dim] + axes[dim + 1 :])


view("slice", _slice, "Every step-th element of an axis from start to end.", _sliced, ("Tensor",))
view(
    "narrow",
    lambda x, dim, start, length: _slice(x, dim, start, (start + x.shape[dim] if start < 0 else start) + length),
    "So many elements of an axis from start on.",
    _narrowed,
)
view(
    "select",
    lambda x, dim, index: torch.narrow(x, dim, index + x.shape[dim] if index < 0 else index, 1).squeeze(dim),
    "One index of an axis, which goes away.",
    _selected,
    ("int",),
)


def _chunks(size: Any, pieces: Any) -> list[Any]:
    """Sizes of the pieces of ``pieces`` elements each, the last smaller."""
    found = [pieces] * (size // pieces) if pieces else []
    return found + [size - sum(found)] if size != sum(found) or not found else found


def _even(size: Any, sections: int) -> list[Any]:
    return [size // sections + (k < size % sections) for k in range(sections)]


def _at(size: Any, indices: Sequence[Any]) -> list[Any]:
    edges = [0, *(min(i + size if i < 0 else i, size) for i in indices), size]
    return [max(b - a, 0) for a, b in pairwise(edges)]


_SPLITS: tuple[tuple[str, str, Any, str], ...] = (
    ("split", "Tensor", lambda n, a: _chunks(n, a["split_size"]), "split_size"),
    ("split", "sizes", lambda n, a: list(a["split_size"]), "split_size"),
    ("split_with_sizes", "default", lambda n, a: list(a["split_sizes"]), "split_sizes"),
    ("split_with_sizes_copy", "default", lambda n, a: list(a["split_sizes"]), "split_sizes"),
    ("chunk", "default", lambda n, a: _chunks(n, -(-n // a["chunks"])), "chunks"),
    ("tensor_split", "sections", lambda n, a: _even(n, a["sections"]), "sections"),
    ("tensor_split", "indices", lambda n, a: _at(n, a["indices"]), "indices"),
)


def _split_row(name: str, overload: str, rule: Any, argument: str) -> None:
    def axes(**args: Any) -> str:
        given, dim = names(args["self"].ndim), args["dim"] % args["self"].ndim
        pieces = [f"p{k}" for k in range(len(rule(args["self"].shape[dim], args)))]
        left = [f"({' + '.join(pieces)})" if len(pieces) > 1 else "p0"]
        return spell(given[:dim] + left + given[dim + 1 :], *(given[:dim] + [p] + given[dim + 1 :] for p in pieces))

    def body(x: Tensor, how: Any, dim: int = 0) -> list[Tensor]:
        start, parts = 0, []
        for size in rule(x.shape[dim], {argument: how}):
            parts.append(torch.narrow(x, dim, start, size))
            start = start + size
        return parts if not name.endswith("copy") else [p.clone() for p in parts]

    view(name, body, "An axis cut into parts.", axes, (overload,))


for _row in _SPLITS:
    _split_row(*_row)


def _unbound(**args: Any) -> str:
    x, dim = args["self"], args["dim"] % args["self"].ndim
    axes = names(x.ndim)
    return spell(
        [f"[{a}]" if k == dim else a for k, a in enumerate(axes)], *[axes[:dim] + axes[dim + 1 :]] * x.shape[dim]
    )


view(
    "unbind",
    lambda x, dim=0: [torch.narrow(x, dim, k, 1).squeeze(dim) for k in range(x.shape[dim])],
    "Every index of an axis, by itself.",
    _unbound,
    ("int",),
)
view(
    "unfold",
    lambda x, dimension, size, step: x.unfold(dimension, size, step),
    "Windows over an axis, as a new last axis.",
    None,
)


view(
    "diagonal",
    lambda x, offset=0, dim1=0, dim2=1: torch.diagonal(x, offset, dim1, dim2),
    "A diagonal of two axes, as a new last axis.",
    None,
)

# -- joining ---------------------------------------------------------------------------------------------------------


def _joined(**args: Any) -> str:
    tensors = args["tensors"]
    rank = max(t.ndim for t in tensors)
    axes, dim = names(rank), args["dim"] % rank
    skipped = [t.ndim == 1 and rank != 1 for t in tensors]  # an empty vector may be joined to anything
    words = ["0" if s else f"p{k}" for k, s in enumerate(skipped)]
    left = [w if s else " ".join(axes[:dim] + [w] + axes[dim + 1 :]) for w, s in zip(words, skipped, strict=True)]
    parts = [w for w, s in zip(words, skipped, strict=True) if not s]
    result = f"({' + '.join(parts)})" if len(parts) > 1 else parts[0]
    return f"{', '.join(left)} -> {' '.join(axes[:dim] + [result] + axes[dim + 1 :])}"


def _stacked(**args: Any) -> str:
    axes = names(args["tensors"][0].ndim)
    at = args["dim"] % (len(axes) + 1)
    return f"{', '.join([' '.join(axes)] * len(args['tensors']))} -> {' '.join(axes[:at] + ['new'] + axes[at:])}"


for _name in ("cat", "concat"):
    view(_name, lambda tensors, dim=0: torch.cat(list(tensors), dim), "Tensors end to end along an axis.", _joined)
view(
    "stack",
    lambda tensors, dim=0: torch.cat([t.unsqueeze(dim) for t in tensors], dim),
    "Tensors along a new axis.",
    _stacked,
)


def _flip_axes(**args: Any) -> str:
    dims = args["dims"] if isinstance(args["dims"], (list, tuple)) else [args["dims"]]
    axes = names(args["self"].ndim)
    over = {d % len(axes) for d in dims} if dims or "shifts" not in args else set(range(len(axes)))
    return spell([f"[{a}]" if k in over else a for k, a in enumerate(axes)], axes)


def _roll(x: Tensor, shifts: Any, dims: Any = ()) -> Tensor:
    shifts, dims = ([v] if isinstance(v, int) else list(v) for v in (shifts, dims))
    if not dims:
        return _roll(x.reshape(-1), shifts, [0]).reshape(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        at = shift % x.shape[dim] if x.shape[dim] else 0
        x = torch.cat([torch.narrow(x, dim, x.shape[dim] - at, at), torch.narrow(x, dim, 0, x.shape[dim] - at)], dim)
    return x.clone()


view("flip", torch.flip, "Axes in reverse.", _flip_axes)
view("roll", _roll, "Elements moved along axes; what falls off comes in at the other end.", _flip_axes)
op("aten.meshgrid", axes=None, traits={VIEW}, overloads=("default", "indexing"))(
    described(
        lambda tensors, *, indexing="ij": list(torch.meshgrid(*tensors, indexing=indexing)), "Coordinates of a grid."
    )
)
op("aten.broadcast_tensors", axes=None, traits={VIEW})(
    described(lambda tensors: list(torch.broadcast_tensors(*tensors)), "Tensors in their common shape.")
)
view(
    "view_as_complex",
    lambda x: torch.complex(x[..., 0], x[..., 1]),
    "Pairs on the last axis as complex numbers.",
    "* 2 -> *",
)
view(
    "view_as_real",
    lambda x: torch.stack([x.real, x.imag], -1),
    "Complex numbers as pairs on a new last axis.",
    "* -> * 2",
)
