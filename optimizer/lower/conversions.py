"""Conversions between the forms of one value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphwright.backends import llvm, triton
from graphwright.backends.base import HALF, Format, QParams
from graphwright.ops.row_scales import quantize_rows


def possible(source: Format, target: Format) -> bool:
    """Whether a value held as ``source`` can be brought into ``target``: never from one kind of integers into another, nor back from rows."""
    floats = {"native", *HALF}
    return source != target and source.kind != "rows" and (source.kind == target.kind or bool({source.kind, target.kind} & floats))


def conversion(source: Format, target: Format, params: QParams | None, like: Tensor) -> Callable[[Any], Any]:
    """The function from one form to the other; the result may share memory with its argument.

    Args:
        like: the value in its native form, real or fake.
    """
    steps: list[Callable[[Any], Any]] = []
    if source.kind != target.kind:
        steps.append(_kind(source.kind, target.kind, params, like))
    if source.layout != target.layout:
        last = torch.channels_last if like.dim() == 4 else torch.channels_last_3d
        layout = last if target.layout == "last" else torch.contiguous_format
        # the narrower form is the cheaper one to move
        steps.insert(0 if source.kind == "q" or target.kind in ("native", "rows") else len(steps), lambda x: x.contiguous(memory_format=layout))
    if len(steps) == 1:
        return steps[0]
    first, second = steps
    return lambda x: second(first(x))


def _kind(source: str, target: str, params: QParams | None, like: Tensor) -> Callable[[Any], Any]:
    dtype = HALF.get(target, like.dtype)
    if target in HALF and source != "q" or source in HALF and target == "native":
        return lambda x: x.to(dtype)
    if source in HALF and like.device.type == "cpu":  # what makes integers there reads float32
        widen, narrow = _kind(source, "native", params, like), _kind("native", target, params, like)
        return lambda x: narrow(widen(x))
    if target == "rows":
        return row_integers
    if source == "rows":  # for whoever wants to look at it
        return lambda pair: (pair[0].float() * pair[1]).to(dtype)
    assert params is not None
    p = params
    on_cpu = like.device.type == "cpu" and dtype == torch.float32
    if target == "q":
        run = llvm.kernel("graphwright.activate_quantize") if on_cpu else triton.kernel("graphwright.activate_quantize")
        if run is not None:
            return lambda x: run(x, None, None, "none", (), p.scale, p.zero_point, p.low, p.high, p.dtype)
        quantize = torch.ops.graphwright.quantize.default
        return lambda x: quantize(x, p.scale, p.zero_point, p.low, p.high, p.dtype)
    run = llvm.kernel("graphwright.dequantize") if on_cpu else triton.kernel("graphwright.dequantize")
    if run is not None:
        return lambda q: run(q, p.scale, p.zero_point, dtype)
    dequantize = torch.ops.graphwright.dequantize.default
    return lambda q: dequantize(q, p.scale, p.zero_point, dtype)


def row_integers(x: Tensor) -> tuple[Tensor, Tensor]:
    """A value as integers ``[*, d]`` with a scale per row, ``[*, 1]``."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[-1] <= 32768
    run = triton.kernel("graphwright.quantize_rows") or (llvm.kernel("graphwright.quantize_rows") if on_cpu else None)
    return quantize_rows(x) if run is None else run(x)
