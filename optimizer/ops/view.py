"""ATen rows: the same numbers in another shape: reshape, squeeze, transpose, expand, repeat."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from math import prod
from typing import Any

import torch
from torch import Tensor

from graphwright.ops.axes import names, regroup
from graphwright.ops.registry import VIEW, described, op

Words = Sequence[str]


def view(name: str, body: Any, summary: str, axes: Any, overloads: Sequence[str] = ("default",)) -> None:
    op(f"aten.{name}", axes=axes, traits={VIEW}, overloads=overloads)(described(body, summary))


def spell(left: Words, *results: Words) -> str:
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
view("view", lambda x, size: torch.reshape(x, size), "The same elements in row-major order as another shape.", _to_size)
view("_unsafe_view", lambda x, size: torch.reshape(x, size).clone(), "The same elements as another shape.", _to_size)
view(
    "reshape",
    torch.reshape,
    "The same elements in row-major order as another shape; copied where strides demand it.",
    _to_size,
)
op(
    "aten.view_as",
    axes=lambda **a: regroup(a["self"].shape, a["other"].shape).replace(" ->", ", ... ->"),
    traits={VIEW},
)(described(lambda x, other: torch.reshape(x, other.shape), "The same elements in the shape of another tensor."))
op(
    "aten.reshape_as",
    axes=lambda **a: regroup(a["self"].shape, a["other"].shape).replace(" ->", ", ... ->"),
    traits={VIEW},
)(described(lambda x, other: torch.reshape(x, other.shape), "The same elements in the shape of another tensor."))
view(
    "flatten",
    lambda x, start_dim=0, end_dim=-1: torch.reshape(x, _flat(x.shape, start_dim, end_dim)),
    "Axes from start to end as one.",
    _regrouped(lambda a: _flat(a["self"].shape, a["start_dim"], a["end_dim"])),
    ("using_ints",),
)
view(
    "unflatten",
    lambda x, dim, sizes: torch.reshape(x, _unflat(x.shape, dim, sizes)),
    "One axis as several.",
    _regrouped(lambda a: _unflat(a["self"].shape, a["dim"], a["sizes"])),
    ("int",),
)


def _squeezed(**args: Any) -> str:
    x, dim = args["self"], args.get("dim")
    given = range(x.ndim) if dim is None else dim if isinstance(dim, (list, tuple)) else [dim]
    over = {d % max(x.ndim, 1) for d in given}
    gone = [k in over and isinstance(n, int) and n == 1 for k, n in enumerate(x.shape)]
    axes = ["1" if g else a for g, a in zip(gone, names(x.ndim), strict=True)]
    return spell(axes, [a for a in axes if a != "1"])


def _unsqueezed(**args: Any) -> str:
    axes = names(args["self"].ndim)
    at = args["dim"] % (len(axes) + 1)
    return spell(axes, [*axes[:at], "1", *axes[at:]])


view(
    "squeeze", torch.squeeze, "Without axes of size 1: all, one, or those named.", _squeezed, ("default", "dim", "dims")
)
view("unsqueeze", torch.unsqueeze, "With one more axis, of size 1.", _unsqueezed)

# -- order of axes ---------------------------------------------------------------------------------------------------


def _permuted(order: Any) -> Any:
    """The axes rule of an op that puts axes into the order ``order(ndim, args by name)``."""

    def rule(**args: Any) -> str:
        axes = names(args["self"].ndim)
        return spell(axes, [axes[k] for k in order(len(axes), args)])

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
view("permute", torch.permute, "Axes in another order.", _permuted(lambda n, a: [d % n for d in a["dims"]]))
for _name, _overload in (("transpose", "int"), ("swapaxes", "default"), ("swapdims", "default")):
    view(_name, _by_order(_swap), "Two axes exchanged.", _swapped, (_overload,))
for _name, _order in (
    ("t", lambda n: list(reversed(range(n)))),
    ("numpy_T", lambda n: list(reversed(range(n)))),
    ("mT", lambda n: _swap(n, -2, -1)),
):
    view(
        _name,
        _by_order(_order),
        "Axes reversed, or the last two exchanged (mT).",
        _permuted(lambda n, a, f=_order: f(n)),
    )
for _name in ("movedim", "moveaxis"):
    view(
        _name,
        _by_order(_move),
        "Axes moved, the others in their order.",
        _permuted(lambda n, a: _move(n, a["source"], a["destination"])),
        ("int", "intlist"),
    )

# -- broadcasting and repeating --------------------------------------------------------------------------------------


def _expanded(shape: Sequence[Any], size: Sequence[Any]) -> str:
    fresh = count()
    axes = ["1" if isinstance(n, int) and n == 1 else a for n, a in zip(shape, names(len(shape)), strict=True)]
    wanted = [f"new{next(fresh)}" for _ in range(len(size) - len(shape))]
    for axis, n in zip(axes, size[len(size) - len(shape) :], strict=True):
        grows = axis == "1" and not (isinstance(n, int) and n in (1, -1))
        wanted.append(f"new{next(fresh)}" if grows else axis)
    return spell(axes, wanted)


def _repeated(**args: Any) -> str:
    axes, times = names(args["self"].ndim), list(args["repeats"] if "repeats" in args else args["dims"])
    times = [1] * (len(axes) - len(times)) + times
    lead = len(times) - len(axes)
    words = [f"new{k}" for k in range(lead)]
    words += [
        a if isinstance(t, int) and t == 1 else f"(new{lead + k} {a})"
        for k, (t, a) in enumerate(zip(times[lead:], axes, strict=True))
    ]
    return spell(axes, words)


def _repeat(x: Tensor, repeats: Sequence[Any]) -> Tensor:
    repeats = [1] * (x.ndim - len(repeats)) + list(repeats)
    x = x.reshape([1] * (len(repeats) - x.ndim) + list(x.shape))
    for dim, times in enumerate(repeats):
        x = torch.cat([x] * times, dim) if times else x.narrow(dim, 0, 0)
    return x.clone()


def _interleaved(**args: Any) -> str:
    axes, dim = names(args["self"].ndim), args.get("dim")
    if dim is None:
        return spell(axes, [f"({' '.join(axes)} new)"])
    dim %= len(axes)
    return spell(axes, [f"({a} new)" if k == dim else a for k, a in enumerate(axes)])


def _interleave(x: Tensor, repeats: Any, dim: int | None = None, *, output_size: Any = None) -> Tensor:
    x, dim = (x.reshape(-1), 0) if dim is None else (x, dim % x.ndim)
    shape = list(x.shape)
    return x.unsqueeze(dim + 1).expand(*shape[: dim + 1], repeats, *shape[dim + 1 :]).flatten(dim, dim + 1).clone()


def _expand(x: Tensor, size: Sequence[Any], *, implicit: bool = False) -> Tensor:
    kept = [x.shape[k - len(size)] if isinstance(n, int) and n == -1 else n for k, n in enumerate(size)]
    return torch.broadcast_to(x, kept)


view("expand", _expand, "Axes of size 1 repeated without a copy.", lambda **a: _expanded(a["self"].shape, a["size"]))
op(
    "aten.expand_as",
    axes=lambda **a: _expanded(a["self"].shape, a["other"].shape).replace(" ->", ", ... ->"),
    traits={VIEW},
)(
    described(
        lambda x, other: torch.broadcast_to(x, other.shape), "Axes of size 1 repeated, to the shape of another tensor."
    )
)
view(
    "broadcast_to",
    torch.broadcast_to,
    "Axes of size 1 repeated without a copy.",
    lambda **a: _expanded(a["self"].shape, a["size"]),
)
view("repeat", _repeat, "The whole tensor so many times along each axis.", _repeated)
view("tile", _repeat, "The whole tensor so many times along each axis.", _repeated)
view("repeat_interleave", _interleave, "Each element so many times in a row.", _interleaved, ("self_int",))
