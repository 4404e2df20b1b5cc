"""One set of tensors for two programs: what both make of the same weights is held once."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from graphwright.ir import Program


class Shelf:
    """Tensors that programs hold, by content. Each program given to ``share`` takes those that are there already.

    Attributes:
        storage: copies of the model's own weights, for ``capture(storage=...)``.
    """

    def __init__(self) -> None:
        self.storage: dict[int, torch.UntypedStorage] = {}
        self._held: dict[tuple[Any, ...], Tensor] = {}
        self._seen: dict[int, Tensor] = {}

    def share(self, program: Program) -> None:
        """Let the program hold the shelf's tensors where they equal its own bit for bit; put the others on the shelf.

        Mutated buffers are state, not weights: they stay apart.
        """
        written = {m.buffer for m in program.signature.mutations if m.buffer}
        for name, tensor in program.tensors().items():
            if name in written or tensor.layout is not torch.strided or not tensor.numel() or id(tensor) in self._seen:
                continue
            first = self._held.setdefault(_content(tensor), tensor)
            self._seen[id(tensor)] = tensor
            if first is not tensor and first.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
                _put(program, name, first)


def _content(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors of the same numbers, dtype, shape and strides."""
    plain = tensor.detach().contiguous().cpu()
    whole = plain.flatten().view(torch.uint8).numpy()
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), str(tensor.device), hashlib.blake2b(memoryview(whole)).digest()


def _put(program: Program, name: str, tensor: Tensor) -> None:
    *path, leaf = name.split(".")
    owner: nn.Module = program.graph_module
    for part in path:
        owner = getattr(owner, part)
    if leaf in owner._parameters:
        owner._parameters[leaf] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor
