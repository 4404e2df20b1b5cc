"""ATen rows: reductions over axes, scans, sorting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright.ops.axes import names
from graphwright.ops.registry import REDUCTION, described, op

INF = float("inf")


def _listed(dim: Any, ndim: int) -> list[int]:
    """Axes as sorted, non-negative numbers; None and an empty list mean all."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(ndim))
    given = dim if isinstance(dim, (list, tuple)) else [dim]
    return sorted({d % ndim if ndim else 0 for d in given})


def reduced(ndim: int, dim: Any, keepdim: bool, results: int = 1) -> str:
    """The spelling of a reduction over these axes."""
    over, axes = set(_listed(dim, ndim)), names(ndim)
    kept = [("1" if keepdim else "") if k in over else a for k, a in enumerate(axes)]
    return f"{' '.join(axes)} -> {', '.join([' '.join(filter(None, kept))] * results)}"


def _axes(**args: Any) -> str:
    return reduced(args["self"].ndim, args.get("dim"), args.get("keepdim", False))


def _two(**args: Any) -> str:
    return reduced(args["self"].ndim, args.get("dim"), args.get("keepdim", False), 2)


def kept_whole(ndim: int, dim: Any, results: int = 1) -> str:
    """The spelling of an op that works along whole axes and keeps them: softmax, scan, sort, norm."""
    over = set(_listed(dim, ndim))
    axes = " ".join(f"[{a}]" if k in over else a for k, a in enumerate(names(ndim)))
    return f"{axes} -> {', '.join([axes.replace('[', '').replace(']', '')] * results)}"


def _along(**args: Any) -> str:
    return kept_whole(args["self"].ndim, args.get("dim", -1))


def _along_two(**args: Any) -> str:
    return kept_whole(args["self"].ndim, args.get("dim", -1), 2)


def _count(x: Tensor, dims: Sequence[int]) -> Any:
    count: Any = 1
    for d in dims:
        count = count * x.shape[d]
    return count


def _sum(self: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """Sum over axes; integers add up as int64."""
    return torch.sum(self, _listed(dim, self.ndim), keepdim, dtype=dtype)


def _mean(self: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """Mean over axes."""
    x = self if dtype is None else self.to(dtype)
    return _sum(x, dim, keepdim) / _count(x, _listed(dim, x.ndim))


def _reducer(name: str, body: Any, overloads: Sequence[str], summary: str = "", axes: Any = _axes) -> None:
    op(f"aten.{name}", axes=axes, traits={REDUCTION}, overloads=overloads)(
        described(body, summary) if summary else body
    )


_reducer("sum", _sum, ("dim_IntList",))
_reducer("sum", lambda x, *, dtype=None: _sum(x, dtype=dtype), ("default",), "Sum of all elements.")
_reducer("mean", _mean, ("dim",))
_reducer("mean", lambda x, *, dtype=None: _mean(x, dtype=dtype), ("default",), "Mean of all elements.")


# -- spread and norms ------------------------------------------------------------------------------------------------


def _variance(self: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    """Variance over axes: squared distances from the mean, over count - correction (1 by default)."""
    dims = _listed(dim, self.ndim)
    away = self - _mean(self, dims, True)
    free = max(_count(self, dims) - (1 if correction is None else correction), 0)
    return _sum(away * away, dims, keepdim) / free


def _deviation(self: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    """Standard deviation over axes: the root of the variance."""
    return torch.sqrt(_variance(self, dim, correction=correction, keepdim=keepdim))


def _by_flag(body: Any) -> Any:
    """The older signature, ``(x, dim, unbiased, keepdim)``."""
    return lambda x, dim=None, unbiased=True, keepdim=False: body(x, dim, correction=int(unbiased), keepdim=keepdim)


for _name, _body in (("var", _variance), ("std", _deviation)):
    _reducer(_name, _body, ("correction",))
    _reducer(_name, _by_flag(_body), ("dim",), _body.__doc__ or "")
    _reducer(
        _name, lambda x, unbiased=True, body=_body: body(x, correction=int(unbiased)), ("default",), _body.__doc__ or ""
    )
_reducer(
    "var_mean",
    lambda x, dim=None, *, correction=None, keepdim=False: (
        _variance(x, dim, correction=correction, keepdim=keepdim),
        _mean(x, _listed(dim, x.ndim), keepdim),
    ),
    ("correction",),
    "Variance and mean over axes.",
    _two,
)


def _vector_norm(self: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """Norm over axes: ``sum(|x| ** ord) ** (1 / ord)``, its limits at 0 and infinity."""
    size = torch.abs(self if dtype is None else self.to(dtype))
    dims = _listed(dim, self.ndim)
    if ord == 0:
        return _sum((size != 0).to(size.dtype), dims, keepdim)
    if abs(ord) == INF:
        return torch.amax(size, dims, keepdim) if ord > 0 else torch.amin(size, dims, keepdim)
    return torch.pow(_sum(torch.pow(size, ord), dims, keepdim), 1 / ord)


def _norm(self: Tensor, p: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """Norm over axes, 2 where p is None."""
    return _vector_norm(self, 2 if p is None else p, dim, keepdim, dtype=dtype)


_reducer("linalg_vector_norm", _vector_norm, ("default",))
_reducer("norm", _norm, ("ScalarOpt_dim", "Scalar"))
_reducer(
    "norm",
    lambda x, p, dim, keepdim=False, *, dtype: _norm(x, p, dim, keepdim, dtype=dtype),
    ("ScalarOpt_dim_dtype",),
    "Norm over axes in another dtype.",
)


def _cosine_axes(**args: Any) -> str:
    left, result = reduced(args["x1"].ndim, args["dim"], False).split(" -> ")
    return f"{left}, {left} -> {result}" if args["x1"].ndim == args["x2"].ndim else ""


def _cosine(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Cosine of the angle between x1 and x2 along an axis; lengths are at least eps."""
    lengths = [torch.clamp(_vector_norm(x, 2, dim, True), min=eps) for x in (x1, x2)]
    return torch.sum((x1 / lengths[0]) * (x2 / lengths[1]), dim)


_reducer("cosine_similarity", _cosine, ("default",), axes=_cosine_axes)


def _logsumexp(self: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    """``log(sum(exp(x)))`` over axes, from the greatest element on."""
    dims = _listed(dim, self.ndim)
    top = torch.amax(self, dims, True)
    top = torch.where(torch.isfinite(top), top, 0)
    out = torch.log(_sum(torch.exp(self - top), dims, True)) + top
    return out if keepdim else torch.squeeze(out, dims)


_reducer("logsumexp", _logsumexp, ("default",))

# -- extremes, products, truth ---------------------------------------------------------------------------------------

_reducer(
    "amax",
    lambda x, dim=(), keepdim=False: torch.amax(x, _listed(dim, x.ndim), keepdim),
    ("default",),
    "Maximum over axes.",
)
_reducer(
    "amin",
    lambda x, dim=(), keepdim=False: torch.amin(x, _listed(dim, x.ndim), keepdim),
    ("default",),
    "Minimum over axes.",
)
_reducer("max", lambda x: torch.amax(x, _listed(None, x.ndim)), ("default",), "Greatest element.")
_reducer("min", lambda x: torch.amin(x, _listed(None, x.ndim)), ("default",), "Least element.")
_reducer(
    "max", lambda x, dim, keepdim=False: tuple(torch.max(x, dim, keepdim)), ("dim",), "Maximum and where it is.", _two
)
_reducer(
    "min", lambda x, dim, keepdim=False: tuple(torch.min(x, dim, keepdim)), ("dim",), "Minimum and where it is.", _two
)
_reducer("argmax", torch.argmax, ("default",), "Where the maximum is, along an axis or among all elements.")
_reducer("argmin", torch.argmin, ("default",), "Where the minimum is, along an axis or among all elements.")
_reducer("prod", lambda x, *, dtype=None: torch.prod(x, dtype=dtype), ("default",), "Product of all elements.")
_reducer(
    "prod",
    lambda x, dim, keepdim=False, *, dtype=None: torch.prod(x, dim, keepdim, dtype=dtype),
    ("dim_int",),
    "Product over an axis.",
)
_reducer("any", lambda x: _sum(x != 0) > 0, ("default",), "Whether any element is nonzero.")
_reducer(
    "any",
    lambda x, dim=None, keepdim=False: _sum(x != 0, dim, keepdim) > 0,
    ("dim", "dims"),
    "Whether any is nonzero over axes.",
)
_reducer("all", lambda x: _sum(x == 0) == 0, ("default",), "Whether all elements are nonzero.")
_reducer(
    "all",
    lambda x, dim=None, keepdim=False: _sum(x == 0, dim, keepdim) == 0,
    ("dim", "dims"),
    "Whether all are nonzero over axes.",
)
_reducer(
    "count_nonzero", lambda x, dim=None: _sum(x != 0, dim), ("default", "dim_IntList"), "How many elements are nonzero."
)

# -- scans, sorting --------------------------------------------------------------------------------------------------

_reducer(
    "cumsum", lambda x, dim, *, dtype=None: torch.cumsum(x, dim, dtype=dtype), ("default",), "Running sum.", _along
)
_reducer(
    "cumprod",
    lambda x, dim, *, dtype=None: torch.cumprod(x, dim, dtype=dtype),
    ("default",),
    "Running product.",
    _along,
)
_reducer(
    "sort",
    lambda x, dim=-1, descending=False: tuple(torch.sort(x, dim, descending)),
    ("default",),
    "Sorted along an axis, and where each was.",
    _along_two,
)
_reducer(
    "sort",
    lambda x, *, stable=None, dim=-1, descending=False: tuple(
        torch.sort(x, dim=dim, descending=descending, stable=bool(stable))
    ),
    ("stable",),
    "Sorted along an axis, equals in order, and where each was.",
    _along_two,
)
_reducer("argsort", torch.argsort, ("default",), "Where each element of the sorted axis was.", _along)


def _topk_axes(**args: Any) -> str:
    axes = names(args["self"].ndim)
    if not axes:
        return " -> , "
    dim = args["dim"] % len(axes)
    left = [f"[{a}]" if k == dim else a for k, a in enumerate(axes)]
    result = " ".join("top" if k == dim else a for k, a in enumerate(axes))
    return f"{' '.join(left)} -> {result}, {result}"


_reducer(
    "topk",
    lambda x, k, dim=-1, largest=True, sorted=True: tuple(torch.topk(x, k, dim, largest, sorted)),
    ("default",),
    "The k greatest (or least) along an axis, and where each was.",
    _topk_axes,
)


def _diff_axes(**args: Any) -> str | None:
    if args.get("prepend") is not None or args.get("append") is not None:
        return None
    axes = names(args["self"].ndim)
    dim = args["dim"] % len(axes)
    return f"{' '.join(axes)} -> " + " ".join(f"{a}'" if k == dim else a for k, a in enumerate(axes))


def _diff(
    self: Tensor, n: int = 1, dim: int = -1, prepend: Tensor | None = None, append: Tensor | None = None
) -> Tensor:
    """Differences of neighbours, n times over."""
    x = torch.cat([p for p in (prepend, self, append) if p is not None], dim)
    for _ in range(n):
        head, tail = x.narrow(dim, 1, x.shape[dim] - 1), x.narrow(dim, 0, x.shape[dim] - 1)
        x = head ^ tail if x.dtype == torch.bool else head - tail
    return x


op("aten.diff", axes=_diff_axes)(_diff)
