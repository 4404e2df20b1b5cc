"""One kernel for a region of elementwise ops, broadcasts and reductions over any axes, the same for all.

A region comes as plain data (inputs, steps, outputs: see ``graphwright.backends.inductor.Fragment``) with the tensors that a trial
run gave. Its ops become terms (``formulas``), the terms a loop over rows, and each row one loop per *level*: level 0 is what
the inputs give, and what a reduction of level k gives is there at level k + 1. A number that a later level needs again is computed again or
kept in a row buffer, whichever costs less. Where numbers lie beside each other across rows, not along them, many rows are done at once
(``generate_across``). Views of inputs, and cuts of them glued together along the last axis, cost nothing: they
are addresses. ``Source.text`` is the kernel as a person would write it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphwright.kernels.loops import Loops
from graphwright.kernels.terms import MAX_COLUMNS, Terms
from graphwright.kernels.trees import Term

#: Longest row whose length is put into the code.
_FIXED = 512
#: Elements of a tile where rows are long and nothing is reduced.
_TILE = 4096
#: Longest loop that sums in one number per lane: longer ones sum sums.
_BLOCK = 4096
#: Costs, an addition being 1: reading once more what is in the L1 cache, and keeping a number for a later level.
_READ, _APART, _KEEP = 1.0, 3.0, 4.0
_POINTERS = {torch.float32: "f32", torch.bool: "u8", torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64"}
_START = {"sum": "real(0.0)", "max": "real(-inf)"}
_HOW = {"sum": "plus", "max": "larger"}
_LOADED = {"f": "{}", "b": "{} != 0", "i": "np.int64({})"}
_STORED = {torch.bool: "np.uint8(1) if {0} else np.uint8(0)", torch.uint8: "np.uint8({0})", torch.int8: "np.int8({0})",
           torch.int32: "np.int32({0})"}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A generated kernel.

    Attributes:
        name: from the text: equal kernels of different regions are one.
        text: device code.
        slots: ``struct`` letters of its parameters after the two of OpenMP.
        sizes: rows, columns, sizes of the row axes but the first, of the outer axes along a row, tiles, tile: its first parameters.
        reads, writes: the addresses that follow, each with its byte strides along the row axes, its strides in elements along the outer
            axes where there are any, and its inner stride where it is neither 0 nor 1.
        outs: shape, strides and dtype of each result.
        buffer: floats of a row buffer.
        work: additions per call, about.
    """

    name: str
    text: str
    slots: str
    sizes: tuple[int, ...]
    reads: tuple[tuple[int, int, tuple[int, ...]], ...]
    writes: tuple[tuple[int, int, tuple[int, ...]], ...]
    outs: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    buffer: int
    work: float


def generate(inputs: Sequence[Any], steps: Sequence[Any], outputs: Sequence[int], values: Sequence[Any]) -> Source:
    """The kernel of a region.

    Args:
        inputs, steps, outputs: of the fragment.
        values: of a trial run: the inputs, then what each step gave.

    Raises:
        Unfit: no kernel of this kind can serve it, and why.
    """
    from graphwright.kernels.generate_across import Across

    terms = Terms(len(inputs), steps, outputs, values)
    made = Writer(terms)
    return (Across(terms) if made.beside() else made).source()


# -- from terms to text ----------------------------------------------------------------------------------------------


@dataclass
class Writer(Loops):
    """Writes the kernel of a region."""

    lines: list[str] = field(default_factory=list)
    _rows: dict[Term, str] = field(default_factory=dict)
    _kept: dict[Term, str] = field(default_factory=dict)
    _costs: dict[Term, float] = field(default_factory=dict)
    _planned: set[tuple[Term, int]] = field(default_factory=set)
    _count: int = 0

    def source(self) -> Source:
        levels = 1 + max(self._level(t) for t in self.terms)
        for level in reversed(range(levels)):  # what is kept at one level may need something kept before
            for term in self._roots(level):
                self._plan(term, level)
        body = self._body(levels)
        buffer = self._buffer()
        slots, reads, writes = self._parameters()
        text = "\n".join(["def NAME(params):", f'    """{self._title()}"""', *body, ""])
        name = "region_" + hashlib.sha256(f"{text}{buffer}".encode()).hexdigest()[:16]
        cost = sum(t.cost for t in self._all()) + len(self.places)
        return Source(name, text.replace("NAME", name, 1), slots, self._sizes(), reads, writes, tuple(self.outs), buffer,
                      cost * math.prod((*self.axes.sizes, *self.axes.outer, self.axes.columns)))  # fmt: skip

    # -- parameters --

    def _sizes(self) -> tuple[int, ...]:
        rows, columns = math.prod(self.axes.sizes), self.axes.columns
        tile = self._tile()
        return (rows, columns, *self.axes.sizes[1:], *self.axes.outer, -(-columns // tile), tile)

    def _tile(self) -> int:
        return self.axes.columns if self.fixed else min(self.axes.columns, _TILE)

    def _parameters(self) -> tuple[str, tuple[Any, ...], tuple[Any, ...]]:
        records = []
        for place, strides in zip(self.places, self.axes.strides, strict=True):
            size = place.dtype.itemsize
            dims = len(self.axes.sizes)
            steps = tuple(s * size for s in strides[:dims]) + tuple(s for s in strides[dims:-1] if s) + ((strides[-1],) if strides[-1] not in (0, 1) else ())
            records.append((place.index, place.offset, steps))
        slots = "q" * (len(self._sizes()) + sum(1 + len(s) for *_, s in records))
        count = len(self.region.reads)
        return slots, tuple(records[:count]), tuple(records[count:])

    # -- levels --

    def _roots(self, level: int) -> list[Term]:
        """What the loop of a level computes for others: results, terms of reductions, and what is kept."""
        found = [t for t, narrow in zip(self.terms, self.narrow, strict=True) if not narrow and self._level(t) == level]
        found += [t.args[0] for t in self._all() if t.op in ("sum", "max") and self._level(t.args[0]) == level]
        return list(dict.fromkeys([*found, *(t for t in self._kept if self._level(t) == level)]))

    def _plan(self, term: Term, level: int) -> None:
        """Decide what the loop of ``level`` takes from a row buffer."""
        if self._per_row(term) or term.op == "read" or (term, level) in self._planned:
            return
        self._planned.add((term, level))
        if self._level(term) < level and term.family == "f" and self._again(term) > _KEEP and self._keeps():
            self._kept.setdefault(term, f"kept{len(self._kept)}")
            return
        for arg in () if term.op == "cat" else term.args:  # a glued part has no place of its own in a row
            self._plan(arg, level)

    def _keeps(self) -> bool:
        """Whether a row buffer has room for a row."""
        return self.axes.elements <= MAX_COLUMNS

    def _again(self, term: Term) -> float:
        """What computing a term once more costs."""
        if self._per_row(term):
            return 0.0
        if term.op == "read":
            return _READ if self.axes.strides[int(term.text)][-1] == 1 else _APART
        if term not in self._costs:
            self._costs[term] = term.cost + sum(self._again(a) for a in term.args)
        return self._costs[term]

    # -- text --

    def _title(self) -> str:
        shapes = "; ".join(f"{str(d).removeprefix('torch.')} out" for *_, d in self.outs)
        return f"{len(self.region.reads)} operands in, {shapes}; {len(self.axes.sizes)} row axes."

    def _body(self, levels: int) -> list[str]:
        self.lines, sizes = [], self.axes.sizes
        say, slot, dims = self.lines.append, 4, len(sizes)
        say("    p = i64(params)")
        tiled = not self.fixed or self.axes.across
        constant = self.cuts or not tiled and self.axes.columns <= _FIXED
        say(f"    rows, columns = p[2], {f'np.int64({self.axes.columns})' if constant else 'p[3]'}")
        for a in range(1, dims):
            say(f"    n{a} = p[{slot}]")
            slot += 1
        for a in range(len(self.axes.outer)):
            say(f"    m{a} = p[{slot}]")
            slot += 1
        say(f"    tiles, tile = p[{slot}], p[{slot + 1}]")
        slot += 2
        buffers = len(self.lines)
        say("    first, end = share(params, rows * tiles)")
        say("    row, at = first // tiles, first % tiles * tile")
        counters = self._counters(dims)
        self.lines += [f"    {line}" for line in counters]
        say("    for unit in range(first, end):")
        slot = self._addresses(slot, dims)
        indent = "        "
        if tiled:
            say(f"{indent}count = min(tile, columns - at)")
        for level in range(levels):
            self._loop(level, indent)
        self._end(indent)
        self._advance(dims, indent, tiled)
        self.lines[buffers:buffers] = self._buffers()
        return self.lines

    def _buffers(self) -> list[str]:
        return [f"    {name} = f32(buffer())" for name in self._kept.values()]

    def _buffer(self) -> int:
        return min(n for n in (512, 2048, MAX_COLUMNS) if n >= self.axes.elements) + 16 if self._kept else 0

    def _end(self, indent: str) -> None:
        """What is there once per row."""
        for k, term in enumerate(self.terms):
            if self.narrow[k]:
                self._store(k, self._row(term, indent), indent)

    def _counters(self, dims: int) -> list[str]:
        """Where a thread's first row lies on each axis."""
        match dims:
            case 0:
                return []
            case 1:
                return ["i0 = row"]
            case 2:
                return ["i0, i1 = row // n1, row % n1"]
        return ["line, i2 = row // n2, row % n2", "i0, i1 = line // n1, line % n1"]

    def _advance(self, dims: int, indent: str, tiled: bool) -> None:
        """The next unit: the next tile of the row, else the next row."""
        say, inner = self.lines.append, indent
        if tiled:
            say(f"{indent}at += tile")
            say(f"{indent}if at >= columns:")
            inner = indent + "    "
            say(f"{inner}at = np.int64(0)")
        if dims:
            say(f"{inner}i{dims - 1} += 1")
        for a in range(dims - 1, 0, -1):
            say(f"{inner}if i{a} == n{a}:")
            inner += "    "
            say(f"{inner}i{a} = np.int64(0)")
            say(f"{inner}i{a - 1} += 1")

    def _addresses(self, slot: int, dims: int) -> int:
        say = self.lines.append
        for k, (place, strides) in enumerate(zip(self.places, self.axes.strides, strict=True)):
            name, size = self._tensor(k), place.dtype.itemsize
            parts = [f"p[{slot}]"] + [f"i{a} * p[{slot + 1 + a}]" for a in range(dims)]
            slot += 1 + dims
            for a, step in enumerate(strides[dims:-1]):
                if step:
                    say(f"        {name}_m{a} = p[{slot}]")
                    slot += 1
            inner = strides[-1]
            if inner not in (0, 1):
                say(f"        {name}_step = p[{slot}]")
                slot += 1
            if inner and (not self.fixed or self.axes.across):
                parts.append(f"at * {size}" if inner == 1 else f"at * {name}_step * {size}")
            say(f"        {name} = {_POINTERS[place.dtype]}({' + '.join(parts)})")
        return slot

    def _sums(self, level: int) -> list[Term]:
        return [t for t in self._all() if t.op in ("sum", "max") and self._level(t.args[0]) == level]

    def _stores(self, level: int) -> list[int]:
        return [k for k, t in enumerate(self.terms) if not self.narrow[k] and self._level(t) == level]

    def _loop(self, level: int, indent: str) -> None:
        roots, sums, outer = self._roots(level), self._sums(level), self.axes.outer
        if not roots:
            return
        for term in sums:
            self._rows[term] = self._name("row")
            self.lines.append(f"{indent}{self._rows[term]} = {_START[term.op]}")
        long = self.fixed and not self.cuts and self.axes.columns > _BLOCK
        parts = {t: self._name("part") if outer or long else self._rows[t] for t in sums}
        heads = [f"for k{a} in range(m{a}):" for a in range(len(outer))] + ["for first in range(0, columns, BLOCK):".replace("BLOCK", str(_BLOCK))] * long
        bounds = list(zip(self.cuts, self.cuts[1:], strict=False)) or [("first", f"min(first + {_BLOCK}, columns)") if long else ("0", "columns" if self.fixed else "count")]
        for low, high in bounds:
            middle = indent + "    " * len(heads)
            inner, names = middle + "    ", {}
            head = len(self.lines)
            self.lines.append("")
            for term in roots:
                self._number(term, level, low if self.cuts else 0, 0, names, indent, inner, head)
            for k in self._stores(level):
                self._store(k, self._said(self.terms[k], 0, names, indent), inner)
            for term, part in parts.items():
                self.lines.append(f"{inner}{part} = {_HOW[term.op]}({part}, {self._said(term.args[0], 0, names, indent)})")
            for term, name in self._kept.items():
                if self._level(term) == level:
                    self.lines.append(f"{inner}{name}[{self._inside('i')}] = {self._said(term, 0, names, indent)}")
            if heads:
                self.lines += [f"{middle}{self._rows[t]} = {_HOW[t.op]}({self._rows[t]}, {p})" for t, p in parts.items()]
            head = self.lines.index("", head)
            above = [f"{indent}{'    ' * k}{text}" for k, text in enumerate(heads)]
            above += [f"{middle}{p} = {_START[t.op]}" for t, p in parts.items()] if heads else []
            self.lines[head : head + 1] = [*above, f"{middle}for i in independent({low}, {high}):"]

    def _inside(self, index: str) -> str:
        """Where an element of a row lies in a row buffer."""
        line = ""
        for a in range(len(self.axes.outer)):
            line = f"({line} * m{a} + k{a})" if line else f"k{a}"
        return f"{line} * columns + {index}" if line else index

    def _index(self, k: int, index: str) -> str:
        """Where an element of the row lies in a place."""
        dims, name = len(self.axes.sizes), self._tensor(k)
        parts = [f"k{a} * {name}_m{a}" for a, s in enumerate(self.axes.strides[k][dims:-1]) if s]
        step = self.axes.strides[k][-1]
        if step:
            parts.append(index if step == 1 else f"({index}) * {name}_step" if " " in index else f"{index} * {name}_step")
        return " + ".join(parts) or "0"

    def _tensor(self, k: int) -> str:
        reads = len(self.region.reads)
        return f"x{k}" if k < reads else f"y{k - reads}"

    def _said(self, term: Term, shift: int, names: Mapping[Any, str], indent: str) -> str:
        return names[term, shift] if (term, shift) in names else self._row(term, indent)

    def _number(self, term: Term, level: int, low: int, shift: int, names: dict[Any, str], indent: str, inner: str, head: int) -> str:
        """The name of a term inside a loop; what it needs is written first, numbers per row ahead of the loop."""
        if self._per_row(term):
            return self._row(term, indent, self.lines.index("", head))
        if (term, shift) in names:
            return names[term, shift]
        if term.op == "cat":
            k = next(k for k, end in enumerate(term.bounds[1:]) if low - shift < end)
            made = self._number(term.args[k], level, low, shift + term.bounds[k], names, indent, inner, head)
            names[term, shift] = made
            return made
        if term in self._kept and self._level(term) < level:
            text = f"{self._kept[term]}[{self._inside('i')}]"
        elif term.op == "read":
            k = int(term.text)
            text = _LOADED[term.family].format(f"x{k}[{self._index(k, f'i - {shift}' if shift else 'i')}]")
        else:
            args = [self._number(a, level, low, shift, names, indent, inner, head) for a in term.args]
            text = term.text.format(*args)
        names[term, shift] = self._name("v")
        self.lines.append(f"{inner}{names[term, shift]} = {text}")
        return names[term, shift]

    def _row(self, term: Term, indent: str, place: int | None = None) -> str:
        """The name of a number per row, computed where it is not yet there: at the end, or ahead of a loop."""
        if term.op == "constant":
            return term.text
        if term not in self._rows:
            if term.op == "read":
                text = _LOADED[term.family].format(f"x{term.text}[0]")
            else:
                args = []
                for a in term.args:
                    before = len(self.lines)
                    args.append(self._row(a, indent, place))
                    place = None if place is None else place + len(self.lines) - before
                text = term.text.format(*args)
            self._rows[term] = self._name("row")
            self.lines.insert(len(self.lines) if place is None else place, f"{indent}{self._rows[term]} = {text}")
        return self._rows[term]

    def _store(self, k: int, name: str, indent: str) -> None:
        text = _STORED.get(self.outs[k][2], "{0}").format(name)
        self.lines.append(f"{indent}y{k}[{self._index(len(self.region.reads) + k, 'i')}] = {text}")

    def _name(self, stem: str) -> str:
        self._count += 1
        return f"{stem}{self._count}"
