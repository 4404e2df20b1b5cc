"""Arguments of the int8 convolutions for the correctness test, the microbenchmark and ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.kernel import Sample

_BYTE, _SIGNED = torch.uint8, torch.int8
_POINTS = {_BYTE: (0.4, 121, 0, 255), _SIGNED: (0.4, -3, -128, 127)}
_NO_POINTS = (1.0, 0, 0, 0)


def arguments(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, other: Tensor | None, *, zero: int = 0, stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0), dilation: tuple[int, int] = (1, 1), groups: int = 1, activation: str = "none",
    scalars: tuple[float, ...] = (), dtype: torch.dtype | None = None, gain: float = 1.0,
) -> tuple[Any, ...]:  # fmt: skip
    """The op's arguments in order."""
    scale, *points = _POINTS.get(dtype, _NO_POINTS) if dtype is not None else _NO_POINTS
    return (x, 0.02 * gain, zero, weight, scales, bias, stride, padding, dilation, groups, other, 0.05, 0 if other is None or other.is_floating_point() else 7,
            activation, scalars, scale, *points, dtype)  # fmt: skip


def sample(
    name: str, n: int, c: int, h: int, w: int, o: int, k: tuple[int, int], *, given: torch.dtype = _BYTE, bias: bool = True, other: Any = None,
    bench: bool = False, layout: str = "last", **options: Any,
) -> Sample:  # fmt: skip
    """A sample of pictures ``[n, c, h, w]`` and a weight ``[o, c / groups, *k]``; ``options`` go to ``arguments``."""

    def args(g: torch.Generator) -> tuple[Any, ...]:
        low = 0 if given == _BYTE else -128
        x = torch.randint(low, low + 256, (n, c, h, w), generator=g).to(given)
        if layout == "last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif layout == "strided":
            x = x.repeat_interleave(2, 3)[..., ::2]
        weight = torch.randint(-127, 128, (o, c // options.get("groups", 1), *k), generator=g).to(_SIGNED)
        (down, right), (above, left), (dh, dw) = (options.get(key, one) for key, one in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1))))
        size = (h + 2 * above - dh * (k[0] - 1) - 1) // down + 1, (w + 2 * left - dw * (k[1] - 1) - 1) // right + 1
        residual = None
        if other is not None:
            residual = torch.randint(0, 100, (n, o, *size), generator=g).to(other)
        scales = torch.rand(o, generator=g) * 0.01 + 0.005
        return arguments(x, weight, scales, torch.randn(o, generator=g) if bias else None, residual, **options)

    return Sample(name, args, bench)


def products() -> Iterator[Sample]:
    """Layers of ResNet-50 on 32 pictures, and small ones with odd sizes."""
    same = {"padding": (1, 1), "activation": "relu", "dtype": _BYTE, "bench": True}
    yield sample("32x3x224x224 7x7 stride 2", 32, 3, 224, 224, 64, (7, 7), stride=(2, 2), **{**same, "padding": (3, 3)})
    yield sample("32x64x56x56 3x3", 32, 64, 56, 56, 64, (3, 3), **same)
    yield sample("32x128x28x28 3x3", 32, 128, 28, 28, 128, (3, 3), **same)
    yield sample("32x256x14x14 3x3", 32, 256, 14, 14, 256, (3, 3), **same)
    yield sample("32x512x7x7 3x3", 32, 512, 7, 7, 512, (3, 3), **same)
    yield sample("32x256x28x28 3x3 stride 2", 32, 256, 28, 28, 256, (3, 3), stride=(2, 2), **same)
    yield sample("32x64x56x56 1x1 residual", 32, 64, 56, 56, 256, (1, 1), other=_BYTE, **{**same, "padding": (0, 0)})
    yield sample("32x1024x14x14 1x1", 32, 1024, 14, 14, 256, (1, 1), **{**same, "padding": (0, 0)})
    yield sample("32x1024x14x14 1x1 stride 2", 32, 1024, 14, 14, 2048, (1, 1), stride=(2, 2), bench=True, dtype=_BYTE)
    yield sample("32x256x28x28 3x3 in 32 groups", 32, 256, 28, 28, 256, (3, 3), groups=32, **same)
    yield sample("1x512x7x7 3x3", 1, 512, 7, 7, 512, (3, 3), **same)

    yield sample("2x3x11x9 7x7 stride 2, zero point at the edges", 2, 3, 11, 9, 20, (7, 7), zero=121, stride=(2, 2), padding=(3, 3), dtype=_BYTE)
    yield sample("1x64x7x6 3x3, zero point at the edges", 1, 64, 7, 6, 33, (3, 3), zero=77, padding=(1, 1), activation="relu", dtype=_SIGNED)
    yield sample("1x64x6x5 3x3 int8, residual, to fp16", 1, 64, 6, 5, 40, (3, 3), given=_SIGNED, zero=-9, padding=(1, 1), other=torch.float16, dtype=torch.float16)
    yield sample("2x40x5x7 3x3 dilated, to bf16", 2, 40, 5, 7, 24, (3, 3), zero=3, padding=(2, 2), dilation=(2, 2), activation="silu", dtype=torch.bfloat16)
    yield sample("3x72x4x5 1x1", 3, 72, 4, 5, 48, (1, 1), given=_SIGNED, other=_SIGNED, activation="hardswish", dtype=_SIGNED)
    yield sample("1x96x5x6 1x1 stride 2", 1, 96, 5, 6, 16, (1, 1), zero=200, stride=(2, 2), bias=False, dtype=_BYTE)
    yield sample("2x5x9x11 3x2, far padding", 2, 5, 9, 11, 7, (3, 2), zero=255, padding=(4, 3), stride=(1, 2), dilation=(2, 1), bias=False)
    yield sample("1x128x4x4 3x3 in 2 groups", 1, 128, 4, 4, 96, (3, 3), groups=2, zero=5, padding=(1, 1), other=_BYTE, dtype=_BYTE)
    yield sample("2x24x5x4 3x3 in 6 groups", 2, 24, 5, 4, 36, (3, 3), groups=6, given=_SIGNED, zero=1, padding=(1, 0), dtype=_SIGNED)
    yield sample("1x33x5x5 3x3 each channel by itself, twice", 1, 33, 5, 5, 66, (3, 3), groups=33, padding=(1, 1), dtype=_BYTE)
    yield sample("1x320x3x3 3x3, few pixels", 1, 320, 3, 3, 72, (3, 3), zero=9, padding=(1, 1), other=torch.float32)
    yield sample("1x2x10x9 9x9, far zero point", 1, 2, 10, 9, 3, (9, 9), given=_SIGNED, zero=-128, padding=(4, 4))
    yield sample("1x1x1x1", 1, 1, 1, 1, 1, (1, 1))
    yield sample("0x4x5x5", 0, 4, 5, 5, 16, (3, 3), dtype=_BYTE)
    yield sample("2x16x6x5 3x3, first axis first", 2, 16, 6, 5, 16, (3, 3), padding=(1, 1), layout="first", dtype=_BYTE)
    yield sample("2x16x6x5 1x1, strided", 2, 16, 6, 5, 16, (1, 1), layout="strided", activation="gelu", dtype=torch.float32)
    yield sample("1x32x5x5 3x3, saturating", 1, 32, 5, 5, 32, (3, 3), padding=(1, 1), gain=1e4, activation="relu", dtype=_BYTE)


def channels() -> Iterator[Sample]:
    """Layers of MobileNets on 32 pictures, each channel by itself, and small ones with odd sizes."""

    def make(name: str, n: int, c: int, h: int, w: int, k: tuple[int, int] = (3, 3), **options: Any) -> Sample:
        return sample(name, n, c, h, w, c, k, groups=c, **{"padding": (k[0] // 2, k[1] // 2), "dtype": _BYTE, **options})

    yield make("32x96x112x112 stride 2", 32, 96, 112, 112, stride=(2, 2), activation="relu", bench=True)
    yield make("32x144x56x56", 32, 144, 56, 56, activation="relu", bench=True)
    yield make("32x576x14x14", 32, 576, 14, 14, activation="relu", bench=True)
    yield make("32x240x28x28 5x5", 32, 240, 28, 28, (5, 5), activation="hardswish", bench=True)
    yield make("2x17x9x11 zero point, stride 2", 2, 17, 9, 11, zero=99, stride=(2, 1))
    yield make("1x48x5x6 int8, dilated, residual", 1, 48, 5, 6, given=_SIGNED, zero=-5, dilation=(2, 1), padding=(2, 1), other=_SIGNED, dtype=_SIGNED)
    yield make("1x32x6x4 7x7 silu to fp16", 1, 32, 6, 4, (7, 7), zero=12, activation="silu", dtype=torch.float16)
    yield make("1x64x3x5 4x2 to bf16, without bias", 1, 64, 3, 5, (4, 2), bias=False, dtype=torch.bfloat16)
    yield make("1x2x4x4 float32, saturating", 1, 2, 4, 4, dtype=None, activation="hardtanh", scalars=(0.0, 6.0), gain=1e3)
    yield make("1x20x1x1", 1, 20, 1, 1, padding=(1, 1), zero=30)
    yield make("0x16x5x5", 0, 16, 5, 5)


def on_meta(n: int, c: int, h: int, w: int, o: int, k: int, *, given: torch.dtype = _BYTE, other: Any = None, **options: Any) -> tuple[Any, ...]:
    """Arguments without contents."""
    stride, padding = options.get("stride", (1, 1)), options.get("padding", (0, 0))
    size = [(s + 2 * p - k) // t + 1 for s, p, t in zip((h, w), padding, stride, strict=True)]

    def empty(*shape: int, dtype: torch.dtype, last: bool = False) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last if last else torch.contiguous_format)

    weight = empty(o, c // options.get("groups", 1), k, k, dtype=_SIGNED)
    residual = None if other is None else empty(n, o, *size, dtype=other, last=True)
    return arguments(empty(n, c, h, w, dtype=given, last=True), weight, *(empty(o, dtype=torch.float32) for _ in range(2)), residual, **options)
