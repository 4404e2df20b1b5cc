"""Rows that lie beside each other: the loops of a generated kernel where the contiguous axis is none of those that are reduced.

A sum over the axis T of [B, T, D], say: many rows are done at once, the lanes of a vector going from row to row. Each reduction is an
array of as many numbers, which the loop along the rows adds to; numbers per row that a loop reads are computed ahead of it. Sums are
sums of sums of at most 64 numbers, as accurate as those along a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphwright.kernels.generate import _HOW, _KEEP, _LOADED, _START, Writer
from graphwright.kernels.terms import MAX_COLUMNS
from graphwright.kernels.trees import Term

#: Rows that are done at once: at the most, and at the least where there are so many.
_MOST, _LEAST = 512, 64
#: Numbers of a place that should stay in the cache from one loop along the rows to the next.
_CACHED = 65536
#: Numbers that are summed in one.
_BLOCK = 64


@dataclass
class Across(Writer):
    """Writes the kernel of a region whose rows are done beside each other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.axes = self.axes.turned()
        self._arrays: list[str] = []

    def _tile(self) -> int:
        fits = MAX_COLUMNS // self.axes.elements if self._kept else _CACHED // self.axes.elements
        return min(self.axes.columns, max(_LEAST if not self._kept else 16, min(_MOST, fits // 16 * 16)))

    def _keeps(self) -> bool:
        return self.axes.elements * 16 <= MAX_COLUMNS

    def _buffers(self) -> list[str]:
        return [*super()._buffers(), *(f"    {name} = f32(lanes())" for name in self._arrays)]

    def _buffer(self) -> int:
        return MAX_COLUMNS + 16 if self._kept else 0

    def _array(self, stem: str) -> str:
        self._arrays.append(self._name(stem))
        return self._arrays[-1]

    def _inside(self, index: str) -> str:
        line = ""
        for a in range(len(self.axes.outer)):
            line = f"({line} * m{a} + k{a})" if line else f"k{a}"
        return f"{line} * tile + {index}"

    def _lanes(self, indent: str, *body: str) -> None:
        if body:
            self.lines += [f"{indent}for i in independent(0, count):", *(f"{indent}    {line}" for line in body)]

    def _loop(self, level: int, indent: str) -> None:
        roots, sums = self._roots(level), self._sums(level)
        if not roots:
            return
        for term in sums:
            self._rows[term] = self._array("row")
        self._ahead(roots, level, indent)
        self._lanes(indent, *(f"{self._rows[t]}[i] = {_START[t.op]}" for t in sums))
        parts = {t: self._array("part") for t in sums if t.op == "sum"}
        last = len(self.axes.outer) - 1
        for a in range(last):
            self.lines.append(f"{indent}for k{a} in range(m{a}):")
            indent += "    "
        if parts:
            self.lines.append(f"{indent}for first in range(0, m{last}, {_BLOCK}):")
            indent += "    "
            self._lanes(indent, *(f"{part}[i] = real(0.0)" for part in parts.values()))
        self.lines.append(f"{indent}for k{last} in range({f'first, min(first + {_BLOCK}, m{last})' if parts else f'm{last}'}):")
        self.lines.append(f"{indent}    for i in independent(0, count):")
        inner, names = indent + "        ", {}
        for term in roots:
            self._lane(term, level, names, inner)
        for k in self._stores(level):
            self._store(k, self._lane(self.terms[k], level, names, inner), inner)
        for term in sums:
            to = parts.get(term, self._rows[term])
            self.lines.append(f"{inner}{to}[i] = {_HOW[term.op]}({to}[i], {self._lane(term.args[0], level, names, inner)})")
        for term, name in self._kept.items():
            if self._level(term) == level:
                self.lines.append(f"{inner}{name}[{self._inside('i')}] = {self._lane(term, level, names, inner)}")
        self._lanes(indent, *(f"{self._rows[t]}[i] = plus({self._rows[t]}[i], {part}[i])" for t, part in parts.items()))

    def _ahead(self, roots: Sequence[Term], level: int, indent: str) -> None:
        """The numbers per row that a loop reads, where they cost more than reading them."""
        stack, seen, wanted = list(roots), set(), []
        while stack:
            term = stack.pop()
            if term in seen or term in self._kept and self._level(term) < level:
                continue
            seen.add(term)
            if not self._per_row(term):
                stack += term.args
            elif term.op == "call" and term.family == "f" and term not in self._rows and self._each(term) > _KEEP:
                wanted.append(term)
        if not wanted:
            return
        self.lines.append(f"{indent}for i in independent(0, count):")
        names: dict[Term, str] = {}
        for term in reversed(wanted):
            made = self._lane(term, level, names, indent + "    ")
            array = self._array("row")
            self.lines.append(f"{indent}    {array}[i] = {made}")
            self._rows[term] = array

    def _each(self, term: Term) -> float:
        """What computing a number per row costs."""
        if term in self._rows or term.op in ("read", "constant"):
            return float(term.op != "constant")
        return term.cost + sum(map(self._each, term.args))

    def _lane(self, term: Term, level: int, names: dict[Term, str], indent: str) -> str:
        """The name of a term in a loop over rows beside each other; what it needs is written first."""
        if term.op == "constant":
            return term.text
        if term in names:
            return names[term]
        if term in self._rows:
            text = f"{self._rows[term]}[i]"
        elif term in self._kept and self._level(term) < level:
            text = f"{self._kept[term]}[{self._inside('i')}]"
        elif term.op == "read":
            text = _LOADED[term.family].format(f"x{term.text}[{self._index(int(term.text), 'i')}]")
        else:
            text = term.text.format(*[self._lane(a, level, names, indent) for a in term.args])
        names[term] = self._name("v")
        self.lines.append(f"{indent}{names[term]} = {text}")
        return names[term]

    def _end(self, indent: str) -> None:
        ends = [(k, t) for k, t in enumerate(self.terms) if self.narrow[k]]
        if ends:
            self.lines.append(f"{indent}for i in independent(0, count):")
            names: dict[Term, str] = {}
            for k, term in ends:
                self._store(k, self._lane(term, 1 << 30, names, indent + "    "), indent + "    ")
