"""Narrow weights in the order in which the matrix units take them, and the device code that widens them.

A weight [o, i] is cut into chunks of 16 rows by C columns; the 32 lanes of a warp each hold what the first operand of ``mma`` and
``wgmma`` wants of it, next to each other. So a tile goes from memory through wide loads straight into the registers of the product: no
shuffles, no second trip through shared memory. That order is made once (``packed``). Row ``n = 16 a + 8 r + g`` and column
``k = C b + 32 d + c`` of the weight; lane ``4 g + t``:

- 4 bits for half-precision products: C is 64, or 32 for groups of 32; ``c = 16 s + 8 h + 2 t + p``; int16 ``[a, b, g, t, d, r, p]`` whose
  nibble ``2 s + h`` is the number;
- 8 bits for half-precision products: C is 32, the same c; uint8 ``[a, b, g, t, s, h, r, p]`` holds the number plus 128;
- 4 bits for int8 products: C as for the first, ``c = 16 h + 4 t + p``; uint8 ``[a, b, g, t, d, r, p]`` whose nibble h is the number less 8,
  in two's complement.

Widened exactly: whole numbers less the whole part of their zero point fit float16, bfloat16 and int8. Scales, and what is left of
zero points that are not whole, are applied to float32 sums of a group.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.errors import GraphwrightError
from graphwright.kernels.gpu.language import CODE, activate
from graphwright.kernels.gpu.launch import Config, Launch, cdiv
from graphwright.ops.weight_only import unpack

#: Columns of a turn of the main loop; rows of the weight are padded to whole turns.
TURN = 128

#: Whole parts of zero points: with these, all differences fit in int8 and bfloat16.
_LEAST, _MOST = -112, 127


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the kernels read it; ``T = ceil(i / 128)`` turns, ``P`` is o padded to whole chunks, ``U`` groups in a turn (at least 1).

    Attributes:
        out, width, group: o, i, and columns of a group (``width`` or more: one for the row).
        weight: ``[P / 16, ...]``, see the module's docstring; one row of chunks is contiguous.
        scales: ``[T, P, U]``, or ``[1, P, 1]`` where a group is the row.
        whole: int8 like ``scales``, or None where every zero point is the middle: 8 for 4 bits, 0 for 8.
        rest: float32 like ``scales``: zero points less ``whole``; None where all are whole.
    """

    out: int
    width: int
    group: int
    weight: Tensor
    scales: Tensor
    whole: Tensor | None
    rest: Tensor | None


def pack(weight: Tensor, scales: Tensor, zero_points: Tensor | None, group: int, form: str) -> Packed:
    """Order a weight for ``form``: ``"w4"``, ``"w8"`` or ``"w4a8"``; arguments as for the ops. Looks at the zero points' values.

    Where the tensors are on the ``meta`` device, zero points are taken to be whole.
    """
    q = weight if form == "w8" else unpack(weight)
    out, width = q.shape
    bias = 128 if form == "w8" else 0
    q = torch.nn.functional.pad(q.to(torch.int16), (0, -width % TURN, 0, -out % 16)) + bias
    blocks, deep = q.shape[0] // 16, 1 if group == 32 < width else 2
    if form == "w4a8":
        cells = (q - 8 & 15).reshape(blocks, 2, 8, -1, deep, 2, 4, 4).permute(0, 3, 2, 6, 4, 1, 7, 5)  # a r g b d h t p -> a b g t d r p h
        flat = (cells[..., 0] | cells[..., 1] << 4).to(torch.uint8)
    else:
        cells = q.reshape(blocks, 2, 8, -1, 1 if form == "w8" else deep, 2, 2, 4, 2)  # a r g b d s h t p
        if form == "w8":
            flat = cells.permute(0, 3, 4, 2, 7, 5, 6, 1, 8).to(torch.uint8)
        else:
            cells = cells.permute(0, 3, 2, 7, 4, 1, 8, 5, 6)
            flat = cells[..., 0, 0] | cells[..., 0, 1] << 4 | cells[..., 1, 0] << 8 | cells[..., 1, 1] << 12
    whole, rest = _split(zero_points, 0 if form == "w8" else 8)
    return Packed(out, width, group, flat.reshape(blocks, -1).contiguous(), *(_by_turn(t, width, group) for t in (scales, whole, rest)))  # type: ignore[arg-type]


def _split(zero_points: Tensor | None, middle: int) -> tuple[Tensor | None, Tensor | None]:
    if zero_points is None:
        return None, None
    points = zero_points.float()
    whole = points.nan_to_num(nan=0.0).round().clamp(_LEAST, _MOST)
    rest = points - whole
    fractions = rest.device.type != "meta" and bool((rest != 0).any())
    return whole.to(torch.int8), rest if fractions else None


def _by_turn(values: Tensor | None, width: int, group: int) -> Tensor | None:
    """``[o, groups]`` as ``[T, P, U]``; a group longer than a turn is repeated. Padding is 0."""
    if values is None:
        return None
    out = values.shape[0]
    if group >= width:
        return torch.nn.functional.pad(values, (0, 0, 0, -out % 16))[None, :, :1].contiguous()
    turns, each = cdiv(width, TURN), max(TURN // group, 1)
    values = values.repeat_interleave(max(group // TURN, 1), 1)[:, : turns * each]
    values = torch.nn.functional.pad(values, (0, turns * each - values.shape[1], 0, -out % 16))
    return values.reshape(-1, turns, each).transpose(0, 1).contiguous()


@dataclass(frozen=True)
class _Source:
    """What a packed weight was made of: tensors (not kept alive), their versions, and the group."""

    tensors: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    group: int

    def is_of(self, tensors: tuple[Tensor, ...], group: int) -> bool:
        same = len(tensors) == len(self.tensors) and all(ref() is t for ref, t in zip(self.tensors, tensors, strict=True))
        return same and group == self.group and self.versions == tuple(map(_version, tensors))


_KNOWN: dict[tuple[int, str], tuple[_Source, Packed]] = {}


def packed(weight: Tensor, scales: Tensor, zero_points: Tensor | None, group: int, form: str) -> Packed:
    """``pack``, remembered for as long as the weight lives and none of the three is changed in place.

    Raises:
        GraphwrightError: a CUDA graph is being captured, and the weight was not packed before.
    """
    key = (id(weight), form)
    tensors = (weight, scales) if zero_points is None else (weight, scales, zero_points)
    known = _KNOWN.get(key)
    if known is not None and known[0].is_of(tensors, group):
        return known[1]
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        raise GraphwrightError("a weight was not packed when the capture of a CUDA graph began", where=f"linear_{form}",
                               hint="Run the op once before the capture.")  # fmt: skip
    made = pack(weight, scales, zero_points, group, form)
    refs = (weakref.ref(weight, lambda _: _KNOWN.pop(key, None)), *map(weakref.ref, tensors[1:]))
    _KNOWN[key] = (_Source(refs, tuple(map(_version, tensors)), group), made)
    return made


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


# -- device code -----------------------------------------------------------------------------------------------------
# 4 bits: 0x6400 | q is the float16 1024 + q, and 0x6400 | q << 4 is 1024 + 16 q; 0x4300 | q is the bfloat16 128 + q.
# 8 bits: 0x6400 | u is the float16 1024 + u, and 0x4b000000 | u the float32 2^23 + u.

_W4_FP16 = tl.constexpr("""{
.reg .b32 w, a, b, c;
mov.b32 a, 0x64006400;
add.rn.f16x2 a, a, $5;
mov.b32 b, 0xd400d400;
sub.rn.f16x2 b, b, $5;
mov.b32 c, 0x2c002c00;
shr.u32 w, $4, 8;
lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
lop3.b32 $2, w, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $3, w, 0x00f000f0, 0x64006400, 0xea;
sub.rn.f16x2 $0, $0, a;
fma.rn.f16x2 $1, $1, c, b;
sub.rn.f16x2 $2, $2, a;
fma.rn.f16x2 $3, $3, c, b;
}""")

_W4_BF16 = tl.constexpr("""{
.reg .b32 w, b, c, m;
mov.b32 c, 0x3f803f80;
mov.b32 m, 0xbf80bf80;
mov.b32 b, 0xc300c300;
fma.rn.bf16x2 b, $5, m, b;
lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
shr.u32 w, $4, 4;
lop3.b32 $1, w, 0x000f000f, 0x43004300, 0xea;
shr.u32 w, $4, 8;
lop3.b32 $2, w, 0x000f000f, 0x43004300, 0xea;
shr.u32 w, $4, 12;
lop3.b32 $3, w, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, $0, c, b;
fma.rn.bf16x2 $1, $1, c, b;
fma.rn.bf16x2 $2, $2, c, b;
fma.rn.bf16x2 $3, $3, c, b;
}""")

_W8_FP16 = tl.constexpr("""{
.reg .b32 a, b, m;
mov.b32 m, 0x64646464;
mov.b32 a, 0x64806480;
add.rn.f16x2 b, a, $4;
add.rn.f16x2 a, a, $3;
prmt.b32 $0, $2, m, 0x4140;
prmt.b32 $1, $2, m, 0x4342;
sub.rn.f16x2 $0, $0, a;
sub.rn.f16x2 $1, $1, b;
}""")

_W8_BF16 = tl.constexpr("""{
.reg .b32 m;
.reg .f32 p, q;
mov.b32 m, 0x4b000000;
prmt.b32 p, $2, m, 0x7650;
prmt.b32 q, $2, m, 0x7651;
sub.rn.f32 p, p, $3;
sub.rn.f32 q, q, $4;
cvt.rn.bf16x2.f32 $0, q, p;
prmt.b32 p, $2, m, 0x7652;
prmt.b32 q, $2, m, 0x7653;
sub.rn.f32 p, p, $5;
sub.rn.f32 q, q, $6;
cvt.rn.bf16x2.f32 $1, q, p;
}""")

# Nibbles are in two's complement: shifted to the top of a byte, they are 16 (q - 8). With zero points: (q + 240) - (z + 112) - 128.
_W4A8 = tl.constexpr("""{
shl.b32 $0, $2, 4;
and.b32 $0, $0, 0xf0f0f0f0;
and.b32 $1, $2, 0xf0f0f0f0;
}""")

_W4A8_ZERO = tl.constexpr("""{
.reg .b32 w;
shr.u32 w, $2, 4;
lop3.b32 $0, $2, 0x0f0f0f0f, 0xf8f8f8f8, 0x6a;
lop3.b32 $1, w, 0x0f0f0f0f, 0xf8f8f8f8, 0x6a;
sub.u32 $0, $0, $3;
sub.u32 $1, $1, $3;
xor.b32 $0, $0, 0x80808080;
xor.b32 $1, $1, 0x80808080;
}""")


@triton.jit
def by_lane(z, A: tl.constexpr):
    """A number per row ``z [16 A]`` for the axes (a, g, cells, r, p) of a tile."""
    return tl.reshape(tl.permute(tl.reshape(z, (A, 2, 8)), (0, 2, 1)), (A, 8, 1, 2, 1))


@triton.jit
def widen_w4(w, z, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Chunks ``w [A, cells]`` less whole numbers ``z [16 A]`` of DTYPE: ``[16 A, C]`` of DTYPE."""
    A: tl.constexpr = w.shape[0]
    DEEP: tl.constexpr = w.shape[1] // 128
    w = tl.reshape(w, (A, 8, 4 * DEEP, 2, 2))
    z = tl.broadcast_to(by_lane(z, A), (A, 8, 4 * DEEP, 2, 2))
    if PTX:
        if DTYPE == tl.float16:
            n0, n1, n2, n3 = tl.inline_asm_elementwise(_W4_FP16, "=&r,=&r,=&r,=&r,r,r", [w, z], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2)
        else:
            n0, n1, n2, n3 = tl.inline_asm_elementwise(_W4_BF16, "=&r,=&r,=&r,=&r,r,r", [w, z], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2)
    else:
        v, y = w.to(tl.int32), z.to(tl.float32)
        n0 = ((v & 15).to(tl.float32) - y).to(DTYPE)
        n1 = ((v >> 4 & 15).to(tl.float32) - y).to(DTYPE)
        n2 = ((v >> 8 & 15).to(tl.float32) - y).to(DTYPE)
        n3 = ((v >> 12 & 15).to(tl.float32) - y).to(DTYPE)
    q = tl.join(tl.join(n0, n1), tl.join(n2, n3))
    q = tl.reshape(q, (A, 8, 4, DEEP, 2, 2, 2, 2))  # a g t d r p h s
    return tl.reshape(tl.permute(q, (0, 4, 1, 3, 7, 6, 2, 5)), (A * 16, DEEP * 32))


@triton.jit
def widen_w8(w, z, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Chunks ``w [A, cells]`` less whole numbers ``z [16 A]`` of DTYPE: ``[16 A, C]`` of DTYPE."""
    A: tl.constexpr = w.shape[0]
    w = tl.reshape(w, (A, 8, 16, 2, 2))
    if PTX:
        if DTYPE == tl.float16:
            z = tl.broadcast_to(by_lane(z, A), (A, 8, 16, 2, 2))
            q = tl.inline_asm_elementwise(_W8_FP16, "=&r,=&r,r,r,r", [w, z], dtype=tl.float16, is_pure=True, pack=4)
        else:
            z = tl.broadcast_to(by_lane(z.to(tl.float32) + 8388736.0, A), (A, 8, 16, 2, 2))
            q = tl.inline_asm_elementwise(_W8_BF16, "=&r,=&r,r,f,f,f,f", [w, z], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        q = (w.to(tl.float32) - tl.broadcast_to(by_lane(z.to(tl.float32) + 128.0, A), (A, 8, 16, 2, 2))).to(DTYPE)
    q = tl.reshape(q, (A, 8, 4, 2, 2, 2, 2))  # a g t s h r p
    return tl.reshape(tl.permute(q, (0, 5, 1, 3, 4, 2, 6)), (A * 16, 32))


@triton.jit
def beside(left, right):
    """``[n, c]`` and ``[n, c]`` as ``[n, 2 c]``."""
    n: tl.constexpr = left.shape[0]
    c: tl.constexpr = left.shape[1]
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (n, 2 * c))


@triton.jit
def widened(w, z, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """``widen_w4`` or ``widen_w8``."""
    if BITS == 4:
        return widen_w4(w, z, DTYPE, PTX)
    else:
        return widen_w8(w, z, DTYPE, PTX)


@triton.jit
def load_weight(at, z, BITS: tl.constexpr, CELLS: tl.constexpr, COUNT: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """COUNT (1, 2 or 4) chunks of CELLS that follow each other, widened: ``[16 A, COUNT C]``."""
    q = widened(tl.load(at), z, BITS, DTYPE, PTX)
    if COUNT > 1:
        q = beside(q, widened(tl.load(at + CELLS), z, BITS, DTYPE, PTX))
    if COUNT > 2:
        last = beside(widened(tl.load(at + 2 * CELLS), z, BITS, DTYPE, PTX), widened(tl.load(at + 3 * CELLS), z, BITS, DTYPE, PTX))
        q = beside(q, last)
    return q


@triton.jit
def widen_w4a8(w, z, ZERO: tl.constexpr, PTX: tl.constexpr):
    """Chunks ``w [A, cells] uint8`` as int8 ``[16 A, C]``: less whole numbers ``z [16 A] int8`` if ZERO, else 16 times what they are less 8."""
    A: tl.constexpr = w.shape[0]
    DEEP: tl.constexpr = w.shape[1] // 256
    w = tl.reshape(w, (A, 8, 4 * DEEP, 2, 4))
    if PTX:
        if ZERO:
            z = tl.broadcast_to(by_lane((z.to(tl.int32) + 112).to(tl.uint8), A), (A, 8, 4 * DEEP, 2, 4))
            low, high = tl.inline_asm_elementwise(_W4A8_ZERO, "=&r,=&r,r,r", [w, z], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
        else:
            low, high = tl.inline_asm_elementwise(_W4A8, "=&r,=&r,r", [w], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        v = w.to(tl.int32) ^ 0x88
        if ZERO:
            y = tl.broadcast_to(by_lane(z.to(tl.int32), A), (A, 8, 4 * DEEP, 2, 4))
            low, high = ((v & 15) - y).to(tl.int8), ((v >> 4) - y).to(tl.int8)
        else:
            low, high = ((v & 15) * 16 - 128).to(tl.int8), ((v >> 4) * 16 - 128).to(tl.int8)
    q = tl.reshape(tl.join(low, high), (A, 8, 4, DEEP, 2, 4, 2))  # a g t d r p h
    return tl.reshape(tl.permute(q, (0, 4, 1, 3, 6, 2, 5)), (A * 16, DEEP * 32))


@triton.jit
def load_w4a8(at, z, CELLS: tl.constexpr, COUNT: tl.constexpr, ZERO: tl.constexpr, PTX: tl.constexpr):
    """COUNT (1 or 2) chunks of CELLS that follow each other, widened: ``[16 A, COUNT C]``."""
    q = widen_w4a8(tl.load(at), z, ZERO, PTX)
    if COUNT > 1:
        q = beside(q, widen_w4a8(tl.load(at + CELLS), z, ZERO, PTX))
    return q


@triton.jit
def of_group(values, J: tl.constexpr):
    """Column J of ``values [n, U]``, U 1, 2 or 4."""
    n: tl.constexpr = values.shape[0]
    U: tl.constexpr = values.shape[1]
    if U == 1:
        return tl.reshape(values, (n,))
    elif U == 2:
        even, odd = tl.split(values)
        if J == 0:
            return even
        else:
            return odd
    else:
        even, odd = tl.split(tl.reshape(values, (n, 2, 2)))
        if J % 2 == 0:
            low, high = tl.split(even)
        else:
            low, high = tl.split(odd)
        if J // 2 == 0:
            return low
        else:
            return high


@triton.jit
def finish_kernel(
    parts, bias, other, out, rows, columns, other_row, other_column, a, b, SPLIT: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr
):
    """``activation(sum of parts [SPLIT, rows, columns] + bias + other)``, the parts in order."""
    m = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < columns
    at = m.to(tl.int64) * columns + n
    total = tl.load(parts + at, inside, other=0.0)
    for k in tl.static_range(1, SPLIT):
        total += tl.load(parts + k * rows.to(tl.int64) * columns + at, inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + n, inside, other=0.0).to(tl.float32)
    if other is not None:
        total += tl.load(other + m.to(tl.int64) * other_row + n * other_column, inside, other=0.0).to(tl.float32)
    tl.store(out + at, activate(total, a, b, ACT).to(out.dtype.element_ty), inside)


def finishing(parts: Tensor, bias: Tensor | None, other: Tensor | None, out: Tensor, a: float, b: float, activation: str, config: Config) -> Launch:
    """The second launch of a split product: ``parts [SPLIT, rows, o]`` into ``out [*, o]``; ``other [rows, o]``."""
    split, rows, columns = parts.shape
    steps = (0, 0) if other is None else other.stride()
    return Launch(finish_kernel, (cdiv(columns, 512), rows), (parts, bias, other, out, rows, columns, *steps, a, b), {"SPLIT": split, "ACT": CODE[activation], "BLOCK": 512}, config)
