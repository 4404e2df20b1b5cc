"""A key/value cache that grows by what a step computed."""

from __future__ import annotations

import torch
from torch import Tensor

from graphwright.ops.registry import VIEW, op


@op("graphwright.cache_append", traits={VIEW})
def cache_append(past: Tensor, new: Tensor) -> Tensor:
    """Keys or values ``[batch, heads, tokens, size]`` with new ones behind them: ``cat([past, new], 2)``.

    What runs writes ``new`` into the memory behind ``past`` and copies nothing, where ``past`` is a window of a whole buffer
    ``[batch, heads, slots, size]`` with room behind it; see ``graphwright.backends.room``.
    """
    return torch.cat([past, new], 2)
