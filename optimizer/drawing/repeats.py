"""Blocks that stand several times in a row in a model, found by their sites: a picture draws the first and says how many there are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from graphwright.drawing.picture import Picture

_LEAST_OPS = 3  # smaller blocks are drawn one by one


@dataclass(frozen=True)
class Block:
    """A block that stands for several.

    Attributes:
        first, last: ``"encoder.layer.0"``, ``"encoder.layer.11"``.
        count: how many there are.
        dots: positions of the first one's.
    """

    first: str
    last: str
    count: int
    dots: tuple[int, ...]


@dataclass(frozen=True)
class Repeats:
    """``stands[k]``: the position of the dot that is drawn for dot ``k``, ``k`` itself where it is drawn."""

    stands: list[int]
    blocks: list[Block]


def repeats(picture: Picture) -> Repeats:
    """Runs of numbered modules (``layer.0``, ``layer.1``, …) whose ops, shapes and inner edges are the same; outer ones first."""
    parts = [() if d.op in ("input", "output") else tuple(d.site.split("#")[0].split(".")) for d in picture.dots]
    stands = list(range(len(parts)))
    blocks: list[Block] = []
    into: dict[int, list[int]] = defaultdict(list)
    for a, b in picture.edges:
        into[b].append(a)
    for depth in range(1, max(map(len, parts), default=0)):
        families: dict[tuple[str, ...], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for k, path in enumerate(parts):
            if stands[k] == k and len(path) >= depth and path[depth - 1].isdigit():
                families[path[: depth - 1]][int(path[depth - 1])].append(k)
        for prefix, members in families.items():
            for run in _runs(picture, members, depth, into):
                first, *others = (members[i] for i in run)
                for other in others:
                    for k, twin in zip(other, first, strict=True):
                        stands[k] = twin
                names = [".".join((*prefix, str(i))) for i in (run[0], run[-1])]
                blocks.append(Block(*names, len(run), tuple(first)))
    return Repeats([_root(stands, k) for k in range(len(stands))], blocks)


def _root(stands: Sequence[int], k: int) -> int:
    while stands[k] != k:
        k = stands[k]
    return k


def _runs(picture: Picture, members: dict[int, list[int]], depth: int, into: dict[int, list[int]]) -> list[list[int]]:
    """Neighbouring numbers whose blocks are the same, two at the least."""
    forms = {i: _form(picture, dots, depth, into) for i, dots in members.items() if len(dots) >= _LEAST_OPS}
    numbers = sorted(forms)
    runs: list[list[int]] = [[i] for i in numbers[:1]]
    for a, b in pairwise(numbers):
        if b == a + 1 and forms[a] == forms[b]:
            runs[-1].append(b)
        else:
            runs.append([b])
    return [run for run in runs if len(run) > 1]


def _form(picture: Picture, dots: Sequence[int], depth: int, into: dict[int, list[int]]) -> tuple[Any, ...]:
    place = {k: n for n, k in enumerate(dots)}
    steps: dict[str, int] = {}
    found = []
    for n, k in enumerate(dots):
        dot = picture.dots[k]
        inner = tuple(place.get(a, -1) for a in into[k])
        step = steps.setdefault(dot.step, n) if dot.step else -1
        found.append((dot.site.split(".")[depth:], dot.op, dot.shape, sorted(inner), step))
    return tuple(map(str, found))
