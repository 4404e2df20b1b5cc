"""What the int8 convolutions share: arguments worked out, the weight packed for products, the epilogue on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.kernel import Cost
from graphwright.kernels.gpu.language import CODE, activate
from graphwright.kernels.gpu.launch import bucket

_BYTES = (torch.uint8, torch.int8)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
#: Channels and output channels that groups are merged up to, and bytes to a multiple of which a packed row is padded.
LEAST, PITCH = 32, 128


@dataclass(frozen=True)
class Call:
    """The op's arguments under names, and what follows from them.

    Attributes:
        x, weight, scales, bias, other: as given; see ``graphwright.ops.lowered.conv2d_int8``.
        size: ``(n, o, h', w')`` of the result.
        dtype: of the result.
    """

    x: Tensor
    x_scale: float
    x_zero_point: int
    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    other: Tensor | None
    other_scale: float
    other_zero_point: int
    activation: str
    scalars: tuple[float, ...]
    scale: float
    zero_point: int
    low: int
    high: int
    dtype: torch.dtype
    size: tuple[int, int, int, int]

    @property
    def rows(self) -> int:
        """Pixels of the result."""
        return self.size[0] * self.size[2] * self.size[3]

    @property
    def window(self) -> tuple[int, int]:
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def edges(self) -> bool:
        """Windows reach over the edge, and zeros there are not the integer 0."""
        return self.x_zero_point != 0 and any(self.padding)

    def epilogue(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The epilogue's numbers, in the order of the kernels' parameters, and its constants."""
        a, b = (*self.scalars, 0.0, 0.0)[:2]
        low, rounds = self.low, self.dtype in _BYTES
        name = self.activation
        if rounds and name == "relu":  # a bound like any other
            name, low = "none", max(low, self.zero_point)
        numbers = (self.other_scale, float(self.other_zero_point), float(a), float(b), 1.0 / self.scale if rounds else 1.0,
                   float(low - self.zero_point), float(self.high - self.zero_point), self.zero_point)  # fmt: skip
        return numbers, {"ACT": CODE[name], "ROUND": rounds}

    def out(self) -> Tensor:
        return torch.empty(self.size, dtype=self.dtype, device=self.x.device, memory_format=torch.channels_last)

    def residual(self) -> Tensor | None:
        return None if self.other is None else self.other.contiguous(memory_format=torch.channels_last)

    def kind(self) -> tuple[Any, ...]:
        """What a tuned choice depends on."""
        shape = tuple(self.weight.shape), self.stride, self.padding, self.dilation, self.groups
        return (bucket(self.rows), *shape, self.x.dtype, self.dtype, self.edges, self.activation, None if self.other is None else self.other.dtype)


def call(
    x: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scales: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, other: Tensor | None, other_scale: float,
    other_zero_point: int, activation: str, scalars: Sequence[float], scale: float, zero_point: int, low: int, high: int,
    dtype: torch.dtype | None,
) -> Call:  # fmt: skip
    """The op's arguments as a ``Call``."""
    high_, wide = ((s + 2 * p - d * (k - 1) - 1) // t + 1
                   for s, p, d, k, t in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True))  # fmt: skip
    size = (x.shape[0], weight.shape[0], high_, wide)
    return Call(x, x_scale, x_zero_point, weight, weight_scales, bias, tuple(stride), tuple(padding), tuple(dilation), groups, other, other_scale,
                other_zero_point, activation, tuple(scalars), scale, zero_point, low, high, dtype or torch.float32, size)  # fmt: skip


def supports(*args: Any) -> str | None:
    """None, or why no kernel for int8 convolutions can serve the op's arguments."""
    x, weight, scales, bias, other = args[0], args[3], args[4], args[5], args[10]
    if x.dtype not in _BYTES or x.ndim != 4 or weight.dtype != torch.int8 or weight.ndim != 4:
        return f"x is {x.dtype} with {x.ndim} axes, the weight {weight.dtype} with {weight.ndim}; wanted uint8 or int8, and int8, with 4"
    out, channels, *window = weight.shape
    if args[9] < 1 or out % args[9] or x.shape[1] != channels * args[9] or not min(weight.shape):
        return f"{x.shape[1]} channels, {args[9]} groups, and a weight of shape {tuple(weight.shape)} don't go together"
    if channels * window[0] * window[1] > 65536:
        return f"windows of {channels * window[0] * window[1]} numbers; up to 65536 are supported"
    if min(*args[6], *args[8]) < 1 or min(args[7]) < 0:
        return f"stride {tuple(args[6])}, padding {tuple(args[7])}, dilation {tuple(args[8])}"
    if any(s + 2 * p < d * (k - 1) + 1 for s, p, d, k in zip(x.shape[2:], args[7], args[8], window, strict=True)):
        return f"pictures of {tuple(x.shape[2:])} with {tuple(args[7])} padded are smaller than the windows"
    c = call(*args)
    if x[:1].numel() * max(1, 1 + window[0] * args[8][0]) >= 2**31 or c.rows >= 2**31:
        return f"x has shape {tuple(x.shape)}: pictures of less than 2^31 bytes and results of less than 2^31 pixels are supported"
    if scales.shape not in ((out,), (1,)) or not scales.is_floating_point() or bias is not None and bias.shape != (out,):
        return f"scales of shape {tuple(scales.shape)}, bias of {None if bias is None else tuple(bias.shape)}; wanted ({out},)"
    if other is not None and (other.shape != c.size or other.dtype not in (*_BYTES, *_FLOATS)):
        return f"the residual is {other.dtype} of shape {tuple(other.shape)}; wanted {c.size}, uint8, int8, float16, bfloat16 or float32"
    if c.activation not in CODE:
        return f"activation {c.activation!r} is not fused; {', '.join(CODE)} are"
    return None if c.dtype in (*_BYTES, *_FLOATS) else f"result of {c.dtype}; uint8, int8, float16, bfloat16 and float32 are supported"


def cost(*args: Any) -> Cost:
    """Least bytes and operations of a call."""
    c = call(*args)
    tensors = [t for t in (c.x, c.weight, c.scales, c.bias, c.other) if t is not None]
    moved = sum(t.numel() * t.element_size() for t in tensors) + c.rows * c.size[1] * c.dtype.itemsize
    return Cost(moved, c.rows * c.size[1] * (2 * c.weight[0].numel() + 4))


# -- the weight --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the products read it.

    Attributes:
        weight: ``[o, pitch]`` int8: a row is ``[kh, kw, channels]`` and zeros behind.
        sums: ``[o]`` int32, of the integers of each output channel.
        digits: ``[3, o, taps]`` int8, taps to a multiple of 32: the sums of each tap, ``(digits[0] * 256 + digits[1]) * 256 + digits[2]``.
        scales, bias: ``[o]`` float32; the bias zeros where there is none.
        groups, channels: after merging: narrow groups stand side by side in a block-diagonal weight, since a matrix instruction
            takes 32 channels whether they are there or not.
    """

    weight: Tensor
    sums: Tensor
    digits: Tensor
    scales: Tensor
    bias: Tensor
    groups: int
    channels: int


def merged(groups: int, channels: int, out: int) -> int:
    """How many groups of so many channels and output channels are made one: the fewest that make ``LEAST`` of both, or all."""
    divisors = (m for m in range(1, groups + 1) if groups % m == 0)
    return next(m for m in divisors if m == groups or min(m * channels, m * out) >= LEAST)


def pack(weight: Tensor, scales: Tensor, bias: Tensor | None, groups: int) -> Packed:
    """Pack ``weight [o, i, kh, kw]`` int8 with ``scales`` ``[o]`` (or one for all) and ``bias`` ``[o]``."""
    weight = weight.detach()
    out, channels, kh, kw = weight.shape
    together = merged(groups, channels, out // groups)
    left = groups // together
    if together > 1:
        own = weight.reshape(left, together, out // groups, channels, kh, kw).permute(0, 2, 3, 4, 5, 1)
        wide = own.unsqueeze(5) * torch.eye(together, dtype=weight.dtype, device=weight.device)  # [left, o, c, kh, kw, in, out]
        weight = wide.permute(0, 6, 1, 5, 2, 3, 4).reshape(out, together * channels, kh, kw)
    last = weight.permute(0, 2, 3, 1).reshape(out, -1)
    packed = weight.new_zeros(out, -(-last.shape[1] // PITCH) * PITCH)
    packed[:, : last.shape[1]] = last
    taps = torch.nn.functional.pad(weight.sum(1, dtype=torch.int32).flatten(1), (0, -kh * kw % 32))
    plain = torch.zeros(out, device=weight.device) if bias is None else bias.detach().float().clone()
    return Packed(packed, taps.sum(1, dtype=torch.int32), _digits(taps), scales.detach().float().expand(out).clone(), plain, left, weight.shape[1])


def _digits(x: Tensor) -> Tensor:
    """Whole numbers below 2^23 as three signed bytes each, the highest first."""
    found = []
    for _ in range(3):
        low = (x + 128 & 255) - 128
        found.append(low.to(torch.int8))
        x = (x - low) // 256
    return torch.stack(found[::-1]).contiguous()


# -- device code -------------------------------------------------------------------------------------------------------


@triton.jit
def finish(acc, r, n, inside, there, shift, x_scale, scales, bias, other, out, columns, other_scale, other_zero, a, b, inverse, low, high, zero,
           ACT: tl.constexpr, ROUND: tl.constexpr):  # fmt: skip
    """Int32 sums ``acc`` [R, N] of the pixels ``r`` and output channels ``n``, less ``shift`` ([R, N] or [1, N]), all the way into ``out``, where they are ``inside`` [R, N]; ``there`` [N] are the output channels that exist."""
    scale = tl.load(scales + n, there, other=0.0) * x_scale
    offset = tl.load(bias + n, there, other=0.0)
    y = (acc - shift).to(tl.float32) * scale[None, :] + offset[None, :]
    at = r[:, None].to(tl.int64) * columns + n[None, :]
    if other is not None:
        y += (tl.load(other + at, inside, other=0).to(tl.float32) - other_zero) * other_scale
    y = activate(y, a, b, ACT)
    if ROUND:
        y = y * inverse
        y = tl.minimum(tl.maximum(tl.where(y != y, 0.0, y), low), high)
        # adding 1.5 * 2^23 rounds half to even and leaves the integer in the low bits
        bits = (y + 12582912.0).to(tl.int32, bitcast=True) + zero
        tl.store(out + at, bits.to(out.dtype.element_ty), inside)
    else:
        tl.store(out + at, y.to(out.dtype.element_ty), inside)


@triton.jit
def shift_of(sums, n, there, x_zero, UNSIGNED: tl.constexpr):
    """[1, N]: what the sums of the output channels ``n`` have too much: numbers are ``x_zero`` more, and 128 less where their highest bit is flipped."""
    total = tl.load(sums + n, there, other=0)
    return (total * (x_zero - 128 if UNSIGNED else x_zero))[None, :]
