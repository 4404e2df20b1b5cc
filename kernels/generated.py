"""Generated kernels: from a region's text (``generate``) to a function of tensors.

    made = Generated(source)
    out, other = made([x, y])          # tensors of the strides that the region was made for

Sizes and strides are parameters, so that regions which differ in nothing else share one compiled kernel.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from graphwright.cache import write_atomic
from graphwright.kernels import native, scalar
from graphwright.kernels.expressions import Text
from graphwright.kernels.generate import Source
from graphwright.kernels.native import Native, threads_for
from graphwright.kernels.tile import scratch_of

#: A number for each row, of those that are done beside each other.
_LANES = scratch_of(512 + 16)
#: additions that cost what moving one element costs: below, a pass is bound by memory
_LIGHT = 8.0


@functools.lru_cache(256)
def _native(name: str, text: str, slots: str, buffer: int) -> Native:
    return Native(Text(name, text, {**scalar.names(), "buffer": scratch_of(buffer), "lanes": _LANES}), slots)


class Generated:
    """A generated kernel, ready to be called; compiled, or read from the disk cache, on its first call."""

    def __init__(self, source: Source):
        self.source = source
        self._native = _native(source.name, source.text, source.slots, source.buffer)
        self._threads = functools.partial(threads_for, int(max(source.work / _LIGHT, 1)))
        self._fixed: list[int] = list(source.sizes)
        self._inputs, self._results = ([self._places(r) for r in records] for records in (source.reads, source.writes))
        self._plain = [torch.empty(shape, dtype=dtype, device="meta").stride() == strides for shape, strides, dtype in source.outs]

    def _places(self, record: tuple[int, int, tuple[int, ...]]) -> tuple[int, int, int]:
        """Slot of an address, which tensor it is of, and how far from its first element; the strides are filled in now."""
        index, offset, steps = record
        slot = len(self._fixed)
        self._fixed += [0, *steps]
        return slot, index, offset

    def warm(self) -> None:
        """Compile now, and leave the text beside the compiled kernel for who wants to read it."""
        self._native.warm()
        path = self.path
        if path is not None and not path.exists():
            with contextlib.suppress(OSError):
                write_atomic(path, self.source.text.encode())

    @property
    def path(self) -> Path | None:
        """Where its text lies on this machine; None where no cache can be had."""
        folder = native.cache_folder()
        return None if folder is None else folder / f"{self.source.name}.py"

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        params = self._fixed.copy()
        for slot, index, offset in self._inputs:
            params[slot] = tensors[index].data_ptr() + offset
        outs = [torch.empty(shape, dtype=dtype) if plain else torch.empty_strided(shape, strides, dtype=dtype)
                for (shape, strides, dtype), plain in zip(self.source.outs, self._plain, strict=True)]  # fmt: skip
        for slot, index, _ in self._results:
            params[slot] = outs[index].data_ptr()
        self._native(self._threads(), *params)
        return outs
