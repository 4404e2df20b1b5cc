"""The model's tensors under the model's own names: copied once, those that share memory sharing it in the copy."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from graphwright.capture.rehearse import clone_tensor
from graphwright.capture.sites import WRAPPED
from graphwright.errors import CaptureError


class Weights:
    """Copies parameters, buffers and constants of one traced model.

    Args:
        exported: the traced wrapper.
        storage: copies of storages made so far, by address.

    Attributes:
        root: a bare module tree that holds the copies.
    """

    def __init__(self, model: nn.Module, exported: Any, storage: dict[int, torch.UntypedStorage]):
        self.exported, self.storage = exported, storage
        self.root = nn.Module()
        self.names: dict[tuple[Any, ...], str] = {}
        self.copies: dict[str, torch.Tensor] = {}
        for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
            for name, value in named:
                self.names.setdefault(_identity(value), name)

    def take(self, target: str) -> tuple[str, torch.Tensor]:
        """The name (a tied tensor's first one) and the copy of what the wrapper calls ``target``.

        Raises:
            CaptureError: it is no tensor.
        """
        value = self._held(target)
        name = self.names.setdefault(_identity(value), target.removeprefix(f"{WRAPPED}."))
        if name not in self.copies:
            self.copies[name] = clone_tensor(value, self.storage)
            self._store(name, self.copies[name])
        return name, self.copies[name]

    def _held(self, target: str) -> torch.Tensor:
        for store in (self.exported.state_dict, self.exported.constants):
            if isinstance(store.get(target), torch.Tensor):
                return store[target]
        raise CaptureError(f"the model holds {target!r}, which is no tensor")

    def _store(self, name: str, value: torch.Tensor) -> None:
        owner = self.root
        *path, leaf = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = operator.attrgetter(part)(owner)
        if isinstance(value, nn.Parameter):
            owner.register_parameter(leaf, value)
        else:
            owner.register_buffer(leaf, value)


def _identity(value: torch.Tensor) -> tuple[Any, ...]:
    """Equal for the same tensor under two names."""
    if value.numel() == 0 or value.layout is not torch.strided:
        return (id(value),)
    return (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, value.device)


def leaf_names(paths: Sequence[str], positional: Sequence[str]) -> list[str]:
    """A readable identifier for each leaf of a call: ``input_ids``, ``past_key_values_0_keys``.

    Args:
        paths: of the leaves within ``(args, kwargs)``.
        positional: names of the model's positional parameters.
    """
    found: list[str] = []
    for path in paths:
        match = re.match(r"\[0\]\[(\d+)\](.*)", path)
        if match:
            k = int(match[1])
            path = (positional[k] if k < len(positional) else f"input_{k}") + match[2]
        else:
            path = path[3:]
        name = re.sub(r"\W+", "_", path).strip("_") or "input"
        name = name if name[0].isalpha() or name[0] == "_" else f"input_{name}"
        k, unique = 1, name
        while unique in found:
            k += 1
            unique = f"{name}_{k}"
        found.append(unique)
    return found
