"""The loops of a region: along which axes its rows lie, how long they are, and what has to be there before what.

Generators of kernels start from here: ``graphwright.kernels.generate`` for the CPU, ``graphwright.kernels.gpu.generate`` for Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphwright.kernels.formulas import Term, Unfit
from graphwright.kernels.terms import Place, Terms


@dataclass
class Axes:
    """The loop over rows and the loop along a row: sizes, and the strides of every place in that order."""

    sizes: tuple[int, ...]
    columns: int
    strides: list[tuple[int, ...]]

    @classmethod
    def of(cls, space: Sequence[int], places: Sequence[Place], order: Sequence[int], fixed: bool) -> Axes:
        """Axes of one element are left out, and neighbours that every place walks through evenly are one."""
        kept = [a for a in order if space[a] > 1 or fixed and a == len(space) - 1]
        merged: list[tuple[int, list[int]]] = []
        for k, a in enumerate(kept):
            steps = [p.strides[a] for p in places]
            inner = fixed and k == len(kept) - 1
            if merged and not inner and all(o == s * space[a] for o, s in zip(merged[-1][1], steps, strict=True)):
                merged[-1] = merged[-1][0] * space[a], steps
            else:
                merged.append((space[a], steps))
        if not merged:
            merged = [(1, [0] * len(places))]
        *rows, (columns, _) = merged
        if len(rows) > 3:
            raise Unfit(f"rows along {len(rows)} axes; 3 are supported")
        return cls(tuple(n for n, _ in rows), columns, [tuple(s[k] for _, s in merged) for k in range(len(places))])


def _dense(x: Tensor) -> tuple[int, ...]:
    """The strides of x where it fills its memory without gaps, else those of a contiguous tensor."""
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride != reach:
            return torch.empty(x.shape, device="meta").stride()
        reach *= size
    return x.stride()


@dataclass
class Loops:
    """A region's results as terms, and the places that they are read from and written to.

    Attributes:
        terms, outs, narrow: of each result: its term, its shape, strides and dtype, and whether it is one number per row.
        fixed: as of ``Terms``, or because a result is narrow.
        places, axes: inputs, then results; how the loops go through them.
        cuts: where tensors glued along a row begin, and the ends; empty without any.
    """

    region: Terms
    _levels: dict[Term, int] = field(default_factory=dict, init=False)
    _even: dict[Term, bool] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        region = self.region
        results = [region.values[n] for n in region.outputs]
        self.terms = [r.term for r in results]
        self.outs = [(tuple(r.tensor.shape), tuple(_dense(r.tensor)), r.tensor.dtype) for r in results]
        self.narrow = [r.width == 1 and region.space[-1] > 1 for r in results]
        writes = []
        for k, (shape, strides, dtype) in enumerate(self.outs):
            wide = [s if n > 1 else 0 for n, s in zip(shape, strides, strict=True)]
            writes.append(Place(k, 0, tuple(wide) + (0,) * (len(region.space) - len(shape)), dtype))
        self.fixed = region.fixed or any(self.narrow)
        last = len(region.space) - 1
        first = writes[0].strides
        order = sorted(range(last if self.fixed else last + 1), key=lambda a: -first[a]) + [last] * self.fixed
        self.places = [*region.reads, *writes]
        self.axes = Axes.of(region.space, self.places, order, self.fixed)
        bounds = {b for t in self._all() for b in t.bounds}
        self.cuts = sorted(bounds | {0, self.axes.columns}) if bounds else []

    def _all(self) -> dict[Term, None]:
        found: dict[Term, None] = {}
        stack = list(self.terms)
        while stack:
            term = stack.pop()
            if term not in found:
                found[term] = None
                stack += term.args
        return found

    def _level(self, term: Term) -> int:
        """The loop in which a term can be computed first; of a number per row, the loop before which it is there."""
        if term not in self._levels:
            inner = max((self._level(a) for a in term.args), default=0)
            self._levels[term] = inner + (term.op in ("sum", "max"))
        return self._levels[term]

    def _per_row(self, term: Term) -> bool:
        if term not in self._even:
            match term.op:
                case "read":
                    even = self.axes.strides[int(term.text)][-1] == 0
                case "call":
                    even = all(self._per_row(a) for a in term.args)
                case _:
                    even = term.op != "cat"
            self._even[term] = even
        return self._even[term]
