"""Regions: chains of ops that run one by one, made one loop where that measures faster: by a kernel of our own, or by Inductor.

    lowered = generated(lowered, example)              # our kernels: compiled in a fraction of a second each
    lowered = compiled(lowered, example, deadline)     # Inductor's: as many as the time allows

Each is checked against the ops and raced against the chain; what is faster is taken if the whole is faster with it. A saved
region is plain data: ``{"nodes": [...], "strides": [...], "ms": ..., "chain_ms": ..., "maker": "llvm", "triton" or "inductor"}``. Compiled code lies in the private
cache. ``graphwright.lower.restored`` takes regions from a file: where code is missing our kernels are compiled when they are first called, as
are Inductor's, and where that can't be, the chain runs and a note says what it costs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.accelerator import Clock, device_of, of
from graphwright.backends import inductor
from graphwright.backends.base import Format
from graphwright.backends.inductor import Fragment, FragmentModule, NotCompiled
from graphwright.kernels.trees import Unfit
from graphwright.lower import Choice, Lowered, pairs, spaces
from graphwright.lower.chains import Chosen, bind, chain, find, fragment_of, sound
from graphwright.lower.graph import Region
from graphwright.lower.runner import Fused, Step, emit
from graphwright.measure import interleaved
from graphwright.numerics import Exact

#: a region is taken where it needs at most this share of its chain's time
_CLEARLY = 0.9
#: chains with less than this share of the model's time are not worth a compiler's
_WORTH = 0.01


@dataclass(eq=False)
class _Group:
    """Equal regions: ``regions[k]`` with ``constants[k]``.

    Attributes:
        ms: what all their chains take within the model.
    """

    fragment: Fragment
    regions: list[Region]
    constants: list[list[Tensor]]
    ms: float


@dataclass
class _Taken:
    group: _Group
    run: inductor.Run
    maker: str
    ms: float
    chain_ms: float


_WORDS = {"llvm": "a kernel of our own", pairs.MAKER: "one kernel for both", "triton": "a Triton kernel of our own", "inductor": "Inductor"}


def generated(lowered: Lowered, example: Sequence[Tensor], say: Callable[[str], None] = lambda text: None) -> Lowered:
    """``lowered`` with the regions that generated kernels make clearly faster, or as it was; the notes say which.

    Args:
        example: flat inputs, on which everything is timed.
    """
    who = spaces.maker(device_of(lowered.analysis.program))
    if spaces.unavailable(who) is not None:
        return lowered
    chosen = dict(zip(lowered.analysis.works, lowered.chosen, strict=True))
    found = [*spaces.find(lowered.analysis, chosen), *pairs.find(lowered.analysis, chosen)]
    notes, taken = [], []
    while found:
        groups, total = _groups(lowered, found, example)
        found = []
        for group in (g for g in groups if g.ms >= _WORTH * total):
            say(f"generating a kernel for {_name(group)}")
            maker = pairs.MAKER if pairs.serves(group.regions[0].works, chosen) else who
            try:
                run = made(group.fragment, maker)
            except Unfit as error:
                again = [r for r in (spaces.bare(lowered.analysis, r) for r in group.regions) if r is not None]
                found += again
                notes += [] if again else [f"{_name(group)}: no kernel can be generated: {error}"]
                continue
            one, said = _judged(lowered, group, chosen, example, run, maker)
            notes.append(f"{_name(group)}: {said}")
            taken += [] if one is None else [one]
    lowered = noted(lowered, notes)
    return _raced(lowered, taken, example, say) if taken else lowered


def compiled(lowered: Lowered, example: Sequence[Tensor], deadline: float, say: Callable[[str], None] = lambda text: None) -> Lowered:
    """``lowered`` with the regions that Inductor makes clearly faster, or as it was; the notes say which and why.

    Args:
        example: flat inputs, on which everything is timed.
        deadline: ``time.perf_counter()`` value past which nothing is compiled; a region that would take longer is not begun.
    """
    why = inductor.reason()
    if why:
        return noted(lowered, [f"no region was compiled by Inductor: {why}"])
    if lowered.analysis.program.signature.symbols:
        return noted(lowered, ["no region was compiled by Inductor: its code is made for fixed sizes, and some are left open"])
    chosen = dict(zip(lowered.analysis.works, lowered.chosen, strict=True))
    groups, total = _groups(lowered, find(lowered.analysis, chosen), example)
    groups = [g for g in groups if g.ms >= _WORTH * total]
    if not groups:
        return noted(lowered, [f"no region was compiled by Inductor: no chain of ops that one loop could do takes {100 * _WORTH:.0f} % of the time"])
    notes: list[str] = []
    taken: list[_Taken] = []
    seconds = inductor.expected_seconds()
    for k, group in enumerate(groups):
        name = _name(group)
        if inductor.open_library(group.fragment) is None:
            left = deadline - time.perf_counter()
            if left < seconds:
                rest = f"{len(groups) - k} of {len(groups)} different regions, {name} first"
                notes.append(f"not compiled by Inductor: {rest}: one takes about {seconds:.0f} s, {max(left, 0.0):.0f} s of the time budget are left")
                break
            say(f"compiling region {k + 1}/{len(groups)} with Inductor: {name}")
            start = time.perf_counter()
            try:
                inductor.compile_library(group.fragment, left)
            except NotCompiled as error:
                notes.append(f"{name}: not compiled by Inductor: {error}")
                continue
            finally:
                seconds = time.perf_counter() - start
        run = inductor.open_library(group.fragment)
        if run is None:
            notes.append(f"{name}: its library cannot be opened; the chain runs")
            continue
        one, said = _judged(lowered, group, chosen, example, run, "inductor")
        notes.append(f"{name}: {said}")
        taken += [] if one is None else [one]
    return _raced(noted(lowered, notes), taken, example, say) if taken else noted(lowered, notes)


def made(fragment: Fragment, maker: str) -> inductor.Run:
    """A region's kernel by one of our own makers; raises what ``spaces.make`` does."""
    return pairs.Pair(fragment) if maker == pairs.MAKER else spaces.make(fragment, maker)


def noted(lowered: Lowered, notes: Sequence[str]) -> Lowered:
    return dataclasses.replace(lowered, notes=[*lowered.notes, *notes])


def _name(group: _Group) -> str:
    first = group.regions[0]
    more = f" ({len(group.regions)} times)" if len(group.regions) > 1 else ""
    return f"{len(first.works)} ops from {first.head.site} on{more}"


def _groups(lowered: Lowered, regions: Sequence[Region], example: Sequence[Tensor]) -> tuple[list[_Group], float]:
    """Equal regions together, those that take the longest first; and the time of the whole, in ms."""
    met: dict[fx.Node, tuple[tuple[int, ...], tuple[int, ...]]] = {}  # as they are: kernels may give others than the IR says

    def look(step: Step, args: list[Any]) -> Any:
        met.update((value, (tuple(x.shape), x.stride())) for value, x in _tensors(step, args))
        return step.call(*args)

    runner = emit(lowered.analysis, lowered.chosen, apart=True)
    runner.step_through(example, look)
    steps = runner.profile(example)
    spent = {s.work: ms for s, ms in zip(runner.steps, steps, strict=True) if s.work is not None}
    groups: dict[str, _Group] = {}
    for region in regions:
        if not all(n in met for n in region.reads):
            continue
        shapes, strides = [met[n][0] for n in region.reads], [met[n][1] for n in region.reads]
        if not sound_region(region, strides, shapes):
            continue  # an expanded input, say: it could not be made anew where another call brings other strides
        fragment, constants = fragment_of(region, strides, shapes)
        group = groups.setdefault(fragment.text, _Group(fragment, [], [], 0.0))
        group.regions.append(region)
        group.constants.append(constants)
        group.ms += sum(spent[w] for w in region.works)
    return sorted(groups.values(), key=lambda g: -g.ms), sum(steps)


def sound_region(region: Region, strides: Any, shapes: Any = None) -> bool:
    """Whether a region reads and gives tensors, of which those that it reads can be made anew with these strides."""
    if not all(isinstance(n.meta["val"], Tensor) for n in (*region.reads, *region.writes)):
        return False
    shapes = shapes or [n.meta["val"].shape for n in region.reads]
    return len(shapes) == len(strides) == len(region.reads) and all(sound(n, s) for n, s in zip(shapes, strides, strict=True))


def _tensors(step: Step, args: Sequence[Any]) -> Iterator[tuple[fx.Node, Tensor]]:
    """What a work's step reads: whose value, and the tensor."""
    if step.work is not None:
        yield from ((r.value, x) for r, x in zip(step.work.reads, args, strict=True) if isinstance(x, Tensor))


def _samples(lowered: Lowered, region: Region, example: Sequence[Tensor]) -> list[Tensor]:
    """What the region reads when the program runs on the example."""
    kept: dict[fx.Node, Tensor] = {}

    def look(step: Step, args: list[Any]) -> Any:
        if step.work in region.works:
            for value, x in _tensors(step, args):
                if value in region.reads and value not in kept:
                    kept[value] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
        return step.call(*args)

    emit(lowered.analysis, lowered.chosen, apart=True).step_through(example, look)
    return [kept[n] for n in region.reads]


def _judged(lowered: Lowered, group: _Group, chosen: Chosen, example: Sequence[Tensor], run: inductor.Run,
            maker: str) -> tuple[_Taken | None, str]:  # fmt: skip
    """Check and time one region against its chain, and against what runs in the chain's place already; None where it is not taken."""
    region, who = group.regions[0], _WORDS[maker]
    reads = _samples(lowered, region, example)
    try:
        problem = check(group.fragment, [*reads, *group.constants[0]], run)
    except Exception as error:  # Triton's compiler has errors of its own  # noqa: BLE001
        problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    if problem:
        return None, f"the code by {who} is not right ({problem}); the chain runs"
    before = [f for f in lowered.fused if set(f.region.works) == set(region.works)]
    calls = [chain(region, chosen), call_of(region, group.fragment, group.constants[0], run, chosen), *(f.call for f in before)]
    plain, fused, *rivals = race(calls, reads)
    best = min(plain, *rivals) if rivals else plain
    if fused > _CLEARLY * best:
        other = "the generated kernel's" if rivals and best < plain else "the chain's"
        return None, f"{fused:.3g} ms through {who} are not clearly below {other} {best:.3g} ms, which stays"
    return _Taken(group, run, maker, fused, plain), f"{fused:.3g} ms through {who}, {plain:.3g} ms op by op"


def call_of(region: Region, fragment: Fragment, constants: list[Tensor], run: inductor.Run, chosen: Chosen) -> Callable[..., Any]:
    """A region's function as a step."""
    if isinstance(run, pairs.Pair):
        return run.bound(constants)
    if all(w.static for w in region.works):
        return bind(fragment, constants, run)
    return spaces.Sized(fragment, constants, chain(region, chosen))


def forms(region: Region, chosen: Chosen) -> tuple[tuple[Format, ...], tuple[Format, ...]]:
    """The forms in which a region reads and gives its values: those of the kernels that it takes the place of."""
    needs: dict[fx.Node, Format] = {}
    for work in region.works:
        for read, form in zip(work.reads, chosen[work][0].needs, strict=True):
            needs.setdefault(read.value, form)
    gives = {w.node: chosen[w][0].gives[0] for w in region.works}
    return tuple(needs[n] for n in region.reads), tuple(gives[n] for n in region.writes)


def check(fragment: Fragment, inputs: Sequence[Tensor], run: inductor.Run) -> str | None:
    """None, or how the library's results break the rule for exact transformations, or share memory with its inputs."""
    with torch.no_grad():
        reference, before = FragmentModule(fragment, double=True)(*inputs), FragmentModule(fragment)(*inputs)
        after = run(list(inputs))
    for ref, old, new in zip(reference, before, after, strict=True):
        problem = Exact().failure(ref, old, new)
        if problem:
            return problem
    held = {x.untyped_storage().data_ptr() for x in inputs}
    return "it gives back an input" if any(x.untyped_storage().data_ptr() in held for x in after) else None


def race(calls: Sequence[Callable[..., Any]], reads: Sequence[Tensor]) -> list[float]:
    """Least milliseconds of each call, timed in turns; on a GPU as recorded graphs, by its own clock."""
    cuda = of(reads[0].device)
    if cuda is not None:
        clock, ready = Clock(cuda), [Clock(cuda).ready(c, reads) for c in calls]
        return list(map(min, zip(*[[1e3 * clock.once(r, reads) for r in ready] for _ in range(20)], strict=True)))
    return [t.minimum for t in interleaved([lambda c=c: c(*reads) for c in calls], rounds=40, budget_s=0.6, warmup=2)]


def _raced(lowered: Lowered, taken: Sequence[_Taken], example: Sequence[Tensor], say: Callable[[str], None]) -> Lowered:
    """The program with all taken regions if it is faster as a whole; they take the place of those that share a work with them."""
    works = {w for one in taken for region in one.group.regions for w in region.works}
    chosen = dict(zip(lowered.analysis.works, lowered.chosen, strict=True))
    kept = [(f, entry) for f, entry in zip(lowered.fused, lowered.regions, strict=True) if not works.intersection(f.region.works)]
    fused, saved = [f for f, _ in kept], [entry for _, entry in kept]
    for one in taken:
        shapes, strides = ([list(r[k]) for r in one.group.fragment.inputs] for k in (1, 2))
        for region, constants in zip(one.group.regions, one.group.constants, strict=True):
            call = call_of(region, one.group.fragment, constants, one.run, chosen)
            fused.append(Fused(region, f"{one.maker}.region{len(fused) + 1}", call, one.maker != "inductor", *forms(region, chosen)))
            saved.append({"nodes": [w.node.name for w in region.works], "shapes": shapes[: len(region.reads)], "strides": strides[: len(region.reads)],
                          "ms": one.ms, "chain_ms": one.chain_ms, "maker": one.maker})  # fmt: skip
    runner = emit(lowered.analysis, lowered.chosen, fused)
    who = _WORDS[taken[0].maker] if taken[0].maker == "inductor" else "generated kernels"
    say(f"timing the whole with {len(fused) - len(kept)} regions through {who}")
    with lowered.analysis.program.preserved(example):
        wait = None if runner.cuda is None else runner.cuda.wait
        for _ in range(2):  # a loss is not believed on one race
            plain, with_regions = interleaved([lambda: lowered.runner(*example), lambda: runner(*example)], rounds=10, budget_s=1.5, wait=wait)
            if with_regions.minimum < plain.minimum:
                break
    variants = [(f"regions through {who}", with_regions), ("without them", plain), *lowered.variants[1:]]
    if with_regions.minimum >= plain.minimum:
        why = f"the whole is not faster with the regions through {who} ({with_regions.minimum:.3g} ms) than without ({plain.minimum:.3g} ms): they are left out"
        return dataclasses.replace(noted(lowered, [why]), variants=[variants[1], variants[0], *variants[2:]])
    return dataclasses.replace(lowered, runner=runner, choices=choices(lowered, fused), variants=variants, regions=saved, fused=fused)


def without(lowered: Lowered, left: Callable[[Fused], bool]) -> Lowered:
    """``lowered`` with the regions of ours and of Inductor's for which ``left`` holds run op by op."""
    kept = [(f, entry) for f, entry in zip(lowered.fused, lowered.regions, strict=True) if not left(f)]
    fused = [f for f, _ in kept]
    return dataclasses.replace(lowered, runner=emit(lowered.analysis, lowered.chosen, fused), choices=choices(lowered, fused), fused=fused,
                               regions=[entry for _, entry in kept])  # fmt: skip


def choices(lowered: Lowered, fused: Sequence[Fused]) -> list[Choice]:
    """What the report shows: the works of a region name it."""
    names = {w: f.name for f in fused for w in f.region.works}
    plain = [dataclasses.replace(c, name=candidate.name, fused=False) if c.fused else c for c, (candidate, _) in zip(lowered.choices, lowered.chosen, strict=True)]
    return [dataclasses.replace(c, name=names[c.work], fused=True) if c.work in names else c for c in plain]
