"""Weights packed once for several programs that read them.

    with shared():
        lower(prefill); lower(step)          # where both choose the same kernel for a weight, it holds one packed form
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
_made: ContextVar[weakref.WeakValueDictionary[tuple[Any, ...], Any] | None] = ContextVar("packed weights", default=None)


@contextmanager
def shared() -> Iterator[None]:
    """Inside, what ``packed`` makes of the same tensors in the same way is made once, and lives as long as somebody holds it.

    The weights must not be written inside.
    """
    token = _made.set(weakref.WeakValueDictionary())
    try:
        yield
    finally:
        _made.reset(token)


def packed(make: Callable[[], T], kind: str, *sources: Tensor | None) -> T:
    """``make()``, or inside ``shared`` what it gave before for this kind and these tensors.

    Args:
        kind: what is made of them, with all that matters beside the tensors.
        sources: what it is made from, by memory: the same numbers elsewhere are packed anew.
    """
    known = _made.get()
    if known is None:
        return make()
    key = (kind, *map(_identity, sources))
    found = known.get(key)
    if found is None:
        found = make()
        object.__setattr__(found, "_packed_from", sources)  # while it lives, no other tensor gets their memory
        known[key] = found
    return found


def _identity(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
