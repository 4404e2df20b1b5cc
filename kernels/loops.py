"""The loops of a region: along which axes its rows lie, how long they are, and what has to be there before what.

Generators of kernels start from here: ``graphwright.kernels.generate`` for the CPU, ``graphwright.kernels.gpu.generate`` for Triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphwright.kernels.terms import Place, Terms
from graphwright.kernels.trees import Term, Unfit


@dataclass
class Axes:
    """The loops over rows and along a row: sizes, and the strides of every place in the order ``sizes``, ``outer``, ``columns``.

    Attributes:
        sizes: of the axes that tell one row from another.
        outer: of the axes along a row but the innermost.
        columns: of the innermost axis.
        across: the innermost axis goes from row to row, and ``outer`` has all along a row.
    """

    sizes: tuple[int, ...]
    outer: tuple[int, ...]
    columns: int
    strides: list[tuple[int, ...]]
    across: bool = False

    @classmethod
    def of(cls, space: Sequence[int], places: Sequence[Place], order: Sequence[int], rows: Sequence[int]) -> Axes:
        """Axes of one element are left out, and neighbours that every place walks through evenly are one.

        Args:
            order: of the axes, those of a row last.
            rows: the axes of a row that has to stay one; empty where any will do.
        """
        across, along = (_merged(space, places, [a for a in order if (a in rows) == inner]) for inner in (False, True))
        if not rows:
            across, along = across[:-1], across[-1:]
        along = along or [(1, [0] * len(places))]
        merged = [*across, *along]
        if max(len(across), len(along)) > 3:
            raise Unfit(f"rows along {max(len(across), len(along))} axes; 3 are supported")
        return cls(tuple(n for n, _ in across), tuple(n for n, _ in along[:-1]), along[-1][0], [tuple(s[k] for _, s in merged) for k in range(len(places))])

    @property
    def elements(self) -> int:
        """Of a row."""
        return math.prod(self.outer) * (1 if self.across else self.columns)

    def along(self, k: int) -> tuple[int, ...]:
        """Strides of a place along a row."""
        return self.strides[k][len(self.sizes) : -1 if self.across else None]

    def turned(self) -> Axes:
        """The same with rows beside each other innermost."""
        rows = len(self.sizes) - 1
        strides = [(*s[:rows], *s[rows + 1 :], s[rows]) for s in self.strides]
        return Axes(self.sizes[:-1], (*self.outer, self.columns), self.sizes[-1], strides, across=True)


def _merged(space: Sequence[int], places: Sequence[Place], axes: Sequence[int]) -> list[tuple[int, list[int]]]:
    merged: list[tuple[int, list[int]]] = []
    for a in axes:
        steps = [p.strides[a] for p in places]
        if space[a] == 1:
            continue
        if merged and all(o == s * space[a] for o, s in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = merged[-1][0] * space[a], steps
        else:
            merged.append((space[a], steps))
    return merged


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
        self.narrow = [r.width == 1 and region.columns > 1 for r in results]
        writes = []
        for k, (shape, strides, dtype) in enumerate(self.outs):
            writes.append(Place(k, 0, region.steps(shape, strides), dtype))
        self.fixed = region.fixed or any(self.narrow)
        self.places = [*region.reads, *writes]
        rows = region.rows if self.fixed else ()
        self.axes = Axes.of(region.space, self.places, self._order(rows), rows)
        bounds = {b for t in self._all() for b in t.bounds}
        self.cuts = sorted(bounds | {0, self.axes.columns}) if bounds else []

    def beside(self) -> bool:
        """Whether more of what is long lies evenly from row to row than along a row, by bytes."""
        axes = self.axes
        if not self.fixed or self.cuts or not axes.sizes:
            return False
        score = 0
        for place, strides in zip(self.places, axes.strides, strict=True):
            if strides[len(axes.sizes) - 1] and strides[-1]:
                score += place.dtype.itemsize * ((strides[len(axes.sizes) - 1] == 1) - (strides[-1] == 1))
        return score > 0

    def _order(self, rows: Sequence[int]) -> list[int]:
        """The axes as they lie in the first result, outermost first; those of a row last, as they lie in the first place that has them all."""
        first = self.places[len(self.region.reads)].strides
        inner = next((p.strides for p in self.places if all(p.strides[a] or self.region.space[a] == 1 for a in rows)), first)
        across = sorted((a for a in range(len(first)) if a not in rows), key=lambda a: -first[a])
        return [*across, *sorted(rows, key=lambda a: -inner[a])]

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
                    even = not any(self.axes.along(int(term.text)))
                case "call":
                    even = all(self._per_row(a) for a in term.args)
                case _:
                    even = term.op != "cat"
            self._even[term] = even
        return self._even[term]
