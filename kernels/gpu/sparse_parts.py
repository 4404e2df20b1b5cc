"""What the Triton kernels for weights without their zeros have in common: the end of a product, and what matrix instruction it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.kernels.gpu.int8_parts import flat
from graphwright.kernels.gpu.language import CODE, activate
from graphwright.kernels.gpu.launch import Config

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def finish(acc, r, c, rows, columns, y, x_scales, scales, bias, other, other_step, a, b, ACT: tl.constexpr):
    """From sums ``acc`` (int32 or float32) of rows ``r`` and columns ``c`` to what is stored in ``y`` [rows, columns]; see ``tail``."""
    here, there = r < rows, c < columns
    inside = here[:, None] & there[None, :]
    v = acc.to(tl.float32)
    if scales is not None:
        v *= tl.load(x_scales + r, here, other=0.0).to(tl.float32)[:, None]
        v *= tl.load(scales + c, there, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        v += tl.load(bias + c, there, other=0.0).to(tl.float32)[None, :]
    wide = r.to(tl.int64)[:, None]
    if other is not None:
        v += tl.load(other + wide * other_step + c[None, :], inside, other=0.0).to(tl.float32)
    tl.store(y + wide * columns + c[None, :], activate(v, a, b, ACT).to(y.dtype.element_ty), inside)


def tail(x: Tensor, x_scales: Tensor | None, out: int, weight_scales: Tensor | None, bias: Tensor | None, other: Tensor | None, activation: str,
         scalars: Sequence[float], dtype: torch.dtype | None) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """The last arguments of every kernel here, the result first, and its constants.

    ``x_scales`` [rows], ``scales``, ``bias`` [columns], ``other`` [rows, columns], each or None.
    """
    y = torch.empty((*x.shape[:-1], out), dtype=dtype or torch.float32, device=x.device)
    residual = None if other is None else flat(other)
    a, b = (*map(float, scalars), 0.0, 0.0)[:2]
    rest = (y, *(None if t is None else t.reshape(-1).contiguous() for t in (x_scales, weight_scales, bias)), residual, 0 if residual is None else residual.stride(0))
    return (*rest, a, b), {"ACT": CODE[activation]}


def unfit(weight: Tensor, x: Tensor, x_scales: Tensor | None, weight_scales: Tensor | None, out: int, bias: Tensor | None, other: Tensor | None,
          activation: str, dtype: torch.dtype | None) -> str | None:  # fmt: skip
    """None, or why a product with this weight can't be served."""
    if x.dtype != weight.dtype or x.dtype not in (torch.int8, *FLOATS):
        return f"x is {x.dtype}, the weight {weight.dtype}; both int8, float16, bfloat16 or float32 are supported"
    rows = tuple(x.shape[:-1])
    wanted = {"x_scales": (x_scales, (*rows, 1)), "weight_scales": (weight_scales, (out,))}
    for name, (t, shape) in wanted.items():
        if (t is None) == (x.dtype == torch.int8) or t is not None and (tuple(t.shape) != shape or t.dtype not in FLOATS):
            return f"{name} is {None if t is None else (t.dtype, tuple(t.shape))}; wanted {f'floats of shape {shape}' if x.dtype == torch.int8 else 'None'}"
    for name, t, shape in (("bias", bias, (out,)), ("other", other, (*rows, out))):
        if t is not None and (tuple(t.shape) != shape or t.dtype not in FLOATS):
            return f"{name} is {t.dtype} of shape {tuple(t.shape)}; wanted floats of shape {shape}"
    if activation not in CODE:
        return f"activation {activation!r} is not fused"
    return None if dtype in (None, *FLOATS) else f"result of {dtype}; float32, float16 and bfloat16 are supported"


def matrix(config: Config, kind: torch.dtype, target: str) -> str:
    """The matrix instruction of a product of this dtype; none for float32, which is exact."""
    if kind == torch.float32:
        return ""
    whole = kind == torch.int8
    if target == "gfx942":
        return "v_mfma_i32" if whole else "v_mfma_f32"
    return ("I" if whole else "H") + ("GMMA" if target == "sm_90" and config["BM"] >= 64 and config.warps % 4 == 0 else "MMA")
