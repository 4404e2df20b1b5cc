"""Attention with an int8 first product and a half-precision second one: for few queries, as when a decoder makes one token after the other.

The math and the tensors are those of ``attention_int8_qk``. All the work here is to read keys and values: the queries of all heads that
share a head of keys (at most 128) stand in one tile, so that keys and values are read once for all of them; and SPLIT programs share
the keys of a head, each with a run of whole blocks of 64 (FlashDecoding's cut: Dao et al. 2023). Three launches:

    sums[head, c]           of 128 keys each
    for each run: m = max s;  l = sum exp2(s - m);  a = sum exp2(s - m) v        tops, totals [b * g, SPLIT, rows], parts [.., rows, e] float32
    o = sum exp2(m - max m) a / sum exp2(m - max m) l                            over the runs, always in the same order: results repeat

Keys become int8 on their way from memory to the matrix unit and are never written back; they are read a second time after their mean is known,
from the L2 cache where they fit. Bound by memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.kernel import Sample
from graphwright.kernels.common import pieces
from graphwright.kernels.gpu import attention_int8_qk
from graphwright.kernels.gpu.attention_int8_qk import cost, inverse_of, largest_of, mask_of, padded_to
from graphwright.kernels.gpu.attention_samples import make
from graphwright.kernels.gpu.language import to_int8, to_levels
from graphwright.kernels.gpu.launch import Config, Estimate, Family, Launch, Plan, bucket, cdiv
from graphwright.ops.smooth_attention import KEYS

#: BM rows (a query of a head each) go together; SPLIT programs share the keys.
CONFIGS = (
    Config.of(BM=16, SPLIT=4, warps=4, stages=2),
    Config.of(BM=16, SPLIT=16, warps=4, stages=3),
    Config.of(BM=16, SPLIT=64, warps=4, stages=2),
    Config.of(BM=32, SPLIT=16, warps=4, stages=2),
    Config.of(BM=64, SPLIT=8, warps=8, stages=2),
    Config.of(BM=64, SPLIT=32, warps=8, stages=2),
)

#: The most rows to a head of keys.
MOST = 128

#: Keys of one partial sum, and how many sums are added at a time.
CHUNK, SUMS = 128, 16

_AROUND = Config.of(warps=4, stages=1)
_BLOCK = tl.constexpr(KEYS)
_CHUNK = tl.constexpr(CHUNK)
_SUMS = tl.constexpr(SUMS)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sum_keys_few_kernel(key, sums, groups, t, kb, kg, kt, kd, D: tl.constexpr, DP: tl.constexpr):
    """Sums over CHUNK keys: ``sums`` [b * g, chunks, DP] float32."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    d, n = tl.arange(0, DP), chunk * _CHUNK + tl.arange(0, _CHUNK)
    base = key + (head // groups).to(tl.int64) * kb + (head % groups).to(tl.int64) * kg
    k = tl.load(base + n.to(tl.int64)[:, None] * kt + d[None, :] * kd, (n < t)[:, None] & (d < D)[None, :], other=0.0)
    tl.store(sums + (head * tl.num_programs(0) + chunk).to(tl.int64) * DP + d, tl.sum(k.to(tl.float32), 0))


@triton.jit
def attend_few_kernel(query, key, value, mask, sums, tops, totals, parts, heads, groups, s, t, seen, piece, factor, qb, qh, qt, qd,
                      kb, kg, kt, kd, vb, vg, vt, ve, mb, mh, ms, mt, BM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr,
                      EP: tl.constexpr, MASK: tl.constexpr, LINES: tl.constexpr, CAUSAL: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """One run of keys of one head of keys. Row p is query ``p % s`` of the head's ``p // s``-th head of queries."""
    part, tile, kept = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    share = heads // groups
    batch, group = (kept // groups).to(tl.int64), kept % groups
    p, d, e, n = tile * BM + tl.arange(0, BM), tl.arange(0, DP), tl.arange(0, EP), tl.arange(0, _BLOCK)
    here, h, i = p < share * s, group * share + p // s, p % s
    at = query + batch * qb + h.to(tl.int64)[:, None] * qh + i.to(tl.int64)[:, None] * qt + d[None, :] * qd
    x = tl.load(at, here[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    most = largest_of(x, 1)
    inverse = inverse_of(most)
    x = x * inverse[:, None]
    q = to_int8(tl.where(factor < 0, -x, x), PTX)
    f = tl.where(inverse > 0, most / 127 * tl.abs(factor), inverse)

    chunks = tl.cdiv(t, _CHUNK)
    mean = tl.zeros((DP,), tl.float32)
    for first in range(0, chunks, _SUMS):
        c = first + tl.arange(0, _SUMS)
        mean += tl.sum(tl.load(sums + (kept * chunks + c).to(tl.int64)[:, None] * DP + d[None, :], (c < chunks)[:, None], other=0.0), 0)
    mean = mean / t

    begin = part * piece
    k_at = key + batch * kb + group.to(tl.int64) * kg + (begin + n).to(tl.int64)[:, None] * kt + d[None, :] * kd
    v_at = value + batch * vb + group.to(tl.int64) * vg + (begin + n).to(tl.int64)[:, None] * vt + e[None, :] * ve
    mask_at = mask
    if MASK > 0:
        mask_at = mask + batch * mb + (h.to(tl.int64) * mh)[:, None] + (begin + n).to(tl.int64)[None, :] * mt
        if LINES:
            mask_at += (i.to(tl.int64) * ms)[:, None]
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, EP), tl.float32)
    for start in range(begin, min(begin + piece, seen), _BLOCK):
        there = start + n < t
        inside = there[:, None] & (d < D)[None, :]
        k = tl.load(k_at, inside, other=0.0).to(tl.float32)
        k = tl.where(inside, k - mean[None, :], 0.0)
        largest = largest_of(tl.max(k.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True), 0)
        upon = inverse_of(largest)
        k8 = to_int8(k * upon, PTX)
        y = tl.dot(q, tl.trans(k8), out_dtype=tl.int32).to(tl.float32) * (f * tl.where(upon > 0, largest / 127, upon))[:, None]
        y = tl.where(there[None, :], y, float("-inf"))
        if MASK == 1:
            y = tl.where(tl.load(mask_at, here[:, None] & there[None, :], other=0) != 0, y, float("-inf"))
        if MASK == 2:
            m = tl.load(mask_at, here[:, None] & there[None, :], other=0.0).to(tl.float32)
            lowest = tl.where(m == float("-inf"), float("-inf"), -1.5e38)  # the least float is no infinity
            m = m * _LOG2E
            y += tl.where(m < -1.5e38, lowest, m)
        if CAUSAL:
            y = tl.where((start + n)[None, :] <= i[:, None], y, float("-inf"))
        now = tl.maximum(top, tl.max(y, 1))
        zero = tl.where(now == float("-inf"), 0.0, now)
        w = tl.exp2(y - zero[:, None])
        v = tl.load(v_at, there[:, None] & (e < E)[None, :], other=0.0)
        shrink = tl.exp2(top - zero)
        acc = tl.dot(w.to(v.dtype), v, acc * shrink[:, None])
        total = total * shrink + tl.sum(w, 1)
        top = now
        k_at, v_at = k_at + _BLOCK * kt, v_at + _BLOCK * vt
        if MASK > 0:
            mask_at += _BLOCK * mt
    to = (kept * tl.num_programs(0) + part).to(tl.int64) * (share * s) + p
    tl.store(tops + to, top, here)
    tl.store(totals + to, total, here)
    tl.store(parts + to[:, None] * EP + e[None, :], acc, here[:, None])


@triton.jit
def join_runs_kernel(tops, totals, parts, out, heads, groups, s, ob, oh, ot, inverse, zero_point, low, high,
                     E: tl.constexpr, EP: tl.constexpr, SPLIT: tl.constexpr, QUANTIZE: tl.constexpr):  # fmt: skip
    """One row of the result from all runs of its keys."""
    p, kept = tl.program_id(0), tl.program_id(1)
    share = heads // groups
    part, e = tl.arange(0, SPLIT), tl.arange(0, EP)
    at = (kept * SPLIT + part).to(tl.int64) * (share * s) + p
    top = tl.load(tops + at)
    largest = tl.max(top, 0)
    weight = tl.exp2(top - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weight * tl.load(totals + at), 0)
    y = tl.sum(weight[:, None] * tl.load(parts + at[:, None] * EP + e[None, :]), 0)
    y = y * tl.where(total == 0, 0.0, 1.0 / total)
    if QUANTIZE:
        y = to_levels(y, inverse, zero_point, low, high)
    h = kept % groups * share + p // s
    to = out + (kept // groups).to(tl.int64) * ob + h.to(tl.int64) * oh + (p % s).to(tl.int64) * ot + e
    tl.store(to, y.to(out.dtype.element_ty), e < E)


def plan(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention_scale: float | None, causal: bool, merge: bool,
         scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None, *, config: Config) -> Plan:  # fmt: skip
    (b, h, s, d), (g, t, e) = query.shape, value.shape[1:]
    out = query.new_empty((b, s, h * e) if merge else (b, h, s, e), dtype=dtype or torch.float32)
    steps = (s * h * e, e, h * e) if merge else (h * s * e, s * e, e)
    rows, split, wide, broad, seen = h // g * s, config["SPLIT"], padded_to(d, 32), padded_to(e, 16), min(s, t) if causal else t
    chunks = cdiv(t, CHUNK)
    sums = query.new_empty((b * g, chunks, wide), dtype=torch.float32)
    tops, totals = (query.new_empty((b * g, split, rows), dtype=torch.float32) for _ in range(2))
    parts = query.new_empty((b * g, split, rows, broad), dtype=torch.float32)
    kind, masks, lines, mask = mask_of(mask, (b, h, s, t))
    points = (1.0, 0, 0, 0) if out.is_floating_point() else (1.0 / scale, zero_point, low, high)
    factor = (d**-0.5 if attention_scale is None else attention_scale) * 1.4426950408889634
    whole, broadly = {"D": d, "DP": wide}, {"E": e, "EP": broad}
    return Plan(out, (
        Launch(sum_keys_few_kernel, (chunks, b * g), (key, sums, g, t, *key.stride()), whole, _AROUND),
        Launch(attend_few_kernel, (split, cdiv(rows, config["BM"]), b * g),
               (query, key, value, mask, sums, tops, totals, parts, h, g, s, t, seen, cdiv(cdiv(seen, KEYS), split) * KEYS, factor,
                *query.stride(), *key.stride(), *value.stride(), *masks),
               {**whole, **broadly, "MASK": kind, "LINES": lines, "CAUSAL": bool(causal)}, config),
        Launch(join_runs_kernel, (rows, b * g), (tops, totals, parts, out, h, g, s, *steps, *points),
               {**broadly, "SPLIT": split, "QUANTIZE": not out.is_floating_point()}, _AROUND),
    ))  # fmt: skip


def supports(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> str | None:
    if (reason := attention_int8_qk.supports(query, key, value, *rest)) is not None:
        return reason
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    return None if rows <= MOST else f"{rows} queries to a head of keys; up to {MOST} are supported"


def fits(config: Config, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, causal: bool, *rest: Any) -> str | None:
    rows, t = query.shape[1] // key.shape[1] * query.shape[2], min(query.shape[2], key.shape[2]) if causal else key.shape[2]
    if config["BM"] > 16 and config["BM"] >= 2 * rows or config["BM"] < 64 and rows > 2 * config["BM"]:
        return f"tiles of {config['BM']} rows do not suit {rows}"
    if config["SPLIT"] > 8 and config["SPLIT"] * KEYS > t:
        return f"{t} keys are too few for {config['SPLIT']} programs"
    return None


def matrix(config: Config, *args: Any) -> str:
    target = args[-1]
    return "v_mfma_i32" if target == "gfx942" else "IGMMA" if target == "sm_90" and config["BM"] >= 64 else "IMMA"


def estimate(config: Config, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, causal: bool, *rest: Any) -> Estimate:
    (b, h, s, d), (g, t, e) = query.shape, value.shape[1:]
    wide, broad, rows, split = padded_to(d, 32), padded_to(e, 16), h // g * s, config["SPLIT"]
    tiles, seen, keys = cdiv(rows, config["BM"]), min(s, t) if causal else t, pieces(key)
    once = cost(query, key, value, mask, scale, causal, *rest).bytes
    again = 0 if keys < 2**25 else keys  # keys come from the L2 cache the second time, where they fit
    joined = 8 * b * g * rows * split * (broad + 2)
    ops = b * g * tiles * config["BM"] * seen * 2 * (wide + broad * value.element_size() + 128)
    means = b * g * tiles * split * cdiv(t, CHUNK) * wide * 4
    shared = (config.stages * (wide * key.element_size() + broad * value.element_size()) + wide) * KEYS
    return Estimate(ops, "int8", once + again, once + keys * tiles + joined + means, b * g * split * tiles, shared, cdiv(cdiv(seen, KEYS), split) + 6)


def bucket_of(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, causal: bool, *rest: Any) -> tuple[Any, ...]:
    (b, h, s, d), (g, t, e) = query.shape, value.shape[1:]
    kinds = None if mask is None else (mask.dtype == torch.bool, mask.ndim > 1 and mask.shape[-2] > 1)
    return bucket(b * g), bucket(h // g * s), bucket(t), d, e, str(value.dtype), kinds, bool(causal), str(rest[-1])


def samples() -> Iterator[Sample]:
    bf16, f32, u8 = torch.bfloat16, torch.float32, torch.uint8
    yield make("1x32x1x8192x128, 8 groups", 1, 32, 1, 8192, 128, groups=8, merge=True, bench=True)
    yield make("16x32x1x8192x128, 8 groups, key mask", 16, 32, 1, 8192, 128, groups=8, mask="keys", kind=bf16, dtype=bf16, merge=True, bench=True)
    yield make("1x32x16x8192x128", 1, 32, 16, 8192, 128, bench=True)
    yield make("8x32x1x2048x64, 8 groups", 8, 32, 1, 2048, 64, groups=8, merge=True, bench=True)
    yield make("2x4x5x200x32, 2 groups, merged", 2, 4, 5, 200, 32, groups=2, merge=True, laid="merged")
    yield make("1x8x1x1100x128, 2 groups", 1, 8, 1, 1100, 128, groups=2, merge=True)
    yield make("1x2x1x4100x32, 1 group", 1, 2, 1, 4100, 32, groups=1, dtype=f32)
    yield make("2x2x1x257x64 bf16 key mask", 2, 2, 1, 257, 64, kind=bf16, dtype=bf16, mask="keys")
    yield make("1x4x7x70x128 bool mask, float32", 1, 4, 7, 70, 128, groups=1, kind=f32, dtype=None, mask="bool")
    yield make("1x2x35x135x20x24 float mask to u8", 1, 2, 35, 135, 20, 24, kind=f32, dtype=u8, mask="float", laid="odd")
    yield make("1x2x3x600x40", 1, 2, 3, 600, 40, dtype=f32)
    yield make("1x1x1x1x1", 1, 1, 1, 1, 1, kind=f32, dtype=f32)
    yield make("1x2x40x50x64 causal", 1, 2, 40, 50, 64, causal=True, kind=bf16, dtype=f32)
    yield make("1x4x20x90x48 causal, least", 1, 4, 20, 90, 48, groups=2, causal=True, mask="least", kind=f32, dtype=f32)
    yield make("1x2x20x66x16 infinite mask", 1, 2, 20, 66, 16, mask="infinite", merge=True)
    yield make("1x2x18x66x16 negative scale", 1, 2, 18, 66, 16, factor=-0.3, dtype=torch.int8)
    yield make("no keys", 1, 2, 5, 0, 16)
    yield make("no queries", 1, 2, 0, 5, 16)

    def odd(g: torch.Generator) -> tuple[Any, ...]:
        query, key, value = (torch.randn(1, 3, 40, 32, generator=g) for _ in range(3))
        query[0, 0, 3, 5], query[0, 0, 7], key[0, 1] = torch.nan, 0.0, 2.0
        key[0, 2, 4, 4] = torch.inf
        return query, key, value, None, None, False, False, 1.0, 0, 0, 0, None

    yield Sample("NaN, infinity, equal keys", odd, False)


def ahead() -> Iterator[tuple[str, tuple[Any, ...]]]:
    def heads(h: int, rows: int, width: int, kind: torch.dtype) -> Tensor:
        return torch.empty(2, rows, h, width, dtype=kind, device="meta").transpose(1, 2)

    half, bf16, none = torch.float16, torch.bfloat16, (1.0, 0, 0, 0)
    keys = torch.empty(2, 1, 1, 8192, dtype=torch.bool, device="meta")
    yield "128 bfloat16 groups, key mask", (heads(32, 1, 128, bf16), *(heads(8, 8192, 128, bf16) for _ in range(2)), keys, None, False, True, *none, bf16)
    yield "64 float16, 32 rows", (heads(8, 16, 64, half), *(heads(4, 8192, 64, half) for _ in range(2)), None, None, False, False, *none, half)
    yield "96 float32, 80 rows", (heads(8, 20, 96, torch.float32), *(heads(2, 4000, 96, torch.float32) for _ in range(2)), None, None, False, True, *none, None)


FAMILY = Family("graphwright.attention_int8_qk", plan, CONFIGS, supports, estimate, bucket_of, cost, samples, ahead, fits, matrix, tolerance=(3e-3, 1),
                name="attention_int8_qk_few")  # fmt: skip
