"""Two-dimensional float32 convolution with 3x3 windows by Winograd's minimal filtering F(2x2, 3x3), channels last.

    Y = A^T [sum_c (G g G^T) * (B^T d B)] A          d: 4x4 pixels; Y: 2x2 pixels; *: element by element
    y = activation(Y + bias + other)

``x`` [n, c, h, w] float32; ``weight`` [o, c, 3, 3] float32, transformed and packed ahead (``pack``); ``other`` float32 of the
result's shape; out [n, o, h', w'] float32; all channels last, one pixel from window to window. The sums over channels are a
product of matrices for each of the 16 elements, with 2.25 times fewer multiplications than windows need (Lavin & Gray 2015,
arXiv:1509.09308). The entries of B and A are 0, 1 and -1, those of G also 1/2, so that results are as close to float64 as those
of the direct sum, where long sums are made of shorter ones. Where a result is not finite, the convolution is computed anew directly:
infinities and numbers near the largest do not survive the transforms.

A task is some 50 tiles by 64 output channels: what lies between its steps stays in the L2 cache, or nearly so; the weight streams
past, each part of it brought while the one before is multiplied. Bound by arithmetic; by memory (the weight, once) for small pictures.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.kernels.activations import ARITHMETIC, CODE, SMOOTH, scalars_of, simple, smooth, unfit_epilogue
from graphwright.kernels.common import not_cpu, pieces, scratch
from graphwright.kernels.fma import products
from graphwright.kernels.native import Native, specialized, threads_for, unavailable
from graphwright.kernels.tile import apart, call, device, f32, f64, i64, real, share
from graphwright.kernels.vector import LANES, splat_f
from graphwright.kernels.winograd import transform_in, transform_last_in, transform_last_out, transform_out
from graphwright.ops.fused import activate as activated

#: Input channels at most: one running sum over more of them would be further from the truth than ATen's many short ones.
CHANNELS = 2048
#: Tiles of a task at most, and blocks of 16 output channels.
TILES, BLOCKS = 56, 4
_BLOCKS, _WIDE, _ZERO = (np.int64(n) for n in (BLOCKS, BLOCKS * LANES, 0))
#: Channels that go into one running sum.
_CHUNK = np.int64(64)
#: Activations that are bounds.
_BOUNDS = {"none": (-float("inf"), float("inf")), "relu": (0.0, float("inf"))}


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the kernel reads it; channels padded to whole blocks of 16 with zeros.

    Attributes:
        out, channels: of the convolution.
        weight: strips of up to 64 output channels, one after the other, each ``[16, channels, up to 64]`` float32.
        bias: float32.
        plain, offset: weight and bias as they were given.
    """

    out: int
    channels: int
    weight: Tensor
    bias: Tensor
    plain: Tensor
    offset: Tensor | None


def pack(weight: Tensor, bias: Tensor | None) -> Packed:
    """Transform and pack ``weight [o, c, 3, 3]`` float32 (in float64, rounded once) with ``bias`` [o]."""
    out, channels = weight.shape[:2]
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    u = (g @ weight.detach().double() @ g.t()).float().permute(2, 3, 1, 0).reshape(16, channels, out)
    behind = (0, -out % LANES)
    u = torch.nn.functional.pad(u, (*behind, 0, -channels % LANES))
    strips = [s.reshape(-1) for s in u.split(BLOCKS * LANES, 2)]
    offset = torch.zeros(out) if bias is None else bias.detach().float()
    return Packed(out, channels, torch.cat(strips), torch.nn.functional.pad(offset, behind), weight, bias)


@device
def copied(source, n, to, room):
    """``n`` floats, and zeros up to ``room``."""
    apart()
    x, y = f32(source), f32(to)
    for i in range(n):
        y[i] = x[i]
    for i in range(n, room):
        y[i] = real(0)


@device
def following(x, y, picture, across, down):
    """Column, row and picture of the tile after this one."""
    x += 1
    if x == across:
        x = _ZERO
        y += 1
    if y == down:
        y = _ZERO
        picture += 1
    return x, y, picture


@device
def transform_tiles(params, start, count, to, step, patch):
    """So many tiles from ``start`` on, as 16 matrices [tiles, channels] ``step`` bytes apart."""
    apart()
    p = i64(params)
    high, wide, channels, down, across = p[4], p[5], p[6], (p[9] + 1) // 2, (p[10] + 1) // 2
    room, full, pixel = (channels + 15) // 16 * 16, channels // 16 * 16, channels * 4
    line = wide * pixel
    tx, ty, picture = start % across, start // across % down, start // (across * down)
    for k in range(count):
        x, y, row = tx * 2 - p[8], ty * 2 - p[7], to + k * room * 4
        source = p[2] + (picture * high + y) * line + x * pixel
        if x >= 0 and y >= 0 and x + 4 <= wide and y + 4 <= high:
            for c in range(0, full, 16):
                transform_in(source + c * 4, line, pixel, row + c * 4, step)
            if full < channels:
                transform_last_in(source + full * 4, line, pixel, row + full * 4, step, channels - full)
        else:
            for i in range(16):
                r, q = i // 4, i % 4
                inside = y + r >= 0 and y + r < high and x + q >= 0 and x + q < wide
                copied(source + r * line + q * pixel, channels if inside else _ZERO, patch + i * room * 4, room)
            for c in range(0, room, 16):
                transform_in(patch + c * 4, room * 16, room * 4, row + c * 4, step)
        tx, ty, picture = following(tx, ty, picture, across, down)


def _winograd(params):  # compiled, with ``activate`` put in by ``specialized``
    """Slots: 2 x, 3 pictures, 4 height, 5 width, 6 channels, 7 rows above, 8 pixels to the left, 9 height and width of the result, 11 its
    channels, 12 weight, 13 bias, 14 other or 0, 15 out, 16 scratch, 17 bytes of it per thread, 18 tiles of a task, 19 code or -1, 20 a,
    21 b, 22 bounds."""
    p, d = i64(params), f64(params)
    high, wide, columns, code, most = p[9], p[10], p[11], p[19], p[18]
    a, b, low, top = real(d[20]), real(d[21]), splat_f(real(d[22])), splat_f(real(d[23]))
    room, blocks = (p[6] + 15) // 16 * 16, (columns + 15) // 16
    down, across, strips = (high + 1) // 2, (wide + 1) // 2, (blocks + _BLOCKS - 1) // _BLOCKS
    tiles, pixel = p[3] * down * across, columns * 4
    line = wide * pixel
    me = call(p[0]) if p[0] != 0 else _ZERO
    inputs, in_step, out_step = p[16] + me * p[17], most * room * 4 + 64, most * _WIDE * 4 + 64  # 64: not all in one set of the cache
    sums = inputs + in_step * 16
    zeros = sums + out_step * 16
    patch = zeros + _WIDE * 4
    copied(zeros, _ZERO, zeros, _WIDE)
    held = np.int64(-1)
    first, end = share(params, (tiles + most - 1) // most * strips)
    for task in range(first, end):
        start, strip = task // strips * most, task % strips
        count, at = min(most, tiles - start), strip * _WIDE
        if start != held:
            held = start
            transform_tiles(params, start, count, inputs, in_step, patch)
        width = min(_WIDE, blocks * 16 - at)
        n, bias, weight, size = min(width, columns - at), p[13] + at * 4, p[12] + at * room * 64, room * width * 4
        for k in range(16):
            for c in range(0, room, _CHUNK):  # one running sum over many channels would lose digits
                of = weight + k * size + c * width * 4
                products(inputs + k * in_step + c * 4, room * 4, count, of, width * 4, width // 16, min(_CHUNK, room - c), sums + k * out_step,
                         width * 4, of + size, c)  # fmt: skip
        tx, ty, picture = start % across, start // across % down, start // (across * down)
        for k in range(count):
            m, offset = sums + k * width * 4, ((picture * high + ty * 2) * wide + tx * 2) * pixel + at * 4
            out, right, below = p[15] + offset, wide - tx * 2, high - ty * 2
            whole = right >= 2 and below >= 2
            other, other_line, other_pixel = zeros, _ZERO, _ZERO
            if p[14] != 0 and whole:
                other, other_line, other_pixel = p[14] + offset, line, pixel
            elif p[14] != 0:
                other, other_line, other_pixel = patch, width * 8, width * 4
                for i in range(4):
                    inside = i // 2 < below and i % 2 < right
                    copied(p[14] + offset + i // 2 * line + i % 2 * pixel, n if inside else _ZERO, patch + i * width * 4, width)
            to, to_line, to_pixel = m, out_step * 2, out_step
            if whole and code < 0:
                to, to_line, to_pixel = out, line, pixel
            for c in range(0, n // 16 * 64, 64):
                transform_out(m + c, out_step, bias + c, other + c, other_line, other_pixel, to + c, to_line, to_pixel, p[24], low, top)
            if n < width:
                c = n // 16 * 64
                transform_last_out(m + c, out_step, bias + c, other + c, other_line, other_pixel, to + c, to_line, to_pixel, p[24], low, top, n % 16)
            if to == m:
                for i in range(4):
                    if i // 2 < below and i % 2 < right:
                        y = m + i * out_step
                        if code >= 0:
                            y = activate(code, y, n, a, b, y)  # noqa: F821
                        copied(y, n, out + i // 2 * line + i % 2 * pixel, n)
            tx, ty, picture = following(tx, ty, picture, across, down)


_SLOTS = "q" * 18 + "ddddq"
_SIMPLE = Native(specialized(_winograd, "conv2d_winograd_simple", activate=simple), _SLOTS)
_SMOOTH = Native(specialized(_winograd, "conv2d_winograd_smooth", activate=smooth), _SLOTS)

class Convolution:
    """A convolution with all that is constant worked out; called with x and the residual."""

    def __init__(self, packed: Packed, padding: Sequence[int], activation: str, scalars: Sequence[float]):
        self.packed, self.padding = packed, tuple(padding)
        self.activation, self.scalars = activation, tuple(scalars)
        self.native = _SMOOTH if activation in SMOOTH else _SIMPLE
        a, b = scalars_of(activation, scalars)
        bounds = (a, b) if activation == "hardtanh" else _BOUNDS.get(activation)
        self.tail = (-1, a, b, *bounds) if bounds else (CODE[activation], a, b, *_BOUNDS["none"])

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        packed, (above, left) = self.packed, self.padding
        n, c, h, w = x.shape
        high, wide = h + 2 * above - 2, w + 2 * left - 2
        out = torch.empty_strided((n, packed.out, high, wide), (high * wide * packed.out, 1, wide * packed.out, packed.out))
        if not out.numel():
            return out
        x = x.contiguous(memory_format=torch.channels_last)
        residual = 0
        if other is not None:
            other = other.contiguous(memory_format=torch.channels_last)
            residual = other.data_ptr()
        tiles = n * (-(-high // 2)) * (-(-wide // 2))
        threads = threads_for(max(1, out.numel() * c // 2))
        bands, strips = -(-tiles // TILES), -(-packed.out // (BLOCKS * LANES))
        if bands * strips % threads:  # an equal share for all
            bands = -(-bands // threads) * threads
        most, room = -(-tiles // bands), -(-c // LANES) * LANES
        size = 16 * (most * (room + BLOCKS * LANES) * 4 + 128) + BLOCKS * LANES * 4 + 16 * room * 4
        mark = ctypes.c_int64(0)
        self.native(threads, x.data_ptr(), n, h, w, c, above, left, high, wide, packed.out, packed.weight.data_ptr(),
                    packed.bias.data_ptr(), residual, out.data_ptr(), scratch(threads * size), size, most, *self.tail, ctypes.addressof(mark))  # fmt: skip
        return self.directly(x, other) if mark.value else out


    def directly(self, x: Tensor, other: Tensor | None) -> Tensor:
        """The sum over windows itself: what is not finite spreads no further than it must."""
        y = torch.nn.functional.conv2d(x, self.packed.plain, self.packed.offset, padding=self.padding)
        return activated(y if other is None else y + other, self.activation, self.scalars)


def run(*args: Any) -> Tensor:
    """See ``graphwright.ops.lowered.conv2d_winograd``."""
    return ready(*args)()


def ready(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], other: Tensor | None, activation: str, scalars: Sequence[float],
) -> Callable[[], Tensor]:  # fmt: skip
    """See ``Kernel.ready``."""
    return functools.partial(Convolution(pack(weight, bias), padding, activation, scalars), x, other)


def supports(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], other: Tensor | None, activation: str, scalars: Sequence[float],
) -> str | None:  # fmt: skip
    if (reason := unavailable() or not_cpu(x, weight, bias, other)) is not None:
        return reason
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.ndim != 4:
        return f"x is {x.dtype} with {x.ndim} axes, the weight {weight.dtype}; wanted float32 with 4"
    if (reason := unfit_rest(tuple(weight.shape), padding, activation, None if other is None else other.dtype)) is not None:
        return reason
    if x.shape[1] != weight.shape[1]:
        return f"{x.shape[1]} input channels against {weight.shape[1]} of the weight; groups are not supported"
    high, wide = (s + 2 * p - 2 for s, p in zip(x.shape[2:], padding, strict=True))
    if high < 1 or wide < 1:
        return f"pictures of {tuple(x.shape[2:])} with {tuple(padding)} padded are smaller than the windows"
    if other is not None and tuple(other.shape) != (x.shape[0], weight.shape[0], high, wide):
        return f"the residual is {tuple(other.shape)}; wanted the result's shape"
    return None


def unfit_rest(shape: tuple[int, ...], padding: Sequence[int], activation: str, other: torch.dtype | None) -> str | None:
    """None, or why a convolution with a weight of this shape and this epilogue can't be served."""
    if len(shape) != 4 or shape[2:] != (3, 3):
        return f"weight of shape {shape}; wanted [o, c, 3, 3]"
    if not 0 < shape[1] <= CHANNELS:
        return f"{shape[1]} input channels; 1 to {CHANNELS} are supported: one running sum over more would lose digits"
    if min(padding) < 0:
        return f"padding {tuple(padding)} is negative"
    return unfit_epilogue(activation, other)


def cost(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], other: Tensor | None, activation: str, scalars: Sequence[float],
) -> Cost:  # fmt: skip
    (n, c, h, w), o = x.shape, weight.shape[0]
    high, wide = h + 2 * padding[0] - 2, w + 2 * padding[1] - 2
    pixels, tiles = n * high * wide, n * (-(-high // 2)) * (-(-wide // 2))
    moved = pieces(x, bias, other) + weight.numel() // 9 * 16 * 4 + pixels * o * 4
    return Cost(moved, tiles * (32 * c * o + 32 * c + 24 * o) + pixels * o * (2 + ARITHMETIC.get(activation, 30)))


def samples() -> Iterator[Sample]:
    def make(name: str, n: int, c: int, h: int, w: int, o: int, *, padding: tuple[int, int] = (1, 1), bias: bool = True,
             other: bool = False, activation: str = "none", scalars: tuple[float, ...] = (), bench: bool = False) -> Sample:  # fmt: skip
        def args(g: torch.Generator) -> tuple[Any, ...]:
            x = torch.randn(n, c, h, w, generator=g).contiguous(memory_format=torch.channels_last)
            weight = torch.randn(o, c, 3, 3, generator=g) / (3 * c**0.5)
            size = (n, o, h + 2 * padding[0] - 2, w + 2 * padding[1] - 2)
            return (x, weight, torch.randn(o, generator=g) if bias else None, padding, torch.randn(size, generator=g) if other else None,
                    activation, scalars)  # fmt: skip

        return Sample(name, args, bench)

    yield make("1x64x56x56 relu", 1, 64, 56, 56, 64, activation="relu", bench=True)
    yield make("1x128x28x28 relu", 1, 128, 28, 28, 128, activation="relu", bench=True)
    yield make("1x256x14x14 relu", 1, 256, 14, 14, 256, activation="relu", bench=True)
    yield make("1x512x7x7 residual relu", 1, 512, 7, 7, 512, other=True, activation="relu", bench=True)
    yield make("2x3x9x11 to 7", 2, 3, 9, 11, 7, padding=(0, 1), bias=False)
    yield make("3x17x4x5 to 33 hardtanh", 3, 17, 4, 5, 33, padding=(2, 0), activation="hardtanh", scalars=(-0.5, 1.0))
    yield make("2x64x13x6 to 80 residual leaky_relu", 2, 64, 13, 6, 80, other=True, activation="leaky_relu", scalars=(0.1,))
    yield make("1x32x8x8 to 32 residual silu", 1, 32, 8, 8, 32, other=True, activation="silu")
    yield make("1x64x1x1 to 16", 1, 64, 1, 1, 16)
    yield make("1x1x3x3 to 1, unpadded", 1, 1, 3, 3, 1, padding=(0, 0), bias=False)
    yield make("0x4x5x5 to 16", 0, 4, 5, 5, 16)


KERNEL = Kernel("graphwright.conv2d_winograd", "cpu", "llvm", run, supports, cost, samples, ready=ready)
