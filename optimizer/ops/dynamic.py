"""Quantization with scales that are computed from the numbers at hand, at run time.

Number format: ``real = (q - zero_points) * scales``, the scales broadcast over q.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphwright.ops.registry import CAST, QUANT, op


def _axes(**args: Any) -> str:
    ones = " ".join(["1"] * args["x"].ndim)
    return "* [d] -> * d, * 1, * 1" if args["rows"] else f"[*] [d] -> * d, {ones}, {ones}"


@op("graphwright.quantize_dynamic", axes=_axes, traits={QUANT, CAST})
def quantize_dynamic(
    x: Tensor, rows: bool, symmetric: bool, low: int, high: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize between the smallest and the largest number of x: gives the integers, the scales and the zero points.

    ``x [*, d]`` floating. ``rows``: a scale for each index before the last axis, ``[*, 1]``; else one for the whole
    tensor, ``[1, ..., 1]``. Scales are float32, zero points int32. 0.0 always stands for itself; a row of zeros has
    scale 1. ``symmetric``: zero points are 0 and the largest magnitude becomes ``high``. No gradient.
    """
    real = x.detach().to(torch.float32)
    over = [-1] if rows else list(range(real.ndim))
    top, bottom = real.amax(over, keepdim=True).clamp(min=0), real.amin(over, keepdim=True).clamp(max=0)
    span = torch.maximum(top, -bottom) / high if symmetric else (top - bottom) / (high - low)
    scales = torch.where(span > torch.finfo(torch.float32).tiny, span, torch.ones_like(span))
    points = torch.zeros_like(scales) if symmetric else (torch.round(-bottom / scales) + low).clamp(low, high)
    q = (torch.round(real / scales) + points).nan_to_num(nan=0.0).clamp(low, high).to(dtype)
    return q, scales, points.to(torch.int32)


@op("graphwright.dequantize_dynamic", axes="* d, * 1, * 1 -> * d", traits={QUANT, CAST})
def dequantize_dynamic(q: Tensor, scales: Tensor, zero_points: Tensor, dtype: torch.dtype) -> Tensor:
    """Back from ``quantize_dynamic``: ``(q - zero_points) * scales`` as ``dtype``, in the shape of q."""
    return ((q.to(torch.float32) - zero_points) * scales).to(dtype)
