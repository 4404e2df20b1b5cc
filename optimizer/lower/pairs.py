"""Pairs: a convolution of each channel by itself and the 1x1 convolution that alone reads it, as regions for one kernel.

They are found once kernels are chosen, where both compute in float32 and channels last; the stopwatch says whether one kernel is faster than the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright import ops
from graphwright.backends import llvm, llvm_f32
from graphwright.backends.base import NATIVE_LAST, Work, alike
from graphwright.backends.inductor import Fragment
from graphwright.backends.onednn import matrix
from graphwright.lower.chains import Chosen
from graphwright.lower.graph import Analysis, Region

#: What reports and files call the kernel's regions by.
MAKER = "llvm-separable"


def find(analysis: Analysis, chosen: Chosen) -> list[Region]:
    """Every pair that the kernel serves."""
    if llvm_f32.reason() or llvm.kernel("graphwright.conv2d_separable") is None:
        return []
    makers = {w.node: w for w in analysis.works}
    found = []
    for work in analysis.works:
        m = matrix(work)
        if m is None or not m.conv:
            continue
        first = makers.get(work.reads[m.x].value)
        if first is not None and first.node not in analysis.returned and analysis.readers[first.node] == [work] and serves([first, work], chosen):
            found.append(Region.of(analysis, [first, work]))
    return found


def serves(works: Sequence[Work], chosen: Chosen) -> bool:
    """Whether the kernel can take the place of these works and what was chosen for them."""
    if len(works) != 2:
        return False
    (first, second), (m, n) = works, map(matrix, works)
    if m is None or n is None or not llvm_f32.alone(first, m) or not _pointwise(second) or second.reads[n.x].value is not first.node:
        return False
    if m.int_weight is not None or n.int_weight is not None or any(w.out.device.type != "cpu" for w in works):
        return False
    for work, of in ((first, m), (second, n)):
        candidate = chosen[work][0]
        values = [form for k, form in enumerate(candidate.needs) if k in (of.x, of.other)]
        if candidate.precision != "f32" or {*values, *candidate.gives} != {NATIVE_LAST}:
            return False
    return True


def _pointwise(work: Work) -> bool:
    from graphwright.kernels.conv2d_separable import unfit_second

    m = matrix(work)
    if m is None or not m.conv or m.rank != 2 or m.weight.dtype != torch.float32 or work.val(m.x).dim() != 4 or not work.is_float:
        return False
    if m.groups != 1 or {*m.stride} != {1} or {*m.padding} != {0}:
        return False
    other = None if m.other is None else work.val(m.other)
    if other is not None and (m.other == m.x or not alike(other, work.out)):
        return False
    return unfit_second(m.weight.shape[1], tuple(m.weight.shape), m.activation, None if other is None else other.dtype) is None


class Pair:
    """The kernel for a pair, from its description; what it is called with are the fragment's inputs."""

    def __init__(self, fragment: Fragment):
        self._first, self._second = (_named(*step) for step in fragment.steps)
        self._inputs = len(fragment.inputs)
        self._x, other = self._first["x"]["value"], self._second["other"]
        self._other = None if other is None else other["value"]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [self._made(dict(enumerate(inputs)))(inputs[self._x], None if self._other is None else inputs[self._other])]

    def bound(self, constants: Sequence[Tensor]) -> Callable[..., Tensor]:
        """What serves the region with these constants, which are packed once; called with what the region reads, of any size."""
        call, x, other = self._made(dict(enumerate(constants, self._inputs - len(constants)))), self._x, self._other
        return (lambda *reads: call(reads[x])) if other is None else (lambda *reads: call(reads[x], reads[other]))

    def _made(self, values: Mapping[int, Tensor]) -> Callable[..., Tensor]:
        from graphwright.kernels.conv2d_separable import made

        def tensor(encoded: Any) -> Tensor | None:
            return None if encoded is None else values[encoded["value"]]

        a, b = self._first, self._second
        return made(tensor(a["weight"]), tensor(a["bias"]), *(a[k] for k in ("stride", "padding", "dilation", "activation", "scalars")),
                    tensor(b["weight"]), tensor(b["bias"]), b["activation"], b["scalars"])  # type: ignore[arg-type]  # fmt: skip


def _named(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a step by the names that ``graphwright.conv`` has for them."""
    row = ops.row(ops.resolve(op.removesuffix(".default")))
    assert row is not None
    given = {**dict(zip(row.params, args, strict=False)), **kwargs}
    named = {"other": None, "activation": "none", "scalars": (), **given, "x": given.get("x", given.get("input"))}
    return {**named, **{k: list(v) * (2 // len(v)) for k, v in named.items() if k in ("stride", "padding", "dilation")}}
