"""Ops whose integers have a scale per row: what stands before an int8 product on the GPU. References in plain torch.

Number format: ``real = q * scale`` with q from -127 to 127.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright.ops.fused import activate
from graphwright.ops.lowered import normalized
from graphwright.ops.registry import CAST, NORM, QUANT, op

#: Largest integer: symmetric, so that a scale is all that a row needs.
LEVELS = 127


def _work(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@op("graphwright.quantize_rows", axes="* d -> * d, * 1", traits={QUANT, CAST})
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row under its own scale: ``x [*, d]`` floating gives int8 ``[*, d]`` and float32 scales ``[*, 1]``, contiguous.

    The largest magnitude of a row becomes 127; a row of zeros has scale 1. NaN becomes 0 and the scale of its row NaN. No gradient.
    """
    work = _work(x)
    real = x.detach().to(work, copy=True, memory_format=torch.contiguous_format)
    known = real.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    scales = known.abs().amax(-1, keepdim=True) / LEVELS
    scales = torch.where(scales > torch.finfo(torch.float32).tiny, scales, torch.ones_like(scales))
    q = torch.round(known / scales).nan_to_num(nan=0.0).clamp(-LEVELS, LEVELS).to(torch.int8)
    return q, torch.where(real.isnan().any(-1, keepdim=True), torch.nan, scales).to(work)


@op("graphwright.norm_quantize_rows", traits={NORM, QUANT})
def norm_quantize_rows(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool,
    want_sum: bool, want_float: bool,
) -> list[Tensor]:  # fmt: skip
    """Layer norm (or RMS norm) of ``x + residual`` over the last axis, each row quantized under its own scale.

    ``x [*, c]`` float, ``residual`` the same shape or None, ``weight [c]``, ``bias [c]``. Gives ``x + residual`` and the normed
    floats where they are wanted, ``[*, c]`` in the dtype of x + residual, then int8 ``[*, c]`` and float32 scales ``[*, 1]`` as
    ``quantize_rows`` has them; all contiguous. Arithmetic is float32: what is normed and quantized was rounded nowhere before.
    """
    narrow = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = x.to(_work(x))
    if residual is not None:
        total = total + residual.to(total.dtype)
    normed = normalized(total, weight, bias, eps, rms)
    floats = [t.to(narrow, copy=True, memory_format=torch.contiguous_format) for t, w in ((total, want_sum), (normed, want_float)) if w]
    return [*floats, *quantize_rows(normed)]


def _gated_axes(**args: Any) -> str:
    return ("* d" if args["gate"] is None else "* d, * d") + " -> * d, * 1"


@op("graphwright.activate_quantize_rows", axes=_gated_axes, traits={QUANT})
def activate_quantize_rows(x: Tensor, gate: Tensor | None, activation: str, scalars: Sequence[float]) -> tuple[Tensor, Tensor]:
    """``activation(x, *scalars) * gate``, each row quantized under its own scale: int8 ``[*, d]``, float32 scales ``[*, 1]``.

    ``x [*, d]`` float, ``gate`` the same shape or None, of any strides (halves of a merged product). Arithmetic is float32; the
    rest is as in ``quantize_rows``. No gradient.
    """
    y = activate(x.detach().to(_work(x)), activation, scalars)
    return quantize_rows(y if gate is None else y * gate.detach().to(y.dtype))
