"""Scaled dot product attention whose two products are made of int8 numbers, with scales found at run time.

    q8 = round(q / sq) per query;  k8 = round((k - mean(k)) / sk) per key;  v8 = round(v / sv) per column
    p8 = round(255 exp(s - max(s))),  s = q8 k8^T sq sk * scale + mask;  o = p8 v8 * sv / sum(p8)

``query`` [b, h, s, d], ``key`` [b, g, t, d], ``value`` [b, g, t, e], float32 views of any strides with adjacent elements in
the last axis (h a multiple of g); out [b, h, s, e] or merged [b, s, h * e], float32, uint8 or int8. Softmax does not see what
all keys of a head have in common, so their mean is taken off first: it would eat most of the 8 bits in many
models (SageAttention, Zhang et al. 2025, arXiv:2410.02367). Packing a head's keys and values, and all between the products,
stays in the L1 and L2 caches. Bound by arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.kernels import attention
from graphwright.kernels.common import GRID, grid
from graphwright.kernels.native import Native, openmp
from graphwright.kernels.softmax import MASK, apply_mask, mask_row, mask_slots
from graphwright.kernels.tile import (
    SHIFT,
    bits,
    call,
    device,
    f32,
    f64,
    from_bits,
    i32,
    i64,
    largest,
    real,
    share,
    store,
)
from graphwright.kernels.vector import (
    add,
    add_i,
    bits_of,
    both,
    either,
    floats,
    fma,
    larger,
    larger_i,
    load_f,
    load_i,
    most,
    most_i,
    mul,
    of_bits,
    power_of_two,
    prefetch,
    quantized,
    rounded,
    shifted,
    splat_f,
    splat_i,
    store_bytes,
    store_f,
    store_i,
    sub,
    sub_i,
    sum_i,
)  # fmt: skip
from graphwright.kernels.vnni import products, unfit

#: Queries that go through all steps together; a multiple of a tile's rows.
ROWS = 24
_ZERO, _ONE, _INFINITY, _ROWS = np.int64(0), np.int64(1), real(np.inf), np.int64(ROWS)


@device
def inverse_of(extent):
    """127 / x; 0 for numbers so small that only zeros are left."""
    return real(0) if extent < real(1e-30) else real(127) / extent


@device
def magnitude(x):
    """The bits without the sign: ordered as the magnitudes are, NaN above all."""
    return both(bits_of(x), splat_i(0x7FFFFFFF))


@device
def mean_of_rows(x, step, rows, n, to):
    """Mean of ``rows`` rows, each of ``n`` floats, ``step`` bytes apart."""
    factor = splat_f(real(1) / real(rows))
    for c in range(0, n, 16):
        sum_ = splat_f(real(0))
        for r in range(rows):
            sum_ = add(sum_, load_f(x + r * step + c * 4))
        store_f(mul(sum_, factor), to + c * 4)


@device
def pack_keys(key, step, rows, n, mean, line, packed, sums, scales):
    """Keys less their mean into the form that ``products`` takes; 128 times the sum of each key's integers, and its scale."""
    shifts, s, words, to, steps = i32(sums), f32(scales), i32(line), i32(packed), n // 4
    for r in range(rows):
        row, most_ = key + r * step, splat_i(0)
        for c in range(0, n, 16):
            most_ = larger_i(most_, magnitude(sub(load_f(row + c * 4), load_f(mean + c * 4))))
        extent = from_bits(most_i(most_))
        inverse, sum_ = splat_f(inverse_of(extent)), splat_i(0)
        for c in range(0, n, 16):
            x = rounded(mul(sub(load_f(row + c * 4), load_f(mean + c * 4)), inverse))
            sum_ = add_i(sum_, sub_i(x, splat_i(bits(SHIFT))))
            store_bytes(x, line + c)
        at = r // 16 * steps * 16 + r % 16
        for g in range(steps):
            to[at + g * 16] = words[g]
        shifts[r] = np.int32(sum_i(sum_) * np.int32(128))
        s[r] = extent * real(1 / 127)


@device
def whole(x, inverse):
    """``round(x * inverse)`` in the lowest byte, zeros above."""
    return both(rounded(mul(x, inverse)), splat_i(255))


@device
def pack_values(value, step, rows, n, zeros, line, packed, scales):
    """Values into the form that ``products`` takes, and each column's scale."""
    groups = (rows + 3) // 4
    for c in range(0, n, 16):
        most_ = splat_i(0)
        for r in range(rows):
            most_ = larger_i(most_, magnitude(load_f(value + r * step + c * 4)))
        store_i(most_, line)
        store_f(mul(of_bits(most_), splat_f(real(1 / 127))), scales + c * 4)
        for k in range(16):
            f32(line)[k] = inverse_of(from_bits(np.int32(i32(line)[k])))
        inverse = load_f(line)
        for g in range(groups):
            at, left = value + g * 4 * step + c * 4, rows - g * 4
            x0, x1 = whole(load_f(at), inverse), whole(load_f(at + step if left > 1 else zeros), inverse)
            x2 = whole(load_f(at + step * 2 if left > 2 else zeros), inverse)
            x3 = whole(load_f(at + step * 3 if left > 3 else zeros), inverse)
            low, high = either(x0, shifted(x1, splat_i(8))), either(x2, shifted(x3, splat_i(8)))
            store_i(either(low, shifted(high, splat_i(16))), packed + (c // 16 * groups + g) * 64)


@device
def round_query(row, n, to):
    """One query as uint8 with zero point 128; gives its scale."""
    most_ = splat_i(0)
    for c in range(0, n, 16):
        most_ = larger_i(most_, magnitude(load_f(row + c * 4)))
    extent = from_bits(most_i(most_))
    inverse = splat_f(inverse_of(extent))
    for c in range(0, n, 16):
        store_bytes(add_i(rounded(mul(load_f(row + c * 4), inverse)), splat_i(128)), to + c)
    return extent * real(1 / 127)


@device
def real_scores(row, n, shifts, scales, factor):
    """int32 products as float scores, in place, whole vectors; gives the largest."""
    f, top = splat_f(factor), splat_f(-_INFINITY)
    for j in range(0, n, 16):
        x = floats(sub_i(load_i(row + j * 4), load_i(shifts + j * 4)))
        x = mul(x, mul(load_f(scales + j * 4), f))
        store_f(x, row + j * 4)
        top = larger(top, x)
    return most(top)


@device
def masked_scores(row, n, shifts, scales, factor, mask):
    """The same plus a float mask of adjacent numbers; NaN where there is one among them."""
    f, top, peak = splat_f(factor), splat_f(-_INFINITY), splat_i(0)
    for j in range(0, n, 16):
        x = floats(sub_i(load_i(row + j * 4), load_i(shifts + j * 4)))
        x = fma(x, mul(load_f(scales + j * 4), f), load_f(mask + j * 4))
        store_f(x, row + j * 4)
        top, peak = larger(top, x), larger_i(peak, magnitude(x))
    return from_bits(most_i(peak)) if most_i(peak) > bits(_INFINITY) else most(top)


@device
def probabilities(row, n, top, to):
    """``round(255 exp(s - top))`` as uint8, whole vectors; gives their sum. ``top`` is finite."""
    if top < real(-1e30):  # nothing but the least float: as they are, their differences would overflow
        x = f32(row)
        for j in range(n):
            x[j] = x[j] - top
        top = real(0)
    shift, sum_ = splat_f(real(7.994353436858858) - top * real(1.4426950408889634)), splat_i(0)
    for j in range(0, n, 16):
        e = rounded(power_of_two(fma(load_f(row + j * 4), splat_f(real(1.4426950408889634)), shift)))
        store_bytes(e, to + j)
        sum_ = add_i(sum_, e)
    return np.int32(sum_i(sum_) - np.int32(n) * bits(SHIFT))  # modulo 2^32


@device
def store_values(row, n, scales, factor, kind, inverse, zero, low, high, to):
    """int32 sums as what the result is made of; ``n`` of them, the row whole vectors."""
    if kind != 0 and n % 16 == 0:
        f, point, low_, high_ = splat_f(factor * inverse), splat_f(real(zero)), splat_f(low), splat_f(high)
        for c in range(0, n, 16):
            x = mul(floats(load_i(row + c * 4)), mul(load_f(scales + c * 4), f))
            store_bytes(quantized(x, splat_f(real(1)), low_, high_, point), to + c)
    else:
        f = splat_f(factor)
        for c in range(0, n, 16):
            store_f(mul(floats(load_i(row + c * 4)), mul(load_f(scales + c * 4), f)), row + c * 4)
        store(kind, to, n, row, inverse, zero, low, high)


@device
def bring(rows, step, first, end, n):
    """Start to bring these rows, each of ``n`` floats."""
    for r in range(first, end):
        for c in range(0, n, 16):
            prefetch(rows + r * step + c * 4)


@device
def clear(to, n):
    """Zeros; ``n`` bytes, a multiple of 64."""
    for j in range(0, n, 64):
        store_i(splat_i(0), to + j)


_MASK_AT = np.int64(36)


def _attention_int8(params):  # device code
    """Slots: 2 pieces, 3 b h s t d e group, 10 rows per piece, 11 query (address, three strides), 15 key, 19 value, 23 out
    (address, kind, three strides), 28 scratch, 29 bytes of it per thread, 30 scale, 31 grid, 35 causal, 36 mask, 42 columns
    of the result. d and e are multiples of 16."""
    p, d = i64(params), f64(params)
    h, s, t, width, e, group = p[4], p[5], p[6], p[7], p[8], p[9]
    pieces, long = p[2], p[10]
    kind, inverse, low, high = p[24], real(d[31]), real(d[33]), real(d[34])
    me = call(p[0]) if p[0] != 0 else _ZERO
    keys_at, groups = (t + 15) // 16 * 16, (t + 3) // 4
    keys = p[28] + me * p[29]
    values = keys + keys_at * width
    scores = values + groups * 4 * e
    sums = scores + _ROWS * keys_at * 4
    scales = sums + keys_at * 4
    outs = scales + keys_at * 4
    value_scales = outs + _ROWS * e * 4
    zeros = value_scales + e * 4
    mean = zeros + e * 4
    line = mean + width * 4
    queries = line + width + 64
    factors = queries + _ROWS * width
    tops = factors + _ROWS * 4
    probs = tops + _ROWS * 4
    size = 4 if kind == 0 else 1
    packed = np.int64(-1)
    clear(zeros, e * 4)
    clear(keys, keys_at * width)
    clear(sums, keys_at * 8)
    first, end = share(params, p[3] * h * pieces)
    for task in range(first, end):
        piece, pair = task % pieces, task // pieces
        head, batch = pair % h, pair // h
        if batch * h + head // group != packed:
            packed = batch * h + head // group
            key = p[15] + (batch * p[16] + head // group * p[17]) * 4
            value = p[19] + (batch * p[20] + head // group * p[21]) * 4
            mean_of_rows(key, p[18] * 4, t, width, mean)
            pack_keys(key, p[18] * 4, t, width, mean, line, keys, sums, scales)
            pack_values(value, p[22] * 4, t, e, zeros, line, values, value_scales)
        last, after = min(s, (piece + 1) * long), task + 1
        for start in range(piece * long, last, _ROWS):
            n = min(_ROWS, last - start)
            if after < end:  # rows of one head lie far apart, where the processor itself looks ahead within a page only
                batch_, head_ = after // pieces // h, after // pieces % h
                bring(p[11] + (batch_ * p[12] + head_ * p[13]) * 4, p[14] * 4, start, start + n, width)
                bring(p[15] + (batch_ * p[16] + head_ // group * p[17]) * 4, p[18] * 4, min(start, t), min(start + n, t), width)
                bring(p[19] + (batch_ * p[20] + head_ // group * p[21]) * 4, p[22] * 4, min(start, t), min(start + n, t), e)
            query = p[11] + (batch * p[12] + head * p[13] + start * p[14]) * 4
            out = p[23] + (batch * p[25] + head * p[26] + start * p[27]) * size
            seen = min(t, start + n) if p[35] != 0 else t
            wide = (seen + 15) // 16 * 16  # whole vectors; what lies beyond a row's keys is -inf
            for i in range(n):
                f32(factors)[i] = round_query(query + i * p[14] * 4, width, queries + i * width) * real(d[30])
            products(queries, width, n, _ONE, _ZERO, keys, width * 16, wide // 16, width // 4, scores, keys_at * 4, keys, _ZERO, _ZERO)
            for i in range(n):  # apart from the next loop, whose first step would wait for this one's last at every row
                row, x = scores + i * keys_at * 4, f32(scores + i * keys_at * 4)
                m = min(seen, start + i + 1) if p[35] != 0 else seen
                mask = mask_row(params, _MASK_AT, batch, head, start + i) if p[36] != 0 else _ZERO
                if m % 16 == 0 and mask != 0 and p[37] == 0 and p[41] == 1:
                    top = masked_scores(row, m, sums, scales, f32(factors)[i], mask)
                else:
                    top = real_scores(row, m, sums, scales, f32(factors)[i])
                    if mask != 0:
                        apply_mask(row, m, mask, p[37], p[41])
                    if mask != 0 or m % 16 != 0:
                        top = largest(row, m)
                for j in range(m, wide):
                    x[j] = -_INFINITY
                f32(tops)[i] = top
            for i in range(n):
                to, top = probs + i * keys_at, f32(tops)[i]
                if top == -_INFINITY:
                    f32(factors)[i] = real(0)
                    clear(to, wide)
                else:
                    total = probabilities(scores + i * keys_at * 4, wide, top, to)
                    # NaN or infinity among queries, scores: NaN comes out of 0 times that
                    f32(factors)[i] = (real(1) + real(0) * top + real(0) * f32(factors)[i]) / real(total)
            products(probs, keys_at, n, _ONE, _ZERO, values, groups * 64, e // 16, (seen + 3) // 4, outs, e * 4, values, _ZERO, _ZERO)
            for i in range(n):
                store_values(outs + i * e * 4, p[42], value_scales, f32(factors)[i], kind, inverse, p[32], low, high, out + i * p[27] * size)


_NATIVE = Native(_attention_int8, "q" * 28 + "d" + GRID + "q" + MASK + "q")


def run(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention_scale: float | None, causal: bool,
    merge: bool, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """See ``graphwright.ops.lowered.attention_int8``."""
    b, h, s, d = query.shape
    t, e = value.shape[-2:]
    result, out, steps = attention.empty_result(query, e, merge, dtype)
    if not out.numel():
        return result
    if not t:
        return result.fill_(zero_point if dtype in (torch.uint8, torch.int8) else 0)
    query, key, value = (attention.adjacent(_whole_vectors(x)) for x in (query, key, value))
    wanted = torch.get_num_threads() if s * t * b * h > 16384 and openmp() is not None else 1
    pieces = min(-(-s // ROWS), -(-2 * wanted // (b * h)) if b * h < 4 * wanted and wanted > 1 else 1)
    long = -(-s // (pieces * ROWS)) * ROWS
    threads = min(wanted, b * h * pieces)
    width, columns = query.shape[3], value.shape[3]
    size = _scratch(t, width, columns)
    work = torch.empty(threads * size, dtype=torch.uint8)
    _NATIVE(
        threads, pieces, b, h, s, t, width, columns, h // key.shape[1], long,
        *attention.tensor_slots(query, key, value, out, steps), work.data_ptr(), size,
        d**-0.5 if attention_scale is None else attention_scale, *grid(scale, zero_point, low, high), causal,
        *mask_slots(mask, (b, h, s, t)), e,
    )  # fmt: skip
    return result


def _whole_vectors(x: Tensor) -> Tensor:
    """x, its rows padded with zeros to a multiple of 16 numbers."""
    return torch.nn.functional.pad(x, (0, -x.shape[3] % 16)) if x.shape[3] % 16 else x


def _scratch(t: int, d: int, e: int) -> int:
    """Bytes that one thread works in: the sum of what ``_attention_int8`` lays out."""
    keys, groups = -(-t // 16) * 16, -(-t // 4)
    shared = keys * d + groups * 4 * e + keys * 8 + e * 8 + d * 5 + 64
    return (shared + ROWS * (keys * 5 + e * 4 + d + 8) + 127) // 64 * 64


def supports(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention_scale: float | None, causal: bool,
    merge: bool, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None,
) -> str | None:  # fmt: skip
    return unfit() or attention.unfit(query, key, value, mask, dtype)


def cost(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention_scale: float | None, causal: bool,
    merge: bool, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype | None,
) -> Cost:  # fmt: skip
    return attention.cost(query, key, value, mask, attention_scale, causal, merge, scale, zero_point, low, high, dtype)


def samples() -> Iterator[Sample]:
    yield from attention.samples()

    def alike(g: torch.Generator) -> tuple[Any, ...]:
        """Keys that differ little beside what they have in common."""
        query, key, value = (torch.randn(2, 3, 33, 24, generator=g) for _ in range(3))
        return query, key * 0.1 + 8.0, value, None, None, False, True, 1.0, 0, 0, 0, None

    yield Sample("2x3x33x24, keys alike", alike, False)


# Where a float32 number lies next to a rounding boundary it may fall to the other side of it than the float64 one.
KERNEL = Kernel("graphwright.attention_int8", "cpu", "llvm", run, supports, cost, samples, tolerance=(2e-3, 1))
