"""Chains: connected ops that one loop could do, found among the works, and described as a ``Fragment``."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright.backends.aten import COPIES
from graphwright.backends.base import NATIVE, NATIVE_LAST, Candidate, Work, served
from graphwright.backends.inductor import Fragment, Run, encode
from graphwright.lower.graph import Analysis, Region
from graphwright.ops import CAST, CONTRACTION, ELEMENTWISE, NORM, POOL, QUANT, RANDOM, REDUCTION, SHAPE, SOFTMAX, VIEW

#: ops in one region at the most
_LARGEST = 64
#: how much larger than its numbers the memory of a region's input may be
_GAPS = 64
_WANTED = (ELEMENTWISE, REDUCTION, NORM, SOFTMAX, VIEW, CAST)
_BARRED = (CONTRACTION, POOL, RANDOM, QUANT, SHAPE)
_DTYPES = {torch.float32, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}

Chosen = Mapping[Work, tuple[Candidate, Callable[..., Any]]]


# -- which works -----------------------------------------------------------------------------------------------------


def eligible(work: Work, candidate: Candidate, *, free: bool = False) -> bool:
    """Whether a work may be part of a region: plain float arithmetic or a view.

    Args:
        free: sizes may be open, values channels last, on a GPU and halves there; else sizes are known, forms native, and all is on the CPU.
    """
    if candidate.precision != "f32" or candidate.clobbers is not None or len(candidate.gives) != 1:
        return False
    if not {*candidate.needs, *candidate.gives} <= ({NATIVE, NATIVE_LAST} if free else {NATIVE}):
        return False
    if not work.reads or not (work.static or free) or work.target is not operator.getitem and not _known(work):
        return False
    values = [v for x in (work.out, *(r.value.meta["val"] for r in work.reads)) for v in (x if isinstance(x, (tuple, list)) else [x])]
    if not all(isinstance(v, Tensor) and _fits(v, free) and not (work.static and v.numel() == 0) for v in [*values, *_constants(work)]):
        return False
    if len({v.device for v in [*values, *_constants(work)]}) > 1:
        return False
    try:
        encode([*work.args, *work.kwargs.values()], lambda value: 0)
    except TypeError:
        return False
    return True


def _fits(value: Tensor, free: bool) -> bool:
    """A tensor of a dtype that regions take where it lies."""
    if value.dtype in _DTYPES:
        return value.device.type == "cpu" or free and value.device.type == "cuda"
    return free and served(value)


def _known(work: Work) -> bool:
    """An op of ATen's that only computes, or only moves, element by element or along axes."""
    barred = any(map(work.has, _BARRED)) or work.op == "aten.as_strided" or work.named.get("training") is True
    return work.op.startswith("aten.") and any(map(work.has, _WANTED)) and not barred


def _looks(work: Work) -> bool:
    """Whether a work moves numbers at the most."""
    return work.has(VIEW) or work.target is operator.getitem


def find(analysis: Analysis, chosen: Chosen) -> list[Region]:
    """Maximal connected regions of eligible works, each with two ops that compute, such that all can run as one each."""
    found = [_trimmed(analysis, works) for works in Grouping(analysis, lambda w: eligible(w, chosen[w][0])).run()]
    regions = [Region.of(analysis, works) for works in found if _worthy(works)]
    return [r for r in regions if all(isinstance(n.meta["val"], Tensor) for n in (*r.reads, *r.writes))]


class Grouping:
    """Joins each work that may be a member with the groups that it reads from, unless something in between has to run outside."""

    def __init__(self, analysis: Analysis, member: Callable[[Work], bool]):
        self.works, self._member = analysis.works, member
        place = {w.node: k for k, w in enumerate(self.works)}
        self.before = [sorted({place[r.value] for r in w.reads if r.value in place}) for w in self.works]
        self.after: list[list[int]] = [[] for _ in self.works]
        for k, several in enumerate(self.before):
            for p in several:
                self.after[p].append(k)
        self.group = list(range(len(self.works)))
        self.members: dict[int, list[int]] = {}

    def run(self) -> list[list[Work]]:
        for k, work in enumerate(self.works):
            if not self._member(work):
                continue
            self.members[k] = [k]
            for p in reversed(self.before[k]):
                a, b = self.group[p], self.group[k]
                if a in self.members and a != b and self._joinable(a, b, k) and self.fits(p, k):
                    self._join(a, b)
        return [[self.works[k] for k in sorted(m)] for m in self.members.values()]

    def _joinable(self, a: int, b: int, last: int) -> bool:
        small = len(self.members[a]) + len(self.members[b]) <= _LARGEST
        return small and not self._detour(a, b, last) and not self._detour(b, a, last)

    def fits(self, before: int, after: int) -> bool:
        """Whether one loop can do the groups of both works, of which the second reads what the first gives."""
        return True

    def _detour(self, source: int, target: int, last: int) -> bool:
        """Whether a path leads from one group to the other through a third; works past ``last`` lead nowhere back."""
        stack = self._next(source, last) - {target}
        seen = set(stack)
        while stack:
            reached = self._next(stack.pop(), last)
            if target in reached:
                return True
            stack |= reached - seen
            seen |= reached
        return False

    def _next(self, group: int, last: int) -> set[int]:
        members = self.members.get(group, (group,))
        return {self.group[s] for m in members for s in self.after[m] if s <= last} - {group}

    def _join(self, a: int, b: int) -> None:
        for m in self.members[b]:
            self.group[m] = a
        self.members[a] += self.members.pop(b)


def _trimmed(analysis: Analysis, works: list[Work]) -> list[Work]:
    """Without views of the region's inputs that others read too: what a region gives is its own."""
    inside, given = {w.node for w in works}, set(Region.of(analysis, works).writes)
    mirrors: set[Any] = set()
    for work in works:
        if _looks(work) and all(r.value not in inside or r.value in mirrors for r in work.reads):
            mirrors.add(work.node)
    # parts of several that something outside gives: a region reads tensors
    parts = {w.node for w in works if w.node in mirrors and any(r.value not in inside and not isinstance(r.value.meta["val"], Tensor) for r in w.reads)}
    kept = [w for w in works if w.node not in mirrors & given | parts]
    return kept if len(kept) == len(works) else _trimmed(analysis, kept)  # what those views look at may now be given too


def _worthy(works: Sequence[Work]) -> bool:
    """Two passes over memory at least, one of them with arithmetic on floats."""
    passes = [w for w in works if not _looks(w) or w.op in COPIES]
    return len(passes) >= 2 and any(w.is_float and not _looks(w) for w in works)


# -- from works to a fragment ----------------------------------------------------------------------------------------


def _constants(work: Work) -> list[Tensor]:
    found: list[Tensor] = []

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            for v in value:
                walk(v)

    walk([list(work.args), list(work.kwargs.values())])
    return found


def sound(shape: Sequence[int], strides: Any) -> bool:
    """Whether a tensor of this shape can be made anew with these strides: no overlap, no memory that is mostly gaps."""
    if not isinstance(strides, (tuple, list)) or len(strides) != len(shape) or not all(type(s) is int for s in strides):
        return False
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n > 1):
        if stride <= reach:
            return False
        reach += (size - 1) * stride
    return reach <= _GAPS * math.prod(shape)


def fragment_of(region: Region, strides: Sequence[Sequence[int]],
                shapes: Sequence[Sequence[int]] | None = None) -> tuple[Fragment, list[Tensor]]:  # fmt: skip
    """The region as data, and the constants that follow its reads among the fragment's inputs.

    Args:
        strides, shapes: of ``region.reads``, as the program that runs gives them; without shapes those that the program says.
    """
    shapes = shapes or [n.meta["val"].shape for n in region.reads]
    constants = list({id(c): c for w in region.works for c in _constants(w)}.values())
    number: dict[Any, int] = {node: k for k, node in enumerate(region.reads)}
    number |= {id(c): len(number) + k for k, c in enumerate(constants)}
    inputs = [(n.meta["val"].dtype, shape, s) for n, shape, s in zip(region.reads, shapes, strides, strict=True)]
    inputs += [(c.dtype, c.shape, c.stride()) for c in constants]
    steps = []
    for work in region.works:
        places = [number[r.value] for r in work.reads]
        say = lambda v, places=places: number[id(v)] if isinstance(v, Tensor) else places[v.index]
        # compiled for strides that may not be the IR's: a view has to be a reshape there
        op = {"aten.view": "aten.reshape.default", "operator.getitem": "getitem"}.get(work.op, str(work.target))
        steps.append((op, encode(work.args, say), {k: encode(v, say) for k, v in work.kwargs.items()}))
        number[work.node] = len(number)
    described = tuple((str(d).removeprefix("torch."), tuple(map(int, n)), tuple(map(int, s))) for d, n, s in inputs)
    return Fragment(described, tuple(steps), tuple(number[n] for n in region.writes)), constants


def bind(fragment: Fragment, constants: Sequence[Tensor], run: Run) -> Callable[..., Any]:
    """The library's function as a step: constants filled in, inputs of other strides brought to those it was made for."""
    stated = [strides for _, _, strides in fragment.inputs[: len(fragment.inputs) - len(constants)]]
    single = len(fragment.outputs) == 1

    def call(*reads: Tensor) -> Any:
        given = [x if x.stride() == s else _restride(x, s) for x, s in zip(reads, stated, strict=True)]
        results = run([*given, *constants])
        return results[0] if single else results

    return call


def _restride(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    if all(a == b or n == 1 for n, a, b in zip(x.shape, x.stride(), strides, strict=True)):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)


def chain(region: Region, chosen: Chosen) -> Callable[..., Any]:
    """The region as it runs op by op, in the form of ``bind``."""
    spot = {node: k for k, node in enumerate([*region.reads, *(w.node for w in region.works)])}
    steps = [(chosen[w][1], [spot[r.value] for r in w.reads]) for w in region.works]
    wanted = [spot[n] for n in region.writes]

    def call(*reads: Tensor) -> Any:
        values: list[Any] = list(reads)
        for step, places in steps:
            values.append(step(*[values[p] for p in places]))
        return values[wanted[0]] if len(wanted) == 1 else [values[w] for w in wanted]

    return call
