"""Two-dimensional int8 convolution, channels last, as an implicit matrix product, with bias, residual, activation and quantization fused.

    y = activation(x_scale (x8 - x_zero) * (w8 * w_scale) + bias + other_scale (other - other_zero));   q = clamp(round(y / scale) + zero_point)

``x`` [n, c, h, w] uint8 or int8 under one scale and zero point; ``weight`` [o, c / groups, kh, kw] int8 with a scale per output channel;
``bias`` [o]; ``other`` uint8, int8 or float of the result's shape; out [n, o, h', w'] float, uint8 or int8. All channels last.

A row of the product is the window of one pixel of the result. Its numbers are fetched where they lie: BK channels of one tap per
turn, or, where there are few channels, any BK of the window's numbers (``GATHER``). Unsigned numbers are made signed by flipping the
highest bit. Outside of the picture stands the integer 0, which is what the hardware fills in for nothing. Zero points are put right by
sums of weights: of the whole window at the end; of the taps outside of the picture, where a zero point meets an edge (``EDGES``), by
three more products at the beginning, of 0 or 1 by tap with the three bytes of a tap's sum. Pictures with few pixels share the sum
among SPLIT programs, which leave int32 sums for a second launch. Bound by arithmetic; by memory for 1x1 windows of few channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from graphwright.kernels.gpu.conv_parts import Call, Packed, call, cost, finish, merged, pack, shift_of, supports
from graphwright.kernels.gpu.conv_samples import on_meta, products
from graphwright.kernels.gpu.language import tile_of
from graphwright.kernels.gpu.launch import Config, Estimate, Family, Launch, Plan, cdiv, power_of_two
from graphwright.kernels.gpu.prepared import once

CONFIGS = (
    Config.of(BM=128, BN=256, BK=128, SPLIT=1, GROUP=8, warps=8, stages=3),
    Config.of(BM=128, BN=128, BK=128, SPLIT=1, GROUP=8, warps=8, stages=3),
    Config.of(BM=128, BN=128, BK=64, SPLIT=1, GROUP=8, warps=8, stages=4),
    Config.of(BM=128, BN=64, BK=64, SPLIT=1, GROUP=8, warps=4, stages=4),
    Config.of(BM=64, BN=128, BK=128, SPLIT=1, GROUP=8, warps=4, stages=3),
    Config.of(BM=64, BN=64, BK=64, SPLIT=1, GROUP=8, warps=4, stages=3),
    Config.of(BM=64, BN=64, BK=128, SPLIT=4, GROUP=8, warps=4, stages=3),
    Config.of(BM=128, BN=64, BK=32, SPLIT=1, GROUP=8, warps=8, stages=2),
    Config.of(BM=64, BN=32, BK=32, SPLIT=1, GROUP=8, warps=4, stages=3),
)

#: Rows and columns of a program that finishes shared sums.
_FINISH = (16, 64)


@triton.jit
def conv2d_int8_kernel(
    x, weight, digits, sums, scales, bias, other, out, rows, height, width, out_height, out_width, x_scale, x_zero, other_scale, other_zero,
    a, b, inverse, low, high, zero,
    C: tl.constexpr, CG: tl.constexpr, OG: tl.constexpr, COLUMNS: tl.constexpr, PITCH: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, PLAIN: tl.constexpr,
    GATHER: tl.constexpr, EDGES: tl.constexpr, ACT: tl.constexpr, ROUND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KH * KW
    PADDED: tl.constexpr = (PH > 0) | (PW > 0)
    BLOCKS: tl.constexpr = (CG + BK - 1) // BK
    TURNS: tl.constexpr = (TAPS * CG + BK - 1) // BK if GATHER else TAPS * BLOCKS
    UNSIGNED: tl.constexpr = x.dtype.element_ty == tl.uint8
    row, column = tile_of(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(OG, BN), GROUP)
    group = tl.program_id(1)
    r, n, k = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN), tl.arange(0, BK)
    pixel = tl.minimum(r, rows - 1)
    if PLAIN:
        y, left = pixel, pixel
        at = pixel.to(tl.int64) * C
    else:
        line = pixel // out_width
        y, left = (line % out_height) * SH - PH, (pixel % out_width) * SW - PW
        at = (((line // out_height).to(tl.int64) * height + y) * width + left) * C
    x_at = x + (at + group * CG)[:, None]
    w_at = weight + ((group * OG + tl.minimum(n, OG - 1)) * PITCH)[:, None] + k[None, :]
    if not GATHER:
        x_at += k[None, :]
    acc = tl.zeros((BM, BN), tl.int32)
    share = tl.program_id(2)
    if EDGES and share == 0:
        acc = x_zero * _outside(digits, y, left, group * OG + tl.minimum(n, OG - 1), height, width, COLUMNS, KH, KW, DH, DW)
    for turn in range(share * TURNS // SPLIT, (share + 1) * TURNS // SPLIT):
        if GATHER:
            number = turn * BK + k
            tap, channel = number // CG, number % CG
            down, across = tap // KW * DH, tap % KW * DW
            inside = (number < TAPS * CG)[None, :]
            if PADDED:
                inside = inside & ((y[:, None] + down[None, :]).to(tl.uint32, bitcast=True) < height) & ((left[:, None] + across[None, :]).to(tl.uint32, bitcast=True) < width)
            v = tl.load(x_at + ((down * width + across) * C + channel)[None, :], inside, other=0)
            w = tl.load(w_at + turn * BK)
        else:
            tap, first = turn // BLOCKS, turn % BLOCKS * BK
            down, across = tap // KW * DH, tap % KW * DW
            from_ = x_at + ((down * width + across) * C + first)
            if PADDED:
                inside = (((y + down).to(tl.uint32, bitcast=True) < height) & ((left + across).to(tl.uint32, bitcast=True) < width))[:, None]
                if CG % BK != 0:
                    inside = inside & (first + k < CG)[None, :]
                v = tl.load(from_, inside, other=0)
            elif CG % BK != 0:
                v = tl.load(from_, (first + k < CG)[None, :], other=0)
            else:
                v = tl.load(from_)
            if CG % BK != 0:  # behind the channels stand those of the next tap
                w = tl.load(w_at + (tap * CG + first), (first + k < CG)[None, :], other=0)
            else:
                w = tl.load(w_at + (tap * CG + first))
        if UNSIGNED:
            v = (v ^ 0x80).to(tl.int8, bitcast=True)
        acc = tl.dot(v, tl.trans(w), acc, out_dtype=tl.int32)
    inside = (r < rows)[:, None] & (n < OG)[None, :]
    if SPLIT > 1:
        tl.store(out + (share.to(tl.int64) * rows + r[:, None]) * COLUMNS + group * OG + n[None, :], acc, inside)
    else:
        shift = shift_of(sums, group * OG + n, n < OG, x_zero, UNSIGNED)
        finish(acc, r, group * OG + n, inside, n < OG, shift, x_scale, scales, bias, other, out, COLUMNS, other_scale, other_zero, a, b, inverse, low, high, zero,
               ACT, ROUND)  # fmt: skip


@triton.jit
def _outside(digits, y, left, n, height, width, COLUMNS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr):
    """[R, N]: sums of the weight over the taps outside of the picture, for windows beginning at (``y``, ``left``) and output channels ``n``.
    ``digits`` [3, columns, TAPS]: the sum of each tap is ``(digits[0] * 256 + digits[1]) * 256 + digits[2]``."""
    TAPS: tl.constexpr = (KH * KW + 31) // 32 * 32
    at = digits + n[:, None] * TAPS + tl.arange(0, 32)[None, :]
    total = tl.zeros((y.shape[0], n.shape[0]), tl.int32)
    for digit in tl.static_range(3):
        total = total * 256
        for first in range(0, TAPS, 32):
            tap = first + tl.arange(0, 32)
            down = (y[:, None] + (tap // KW * DH)[None, :]).to(tl.uint32, bitcast=True)
            across = (left[:, None] + (tap % KW * DW)[None, :]).to(tl.uint32, bitcast=True)
            missing = ((down >= height) | (across >= width)).to(tl.int8)
            total = tl.dot(missing, tl.trans(tl.load(at + (digit * COLUMNS * TAPS + first))), total, out_dtype=tl.int32)
    return total


@triton.jit
def conv2d_int8_finish(
    shared, sums, scales, bias, other, out, rows, x_scale, x_zero, other_scale, other_zero, a, b, inverse, low, high, zero,
    COLUMNS: tl.constexpr, UNSIGNED: tl.constexpr, ACT: tl.constexpr, ROUND: tl.constexpr, SPLIT: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    r, n = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * N + tl.arange(0, N)
    inside = (r < rows)[:, None] & (n < COLUMNS)[None, :]
    from_ = shared + r[:, None].to(tl.int64) * COLUMNS + n[None, :]
    acc = tl.zeros((R, N), tl.int32)
    for k in tl.static_range(SPLIT):
        acc += tl.load(from_ + k * tl.cast(rows, tl.int64) * COLUMNS, inside, other=0)
    shift = shift_of(sums, n, n < COLUMNS, x_zero, UNSIGNED)
    finish(acc, r, n, inside, n < COLUMNS, shift, x_scale, scales, bias, other, out, COLUMNS, other_scale, other_zero, a, b, inverse, low, high, zero,
           ACT, ROUND)  # fmt: skip


# -- host side ---------------------------------------------------------------------------------------------------------


def plan(*args: Any, config: Config) -> Plan:
    """See ``graphwright.ops.lowered.conv2d_int8``; the weight is packed once (``prepared.once``)."""
    c = call(*args)
    ready: Packed = once(pack, c.weight, c.scales, c.bias, options=(c.groups,))
    _, channels, height, width = c.x.shape
    _, columns, high, wide = c.size
    x, other, out = c.x.contiguous(memory_format=torch.channels_last), c.residual(), c.out()
    numbers, constants = c.epilogue()
    own = columns // ready.groups
    kh, kw = c.window
    constants |= {
        "C": channels, "CG": ready.channels, "OG": own, "COLUMNS": columns, "PITCH": ready.weight.shape[1], "KH": kh, "KW": kw,
        "SH": c.stride[0], "SW": c.stride[1], "PH": c.padding[0], "PW": c.padding[1], "DH": c.dilation[0], "DW": c.dilation[1],
        "PLAIN": _plain(c), "GATHER": _gathers(kh * kw, ready.channels, config), "EDGES": c.edges, "UNSIGNED": x.dtype == torch.uint8,
        "R": _FINISH[0], "N": _FINISH[1],
    }  # fmt: skip
    split = config["SPLIT"]
    sums = out if split == 1 else torch.empty((split, c.rows, columns), dtype=torch.int32, device=x.device)
    grid = (cdiv(c.rows, config["BM"]) * cdiv(own, config["BN"]), ready.groups, split)
    numbers, place = (float(c.x_scale), c.x_zero_point, *numbers), (c.rows, height, width, high, wide)
    first = Launch(conv2d_int8_kernel, grid, (x, ready.weight, ready.digits, ready.sums, ready.scales, ready.bias, other, sums, *place, *numbers), constants, config)
    if split == 1:
        return Plan(out, (first,))
    second = (cdiv(c.rows, _FINISH[0]), cdiv(columns, _FINISH[1]))
    last = (sums, ready.sums, ready.scales, ready.bias, other, out, c.rows, *numbers)
    return Plan(out, (first, Launch(conv2d_int8_finish, second, last, constants, config)))


def _plain(c: Call) -> bool:
    """Pixels of the result are those of the input, in order."""
    return c.window == (1, 1) and c.stride == (1, 1) and not any(c.padding)


def _gathers(taps: int, channels: int, config: Config) -> bool:
    """A turn takes numbers of several taps: turns of one tap would be a quarter empty, or more."""
    return taps > 1 and cdiv(channels, config["BK"]) * config["BK"] > 1.25 * channels


def _shape(c: Call) -> tuple[int, int, int, int]:
    """Groups after merging; channels and output channels of each; taps."""
    together = merged(c.groups, c.weight.shape[1], c.size[1] // c.groups)
    left = c.groups // together
    return left, c.weight.shape[1] * together, c.size[1] // left, c.window[0] * c.window[1]


def _turns(config: Config, channels: int, taps: int) -> int:
    return cdiv(taps * channels, config["BK"]) if _gathers(taps, channels, config) else taps * cdiv(channels, config["BK"])


def fits(config: Config, *args: Any) -> str | None:
    c = call(*args)
    groups, channels, own, taps = _shape(c)
    if config["BN"] > max(32, power_of_two(own)):
        return f"{own} output channels fill less than half of {config['BN']} columns"
    if config["BM"] > max(64, power_of_two(c.rows)):
        return f"{c.rows} pixels fill less than half of {config['BM']} rows"
    if config["BK"] > max(32, power_of_two(taps * channels)):
        return f"windows of {taps * channels} numbers are less than half of {config['BK']}"
    if config["BK"] < 64 <= channels and own > 32:
        return f"turns of {config['BK']} of {channels} channels are needlessly many"
    if config["SPLIT"] > 1:
        if _turns(config, channels, taps) < 2 * config["SPLIT"]:
            return f"{_turns(config, channels, taps)} turns are too few to be shared by {config['SPLIT']}"
        if groups * cdiv(c.rows, config["BM"]) * cdiv(own, config["BN"]) > 128:
            return "there are programs enough without sharing sums"
    return None


def estimate(config: Config, *args: Any) -> Estimate:
    c = call(*args)
    groups, channels, own, taps = _shape(c)
    bm, bn, bk, split = (config[name] for name in ("BM", "BN", "BK", "SPLIT"))
    turns, tiles = _turns(config, channels, taps), groups * cdiv(c.rows, bm) * cdiv(own, bn)
    least = cost(*args).bytes
    sums = 8 * split * c.rows * c.size[1] if split > 1 else 0
    return Estimate(2 * tiles * bm * bn * turns * bk, "int8", least + sums, tiles * turns * (bm + bn) * bk + least + sums,
                    tiles * split, (bm + bn) * bk * config.stages, cdiv(turns, split))  # fmt: skip


def matrix(config: Config, *args: Any) -> str:
    """Which matrix instruction is claimed; the last argument is the target."""
    return {"sm_80": "IMMA", "sm_90": "IGMMA", "gfx942": "v_mfma_i32"}[args[-1]]


def ahead() -> Iterator[tuple[str, tuple[Any, ...]]]:
    byte, signed = torch.uint8, torch.int8
    yield "32x256x14x14 3x3 u8", on_meta(32, 256, 14, 14, 256, 3, padding=(1, 1), activation="relu", dtype=byte)
    yield "32x128x28x28 3x3 i8 edges", on_meta(32, 128, 28, 28, 128, 3, given=signed, zero=3, padding=(1, 1), dtype=signed)
    yield "32x64x56x56 1x1 residual", on_meta(32, 64, 56, 56, 256, 1, given=signed, other=byte, activation="relu", dtype=torch.float16)
    yield "32x3x224x224 7x7", on_meta(32, 3, 224, 224, 64, 7, stride=(2, 2), padding=(3, 3), activation="relu", dtype=byte)
    yield "1x512x7x7 3x3", on_meta(1, 512, 7, 7, 512, 3, padding=(1, 1), activation="relu", dtype=byte)


FAMILY = Family("graphwright.conv2d_int8", plan, CONFIGS, supports, estimate, lambda *args: call(*args).kind(), cost, products, ahead, fits, matrix)
