"""ATen rows: other shapes for the same numbers (reshape, transpose, slice, join), sizes, casts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from graphwright.ops.axes import names, regroup
from graphwright.ops.registry import CAST, LAYOUT_FREE, SHAPE, VIEW, described, op

Words = Sequence[str]


def _view(name: str, body: Any, summary: str, axes: Any, overloads: Sequence[str] = ("default",)) -> None:
    op(f"aten.{name}", axes=axes, traits={VIEW}, overloads=overloads)(described(body, summary))


def _spell(left: Words, *results: Words) -> str:
    return f"{' '.join(left)} -> {', '.join(' '.join(r) for r in results)}"


# -- regrouping ------------------------------------------------------------------------------------------------------


def _full(shape: Sequence[Any], size: Sequence[Any]) -> list[Any]:
    """``size`` with its -1 worked out."""
    size = list(size)
    for k, n in enumerate(size):
        if isinstance(n, int) and n == -1:
            others = prod(size[:k] + size[k + 1 :])
            size[k] = prod(shape) // others if not (isinstance(others, int) and others == 0) else 0
    return size


def _flat(shape: Sequence[Any], start: int, end: int) -> list[Any]:
    if not shape:
        return [1]
    start, end = start % len(shape), end % len(shape)
    return [*shape[:start], prod(shape[start : end + 1]), *shape[end + 1 :]]


def _unflat(shape: Sequence[Any], dim: int, sizes: Sequence[Any]) -> list[Any]:
    dim %= len(shape)
    return [*shape[:dim], *_full(shape[dim : dim + 1], sizes), *shape[dim + 1 :]]


def _regrouped(target: Any) -> Any:
    """The axes rule of a reshape whose target shape is ``target(args by name)``."""
    return lambda **args: regroup(args["self"].shape, target(args))


_to_size = _regrouped(lambda a: _full(a["self"].shape, a["size"] if "size" in a else a["shape"]))
_view("view", lambda x, size: torch.reshape(x, size), "The same elements in row-major order as another shape.", _to_size)
_view("_unsafe_view", lambda x, size: torch.reshape(x, size).clone(), "The same elements as another shape.", _to_size)
_view("reshape", torch.reshape, "The same elements in row-major order as another shape; copied where strides demand it.", _to_size)
op("aten.view_as", axes=lambda **a: regroup(a["self"].shape, a["other"].shape).replace(" ->", ", ... ->"), traits={VIEW})(
    described(lambda x, other: torch.reshape(x, other.shape), "The same elements in the shape of another tensor."))
op("aten.reshape_as", axes=lambda **a: regroup(a["self"].shape, a["other"].shape).replace(" ->", ", ... ->"), traits={VIEW})(
    described(lambda x, other: torch.reshape(x, other.shape), "The same elements in the shape of another tensor."))
_view("flatten", lambda x, start_dim=0, end_dim=-1: torch.reshape(x, _flat(x.shape, start_dim, end_dim)), "Axes from start to end as one.",
      _regrouped(lambda a: _flat(a["self"].shape, a["start_dim"], a["end_dim"])), ("using_ints",))  # fmt: skip
_view("unflatten", lambda x, dim, sizes: torch.reshape(x, _unflat(x.shape, dim, sizes)), "One axis as several.",
      _regrouped(lambda a: _unflat(a["self"].shape, a["dim"], a["sizes"])), ("int",))  # fmt: skip


def _squeezed(**args: Any) -> str:
    x, dim = args["self"], args.get("dim")
    given = range(x.ndim) if dim is None else dim if isinstance(dim, (list, tuple)) else [dim]
    over = {d % max(x.ndim, 1) for d in given}
    gone = [k in over and isinstance(n, int) and n == 1 for k, n in enumerate(x.shape)]
    axes = ["1" if g else a for g, a in zip(gone, names(x.ndim), strict=True)]
    return _spell(axes, [a for a in axes if a != "1"])


def _unsqueezed(**args: Any) -> str:
    axes = names(args["self"].ndim)
    at = args["dim"] % (len(axes) + 1)
    return _spell(axes, [*axes[:at], "1", *axes[at:]])


_view("squeeze", torch.squeeze, "Without axes of size 1: all, one, or those named.", _squeezed, ("default", "dim", "dims"))
_view("unsqueeze", torch.unsqueeze, "With one more axis, of size 1.", _unsqueezed)

# -- order of axes ---------------------------------------------------------------------------------------------------


def _permuted(order: Any) -> Any:
    """The axes rule of an op that puts axes into the order ``order(ndim, args by name)``."""

    def rule(**args: Any) -> str:
        axes = names(args["self"].ndim)
        return _spell(axes, [axes[k] for k in order(len(axes), args)])

    return rule


def _swap(ndim: int, a: int, b: int) -> list[int]:
    order = list(range(ndim))
    if ndim:
        order[a], order[b] = order[b], order[a]
    return order


def _move(ndim: int, source: Any, destination: Any) -> list[int]:
    ends = [v if isinstance(v, (list, tuple)) else [v] for v in (source, destination)]
    placed = {d % ndim: s % ndim for s, d in zip(*ends, strict=True)}
    rest = (k for k in range(ndim) if k not in placed.values())
    return [placed[k] if k in placed else next(rest) for k in range(ndim)]


def _by_order(order: Any) -> Any:
    return lambda x, *args: torch.permute(x, order(x.ndim, *args))


_swapped = _permuted(lambda n, a: _swap(n, a.get("dim0", a.get("axis0")), a.get("dim1", a.get("axis1"))))
_view("permute", torch.permute, "Axes in another order.", _permuted(lambda n, a: [d % n for d in a["dims"]]))
for _name, _overload in (("transpose", "int"), ("swapaxes", "default"), ("swapdims", "default")):
    _view(_name, _by_order(_swap), "Two axes exchanged.", _swapped, (_overload,))
for _name, _order in (("t", lambda n: list(reversed(range(n)))), ("numpy_T", lambda n: list(reversed(range(n)))),
                      ("mT", lambda n: _swap(n, -2, -1))):  # fmt: skip
    _view(_name, _by_order(_order), "Axes reversed, or the last two exchanged (mT).", _permuted(lambda n, a, f=_order: f(n)))
for _name in ("movedim", "moveaxis"):
    _view(_name, _by_order(_move), "Axes moved, the others in their order.",
          _permuted(lambda n, a: _move(n, a["source"], a["destination"])), ("int", "intlist"))  # fmt: skip

# -- broadcasting and repeating --------------------------------------------------------------------------------------


def _expanded(shape: Sequence[Any], size: Sequence[Any]) -> str:
    fresh = count()
    axes = ["1" if isinstance(n, int) and n == 1 else a for n, a in zip(shape, names(len(shape)), strict=True)]
    wanted = [f"new{next(fresh)}" for _ in range(len(size) - len(shape))]
    for axis, n in zip(axes, size[len(size) - len(shape) :], strict=True):
        grows = axis == "1" and not (isinstance(n, int) and n in (1, -1))
        wanted.append(f"new{next(fresh)}" if grows else axis)
    return _spell(axes, wanted)


def _repeated(**args: Any) -> str:
    axes, times = names(args["self"].ndim), list(args["repeats"] if "repeats" in args else args["dims"])
    times = [1] * (len(axes) - len(times)) + times
    lead = len(times) - len(axes)
    words = [f"new{k}" for k in range(lead)]
    words += [a if isinstance(t, int) and t == 1 else f"(new{lead + k} {a})" for k, (t, a) in enumerate(zip(times[lead:], axes, strict=True))]
    return _spell(axes, words)


def _repeat(x: Tensor, repeats: Sequence[Any]) -> Tensor:
    repeats = [1] * (x.ndim - len(repeats)) + list(repeats)
    x = x.reshape([1] * (len(repeats) - x.ndim) + list(x.shape))
    for dim, times in enumerate(repeats):
        x = torch.cat([x] * times, dim) if times else x.narrow(dim, 0, 0)
    return x.clone()


def _interleaved(**args: Any) -> str:
    axes, dim = names(args["self"].ndim), args.get("dim")
    if dim is None:
        return _spell(axes, [f"({' '.join(axes)} new)"])
    dim %= len(axes)
    return _spell(axes, [f"({a} new)" if k == dim else a for k, a in enumerate(axes)])


def _interleave(x: Tensor, repeats: Any, dim: int | None = None, *, output_size: Any = None) -> Tensor:
    x, dim = (x.reshape(-1), 0) if dim is None else (x, dim % x.ndim)
    shape = list(x.shape)
    return x.unsqueeze(dim + 1).expand(*shape[: dim + 1], repeats, *shape[dim + 1 :]).flatten(dim, dim + 1).clone()


_view("expand", lambda x, size, *, implicit=False: torch.broadcast_to(x, [x.shape[k - len(size)] if n == -1 else n for k, n in enumerate(size)])
      if -1 in size else torch.broadcast_to(x, size), "Axes of size 1 repeated without a copy.",
      lambda **a: _expanded(a["self"].shape, a["size"]))  # fmt: skip
op("aten.expand_as", axes=lambda **a: _expanded(a["self"].shape, a["other"].shape).replace(" ->", ", ... ->"), traits={VIEW})(
    described(lambda x, other: torch.broadcast_to(x, other.shape), "Axes of size 1 repeated, to the shape of another tensor."))
_view("broadcast_to", torch.broadcast_to, "Axes of size 1 repeated without a copy.", lambda **a: _expanded(a["self"].shape, a["size"]))
_view("repeat", _repeat, "The whole tensor so many times along each axis.", _repeated)
_view("tile", _repeat, "The whole tensor so many times along each axis.", _repeated)
_view("repeat_interleave", _interleave, "Each element so many times in a row.", _interleaved, ("self_int",))


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
        return _spell([f"[{a}]" if k == dim else a for k, a in enumerate(axes)], [f"{a}_part" if k == dim else a for k, a in enumerate(axes)])
    pieces = [str(start)] * (start > 0) + [axes[dim]] + [str(size - end)] * (end < size)
    word = pieces[0] if len(pieces) == 1 else f"({' + '.join(pieces)})"
    return _spell([word if k == dim else a for k, a in enumerate(axes)], axes)


def _sliced(**args: Any) -> str:
    x, dim = args["self"], args["dim"] % args["self"].ndim
    axes = names(x.ndim)
    if args["step"] != 1:
        return _spell([f"[{a}]" if k == dim else a for k, a in enumerate(axes)], [f"{a}_part" if k == dim else a for k, a in enumerate(axes)])
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
    return _spell([f"[{a}]" if k == dim else a for k, a in enumerate(axes)], axes[:dim] + axes[dim + 1 :])


_view("slice", _slice, "Every step-th element of an axis from start to end.", _sliced, ("Tensor",))
_view("narrow", lambda x, dim, start, length: _slice(x, dim, start, (start + x.shape[dim] if start < 0 else start) + length),
      "So many elements of an axis from start on.", _narrowed)  # fmt: skip
_view("select", lambda x, dim, index: torch.narrow(x, dim, index + x.shape[dim] if index < 0 else index, 1).squeeze(dim),
      "One index of an axis, which goes away.", _selected, ("int",))  # fmt: skip


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
        return _spell(given[:dim] + left + given[dim + 1 :], *(given[:dim] + [p] + given[dim + 1 :] for p in pieces))

    def body(x: Tensor, how: Any, dim: int = 0) -> list[Tensor]:
        start, parts = 0, []
        for size in rule(x.shape[dim], {argument: how}):
            parts.append(torch.narrow(x, dim, start, size))
            start = start + size
        return parts if not name.endswith("copy") else [p.clone() for p in parts]

    _view(name, body, "An axis cut into parts.", axes, (overload,))


for _row in _SPLITS:
    _split_row(*_row)


def _unbound(**args: Any) -> str:
    x, dim = args["self"], args["dim"] % args["self"].ndim
    axes = names(x.ndim)
    return _spell([f"[{a}]" if k == dim else a for k, a in enumerate(axes)], *[axes[:dim] + axes[dim + 1 :]] * x.shape[dim])


_view("unbind", lambda x, dim=0: [torch.narrow(x, dim, k, 1).squeeze(dim) for k in range(x.shape[dim])], "Every index of an axis, by itself.", _unbound, ("int",))
_view("unfold", lambda x, dimension, size, step: x.unfold(dimension, size, step), "Windows over an axis, as a new last axis.", None)


_view("diagonal", lambda x, offset=0, dim1=0, dim2=1: torch.diagonal(x, offset, dim1, dim2), "A diagonal of two axes, as a new last axis.", None)

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
    _view(_name, lambda tensors, dim=0: torch.cat(list(tensors), dim), "Tensors end to end along an axis.", _joined)
_view("stack", lambda tensors, dim=0: torch.cat([t.unsqueeze(dim) for t in tensors], dim), "Tensors along a new axis.", _stacked)


def _flip_axes(**args: Any) -> str:
    dims = args["dims"] if isinstance(args["dims"], (list, tuple)) else [args["dims"]]
    axes = names(args["self"].ndim)
    over = {d % len(axes) for d in dims} if dims or "shifts" not in args else set(range(len(axes)))
    return _spell([f"[{a}]" if k in over else a for k, a in enumerate(axes)], axes)


def _roll(x: Tensor, shifts: Any, dims: Any = ()) -> Tensor:
    shifts, dims = ([v] if isinstance(v, int) else list(v) for v in (shifts, dims))
    if not dims:
        return _roll(x.reshape(-1), shifts, [0]).reshape(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        at = shift % x.shape[dim] if x.shape[dim] else 0
        x = torch.cat([torch.narrow(x, dim, x.shape[dim] - at, at), torch.narrow(x, dim, 0, x.shape[dim] - at)], dim)
    return x.clone()


_view("flip", torch.flip, "Axes in reverse.", _flip_axes)
_view("roll", _roll, "Elements moved along axes; what falls off comes in at the other end.", _flip_axes)
op("aten.meshgrid", axes=None, traits={VIEW}, overloads=("default", "indexing"))(
    described(lambda tensors, *, indexing="ij": list(torch.meshgrid(*tensors, indexing=indexing)), "Coordinates of a grid."))
op("aten.broadcast_tensors", axes=None, traits={VIEW})(
    described(lambda tensors: list(torch.broadcast_tensors(*tensors)), "Tensors in their common shape."))
_view("view_as_complex", lambda x: torch.complex(x[..., 0], x[..., 1]), "Pairs on the last axis as complex numbers.", "* 2 -> *")
_view("view_as_real", lambda x: torch.stack([x.real, x.imag], -1), "Complex numbers as pairs on a new last axis.", "* -> * 2")

# -- copies, casts, sizes --------------------------------------------------------------------------------------------


def _cast(name: str, body: Any, summary: str, overloads: Sequence[str] = ("default",), layout_free: bool = False, axes: str = "* -> *") -> None:
    op(f"aten.{name}", axes=axes, traits={CAST, LAYOUT_FREE} if layout_free else {CAST}, overloads=overloads)(described(body, summary))


def _converted(x: Tensor, dtype: Any, device: Any, memory_format: Any) -> Tensor:
    y = torch.empty_like(x, dtype=dtype, device=device, memory_format=memory_format or torch.preserve_format)
    return torch.ops.aten.copy.default(y, x)


def _copied(x: Tensor, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
            non_blocking: bool = False, memory_format: Any = None) -> Tensor:  # fmt: skip
    return _converted(x, dtype, device, memory_format)


_cast("to", lambda x, dtype, non_blocking=False, copy=False, memory_format=None: _converted(x, dtype, None, memory_format),
      "As another dtype.", ("dtype",))  # fmt: skip
_cast("to", lambda x, device, dtype, non_blocking=False, copy=False, memory_format=None: _converted(x, dtype, device, memory_format),
      "On another device, as another dtype.", ("device",))  # fmt: skip
_cast("to", lambda x, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, copy=False, memory_format=None:
      _converted(x, dtype, device, memory_format), "As another dtype, on another device.", ("dtype_layout",))  # fmt: skip
_cast("to", lambda x, other, non_blocking=False, copy=False, memory_format=None: _converted(x, other.dtype, other.device, memory_format),
      "As the dtype, on the device of another tensor.", ("other",), axes="*, ... -> *")  # fmt: skip
_cast("_to_copy", _copied, "A copy as another dtype, on another device.")
_cast("type_as", lambda x, other: _converted(x, other.dtype, other.device, None), "As the dtype of another tensor.", axes="*, ... -> *")
_cast("contiguous", lambda x, *, memory_format=torch.contiguous_format: _converted(x, None, None, memory_format), "Laid out in a memory format.")
_cast("clone", lambda x, *, memory_format=None: _converted(x, None, None, memory_format), "A copy.")
for _name in ("detach", "alias", "lift_fresh"):
    _cast(_name, lambda x: x.clone(), "The tensor itself: cut from the gradient, under another name, or a constant.", layout_free=True)
_cast("lift_fresh_copy", lambda x: x.clone(), "A copy of a constant.")

op("aten.sym_size", axes=None, traits={SHAPE}, overloads=("int",))(described(lambda x, dim: x.shape[dim], "The size of an axis."))
op("aten.sym_numel", axes=None, traits={SHAPE})(described(lambda x: prod(x.shape), "How many elements."))
op("aten.sym_stride", axes=None, traits={SHAPE}, overloads=("int",))(described(lambda x, dim: x.stride(dim), "The stride of an axis."))
