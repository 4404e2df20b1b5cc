"""ATen rows: picking and placing by index; embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright.ops.axes import names
from graphwright.ops.registry import VIEW, op


@op("aten.embedding", axes="[v] d, * -> * d")
def embedding(weight: Tensor, indices: Tensor, padding_idx: Any = -1, scale_grad_by_freq: bool = False,
              sparse: bool = False) -> Tensor:  # fmt: skip
    """Rows of a table: ``weight [v, d]``, integer ``indices [*]``, gives ``[*, d]``."""
    return torch.index_select(weight, 0, indices.reshape(-1)).reshape(*indices.shape, weight.shape[1])


@op("aten.embedding_bag", axes=None, overloads=("padding_idx", "default"))
def embedding_bag(weight: Tensor, indices: Tensor, offsets: Tensor, *rest: Any) -> Any:
    """Sums, means or maxima of bags of rows of a table."""
    chosen = torch.ops.aten.embedding_bag.padding_idx if len(rest) == 6 else torch.ops.aten.embedding_bag.default
    return chosen(weight, indices, offsets, *rest)


def _one_hot(self: Tensor, num_classes: Any = -1) -> Tensor:
    """1 at each index of a new last axis, 0 elsewhere."""
    return (self.unsqueeze(-1) == torch.arange(num_classes, device=self.device)).to(torch.int64)


op("aten.one_hot", axes="* -> * new")(_one_hot)


def _picked(**args: Any) -> str | None:
    axes, dim = names(args["self"].ndim), args["dim"]
    if not axes:
        return None
    dim %= len(axes)
    left = [f"[{a}]" if k == dim else a for k, a in enumerate(axes)]
    return f"{' '.join(left)}, {'n' if args['index'].ndim else ''} -> {' '.join(axes[:dim] + ['n'] + axes[dim + 1 :])}"


@op("aten.index_select", axes=_picked)
def index_select(self: Tensor, dim: int, index: Tensor) -> Tensor:
    """The elements of an axis that a vector of indices names."""
    parts = [slice(None)] * (dim % max(self.ndim, 1))
    return self[(*parts, index.reshape(-1))] if self.ndim else self.clone()


def _index_axes(**args: Any) -> str | None:
    x, indices = args["self"], list(args["indices"])
    tensors = [i for i in indices if i is not None]
    if not tensors or any(i.dtype in (torch.bool, torch.uint8) for i in tensors):
        return None
    axes = names(x.ndim)
    at = [k for k, i in enumerate(indices) if i is not None]
    left = " ".join(f"[{a}]" if k in at else a for k, a in enumerate(axes))
    kept = [a for k, a in enumerate(axes) if k not in at]
    first = at[0] if at[-1] - at[0] == len(at) - 1 else 0
    return f"{left}, {', '.join('*' for _ in indices)} -> {' '.join([*kept[:first], '*', *kept[first:]])}"


@op("aten.index", axes=_index_axes, overloads=("Tensor",))
def index(self: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Indexing by tensors, one per axis or None, as in NumPy."""
    return self[tuple(slice(None) if i is None else i for i in indices)]


@op("aten.gather", axes=None)
def gather(self: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """``out[i, j] = self[i, index[i, j]]`` for dim 1, and so on."""
    if not self.ndim or not index.ndim:
        return torch.gather(self, dim, index)
    grid = torch.meshgrid(*(torch.arange(n, device=index.device) for n in index.shape), indexing="ij")
    return self[tuple(index if k == dim % self.ndim else g for k, g in enumerate(grid))]


@op("aten.take_along_dim", axes=None)
def take_along_dim(self: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """As gather, the other axes broadcast; among all elements where no axis is given."""
    return torch.take_along_dim(self, indices, dim)


def _scattered(self: Tensor, dim: int, index: Tensor, src: Any) -> Tensor:
    """A copy of self with ``out[i, index[i, j]] = src[i, j]`` for dim 1, and so on."""
    return torch.scatter(self, dim, index, src)


op("aten.scatter", axes=None, overloads=("src", "value"))(_scattered)


@op("aten.scatter_add", axes=None)
def scatter_add(self: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """As scatter, but added."""
    return torch.scatter_add(self, dim, index, src)


@op("aten.scatter_reduce", axes=None, overloads=("two",))
def scatter_reduce(
    self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """As scatter, what meets being summed, multiplied, averaged, or its extreme taken."""
    return torch.scatter_reduce(self, dim, index, src, reduce, include_self=include_self)


@op("aten.index_put", axes=None)
def index_put(self: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """A copy of self with values at the indexed places, or added there."""
    out = self.clone()
    if accumulate:
        return torch.index_put(self, tuple(indices), values, True)  # type: ignore[arg-type]
    out[tuple(slice(None) if i is None else i for i in indices)] = values
    return out


@op("aten.index_add", axes=None)
def index_add(self: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Any = 1) -> Tensor:
    """A copy of self with slices of source added at indices of an axis."""
    return torch.index_add(self, dim, index, source, alpha=alpha)


@op("aten.index_copy", axes=None)
def index_copy(self: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """A copy of self with slices of source at indices of an axis."""
    return torch.index_copy(self, dim, index, source)


@op("aten.index_fill", axes=None, overloads=("int_Scalar", "int_Tensor"))
def index_fill(self: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    """A copy of self with a value at indices of an axis."""
    return torch.index_fill(self, dim, index, value)


@op("aten.select_scatter", axes=None, traits={VIEW})
def select_scatter(self: Tensor, src: Tensor, dim: int, index: Any) -> Tensor:
    """A copy of self with src at one index of an axis."""
    out = self.clone()
    out.select(dim, index).copy_(src)
    return out


@op("aten.slice_scatter", axes=None, traits={VIEW})
def slice_scatter(self: Tensor, src: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Tensor:
    """A copy of self with src at every step-th element of an axis."""
    return torch.slice_scatter(self, src, dim, start, end, step)


@op("aten.diagonal_scatter", axes=None, traits={VIEW})
def diagonal_scatter(self: Tensor, src: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """A copy of self with src on a diagonal."""
    out = self.clone()
    torch.diagonal(out, offset, dim1, dim2).copy_(src)
    return out


@op("aten.bucketize", axes=None, overloads=("Tensor",))
def bucketize(self: Tensor, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    """Between which sorted boundaries each element lies."""
    x = self.unsqueeze(-1)
    passed = boundaries <= x if right else boundaries < x
    return passed.sum(-1).to(torch.int32 if out_int32 else torch.int64)


@op("aten.searchsorted", axes=None, overloads=("Tensor",))
def searchsorted(sorted_sequence: Tensor, self: Tensor, *, out_int32: bool = False, right: bool = False,
                 side: str | None = None, sorter: Tensor | None = None) -> Tensor:  # fmt: skip
    """Where each element would be put into a sorted sequence."""
    return torch.searchsorted(sorted_sequence, self, out_int32=out_int32, right=right, side=side, sorter=sorter)


@op("aten.isin", axes=None, overloads=("Tensor_Tensor",))
def isin(elements: Tensor, test_elements: Tensor, *, assume_unique: bool = False, invert: bool = False) -> Tensor:
    """Whether each element is among others."""
    found = torch.any(elements.unsqueeze(-1) == test_elements.reshape(-1), -1)
    return ~found if invert else found


@op("aten.tril", axes="* [m] [n] -> * m n")
def tril(self: Tensor, diagonal: int = 0) -> Tensor:
    """Zero above a diagonal."""
    row, column = (torch.arange(n, device=self.device) for n in self.shape[-2:])
    return torch.where(column <= row.unsqueeze(1) + diagonal, self, torch.zeros_like(self))


@op("aten.triu", axes="* [m] [n] -> * m n")
def triu(self: Tensor, diagonal: int = 0) -> Tensor:
    """Zero below a diagonal."""
    row, column = (torch.arange(n, device=self.device) for n in self.shape[-2:])
    return torch.where(column >= row.unsqueeze(1) + diagonal, self, torch.zeros_like(self))


def _glu_axes(**args: Any) -> str:
    axes = names(args["self"].ndim)
    dim = args["dim"] % len(axes)
    left = [f"(half=2 {a})" if k == dim else a for k, a in enumerate(axes)]
    return f"{' '.join(left)} -> {' '.join(axes)}"


@op("aten.glu", axes=_glu_axes)
def glu(self: Tensor, dim: int = -1) -> Tensor:
    """The first half of an axis times the sigmoid of the second."""
    size = self.shape[dim] // 2
    return torch.narrow(self, dim, 0, size) * torch.sigmoid(torch.narrow(self, dim, size, size))
