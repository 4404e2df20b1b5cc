"""Float32 convolution of each channel by itself, and the 1x1 convolution behind it, as one kernel, channels last.

    z[n, i, j, c] = activation(bias[c] + sum_{k, l} x[n, i * s - p + k * d, j * s' - p' + l * d', c] * w[k, l, c])
    y[n, i, j, o] = activation'(bias'[o] + sum_c z[n, i, j, c] * v[o, c] + other[n, i, j, o])

``x`` [n, c, h, w], ``w`` [c, 1, k, l], ``v`` [o, c, 1, 1], ``other`` and the result [n, o, h', w']; all float32, x, other and the result channels last.
Depthwise separable convolution (Howard et al. 2017, arXiv:1704.04861). A task is a band of rows, some ten thousand numbers of z: they are made
by the depthwise kernel, laid out eight pixels side by side, and multiplied while they lie in the L2 cache, 48 columns of v at a time. z is
never in memory; v streams past once per band. Bound by arithmetic where o is large, by memory (x, y) else.
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
from graphwright.kernels import conv2d_depthwise
from graphwright.kernels.activations import ARITHMETIC, CODE, SMOOTH, scalars_of, simple, smooth, unfit_epilogue
from graphwright.kernels.common import not_cpu, pieces, scratch
from graphwright.kernels.language import Device
from graphwright.kernels.native import Native, specialized, threads_for
from graphwright.kernels.panels import HIGH, WIDE, beside, tile_of
from graphwright.kernels.tile import add as add_rows
from graphwright.kernels.tile import apart, call, f64, i64, real, scratch_of, share, store
from graphwright.kernels.vector import LANES, add, load_f, store_f

#: Numbers of z in a band, about, its pixels at least and at most, and channels that go into one running sum.
BAND, LEAST, MOST, CHUNK = 32768, 32, 128, 384
_HIGH, _WIDE, _CHUNK, _ZERO, _ONE = (np.int64(n) for n in (HIGH, WIDE, CHUNK, 0, 1))
_more = scratch_of(HIGH * WIDE * LANES)

# -- the kernel ------------------------------------------------------------------------------------------------------


def _end(params, sums, step, rows, row, first, n):  # device code, with ``activate`` put in by ``specialized``
    """Finish so many rows of sums, ``step`` bytes wide: bias, residual, activation; write ``n`` numbers of each, from column ``first`` on."""
    apart()
    p, d = i64(params), f64(params)
    for r in range(rows):
        line = sums + r * step
        for c in range(0, step, 64):
            store_f(add(load_f(line + c), load_f(p[26] + first * 4 + c)), line + c)
        if p[28] != 0:
            add_rows(line, p[28] + ((row + r) * p[27] + first) * 4, n, line)
    y = activate(p[29], sums, rows * step // 4, real(d[30]), real(d[31]), _more())  # noqa: F821
    for r in range(rows):
        store(0, p[6] + ((row + r) * p[27] + first) * 4, n, y + r * step, real(1), 0, real(0), real(0))


def _separable(params):  # device code, with ``LINE`` and ``END`` put in by ``specialized``
    """Slots: 2-24 those of the depthwise kernel, of which 6 is the result; 25 the second weight, 26 its bias, 27 columns, 28 other or 0, 29 code, 30 a,
    31 b, 32 rows of a band, 33 scratch, 34 bytes of it per thread."""
    p = i64(params)
    channels, high, wide, columns = p[5], p[7], p[8], p[27]
    even, bands, blocks = (channels + 1) // 2 * 2, (high + p[32] - 1) // p[32], (columns + 15) // 16
    lines = p[33] + (call(p[0]) * p[34] if p[0] != 0 else _ZERO)
    room = (p[32] * wide + _HIGH - 1) // _HIGH
    tiled = lines + (p[32] * wide * channels * 4 + 63) // 64 * 64
    sums = tiled + room * even * 32
    start, stop = share(params, p[19] * bands)
    for unit in range(start, stop):
        n, i = unit // bands, unit % bands * p[32]
        rows = min(p[32], high - i)
        pixels, at = rows * wide, (n * high + i) * wide
        for r in range(rows):
            LINE(params, n, i + r, lines + r * wide * channels * 4)  # noqa: F821
        tiles = (pixels + _HIGH - 1) // _HIGH
        for t in range(tiles):
            beside(lines + t * _HIGH * channels * 4, channels * 4, pixels - 1 - t * _HIGH, channels, even, tiled + t * even * 32)
        for block in range(0, blocks, 3):
            across = min(_WIDE, blocks - block)
            step, strip = across * 64, p[25] + block * even * 64
            for c in range(0, even, 384):
                depth = min(_CHUNK, even - c)
                piece = strip + c * step
                ahead, half = piece + depth * step, depth * step // 2
                for t in range(tiles):
                    row = t * _HIGH
                    count, to = min(_HIGH, pixels - row), sums + row * step
                    new = _ONE if t < 2 else _ZERO  # the first two bring what is multiplied next
                    tile_of(_HIGH if count > _HIGH // 2 else _HIGH // 2, across, tiled + t * even * 32 + c * 32, piece, depth, to, step, c,
                            ahead + new * t * half, new * step, new * 64)  # fmt: skip
                    if c + depth == even:
                        END(params, to, step, count, at + row, block * 16, min(across * 16, columns - block * 16))  # noqa: F821


_SLOTS = conv2d_depthwise.SLOTS + "q" * 5 + "dd" + "qqq"


def _native(first: Any, second: Any) -> Native:
    end = Device(specialized(_end, f"separable_end_{second.__name__}", activate=second))
    return Native(specialized(_separable, f"conv2d_separable_{first.__name__}_{second.__name__}", LINE=conv2d_depthwise.LINES[first], END=end), _SLOTS)


_NATIVES = {(a in SMOOTH, b in SMOOTH): _native(smooth if a in SMOOTH else simple, smooth if b in SMOOTH else simple)
            for a in ("relu", "silu") for b in ("relu", "silu")}  # fmt: skip

# -- host side -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Packed:
    """The second weight as the kernel reads it.

    Attributes:
        out: its output channels.
        weight: strips of 48 of them, the last may be narrower, each ``[c, 48]``; zeros where c is odd and behind the last channel.
        bias: of as many channels.
    """

    out: int
    weight: Tensor
    bias: Tensor


def pack(weight: Tensor, bias: Tensor | None) -> Packed:
    """Lay out a weight [o, c, 1, 1] and a bias [o] for the kernel."""
    out, channels = weight.shape[:2]
    behind = -out % LANES
    turned = torch.nn.functional.pad(weight.detach().reshape(out, channels).t(), (0, behind, 0, channels % 2))
    strips = [strip.reshape(-1) for strip in turned.split(WIDE * LANES, 1)]
    plain = torch.zeros(out) if bias is None else bias.detach()
    return Packed(out, torch.cat(strips), torch.nn.functional.pad(plain, (0, behind)))


class Separable:
    """Both convolutions with all that is constant worked out; called with x and the residual."""

    def __init__(self, first: conv2d_depthwise.Convolution, packed: Packed, activation: str, scalars: Sequence[float], inner: str):
        self.first, self.packed = first, packed
        self.tail = CODE[activation], *scalars_of(activation, scalars)
        self.native = _NATIVES[inner in SMOOTH, activation in SMOOTH]

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        (n, c), o = x.shape[:2], self.packed.out
        high, wide = self.first.size(x)
        out = torch.empty_strided((n, o, high, wide), (high * wide * o, 1, wide * o, o))
        if not out.numel():
            return out
        x = x.contiguous(memory_format=torch.channels_last)
        residual = 0
        if other is not None:
            other = other.contiguous(memory_format=torch.channels_last)
            residual = other.data_ptr()
        threads = threads_for(max(1, out.numel() * c // 16))
        rows = rows_of_a_band(n, c, high, wide, threads)
        tiles = -(-rows * wide // HIGH)
        size = (rows * wide * c * 4 + 63) // 64 * 64 + tiles * HIGH * 4 * (c + c % 2 + WIDE * LANES)
        size = (size + 63) // 64 * 64
        self.native(threads, *self.first.slots(x, out), self.packed.weight.data_ptr(), self.packed.bias.data_ptr(), o, residual, *self.tail, rows,
                    scratch(threads * size), size)  # fmt: skip
        return out


def rows_of_a_band(n: int, channels: int, high: int, wide: int, threads: int) -> int:
    """Rows of the result in a band: as many as its scratch allows, and such that all threads have as much to do."""
    wanted = max(1, min(high, max(LEAST, min(MOST, BAND // channels)) // wide))
    bands = -(-high // wanted)
    while n * bands % threads and bands < high:
        bands += 1
    return -(-high // bands)


def run(*args: Any) -> Tensor:
    """See ``graphwright.ops.lowered.conv2d_separable``."""
    return ready(*args)()


def made(
    weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], inner: str, inner_scalars: Sequence[float],
    second: Tensor, second_bias: Tensor | None, activation: str, scalars: Sequence[float],
) -> Separable:  # fmt: skip
    """The two convolutions; arguments as those of the op."""
    first = conv2d_depthwise.Convolution(conv2d_depthwise.pack(weight, bias), weight.shape[2:], stride, padding, dilation, inner, inner_scalars)
    return Separable(first, pack(second, second_bias), activation, scalars, inner)


def ready(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], inner: str,
    inner_scalars: Sequence[float], second: Tensor, second_bias: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float],
) -> Callable[[], Tensor]:  # fmt: skip
    """See ``Kernel.ready``."""
    return functools.partial(made(weight, bias, stride, padding, dilation, inner, inner_scalars, second, second_bias, activation, scalars), x, other)


def supports(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], inner: str,
    inner_scalars: Sequence[float], second: Tensor, second_bias: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float],
) -> str | None:  # fmt: skip
    reason = not_cpu(second, second_bias, other) or conv2d_depthwise.supports(x, weight, bias, stride, padding, dilation, inner, inner_scalars)
    if reason is not None:
        return reason
    if second.dtype != torch.float32:
        return f"the second weight is {second.dtype}; wanted float32"
    return unfit_second(weight.shape[0], tuple(second.shape), activation, None if other is None else other.dtype)


def unfit_second(channels: int, shape: tuple[int, ...], activation: str, other: torch.dtype | None) -> str | None:
    """None, or why a convolution with a weight of this shape can't follow one of so many channels here."""
    if len(shape) != 4 or shape[1] != channels or shape[2:] != (1, 1) or not shape[0]:
        return f"the second weight has shape {shape}; wanted [o, {channels}, 1, 1]"
    return unfit_epilogue(activation, other)


def cost(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], inner: str,
    inner_scalars: Sequence[float], second: Tensor, second_bias: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float],
) -> Cost:  # fmt: skip
    high, wide = ((s + 2 * p - d * (k - 1) - 1) // t + 1
                  for s, p, d, k, t in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True))  # fmt: skip
    pixels, (o, c) = x.shape[0] * high * wide, second.shape[:2]
    work = c * (2 * weight.shape[2] * weight.shape[3] + 1 + ARITHMETIC.get(inner, 30)) + o * (2 * c + 1 + ARITHMETIC.get(activation, 30))
    return Cost(pieces(x, weight, bias, second, second_bias, other) + 4 * pixels * o, pixels * work)


def samples() -> Iterator[Sample]:
    def make(name: str, n: int, c: int, h: int, w: int, o: int, k: tuple[int, int] = (3, 3), *, stride: int = 1, padding: tuple[int, int] = (1, 1),
             dilation: tuple[int, int] = (1, 1), bias: bool = True, inner: str = "none", inner_scalars: tuple[float, ...] = (), other: bool = False,
             activation: str = "none", scalars: tuple[float, ...] = (), bench: bool = False) -> Sample:  # fmt: skip
        def args(g: torch.Generator) -> tuple[Any, ...]:
            def last(*shape: int) -> Tensor:
                return torch.randn(*shape, generator=g).contiguous(memory_format=torch.channels_last)

            first, second = torch.randn(c, 1, *k, generator=g) / (k[0] * k[1]) ** 0.5, torch.randn(o, c, 1, 1, generator=g) / c**0.5
            high, wide = ((s + 2 * p - d * (m - 1) - 1) // stride + 1 for s, p, d, m in zip((h, w), padding, dilation, k, strict=True))
            biases = [torch.randn(m, generator=g) if bias else None for m in (c, o)]
            return (last(n, c, h, w), first, biases[0], (stride, stride), padding, dilation, inner, inner_scalars, second, biases[1],
                    last(n, o, high, wide) if other else None, activation, scalars)  # fmt: skip

        return Sample(name, args, bench)

    six: dict[str, Any] = {"inner": "hardtanh", "inner_scalars": (0.0, 6.0)}
    yield make("1x32x112x112 to 64 relu6", 1, 32, 112, 112, 64, **six, activation="hardtanh", scalars=(0.0, 6.0), bench=True)
    yield make("1x128x56x56 to 128 relu", 1, 128, 56, 56, 128, inner="relu", activation="relu", bench=True)
    yield make("1x96x112x112 stride 2 to 24 relu6", 1, 96, 112, 112, 24, stride=2, **six, bench=True)
    yield make("1x512x14x14 to 512 relu", 1, 512, 14, 14, 512, inner="relu", activation="relu", bench=True)
    yield make("1x384x14x14 to 64 relu6 residual", 1, 384, 14, 14, 64, **six, other=True, bench=True)
    yield make("1x1024x7x7 to 1024 relu", 1, 1024, 7, 7, 1024, inner="relu", activation="relu", bench=True)
    yield make("2x17x9x11 to 5, 4x2", 2, 17, 9, 11, 5, (4, 2), padding=(0, 1), bias=False, inner="gelu", activation="silu")
    yield make("1x33x13x8 to 49 stride 2 residual", 1, 33, 13, 8, 49, stride=2, inner="hardswish", other=True, activation="gelu")
    yield make("3x16x5x4 to 100 dilated, far padding", 3, 16, 5, 4, 100, padding=(4, 3), dilation=(2, 3), stride=3, inner="silu", activation="relu")
    yield make("1x400x3x3 to 1", 1, 400, 3, 3, 1)
    yield make("1x20x1x1 to 7", 1, 20, 1, 1, 7)
    yield make("0x16x5x5 to 8", 0, 16, 5, 5, 8)


KERNEL = Kernel("graphwright.conv2d_separable", "cpu", "llvm", run, supports, cost, samples, ready=ready)
