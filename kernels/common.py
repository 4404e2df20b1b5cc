"""Small host-side helpers that the CPU kernels share."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: ``struct`` letters of what ``grid`` gives.
GRID = "dqdd"


def grid(scale: float, zero_point: int, low: int, high: int) -> tuple[float, int, float, float]:
    """Inverse scale, zero point, and the bounds before the zero point is added."""
    return 1.0 / scale, zero_point, low - zero_point, high - zero_point


def not_cpu(*tensors: Tensor | None) -> str | None:
    """None, or that a tensor lies elsewhere."""
    for t in tensors:
        if t is not None and t.device.type != "cpu":
            return f"a tensor lies on {t.device}"
    return None


def pieces(*tensors: Tensor | None) -> int:
    """Bytes of the tensors, each element once."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def per_channel(scales: Tensor, bias: Tensor | None, out: int, lanes: int) -> tuple[Tensor, Tensor]:
    """Float32 scales (one for all, or each its own) and biases of ``out`` channels, padded with zeros to whole vectors."""
    pad, behind = torch.nn.functional.pad, (0, -out % lanes)
    return pad(scales.detach().float().expand(out), behind), pad(torch.zeros(out) if bias is None else bias.detach().float(), behind)


def address(t: Tensor | None) -> int:
    """Of its first element, or 0."""
    return 0 if t is None else t.data_ptr()


def as_rows(other: Tensor | None, shape: Sequence[int]) -> tuple[Tensor | None, int]:
    """A residual of the shape of the result as float32 rows with adjacent columns, and bytes from row to row; None and 0 without one."""
    if other is None:
        return None, 0
    rows = rows_of(other.float().expand(shape))
    return rows, rows.stride(0) * 4


def rows_of(x: Tensor) -> Tensor:
    """x as ``[rows, columns]`` with neighbouring columns adjacent; a view where strides allow it."""
    if x.ndim != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


@functools.lru_cache(64)
def _constant(value: float, count: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((count,), value)


def vectors(weight: Tensor | None, bias: Tensor | None, count: int) -> tuple[int, int]:
    """Addresses of ``count`` float32 weights and biases; ones and zeros stand in for None. Both must be contiguous."""
    return (_constant(1.0, count) if weight is None else weight).data_ptr(), \
           (_constant(0.0, count) if bias is None else bias).data_ptr()  # fmt: skip


@functools.lru_cache(4096)
def merged_axes(
    shape: tuple[int, ...], out: tuple[int, ...], *inputs: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]] | None:
    """Four sizes in the order of the output's memory, and four strides per input; None where more than four are needed.

    Axes that every input walks through evenly are merged.
    """
    order = sorted((k for k in range(len(shape)) if shape[k] != 1), key=lambda k: -out[k])
    axes: list[list[Any]] = []
    for k in order:
        steps = [s[k] for s in inputs]
        if axes and all(before == step * shape[k] for before, step in zip(axes[-1][1], steps, strict=True)):
            axes[-1] = [axes[-1][0] * shape[k], steps]
        else:
            axes.append([shape[k], steps])
    if len(axes) > 4:
        return None
    axes = [[1, [0] * len(inputs)]] * (4 - len(axes)) + axes
    sizes = tuple(size for size, _ in axes)
    return sizes, tuple(tuple(steps[i] for _, steps in axes) for i in range(len(inputs)))


def broadcast_strides(t: Tensor, like: Tensor) -> tuple[int, ...]:
    """Strides of t, broadcast to the shape of another."""
    return t.stride() if t.shape == like.shape else t.expand(like.shape).stride()


_local = threading.local()


def scratch(size: int) -> int:
    """Address of so many bytes that belong to the calling thread: the same from call to call, so that they stay in the caches."""
    held = getattr(_local, "held", None)
    if held is None or held.numel() < size:
        held = _local.held = torch.empty(size, dtype=torch.uint8)
    return held.data_ptr()
