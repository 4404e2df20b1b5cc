"""Ops whose integers have a scale per row: what stands before an int8 product on the GPU. References in plain torch.

Number format: ``real = q * scale`` with q from -127 to 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.ops.registry import CAST, QUANT, op

#: Largest integer: symmetric, so that a scale is all that a row needs.
LEVELS = 127


@op("graphwright.quantize_rows", axes="* d -> * d, * 1", traits={QUANT, CAST})
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row under its own scale: ``x [*, d]`` floating gives int8 ``[*, d]`` and float32 scales ``[*, 1]``.

    The largest magnitude of a row becomes 127; a row of zeros has scale 1. NaN becomes 0 and the scale of its row NaN. No gradient.
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    real = x.detach().to(work)
    known = real.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    scales = known.abs().amax(-1, keepdim=True) / LEVELS
    scales = torch.where(scales > torch.finfo(torch.float32).tiny, scales, torch.ones_like(scales))
    q = torch.round(known / scales).nan_to_num(nan=0.0).clamp(-LEVELS, LEVELS).to(torch.int8)
    return q, torch.where(real.isnan().any(-1, keepdim=True), torch.nan, scales).to(work)
