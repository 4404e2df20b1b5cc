"""Scaled dot product attention, one block of queries at a time, whose scores never leave the L2 cache.

    o = softmax(q k^T * scale + mask) v;   q8 = clamp(round(o / s) + zero_point, low, high)

``query`` [b, h, s, d], ``key`` [b, g, t, d], ``value`` [b, g, t, e], float32 views of any strides with adjacent elements in
the last axis (the three slices of a merged projection need no copy; h a multiple of g); out [b, h, s, e] or merged
[b, s, h * e], float32, uint8 or int8. The two products per block call PyTorch's own ``sgemm``, on one thread each inside
the kernel's parallel region; the softmax lies between them. Bound by arithmetic.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.kernels.common import GRID, grid, not_cpu, pieces
from graphwright.kernels.language import FLOAT32, INT64, VOID, intrinsic, ir
from graphwright.kernels.native import Native, openmp, unavailable
from graphwright.kernels.softmax import (
    MASK,
    apply_mask,
    exponentials,
    fill,
    mask_row,
    mask_slots,
    mask_unfit,
    scale_into,
)  # fmt: skip
from graphwright.kernels.tile import KIND, call, f32, f64, i64, largest, real, share, store, total

#: Floats of scores per block and thread: 256 KiB, a quarter to an eighth of an L2 cache.
BLOCK = 65536
_ZERO, _ONE, _INFINITY = np.int64(0), np.int64(1), real(np.inf)

@intrinsic(VOID, *[INT64] * 5, FLOAT32, *[INT64] * 6)
def gemm(at, function, transposed, m, n, k, alpha, a, lda, b, ldb, c, ldc):
    """Fortran's ``sgemm``: ``c = alpha * op(a) @ b``, columns adjacent; ``op`` transposes where ``transposed`` is not 0."""
    char, integer, number = ir.IntType(8), ir.IntType(32), ir.FloatType()

    def by_address(value, kind):
        with at.goto_entry_block():
            slot = at.alloca(kind)
        at.store(value, slot)
        return slot

    def whole(value):
        return by_address(at.trunc(value, integer), integer)

    letter = at.select(at.icmp_signed("!=", transposed, transposed.type(0)), char(ord("T")), char(ord("N")))
    pointers = [
        by_address(letter, char), by_address(char(ord("N")), char), whole(m), whole(n), whole(k),
        by_address(alpha, number), at.inttoptr(a, number.as_pointer()), whole(lda),
        at.inttoptr(b, number.as_pointer()), whole(ldb), by_address(number(0.0), number),
        at.inttoptr(c, number.as_pointer()), whole(ldc),
    ]  # fmt: skip
    kind = ir.FunctionType(ir.VoidType(), [p.type for p in pointers])
    at.call(at.inttoptr(function, kind.as_pointer()), pointers)


@functools.cache
def sgemm() -> int:
    """Address of PyTorch's ``sgemm_`` (MKL, OpenBLAS), or 0 where it has none with that name."""
    try:
        library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
        return ctypes.cast(library.sgemm_, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


_MASK_AT = np.int64(36)


def _attention(params):  # device code
    """Slots: 2 sgemm, 3 b h s t d e group, 10 block, 11 query (address, three strides), 15 key, 19 value, 23 out (address,
    kind, three strides), 28 scratch, 29 floats of it per thread, 30 scale, 31 grid, 35 causal, 36 mask."""
    p, d = i64(params), f64(params)
    h, s, t, width, e, group, block = p[4], p[5], p[6], p[7], p[8], p[9], p[10]
    kind, inverse, low, high = p[24], real(d[31]), real(d[33]), real(d[34])
    me = call(p[0]) if p[0] != 0 else _ZERO
    scores = p[28] + me * p[29] * 4
    floats = scores + block * t * 4
    factors = f32(floats + block * e * 4)
    size = 4 if kind == 0 else 1
    blocks = (s + block - 1) // block
    first, end = share(params, p[3] * h * blocks)
    for task in range(first, end):
        start = task % blocks * block
        n = min(block, s - start)
        head, batch = task // blocks % h, task // blocks // h
        query = p[11] + (batch * p[12] + head * p[13] + start * p[14]) * 4
        key = p[15] + (batch * p[16] + head // group * p[17]) * 4
        value = p[19] + (batch * p[20] + head // group * p[21]) * 4
        out = p[23] + (batch * p[25] + head * p[26] + start * p[27]) * size
        seen = min(t, start + n) if p[35] != 0 else t  # keys after the block's last query are not even multiplied
        gemm(p[2], _ONE, seen, n, width, real(d[30]), key, p[18], query, p[14], scores, t)
        for i in range(n):
            row = scores + i * t * 4
            m = min(seen, start + i + 1) if p[35] != 0 else seen
            if p[36] != 0:
                apply_mask(row, m, mask_row(params, _MASK_AT, batch, head, start + i), p[37], p[41])
            top = largest(row, m)
            if top == -_INFINITY and total(row, m) == -_INFINITY:  # all masked out, and no NaN among them
                fill(row, _ZERO, seen, real(0))
                factors[i] = real(0)
            else:
                factors[i] = real(1) / exponentials(row, m, top)
                fill(row, m, seen, real(0))
        gemm(p[2], _ZERO, e, n, seen, real(1), value, p[22], scores, t, floats, e)
        for i in range(n):
            row = floats + i * e * 4
            to = out + i * p[27] * size
            if kind == 0:
                scale_into(row, e, factors[i], to)
            else:
                store(kind, to, e, row, inverse * factors[i], p[32], low, high)


_NATIVE = Native(_attention, "q" * 28 + "d" + GRID + "q" + MASK)


def run(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention_scale: float | None, causal: bool,
    merge: bool, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """See ``graphwright.ops.lowered.attention``."""
    b, h, s, d = query.shape
    t, e = value.shape[-2:]
    result, out, steps = empty_result(query, e, merge, dtype)
    if not out.numel():
        return result
    if not t:
        return result.fill_(zero_point if dtype in (torch.uint8, torch.int8) else 0)
    query, key, value = adjacent(query), adjacent(key), adjacent(value)
    threads = min(torch.get_num_threads(), b * h) if s * t * b * h > 16384 and openmp() is not None else 1
    block = max(1, min(s, BLOCK // t, -(-s * b * h // threads)))
    floats = block * (t + e + 1) + 16
    work = torch.empty(threads * floats)
    _NATIVE(
        threads, sgemm(), b, h, s, t, d, e, h // key.shape[1], block,
        *tensor_slots(query, key, value, out, steps), work.data_ptr(), floats,
        d**-0.5 if attention_scale is None else attention_scale, *grid(scale, zero_point, low, high), causal,
        *mask_slots(mask, (b, h, s, t)),
    )  # fmt: skip
    return result


def empty_result(query: Tensor, e: int, merge: bool, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """A new tensor for the result, the same with four axes, and that one's steps between batches, heads and queries."""
    b, h, s, _ = query.shape
    out = torch.empty((b, s, h, e) if merge else (b, h, s, e), dtype=dtype or torch.float32)
    heads = out.transpose(1, 2) if merge else out
    return (out.view(b, s, h * e) if merge else out), out, heads.stride()[:3]


def tensor_slots(query: Tensor, key: Tensor, value: Tensor, out: Tensor, steps: Sequence[int]) -> tuple[int, ...]:
    """Address and three strides of each, the kind of ``out`` behind its address."""
    read = (n for x in (query, key, value) for n in (x.data_ptr(), *x.stride()[:3]))
    return *read, out.data_ptr(), KIND[out.dtype], *steps


def adjacent(x: Tensor) -> Tensor:
    """x, or a copy where sgemm cannot walk through it: elements of a row adjacent, rows apart by a row at least."""
    step = x.stride()
    return x if step[3] == 1 and step[2] >= max(1, x.shape[3]) else x.contiguous()


def supports(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention_scale: float | None, causal: bool,
    merge: bool, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None,
) -> str | None:  # fmt: skip
    if (reason := unavailable()) is not None:
        return reason
    return unfit(query, key, value, mask, dtype) if sgemm() else "this build of PyTorch exports no sgemm_"


def unfit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dtype: torch.dtype | None) -> str | None:
    """None, or why tensors such as these can't be served."""
    if (reason := not_cpu(query, key, value, mask)) is not None:
        return reason
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype != torch.float32 or x.ndim != 4:
            return f"{name} is {x.dtype} with {x.ndim} axes, wanted float32 with 4"
    b, h, s, d = query.shape
    if key.shape[:3] != value.shape[:3] or key.shape[0] != b or key.shape[3] != d or not key.shape[1] or h % key.shape[1]:
        return f"shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)} do not belong together"
    if key.shape[2] > BLOCK:
        return f"{key.shape[2]} keys; up to {BLOCK} are supported"
    if dtype not in (None, torch.float32, torch.uint8, torch.int8):
        return f"result of {dtype}; float32, uint8 and int8 are supported"
    return mask_unfit(mask, (b, h, s, key.shape[2]))


def cost(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention_scale: float | None, causal: bool,
    merge: bool, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None,
) -> Cost:  # fmt: skip
    b, h, s, d = query.shape
    t, e = value.shape[-2:]
    out = b * h * s * e * (dtype or torch.float32).itemsize
    return Cost(pieces(query, key, value, mask) + out, b * h * s * t * (2 * d + 2 * e + 12) // (2 if causal else 1))


def samples() -> Iterator[Sample]:
    def make(name: str, b: int, h: int, s: int, d: int, *, t: int | None = None, e: int | None = None, groups: int | None = None,
             mask: Any = None, causal: bool = False, merge: bool = True, factor: float | None = None,
             dtype: Any = None, fused: bool = False, bench: bool = False) -> Sample:  # fmt: skip
        def args(g: torch.Generator) -> tuple[Any, ...]:
            def heads(n: int, rows: int, width: int) -> Tensor:
                return torch.randn(b, rows, n, width, generator=g).transpose(1, 2)

            if fused:
                query, key, value = torch.randn(b, s, 3, h, d, generator=g).permute(2, 0, 3, 1, 4)
            else:
                n, rows = groups or h, t or s
                query, key, value = heads(h, s, d), heads(n, rows, d), heads(n, rows, e or d)
            points = (0.02, 128, 0, 255) if dtype == torch.uint8 else (0.02, 0, -127, 127)
            return query, key, value, None if mask is None else mask(g), factor, causal, merge, *points, dtype

        return Sample(name, args, bench)

    def padding(*shape: int) -> Any:
        return lambda g: torch.where(torch.rand(*shape, generator=g) < 0.3, torch.finfo(torch.float32).min, 0.0)

    yield make("8x12x128x32 padded", 8, 12, 128, 32, mask=padding(8, 1, 1, 128), bench=True)
    yield make("8x12x128x32 to u8", 8, 12, 128, 32, dtype=torch.uint8, fused=True, bench=True)
    yield make("1x12x128x64", 1, 12, 128, 64, bench=True)
    yield make("1x6x197x64", 1, 6, 197, 64, fused=True, bench=True)
    yield make("1x8x1024x64 causal", 1, 8, 1024, 64, causal=True, merge=False, bench=True)
    yield make("2x3x7x5, 9 keys of 11", 2, 3, 7, 5, t=9, e=11, merge=False, factor=0.3)
    yield make("2x6x9x8, 2 key heads", 2, 6, 9, 8, groups=2, causal=True, dtype=torch.int8)
    yield make("1x2x5x4 empty rows", 1, 2, 5, 4, mask=lambda g: (torch.arange(5) > 1)[:, None])
    yield make("1x1x1x1", 1, 1, 1, 1)
    yield make("1x2x70x16, 3000 keys", 1, 2, 70, 16, t=3000, mask=padding(1, 1, 70, 3000))


KERNEL = Kernel("graphwright.attention", "cpu", "llvm", run, supports, cost, samples)
