"""Linear layers of 8-bit floats with everything around the product fused: rows to fp8 before it, scales, bias, residual, activation behind it.

    s[r] = max_k |x[r, k]| / 448;   x8 = fp8(x / s);   y = activation(x8 @ w8^T * s * w_scale + bias + other)

``x`` [*, K] float16, bfloat16 or float32, under a scale for each row or one for all; ``weight`` [N, K] float8_e4m3fn (NVIDIA since sm_89) or
float8_e4m3fnuz (gfx942; 240 in place of 448) with a scale per row; ``bias`` [N]; ``other`` [*, N]; y [*, N] float16, bfloat16 or float32.
A first launch (two under one scale: the largest of some thousand pieces, then all) makes x8 [M, K] and s [M]; a second one multiplies, a
program a BM x BN tile. Sums are the matrix unit's own, which on sm_90 keep about 14 bits while they add: far below what fp8 itself
leaves out. Bound by arithmetic; by memory (the weight, once) for few rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.kernel import Cost, Sample
from graphwright.kernels.gpu.int8_parts import FLOATS, WIDEST_ROW, Tail, aligned_weight, finish, finish_tile, flat
from graphwright.kernels.gpu.language import CODE, tile_of
from graphwright.kernels.gpu.launch import Config, Estimate, Family, Launch, Plan, bucket, cdiv, power_of_two

CONFIGS = (
    Config.of(BM=128, BN=256, BK=128, GROUP=8, PARTS=4, warps=8, stages=3),
    Config.of(BM=128, BN=128, BK=128, GROUP=8, PARTS=2, warps=8, stages=3),
    Config.of(BM=128, BN=128, BK=64, GROUP=8, PARTS=4, warps=4, stages=3),
    Config.of(BM=64, BN=128, BK=128, GROUP=8, PARTS=2, warps=4, stages=4),
    Config.of(BM=64, BN=64, BK=128, GROUP=8, PARTS=1, warps=4, stages=3),
    Config.of(BM=16, BN=64, BK=256, GROUP=4, PARTS=1, warps=4, stages=3),
    Config.of(BM=16, BN=32, BK=128, GROUP=4, PARTS=1, warps=4, stages=4),
)

#: Numbers of one piece, of which the largest is sought.
_PIECE = 8192
_BEHIND = Config.of(ROWS=4, BLOCK=512, warps=4, stages=1)


class Arguments(NamedTuple):
    """Those of ``graphwright.linear_fp8``, in order."""

    x: Tensor
    weight: Tensor
    weight_scales: Tensor
    bias: Tensor | None
    other: Tensor | None
    activation: str
    scalars: Sequence[float]
    by_row: bool
    kind: torch.dtype
    dtype: torch.dtype | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows of x, rows of the weight, the length of the sums: M, N, K."""
        out, width = self.weight.shape
        return self.x.numel() // max(width, 1), out, width


# -- rows to fp8 -------------------------------------------------------------------------------------------------------


@triton.jit
def largest_kernel(x, tops, count, columns, step, PIECE: tl.constexpr):
    """The largest magnitude of each piece of x [rows, columns]; infinity where it holds NaN."""
    at = tl.program_id(0).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    v = tl.load(x + at // columns * step + at % columns, at < count, other=0.0).to(tl.float32)
    tl.store(tops + tl.program_id(0), tl.max(tl.where(v == v, tl.abs(v), float("inf")), 0))


@triton.jit
def round_rows_fp8_kernel(x, q, scales, tops, pieces, columns, step, padded, MOST: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """A row of x as fp8, under its own scale, or (``tops``: the largest of each of the pieces of x) under that of all."""
    r, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + r.to(tl.int64) * step + c, c < columns, other=0.0).to(tl.float32)
    if tops is None:
        top = tl.max(tl.where(v == v, tl.abs(v), float("inf")), 0)
    else:
        each = tl.zeros((CHUNK,), tl.float32)
        for k in range(0, pieces, CHUNK):
            some = k + tl.arange(0, CHUNK)
            each = tl.maximum(each, tl.load(tops + some, some < pieces, other=0.0))
        top = tl.max(each, 0)
    scale = tl.div_rn(tl.where(top < float("inf"), top, float("nan")), MOST)
    scale = tl.where(scale <= 1.1754943508222875e-38, 1.0, scale)
    y = tl.div_rn(v, scale)
    y = tl.where(y == y, tl.minimum(tl.maximum(y, -MOST), MOST), 0.0)  # the scale is NaN already
    tl.store(q + r.to(tl.int64) * padded + c, y.to(q.dtype.element_ty), c < padded)
    tl.store(scales + r, scale)


def round_rows(x: Tensor, by_row: bool, kind: torch.dtype, padded: int) -> tuple[Tensor, Tensor, list[Launch]]:
    """Launches that make ``q [rows, padded]`` of this kind and ``scales [rows]`` of ``x [rows, columns]``, and where they put them."""
    rows, columns = x.shape
    q = torch.empty((rows, padded), dtype=kind, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    launches, tops, pieces = list[Launch](), None, cdiv(rows * columns, _PIECE)
    if not by_row:
        tops = torch.empty(pieces, dtype=torch.float32, device=x.device)
        launches.append(Launch(largest_kernel, (pieces,), (x, tops, rows * columns, columns, x.stride(0)), {"PIECE": _PIECE}, Config.of(warps=8, stages=1)))
    block = power_of_two(padded)
    launches.append(Launch(round_rows_fp8_kernel, (rows,), (x, q, scales, tops, pieces, columns, x.stride(0), padded),
                           {"MOST": torch.finfo(kind).max, "BLOCK": block, "CHUNK": 1024}, Config.of(warps=max(1, min(16, block // 1024)), stages=1)))  # fmt: skip
    return q, scales, launches


# -- the product -------------------------------------------------------------------------------------------------------


@triton.jit
def linear_fp8_kernel(
    x, w, rows, columns, width, x_step, w_step, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step,
    a, b, scale, zero_point, low, high,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, ACT: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    i, j = tile_of(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(columns, BN), GROUP)
    r, c, k = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows past the end are read from the beginning again: what comes of them is not stored.
    x += (r % rows).to(tl.int64)[:, None] * x_step + k[None, :]
    w += (c % columns).to(tl.int64)[:, None] * w_step + k[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for done in range(0, width, BK):
        if EVEN:
            u, v = tl.load(x), tl.load(w)
        else:
            u, v = tl.load(x, k[None, :] < width - done, other=0.0), tl.load(w, k[None, :] < width - done, other=0.0)
        acc = tl.dot(u, tl.trans(v), acc)
        x += BK
        w += BK
    finish_tile(acc, r, j * BN, rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step,
                a, b, scale, zero_point, low, high, ACT, 0, PARTS)  # fmt: skip


def plan(*args: Any, config: Config) -> Plan:
    a = Arguments(*args)
    rows, out, _ = a.sizes
    weight = aligned_weight(a.weight)
    width = weight.shape[1]
    q, scales, before = round_rows(flat(a.x), a.by_row, a.kind, width)
    tail = tail_of(a, scales)
    constants = {"ACT": CODE[a.activation], "EVEN": width % config["BK"] == 0}
    grid = (cdiv(rows, config["BM"]) * cdiv(out, config["BN"]),)
    given = (q, weight, rows, out, width, q.stride(0), weight.stride(0), *tail)
    return Plan(tail.y, (*before, Launch(linear_fp8_kernel, grid, given, constants, config)))


def tail_of(a: Arguments, scales: Tensor) -> Tail:
    """What stands behind the product, and where the result goes."""
    y = torch.empty((*a.x.shape[:-1], a.weight.shape[0]), dtype=a.dtype or torch.float32, device=a.x.device)
    other = None if a.other is None else flat(a.other)
    return Tail(y, 1.0, scales, 0, None, a.weight_scales.contiguous(), None, None if a.bias is None else a.bias.contiguous(), other,
                0 if other is None else other.stride(0), *map(float, (*a.scalars, 0.0, 0.0)[:2]), 1.0, 0, 0, 0)  # fmt: skip


@triton.jit
def behind_kernel(
    product, step, rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step, a, b, scale, zero_point, low, high,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """What stands behind a product that another library has made: product [rows, step] float32."""
    r, c = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    acc = tl.load(product + r.to(tl.int64)[:, None] * step + c[None, :], inside, other=0.0)
    finish(acc, r, c, rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step,
           a, b, scale, zero_point, low, high, ACT, 0)  # fmt: skip


def behind(product: Tensor, a: Arguments, tail: Tail) -> Launch:
    """The launch that makes the result of ``product [M, N or more]`` float32, without scales."""
    rows, out, _ = a.sizes
    grid = (cdiv(out, _BEHIND["BLOCK"]), cdiv(rows, _BEHIND["ROWS"]))
    return Launch(behind_kernel, grid, (product, product.stride(0), rows, out, *tail), {"ACT": CODE[a.activation]}, _BEHIND)


def unfit(*args: Any) -> str | None:
    """None, or why these arguments of ``graphwright.linear_fp8`` can't be served, whoever multiplies."""
    a = Arguments(*args)
    if a.x.dtype not in FLOATS or a.weight.dtype != a.kind:
        return f"x is {a.x.dtype}, the weight {a.weight.dtype}; wanted float16, bfloat16 or float32, and {a.kind}"
    if not a.x.ndim or a.weight.ndim != 2 or a.x.shape[-1] != a.weight.shape[1]:
        return f"shapes {tuple(a.x.shape)} and {tuple(a.weight.shape)} do not belong together"
    if not 0 < a.weight.shape[1] <= WIDEST_ROW:
        return f"{a.weight.shape[1]} inputs; 1 to {WIDEST_ROW} are supported"
    if a.activation not in CODE:
        return f"activation {a.activation!r} is not fused"
    if a.dtype not in (None, *FLOATS):
        return f"result of {a.dtype}; float32, float16 and bfloat16 are supported"
    out = a.weight.shape[0]
    for name, tensor, shape in (("weight_scales", a.weight_scales, (out,)), ("bias", a.bias, (out,)), ("other", a.other, (*a.x.shape[:-1], out))):
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype not in FLOATS):
            return f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; wanted {shape} of float16, bfloat16 or float32"
    return None


def supports(*args: Any) -> str | None:
    a = Arguments(*args)
    if a.kind != torch.float8_e4m3fn:
        return f"8-bit floats are {a.kind}; wanted torch.float8_e4m3fn"
    if a.x.is_cuda and (torch.version.hip is not None or torch.cuda.get_device_capability(a.x.device) < (8, 9)):
        return "the GPU has no matrix unit for float8_e4m3fn: NVIDIA's have it since sm_89"
    return unfit(*args)


def supports_fnuz(*args: Any) -> str | None:
    a = Arguments(*args)
    if a.kind != torch.float8_e4m3fnuz:
        return f"8-bit floats are {a.kind}; wanted torch.float8_e4m3fnuz"
    if a.x.is_cuda and torch.version.hip is None:
        return "the GPU has no matrix unit for float8_e4m3fnuz: gfx942 has"
    return unfit(*args)


def fits(config: Config, *args: Any) -> str | None:
    rows, out, width = Arguments(*args).sizes
    if config["BM"] > 16 and config["BM"] >= 2 * max(rows, 1) or config["BM"] == 16 and rows > 64:
        return f"{config['BM']} rows at a time do not suit {rows}"
    if config["BN"] > 64 and config["BN"] >= 2 * max(out, 1):
        return f"{config['BN']} columns at a time are too many for {out}"
    if config["BK"] > 128 and config["BK"] >= 2 * width:
        return f"sums of {config['BK']} at a time are too long for {width}"
    return None


def estimate(config: Config, *args: Any) -> Estimate:
    rows, out, width = Arguments(*args).sizes
    tall, wide, deep = cdiv(rows, config["BM"]), cdiv(out, config["BN"]), cdiv(width, config["BK"])
    ops = 2 * tall * config["BM"] * wide * config["BN"] * deep * config["BK"]
    moved = cost(*args).bytes + 2 * rows * width  # x as fp8 is written and read again
    read = tall * wide * deep * (config["BM"] + config["BN"]) * config["BK"]
    return Estimate(ops, "fp8", moved, read + moved, tall * wide, config.stages * (config["BM"] + config["BN"]) * config["BK"], deep)


def bucket_of(*args: Any) -> tuple[Any, ...]:
    """Rows in powers of two; all else that changes the code or its speed as it is."""
    a = Arguments(*args)
    rows, out, width = a.sizes
    return bucket(rows), out, width, a.x.dtype, a.dtype, a.by_row, a.other is not None, a.activation != "none"


def cost(*args: Any) -> Cost:
    """Each tensor once; a multiply-add counts two."""
    a = Arguments(*args)
    rows, out, width = a.sizes
    held = sum(t.numel() * t.element_size() for t in args if isinstance(t, Tensor))
    return Cost(held + rows * out * (a.dtype or torch.float32).itemsize, 2 * rows * out * width)


def matrix(config: Config, *args: Any) -> str:
    # Triton 3.6 to 3.9 turn small tiles of fp8 into half floats on sm_90: QGMMA begins at 64 rows.
    target = args[-1]
    return "v_mfma_f32" if target == "gfx942" else "QGMMA" if config["BM"] >= 64 else "MMA"


def make(
    name: str, rows: tuple[int, ...], width: int, out: int, *, x: torch.dtype = torch.bfloat16, by_row: bool = True, bias: torch.dtype | None = torch.float32,
    other: torch.dtype | None = None, activation: str = "none", dtype: torch.dtype | None = torch.bfloat16, kind: torch.dtype = torch.float8_e4m3fn,
    big: float = 1.0, strided: bool = False, bench: bool = False,
) -> Sample:  # fmt: skip
    """A sample of ``graphwright.linear_fp8``."""

    def args(g: torch.Generator) -> tuple[Any, ...]:
        given = (torch.randn(*rows, width * 2 if strided else width, generator=g) * big).to(x)[..., :: 2 if strided else 1]
        weight = (torch.randn(out, width, generator=g) * 40).to(kind)
        scales = (torch.rand(out, generator=g) + 0.5) / (40 * width**0.5)
        return (given, weight, scales, torch.randn(out, generator=g).to(bias) if bias else None,
                torch.randn(*rows, out, generator=g).to(other) if other else None, activation, (), by_row, kind, dtype)  # fmt: skip

    return Sample(name, args, bench)


def odd_samples(kind: torch.dtype) -> Iterator[Sample]:
    """Small ones: every form of input and result, sizes that fill no tile."""
    half, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
    yield make("3x32x16", (3,), 32, 16, kind=kind)
    yield make("1x1x1", (1,), 1, 1, x=f32, dtype=f32, kind=kind)
    yield make("2x9x70x33 gelu residual", (2, 9), 70, 33, other=bf16, activation="gelu", bias=bf16, kind=kind)
    yield make("one scale, no bias, float32", (20,), 130, 24, by_row=False, bias=None, x=f32, dtype=None, kind=kind)
    yield make("one scale of several pieces, half", (9,), 1000, 40, by_row=False, x=half, dtype=half, activation="silu", kind=kind)
    yield make("strided", (7,), 48, 16, strided=True, other=half, kind=kind)
    yield make("tiny numbers", (4,), 64, 16, x=f32, dtype=f32, big=1e-37, bias=None, kind=kind)
    yield make("huge numbers", (4,), 64, 16, x=f32, dtype=f32, big=1e30, kind=kind)
    yield make("zeros", (4,), 64, 16, big=0.0, kind=kind)
    yield make("empty", (0,), 32, 16, kind=kind)
    yield make("empty under one scale", (2, 0), 32, 16, by_row=False, kind=kind)
    yield make("70x144x140", (70,), 144, 140, activation="relu", kind=kind)


def samples() -> Iterator[Sample]:
    for shape in ((8192, 8192, 8192), (4096, 4096, 14336), (16, 8192, 8192), (64, 8192, 28672)):
        yield make("x".join(map(str, shape)), shape[:1], *shape[1:], bias=None, bench=True)
    yield make("4096x14336x4096 residual, one scale", (4096,), 14336, 4096, by_row=False, other=torch.bfloat16, bench=True)
    yield from odd_samples(torch.float8_e4m3fn)


def meta(rows: int, out: int, width: int, by_row: bool, kind: torch.dtype, dtype: torch.dtype, activation: str = "none") -> tuple[Any, ...]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    other = empty(rows, out, dtype=dtype) if activation != "none" else None
    return empty(rows, width, dtype=dtype), empty(out, width, dtype=kind), empty(out), empty(out), other, activation, (), by_row, kind, dtype


def _ahead(kind: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "4096 half, gelu, residual", meta(4096, 4096, 4096, True, kind, torch.float16, "gelu")
    yield "32 rows bf16, one scale", meta(32, 4096, 4096, False, kind, torch.bfloat16)


FAMILY = Family("graphwright.linear_fp8", plan, CONFIGS, supports, estimate, bucket_of, cost, samples, lambda: _ahead(torch.float8_e4m3fn), fits, matrix,
                targets=("sm_90",), tolerance=(3e-3, 1), precision="fp8")  # fmt: skip

FAMILIES = (
    replace(FAMILY, supports=supports_fnuz, samples=lambda: odd_samples(torch.float8_e4m3fnuz), ahead=lambda: _ahead(torch.float8_e4m3fnuz),
            targets=("gfx942",), name="linear_fp8_fnuz"),
)  # fmt: skip
