"""Our own kernels for linears whose weight has a scale for each group of inputs, in 8 or 4 bits.

The weight is read as it is stored and multiplied as float32: what pays where reading it is the work. Numbers of 4 bits may also be
held as bytes: twice the memory, less work to unpack; and where rows of the input are quantized at run time, they meet 4-bit weights as integers.
That the weight is made float once and for all is the other backends' offer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.backends import llvm
from graphwright.backends.base import NATIVE, ROWS, Candidate, IntWeight, Work
from graphwright.backends.llvm_int8 import whole_residual
from graphwright.backends.onednn import Matrix, matrix
from graphwright.backends.packs import packed
from graphwright.ops.weight_only import unpack

DEVICES = ("cpu",)


def reason() -> str | None:
    """None: why the kernels can't run here is said by the module for int8."""
    return None


def candidates(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Linears whose input is float32 and whose weight is integers in groups."""
    if "int8" not in allowed or llvm.kernel("graphwright.linear_w4") is None:
        return
    m = matrix(work)
    if m is None or m.conv or m.int_weight is None or m.int_weight.group is None or not _fits(work, m, m.int_weight):
        return
    kinds = (("w4", _four), ("w4-bytes", _bytes)) if m.int_weight.bits == 4 else (("w8-groups", _bytes),)
    for name, pack in kinds:
        yield Candidate(f"llvm.{name}", (NATIVE,) * len(work.reads), (NATIVE,), "int8", _builder(m, name, pack), floor_db=90.0)
    if m.int_weight.bits == 4 and work.reads[m.x].even and m.other != m.x:
        needs = tuple(ROWS if k == m.x else NATIVE for k in range(len(work.reads)))
        yield Candidate("llvm.w4a8", needs, (NATIVE,), "int8", functools.partial(_build_rows, m), floor_db=20.0)


def _fits(work: Work, m: Matrix, weight: IntWeight) -> bool:
    from graphwright.kernels.activations import unfit_epilogue
    from graphwright.kernels.grouped import unfit_group
    from graphwright.kernels.vnni import unfit

    read = work.reads[m.x]
    if unfit() or read.quantized or work.val(m.x).dtype != torch.float32 or not work.is_float or not whole_residual(work, m):
        return False
    assert weight.group is not None
    if unfit_group(weight.group, m.weight.shape[1]) or weight.values.dtype != (torch.uint8 if weight.bits == 4 else torch.int8):
        return False
    return unfit_epilogue(m.activation, None if m.other is None else work.val(m.other).dtype) is None


def _builder(m: Matrix, name: str, pack: Callable[[IntWeight, Tensor | None], tuple[Callable[..., Tensor], Any]]) -> Callable[[], Callable[..., Tensor]]:
    def build() -> Callable[..., Tensor]:
        weight, x, other, activation, scalars = m.int_weight, m.x, m.other, m.activation, m.scalars
        assert weight is not None
        apply, make = pack(weight, m.bias)
        ready = packed(make, f"llvm {name}", weight.values, weight.scales, weight.zero_points, m.bias)
        return lambda *r: apply(r[x], ready, None if other is None else r[other], activation, scalars)

    return build


def _build_rows(m: Matrix) -> Callable[..., Tensor]:
    from graphwright.kernels.linear_w4a8 import apply, pack

    weight, bias, x, other, activation, scalars = m.int_weight, m.bias, m.x, m.other, m.activation, m.scalars
    assert weight is not None and weight.group is not None
    group = weight.group
    ready = packed(lambda: pack(weight.values, weight.scales, weight.zero_points, bias, group), "llvm w4a8", weight.values, weight.scales,
                   weight.zero_points, bias)  # fmt: skip
    return lambda *r: apply(*r[x], ready, None if other is None else r[other], activation, scalars)


def _four(weight: IntWeight, bias: Tensor | None) -> tuple[Callable[..., Tensor], Callable[[], Any]]:
    from graphwright.kernels.linear_w4 import apply, pack

    assert weight.group is not None
    group = weight.group
    return apply, lambda: pack(weight.values, weight.scales, weight.zero_points, bias, group)


def _bytes(weight: IntWeight, bias: Tensor | None) -> tuple[Callable[..., Tensor], Callable[[], Any]]:
    from graphwright.kernels.linear_w8_groups import apply, pack

    assert weight.group is not None
    group, points = weight.group, weight.zero_points
    if weight.bits == 8:
        return apply, lambda: pack(weight.values, weight.scales, points, bias, group)
    centred = None if points is None else points.float() - 8
    return apply, lambda: pack((unpack(weight.values).to(torch.int8) - 8), weight.scales, centred, bias, group)
