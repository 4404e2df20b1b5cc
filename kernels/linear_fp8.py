"""Linear layers of 8-bit floats by PyTorch's own product, ``torch._scaled_mm``, with what stands before and behind it around it.

    s[r] = max_k |x[r, k]| / 448;   x8 = fp8(x / s);   y = activation(x8 @ w8^T * s * w_scale + bias + other)

``x`` [*, K] float16, bfloat16 or float32; ``weight`` [N, K] float8_e4m3fn with a scale per row; y [*, N]. On CUDA (sm_89 and later) cuBLASLt
multiplies, and our Triton kernels make x8 in one pass before it and do all the rest in one pass over its float32 sums behind it; a plain
product in bfloat16 under a scale for each row needs no second pass. On the CPU oneDNN multiplies; no x86 before AMX-FP8 has
instructions for fp8, so it widens first: exact, smaller in memory, and slower than the product of floats that it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.ops.fp8 import quantize_fp8
from graphwright.ops.fused import ACTIVATIONS, activate

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)

#: ``torch._scaled_mm`` takes sizes that are multiples of this.
STEP = 16


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """``x`` with bytes of zeros up to this size; x itself where it has it."""
    if x.shape == (rows, columns) and x.stride(1) == 1 and x.stride(0) % STEP == 0:
        return x
    return F.pad(x.contiguous().view(torch.uint8), (0, columns - x.shape[1], 0, rows - x.shape[0])).contiguous().view(x.dtype)


def _up(n: int) -> int:
    return -(-n // STEP) * STEP


# -- CPU -----------------------------------------------------------------------------------------------------------------


def run_cpu(
    x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, other: Tensor | None, activation: str, scalars: Any,
    by_row: bool, kind: torch.dtype, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """See ``graphwright.ops.fp8.linear_fp8``."""
    out, width = weight.shape
    shape = (*x.shape[:-1], out)
    if not x.numel() or not out:
        return torch.empty(shape, dtype=dtype or torch.float32)
    q, scales = quantize_fp8(x.reshape(-1, width), by_row, kind)
    rows = q.shape[0]
    one = torch.ones(())
    y = torch._scaled_mm(_padded(q, rows, _up(width)), _padded(weight, _up(out), _up(width)).t(), one, one, out_dtype=torch.float32)[:, :out]
    y = y * scales * weight_scales.float()
    if bias is not None:
        y = y + bias.float()
    if other is not None:
        y = y + other.reshape(rows, out).float()
    return activate(y, activation, scalars).to(dtype or torch.float32).reshape(shape).contiguous()


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
    for t in (x, weight, weight_scales, bias, other):
        if t is not None and t.device.type != "cpu":
            return f"a tensor lies on {t.device}"
    if kind != torch.float8_e4m3fn or weight.dtype != kind or x.dtype not in _FLOATS:
        return f"x is {x.dtype}, the weight {weight.dtype}; wanted float16, bfloat16 or float32, and float8_e4m3fn"
    if not x.ndim or weight.ndim != 2 or x.shape[-1] != weight.shape[1] or not weight.shape[1]:
        return f"shapes {tuple(x.shape)} and {tuple(weight.shape)} do not belong together"
    if activation not in ACTIVATIONS:
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
    Kernel("graphwright.linear_fp8", "cpu", "onednn", run_cpu, supports_cpu, cost, samples, precision="fp8"),
    Kernel("graphwright.linear_fp8", "cuda", "cublaslt", run_cuda, supports_cuda, cost, samples, tolerance=(5e-3, 1), precision="fp8"),
)
