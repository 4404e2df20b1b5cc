"""Regions for generated kernels: ops that one loop over the same rows can do, and the kernel that does them.

The cost model of their borders: an op joins the ops that it reads from where both go through the same elements, or where one of them
holds a number per row of the other; a row lies along the axes that are reduced, the same for all reductions of a region, or else along
the last. What is smaller in another way (a table added to every head, a gate per channel) would be computed
again for every element that reads it, and is written once outside instead. What the members read through views of their own
is read in place. Whether a region is worth it, the stopwatch says.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright.backends.base import Slot, Work
from graphwright.backends.inductor import Fragment, FragmentModule, Run
from graphwright.kernels import gpu, native
from graphwright.kernels.formulas import ROWS
from graphwright.kernels.generate import generate
from graphwright.kernels.generated import Generated
from graphwright.kernels.reductions import REDUCTIONS, reduced
from graphwright.kernels.trees import WITH_HALVES, Call, Term, Unfit
from graphwright.lower.chains import Chosen, Grouping, eligible, sound
from graphwright.lower.graph import Analysis, Region
from graphwright.lower.stopwatch import FLOORS_DB
from graphwright.numerics import sqnr_db
from graphwright.ops import NORM, VIEW
from graphwright.ops.axes import same

_GLUED = ("cat", "concat")
#: Sizes of one region for which kernels are kept.
_SIZES = 32


def find(analysis: Analysis, chosen: Chosen) -> list[Region]:
    """Maximal regions that one generated kernel may serve, with the views that they alone read: of two ops at least, or a norm."""
    groups = _Spaces(analysis, lambda w: _known(w) and eligible(w, chosen[w][0], free=True)).run()
    return [Region.of(analysis, works) for works in _with_looks(analysis, [g for g in groups if len(g) > 1 or g[0].has(NORM)], chosen)]


def bare(analysis: Analysis, region: Region) -> Region | None:
    """The region without its views, some of which may have to copy; None where it has none."""
    works = [w for w in region.works if _known(w)]
    return Region.of(analysis, works) if len(works) < len(region.works) else None


def _known(work: Work) -> bool:
    if not isinstance(work.out, Tensor) or not _space(work) or not all(isinstance(_space(work)[a], int) for a in {-1, *(_reduced(work) or ())}):
        return False  # the other sizes may be open
    if _name(work) in _GLUED:
        return work.named["dim"] in (-1, work.out.dim() - 1)
    return _name(work) in ROWS and _computable(work)


def _computable(work: Work) -> bool:
    """Whether there is a formula for this op with these arguments."""

    def term(value: Any) -> Any:
        if isinstance(value, (Slot, Tensor)):
            tensor = work.val(value.index) if isinstance(value, Slot) else value
            return Term("read", WITH_HALVES[tensor.dtype], text="0")
        return None if isinstance(value, (torch.dtype, torch.device, torch.memory_format, torch.layout)) else value

    try:
        space, family = _space(work), WITH_HALVES[work.out.dtype]
        columns = math.prod(space[a] for a in _reduced(work) or ())
        made = ROWS[_name(work)](Call({k: term(v) for k, v in work.named.items()}, family, columns))
    except (Unfit, KeyError, AttributeError):
        return False
    return made.family == family


def _name(work: Work) -> str:
    """The op without namespace and overload; empty for what is none of ATen's."""
    return work.op.split(".")[1] if work.op.startswith("aten.") else ""


def _space(work: Work) -> tuple[int, ...]:
    """Sizes of the axes that the loop of an op goes through."""
    value = work.val(0) if _name(work) in REDUCTIONS and work.reads else work.out
    return tuple(value.shape)


def _reduced(work: Work) -> tuple[int, ...] | None:
    """The axes that an op reduces; None where it does not."""
    return reduced(_name(work), work.named, len(_space(work)))


class _Spaces(Grouping):
    """Groups of which each goes through one space: rows of one length, numbers per row, and parts that are glued to rows."""

    def __init__(self, analysis: Analysis, member: Callable[[Work], bool]):
        super().__init__(analysis, member)
        self._parts: set[int] = set()

    def fits(self, before: int, after: int) -> bool:
        one, other = self.works[before], self.works[after]
        a, b = _space(one), _space(other)
        if len(one.out.shape) != len(b):
            return False
        joined = [self.works[m] for k in (before, after) for m in self.members[self.group[k]]]
        rows = [(_space(w), axes) for w in joined if (axes := _reduced(w)) is not None]
        glues = _name(other) in _GLUED and a[-1] != b[-1]
        if rows and not glues:
            return self._around(before, after, *rows[0]) and all(self._alike(*rows[0], *r) for r in rows)
        if any(axes != (len(space) - 1,) for space, axes in rows):
            return False
        if len(a) != len(b) or not all(same(m, n) for m, n in zip(a[:-1], b[:-1], strict=True)):
            return False
        if glues:
            alone = len(one.node.users) == 1 and len(self._widths(before)) == 1
            self._parts |= set(self.members[self.group[before]]) if alone else set()
            return alone
        return len(self._widths(before) | self._widths(after)) <= 1

    def _alike(self, a: tuple[int, ...], m: tuple[int, ...], b: tuple[int, ...], n: tuple[int, ...]) -> bool:
        """Whether two reductions go along the same axes of the same space."""
        return m == n and _equal(a, b)

    def _around(self, before: int, after: int, space: tuple[int, ...], axes: tuple[int, ...]) -> bool:
        """Whether all members of the groups of both works go through this space, or through a number for each of its rows."""
        kept = tuple(1 if a in axes else n for a, n in enumerate(space)), tuple(n for a, n in enumerate(space) if a not in axes)
        last = axes == (len(space) - 1,)
        for m in (m for k in (before, after) for m in self.members[self.group[k]]):
            if m in self._parts or _name(self.works[m]) in _GLUED:
                if not last:
                    return False
                if m in self._parts:
                    continue
            if not any(_equal(_space(self.works[m]), s) for s in (space, *kept)):
                return False
        return True

    def _widths(self, work: int) -> set[int]:
        """Lengths of the rows in a work's group."""
        return {_space(self.works[m])[-1] for m in self.members[self.group[work]] if m not in self._parts} - {1}


def _equal(a: Sequence[int], b: Sequence[int]) -> bool:
    return len(a) == len(b) and all(same(m, n) for m, n in zip(a, b, strict=True))


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
        if len(sources) == 1 and isinstance(sources[0].meta["val"], Tensor) and sources[0] not in home and eligible(work, chosen[work][0], free=True):
            (k,) = users
            home[work.node] = k
            looks[k].append(work)
    place = {w: k for k, w in enumerate(analysis.works)}
    return [sorted([*works, *more], key=place.__getitem__) for works, more in zip(groups, looks, strict=True)]


def maker(device: torch.device) -> str:
    """Whose kernels serve tensors there: ``"triton"`` on a GPU (and in Triton's interpreter), ``"llvm"`` on the CPU."""
    return "triton" if device.type == "cuda" or gpu.interpreting() else "llvm"


def unavailable(who: str) -> str | None:
    """None, or why a maker's kernels can't run here."""
    return native.unavailable() if who == "llvm" else gpu.unavailable()


def make(fragment: Fragment, who: str = "llvm") -> Run:
    """The generated kernel of a region, compiled when it is first called.

    Args:
        who: as ``maker`` says.

    Raises:
        Unfit: none can be generated, and why.
    """
    return _made(fragment.text, who)


@functools.lru_cache(256)
def _made(text: str, who: str) -> Any:
    fragment = Fragment.of(text)
    if who == "triton":
        return _triton(fragment)
    with torch.no_grad():
        values = FragmentModule(fragment).trace(fragment.zeros())
    return Generated(generate(fragment.inputs, fragment.steps, fragment.outputs, values))


def _triton(fragment: Fragment) -> Any:
    from graphwright.kernels.gpu import generate as text
    from graphwright.kernels.gpu.generated import Generated as OnGpu

    try:
        with torch.no_grad():
            values = FragmentModule(fragment).trace(fragment.zeros("meta"))
    except (RuntimeError, NotImplementedError) as error:
        raise Unfit(f"an op has no outline without its numbers ({str(error).splitlines()[0][:120]})") from error
    return OnGpu(text.generate(fragment.inputs, fragment.steps, fragment.outputs, values))


class Sized:
    """A region whose sizes are open: a kernel for each that comes, made when it first comes; few texts serve them all.

    Past a number of sizes, and for those that no kernel can be generated for, the ops run one by one.
    """

    def __init__(self, fragment: Fragment, constants: Sequence[Tensor], plain: Callable[..., Any]):
        self._fragment, self._constants, self._plain = fragment, tuple(constants), plain
        self._known: dict[Any, Callable[..., Any]] = {}
        self._checked: set[str] = set()

    def __call__(self, *reads: Tensor) -> Any:
        key = tuple([(x.shape, x.stride()) for x in reads])
        call = self._known.get(key)
        if call is None:
            call = self._made(reads)
            if len(self._known) < _SIZES:
                self._known[key] = call
        return call(*reads)

    def _made(self, reads: Sequence[Tensor]) -> Callable[..., Any]:
        old = self._fragment
        inputs = tuple((d, tuple(x.shape), x.stride()) for (d, _, _), x in zip(old.inputs, reads, strict=False))
        if len(self._known) >= _SIZES or not all(sound(shape, strides) and x.numel() for (_, shape, strides), x in zip(inputs, reads, strict=True)):
            return self._plain
        try:
            made = _made(Fragment((*inputs, *old.inputs[len(inputs) :]), old.steps, old.outputs).text, maker(reads[0].device))
        except Unfit:
            return self._plain
        constants, single = self._constants, len(old.outputs) == 1

        def call(*reads: Tensor) -> Any:
            results = made([*reads, *constants])
            return results[0] if single else results

        if made.source.name not in self._checked:
            wanted, got = self._plain(*reads), call(*reads)
            pairs = [(wanted, got)] if single else list(zip(wanted, got, strict=True))
            if not all(_agree(a, b) for a, b in pairs):
                return self._plain
            self._checked.add(made.source.name)
        return call


def _agree(wanted: Tensor, got: Tensor) -> bool:
    if not wanted.is_floating_point():
        return torch.equal(wanted, got)
    return wanted.shape == got.shape and sqnr_db(wanted.nan_to_num(), got.nan_to_num()) >= FLOORS_DB["f32" if wanted.dtype == torch.float32 else "bf16"]


__all__ = ["Sized", "Unfit", "bare", "find", "make", "maker", "unavailable"]
