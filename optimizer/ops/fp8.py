"""Products of 8-bit floats. References in plain torch.

Number format: ``real = q * scale``, with q in ``float8_e4m3fn`` (four bits of exponent, three of mantissa, up to 448; what NVIDIA's matrix
units since sm_89 take) or ``float8_e4m3fnuz`` (up to 240; what gfx942 takes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ops.fused import activate
from graphwright.ops.registry import CONTRACTION, QUANT, op

#: The kinds of 8-bit floats that products take.
KINDS = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def quantize_fp8(x: Tensor, by_row: bool, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [*, d] floating as ``kind`` with float32 scales: ``[*, 1]``, one for each row, or ``[1, ..., 1]``, one for all.

    The largest magnitude becomes the largest number of the kind; zeros have scale 1; NaN and infinity make the scale NaN. Arithmetic is float32
    whatever comes in.
    """
    real, most = x.detach().to(torch.float32), torch.finfo(kind).max
    if not real.numel():
        return real.to(kind), real.new_ones((*x.shape[:-1], 1) if by_row else (1,) * x.ndim)
    over = [-1] if by_row else list(range(real.ndim))
    top = real.abs().amax(over, keepdim=True)
    scales = torch.where(top.isfinite(), top, torch.nan) / most
    scales = torch.where(scales <= torch.finfo(torch.float32).tiny, torch.ones_like(scales), scales)
    return (real / scales).clamp(-most, most).to(kind), scales


def _axes(**args: Any) -> str:
    return "* i, o i, o" + (", o" if args["bias"] is not None else "") + (", * o" if args["other"] is not None else "") + " -> * o"


@op("graphwright.linear_fp8", axes=_axes, traits={CONTRACTION, QUANT})
def linear_fp8(
    x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float],
    by_row: bool, kind: torch.dtype, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """``activation(real(x8) @ (weight * weight_scales).T + bias + other)`` as ``dtype`` (None: float32).

    ``x [*, i]`` floating, which becomes ``kind`` first, under a scale for each row or one for all (``quantize_fp8``); ``weight [o, i]`` of the
    same kind, ``weight_scales [o]``, ``bias [o]``, ``other [*, o]`` floating; gives ``[*, o]``, contiguous.
    """
    work = torch.float64 if weight_scales.dtype == torch.float64 else torch.float32
    q, scales = quantize_fp8(x, by_row, kind)
    real_weight = weight.to(work) * weight_scales.to(work)[:, None]
    y = F.linear(q.to(work) * scales.to(work), real_weight, None if bias is None else bias.to(work))
    y = activate(y if other is None else y + other.to(work), activation, scalars)
    return y.contiguous() if work == torch.float64 else y.to(dtype or torch.float32).contiguous()
