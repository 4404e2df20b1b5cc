"""Attention with an 8-bit first product: what the GPU kernel computes. Reference in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ops.lowered import attention
from graphwright.ops.registry import QUANT, SOFTMAX, op

#: Keys that share a scale.
KEYS = 64

#: Magnitudes below this are zeros: their scale would be no number.
LEAST = 1e-30


def _rounded(x: Tensor, most: Tensor) -> Tensor:
    """x on a grid of 255 levels from ``-most`` to ``most``."""
    inverse = torch.where(most < LEAST, 0.0, 127 / most)
    return torch.round(x * inverse) * (most / 127)


@op("graphwright.attention_int8_qk", traits={SOFTMAX, QUANT})
def attention_int8_qk(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention_scale: float | None, causal: bool,
    merge: bool, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """``attention`` whose scores are products of 8-bit integers, with scales found at run time; probabilities and values stay floats.

    Queries are rounded with a scale per row; keys, less their mean over the head (which softmax does not see), with one per 64
    consecutive keys (SageAttention, Zhang et al. 2025, arXiv:2410.02367). Arguments and result as for ``attention``.
    """
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key = query.to(work), key.to(work)
    factor = query.shape[-1] ** -0.5 if attention_scale is None else attention_scale
    if key.shape[2] and query.numel():
        t = key.shape[2]
        key = key - key.mean(-2, keepdim=True)
        most = F.pad(key, (0, 0, 0, -t % KEYS)).unflatten(2, (-1, KEYS)).abs().amax((-1, -2))
        key = _rounded(key, most.repeat_interleave(KEYS, -1)[..., :t, None])
        query = _rounded(query, query.abs().amax(-1, keepdim=True))
    return attention(query, key, value, mask, factor, causal, merge, scale, zero_point, low, high, dtype)
