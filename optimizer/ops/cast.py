"""ATen rows: copies, casts and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from graphwright.ops.registry import CAST, LAYOUT_FREE, SHAPE, described, op

# -- copies, casts, sizes --------------------------------------------------------------------------------------------


def _cast(
    name: str,
    body: Any,
    summary: str,
    overloads: Sequence[str] = ("default",),
    layout_free: bool = False,
    axes: str = "* -> *",
) -> None:
    op(f"aten.{name}", axes=axes, traits={CAST, LAYOUT_FREE} if layout_free else {CAST}, overloads=overloads)(
        described(body, summary)
    )


def _converted(x: Tensor, dtype: Any, device: Any, memory_format: Any) -> Tensor:
    y = torch.empty_like(x, dtype=dtype, device=device, memory_format=memory_format or torch.preserve_format)
    return torch.ops.aten.copy.default(y, x)


def _copied(
    x: Tensor,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    non_blocking: bool = False,
    memory_format: Any = None,
) -> Tensor:
    return _converted(x, dtype, device, memory_format)


def _known(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k != "copy"}


_cast(
    "to",
    lambda x, dtype, non_blocking=False, copy=False, memory_format=None: _converted(x, dtype, None, memory_format),
    "As another dtype.",
    ("dtype",),
)
_cast(
    "to",
    lambda x, device, dtype, non_blocking=False, copy=False, memory_format=None: _converted(
        x, dtype, device, memory_format
    ),
    "On another device, as another dtype.",
    ("device",),
)
_cast(
    "to", lambda x, **options: _copied(x, **_known(options)), "As another dtype, on another device.", ("dtype_layout",)
)
_cast(
    "to",
    lambda x, other, non_blocking=False, copy=False, memory_format=None: _converted(
        x, other.dtype, other.device, memory_format
    ),
    "As the dtype, on the device of another tensor.",
    ("other",),
    axes="*, ... -> *",
)
_cast("_to_copy", _copied, "A copy as another dtype, on another device.")
_cast(
    "type_as",
    lambda x, other: _converted(x, other.dtype, other.device, None),
    "As the dtype of another tensor.",
    axes="*, ... -> *",
)
_cast(
    "contiguous",
    lambda x, *, memory_format=torch.contiguous_format: _converted(x, None, None, memory_format),
    "Laid out in a memory format.",
)
_cast("clone", lambda x, *, memory_format=None: _converted(x, None, None, memory_format), "A copy.")
for _name in ("detach", "alias", "lift_fresh"):
    _cast(
        _name,
        lambda x: x.clone(),
        "The tensor itself: cut from the gradient, under another name, or a constant.",
        layout_free=True,
    )
_cast("lift_fresh_copy", lambda x: x.clone(), "A copy of a constant.")

op("aten.sym_size", axes=None, traits={SHAPE}, overloads=("int",))(
    described(lambda x, dim: x.shape[dim], "The size of an axis.")
)
op("aten.sym_numel", axes=None, traits={SHAPE})(described(lambda x: prod(x.shape), "How many elements."))
op("aten.sym_stride", axes=None, traits={SHAPE}, overloads=("int",))(
    described(lambda x, dim: x.stride(dim), "The stride of an axis.")
)
