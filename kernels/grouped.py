"""Linear layers whose weight has a scale for each group of inputs: what the kernels with 4-bit and 8-bit weights share.

    y[r, o] = activation(row_scale[r] * sum_g scale[o, g] * (sum_{k in g} x[r, k] q[o, k] - point[o, g] * sum_{k in g} x[r, k]) + bias[o] + other[r, o])

A kernel brings a tile (``tile``): the products of one line of the weight with a few rows, ``x`` as it stands in memory. The sums over a
group stay in registers; at its end they are scaled and added up in float32. Zero points never meet the products: what they take
away is a small product of its own, of the groups' sums of x with ``point * scale``. For many rows, where reading the weight is no longer the
work, pieces of it become floats in the L2 cache (``widen``), scaled and shifted, once for all rows of a task, and tiles of floats do the rest; for ever more rows, ``panels`` does the same on a larger scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphwright.kernels.activations import CODE, SMOOTH, scalars_of, simple, smooth, unfit_epilogue
from graphwright.kernels.common import address, as_rows, not_cpu, rows_of
from graphwright.kernels.fma import products as multiply
from graphwright.kernels.language import INT64, VOID, Device, intrinsic, ir, known, loop
from graphwright.kernels.native import GRAIN, Native, specialized, threads_for
from graphwright.kernels.panels import Many, Widen, widener
from graphwright.kernels.tile import add as add_rows
from graphwright.kernels.tile import apart, device, f32, f64, i8, i64, real, scratch_of, share, store, total
from graphwright.kernels.vector import LANES, F, fma, load_f, splat_f, spread_of, store_f
from graphwright.kernels.vnni import unfit

#: Rows and blocks of 16 columns of a task; products in one running sum; numbers of a row that one line of 4-bit weights meets.
ROWS, BLOCKS, CHUNK, EIGHT = 48, 4, 512, 8
#: Inputs of a piece of the weight that is widened, from how many rows on it is, and from how many ``panels`` takes over.
PIECE, MANY_ROWS, MORE_ROWS = 256, 12, 96
_ROWS, _BLOCKS, _FOUR, _TWO, _ONE, _ZERO, _PIECE = (np.int64(n) for n in (ROWS, BLOCKS, 4, 2, 1, 0, PIECE))
_sums, _more = (scratch_of(ROWS * BLOCKS * LANES) for _ in range(2))
_piece = scratch_of(PIECE * BLOCKS * LANES)
_HALVES = (torch.float16, torch.bfloat16)

#: Writes the products of one line: ``(at, addresses of the rows, addresses of the blocks, line, sums) -> sums``.
Products = Callable[[Any, list[Any], list[Any], Any, list[Any]], list[Any]]


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the kernels read it. All padded to whole blocks of 16 output channels.

    Attributes:
        out, width: output channels, input channels.
        step: inputs of a group, a multiple of 8 where numbers have 4 bits.
        weight: 4 bits: ``[blocks, ceil(width / 8), 16, 4]`` bytes, the lower half of byte b for input b of eight, the upper for 4 + b;
            8 bits: ``[blocks, width, 16]``.
        scales: ``[blocks, groups, 16]`` float32.
        offsets: the same times the zero points, as far as the integers have not lost those already; None: all zero.
        bias: ``[blocks * 16]`` float32.
    """

    out: int
    width: int
    step: int
    weight: Tensor
    scales: Tensor
    offsets: Tensor | None
    bias: Tensor


def pack_nibbles(weight: Tensor) -> Tensor:
    """``weight [o, ceil(i / 2)]`` uint8 (lower half: even inputs) as ``Packed.weight``; what is padded is 8."""
    numbers = torch.stack((weight & 15, weight >> 4), -1).flatten(1)
    numbers = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % EIGHT, 0, -numbers.shape[0] % LANES), value=8)
    lines = numbers.reshape(-1, LANES, numbers.shape[1] // EIGHT, 2, 4).permute(0, 2, 3, 1, 4)  # [blocks, lines, half, 16, 4]
    return (lines[:, :, 0] | lines[:, :, 1] << 4).contiguous()


def pack_bytes(weight: Tensor) -> Tensor:
    """``weight [o, i]`` int8 as ``Packed.weight``."""
    columns = torch.nn.functional.pad(weight.t(), (0, -weight.shape[0] % LANES))
    return columns.reshape(weight.shape[1], -1, LANES).transpose(0, 1).contiguous()


def pack(weight: Tensor, width: int, group: int, scales: Tensor, zero_points: Tensor | float, bias: Tensor | None) -> Packed:
    """Pack integers that ``pack_nibbles`` or ``pack_bytes`` has laid out.

    Args:
        weight: laid out; width: input channels.
        group: inputs that share a scale.
        scales: ``[o, ceil(width / group)]``.
        zero_points: of the same shape, or one number for all, in the integers that the tile multiplies.
    """
    out, step = scales.shape[0], group
    wide = scales.detach().float()
    points = zero_points.detach().float() if isinstance(zero_points, Tensor) else torch.full_like(wide, zero_points)
    if group >= width:  # one long sum is made of shorter ones: a running float32 sum over thousands of products would lose digits
        step = CHUNK
        wide, points = (t.expand(out, -(-width // step)) for t in (wide, points))
    offsets = wide * points if bool(points.any()) else None
    padded = torch.nn.functional.pad(torch.zeros(out) if bias is None else bias.detach().float(), (0, -out % LANES))
    return Packed(out, width, step, weight, _by_block(wide), None if offsets is None else _by_block(offsets), padded)


def _by_block(per_group: Tensor) -> Tensor:
    """``[o, groups]`` as ``[blocks, groups, 16]``."""
    padded = torch.nn.functional.pad(per_group, (0, 0, 0, -per_group.shape[0] % LANES))
    return padded.reshape(-1, LANES, padded.shape[1]).transpose(1, 2).contiguous()


# -- device code -----------------------------------------------------------------------------------------------------


def tile(rows: int, blocks: int, kind: Callable[[], Any], products: Products) -> Any:
    """``c[:rows, :16 * blocks] += sum over groups of scales * (x @ w)``; strides in bytes.

    Args:
        kind: the LLVM vector type of the sums within a group: float32, or int32.
    """

    @intrinsic(VOID, *[INT64] * 10)
    def grouped(at, x, x_step, w, w_step, groups, lines, scales, s_step, c, c_step):
        long, vector, inner = INT64.llvm, F.llvm, kind()
        left = [at.add(x, at.mul(x_step, long(r))) for r in range(rows)]
        right = [at.add(w, at.mul(w_step, long(v))) for v in range(blocks)]
        places = [at.add(at.add(c, at.mul(c_step, long(k // blocks))), long(k % blocks * LANES * 4)) for k in range(rows * blocks)]

        def pointer(address: Any) -> Any:
            return at.inttoptr(address, vector.as_pointer())

        def group(number: Any, sums: list[Any]) -> list[Any]:
            start = at.mul(number, lines)
            nothing = [ir.Constant(inner, [inner.element(0)] * LANES)] * (rows * blocks)
            found = loop(at, lines, nothing, lambda k, s: products(at, left, right, at.add(start, k), s))
            found = [at.sitofp(v, vector) for v in found] if inner != vector else found
            by = [at.load(pointer(at.add(at.add(scales, at.mul(s_step, long(v))), at.mul(number, long(LANES * 4)))), align=4) for v in range(blocks)]
            return [known(at, "llvm.fma.v16f32", vector, f, by[k % blocks], s) for k, (f, s) in enumerate(zip(found, sums, strict=True))]

        sums = loop(at, groups, [at.load(pointer(p), align=4) for p in places], group)
        for value, place in zip(sums, places, strict=True):
            at.store(value, pointer(place), align=4)

    return grouped


def spread_load(at: Any, address: Any, kind: Any, vector: Any) -> Any:
    """Sixteen times the number at an address."""
    return spread_of(at, at.load(at.inttoptr(address, kind.as_pointer()), align=1), vector)


def _products(x, x_step, rows, w, w_step, blocks, groups, lines, scales, s_step, c, c_step):  # device code
    """``c += x @ w`` over ``groups`` groups of so many lines: tiles are put in by ``Kind``."""
    apart()
    block = _ZERO
    while block < blocks:
        wide = _FOUR if blocks - block >= 4 else _ONE
        strip, by, out, row = w + block * w_step, scales + block * s_step, c + block * 64, _ZERO
        while row < rows:
            high = HIGH if rows - row >= HIGH else (_TWO if rows - row >= 2 and wide == 4 else _ONE)  # noqa: F821
            at, to = x + row * x_step, out + row * c_step
            if high == 2:
                PAIR_WIDE(at, x_step, strip, w_step, groups, lines, by, s_step, to, c_step)  # noqa: F821
            elif high > 1:
                if wide == 4:
                    MANY_WIDE(at, x_step, strip, w_step, groups, lines, by, s_step, to, c_step)  # noqa: F821
                else:
                    MANY(at, x_step, strip, w_step, groups, lines, by, s_step, to, c_step)  # noqa: F821
            elif wide == 4:
                WIDE(at, x_step, strip, w_step, groups, lines, by, s_step, to, c_step)  # noqa: F821
            else:
                SINGLE(at, x_step, strip, w_step, groups, lines, by, s_step, to, c_step)  # noqa: F821
            row += high
        block += wide


@device
def _total_bytes(x, n):
    """Sum of ``n`` int8, as a float32."""
    numbers, sum_ = i8(x), np.int32(0)
    for i in range(n):
        sum_ = np.int32(sum_ + numbers[i])
    return real(sum_)


def _take(x, x_step, rows, inputs, group, offsets, every, blocks, c):  # device code
    """Take from ``c``, ``blocks * 16`` wide, what the zero points take away: each group's sum of x times its ``offsets``."""
    apart()
    for r in range(rows):
        for g in range(every):
            start = g * group
            sum_ = splat_f(-TOTAL(x + r * x_step + start * SIZE, min(group, inputs - start)))  # noqa: F821
            for b in range(blocks):
                to = c + (r * blocks + b) * 64
                store_f(fma(sum_, load_f(offsets + (b * every + g) * 64), load_f(to)), to)


def _pieces(x, x_step, rows, w, strip, lines, each, scales, every, offsets, blocks, c):  # device code
    """``c = x @ w``, all scaled and shifted, by pieces of the weight that become floats first."""
    apart()
    piece, wide, length = _piece(), blocks * 64, _PIECE // PER_LINE  # noqa: F821
    for number in range((lines + length - 1) // length):
        first = number * length
        count = min(length, lines - first)
        for b in range(blocks):
            line = first
            while line < first + count:
                group = line // each
                until, by = min(first + count, (group + 1) * each), (b * every + group) * 64
                scale, offset = load_f(scales + by), splat_f(real(0))
                if offsets != 0:
                    offset = load_f(offsets + by)
                for k in range(line, until):
                    UNPACK(w + b * strip, k, scale, offset, piece + (k - first) * PER_LINE * wide + b * 64, wide)  # noqa: F821
                line = until
        multiply(x + first * X_LINE, x_step, rows, piece, wide, blocks, count * PER_LINE, c, wide, w, first)  # noqa: F821


def _linear(params):  # device code, with what a kind of weight and an activation need put in by ``Kind``
    """Slots: 2 x, 3 its row in bytes, 4 rows, 5 columns, 6 weight, 7 lines of a strip, 8 whole groups, 9 lines of a group, 10 scales,
    11 all groups, 12 offsets or 0, 13 scales of rows or 0, 14 bias, 15 other or 0, 16 its row in bytes, 17 out, 18 code,
    19 a, 20 b."""
    p, d = i64(params), f64(params)
    columns, strip, groups, every, sums = p[5], p[7] * W_LINE, p[8], p[11], _sums()  # noqa: F821
    blocks, bands = (columns + 15) // 16, (p[4] + _ROWS - 1) // _ROWS
    first, end = share(params, (blocks + _BLOCKS - 1) // _BLOCKS * bands)
    for task in range(first, end):
        block, row = task // bands * _BLOCKS, task % bands * _ROWS
        rows, count = min(_ROWS, p[4] - row), min(_BLOCKS, blocks - block)
        at, wide = block * 16, count * 16
        n, x, w, scales = min(wide, columns - at), p[2] + row * p[3], p[6] + block * strip, p[10] + block * every * 64
        offsets = p[12] + block * every * 64 if p[12] != 0 else _ZERO
        if rows >= MANY_ROWS_:  # noqa: F821
            PIECES(x, p[3], rows, w, strip, p[7], p[9], scales, every, offsets, count, sums)  # noqa: F821
        else:
            for k in range(0, rows * wide * 4, 64):
                store_f(splat_f(real(0)), sums + k)
            if offsets != 0:
                TAKE(x, p[3], rows, p[7] * PER_LINE, p[9] * PER_LINE, offsets, every, count, sums)  # noqa: F821
            done = groups * p[9]
            if groups != 0:
                PRODUCTS(x, p[3], rows, w, strip, count, groups, p[9], scales, every * 64, sums, wide * 4)  # noqa: F821
            if done != p[7]:
                PRODUCTS(x + done * X_LINE, p[3], rows, w + done * W_LINE, strip, count, _ONE, p[7] - done, scales + groups * 64, every * 64, sums, wide * 4)  # noqa: F821 # fmt: skip
        for r in range(rows):
            line, by = sums + r * wide * 4, splat_f(real(1))
            if p[13] != 0:
                by = splat_f(f32(p[13])[row + r])
            for c in range(0, wide, 16):
                store_f(fma(load_f(line + c * 4), by, load_f(p[14] + (at + c) * 4)), line + c * 4)
            if p[15] != 0:
                add_rows(line, p[15] + (row + r) * p[16] + at * 4, n, line)
        y = activate(p[18], sums, rows * wide, real(d[19]), real(d[20]), _more())  # noqa: F821
        for r in range(rows):
            store(0, p[17] + ((row + r) * columns + at) * 4, n, y + r * wide * 4, real(1), 0, real(0), real(0))


class Kind:
    """The compiled kernels of one kind of weight.

    Args:
        name: of the kernel on disk.
        w_line, x_line: bytes of the weight and of a row that belong to one line.
        per_line: numbers of a row that belong to one line.
        high: rows of a tile.
        many: what takes over for many rows; None where the products are not those of floats: then they go the way of few.
        starts: from how many rows on pieces become floats, and from how many ``many`` takes over.
        total_of: device function ``(address of a group's part of a row, numbers) -> what its offsets are times``; by default their sum.
    """

    def __init__(self, name: str, w_line: int, x_line: int, per_line: int, high: int, kind: Callable[[], Any], products: Products,
                 many: Many | None = None, starts: tuple[int, int] = (MANY_ROWS, MORE_ROWS), total_of: Any = None):  # fmt: skip
        self.per_line, self.many, self.starts = per_line, many, starts
        widen: Widen | None = None if many is None else many.widen
        shapes = {"MANY_WIDE": (high, 4), "MANY": (high, 1), "PAIR_WIDE": (2, 4), "WIDE": (1, 4), "SINGLE": (1, 1)}
        tiles = {n: tile(r, b, kind, products) for n, (r, b) in shapes.items()}
        inner = Device(specialized(_products, f"{name}_products", HIGH=np.int64(high), **tiles))  # type: ignore[arg-type]
        size = np.int64(x_line // per_line)
        take = Device(specialized(_take, f"{name}_take", TOTAL=total_of or (total if size == 4 else _total_bytes), SIZE=size))  # type: ignore[arg-type]
        lines: dict[str, Any] = {"UNPACK": widener(widen), "PER_LINE": np.int64(per_line), "X_LINE": np.int64(x_line)}
        names: dict[str, Any] = {"PRODUCTS": inner, "TAKE": take, "PIECES": Device(specialized(_pieces, f"{name}_pieces", **lines)),
                                 "MANY_ROWS_": np.int64(starts[0] if widen else ROWS + 1), "PER_LINE": np.int64(per_line), "W_LINE": np.int64(w_line), "X_LINE": np.int64(x_line)}
        self.simple, self.smooth = (Native(specialized(_linear, f"{name}_{f.__name__}", activate=f, **names), "q" * 17 + "dd") for f in (simple, smooth))

    def __call__(self, x: Tensor, packed: Packed, row_scales: Tensor | None, other: Tensor | None, activation: str, scalars: Sequence[float],
                 dtype: torch.dtype | None) -> Tensor:  # fmt: skip
        """The linear layer.

        Args:
            x: ``[*, width]`` float32 or halves; int8 where the kind multiplies integers, with ``row_scales [*, 1]``.
            other: ``[*, o]`` of any float dtype.
            dtype: of the result; None: float32.
        """
        out = torch.empty((*x.shape[:-1], packed.out))
        if not out.numel():
            return out.to(dtype or torch.float32)
        rows = rows_of(x.float() if x.dtype in _HALVES else x)
        lines = -(-packed.width // self.per_line)
        if packed.width % self.per_line:  # whole lines are read
            rows = torch.nn.functional.pad(rows, (0, -packed.width % self.per_line))
        count, step, every = rows.shape[0], rows.stride(0) * rows.element_size(), packed.scales.shape[1]
        threads = threads_for(max(GRAIN, packed.out * packed.width) * count // 4)
        by = None if row_scales is None else row_scales.reshape(-1).float().contiguous()
        other, residual_step = as_rows(other, out.shape)
        if self.many is not None and count >= self.starts[1]:
            self.many(threads, rows, out, packed.weight, rows.shape[1], packed.step, packed.scales, packed.offsets, packed.bias, other, activation,
                      scalars_of(activation, scalars))  # fmt: skip
            return out if dtype is None else out.to(dtype)
        each = packed.step // self.per_line
        native = self.smooth if activation in SMOOTH else self.simple
        native(
            threads, rows.data_ptr(), step, count, packed.out, packed.weight.data_ptr(), lines, lines // each, each, packed.scales.data_ptr(), every,
            address(packed.offsets), address(by), packed.bias.data_ptr(), address(other), residual_step, out.data_ptr(), CODE[activation], *scalars_of(activation, scalars),
        )  # fmt: skip
        return out if dtype is None else out.to(dtype)


# -- what is supported -----------------------------------------------------------------------------------------------


def unfit_linear(x: Tensor, inputs: tuple[torch.dtype, ...], weight: Tensor, stored: torch.dtype, bits: int, scales: Tensor, zero_points: Tensor | None,
                 bias: Tensor | None, other: Tensor | None, activation: str, group: int, dtype: torch.dtype | None) -> str | None:  # fmt: skip
    """None, or why a linear layer whose weight has scales by groups can't be served."""
    if (reason := unfit() or not_cpu(x, weight, scales, zero_points, bias, other)) is not None:
        return reason
    if x.dtype not in inputs or weight.dtype != stored or weight.ndim != 2:
        wanted = " or ".join(str(d) for d in inputs)
        return f"x is {x.dtype}, the weight {weight.dtype} with {weight.ndim} axes; wanted {wanted}, and {stored} with 2"
    width = weight.shape[1] * 8 // bits
    if not x.ndim or x.shape[-1] != width or not width:
        return f"shapes {tuple(x.shape)} and {tuple(weight.shape)} do not belong together: {bits} bits a number"
    if (reason := unfit_group(group, width)) is not None:
        return reason
    for name, t in (("scales", scales), ("zero_points", zero_points)):
        if t is not None and t.shape != (weight.shape[0], -(-width // group)):
            return f"{name} have shape {tuple(t.shape)}; wanted {(weight.shape[0], -(-width // group))}"
    floats = (None, torch.float32, *_HALVES)
    if (None if other is None else other.dtype) not in floats or dtype not in floats:
        return f"the residual is {None if other is None else other.dtype}, the result {dtype}; float32, float16 and bfloat16 are supported"
    return unfit_epilogue(activation, None)


def unfit_group(group: int, width: int) -> str | None:
    """None, or why a group of so many inputs can't be served."""
    if group <= 0:
        return f"groups of {group} inputs"
    if group >= width or (group % EIGHT == 0 and group <= CHUNK):
        return None
    return f"groups of {group} inputs; multiples of 8 up to {CHUNK} are supported, and all {width}"

