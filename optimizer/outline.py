"""Values before anybody asks for FakeTensors: shape, strides and dtype of a CPU tensor, without memory.

PyTorch's FakeTensorMode imports most of its compiler, which takes longer than loading a model may. A loaded program
therefore carries outlines; it is ``settle``d, all of them turned into FakeTensors, once its mode is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only


class Late:
    """A FakeTensorMode that is made when it is first needed.

    Args:
        make: gives the mode.
    """

    def __init__(self, make: Callable[[], Any]):
        self._make = make

    @property
    def made(self) -> bool:
        return "mode" in vars(self)

    @cached_property
    def mode(self) -> Any:
        return self._make()

    def outline(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Outline:
        found = torch.Tensor._make_wrapper_subclass(Outline, shape, stride, dtype=dtype, device=torch.device("cpu"))
        found.late = self
        return found

    def fake(self, value: Any) -> Any:
        """``value`` with every outline in it (nested in tuples and lists) as a FakeTensor."""
        return tree_map_only(Outline, self._fake, value)

    def _fake(self, outline: Outline) -> Tensor:
        return fresh(outline.shape, outline.stride(), outline.dtype, outline.device, self.mode)

    def settle(self, nodes: Iterable[fx.Node]) -> None:
        """Replace every outline among the nodes' values."""
        for node in nodes:
            if "val" in node.meta:
                node.meta["val"] = self.fake(node.meta["val"])


def fresh(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device, mode: Any) -> Tensor:
    """A FakeTensor of fixed sizes, with memory of its own."""
    bare = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return mode.fake_tensor_converter.from_meta_and_device(mode, bare, device)


def view(source: Any, shape: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype) -> Tensor:
    """A FakeTensor of fixed sizes over the memory of ``source``, a FakeTensor; ``offset`` counts from where that begins."""
    bare = torch.empty(0, dtype=dtype, device="meta").set_(source.untyped_storage(), offset, shape, stride)
    return source.fake_mode.fake_tensor_converter.from_meta_and_device(source.fake_mode, bare, source.fake_device)


class Outline(torch.Tensor):
    """Shape, strides and dtype of a tensor on the CPU. An op on it is run on FakeTensors."""

    late: Late

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        late = next(x.late for x in tree_leaves((args, kwargs)) if isinstance(x, Outline))
        with torch.no_grad():
            return func(*late.fake(args), **late.fake(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Outline(shape={tuple(self.shape)}, dtype={self.dtype})"
