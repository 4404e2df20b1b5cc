# ruff: noqa: FURB136  min() and max() treat NaN otherwise than the conditional expressions here do
"""Linear layers of 8-bit floats: on CUDA by PyTorch's own product, ``torch._scaled_mm``, with what stands before and behind it around it.

    s[r] = max_k |x[r, k]| / 448;   x8 = fp8(x / s);   y = activation(x8 @ w8^T * s * w_scale + bias + other)

``x`` [*, K] float16, bfloat16 or float32; ``weight`` [N, K] float8_e4m3fn with a scale per row; y [*, N]. On CUDA (sm_89 and later) cuBLASLt
multiplies, and our Triton kernels make x8 in one pass before it and do all the rest in one pass over its float32 sums behind it; a plain
product in bfloat16 under a scale for each row needs no second pass. No x86 before AMX-FP8 multiplies 8-bit floats: on the CPU one pass rounds
x to what x8 s stands for, and the weight, packed ahead as that of ``linear_w8_groups`` is, becomes floats where it is multiplied. A byte
shifted into a float16 is the number over 256, subnormals included. Bound by memory up to about a dozen rows (a quarter of the bytes of float32),
by arithmetic beyond.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.kernels.activations import CODE
from graphwright.kernels.common import address, not_cpu, rows_of
from graphwright.kernels.grouped import Packed, pack_bytes
from graphwright.kernels.grouped import pack as pack_groups
from graphwright.kernels.language import INT8, INT64, ir
from graphwright.kernels.linear_w8_groups import columns
from graphwright.kernels.native import Native, threads_for
from graphwright.kernels.scalar import magnitude
from graphwright.kernels.tile import apart, bits, device, f32, from_bits, i32, i64, real, share
from graphwright.kernels.vector import LANES, F
from graphwright.kernels.vnni import unfit

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)

#: ``torch._scaled_mm`` takes sizes that are multiples of this.
STEP = 16


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """``x`` with bytes of zeros up to this size; x itself where it has it."""
    if x.shape == (rows, columns) and x.stride(1) == 1 and x.stride(0) % STEP == 0:
        return x
    return pad(x.contiguous().view(torch.uint8), (0, columns - x.shape[1], 0, rows - x.shape[0])).contiguous().view(x.dtype)


def _up(n: int) -> int:
    return -(-n // STEP) * STEP


# -- CPU -----------------------------------------------------------------------------------------------------------------


#: The smallest number of e4m3 of full precision, its largest, and what rounds smaller ones to steps of 2^-9 when it is added and taken away.
_NORMAL, _MOST, _STEPS = 2.0**-6, 448.0, 1.5 * 2.0**14
_TINY = float(np.finfo(np.float32).tiny)
_POSITIVE, _ROUND, _KEPT, _LAST = np.int32(0x7FFFFFFF), np.int32(0x7FFFF), np.int32(-(1 << 20)), np.int32(1)


@device
def _largest(x, n):
    """The largest magnitude of ``n`` floats; as integers infinity and NaN are above all others."""
    apart()
    a, best = i32(x), np.int32(0)
    for i in range(n):
        key = np.int32(a[i] & _POSITIVE)
        best = key if key > best else best
    return from_bits(best)


@device
def _scale_of(most):
    """What e4m3 has to be multiplied by where this is the largest magnitude: NaN where that is no number."""
    scale = most / real(_MOST)
    scale = scale if scale > real(_TINY) else real(1)
    return scale + (most - most)


@device
def _round_row(x, n, scale, to):
    """``n`` floats as what they stand for in e4m3 under a scale."""
    apart()
    a, out = f32(x), f32(to)
    for i in range(n):
        v = a[i] / scale
        size = magnitude(v)
        size = real(_MOST) if size > real(_MOST) else size
        key = bits(size)
        key = np.int32((np.int32(key + _ROUND) + (np.int32(key >> 20) & _LAST)) & _KEPT)
        size = from_bits(key) if size >= real(_NORMAL) else (size + real(_STEPS)) - real(_STEPS)
        out[i] = (size if v >= real(0) else -size) * scale


def _rounded(params):  # device code
    """Slots: 2 x, 3 its row in bytes, 4 rows, 5 columns, 6 to, 7 0 or the largest magnitude of all, a float32."""
    p = i64(params)
    first, end = share(params, p[4])
    for r in range(first, end):
        x, most = p[2] + r * p[3], real(0)
        if p[7] != 0:
            most = f32(p[7])[0]
        else:
            most = _largest(x, p[5])
        _round_row(x, p[5], _scale_of(most), p[6] + r * p[5] * 4)


_ROUNDED = Native(_rounded, "q" * 6)


def _column(at: Any, block: Any, line: Any) -> Any:
    """One input of 16 channels, from e4m3 ``[inputs, 16]``, as floats: each over 256."""
    narrow, half = ir.VectorType(INT8.llvm, LANES), ir.VectorType(ir.IntType(16), LANES)
    b = at.zext(at.load(at.inttoptr(at.add(block, at.mul(line, INT64.llvm(LANES))), narrow.as_pointer()), align=1), half)
    sign, rest = (ir.Constant(half, [n] * LANES) for n in (0x80, 0x7F))
    word = at.or_(at.shl(at.and_(b, sign), ir.Constant(half, [8] * LANES)), at.shl(at.and_(b, rest), ir.Constant(half, [7] * LANES)))
    return at.fpext(at.bitcast(word, ir.VectorType(ir.HalfType(), LANES)), F.llvm)


_KIND = columns("linear_fp8", _column)
_SIMPLE, _SMOOTH = _KIND.simple, _KIND.smooth  # under these names they are found and compiled ahead
_MANY_SIMPLE, _MANY_SMOOTH, _BESIDE = _KIND.many.natives


def pack(weight: Tensor, weight_scales: Tensor, bias: Tensor | None) -> Packed:
    """Pack ``weight [o, i]`` float8_e4m3fn with ``weight_scales`` and ``bias`` [o]. A channel with a NaN has nothing else."""
    scales = weight_scales.detach().float() * 256
    scales = torch.where(weight.detach().float().isnan().any(1), torch.nan, scales)
    return pack_groups(pack_bytes(weight.detach().contiguous().view(torch.int8)), weight.shape[1], weight.shape[1], scales[:, None], 0.0, bias)


def apply_cpu(x: Tensor, packed: Packed, other: Tensor | None, activation: str, scalars: Any, by_row: bool, dtype: torch.dtype | None) -> Tensor:
    """``run_cpu`` with a weight packed ahead."""
    if not x.numel():
        return torch.empty((*x.shape[:-1], packed.out), dtype=dtype or torch.float32)
    rows = rows_of(x.float())
    real_x = torch.empty(rows.shape)
    most = None if by_row else rows.abs().amax()
    _ROUNDED(threads_for(8 * rows.numel()), rows.data_ptr(), rows.stride(0) * 4, *rows.shape, real_x.data_ptr(), address(most))
    return _KIND(real_x.view(x.shape), packed, None, other, activation, scalars, dtype)


def run_cpu(
    x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, other: Tensor | None, activation: str, scalars: Any,
    by_row: bool, kind: torch.dtype, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """See ``graphwright.ops.fp8.linear_fp8``."""
    return apply_cpu(x, pack(weight, weight_scales, bias), other, activation, scalars, by_row, dtype)


def ready_cpu(
    x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, other: Tensor | None, activation: str, scalars: Any,
    by_row: bool, kind: torch.dtype, dtype: torch.dtype | None,
) -> Callable[[], Tensor]:  # fmt: skip
    """See ``Kernel.ready``."""
    return functools.partial(apply_cpu, x, pack(weight, weight_scales, bias), other, activation, scalars, by_row, dtype)


# -- CUDA ----------------------------------------------------------------------------------------------------------------


def run_cuda(*args: Any) -> Tensor:
    """See ``graphwright.ops.fp8.linear_fp8``."""
    from graphwright.kernels.gpu import linear_fp8 as gpu
    from graphwright.kernels.gpu.int8_parts import flat

    a = gpu.Arguments(*args)
    rows, out, width = a.sizes
    tail = gpu.tail_of(a, torch.empty(0))
    if not rows or not out:
        return tail.y
    q, scales, before = gpu.round_rows(flat(a.x), a.by_row, a.kind, _up(width))
    for launch in before:
        launch.go()
    weight = _padded(a.weight, _up(out), _up(width)).t()
    if _plain(a):
        bias = None if a.bias is None else a.bias.to(torch.bfloat16)
        y = torch._scaled_mm(q, weight, scales[:, None], a.weight_scales.float()[None, :], bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True)
        return y.reshape(tail.y.shape)
    one = torch.ones((), device=q.device)
    sums = torch._scaled_mm(q, weight, one, one, out_dtype=torch.float32, use_fast_accum=True)
    gpu.behind(sums, a, tail._replace(x_scales=scales)).go()
    return tail.y


def _plain(a: Any) -> bool:
    """cuBLASLt does it all: a scale for each row and column, bfloat16 out, nothing behind it."""
    return (a.dtype == torch.bfloat16 and a.activation == "none" and a.other is None and a.weight.shape[0] % STEP == 0
            and torch.cuda.get_device_capability(a.x.device) == (9, 0))  # fmt: skip


# -- what they take ------------------------------------------------------------------------------------------------------


def supports_cpu(
    x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, other: Tensor | None, activation: str, scalars: Any,
    by_row: bool, kind: torch.dtype, dtype: torch.dtype | None,
) -> str | None:  # fmt: skip
    if (reason := unfit() or not_cpu(x, weight, weight_scales, bias, other)) is not None:
        return reason
    if kind != torch.float8_e4m3fn or weight.dtype != kind or x.dtype not in _FLOATS:
        return f"x is {x.dtype}, the weight {weight.dtype}; wanted float16, bfloat16 or float32, and float8_e4m3fn"
    if not x.ndim or weight.ndim != 2 or x.shape[-1] != weight.shape[1] or not weight.shape[1]:
        return f"shapes {tuple(x.shape)} and {tuple(weight.shape)} do not belong together"
    if activation not in CODE:
        return f"activation {activation!r} is not fused"
    return None if dtype in (None, *_FLOATS) else f"result of {dtype}; float32, float16 and bfloat16 are supported"


def supports_cuda(*args: Any) -> str | None:
    if any(isinstance(t, Tensor) and not t.is_cuda for t in args):
        return "a tensor does not lie on a CUDA device"
    from graphwright.kernels.gpu import linear_fp8, unavailable

    return unavailable() or linear_fp8.supports(*args)


def cost(*args: Any) -> Cost:
    """Each tensor once; a multiply-add counts two."""
    x, weight, dtype = args[0], args[1], args[-1]
    rows, (out, width) = x.numel() // max(x.shape[-1], 1), weight.shape
    held = sum(t.numel() * t.element_size() for t in args if isinstance(t, Tensor))
    return Cost(held + rows * out * (dtype or torch.float32).itemsize, 2 * rows * out * width)


def samples() -> Iterator[Sample]:
    def make(name: str, rows: tuple[int, ...], width: int, out: int, *, x: torch.dtype = torch.float32, by_row: bool = True, bias: bool = True,
             other: bool = False, activation: str = "none", dtype: Any = None, bench: bool = False) -> Sample:  # fmt: skip
        def args(g: torch.Generator) -> tuple[Any, ...]:
            weight = (torch.randn(out, width, generator=g) * 40).to(torch.float8_e4m3fn)
            scales = (torch.rand(out, generator=g) + 0.5) / (40 * width**0.5)
            return (torch.randn(*rows, width, generator=g).to(x), weight, scales, torch.randn(out, generator=g) if bias else None,
                    torch.randn(*rows, out, generator=g).to(x) if other else None, activation, (), by_row, torch.float8_e4m3fn, dtype)  # fmt: skip

        return Sample(name, args, bench)

    yield make("128x768x3072 gelu", (1, 128), 768, 3072, activation="gelu", bench=True)
    yield make("512x1024x1024 bf16", (512,), 1024, 1024, x=torch.bfloat16, dtype=torch.bfloat16, bench=True)
    yield make("3x5x7", (3,), 5, 7, bias=False)
    yield make("2x9x70x33 bf16 residual silu", (2, 9), 70, 33, x=torch.bfloat16, other=True, activation="silu", dtype=torch.bfloat16)
    yield make("20x128x24 one scale to half", (20,), 128, 24, by_row=False, dtype=torch.float16)
    yield make("0x16x16", (0,), 16, 16)


# Sums of products are added in another order; on the GPU its matrix units keep about 14 bits while they add.
KERNELS = (
    Kernel("graphwright.linear_fp8", "cpu", "llvm", run_cpu, supports_cpu, cost, samples, precision="fp8", ready=ready_cpu),
    Kernel("graphwright.linear_fp8", "cuda", "cublaslt", run_cuda, supports_cuda, cost, samples, tolerance=(5e-3, 1), precision="fp8"),
)
