"""Linear layers whose weight is stored without its zeros: two of every four inputs, or whole blocks. References in plain torch.

Conventions. ``x`` and the weight are either both floating (``x_scales`` and ``weight_scales`` None), or both int8 with
``x_scales [*, 1]`` and ``weight_scales [o]``, one per output. ``dtype`` is that of the result, None: float32. Arithmetic is float32
(float64 where the float inputs are, which is how the oracle runs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.errors import InputError
from graphwright.ops.fused import activate
from graphwright.ops.lowered import _own
from graphwright.ops.registry import CONTRACTION, QUANT, op

#: Sides of the blocks.
SIDES = (16, 32, 64)

_HINT = "Prune the weight to the pattern first, or keep this layer dense."


# -- two of four -------------------------------------------------------------------------------------------------------


def compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight of which each four neighbouring inputs have at most two that are not zero, without the other two.

    Args:
        weight: ``[o, i]``, i a multiple of 8, of any dtype; NaN counts as not zero.

    Returns:
        values ``[o, i / 2]`` in the weight's dtype, and uint8 ``[o, i / 8]``: where they stood. A byte describes eight inputs, two bits a
        value, the lowest first; the two places of a four ascend. (The format of Mishra et al., "Accelerating sparse deep neural networks", 2021.)

    Raises:
        InputError: the pattern is broken; the first row and column where it is are named.
    """
    if weight.ndim != 2 or weight.shape[1] % 8:
        raise InputError(f"a weight of shape {tuple(weight.shape)} can't be stored 2:4", where="compress",
                         hint="Two axes are wanted, the second a multiple of 8.")  # fmt: skip
    fours = weight.detach().unflatten(1, (-1, 4))
    there = fours != 0
    broken = there.sum(-1) > 2
    if bool(broken.any()):
        row, four = broken.nonzero()[0].tolist()
        raise InputError(f"row {row} has {int(there[row, four].sum())} numbers other than zero in columns {4 * four} to {4 * four + 3}; 2:4 allows two",
                         where="compress", hint=_HINT)  # fmt: skip
    # numbers first, then zeros that fill up; stable, so that places ascend within each kind, and sorted once more for all
    places = torch.argsort(there.to(torch.uint8), dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
    values = fours.gather(-1, places).flatten(1)
    bits = places.flatten(1).unflatten(1, (-1, 4)).to(torch.uint8)
    return values.contiguous(), bits[..., 0] | bits[..., 1] << 2 | bits[..., 2] << 4 | bits[..., 3] << 6


def places_of(indices: Tensor) -> Tensor:
    """``[o, i / 8]`` bytes as the ``[o, i / 2]`` places in them, from 0 to 3, uint8."""
    return torch.stack([indices >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(1)


def expand(values: Tensor, indices: Tensor) -> Tensor:
    """``compress`` undone: the weight ``[o, i]``.

    Raises:
        InputError: shapes do not belong together, or two values of a four claim places that do not ascend; the first are named.
    """
    if values.ndim != 2 or indices.dtype != torch.uint8 or indices.shape != (values.shape[0], values.shape[1] // 4) or values.shape[1] % 4:
        raise InputError(f"values {tuple(values.shape)} and {indices.dtype} indices {tuple(indices.shape)} do not belong together", where="expand",
                         hint="Wanted are values [o, i / 2] and uint8 indices [o, i / 8].")  # fmt: skip
    pairs = places_of(indices).unflatten(1, (-1, 2))
    broken = pairs[..., 0] >= pairs[..., 1]
    if bool(broken.any()):
        row, four = broken.nonzero()[0].tolist()
        raise InputError(f"row {row} has places {pairs[row, four].tolist()} for columns {4 * four} to {4 * four + 3}; they must ascend", where="expand",
                         hint="Make indices by compress().")  # fmt: skip
    return _expanded(values, indices)


def _expanded(values: Tensor, indices: Tensor) -> Tensor:
    fours = values.new_zeros((*values.unflatten(1, (-1, 2)).shape[:2], 4))
    return fours.scatter(-1, places_of(indices).unflatten(1, (-1, 2)).long(), values.unflatten(1, (-1, 2))).flatten(1)


def _flops24(args: Mapping[str, Any], out: Tensor) -> Any:
    return 2 * args["weight"].shape[1] * out.numel()


def _like_rows(x: Tensor, out: int, dtype: torch.dtype | None, *floats: Tensor | None) -> Tensor:
    wide = any(t is not None and t.dtype == torch.float64 for t in (x, *floats))
    return x.new_empty((*x.shape[:-1], out), dtype=torch.float64 if wide else dtype or torch.float32)


def _fake24(x: Tensor, x_scales: Tensor | None, weight: Tensor, indices: Tensor, weight_scales: Tensor | None, bias: Tensor | None,
            other: Tensor | None, activation: str, scalars: Sequence[float], dtype: torch.dtype | None) -> Tensor:  # fmt: skip
    return _like_rows(x, weight.shape[0], dtype, x_scales, weight_scales)


@op("graphwright.linear_sparse24", traits={CONTRACTION, QUANT}, flops=_flops24, fake=_fake24)
def linear_sparse24(
    x: Tensor, x_scales: Tensor | None, weight: Tensor, indices: Tensor, weight_scales: Tensor | None, bias: Tensor | None,
    other: Tensor | None, activation: str, scalars: Sequence[float], dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """``activation(x @ expand(weight, indices).T + bias + other)``: a weight of which two in four are stored.

    ``x [*, i]``, ``weight [o, i / 2]`` and ``indices [o, i / 8]`` as ``compress`` gives them, ``bias [o]``, ``other [*, o]`` float; gives
    ``[*, o]``, contiguous. A pass that prunes leaves the weight dense and says so in its node: ``meta["sparsity"] = "2:4"``; who
    lowers such a layer compresses the weight once and writes this op.
    """
    dense = _expanded(weight, indices)
    return _linear(x, x_scales, dense, weight_scales, bias, other, activation, scalars, dtype)


# -- blocks ------------------------------------------------------------------------------------------------------------


def to_blocks(weight: Tensor, side: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A weight as its blocks of ``side`` by ``side`` numbers that are kept (block compressed sparse rows).

    Args:
        weight: ``[r, c]``, both multiples of ``side``.
        side: 16, 32 or 64.
        mask: bool ``[r / side, c / side]``, the blocks that are kept; None: all that hold anything but zeros.

    Returns:
        values ``[n, side, side]`` row by row of blocks; int32 ``[n]``, the column of each, ascending in a row; int32 ``[r / side + 1]``,
        where each row begins.

    Raises:
        InputError: sizes do not fit, or the mask leaves out a block that is not zero; the first is named.
    """
    if side not in SIDES or weight.ndim != 2 or weight.shape[0] % side or weight.shape[1] % side:
        raise InputError(f"a weight of shape {tuple(weight.shape)} can't be cut into blocks of {side}x{side}", where="to_blocks",
                         hint=f"Blocks of {', '.join(map(str, SIDES))} are supported, and both sizes must be multiples.")  # fmt: skip
    grid = weight.detach().unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2)  # [r, c, side, side]
    there = (grid != 0).flatten(2).any(-1)
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != there.shape:
            raise InputError(f"the mask is {mask.dtype} of shape {tuple(mask.shape)}; wanted bool {tuple(there.shape)}", where="to_blocks",
                             hint="It has one entry per block.")  # fmt: skip
        if bool((lost := there & ~mask).any()):
            row, column = lost.nonzero()[0].tolist()
            raise InputError(f"the mask leaves out the block at rows {row * side} and columns {column * side}, which is not zero", where="to_blocks", hint=_HINT)
        there = mask
    row, column = there.nonzero().unbind(1)
    starts = F.pad(there.sum(1).cumsum(0), (1, 0))
    return grid[row, column].contiguous(), column.to(torch.int32), starts.to(torch.int32)


def from_blocks(values: Tensor, columns: Tensor, starts: Tensor, width: int) -> Tensor:
    """``to_blocks`` undone: the weight ``[r, width]``.

    Raises:
        InputError: the parts do not describe a weight of that width; the first offending row or block is named.
    """
    check_blocks(values, columns, starts, width)
    return _dense(values, columns, starts, width)


def check_blocks(values: Tensor, columns: Tensor, starts: Tensor, width: int) -> None:
    """Look at the contents of a weight in blocks: what a kernel relies on and never checks.

    Raises:
        InputError: see ``from_blocks``.
    """
    where = "from_blocks"
    if (reason := unfit_blocks(values, columns, starts)) is not None or width % values.shape[1]:
        raise InputError(reason or f"a width of {width} is no multiple of blocks of {values.shape[1]}", where=where, hint="Make the parts by to_blocks().")
    steps = starts.diff()
    if int(starts[0]) or int(starts[-1]) != len(columns) or bool((steps < 0).any()):
        wrong = int((steps < 0).nonzero()[0]) if bool((steps < 0).any()) else 0 if int(starts[0]) else len(steps)
        raise InputError(f"starts[{wrong}] is {int(starts[wrong])}: they must ascend from 0 to the {len(columns)} blocks", where=where, hint="Make the parts by to_blocks().")
    rows = torch.repeat_interleave(steps.long())
    place = rows * (width // values.shape[1]) + columns
    bad = (columns < 0) | (columns >= width // values.shape[1])
    bad[1:] |= place.diff() <= 0
    if bool(bad.any()):
        n = int(bad.nonzero()[0])
        raise InputError(f"block {n}, in row {int(rows[n])}, claims column {int(columns[n])}: columns ascend within a row, below {width // values.shape[1]}",
                         where=where, hint="Make the parts by to_blocks().")  # fmt: skip


def unfit_blocks(values: Tensor, columns: Tensor, starts: Tensor) -> str | None:
    """None, or why shapes and dtypes are not those of a weight in blocks."""
    if values.ndim != 3 or values.shape[1] != values.shape[2] or values.shape[1] not in SIDES:
        return f"values have shape {tuple(values.shape)}; wanted [n, b, b] with b one of {', '.join(map(str, SIDES))}"
    if columns.shape != values.shape[:1] or starts.ndim != 1 or not len(starts) or {columns.dtype, starts.dtype} != {torch.int32}:
        return f"columns {columns.dtype} {tuple(columns.shape)} and starts {starts.dtype} {tuple(starts.shape)}; wanted int32 [{len(values)}] and int32 [r / b + 1]"
    return None


def rows_of_blocks(columns: Tensor, starts: Tensor) -> Tensor:
    """The row of each block; no look at sizes on the device."""
    numbers = torch.arange(columns.shape[0], device=columns.device, dtype=torch.int32)
    return torch.searchsorted(starts, numbers, right=True) - 1


def by_column(columns: Tensor, starts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks column by column: their numbers, their rows, where each of the ``count`` columns begins; int32. Never waits for a device."""
    order = torch.argsort(columns, stable=True)
    begins = torch.searchsorted(columns[order], torch.arange(count + 1, device=columns.device, dtype=torch.int32))
    return order.to(torch.int32), rows_of_blocks(columns, starts)[order].to(torch.int32), begins.to(torch.int32)


def _dense(values: Tensor, columns: Tensor, starts: Tensor, width: int) -> Tensor:
    side, tall = values.shape[1], starts.shape[0] - 1
    grid = values.new_zeros((tall, width // side, side, side))
    grid = grid.index_put((rows_of_blocks(columns, starts), columns.long()), values)
    return grid.transpose(1, 2).reshape(tall * side, width)


def _block_flops(args: Mapping[str, Any], out: Tensor) -> Any:
    rows = out.numel() // max(args["out"], 1)
    return 2 * rows * args["values"].numel()


def _fake_blocks(
    x: Tensor, x_scales: Tensor | None, values: Tensor, columns: Tensor, starts: Tensor, out: int, transposed: bool, weight_scales: Tensor | None,
    bias: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float], dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    return _like_rows(x, out, dtype, x_scales, weight_scales)


@op("graphwright.linear_block_sparse", traits={CONTRACTION, QUANT}, flops=_block_flops, fake=_fake_blocks)
def linear_block_sparse(
    x: Tensor, x_scales: Tensor | None, values: Tensor, columns: Tensor, starts: Tensor, out: int, transposed: bool, weight_scales: Tensor | None,
    bias: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float], dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """``activation(x @ W.T + bias + other)``, or ``x @ W`` where ``transposed``, with W in blocks of which only some are stored.

    ``x [*, i]``; ``values [n, b, b]``, ``columns [n]``, ``starts`` as ``to_blocks`` gives them for W, which is ``[out, i]``, transposed
    ``[i, out]``; ``bias [out]``, ``other [*, out]`` float; gives ``[*, out]``, contiguous. Outputs without a block are
    ``activation(bias + other)``. A pass that prunes leaves the weight dense and says so in its node: ``meta["sparsity"] = "block 32x32"``; who
    lowers such a layer cuts it into blocks once and writes this op.
    """
    dense = _dense(values, columns, starts, out if transposed else x.shape[-1])
    return _linear(x, x_scales, dense.t() if transposed else dense, weight_scales, bias, other, activation, scalars, dtype)


def _linear(x: Tensor, x_scales: Tensor | None, weight: Tensor, weight_scales: Tensor | None, bias: Tensor | None, other: Tensor | None,
            activation: str, scalars: Sequence[float], dtype: torch.dtype | None) -> Tensor:  # fmt: skip
    floats = (x, x_scales, weight_scales)
    work = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in floats) else torch.float32
    rows = x.to(work) if x_scales is None else x.to(work) * x_scales.to(work)
    real = weight.to(work) if weight_scales is None else weight.to(work) * weight_scales.to(work)[:, None]
    y = F.linear(rows, real, None if bias is None else bias.to(work))
    y = activate(y if other is None else y + other.to(work), activation, scalars).contiguous()
    # float64 stays: it only comes from float64 inputs, where the caller wants the oracle's precision
    return _own(y if work == torch.float64 else y.to(dtype or torch.float32))
