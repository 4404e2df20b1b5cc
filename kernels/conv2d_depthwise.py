"""Two-dimensional float32 convolution of each channel by itself, channels last.

    y[n, i, j, c] = activation(bias[c] + sum_{k, l} x[n, i * s - p + k * d, j * s' - p' + l * d', c] * w[k, l, c])

``x`` [n, c, h, w] float32, channels last; ``weight`` [c, 1, k, l] float32, packed to [k, l, c]; out [n, c, h', w'] float32,
channels last. Sixteen channels are one vector: four neighbouring windows share each load of the weight, which stays in the L1
cache. Rows and columns of zeros at the weight's edges (padding on one side only, folded into the window) are left out.
Bound by memory: x is read once from it, k times from the L2 cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.kernels.activations import ARITHMETIC, CODE, SMOOTH, scalars_of, simple, smooth, unfit_epilogue
from graphwright.kernels.common import not_cpu, pieces
from graphwright.kernels.language import Device
from graphwright.kernels.native import Native, specialized, threads_for, unavailable
from graphwright.kernels.tile import apart, device, f64, i64, real, share
from graphwright.kernels.vector import LANES, fma, larger, load_f, smaller, splat_f, store_f

#: Activations that are bounds on the sum.
_BOUNDS = {"none": (-float("inf"), float("inf")), "relu": (0.0, float("inf"))}
TAPS, DENSE = np.int64(0), False
_ZERO, _FOUR, _ONE = np.int64(0), np.int64(4), np.int64(1)

# -- the kernel ------------------------------------------------------------------------------------------------------


def four(x, stride, line, tap, w, channels, first, last, taps, bias, to, low, high):
    """Four neighbouring windows over all channels: addresses, steps in bytes, the window's rows from ``first`` to ``last``."""
    apart()
    step = tap if DENSE else stride
    bottom, top, row = splat_f(low), splat_f(high), channels * 4
    for block in range(0, channels, 16):
        c = min(block, channels - 16) * 4  # the last block may begin within the one before
        a0 = load_f(bias + c)
        a1, a2, a3 = a0, a0, a0
        for k in range(first, last):
            source, factor = x + k * line + c, w + k * taps * row + c
            for _ in range(TAPS if TAPS > 0 else taps):
                f = load_f(factor)
                a0 = fma(load_f(source), f, a0)
                a1 = fma(load_f(source + step), f, a1)
                a2 = fma(load_f(source + step * 2), f, a2)
                a3 = fma(load_f(source + step * 3), f, a3)
                source += tap
                factor += row
        store_f(smaller(top, larger(bottom, a0)), to + c)
        store_f(smaller(top, larger(bottom, a1)), to + row + c)
        store_f(smaller(top, larger(bottom, a2)), to + row * 2 + c)
        store_f(smaller(top, larger(bottom, a3)), to + row * 3 + c)


#: The same with the length of a window's rows put in (0: any), so that LLVM unrolls them, and with steps of one pixel, so that
#: what neighbouring windows share is loaded once.
four_any = device(specialized(four, "four_any", TAPS=np.int64(0), DENSE=False))
four_of_3 = device(specialized(four, "four_of_3", TAPS=np.int64(3), DENSE=False))
four_of_5 = device(specialized(four, "four_of_5", TAPS=np.int64(5), DENSE=False))
dense_of_3 = device(specialized(four, "dense_of_3", TAPS=np.int64(3), DENSE=True))
dense_of_5 = device(specialized(four, "dense_of_5", TAPS=np.int64(5), DENSE=True))
dense_of_7 = device(specialized(four, "dense_of_7", TAPS=np.int64(7), DENSE=True))


@device
def one(x, line, tap, w, channels, first, last, left, right, taps, bias, to, low, high):
    """One window, of whose columns those from ``left`` to ``right`` lie in the picture."""
    apart()
    bottom, top, row = splat_f(low), splat_f(high), channels * 4
    for block in range(0, channels, 16):
        c = min(block, channels - 16) * 4
        sum_ = load_f(bias + c)
        for k in range(first, last):
            for m in range(left, right):
                sum_ = fma(load_f(x + k * line + m * tap + c), load_f(w + (k * taps + m) * row + c), sum_)
        store_f(smaller(top, larger(bottom, sum_)), to + c)


@device
def begin(at, dilation):
    """The first tap that does not lie before the picture, the window beginning ``at``."""
    return (dilation - 1 - at) // dilation if at < 0 else _ZERO


def _line(params, n, i, to):  # device code, with ``activate`` put in by ``specialized``
    """Row ``i`` of the result for picture ``n``, ``[w', c]``. Slots as those of ``_depthwise``."""
    apart()
    p, d = i64(params), f64(params)
    h, w, channels, wide = p[3], p[4], p[5], p[8]
    rows, taps, down, across, deep, broad = p[11], p[12], p[13], p[14], p[17], p[18]
    a, b, low, top = real(d[21]), real(d[22]), real(d[23]), real(d[24])
    pixel = channels * 4
    line, tap, step = w * pixel * deep, pixel * broad, pixel * across
    inner = (p[16] + across - 1) // across  # windows from here on begin within the picture
    outer = (w - 1 - (taps - 1) * broad + p[16]) // across + 1  # and up to here end within it
    y = i * down - p[15]
    first = begin(y, deep)
    last = max(first, min(rows, (h - y + deep - 1) // deep))
    source = p[2] + (n * h + y) * w * pixel
    j = _ZERO
    while j < wide:
        x = j * across - p[16]
        count = _ONE
        if j >= inner and j + 4 <= outer:
            if taps == 3 and step == tap:
                dense_of_3(source + x * pixel, step, line, tap, p[9], channels, first, last, taps, p[10], to, low, top)
            elif taps == 5 and step == tap:
                dense_of_5(source + x * pixel, step, line, tap, p[9], channels, first, last, taps, p[10], to, low, top)
            elif taps == 7 and step == tap:
                dense_of_7(source + x * pixel, step, line, tap, p[9], channels, first, last, taps, p[10], to, low, top)
            elif taps == 3:
                four_of_3(source + x * pixel, step, line, tap, p[9], channels, first, last, taps, p[10], to, low, top)
            elif taps == 5:
                four_of_5(source + x * pixel, step, line, tap, p[9], channels, first, last, taps, p[10], to, low, top)
            else:
                four_any(source + x * pixel, step, line, tap, p[9], channels, first, last, taps, p[10], to, low, top)
            count = _FOUR
        else:
            left = begin(x, broad)
            right = max(left, min(taps, (w - x + broad - 1) // broad))
            one(source + x * pixel, line, tap, p[9], channels, first, last, left, right, taps, p[10], to, low, top)
        if p[20] >= 0:
            activate(p[20], to, count * channels, a, b, to)  # noqa: F821
        j += count
        to += count * pixel


#: A row of the result, for each group of activations.
LINES = {activate: Device(specialized(_line, f"depthwise_line_{activate.__name__}", activate=activate)) for activate in (simple, smooth)}


def _depthwise(params):  # device code
    """Slots: 2-5 x, its height, width and channels; 6-8 out, its height and width; 9, 10 weight, bias; 11, 12 window; 13, 14 steps;
    15, 16 padding; 17, 18 dilation; 19 pictures; 20 activation (-1: bounds); 21-24 its scalars and bounds."""
    p = i64(params)
    start, end = share(params, p[19] * p[7])
    for unit in range(start, end):
        LINE(params, unit // p[7], unit % p[7], p[6] + unit * p[8] * p[5] * 4)  # noqa: F821


#: What ``LINES`` read.
SLOTS = "q" * 19 + "dddd"
_SIMPLE, _SMOOTH = (Native(specialized(_depthwise, f"conv2d_depthwise_{a.__name__}", LINE=line), SLOTS) for a, line in LINES.items())

# -- host side -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the kernel reads it.

    Attributes:
        weight: [k, l, c] float32, without rows and columns of zeros at its edges.
        bias: [c] float32.
        window: size as given.
        cut: rows and columns left out above and on the left.
    """

    weight: Tensor
    bias: Tensor
    window: tuple[int, int]
    cut: tuple[int, int]


def pack(weight: Tensor, bias: Tensor | None) -> Packed:
    """Lay out a weight [c, 1, k, l] and a bias [c] for the kernel."""
    weight = weight.detach()[:, 0]
    cuts = []
    for axis in (1, 2):
        used = weight.transpose(0, axis).flatten(1).ne(0).any(1).nonzero()
        low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        weight = weight.narrow(axis, low, high - low)
        cuts.append(low)
    window = tuple(cuts)
    plain = torch.zeros(weight.shape[0]) if bias is None else bias.detach().clone()
    return Packed(weight.permute(1, 2, 0).contiguous(), plain, tuple(int(s) for s in weight.shape[1:]), window)  # type: ignore[arg-type]


class Convolution:
    """A convolution with all that is constant worked out; called with x."""

    def __init__(self, packed: Packed, window: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
                 activation: str, scalars: Sequence[float]):  # fmt: skip
        self.packed, self.stride, self.dilation = packed, tuple(stride), tuple(dilation)
        self.reach = [2 * p - d * (k - 1) - 1 for p, d, k in zip(padding, dilation, window, strict=True)]
        self.padding = tuple(p - d * c for p, d, c in zip(padding, dilation, packed.cut, strict=True))
        self.native = _SMOOTH if activation in SMOOTH else _SIMPLE
        a, b = scalars_of(activation, scalars)
        bounds = (a, b) if activation == "hardtanh" else _BOUNDS.get(activation)
        self.tail = (-1, a, b, *bounds) if bounds else (CODE[activation], a, b, *_BOUNDS["none"])

    def __call__(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        high, wide = self.size(x)
        out = torch.empty_strided((n, c, high, wide), (high * wide * c, 1, wide * c, c))
        if out.numel():
            self.native(threads_for(out.numel() * 2), *self.slots(x.contiguous(memory_format=torch.channels_last), out))
        return out

    def size(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the result."""
        high, wide = ((s + r) // step + 1 for s, r, step in zip(x.shape[2:], self.reach, self.stride, strict=True))
        return high, wide

    def slots(self, x: Tensor, out: Tensor) -> tuple[int | float, ...]:
        """What ``SLOTS`` stands for, of ``x`` [n, c, h, w], channels last; ``out`` has the height and width of the result."""
        (n, c, h, w), packed = x.shape, self.packed
        return (x.data_ptr(), h, w, c, out.data_ptr(), *out.shape[2:], packed.weight.data_ptr(), packed.bias.data_ptr(), *packed.weight.shape[:2],
                *self.stride, *self.padding, *self.dilation, n, *self.tail)  # fmt: skip


def run(*args: Any) -> Tensor:
    """See ``graphwright.ops.lowered.conv2d_depthwise``."""
    return ready(*args)()


def ready(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    activation: str, scalars: Sequence[float],
) -> Callable[[], Tensor]:  # fmt: skip
    """See ``Kernel.ready``."""
    return functools.partial(Convolution(pack(weight, bias), weight.shape[2:], stride, padding, dilation, activation, scalars), x)


def supports(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    activation: str, scalars: Sequence[float],
) -> str | None:  # fmt: skip
    if (reason := unavailable() or not_cpu(x, weight, bias)) is not None:
        return reason
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.ndim != 4:
        return f"x is {x.dtype} with {x.ndim} axes, the weight {weight.dtype}; wanted float32 with 4"
    if (reason := unfit_rest(tuple(weight.shape), padding, activation)) is not None:
        return reason
    if x.shape[1] != weight.shape[0]:
        return f"{x.shape[1]} channels against {weight.shape[0]} of the weight"
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(s + 2 * p < span for s, p, span in zip(x.shape[2:], padding, spans, strict=True)):
        return f"pictures of {tuple(x.shape[2:])} with {tuple(padding)} padded are smaller than the windows"
    return None


def unfit_rest(shape: tuple[int, ...], padding: Sequence[int], activation: str) -> str | None:
    """None, or why a convolution with a weight of this shape and this activation can't be served."""
    if len(shape) != 4 or shape[1] != 1 or not min(shape):
        return f"weight of shape {shape}; wanted [c, 1, k, l]"
    if shape[0] < LANES:
        return f"{shape[0]} channels; at least {LANES} are wanted"
    if min(padding) < 0:
        return f"padding {tuple(padding)} is negative"
    return unfit_epilogue(activation, None)


def cost(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    activation: str, scalars: Sequence[float],
) -> Cost:  # fmt: skip
    high, wide = ((s + 2 * p - d * (k - 1) - 1) // t + 1
                  for s, p, d, k, t in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True))  # fmt: skip
    size = x.shape[0] * x.shape[1] * high * wide
    return Cost(pieces(x, weight, bias) + 4 * size, size * (2 * weight.shape[2] * weight.shape[3] + 1 + ARITHMETIC.get(activation, 30)))


def samples() -> Iterator[Sample]:
    def make(name: str, n: int, c: int, h: int, w: int, k: tuple[int, int] = (3, 3), *, stride: int = 1, padding: tuple[int, int] = (1, 1),
             dilation: tuple[int, int] = (1, 1), bias: bool = True, activation: str = "none", scalars: tuple[float, ...] = (), zeros: int = 0,
             bench: bool = False) -> Sample:  # fmt: skip
        def args(g: torch.Generator) -> tuple[Any, ...]:
            x = torch.randn(n, c, h, w, generator=g).contiguous(memory_format=torch.channels_last)
            weight = torch.randn(c, 1, *k, generator=g)
            weight[:, :, :zeros], weight[..., :zeros] = 0, 0
            return x, weight, torch.randn(c, generator=g) if bias else None, (stride, stride), padding, dilation, activation, scalars

        return Sample(name, args, bench)

    yield make("1x96x112x112 stride 2 relu6", 1, 96, 112, 112, stride=2, activation="hardtanh", scalars=(0.0, 6.0), bench=True)
    yield make("1x144x56x56 relu6", 1, 144, 56, 56, activation="hardtanh", scalars=(0.0, 6.0), bench=True)
    yield make("1x240x28x28 5x5 silu", 1, 240, 28, 28, (5, 5), padding=(2, 2), activation="silu", bench=True)
    yield make("1x960x7x7", 1, 960, 7, 7, bench=True)
    yield make("1x96x56x56 7x7", 1, 96, 56, 56, (7, 7), padding=(3, 3), bench=True)
    yield make("2x17x9x11 4x2", 2, 17, 9, 11, (4, 2), padding=(0, 1), bias=False, activation="gelu")
    yield make("1x33x13x8 stride 2, zeros ahead", 1, 33, 13, 8, (4, 4), stride=2, padding=(1, 1), zeros=1, activation="hardswish")
    yield make("3x16x5x4 dilated, far padding", 3, 16, 5, 4, (3, 3), padding=(4, 3), dilation=(2, 3), stride=3)
    yield make("1x20x1x1", 1, 20, 1, 1)
    yield make("1x16x3x40 1x5", 1, 16, 3, 40, (1, 5), padding=(0, 2), activation="relu")
    yield make("0x16x5x5", 0, 16, 5, 5)
    yield make("1x16x6x6 of zeros", 1, 16, 6, 6, zeros=3)


KERNEL = Kernel("graphwright.conv2d_depthwise", "cpu", "llvm", run, supports, cost, samples, ready=ready)
