"""Regions for generated kernels: ops that one loop over the same rows can do, and the kernel that does them.

The cost model of their borders: an op joins the ops that it reads from where both go through the same elements, or where one of them
holds a number per row of the other. What is smaller in another way (a table added to every head, a gate per channel) would be computed
again for every element that reads it, and is written once outside instead. What the members read through views of their own
is read in place. Whether a region is worth it, the stopwatch says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graphwright.backends.base import Work
from graphwright.backends.inductor import Fragment, FragmentModule, Run
from graphwright.kernels.formulas import REDUCTIONS, ROWS, Unfit
from graphwright.kernels.generate import generate
from graphwright.kernels.generated import Generated
from graphwright.lower.chains import Chosen, Grouping, eligible
from graphwright.lower.graph import Analysis, Region
from graphwright.ops import VIEW

_GLUED = ("cat", "concat")


def find(analysis: Analysis, chosen: Chosen) -> list[Region]:
    """Maximal regions of two ops at least that one generated kernel may serve, with the views that they alone read."""
    groups = _Spaces(analysis, lambda w: _known(w) and eligible(w, chosen[w][0])).run()
    return [Region.of(analysis, works) for works in _with_looks(analysis, [g for g in groups if len(g) > 1], chosen)]


def bare(analysis: Analysis, region: Region) -> Region | None:
    """The region without its views, some of which may have to copy; None where it has none."""
    works = [w for w in region.works if _known(w)]
    return Region.of(analysis, works) if len(works) < len(region.works) else None


def _known(work: Work) -> bool:
    return isinstance(work.out, Tensor) and work.out.dim() > 0 and (_name(work) in ROWS or _name(work) in _GLUED)


def _name(work: Work) -> str:
    """The op without namespace and overload; empty for what is none of ATen's."""
    return work.op.split(".")[1] if work.op.startswith("aten.") else ""


def _space(work: Work) -> tuple[int, ...]:
    """Sizes of the axes that the loop of an op goes through."""
    value = work.val(0) if _name(work) in REDUCTIONS and work.reads else work.out
    return tuple(value.shape)


class _Spaces(Grouping):
    """Groups of which each goes through one space: rows of one length, numbers per row, and parts that are glued to rows."""

    def __init__(self, analysis: Analysis, member: Callable[[Work], bool]):
        super().__init__(analysis, member)
        self._parts: set[int] = set()

    def fits(self, before: int, after: int) -> bool:
        one, other = self.works[before], self.works[after]
        a, b = _space(one), _space(other)
        if len(a) != len(b) or a[:-1] != b[:-1]:
            return False
        if _name(other) in _GLUED and a[-1] != b[-1]:
            alone = len(one.node.users) == 1 and len(self._widths(before)) == 1
            self._parts |= set(self.members[self.group[before]]) if alone else set()
            return alone
        return len(self._widths(before) | self._widths(after)) <= 1

    def _widths(self, work: int) -> set[int]:
        """Lengths of the rows in a work's group."""
        return {_space(self.works[m])[-1] for m in self.members[self.group[work]] if m not in self._parts} - {1}


def _with_looks(analysis: Analysis, groups: Sequence[list[Work]], chosen: Chosen) -> list[list[Work]]:
    """The groups with the views that they alone read, of values from outside."""
    home = {w.node: k for k, works in enumerate(groups) for w in works}
    returned = set(analysis.program.output.all_input_nodes)
    looks: list[list[Work]] = [[] for _ in groups]
    for work in reversed(analysis.works):
        users = {home.get(u) for u in work.node.users}
        if len(users) != 1 or None in users or work.node in returned or not work.has(VIEW) or _name(work) in _GLUED:
            continue
        sources = [r.value for r in work.reads]
        if len(sources) == 1 and isinstance(sources[0].meta["val"], Tensor) and sources[0] not in home and eligible(work, chosen[work][0]):
            (k,) = users
            home[work.node] = k
            looks[k].append(work)
    place = {w: k for k, w in enumerate(analysis.works)}
    return [sorted([*works, *more], key=place.__getitem__) for works, more in zip(groups, looks, strict=True)]


def make(fragment: Fragment) -> Run:
    """The generated kernel of a region, compiled when it is first called.

    Raises:
        Unfit: none can be generated, and why.
    """
    return _made(fragment.text)


@functools.lru_cache(256)
def _made(text: str) -> Run:
    fragment = Fragment.of(text)
    with torch.no_grad():
        values = FragmentModule(fragment).trace(fragment.zeros())
    return Generated(generate(fragment.inputs, fragment.steps, fragment.outputs, values))


__all__ = ["Unfit", "bare", "find", "make"]
