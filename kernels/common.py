"""Small host-side helpers that the CPU kernels share."""

from __future__ import annotations

import functools

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
