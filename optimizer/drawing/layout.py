"""Layered layout of a directed acyclic graph: layers by longest path, few crossings, straight chains.

Edges over several layers are routed through points of their own in the layers between, so that they pass boxes by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_SWEEPS = 6


@dataclass
class Layout:
    """Centres of boxes and the points that each edge runs through, in pixels; ``width`` and ``height`` of it all.

    ``reach`` says, for the height of a layer's centres, how far its boxes reach above and below.
    """

    centres: list[tuple[float, float]]
    routes: dict[tuple[int, int], list[tuple[float, float]]]
    width: float
    height: float
    reach: dict[float, float]


def arrange(
    widths: Sequence[float], heights: float | Sequence[float], edges: Sequence[tuple[int, int]], gap: float = 18.0, rise: float = 26.0
) -> Layout:
    """Place boxes.

    Args:
        widths: of each box.
        heights: of each box, or one for all.
        edges: ``(from, to)`` with ``from < to``: the boxes come in topological order.
        gap, rise: least space between neighbours, and between layers.
    """
    count = len(widths)
    depth = [0] * count
    for a, b in sorted(edges, key=lambda e: e[1]):
        depth[b] = max(depth[b], depth[a] + 1)
    layers: list[list[int]] = [[] for _ in range(max(depth, default=0) + 1)]
    for k, d in enumerate(depth):
        layers[d].append(k)
    sizes = list(widths)
    chains: dict[tuple[int, int], list[int]] = {}
    above: dict[int, list[int]] = {k: [] for k in range(count)}
    below: dict[int, list[int]] = {k: [] for k in range(count)}
    for a, b in edges:
        chain = [a]
        for d in range(depth[a] + 1, depth[b]):
            point = len(sizes)
            sizes.append(10.0)
            layers[d].append(point)
            above[point], below[point] = [], []
            chain.append(point)
        chain.append(b)
        chains[a, b] = chain
        for u, v in pairwise(chain):
            below[u].append(v)
            above[v].append(u)
    _order(layers, above, below)
    x = _columns(layers, sizes, above, below, gap)
    left = min((x[k] - sizes[k] / 2 for k in range(len(sizes))), default=0.0)
    right = max((x[k] + sizes[k] / 2 for k in range(len(sizes))), default=0.0)
    each = [heights] * count if isinstance(heights, (int, float)) else heights
    y: dict[int, float] = {}
    reach: dict[float, float] = {}
    top = 0.0
    for layer in layers:
        tall = max((each[k] for k in layer if k < count), default=0.0)
        y.update(dict.fromkeys(layer, top + tall / 2))
        reach[top + tall / 2] = tall / 2
        top += tall + rise
    centres = [(x[k] - left, y[k]) for k in range(count)]
    routes = {e: [(x[k] - left, y[k]) for k in chain] for e, chain in chains.items()}
    return Layout(centres, routes, right - left, top - rise, reach)


def _order(layers: list[list[int]], above: dict[int, list[int]], below: dict[int, list[int]]) -> None:
    """Sort each layer by the mean position of its neighbours, down and up in turn."""
    place = {k: i for layer in layers for i, k in enumerate(layer)}
    for sweep in range(_SWEEPS):
        near = below if sweep % 2 else above
        for layer in reversed(layers) if sweep % 2 else layers:
            means = {k: sum(place[n] for n in near[k]) / len(near[k]) if near[k] else float(place[k]) for k in layer}
            layer.sort(key=lambda k: means[k])
            place.update((k, i) for i, k in enumerate(layer))


def _columns(
    layers: list[list[int]], sizes: list[float], above: dict[int, list[int]], below: dict[int, list[int]], gap: float
) -> list[float]:
    """Horizontal centres: every box is drawn to its neighbours, as far as its layer has room."""
    x = [0.0] * len(sizes)
    for layer in layers:
        _pack(layer, {k: 0.0 for k in layer}, sizes, x, gap)
    for sweep in range(2 * _SWEEPS):
        for layer in reversed(layers) if sweep % 2 else layers:
            wish = {}
            for k in layer:
                near = (below if sweep % 2 else above)[k] or (above if sweep % 2 else below)[k]
                wish[k] = sum(x[n] for n in near) / len(near) if near else x[k]
            _pack(layer, wish, sizes, x, gap)
    return x


def _pack(layer: list[int], wish: dict[int, float], sizes: list[float], x: list[float], gap: float) -> None:
    """Keep the order and the gaps; boxes that push each other share the shift."""
    groups: list[tuple[list[int], float]] = []  # members, and the mean of where they want the first one's centre to be
    for k in layer:
        members, start = [k], wish[k]
        while groups:
            previous, begin = groups[-1]
            reach = _span(previous, sizes, gap)
            if begin + reach + _half(previous[-1], members[0], sizes, gap) <= start:
                break
            groups.pop()
            offset = reach + _half(previous[-1], members[0], sizes, gap)
            start = (begin * len(previous) + (start - offset) * len(members)) / (len(previous) + len(members))
            members = previous + members
        groups.append((members, start))
    for members, start in groups:
        at = start
        for k, following in zip(members, [*members[1:], None], strict=True):
            x[k] = at
            if following is not None:
                at += _half(k, following, sizes, gap)


def _half(a: int, b: int, sizes: list[float], gap: float) -> float:
    return (sizes[a] + sizes[b]) / 2 + gap


def _span(members: list[int], sizes: list[float], gap: float) -> float:
    """From the first centre to the last."""
    return sum(_half(a, b, sizes, gap) for a, b in pairwise(members))
