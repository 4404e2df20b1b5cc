"""Arguments and cost of the int8 convolutions, which several kernels share."""

from __future__ import annotations

from typing import Any

import torch

from graphwright.kernel import Cost, Sample
from graphwright.kernels.activations import ARITHMETIC
from graphwright.kernels.common import pieces


def sizes(high: int, wide: int, window: Any, stride: Any, padding: Any, dilation: Any) -> list[int]:
    """Height and width of a result."""
    return [(s + 2 * p - e * (k - 1) - 1) // t + 1 for s, k, t, p, e in zip((high, wide), window, stride, padding, dilation, strict=True)]


def cost(*args: Any) -> Cost:
    """Of a call with the arguments of ``graphwright.conv2d_int8``."""
    x, weight = args[0], args[3]
    high, wide = sizes(*x.shape[2:], weight.shape[2:], *args[6:9])
    count = x.shape[0] * weight.shape[0] * max(0, high) * max(0, wide)
    moved = pieces(x, weight, args[4], args[5], args[10]) + count * (args[-1] or torch.float32).itemsize
    return Cost(moved, count * (2 * weight[0].numel() + 3 + ARITHMETIC.get(args[13], 30)))


def sample(
    name: str, n: int, c: int, h: int, w: int, o: int, k: tuple[int, int], *, stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1), groups: int = 1, bias: bool = True, other: Any = None, zero: int = 121, activation: str = "none",
    scalars: tuple[float, ...] = (), dtype: Any = None, bench: bool = False,
) -> Sample:  # fmt: skip
    """Pictures ``[n, c, h, w]`` of any bytes, a weight ``[o, c / groups, *k]``, and a residual of dtype ``other``."""

    def args(g: torch.Generator) -> tuple[Any, ...]:
        x = torch.randint(0, 256, (n, c, h, w), generator=g, dtype=torch.uint8)
        weight = torch.randint(-127, 128, (o, c // groups, *k), generator=g).to(torch.int8)
        residual = None
        if other is not None:
            integers = torch.randint(-100, 100, (n, o, *sizes(h, w, k, stride, padding, dilation)), generator=g)
            residual = integers.float() if other == torch.float32 else (integers + 100 * (other == torch.uint8)).to(other)
        points = (0.4, 128, 0, 255) if dtype == torch.uint8 else (0.4, 0, -128, 127)
        x = x.contiguous(memory_format=torch.channels_last)
        return (x, 0.02, zero, weight, torch.rand(o, generator=g) * 0.01 + 0.005, torch.randn(o, generator=g) if bias else None,
                stride, padding, dilation, groups, residual, 0.05, 100 if other == torch.uint8 else 0, activation, scalars, *points, dtype)  # fmt: skip

    return Sample(name, args, bench)
