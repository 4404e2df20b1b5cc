"""What follows a product that another library has done: scales, bias, residual, activation, rounding, in one launch.

    y = activation(sums * x_scale * weight_scale + bias + other)

``sums`` [rows, columns] int32 or float; the rest as in ``sparse_parts.finish``. Bound by memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.kernels.gpu.launch import Config, Launch, cdiv
from graphwright.kernels.gpu.sparse_parts import finish, tail

_CONFIG = Config.of(ROWS=8, BLOCK=256, warps=4, stages=1)


@triton.jit
def epilogue_kernel(
    sums, rows, columns, step, y, x_scales, scales, bias, other, other_step, a, b, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    r, c = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.load(sums + r.to(tl.int64)[:, None] * step + c[None, :], (r < rows)[:, None] & (c < columns)[None, :], other=0)
    finish(acc, r, c, rows, columns, y, x_scales, scales, bias, other, other_step, a, b, ACT)


def epilogue(sums: Tensor, x: Tensor, x_scales: Tensor | None, weight_scales: Tensor | None, bias: Tensor | None, other: Tensor | None,
             activation: str, scalars: Sequence[float], dtype: torch.dtype | None) -> Tensor:  # fmt: skip
    """The layer's result, in the shape of x but for its last axis.

    Args:
        sums: ``[at least the rows of x, columns]``, columns adjacent.
    """
    rows, columns = x.numel() // max(x.shape[-1], 1), sums.shape[1]
    last, constants = tail(x, x_scales, columns, weight_scales, bias, other, activation, scalars, dtype)
    grid = (cdiv(columns, _CONFIG["BLOCK"]), cdiv(rows, _CONFIG["ROWS"]))
    Launch(epilogue_kernel, grid, (sums, rows, columns, sums.stride(0), *last), constants, _CONFIG).go()
    y: Tensor = last[0]
    return y


__all__ = ["epilogue"]
