"""Conversions between the forms of one value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphwright.backends import llvm
from graphwright.backends.base import Format, QParams


def possible(source: Format, target: Format) -> bool:
    """Whether a value held as ``source`` can be brought into ``target``: never from one low precision into another."""
    return source != target and (source.kind == target.kind or "native" in (source.kind, target.kind))


def conversion(source: Format, target: Format, params: QParams | None, rank: int) -> Callable[[Tensor], Tensor]:
    """The function from one form to the other; the result may share memory with its argument."""
    steps: list[Callable[[Tensor], Tensor]] = []
    if source.kind != target.kind:
        steps.append(_kind(source.kind, target.kind, params))
    if source.layout != target.layout:
        last = torch.channels_last if rank == 4 else torch.channels_last_3d
        layout = last if target.layout == "last" else torch.contiguous_format
        # the narrower form is the cheaper one to move
        steps.insert(0 if source.kind == "q" or target.kind == "native" else len(steps), lambda x: x.contiguous(memory_format=layout))
    if len(steps) == 1:
        return steps[0]
    first, second = steps
    return lambda x: second(first(x))


def _kind(source: str, target: str, params: QParams | None) -> Callable[[Tensor], Tensor]:
    if target == "bf16":
        return lambda x: x.to(torch.bfloat16)
    if source == "bf16":
        return lambda x: x.to(torch.float32)
    assert params is not None
    p = params
    run: Callable[..., Any]
    if target == "q":
        run = llvm.kernel("graphwright.activate_quantize")
        if run is not None:
            return lambda x: run(x, None, None, "none", (), p.scale, p.zero_point, p.low, p.high, p.dtype)
        quantize = torch.ops.graphwright.quantize.default
        return lambda x: quantize(x, p.scale, p.zero_point, p.low, p.high, p.dtype)
    run = llvm.kernel("graphwright.dequantize")
    if run is not None:
        return lambda q: run(q, p.scale, p.zero_point, torch.float32)
    dequantize = torch.ops.graphwright.dequantize.default
    return lambda q: dequantize(q, p.scale, p.zero_point, torch.float32)
