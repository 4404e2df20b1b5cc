"""Merge the heads of attention as it is computed, instead of by a copy of its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphwright.passes._nodes import same_sizes
from graphwright.rewrite import Match, RewritePass


@dataclass(frozen=True)
class MergeHeads(RewritePass):
    """Write attention's result with merged heads: reshape(permute(sdpa)) becomes one op.

    ``[b, h, s, e] → [b, s, h, e] → [b, s, h·e]`` turns into ``graphwright.attention(..., merge=True)``, whose kernels write the
    merged form at once, quantized where the next op wants it so.
    """

    name: ClassVar[str] = "merge-heads"

    def pattern(self, op: Any, q: Any, k: Any, v: Any, mask: Any, causal: Any, scale: Any, order: Any, shape: Any) -> Any:
        attention = op.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale)
        return op.reshape(op.permute(attention, order), shape), op.reshape(op.transpose(attention, 1, 2), shape)

    def check(self, match: Match) -> str | None:
        heads, merged = match.node("aten.scaled_dot_product_attention").meta["val"], match.root.meta["val"]
        if heads.dim() != 4 or not isinstance(heads, Tensor):
            return f"attention over {heads.dim()} dimensions; 4 are wanted"
        if "order" in match.bound and list(match["order"]) != [0, 2, 1, 3]:
            return f"the permutation {list(match['order'])} does not bring heads behind the sequence"
        b, h, s, e = heads.shape
        if heads.dtype not in (torch.float32, torch.float64):
            return f"it gives {heads.dtype}: the merged form is computed in float32 and stays there"
        if not same_sizes(merged.shape, (b, s, h * e)):
            return f"the reshape gives {tuple(merged.shape)}, not {(b, s, h * e)}"
        mask = match.val("mask")
        if mask is not None and mask.dim() > 4:
            return f"the mask has {mask.dim()} dimensions"
        return None

    def replace(self, op: Any, q: Any, k: Any, v: Any, mask: Any, causal: Any, scale: Any) -> Any:
        return op.graphwright.attention(q, k, v, mask, scale, causal, True, 1.0, 0, 0, 0, None)
