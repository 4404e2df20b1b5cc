"""Weights as kernels read them, prepared once for each weight.

An op takes the weight as the model has it. A plan asks ``once`` for the packed form, which is made on the first call and lives
as long as the weight; a weight that has been written since is packed anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def once(make: Callable[..., T], weight: Tensor, *others: Tensor | None, options: tuple[Any, ...] = ()) -> T:
    """``make(weight, *others, *options)``, or what it gave before.

    What is made must not share memory with ``weight`` (it would never be freed). Nothing is remembered of tensors on the ``meta`` device or of
    inference tensors (nobody can tell whether they were written), nor while a CUDA graph is being captured: there the packing
    becomes part of the graph, correct but slow, so call once before.
    """
    sources = [t for t in (weight, *others) if t is not None]
    if any(t.device.type == "meta" or t.is_inference() for t in sources):
        return make(weight, *others, *options)
    key = (make, options, tuple(None if t is None else (id(t), t.data_ptr(), t._version, t.dtype) for t in (weight, *others)))
    known: dict[Any, tuple[T, Any]] = _made.get(weight, {})
    if key in known:
        return known[key][0]
    with torch.no_grad():
        found = make(weight, *others, *options)
    if not (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
        fresh = {k: v for k, v in known.items() if k[2][0] == key[2][0]}  # of the weight as it is now
        _made[weight] = {**fresh, key: (found, others)}  # the others are held: their ids stay theirs
    return found
