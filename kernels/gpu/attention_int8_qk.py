"""Attention with an int8 first product and a half-precision second one.

    q8 = round(q / sq) per row;  k8 = round((k - mean(k)) / sk) per 64 keys
    s = q8 k8^T sq sk * scale + mask;  p = exp(s - max(s));  o = p v / sum(p)

``query`` [b, h, s, d], ``key`` [b, g, t, d], ``value`` [b, g, t, e] float16, bfloat16 or float32 of any strides, d and e up to 128, h a
multiple of g; ``mask`` boolean or float, broadcast to [b, h, s, t]; gives [b, h, s, e] or merged [b, s, h * e], float, uint8 or int8.
Three launches: partial sums of the keys; queries and keys to int8, keys less their mean, which would eat most of the 8 bits in
many models (SageAttention, Zhang et al. 2025, arXiv:2410.02367); and one program per block of queries, which goes through
the keys 64 at a time and holds its sums in registers (FlashAttention-2, Dao 2023, arXiv:2307.08691). Exponents are taken to
base 2; since a block of keys has one scale, the largest score is found among the integers. The second product is fp16, bf16 or tf32 as
``value`` is, its sums float32. Bound by arithmetic: the first product takes half the time of the second, the exponentials about as
long as the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.kernel import Cost, Sample
from graphwright.kernels.common import pieces
from graphwright.kernels.gpu.attention_samples import make
from graphwright.kernels.gpu.language import to_int8, to_levels
from graphwright.kernels.gpu.launch import Config, Estimate, Family, Launch, Plan, bucket, cdiv, power_of_two
from graphwright.ops.smooth_attention import KEYS, LEAST

#: BM queries of a head go together.
CONFIGS = (
    Config.of(BM=16, warps=4, stages=2),
    Config.of(BM=64, warps=4, stages=2),
    Config.of(BM=64, warps=4, stages=3),
    Config.of(BM=64, warps=8, stages=2),
    Config.of(BM=128, warps=4, stages=2),
    Config.of(BM=128, warps=8, stages=3),
)

#: The two launches before are the same under every config.
BEFORE = Config.of(warps=4, stages=1)

#: Keys of one partial sum.
CHUNK = 512

#: The longest head.
WIDEST = 128

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_RESULTS = (None, *_FLOATS, torch.uint8, torch.int8)
_BLOCK = tl.constexpr(KEYS)
_CHUNK = tl.constexpr(CHUNK)
_LEAST = tl.constexpr(LEAST)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sum_keys_kernel(key, sums, groups, t, kb, kg, kt, kd, D: tl.constexpr, DP: tl.constexpr):
    """Sums over up to CHUNK keys: ``sums`` [b * g, chunks, DP] float32."""
    chunks = tl.cdiv(t, _CHUNK)
    head, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    d = tl.arange(0, DP)
    base = key + (head // groups).to(tl.int64) * kb + (head % groups).to(tl.int64) * kg
    total = tl.zeros((DP,), tl.float32)
    for start in range(0, _CHUNK, _BLOCK):
        n = chunk * _CHUNK + start + tl.arange(0, _BLOCK)
        k = tl.load(base + n.to(tl.int64)[:, None] * kt + d[None, :] * kd, (n < t)[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(k.to(tl.float32), 0)
    tl.store(sums + tl.program_id(0).to(tl.int64) * DP + d, total)


@triton.jit
def inverse_of(most):
    """127 / most; 0 for what counts as zeros, NaN for what is not finite."""
    inverse = tl.where(most < _LEAST, 0.0, 127.0 / most)
    return tl.where(most < float("inf"), inverse, float("nan"))


@triton.jit
def largest_of(x, axis: tl.constexpr):
    """The largest magnitude; NaN where there is one."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis).to(tl.float32, bitcast=True)


@triton.jit
def quantize_kernel(query, key, sums, q8, qs, k8, ks, heads, groups, s, t, padded, key_programs, factor,
                    qb, qh, qt, qd, kb, kg, kt, kd, D: tl.constexpr, DP: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """64 keys or 64 queries to int8. The scales of queries take in ``factor``, which goes with exponents to base 2."""
    d = tl.arange(0, DP)
    if tl.program_id(0) < key_programs:
        blocks, chunks = padded // _BLOCK, tl.cdiv(t, _CHUNK)
        head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
        mean = tl.zeros((DP,), tl.float32)
        for chunk in range(chunks):
            mean += tl.load(sums + (head * chunks + chunk).to(tl.int64) * DP + d)
        mean = mean / t
        n = block * _BLOCK + tl.arange(0, _BLOCK)
        base = key + (head // groups).to(tl.int64) * kb + (head % groups).to(tl.int64) * kg
        inside = (n < t)[:, None] & (d < D)[None, :]
        x = tl.load(base + n.to(tl.int64)[:, None] * kt + d[None, :] * kd, inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - mean[None, :], 0.0)
        most = largest_of(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True), 0)
        inverse = inverse_of(most)
        tl.store(k8 + (head.to(tl.int64) * padded + n)[:, None] * DP + d[None, :], to_int8(x * inverse, PTX))
        tl.store(ks + tl.program_id(0), tl.where(inverse > 0, most / 127, inverse))
    else:
        blocks = tl.cdiv(s, _BLOCK)
        program = tl.program_id(0) - key_programs
        head, n = program // blocks, program % blocks * _BLOCK + tl.arange(0, _BLOCK)
        base = query + (head // heads).to(tl.int64) * qb + (head % heads).to(tl.int64) * qh
        inside = (n < s)[:, None] & (d < D)[None, :]
        x = tl.load(base + n.to(tl.int64)[:, None] * qt + d[None, :] * qd, inside, other=0.0).to(tl.float32)
        tops = largest_of(x, 1)
        factors = inverse_of(tops)
        x = x * factors[:, None]
        at = head.to(tl.int64) * s + n
        tl.store(q8 + at[:, None] * DP + d[None, :], to_int8(tl.where(factor < 0, -x, x), PTX), (n < s)[:, None])
        tl.store(qs + at, tl.where(factors > 0, tops / 127 * tl.abs(factor), factors), n < s)


@triton.jit
def _values(rows_at, ve, E: tl.constexpr, EP: tl.constexpr):
    e = tl.arange(0, EP)[None, :]
    if E == EP:
        return tl.load(rows_at + e * ve)
    else:
        return tl.load(rows_at + e * ve, e < E, other=0.0)


@triton.jit
def _soft_dot(q, f, k_at, k_off, s_at, v_at, vt, ve, mask_at, lines, mt, rows, start, t, top, total, acc,
              E: tl.constexpr, EP: tl.constexpr, MASKED: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One block of keys: the largest score so far, the sum of exponentials and the result's sums after it."""
    x = tl.dot(q, tl.trans(tl.load(k_at + k_off)), out_dtype=tl.int32).to(tl.float32)
    c = f * tl.load(s_at)
    if MASKED:
        n = start + tl.arange(0, BN)
        inside = (n < t)[None, :]
        away = tl.where(inside, 0.0, float("-inf"))  # added: one number takes fewer registers than a condition
        if MASK == 1:
            away = tl.where(tl.load(mask_at + lines + (tl.arange(0, BN) * mt)[None, :], inside, other=0) != 0, away, float("-inf"))
        if MASK == 2:
            m = tl.load(mask_at + lines + (tl.arange(0, BN) * mt)[None, :], inside, other=0.0).to(tl.float32)
            lowest = tl.where(m == float("-inf"), float("-inf"), -1.5e38)  # the least float is no infinity
            m = m * _LOG2E
            away += tl.where(m < -1.5e38, lowest, m)
        x = x * c[:, None] + away
        if CAUSAL:
            x = tl.where(n[None, :] <= rows[:, None], x, float("-inf"))
        now = tl.maximum(top, tl.max(x, 1))
        zero = tl.where(now == float("-inf"), 0.0, now)
        p = tl.exp2(x - zero[:, None])
        # no key past the last one counts: the last stands for them
        v = _values(v_at + (tl.minimum(n, t - 1) - start)[:, None] * vt, ve, E, EP)
    else:
        now = tl.maximum(top, tl.max(x, 1) * c)
        zero = now
        p = tl.exp2(x * c[:, None] - zero[:, None])
        v = _values(v_at + tl.arange(0, BN)[:, None] * vt, ve, E, EP)
    shrink = tl.exp2(top - zero)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
    return now, total * shrink + tl.sum(p, 1), acc


@triton.jit
def attention_kernel(q8, qs, k8, ks, value, mask, out, heads, groups, s, t, padded, vb, vg, vt, ve, mb, mh, ms, mt, ob, oh, ot,
                     inverse, zero_point, low, high, BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
                     MASK: tl.constexpr, LINES: tl.constexpr, CAUSAL: tl.constexpr, QUANTIZE: tl.constexpr):  # fmt: skip
    """BM queries of one head. MASK: 0 none, 1 boolean, 2 float; LINES: it differs from query to query."""
    blocks = tl.cdiv(s, BM)
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the long ones first
    batch, h = (head // heads).to(tl.int64), head % heads
    group = h // (heads // groups)
    kept = batch * groups + group
    rows, n = block * BM + tl.arange(0, BM), tl.arange(0, BN)
    d, e = tl.arange(0, DP), tl.arange(0, EP)
    at = head.to(tl.int64) * s + rows
    q = tl.load(q8 + at[:, None] * DP + d[None, :], (rows < s)[:, None], other=0)
    f = tl.load(qs + at, rows < s, other=0.0)
    k_at, k_off = k8 + kept * padded * DP, n[:, None] * DP + d[None, :]
    s_at = ks + kept * (padded // BN)
    v_at = value + batch * vb + group.to(tl.int64) * vg
    lines = tl.zeros((1, 1), tl.int32)
    mask_at = mask
    if MASK > 0:
        mask_at = mask + batch * mb + h.to(tl.int64) * mh + (block * BM).to(tl.int64) * ms
        if LINES:
            lines = (tl.minimum(rows, s - 1) - block * BM)[:, None] * ms
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, EP), tl.float32)
    last = tl.minimum(t, (block + 1) * BM) if CAUSAL else t
    clear = 0
    if MASK == 0:
        clear = (tl.minimum(t, block * BM) if CAUSAL else t) // BN * BN
        for start in range(0, clear, BN):
            top, total, acc = _soft_dot(q, f, k_at, k_off, s_at, v_at, vt, ve, mask_at, lines, mt, rows, start, t, top, total, acc, E, EP, False, MASK, CAUSAL, BN)
            k_at, s_at, v_at = k_at + BN * DP, s_at + 1, v_at + BN * vt
    for start in range(clear, last, BN):
        top, total, acc = _soft_dot(q, f, k_at, k_off, s_at, v_at, vt, ve, mask_at, lines, mt, rows, start, t, top, total, acc, E, EP, True, MASK, CAUSAL, BN)
        k_at, s_at, v_at = k_at + BN * DP, s_at + 1, v_at + BN * vt
        if MASK > 0:
            mask_at += BN * mt
    y = acc * tl.where(total == 0, 0.0, 1.0 / total)[:, None]
    if QUANTIZE:
        y = to_levels(y, inverse, zero_point, low, high)
    to = out + batch * ob + h.to(tl.int64) * oh + rows.to(tl.int64)[:, None] * ot + e[None, :]
    tl.store(to, y.to(out.dtype.element_ty), (rows < s)[:, None] & (e < E)[None, :])


def plan(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention_scale: float | None, causal: bool, merge: bool,
         scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None, *, config: Config) -> Plan:  # fmt: skip
    (b, h, s, d), (g, t, e) = query.shape, value.shape[1:]
    out = query.new_empty((b, s, h * e) if merge else (b, h, s, e), dtype=dtype or torch.float32)
    steps = (s * h * e, e, h * e) if merge else (h * s * e, s * e, e)
    wide, padded, chunks = padded_to(d, 32), cdiv(t, KEYS) * KEYS, cdiv(t, CHUNK)
    sums = query.new_empty((b * g, chunks, wide), dtype=torch.float32)
    q8, k8 = query.new_empty((b * h, s, wide), dtype=torch.int8), query.new_empty((b * g, padded, wide), dtype=torch.int8)
    qs, ks = query.new_empty((b * h, s), dtype=torch.float32), query.new_empty((b * g, padded // KEYS), dtype=torch.float32)
    factor = (d**-0.5 if attention_scale is None else attention_scale) * 1.4426950408889634
    key_programs, whole = b * g * (padded // KEYS), {"D": d, "DP": wide}
    kind, masks, lines, mask = mask_of(mask, (b, h, s, t))
    points = (1.0, 0, 0, 0) if out.is_floating_point() else (1.0 / scale, zero_point, low, high)
    constants = {"BN": KEYS, "DP": wide, "E": e, "EP": padded_to(e, 16), "MASK": kind, "LINES": lines, "CAUSAL": bool(causal), "QUANTIZE": not out.is_floating_point()}
    launches = (
        Launch(sum_keys_kernel, (b * g * chunks,), (key, sums, g, t, *key.stride()), whole, BEFORE),
        Launch(quantize_kernel, (key_programs + b * h * cdiv(s, KEYS),),
               (query, key, sums, q8, qs, k8, ks, h, g, s, t, padded, key_programs, factor, *query.stride(), *key.stride()), whole, BEFORE),
        Launch(attention_kernel, (b * h * cdiv(s, config["BM"]),),
               (q8, qs, k8, ks, value, mask, out, h, g, s, t, padded, *value.stride(), *masks, *steps, *points), constants, config),
    )  # fmt: skip
    return Plan(out, launches)


def padded_to(width: int, least: int) -> int:
    return max(power_of_two(width), least)


def mask_of(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...], bool, Tensor | None]:
    """Its kind, its strides, whether it differs from query to query, and the numbers themselves."""
    if mask is None:
        return 0, (0, 0, 0, 0), False, None
    kind = 1 if mask.dtype == torch.bool else 2
    mask = (mask.view(torch.uint8) if kind == 1 else mask).expand(shape)
    return kind, mask.stride(), mask.stride(2) != 0, mask


def supports(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention_scale: float | None, causal: bool, merge: bool,
             scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None) -> str | None:  # fmt: skip
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype not in _FLOATS or x.ndim != 4:
            return f"{name} is {x.dtype} with {x.ndim} axes; wanted float16, bfloat16 or float32 with 4"
        if not 0 < x.shape[3] <= WIDEST:
            return f"{name} has heads of {x.shape[3]} numbers; 1 to {WIDEST} are supported"
    (b, h, s, d), (g, t) = query.shape, value.shape[1:3]
    if key.shape != (b, g, t, d) or value.shape[0] != b or not g or h % g:
        return f"shapes {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)} do not belong together"
    if mask is not None:
        if mask.dtype not in (torch.bool, *_FLOATS):
            return f"mask is {mask.dtype}; wanted bool, float16, bfloat16 or float32"
        if mask.ndim > 4 or any(n not in (1, m) for n, m in zip(mask.shape[::-1], (t, s, h, b), strict=False)):
            return f"mask of shape {tuple(mask.shape)} does not broadcast to {(b, h, s, t)}"
    if dtype not in _RESULTS:
        return f"result of {dtype}; there are {', '.join(map(str, _RESULTS[1:]))}"
    if dtype in (torch.uint8, torch.int8) and max(abs(v) for v in (zero_point, low, high)) > 255:
        return f"a grid from {low} to {high} around {zero_point}; bounds up to 255 are supported"
    return None


def fits(config: Config, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *rest: Any) -> str | None:
    s, bm = query.shape[2], config["BM"]
    if (s > 32) == (bm == 16):
        return f"blocks of {bm} queries do not suit {s}"
    if bm == 128 and s <= 64:
        return "64 queries fill a block"
    wide = value.dtype == torch.float32
    if bm == 64 and (config.warps == 8) != wide or wide and bm == 128:
        return "float32 values take two groups of warps to 64 queries, others one"
    if bm == 128 and config.warps == 4 and padded_to(value.shape[3], 16) == 128:
        return "the result takes too many registers"
    return None


def matrix(config: Config, *rest: Any) -> str:
    target = rest[-1]
    if target == "gfx942":
        return "v_mfma_i32"
    return "IGMMA" if target == "sm_90" and config["BM"] >= 64 else "IMMA"


def pairs_of(query: Tensor, value: Tensor, causal: bool) -> int:
    """Pairs of a query and a key that it sees."""
    (b, h, s, _), t = query.shape, value.shape[2]
    seen = min(s, t)
    return b * h * (seen * (seen + 1) // 2 + (s - seen) * t if causal else s * t)


def cost(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention_scale: float | None, causal: bool, merge: bool,
         scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None) -> Cost:  # fmt: skip
    out = query.numel() // query.shape[3] * value.shape[3] * (dtype or torch.float32).itemsize
    return Cost(pieces(query, key, value, mask) + out, pairs_of(query, value, causal) * 2 * (query.shape[3] + value.shape[3]))


def estimate(config: Config, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention_scale: float | None, causal: bool, *rest: Any) -> Estimate:
    (b, h, s, d), (t, e) = query.shape, value.shape[2:]
    wide, broad, bm = padded_to(d, 32), padded_to(e, 16), config["BM"]
    least = cost(query, key, value, mask, attention_scale, causal, *rest)
    programs = b * h * cdiv(s, bm)
    pairs = pairs_of(query, value, causal) * cdiv(s, bm) * bm // max(s, 1)
    keys = wide + broad * value.element_size()
    between = 2 * (b * h * s + key.numel() // d) * wide
    # The second product runs at half the rate of the first (at a quarter in tf32), exponentials and the like cost about as much as 128 columns.
    ops = pairs * 2 * (wide + broad * value.element_size() + 128)
    return Estimate(ops, "int8", least.bytes + between, programs * (t * keys // (2 if causal else 1) + bm * wide), programs,
                    bm * wide + config.stages * KEYS * keys, cdiv(t, KEYS))  # fmt: skip


def _bucket(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention_scale: float | None, causal: bool, *rest: Any) -> tuple[Any, ...]:
    (b, h, s, d), (t, e) = query.shape, value.shape[2:]
    kinds = None if mask is None else (mask.dtype == torch.bool, mask.ndim > 1 and mask.shape[-2] > 1)
    return bucket(b * h), bucket(s), bucket(t), d, e, str(value.dtype), kinds, bool(causal), str(rest[-1])


def samples() -> Iterator[Sample]:
    bf16, f32, u8 = torch.bfloat16, torch.float32, torch.uint8
    yield make("1x8x8192x128", 1, 8, 8192, 8192, 128, bench=True)
    yield make("1x32x4096x128 causal, 8 groups", 1, 32, 4096, 4096, 128, groups=8, causal=True, kind=bf16, dtype=bf16, merge=True, bench=True)
    yield make("16x12x512x64 key mask", 16, 12, 512, 512, 64, mask="keys", laid="merged", merge=True, bench=True)
    yield make("1x2x70x70x64 causal", 1, 2, 70, 70, 64, causal=True)
    yield make("2x4x33x130x32 groups, merged", 2, 4, 33, 130, 32, groups=2, merge=True, laid="merged")
    yield make("1x2x65x64x96 bf16 key mask", 1, 2, 65, 64, 96, kind=bf16, dtype=bf16, mask="keys")
    yield make("1x1x100x70x128 bool mask, float32", 1, 1, 100, 70, 128, kind=f32, dtype=None, mask="bool")
    yield make("2x2x35x35x20x24 float mask to u8", 2, 2, 35, 35, 20, 24, kind=f32, dtype=u8, mask="float", laid="odd")
    yield make("1x2x3x600x40 few queries", 1, 2, 3, 600, 40, dtype=f32)
    yield make("1x1x1x1x1", 1, 1, 1, 1, 1, kind=f32, dtype=f32)
    yield make("1x2x129x65x64 causal, more queries", 1, 2, 129, 65, 64, causal=True, kind=bf16, dtype=f32)
    yield make("1x2x20x90x48 causal, fewer queries", 1, 2, 20, 90, 48, causal=True, mask="least", kind=f32, dtype=f32)
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

    half, bf16 = torch.float16, torch.bfloat16
    none = (1.0, 0, 0, 0)
    yield "128 bfloat16 causal groups", (heads(32, 4096, 128, bf16), *(heads(8, 4096, 128, bf16) for _ in range(2)), None, None, True, True, *none, bf16)
    keys = torch.empty(2, 1, 1, 512, dtype=torch.bool, device="meta")
    yield "64 float16 key mask to uint8", (*(heads(12, 512, 64, half) for _ in range(3)), keys, None, False, True, 0.02, 120, 0, 255, torch.uint8)
    lines = torch.empty(512, 500, device="meta")
    yield "96 float32 mask", (heads(4, 512, 96, torch.float32), *(heads(4, 500, 96, torch.float32) for _ in range(2)), lines, None, False, True, *none, None)
    yield "128 float16 few", (heads(8, 16, 128, half), *(heads(8, 4096, 128, half) for _ in range(2)), None, None, False, False, *none, half)


# Probabilities are rounded to the 8 or 11 bits of the values' dtype; queries and keys near a rounding boundary may fall to either side.
FAMILY = Family("graphwright.attention_int8_qk", plan, CONFIGS, supports, estimate, _bucket, cost, samples, ahead, fits, matrix, tolerance=(3e-3, 1))
