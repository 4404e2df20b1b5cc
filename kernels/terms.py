"""From the ops of a region to terms over its rows: the first half of generating a kernel; see ``graphwright.kernels.generate``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphwright.kernels.formulas import ROWS
from graphwright.kernels.reductions import REDUCTIONS, reduced
from graphwright.kernels.trees import FAMILY, Call, Term, Unfit

_GLUED = ("cat", "concat")
#: Longest row that is kept on the stack, and longest row of glued parts.
MAX_COLUMNS = 16384


@dataclass(frozen=True)
class Place:
    """Where a tensor of the region's space lies.

    Attributes:
        index: which input, or which output.
        offset: bytes from its first element.
        strides: elements per step along each axis of the space; 0 where it is broadcast.
    """

    index: int
    offset: int
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Value:
    """A value of the region: its tensor of the trial run, and its term (None: a view of an input) over rows of ``width``."""

    tensor: Any
    term: Term | None = None
    width: int = 0


class Terms:
    """Finds the region's space and the terms of its results.

    Args:
        count, steps, outputs: of the region: how many inputs it has, its ops, and the numbers of its results.
        values: the inputs' tensors, then what each step gave; their numbers are not looked at, so that they may lie on any device.
        families: what numbers of each dtype are held in; others are refused.

    Attributes:
        space: sizes of the axes.
        rows: which of them a row lies along: those that are reduced, else the last.
        columns: elements of a row.
        reads: what is read, by the number that a read's text says.
        fixed: a row has to stay one: something is reduced over it, or glued along it.
    """

    def __init__(self, count: int, steps: Sequence[Any], outputs: Sequence[int], values: Sequence[Any],
                 families: Mapping[torch.dtype, str] = FAMILY):  # fmt: skip
        self.families = families
        self.values = [Value(v) for v in values]
        self.count, self.outputs = count, tuple(outputs)
        self.memory = {_memory(v): k for k, v in enumerate(values[:count])}
        self.reads: list[Place] = []
        self.fixed = False
        self._known: dict[Any, Term] = {}
        calls = [(n, named_arguments(op, args, kwargs)) for n, (op, args, kwargs) in enumerate(steps, count) if not self._is_look(values[n])]
        self.space = self._space(calls)
        self.rows = self._rows(calls)
        self.columns = math.prod(self.space[a] for a in self.rows)
        for n, (name, named) in calls:
            self.values[n] = self._value(n, name, named)
        if any(self.values[n].term is None for n in outputs):
            raise Unfit("a result is a view of an input")
        if any(self.values[n].width not in (1, self.columns) for n in outputs):
            raise Unfit("a result is a part of the rows")

    def _is_look(self, value: Any) -> bool:
        parts = value if isinstance(value, (tuple, list)) else (value,)
        return all(isinstance(p, Tensor) and p.numel() and _memory(p) in self.memory for p in parts)

    def _space(self, calls: Sequence[Any]) -> tuple[int, ...]:
        shapes = [tuple(self.values[n].tensor.shape) for n, _ in calls if isinstance(self.values[n].tensor, Tensor)]
        for _, (_, named) in calls:  # a reduction's space is what it reads
            shapes += [tuple(self.values[k].tensor.shape) for k in _operands(named) if isinstance(self.values[k].tensor, Tensor)]
        if not shapes:
            raise Unfit("nothing is computed")
        largest = max(shapes, key=lambda s: (math.prod(s), len(s)))
        if not math.prod(largest) or not largest:
            raise Unfit("it has no elements, or no axes")
        return largest

    def _rows(self, calls: Sequence[Any]) -> tuple[int, ...]:
        """The axes that everything is reduced over which is reduced."""
        found: tuple[int, ...] | None = None
        for _, (name, named) in calls:
            first = next((self.values[k].tensor for k in _operands(named)), None)
            axes = None if not isinstance(first, Tensor) else reduced(name, named, first.dim())
            if axes is None or name in _GLUED:
                continue
            if math.prod(first.shape[a] for a in axes) == 1:
                continue  # what it gives is what it reads
            if tuple(first.shape) != self.space:
                raise Unfit(f"a reduction of {tuple(first.shape)} beside {self.space}, a part of it")
            if found is not None and any(self.space[a] > 1 for a in {*found} ^ {*axes}):
                raise Unfit(f"reductions over axes {list(found or ())} and {list(axes)}")
            found = axes
        return (len(self.space) - 1,) if not found else found

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of one number per row, with the axes of the rows and without."""
        return tuple(1 if a in self.rows else n for a, n in enumerate(self.space)), tuple(n for a, n in enumerate(self.space) if a not in self.rows)

    def _width(self, shape: Sequence[int]) -> int:
        """Length of the rows of a value of this shape; 1 for one number per row."""
        shape, last = tuple(shape), len(self.space) - 1
        if shape == self.space:
            return self.columns
        if shape in self._shapes():
            return 1
        if self.rows == (last,) and len(shape) == len(self.space) and shape[:-1] == self.space[:-1]:
            return shape[-1]
        raise Unfit(f"{shape} beside {self.space}")

    def steps(self, shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
        """Strides along the axes of the space, of a value of the space's shape or with one number per row; 0 where it is broadcast."""
        steps = [s if n > 1 else 0 for n, s in zip(shape, strides, strict=True)]
        if len(shape) < len(self.space):  # the axes of the rows are left out
            kept = iter(steps)
            steps = [0 if a in self.rows else next(kept) for a in range(len(self.space))]
        return tuple(steps)

    def _value(self, n: int, name: str, named: dict[str, Any]) -> Value:
        tensor = self.values[n].tensor
        if not isinstance(tensor, Tensor) or tensor.dtype not in self.families:
            raise Unfit(f"a result of {getattr(tensor, 'dtype', type(tensor).__name__)}")
        family = self.families[tensor.dtype]
        if name in _GLUED:
            return self._glued(tensor, named, family)
        if name not in ROWS:
            raise Unfit(f"no kernel is generated for {name}")
        first = next((self.values[k].tensor for k in _operands(named)), None)
        reduces = first is not None and tuple(first.shape) != tuple(tensor.shape) and name in REDUCTIONS
        space = tuple(first.shape) if reduces else tuple(tensor.shape)
        width = self._width(space)
        filled = {k: self._operand(v, space, width) for k, v in named.items()}
        axes = None if first is None else reduced(name, named, first.dim())
        columns = math.prod(space[a] for a in axes or ())
        term = ROWS[name](Call(filled, family, columns))
        if self._reduces(term):
            self.fixed = True
            if columns != self.columns:  # of one element each
                raise Unfit("a reduction over a part of the rows")
        if term.family != family:
            raise Unfit(f"{name} gives another kind of number")
        return Value(tensor, term, 1 if reduces else width)

    def _reduces(self, term: Term) -> bool:
        """Whether a reduction stands in a term, apart from those in the terms that it was made of before."""
        stack, seen = [term], {v.term for v in self.values}
        while stack:
            term = stack.pop()
            if term.op in ("sum", "max"):
                return True
            seen.add(term)
            stack += [a for a in term.args if a not in seen]
        return False

    def _glued(self, tensor: Tensor, named: dict[str, Any], family: str) -> Value:
        parts = [v["value"] for v in named["tensors"]]
        if named.get("dim", 0) not in (-1, tensor.dim() - 1) or self._width(tensor.shape) != self.columns or self.rows != (len(self.space) - 1,) or len(tensor.shape) != len(self.space):
            raise Unfit("tensors glued along another axis than the last")
        self.fixed = True
        terms, bounds = [], [0]
        for k in parts:
            shape = tuple(self.values[k].tensor.shape)
            width = self._width(shape)
            terms.append(self._operand({"value": k}, shape, width))
            bounds.append(bounds[-1] + shape[-1])
        if any(t.family != family for t in terms) or bounds[-1] > MAX_COLUMNS:
            raise Unfit("glued tensors of different kinds, or too long a row")
        return Value(tensor, Term("cat", family, tuple(terms), bounds=tuple(bounds)), self.columns)

    def _operand(self, arg: Any, space: tuple[int, ...], width: int) -> Any:
        """An argument: a term for a value, read in this space; plain data as it is."""
        if not isinstance(arg, Mapping):
            return arg
        if "value" not in arg:
            return None  # a dtype, a memory format: the result says it
        value = self.values[arg["value"]]
        if not isinstance(value.tensor, Tensor) or value.tensor.dtype not in self.families:
            raise Unfit(f"an operand of {getattr(value.tensor, 'dtype', type(value.tensor).__name__)}")
        if value.term is None:
            return self._read(value.tensor, space)
        shape = tuple(value.tensor.shape)
        if value.width not in (1, width) or len(shape) != len(space) or self._width(shape) not in (1, width):
            raise Unfit(f"{shape} is spread over {space}")
        return value.term

    def _read(self, x: Tensor, space: tuple[int, ...]) -> Term:
        lead = len(space) - x.dim()
        if lead < 0:
            raise Unfit(f"{tuple(x.shape)} among {space}")
        shape = (1,) * lead + tuple(x.shape)
        if any(n not in (1, m) for n, m in zip(shape, space, strict=True)):
            raise Unfit(f"{tuple(x.shape)} is spread over {space}")
        strides = self.steps(shape, (0,) * lead + x.stride())
        place = Place(self.memory[_memory(x)], x.storage_offset() * x.element_size(), strides, x.dtype)
        if place not in self._known:
            self._known[place] = Term("read", self.families[x.dtype], text=str(len(self.reads)))
            self.reads.append(place)
        return self._known[place]


def _memory(x: Tensor) -> int:
    """What tells one piece of memory from another, on the ``meta`` device too."""
    return x.untyped_storage()._cdata


def named_arguments(op: str, args: Any, kwargs: Any) -> tuple[str, dict[str, Any]]:
    """An op's name, and its arguments by name."""
    if op == "getitem":
        return "getitem", {}
    _, name, overload = op.split(".")
    schema = getattr(getattr(torch.ops.aten, name), overload)._schema
    return name, {**dict(zip([a.name for a in schema.arguments], args, strict=False)), **kwargs}


def _operands(named: Mapping[str, Any]) -> list[int]:
    found = []
    for value in named.values():
        for v in value if isinstance(value, list) else [value]:
            if isinstance(v, Mapping) and "value" in v:
                found.append(v["value"])
    return found
