"""Linear layers of int8 numbers with everything behind the product fused: for many rows, by programs that stay.

The math and the tensors are those of ``linear_int8``. As many programs as the GPU has processors go through all tiles, so that
one's end and the next one's beginning overlap, and tiles come through tensor descriptors: on sm_90 by the copy engine (TMA), which
takes the addressing and the edges off the threads; on sm_80 the compiler makes ordinary loads of them. On gfx942 the loop of loops that
this becomes has too few registers: ``linear_int8`` serves there. Bound by arithmetic.

On sm_90 Triton 3.6 to 3.9 leave a product in flight into the next turn of a loop only where its sums are float32 (a rule of the compiler): int8's
are waited for in the turn that begins them (``wgmma.wait_group 0``; fp8 in the same loop: 1). Tried, on all of 3.6.0, 3.7.1 and 3.9.0, read
from the intermediate code, PTX and SASS: pointers and descriptors, 2 to 4 stages, both operands in shared memory and the left one in registers,
two tiles of sums side by side, two turns in one, ``loop_unroll_factor=2``, ``disallow_acc_multi_buffer``, ``warp_specialize``, and the product
transposed; none differs. Nor does the compiler know int8 instructions wider than 64 x 128. For a tile of 128 x 256 and 128 deep that means, of
1024 clocks of products in a turn, by reckoning, not by measurement:

    about 70 more of waiting (an instruction's latency and a barrier, assumed): 93 %
    shared memory moves 1024 * 96 bytes for the instructions and 48 KB of new tiles, at 128 bytes a clock: 89 %
    132 processors want 48 bytes a clock each of the L2 cache, which gives some 5120 to all together: 81 %

so that 60 to 75 % of the peak is what to expect. What helps is two programs on a processor, one multiplying while the other waits: tiles of
128 x 128 with 4 warps here (EACH=2), and with 8 warps in ``linear_int8``, at twice the reading. The tuner decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.kernel import Sample
from graphwright.kernels.gpu import int8_parts, interpreting, machine
from graphwright.kernels.gpu.int8_parts import (
    Arguments,
    bucket_of,
    cost,
    finish_tile,
    make,
    meta,
    moved,
    odd_samples,
    prologue,
)
from graphwright.kernels.gpu.language import tile_of
from graphwright.kernels.gpu.launch import Config, Estimate, Family, Launch, Plan, cdiv

CONFIGS = (
    Config.of(BM=128, BN=256, BK=128, GROUP=8, PARTS=4, EACH=1, warps=8, stages=4),
    Config.of(BM=128, BN=128, BK=128, GROUP=8, PARTS=2, EACH=2, warps=8, stages=3),
    Config.of(BM=128, BN=128, BK=128, GROUP=8, PARTS=4, EACH=2, warps=4, stages=3),
    Config.of(BM=64, BN=128, BK=128, GROUP=8, PARTS=2, EACH=2, warps=4, stages=4),
    Config.of(BM=64, BN=64, BK=128, GROUP=4, PARTS=1, EACH=4, warps=4, stages=2),
)


@triton.jit
def linear_int8_persistent_kernel(
    x, w, rows, columns, width, x_step, w_step, y, x_scale, x_scales, point, points, scales, sums, bias, other, other_step,
    a, b, inverse, zero_point, low, high,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    of_x = tl.make_tensor_descriptor(x, [rows, width], [x_step, 1], [BM, BK])
    of_w = tl.make_tensor_descriptor(w, [columns, width], [w_step, 1], [BN, BK])
    tall, wide = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    for tile in tl.range(tl.program_id(0), tall * wide, tl.num_programs(0), flatten=True):
        i, j = tile_of(tile, tall, wide, GROUP)
        acc = tl.zeros((BM, BN), tl.int32)
        for k in range(0, width, BK):
            u, v = of_x.load([i * BM, k]), of_w.load([j * BN, k])
            if SHIFT:
                u = u ^ -128
            acc = tl.dot(u, tl.trans(v), acc, out_dtype=tl.int32)
        finish_tile(acc, i * BM + tl.arange(0, BM), j * BN, rows, columns, y, x_scale, x_scales, point, points, scales, sums, bias,
                    other, other_step, a, b, inverse, zero_point, low, high, ACT, SHIFT, PARTS)  # fmt: skip


def plan(*args: Any, config: Config) -> Plan:
    a = Arguments(*args)
    rows, out, _ = a.sizes
    x, weight, tail, constants, before = prologue(a)
    programs = min(cdiv(rows, config["BM"]) * cdiv(out, config["BN"]), config["EACH"] * _processors(x))
    given = (x, weight, rows, out, weight.shape[1], x.stride(0), weight.stride(0), *tail)
    return Plan(tail.y, (*before, Launch(linear_int8_persistent_kernel, (programs,), given, constants, config, scratch=True)))


def _processors(x: Tensor) -> int:
    """So few in the interpreter that a program gets several tiles; as many as an H100 has where nothing runs."""
    found = machine.here() if x.is_cuda else None
    return found.processors if found is not None else 1 if interpreting() else 132


def supports(*args: Any) -> str | None:
    if torch.version.hip is not None and args[0].is_cuda:
        return "the GPU is not NVIDIA's; linear_int8 serves there"
    return int8_parts.supports(*args)


def fits(config: Config, *args: Any) -> str | None:
    rows, out, _ = Arguments(*args).sizes
    if config["BM"] > 64 and config["BM"] >= 2 * max(rows, 1):
        return f"{config['BM']} rows at a time are too many for {rows}"
    if config["BN"] > 64 and config["BN"] >= 2 * max(out, 1):
        return f"{config['BN']} columns at a time are too many for {out}"
    return None


def estimate(config: Config, *args: Any) -> Estimate:
    rows, out, width = Arguments(*args).sizes
    tall, wide, deep = cdiv(rows, config["BM"]), cdiv(out, config["BN"]), cdiv(width, config["BK"])
    ops = 2 * tall * config["BM"] * wide * config["BN"] * deep * config["BK"]
    read = tall * wide * deep * (config["BM"] + config["BN"]) * config["BK"]
    found = machine.here()
    programs = max(1, min(tall * wide, config["EACH"] * (132 if found is None else found.processors)))
    shared = config.stages * (config["BM"] + config["BN"]) * config["BK"]
    return Estimate(ops, "int8", moved(args), read + moved(args), programs, shared, deep * cdiv(tall * wide, programs))


def matrix(config: Config, *args: Any) -> str:
    target = args[-1]
    return "v_mfma_i32" if target == "gfx942" else "IGMMA" if target == "sm_90" else "IMMA"


def samples() -> Iterator[Sample]:
    yield make("4096x4096x4096", (4096,), 4096, 4096, bench=True)
    yield make("8192x8192x8192 bf16", (8192,), 8192, 8192, bias=None, dtype=torch.bfloat16, bench=True)
    yield make("4096x4096x14336 silu", (4096,), 4096, 14336, activation="silu", bias=None, bench=True)
    yield make("4096x3072x768 residual uint8", (32, 128), 3072, 768, x=torch.uint8, per_row="", other=torch.float16, bench=True)
    yield from odd_samples()
    yield make("140x130x200", (140,), 130, 200, activation="relu")


def ahead() -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "4096 half", meta(4096, 4096, 4096, torch.int8, torch.float16)
    yield "bert relu uint8 to uint8", meta(4096, 3072, 768, torch.uint8, torch.uint8, "relu")


FAMILY = Family("graphwright.linear_int8", plan, CONFIGS, supports, estimate, bucket_of, cost, samples, ahead, fits, matrix,
                targets=("sm_80", "sm_90"), name="linear_int8_persistent")  # fmt: skip
