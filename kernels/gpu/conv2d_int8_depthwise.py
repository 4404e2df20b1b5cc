"""Int8 convolution of each channel by itself, channels last, with bias, residual, activation and quantization fused.

    y[n, i, j, c] = activation(x_scale w_scale[c] sum_{k, l} (x[n, i s - p + k d, j s' - p' + l d', c] - x_zero) w[k, l, c] + bias[c] + other);   q as in conv2d_int8

``x`` [n, c, h, w] uint8 or int8 under one scale and zero point, channels last; ``weight`` [c, 1, kh, kw] int8 with a scale per channel, packed to
[kh * kw, c]; ``bias`` [c]; ``other`` and out as in ``conv2d_int8``. There is nothing to share between channels, so no matrix unit: a program
takes BP pixels of BC channels and adds up tap by tap in int32; of what it reads, all but the first tap of a line lies in the L1
cache. Channels are read in words of four (``WORDS``, where their number is a multiple of four): the instruction for the sum of four products of
bytes, with three of the weight's bytes set to zero, takes one channel of a word without unpacking it. Outside of the picture
stands the zero point. Bound by memory for 3x3 windows where the integer units keep up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.kernels.gpu import conv_parts
from graphwright.kernels.gpu.conv_parts import Packed, call, cost, finish, shift_of
from graphwright.kernels.gpu.conv_samples import channels, on_meta
from graphwright.kernels.gpu.launch import Config, Estimate, Family, Launch, Plan, cdiv, power_of_two
from graphwright.kernels.gpu.prepared import once

CONFIGS = (
    Config.of(BP=128, BC=64, warps=4, stages=1),
    Config.of(BP=64, BC=64, warps=4, stages=1),
    Config.of(BP=32, BC=128, warps=4, stages=1),
    Config.of(BP=32, BC=64, warps=4, stages=1),
    Config.of(BP=64, BC=32, warps=4, stages=1),
    Config.of(BP=64, BC=16, warps=1, stages=1),
)

#: Taps of a line up to which they are all written out.
_UNROLLED = 5


@triton.jit
def conv2d_int8_depthwise_kernel(
    x, weight, sums, scales, bias, other, out, rows, height, width, out_height, out_width, x_scale, x_zero, other_scale, other_zero,
    a, b, inverse, low, high, zero,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr,
    DW: tl.constexpr, UNROLL: tl.constexpr, UNSIGNED: tl.constexpr, WORDS: tl.constexpr, ACT: tl.constexpr, ROUND: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    r, n = tl.program_id(0) // BLOCKS * BP + tl.arange(0, BP), tl.program_id(0) % BLOCKS * BC + tl.arange(0, BC)
    pixel = tl.minimum(r, rows - 1)
    line = pixel // out_width
    y, left = (line % out_height) * SH - PH, (pixel % out_width) * SW - PW
    there = n < C
    at = ((line // out_height).to(tl.int64) * height + y) * width + left
    if WORDS:
        m = tl.program_id(0) % BLOCKS * (BC // 4) + tl.arange(0, BC // 4)
        a0 = tl.zeros((BP, BC // 4), tl.int32)
        a1, a2, a3 = a0, a0, a0
        fill = (x_zero & 255) * 0x01010101
        from_ = x + (at * (C // 4))[:, None] + m[None, :]
        for down in range(KH):
            if UNROLL:
                for across in tl.static_range(KW):
                    a0, a1, a2, a3 = _words(a0, a1, a2, a3, from_, weight, m, y, left, down, across, KW, height, width, fill, C // 4, DH, DW, UNSIGNED, PTX)
            else:
                for across in range(KW):
                    a0, a1, a2, a3 = _words(a0, a1, a2, a3, from_, weight, m, y, left, down, across, KW, height, width, fill, C // 4, DH, DW, UNSIGNED, PTX)
        acc = tl.join(tl.join(a0, a2), tl.join(a1, a3)).reshape(BP, BC)
    else:
        from_, fill = x + (at * C)[:, None] + n[None, :], tl.cast(x_zero, x.dtype.element_ty)
        acc = tl.zeros((BP, BC), tl.int32)
        for down in range(KH):
            for across in range(KW):
                acc = _tap(acc, from_, weight, n, there, y, left, down, across, KW, height, width, fill, C, DH, DW)
    finish(acc, r, n, (r < rows)[:, None] & there[None, :], there, shift_of(sums, n, there, x_zero, False), x_scale, scales, bias, other, out, C,
           other_scale, other_zero, a, b, inverse, low, high, zero, ACT, ROUND)  # fmt: skip


@triton.jit
def _tap(acc, from_, weight, n, there, y, left, down, across, KW: tl.constexpr, height, width, fill, C: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr):
    """``acc`` and what one tap adds to it."""
    inside = ((y + down * DH).to(tl.uint32, bitcast=True) < height) & ((left + across * DW).to(tl.uint32, bitcast=True) < width)
    v = tl.load(from_ + (down * DH * width + across * DW) * C, inside[:, None] & there[None, :], other=fill)
    w = tl.load(weight + (down * KW + across) * C + n, there, other=0)
    return acc + v.to(tl.int32) * w.to(tl.int32)[None, :]


@triton.jit
def _words(a0, a1, a2, a3, from_, weight, m, y, left, down, across, KW: tl.constexpr, height, width, fill, C: tl.constexpr, DH: tl.constexpr,
           DW: tl.constexpr, UNSIGNED: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """The same for words: the sums of the first, second, third and fourth channel of each."""
    inside = ((y + down * DH).to(tl.uint32, bitcast=True) < height) & ((left + across * DW).to(tl.uint32, bitcast=True) < width)
    v = tl.load(from_ + (down * DH * width + across * DW) * C, inside[:, None] & (m < C)[None, :], other=fill)
    w = tl.load(weight + (down * KW + across) * C + m, m < C, other=0)[None, :]
    return (_byte(v, w, a0, 0, UNSIGNED, PTX), _byte(v, w, a1, 8, UNSIGNED, PTX), _byte(v, w, a2, 16, UNSIGNED, PTX), _byte(v, w, a3, 24, UNSIGNED, PTX))


@triton.jit
def _byte(v, w, acc, SHIFT: tl.constexpr, UNSIGNED: tl.constexpr, PTX: tl.constexpr):
    """``acc`` plus the product of the bytes of v and w from bit SHIFT on; w's is signed."""
    if PTX:
        only = w & (255 << SHIFT if SHIFT < 24 else -16777216)
        if UNSIGNED:
            acc = tl.inline_asm_elementwise("dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [v, only, acc], dtype=tl.int32, is_pure=True, pack=1)
        else:
            acc = tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [v, only, acc], dtype=tl.int32, is_pure=True, pack=1)
    else:
        one = (v >> SHIFT) & 255 if UNSIGNED else (v << (24 - SHIFT)) >> 24
        acc += one * ((w << (24 - SHIFT)) >> 24)
    return acc


# -- host side ---------------------------------------------------------------------------------------------------------


def pack(weight: Tensor, scales: Tensor, bias: Tensor | None) -> Packed:
    """Pack ``weight [c, 1, kh, kw]`` int8 to ``[kh * kw, c]``; without the digits that products need."""
    whole = weight.detach()
    count = whole.shape[0]
    plain = torch.zeros(count, device=whole.device) if bias is None else bias.detach().float().clone()
    return Packed(whole.reshape(count, -1).t().clone(memory_format=torch.contiguous_format), whole.sum((1, 2, 3), dtype=torch.int32),
                  whole.new_empty(0), scales.detach().float().expand(count).clone(), plain, count, 1)  # fmt: skip


def plan(*args: Any, config: Config) -> Plan:
    """See ``graphwright.ops.lowered.conv2d_int8``; the weight is packed once (``prepared.once``)."""
    c = call(*args)
    ready: Packed = once(pack, c.weight, c.scales, c.bias)
    out, x = c.out(), c.x.contiguous(memory_format=torch.channels_last)
    numbers, constants = c.epilogue()
    (kh, kw), (_, count, high, wide) = c.window, c.size
    words = count % 4 == 0 and (x.device.type == "meta" or x.data_ptr() % 4 == 0)
    constants |= {
        "C": count, "KH": kh, "KW": kw, "SH": c.stride[0], "SW": c.stride[1], "PH": c.padding[0], "PW": c.padding[1], "DH": c.dilation[0],
        "DW": c.dilation[1], "UNROLL": kw <= _UNROLLED, "UNSIGNED": x.dtype == torch.uint8, "WORDS": words,
    }  # fmt: skip
    given, weight = (x.permute(0, 2, 3, 1).reshape(-1).view(torch.int32), ready.weight.view(torch.int32)) if words else (x, ready.weight)
    place = (c.rows, x.shape[2], x.shape[3], high, wide, float(c.x_scale), c.x_zero_point)
    grid = (cdiv(c.rows, config["BP"]) * cdiv(count, config["BC"]),)
    tensors = (given, weight, ready.sums, ready.scales, ready.bias, c.residual(), out)
    return Plan(out, (Launch(conv2d_int8_depthwise_kernel, grid, (*tensors, *place, *numbers), constants, config),))


def supports(*args: Any) -> str | None:
    if (reason := conv_parts.supports(*args)) is not None:
        return reason
    weight, groups = args[3], args[9]
    alone = weight.shape[1] == 1 and weight.shape[0] == groups
    return None if alone else f"{groups} groups, weight of shape {tuple(weight.shape)}; wanted as many groups as channels and output channels"


def fits(config: Config, *args: Any) -> str | None:
    count = args[3].shape[0]
    if config["BC"] > max(16, power_of_two(count)):
        return f"{count} channels fill less than half of {config['BC']}"
    return f"{count} channels in blocks of {config['BC']} are many programs of one warp" if config["BC"] == 16 and count > 64 else None


def estimate(config: Config, *args: Any) -> Estimate:
    c = call(*args)
    taps, count = c.window[0] * c.window[1], c.size[1]
    tiles, least = cdiv(c.rows, config["BP"]) * cdiv(count, config["BC"]), cost(*args).bytes
    work = tiles * config["BP"] * config["BC"] * (2 * taps + 14) + tiles * config["BC"] * (taps + 12) * 32
    return Estimate(work, "f32", least, tiles * config["BP"] * config["BC"] * taps // max(1, c.window[1] - c.stride[1] + 1) + least, tiles, 0, 1)


def ahead() -> Iterator[tuple[str, tuple[Any, ...]]]:
    byte, signed = torch.uint8, torch.int8
    yield "32x144x56x56 3x3 u8", on_meta(32, 144, 56, 56, 144, 3, padding=(1, 1), groups=144, activation="relu", dtype=byte)
    yield "32x96x112x112 3x3 stride 2 i8", on_meta(32, 96, 112, 112, 96, 3, given=signed, zero=3, stride=(2, 2), padding=(1, 1), groups=96, dtype=signed)
    yield "32x240x28x28 5x5 fp16", on_meta(32, 240, 28, 28, 240, 5, padding=(2, 2), groups=240, activation="hardswish", dtype=torch.float16)
    yield "32x96x14x14 7x7 residual", on_meta(32, 96, 14, 14, 96, 7, padding=(3, 3), groups=96, other=byte, dtype=byte)


FAMILY = Family("graphwright.conv2d_int8", plan, CONFIGS, supports, estimate, lambda *args: call(*args).kind(), cost, channels, ahead, fits,
                name="conv2d_int8_depthwise")  # fmt: skip
