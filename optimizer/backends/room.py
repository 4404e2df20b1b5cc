"""Appending to a cache without copying it: the tokens of a growing cache stand in a buffer with room for more."""

from __future__ import annotations

import torch
from torch import Tensor

#: elements behind a buffer that ``reserve`` made: by them it is told from tensors of others, whose memory must not be written
_TAIL = 61


def reserve(like: Tensor, slots: int) -> Tensor:
    """A buffer ``[batch, heads, slots, size]`` for caches such as ``like`` ``[batch, heads, tokens, size]``; its numbers are undefined."""
    batch, heads, _, size = like.shape
    count = batch * heads * slots * size
    return like.new_empty(count + _TAIL)[:count].view(batch, heads, slots, size)


def append(past: Tensor, new: Tensor) -> Tensor:
    """``cat([past, new], 2)`` of ``[batch, heads, tokens, size]``; ``new`` is written behind ``past`` where there is room.

    There is room where ``past`` is a window along axis 2 of what ``reserve`` gave, and enough slots follow. What they hold is
    lost: whoever makes such a window leaves the slots behind it free. The result is then a view of the same memory.
    """
    batch, heads, tokens, size = past.shape
    more = new.shape[2]
    s0, s1, s2, s3 = past.stride()
    if s3 != 1 or s2 != size or not size or s1 <= tokens * size or s0 != heads * s1 or s1 % size or new.dtype != past.dtype:
        return torch.cat([past, new], 2)
    start = past.storage_offset()
    if start % size or start // size + tokens + more > s1 // size or past.untyped_storage().nbytes() != (batch * s0 + _TAIL) * past.element_size():
        return torch.cat([past, new], 2)
    whole = past.as_strided((batch, heads, tokens + more, size), (s0, s1, s2, 1), start)
    whole.narrow(2, tokens, more).copy_(new)
    return whole
