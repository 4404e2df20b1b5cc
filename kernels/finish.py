"""What follows a product, in its own memory: bias, residual and activation in one pass.

    y = activation(y + bias + other)

``y`` [rows, columns] float32, contiguous, is overwritten; ``bias`` [columns] float32; ``other`` float32, broadcast to y's shape. A library's
product that adds a bias by itself first writes it to every row and then reads that back; this pass finds the numbers in the cache
that the product left them in. Bound by the L2 cache, with GELU and its like by arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from graphwright.kernels.activations import CODE, SMOOTH, scalars_of, simple, smooth
from graphwright.kernels.common import address, as_rows
from graphwright.kernels.language import independent
from graphwright.kernels.native import Native, specialized, threads_for, unavailable
from graphwright.kernels.tile import TILE, device, f32, f64, i64, real, share

# -- the kernel ------------------------------------------------------------------------------------------------------


@device
def shift(to, bias, other, n):
    """``to[i] += bias[i] + other[i]``; an address of 0 stands for zeros."""
    y, b, o = f32(to), f32(bias), f32(other)
    if other == 0:
        for i in independent(n):
            y[i] = y[i] + b[i]
    elif bias == 0:
        for i in independent(n):
            y[i] = y[i] + o[i]
    else:
        for i in independent(n):
            y[i] = (y[i] + b[i]) + o[i]


def _finish(params):  # device code, with ``activate`` put in by ``specialized``
    """Slots: 2-4 y, its rows and columns; 5 bias; 6, 7 other, bytes from row to row; 8 activation (-1: none); 9, 10 its scalars."""
    p, d = i64(params), f64(params)
    columns, a, b = p[4], real(d[9]), real(d[10])
    tiles = (columns + TILE - 1) // TILE
    first, end = share(params, p[3] * tiles)
    for unit in range(first, end):
        row, start = unit // tiles, unit % tiles * TILE
        n = min(TILE, columns - start)
        to = p[2] + (row * columns + start) * 4
        if p[5] != 0 or p[6] != 0:
            bias = p[5] + start * 4 if p[5] != 0 else p[5]
            other = p[6] + row * p[7] + start * 4 if p[6] != 0 else p[6]
            shift(to, bias, other, n)
        if p[8] >= 0:
            activate(p[8], to, n, a, b, to)  # noqa: F821


_SIMPLE, _SMOOTH = (Native(specialized(_finish, f"finish_{a.__name__}", activate=a), "q" * 7 + "dd") for a in (simple, smooth))

# -- host side -------------------------------------------------------------------------------------------------------


def unfit(activation: str) -> str | None:
    """None, or why nothing can end in this activation here."""
    return unavailable() or (None if activation in CODE else f"activation {activation!r} has no vector form; there are {', '.join(CODE)}")


class Finish:
    """Bias and activation with all that is constant worked out; called with the product, and the residual where there is one.

    Args:
        bias: [columns] float32, or None.
        activation, scalars: see ``graphwright.ops.fused.ACTIVATIONS``; ``unfit`` says which are served.
    """

    def __init__(self, bias: Tensor | None, activation: str, scalars: Sequence[float] = ()):
        self.bias = None if bias is None else bias.detach().contiguous()
        self.native = _SMOOTH if activation in SMOOTH else _SIMPLE
        self.tail = (-1 if activation == "none" else CODE[activation], *scalars_of(activation, scalars))

    def __call__(self, y: Tensor, other: Tensor | None = None) -> Tensor:
        """``y`` [..., columns], float32 and contiguous, overwritten and given back; ``other`` broadcasts to its shape."""
        count, columns = y.numel(), y.shape[-1]
        if count:
            rows, step = as_rows(other, y.shape)
            self.native(threads_for(count), y.data_ptr(), count // columns, columns, address(self.bias), address(rows), step, *self.tail)
        return y
