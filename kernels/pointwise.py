"""Elementwise chains in one pass: add, activation, gate, and conversion between float and quantized.

    y = activation(real(x) + real(other)) * gate;   q = clamp(round(y / scale) + zero_point, low, high)

``x`` float32, bfloat16, uint8 or int8 with up to 4 axes of any strides that matter (others are merged); ``other`` and
``gate`` the same, broadcast; out float32, bfloat16, uint8 or int8, contiguous or channels_last. One kernel serves
``activate_quantize``, ``add_quantize``, ``quantize`` and ``dequantize``. Bound by memory, with GELU and its like by
arithmetic while the data come from a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.kernels.activations import ARITHMETIC, CODE, SMOOTH, scalars_of, simple, smooth
from graphwright.kernels.common import GRID, broadcast_strides, grid, merged_axes, not_cpu, pieces
from graphwright.kernels.native import Native, specialized, threads_for, unavailable
from graphwright.kernels.tile import (
    KIND,
    TILE,
    add,
    apart,
    device,
    f64,
    fetch,
    i64,
    load,
    multiply,
    real,
    scratch,
    share,
    store,
)  # fmt: skip
from graphwright.ops.lowered import output_format

# -- the kernel ------------------------------------------------------------------------------------------------------


@device
def gather(params, slot, position, n, buffer):
    """Address of elements ``position`` to ``position + n`` of the operand described from ``slot`` on, as floats.

    The operand's slots: address, kind, scale, zero, four strides. Slots 2 to 5 hold the four sizes.
    """
    apart()
    p, d = i64(params), f64(params)
    address, kind = p[slot], p[slot + 1]
    scale, zero = real(d[slot + 2]), real(d[slot + 3])
    size = 4 if kind == 0 else (2 if kind == 1 else 1)
    inner, step = p[5], p[slot + 7]
    line, i3 = position // inner, position % inner
    i2, outer = line % p[4], line // p[4]
    done = 0
    while True:  # divisions are slow: one set per tile, then counting
        at = address + (outer // p[3] * p[slot + 4] + outer % p[3] * p[slot + 5] + i2 * p[slot + 6] + i3 * step) * size
        if done == 0 and inner - i3 >= n:
            return fetch(kind, at, step, n, scale, zero, buffer)
        while i2 < p[4] and done < n:
            run = min(inner - i3, n - done)
            load(kind, at, step, run, scale, zero, buffer + done * 4)
            at += (p[slot + 6] - i3 * step) * size
            done, i2, i3 = done + run, i2 + 1, np.int64(0)
        if done >= n:
            break
        i2, outer = np.int64(0), outer + 1
    return buffer


_X, _OTHER, _GATE = np.int64(6), np.int64(14), np.int64(22)


def _chain(params):  # device code, with ``activate`` put in by ``specialized``
    """Slots: 2-5 sizes, 6 x, 14 other, 22 gate, 30 elements, 31 out, 32 its kind, 33 code, 34 a, 35 b, 36 the grid."""
    p, d = i64(params), f64(params)
    a, b, inverse, low, high = real(d[34]), real(d[35]), real(d[36]), real(d[38]), real(d[39])
    kind = p[32]
    size = 4 if kind == 0 else (2 if kind == 1 else 1)
    one, two, three = scratch(), scratch(), scratch()
    first, end = share(params, (p[30] + TILE - 1) // TILE)
    for tile in range(first, end):
        at = tile * TILE
        n = min(TILE, p[30] - at)
        to = p[31] + at * size
        last = to if kind == 0 else two  # a float result is computed where it belongs
        untouched = p[14] == 0 and p[22] == 0 and p[33] == 0
        y = gather(params, _X, at, n, to if kind == 0 and untouched else one)
        if p[14] != 0:
            add(y, gather(params, _OTHER, at, n, two), n, three)
            y = three
        y = activate(p[33], y, n, a, b, two if p[22] != 0 else last)  # noqa: F821
        if p[22] != 0:
            gate = gather(params, _GATE, at, n, one)
            last = to if kind == 0 else (three if y == two else two)
            multiply(y, gate, n, last)
            y = last
        if y != to:
            store(kind, to, n, y, inverse, p[37], low, high)


_OPERAND = "qqddqqqq"
_SLOTS = "qqqq" + 3 * _OPERAND + "qqqq" + "dd" + GRID
_SIMPLE = Native(specialized(_chain, "pointwise_simple", activate=simple), _SLOTS)
_SMOOTH = Native(specialized(_chain, "pointwise_smooth", activate=smooth), _SLOTS)
_NOTHING = (0, 0, 1.0, 0.0, 0, 0, 0, 0)


def pointwise(
    x: Tensor, x_scale: float, x_zero: int, other: Tensor | None, other_scale: float, other_zero: int,
    gate: Tensor | None, activation: str, scalars: Sequence[float], scale: float, zero_point: int, low: int, high: int,
    dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """What the rows below have in common; floats carry scale 1 and zero point 0."""
    plain = x.is_contiguous()
    kind = dtype or torch.float32
    if plain:  # empty_like takes half the time of empty
        out = torch.empty_like(x, dtype=kind, memory_format=torch.contiguous_format)
    else:
        out = torch.empty(x.shape, dtype=kind, memory_format=output_format(x))
    count = out.numel()
    if not count:
        return out
    if plain and other is None and gate is None:
        sizes, strides = (1, 1, 1, count), ((0, 0, 0, 1),)
    else:
        inputs = [x.stride(), *(broadcast_strides(t, x) for t in (other, gate) if t is not None)]
        sizes, strides = merged_axes(x.shape, out.stride(), *inputs)  # type: ignore[misc]
    first = (x.data_ptr(), KIND[x.dtype], x_scale, x_zero, *strides[0])
    second = third = _NOTHING
    if other is not None:
        second = (other.data_ptr(), KIND[other.dtype], other_scale, other_zero, *strides[1])
    if gate is not None:
        third = (gate.data_ptr(), KIND[gate.dtype], 1.0, 0.0, *strides[-1])
    points = grid(scale, zero_point, low, high)
    if activation == "relu" and gate is None and not out.is_floating_point():  # the same as a lower bound on the result
        activation, points = "none", (*points[:2], max(points[2], 0), max(points[3], 0))
    native = _SMOOTH if activation in SMOOTH else _SIMPLE
    native(
        threads_for(count), *sizes, *first, *second, *third, count, out.data_ptr(), KIND[out.dtype], CODE[activation],
        *scalars_of(activation, scalars), *points,
    )  # fmt: skip
    return out


def unfit(x: Tensor, inputs: Sequence[Tensor | None], activation: str, dtype: torch.dtype | None) -> str | None:
    """None, or why the kernel cannot serve these inputs."""
    if (reason := unavailable() or not_cpu(*inputs)) is not None:
        return reason
    if activation not in CODE:
        return f"activation {activation!r} has no vector form; there are {', '.join(CODE)}"
    if (dtype or torch.float32) not in KIND:
        return f"result of {dtype}; there are {', '.join(map(str, KIND))}"
    strides = []
    for t in inputs:
        if t is None:
            continue
        if t.dtype not in KIND:
            return f"input of {t.dtype}; there are {', '.join(map(str, KIND))}"
        if t.ndim > x.ndim or any(n not in (1, m) for n, m in zip(t.shape[::-1], x.shape[::-1], strict=False)):
            return f"an operand of shape {tuple(t.shape)} does not broadcast to x's {tuple(x.shape)}"
        strides.append(tuple(map(int, broadcast_strides(t, x))))
    shape = tuple(map(int, x.shape))
    out = torch.empty(shape, device="meta").to(memory_format=output_format(x)).stride()
    return None if merged_axes(shape, out, *strides) else "strides that need more than four axes"


# -- rows ------------------------------------------------------------------------------------------------------------


def activate_quantize(x: Tensor, other: Tensor | None, gate: Tensor | None, activation: str, scalars: Sequence[float],
                      scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None) -> Tensor:  # fmt: skip
    """See ``graphwright.ops.lowered.activate_quantize``."""
    return pointwise(x, 1.0, 0, other, 1.0, 0, gate, activation, scalars, scale, zero_point, low, high, dtype)


def add_quantize(x: Tensor, x_scale: float, x_zero_point: int, other: Tensor, other_scale: float, other_zero_point: int,
                 activation: str, scalars: Sequence[float], scale: float, zero_point: int, low: int, high: int,
                 dtype: torch.dtype | None) -> Tensor:  # fmt: skip
    """See ``graphwright.ops.lowered.add_quantize``."""
    if x.is_floating_point():
        x_scale, x_zero_point = 1.0, 0
    if other.is_floating_point():
        other_scale, other_zero_point = 1.0, 0
    return pointwise(x, x_scale, x_zero_point, other, other_scale, other_zero_point, None, activation, scalars,
                     scale, zero_point, low, high, dtype)  # fmt: skip


def quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
    """See ``graphwright.ops.fused.quantize``."""
    return pointwise(x, 1.0, 0, None, 1.0, 0, None, "none", (), scale, zero_point, low, high, dtype)


def dequantize(q: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """See ``graphwright.ops.fused.dequantize``."""
    return pointwise(q, scale, zero_point, None, 1.0, 0, None, "none", (), 1.0, 0, 0, 0, dtype)


def _cost(inputs: Sequence[Tensor | None], x: Tensor, activation: str, dtype: torch.dtype | None) -> Cost:
    work = 2 * len([t for t in inputs if t is not None]) + ARITHMETIC.get(activation, 30)
    return Cost(pieces(*inputs) + x.numel() * (dtype or torch.float32).itemsize, x.numel() * work)


def _images(g: torch.Generator, *shape: int, last: bool = True) -> Tensor:
    x = 3 * torch.randn(*shape, generator=g)
    return x.to(memory_format=torch.channels_last) if last else x


def _activate_samples() -> Iterator[Sample]:
    grid8 = (0.021, 117, 0, 255, torch.uint8)
    floats = (1.0, 0, 0, 0, None)

    def rows(*shape: int, activation: str = "none", scalars: Sequence[float] = (), other: bool = False,
             gate: bool = False, out: Any = grid8, kind: Any = torch.float32) -> Any:  # fmt: skip
        def args(g: torch.Generator) -> tuple[Any, ...]:
            x, y, z = (2 * torch.randn(*shape, generator=g) for _ in range(3))
            return x.to(kind), y if other else None, z if gate else None, activation, list(scalars), *out

        return args

    yield Sample("1024x1536 gelu", rows(1024, 1536, activation="gelu"))
    yield Sample("1024x1536 silu * gate", rows(1024, 1536, activation="silu", gate=True, out=floats))
    yield Sample("1024x384", rows(1024, 384))
    yield Sample("1024x384 bf16 to float", rows(1024, 384, kind=torch.bfloat16, other=True, out=floats))

    def heads(g: torch.Generator) -> tuple[Any, ...]:
        return torch.randn(8, 12, 128, 32, generator=g).transpose(1, 2), None, None, "none", [], *grid8

    yield Sample("heads merged 8x128x12x32", heads)
    scalars = {"hardtanh": [-0.5, 1.25], "leaky_relu": [0.1], "elu": [0.7]}
    for name in CODE:
        yield Sample(f"13x1031 {name}", rows(13, 1031, activation=name, scalars=scalars.get(name, ()), out=floats), False)
    yield Sample("small tanh", lambda g: (1e-4 * torch.randn(1000, generator=g), None, None, "tanh", [], *floats), False)
    yield Sample("small elu", lambda g: (1e-4 * torch.randn(1000, generator=g), None, None, "elu", [1.0], *floats), False)
    yield Sample("image, channels_last", lambda g: (_images(g, 2, 19, 7, 5), None, None, "hardswish", [], *grid8), False)
    yield Sample("image to bfloat16", lambda g: (_images(g, 1, 3, 9, 11, last=False), None, None, "relu", [], 1.0, 0, 0, 0,
                                                 torch.bfloat16), False)  # fmt: skip
    yield Sample("bias over channels", lambda g: (
        _images(g, 2, 6, 5, 4), torch.randn(1, 6, 1, 1, generator=g), torch.randn(2, 6, 1, 1, generator=g), "sigmoid", [],
        *floats), False)  # fmt: skip
    yield Sample("every other column", lambda g: (torch.randn(9, 64, generator=g)[:, ::2], None, None, "relu", [],
                                                  0.02, 0, -128, 127, torch.int8), False)  # fmt: skip
    yield Sample("4-D, all axes permuted", lambda g: (torch.randn(3, 4, 5, 6, generator=g).permute(3, 1, 0, 2), None, None,
                                                      "none", [], *grid8), False)  # fmt: skip
    yield Sample("one number", lambda g: (torch.randn((), generator=g), None, None, "silu", [], *grid8), False)


def _add_samples() -> Iterator[Sample]:
    def bytes_(g: torch.Generator, *shape: int, kind: torch.dtype = torch.uint8) -> Tensor:
        low, high = (0, 256) if kind == torch.uint8 else (-128, 128)
        t = torch.randint(low, high, shape, generator=g).to(kind)
        return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t

    relu8 = ("relu", [], 0.05, 0, 0, 255, torch.uint8)
    yield Sample("1x256x56x56 u8 + u8", lambda g: (bytes_(g, 1, 256, 56, 56), 0.03, 120, bytes_(g, 1, 256, 56, 56), 0.02, 0,
                                                   *relu8))  # fmt: skip
    yield Sample("1024x384 u8 + f32", lambda g: (bytes_(g, 1024, 384), 0.03, 120, torch.randn(1024, 384, generator=g), 1.0, 0,
                                                 "none", [], 0.04, 128, 0, 255, torch.uint8))  # fmt: skip
    yield Sample("3x7x5x5 i8 + u8 to float", lambda g: (
        bytes_(g, 3, 7, 5, 5, kind=torch.int8), 0.03, -5, bytes_(g, 3, 7, 5, 5), 0.02, 3, "none", [], 1.0, 0, 0, 0, None),
        False)  # fmt: skip
    yield Sample("5x33 f32 + i8 row", lambda g: (torch.randn(5, 33, generator=g), 1.0, 0, bytes_(g, 33, kind=torch.int8),
                                                 0.02, 3, "gelu", [], 0.03, 0, -127, 127, torch.int8), False)  # fmt: skip


def _quantize_samples() -> Iterator[Sample]:
    def special(g: torch.Generator) -> tuple[Any, ...]:
        x = 40 * torch.randn(257, generator=g)
        x[:5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -0.0])
        return x, 0.11, 7, 0, 255, torch.uint8

    yield Sample("1x64x112x112", lambda g: (_images(g, 1, 64, 112, 112), 0.021, 117, 0, 255, torch.uint8))
    yield Sample("1x3x224x224 contiguous", lambda g: (_images(g, 1, 3, 224, 224, last=False), 0.02, 110, 0, 255, torch.uint8))
    yield Sample("NaN and infinities", special, False)
    yield Sample("0x7", lambda g: (torch.randn(0, 7, generator=g), 0.1, 0, -128, 127, torch.int8), False)


def _dequantize_samples() -> Iterator[Sample]:
    def bytes_(g: torch.Generator, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=g).to(torch.uint8)

    yield Sample("1024x1536", lambda g: (bytes_(g, 1024, 1536), 0.02, 100, torch.float32))
    yield Sample("5x7x11 i8", lambda g: (bytes_(g, 5, 7, 11).to(torch.int8), 0.02, -3, torch.float32), False)
    yield Sample("3x1030 to bfloat16", lambda g: (bytes_(g, 3, 1030), 0.02, 0, torch.bfloat16), False)


KERNELS = (
    Kernel(
        "graphwright.activate_quantize", "cpu", "llvm", activate_quantize,
        lambda x, other, gate, activation, scalars, scale, zero_point, low, high, dtype:
            unfit(x, (x, other, gate), activation, dtype),
        lambda x, other, gate, activation, scalars, scale, zero_point, low, high, dtype:
            _cost((x, other, gate), x, activation, dtype),
        _activate_samples,
    ),
    Kernel(
        "graphwright.add_quantize", "cpu", "llvm", add_quantize,
        lambda x, xs, xz, other, os, oz, activation, scalars, scale, zero_point, low, high, dtype:
            unfit(x, (x, other), activation, dtype),
        lambda x, xs, xz, other, os, oz, activation, scalars, scale, zero_point, low, high, dtype:
            _cost((x, other), x, activation, dtype),
        _add_samples,
    ),
    Kernel(
        "graphwright.quantize", "cpu", "llvm", quantize,
        lambda x, scale, zero_point, low, high, dtype:
            unfit(x, (x,), "none", dtype) or (None if dtype in (torch.uint8, torch.int8) and x.is_floating_point()
                                              else f"quantizing {x.dtype} to {dtype}; uint8 and int8 are supported"),
        lambda x, scale, zero_point, low, high, dtype: _cost((x,), x, "none", dtype),
        _quantize_samples,
    ),
    Kernel(
        "graphwright.dequantize", "cpu", "llvm", dequantize,
        lambda q, scale, zero_point, dtype:
            unfit(q, (q,), "none", dtype) or (None if q.dtype in (torch.uint8, torch.int8) and dtype.is_floating_point
                                              else f"dequantizing {q.dtype} to {dtype}"),
        lambda q, scale, zero_point, dtype: _cost((q,), q, "none", dtype),
        _dequantize_samples,
    ),
)  # fmt: skip
