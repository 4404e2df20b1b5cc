"""A Triton kernel for a region of elementwise ops, broadcasts and reductions over any axes, the same for all.

It starts from the same terms as the CPU's generator (``graphwright.kernels.generate``) and writes one of three forms:

- ``flat``: all operands lie evenly, or are one number: one-dimensional tiles;
- ``tiles``: tiles of rows and columns, where operands are broadcast or strided and nothing is reduced;
- ``rows``: reductions. Two functions: one holds whole rows in registers and reads them once; the other goes along a row in
  blocks, once per *level* (a reduction of level k is there at level k + 1), and computes again what it needs again.

Arithmetic is in float32, whatever halves are read and written. Sizes and strides are arguments; strides of 0 and 1, the length
of rows with glued parts, and constants stand in the text.
A row may lie along several axes: its number ``c`` is then taken apart. Where numbers lie beside each other from row to row, tiles have many
rows, and Triton's layout of a tile follows its addresses.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphwright.kernels.gpu.dialect import translated, used
from graphwright.kernels.loops import Loops
from graphwright.kernels.terms import Terms, named_arguments
from graphwright.kernels.trees import WITH_HALVES, Term, Unfit

_LOADED = {torch.float16: ".to(tl.float32)", torch.bfloat16: ".to(tl.float32)", torch.int8: ".to(tl.int64)", torch.uint8: ".to(tl.int64)",
           torch.int32: ".to(tl.int64)"}  # fmt: skip
#: Offsets from here on are 64-bit numbers; tiles may reach over the end by less than the rest.
_FAR = 2**31 - 2**24


@dataclass(frozen=True)
class Source:
    """A generated kernel.

    Attributes:
        name: from the text: equal kernels of different regions are one.
        text: a Python module with the kernel ``name`` and, for ``rows``, ``name_long``.
        form: ``"flat"``, ``"tiles"`` or ``"rows"``.
        rows, columns: of the loops.
        reads: for each place that is read, the number of the input and its offset in elements; results follow in order.
        numbers: arguments after the addresses: rows (not of ``flat``), columns, sizes of the row axes but the first, strides.
        outs: shape, strides and dtype of each result.
        big: offsets need 64 bits.
        moved: bytes per call, each operand once.
        work: operations per element of the space, an addition being 1.
        held: numbers per element that a held row keeps in registers at the most, about.
        levels: how often the long form goes along a row.
        beside: numbers lie beside each other from row to row, not along a row.
    """

    name: str
    text: str
    form: str
    rows: int
    columns: int
    reads: tuple[tuple[int, int], ...]
    numbers: tuple[int, ...]
    outs: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    big: bool
    moved: int
    work: float
    held: int
    levels: int
    beside: bool = False


def generate(inputs: Sequence[Any], steps: Sequence[Any], outputs: Sequence[int], values: Sequence[Any]) -> Source:
    """The kernel of a region.

    Args:
        inputs, steps, outputs: of the fragment (``graphwright.backends.inductor.Fragment``).
        values: the inputs, then what each step gave; tensors on the ``meta`` device will do.

    Raises:
        Unfit: no kernel of this kind can serve it, and why.
    """
    return _Writer(Terms(len(inputs), steps, outputs, values, WITH_HALVES), reference(len(inputs), steps, outputs)).source()


def reference(count: int, steps: Sequence[Any], outputs: Sequence[int]) -> list[str]:
    """A region's ops as a person would write them; sizes are left out, since kernels for any share a text."""
    lines = [f"v{n} = {_step(op, args, kwargs)}" for n, (op, args, kwargs) in enumerate(steps, count)]
    return [*lines, f"return {', '.join(f'v{n}' for n in outputs)}"]


def _step(op: str, args: Any, kwargs: Any) -> str:
    if op == "getitem":
        return f"v{args[0]['value']}[{args[1]}]"
    name, named = named_arguments(op, args, kwargs)
    said = {k: "..." if k in _SIZES else _said(v) for k, v in named.items() if v is not None}
    return f"{name}({', '.join(v if isinstance(named[k], Mapping) else f'{k}={v}' for k, v in said.items())})"


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        ((kind, what),) = value.items()
        return f"v{what}" if kind == "value" else str(what)
    return f"[{', '.join(map(_said, value))}]" if isinstance(value, list) else repr(value)


#: Arguments that may vary with the sizes.
_SIZES = {"size", "sizes", "shape", "normalized_shape", "start", "end", "length", "split_size"}
#: Which part of a glued row is looked at: how far it is shifted, and the columns that it fills.
_Window = tuple[int, int, int]


@dataclass
class _Writer(Loops):
    """Writes the kernel of a region."""

    told: list[str] = field(default_factory=list)
    form: str = ""
    lines: list[str] = field(default_factory=list)
    _names: dict[Any, str] = field(default_factory=dict)
    _rows: dict[Term, str] = field(default_factory=dict)
    _count: int = 0

    def source(self) -> Source:
        every, axes = self._all(), self.axes
        reduces = any(t.op in ("sum", "max") for t in every)
        self.form = form = "rows" if reduces else "tiles" if axes.sizes else "flat"
        parameters, numbers = self._parameters(form)
        bodies = {"": self._body(form)} | ({"_long": self._long()} if form == "rows" else {})
        text = self._module(form, parameters, bodies)
        name = "region_" + hashlib.sha256(text.encode()).hexdigest()[:16]
        rows, columns = math.prod(axes.sizes), axes.elements
        if -(-rows // 1) * -(-columns // 256) >= 2**31 - 1:
            raise Unfit(f"{rows} rows of {columns} elements are more than one launch can take")
        reach = max(self._reach(s) for s in axes.strides)
        moved = sum((1 + self._reach(s)) * p.dtype.itemsize for p, s in zip(self.places, axes.strides, strict=True))
        levels = 1 + max(self._level(t) for t in self.terms)
        return Source(name, text.replace("NAME", name), form, rows, columns, tuple((p.index, p.offset // p.dtype.itemsize) for p in self.region.reads),
                      numbers, tuple(self.outs), max(reach, rows, columns) >= _FAR, moved, 1.0 + sum(t.cost for t in every), self._live(), levels, form == "rows" and self.beside())  # fmt: skip

    def _reach(self, strides: Sequence[int]) -> int:
        """How many elements lie between a place's first and its last."""
        return sum((n - 1) * s for n, s in zip((*self.axes.sizes, *self.axes.outer, self.axes.columns), strides, strict=True))

    def _live(self) -> int:
        """Numbers per element that are computed at one level and needed at a later one; two at the least, and one for each read."""
        across = {a for t in self._all() for a in t.args if not self._per_row(a) and a.op != "constant" and self._level(t) > self._level(a)}
        return max(2, len(across)) + sum(t.op == "read" and not self._per_row(t) for t in self._all()) // 2

    # -- parameters --

    def _parameters(self, form: str) -> tuple[list[str], tuple[int, ...]]:
        """Names after the addresses, and their numbers."""
        sizes = self.axes.sizes
        found = [("rows", math.prod(sizes))] if form != "flat" else []
        found.append(("columns", self.axes.elements))
        found += [(f"n{a}", n) for a, n in enumerate(sizes) if a]
        found += [(f"m{a}", n) for a, n in enumerate(self.axes.outer) if a] + [("inner", self.axes.columns)] * bool(self.axes.outer)
        for k, strides in enumerate(self.axes.strides):
            found += [(f"{self._tensor(k)}_s{a}", s) for a, s in enumerate(strides[: len(sizes)]) if s not in (0, 1)]
            found += [(f"{self._tensor(k)}_m{a}", s) for a, s in enumerate(strides[len(sizes) : -1]) if s not in (0, 1)]
            found += [(f"{self._tensor(k)}_step", strides[-1])] if strides[-1] not in (0, 1) else []
        return [n for n, _ in found], tuple(s for _, s in found)

    def _tensor(self, k: int) -> str:
        reads = len(self.region.reads)
        return f"x{k}" if k < reads else f"y{k - reads}"

    # -- text --

    def _module(self, form: str, parameters: Sequence[str], bodies: Mapping[str, list[str]]) -> str:
        tensors = [self._tensor(k) for k in range(len(self.places))]
        types = [f"{n} {str(p.dtype).removeprefix('torch.')}" for n, p in zip(tensors, self.places, strict=True)]
        tiles = ["ROWS: tl.constexpr"] * (form != "flat") + ["BLOCK: tl.constexpr", "BIG: tl.constexpr"]
        functions = []
        for tail, body in bodies.items():
            functions += ["", "", "@triton.jit", f"def NAME{tail}({', '.join([*tensors, *parameters, *tiles])}):", *(f"    {line}" for line in body)]
        own = sorted(used("\n".join(functions)))
        imports = ["import triton", "import triton.language as tl"] + (["", f"from graphwright.kernels.gpu.scalar import {', '.join(own)}"] if own else [])
        told = ['"""A generated kernel: ' + _FORMS[form], "", f"Reads and writes {', '.join(types)}.", "Reference, in ATen's ops on float32:", ""]
        return "\n".join([*told, *(f"    {line}" for line in self.told), '"""', "", *imports, *functions, ""])

    def _begin(self, form: str) -> None:
        """Where a program's tile lies: ``r`` [ROWS, 1] and ``lane`` [1, BLOCK], in ``flat`` [BLOCK] alone."""
        self.lines, self._names, self._rows = [], {}, {}
        say, dims = self.lines.append, len(self.axes.sizes)
        say("program = tl.program_id(0).to(tl.int64) if BIG else tl.program_id(0)")
        if form == "flat":
            say("c = program * BLOCK + tl.arange(0, BLOCK)")
            say("inside = c < columns")
            self.lines += self._apart()
            return
        if form == "tiles":
            say("across = tl.cdiv(columns, BLOCK)")
            say("r = (program // across * ROWS + tl.arange(0, ROWS))[:, None]")
            say("c = (program % across * BLOCK + tl.arange(0, BLOCK))[None, :]")
        else:
            say("r = (program * ROWS + tl.arange(0, ROWS))[:, None]")
            say("lane = tl.arange(0, BLOCK)[None, :]")
        say("here = r < rows")
        match dims:
            case 1:
                say("i0 = r")
            case 2:
                say("i0, i1 = r // n1, r % n1")
            case 3:
                say("i0, i1, i2 = r // n2 // n1, r // n2 % n1, r % n2")

    def _body(self, form: str) -> list[str]:
        """The kernel that holds its tile in registers: each number is computed once."""
        self._begin(form)
        if form == "rows":
            self.lines.append("c = lane.to(tl.int64) if BIG else lane")
        if form != "flat":
            self.lines += self._apart()
            self.lines.append("inside = here & (c < columns)")
        for k, term in enumerate(self.terms):
            self._store(k, self._named(term))
        return self.lines

    def _apart(self) -> list[str]:
        """Where an element lies on each axis of a row."""
        return {0: [], 1: ["k0, j = c // inner, c % inner"], 2: ["k0, k1, j = c // inner // m1, c // inner % m1, c % inner"]}[len(self.axes.outer)]

    def _long(self) -> list[str]:
        """The kernel that goes along its rows in blocks, once per level."""
        self._begin("rows")
        for level in range(1 + max(self._level(t) for t in self.terms)):
            sums = [t for t in self._all() if t.op in ("sum", "max") and self._level(t.args[0]) == level]
            stores = [k for k, t in enumerate(self.terms) if not self.narrow[k] and self._level(t) == level]
            if sums or stores:
                self._along(level, sums, stores)
        for k, term in enumerate(self.terms):
            if self.narrow[k]:
                self._store(k, self._row(term))
        return self.lines

    def _along(self, level: int, sums: Sequence[Term], stores: Sequence[int]) -> None:
        """One loop over the blocks of a row."""
        self._names = {}
        totals = {t: self._name("sums" if t.op == "sum" else "tops") for t in sums}
        for term in self._needed([*(t.args[0] for t in sums), *(self.terms[k] for k in stores)]):
            self._row(term)
        for term, total in totals.items():
            start = "tl.zeros((ROWS, BLOCK), tl.float32)" if term.op == "sum" else 'tl.full((ROWS, BLOCK), float("-inf"), tl.float32)'
            self.lines.append(f"{total} = {start}")
        self.lines.append("for first in range(0, columns, BLOCK):")
        outer, self.lines = self.lines, []
        self.lines += ["c = first + (lane.to(tl.int64) if BIG else lane)", "inside = here & (c < columns)", *self._apart()]
        for term, total in totals.items():
            number = self._named(term.args[0])
            self.lines.append(f"{total} += tl.where(inside, {number}, 0.0)" if term.op == "sum"
                              else f'{total} = larger({total}, tl.where(inside, {number}, float("-inf")))')  # fmt: skip
        for k in stores:
            self._store(k, self._named(self.terms[k]))
        self.lines = outer + [f"    {line}" for line in self.lines]
        for term, total in totals.items():
            self._rows[term] = self._name("row")
            self.lines.append(f"{self._rows[term]} = {_reduced(term.op, total)}")

    def _needed(self, roots: Sequence[Term]) -> list[Term]:
        """The numbers per row that a loop reads: they are computed ahead of it."""
        found: dict[Term, None] = {}
        stack, seen = list(roots), set()
        while stack:
            term = stack.pop()
            if term in seen:
                continue
            seen.add(term)
            if self._per_row(term):
                found.update({} if term.op == "constant" else {term: None})
            else:
                stack += term.args
        return list(found)

    # -- numbers --

    def _named(self, term: Term, window: _Window | None = None) -> str:
        """The name of a term over the tile, or of a row's number; what it needs is written first."""
        if self._per_row(term):
            return self._row(term)
        key = (term, window)
        if key in self._names:
            return self._names[key]
        if term.op == "cat":
            text = self._glued(term, window)
        elif term.op == "read":
            text = self._load(int(term.text), window)
        else:
            text = translated(term.text.format(*(self._operand(a, window) for a in term.args)))
        self._names[key] = self._name("v")
        self.lines.append(f"{self._names[key]} = {text}")
        return self._names[key]

    def _operand(self, term: Term, window: _Window | None) -> str:
        return term.text if term.op == "constant" else self._named(term, window)

    def _row(self, term: Term) -> str:
        """The name of a number per row, [ROWS, 1], or of one for all."""
        if term.op == "constant":
            return translated(term.text)
        if term not in self._rows:
            if term.op == "read":
                text = self._load(int(term.text), None)
            elif term.op == "call":
                text = translated(term.text.format(*(a.text if a.op == "constant" else self._row(a) for a in term.args)))
            else:
                start = "0.0" if term.op == "sum" else 'float("-inf")'
                text = _reduced(term.op, f"tl.where(inside, {self._named(term.args[0])}, {start})")
            self._rows[term] = self._name("row")
            self.lines.append(f"{self._rows[term]} = {text}")
        return self._rows[term]

    def _glued(self, term: Term, window: _Window | None) -> str:
        shift, low, high = window or (0, 0, self.axes.columns)
        parts = []
        for part, begin, end in zip(term.args, term.bounds, term.bounds[1:], strict=False):
            inner = (shift + begin, max(low, shift + begin), min(high, shift + end))
            if inner[1] < inner[2]:
                parts.append((self._operand_text(part, inner), inner[2]))
        text = parts[-1][0]
        for said, end in reversed(parts[:-1]):
            text = f"tl.where(c < {end}, {said}, {text})"
        return text

    def _operand_text(self, part: Term, window: _Window) -> str:
        return translated(part.text) if part.op == "constant" else self._named(part, window)

    def _load(self, k: int, window: _Window | None) -> str:
        place = self.region.reads[k]
        address, mask = self._address(k, window)
        # not a block of addresses: one number, which takes no mask
        loaded = f"tl.load({address})" if mask is None else f"tl.load({address}, {mask}, other=0)"
        return loaded + _LOADED.get(place.dtype, "")

    def _address(self, k: int, window: _Window | None, wide: bool = False) -> tuple[str, str | None]:
        """Addresses, and which of them may be touched (None: it is one)."""
        strides, name = self.axes.strides[k], self._tensor(k)
        dims, parts = len(self.axes.sizes), [name]
        parts += [f"i{a}" if s == 1 else f"i{a} * {name}_s{a}" for a, s in enumerate(strides[:dims]) if s]
        rows = len(parts) > 1
        outer = [f"k{a}" if s == 1 else f"k{a} * {name}_m{a}" for a, s in enumerate(strides[dims:-1]) if s]
        step = strides[-1] or int(wide and not outer)
        if step or outer:
            shift, low, high = window or (0, 0, self.axes.columns)
            at = "j" if self.axes.outer else "c"
            column = f"{at} - {shift}" if shift else at
            parts += outer
            if step:
                parts.append(column if step == 1 else f"({column}) * {name}_step" if shift else f"{at} * {name}_step")
            mask = "inside" if rows or self.form == "flat" else "(c < columns)"
            limits = [] if self.axes.outer else [f"(c >= {low})"] * (low > 0) + [f"(c < {high})"] * (high < self.axes.columns)
            return " + ".join(parts), " & ".join([mask, *limits])
        if not rows and k >= len(self.region.reads):  # the only row there is
            parts, rows = [*parts, "r"], True
        return " + ".join(parts), "here" if rows else None

    def _store(self, k: int, name: str) -> None:
        place = len(self.region.reads) + k
        address, mask = self._address(place, None, wide=not self.narrow[k])
        self.lines.append(f"tl.store({address}, {name}{'' if mask is None else f', {mask}'})")

    def _name(self, stem: str) -> str:
        self._count += 1
        return f"{stem}{self._count}"


def _reduced(op: str, tile: str) -> str:
    return f"tl.sum({tile}, 1, keep_dims=True)" if op == "sum" else f"top({tile})"


_FORMS = {
    "flat": "one number after the other.", "tiles": "tiles of rows and columns.",
    "rows": "rows with reductions along them; whole rows in registers, or (NAME_long) in blocks.",
}  # fmt: skip
