"""A program as an SVG picture: boxes filled by the time they take, framed by how they compute, a legend above."""

from __future__ import annotations

import heapq
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from graphwright.drawing.layout import Layout, arrange
from graphwright.drawing.picture import READABLE, Dot, Picture
from graphwright.drawing.repeats import Block, Repeats, repeats
from graphwright.drawing.words import clip, short, show_ms, show_share
from graphwright.errors import SaveError

if TYPE_CHECKING:
    from graphwright.ir import Program

_HEIGHT, _PAD, _LINE, _MARGIN, _LEGEND = 40.0, 14.0, 14.0, 12.0, 44.0
#: Pictures of every single op are drawn up to this many boxes.
DETAILED = 700
#: A program with at most so many boxes is drawn op by op where nobody says how.
_AT_ONCE = 130
#: Ops of one kernel that are listed in its box.
_LISTED = 7
#: Shades of time, each beginning at this part of the slowest box's time.
_SHADES = (0.0, 0.05, 0.15, 0.35, 0.65)

#: Colours, for pages that show pictures and for files that stand alone; light and dark.
VARIABLES = """:root{color-scheme:light dark;--bg:#fff;--fg:#1c2330;--soft:#5d6778;--line:#dde2ea;--panel:#f6f8fb;--int8:#1a9c6b;
--bf16:#2f7fd6;--f32:#8a94a6;--asis:#d29a1c;--simulated:#c94f6d;--good:#14784f;--weak:#a36a00;
--t0:#fff;--t1:#fdf3dc;--t2:#fbdca6;--t3:#f6b66e;--t4:#ec8250}
@media(prefers-color-scheme:dark){:root{--bg:#12161d;--fg:#e3e8f0;--soft:#98a3b5;--line:#2c3441;--panel:#1a202a;
--int8:#34c48c;--bf16:#5aa4f0;--f32:#7d889b;--asis:#dca93a;--simulated:#e3718d;--good:#45cf98;--weak:#e0a73c;
--t0:#12161d;--t1:#2b2719;--t2:#4a3a1c;--t3:#70481f;--t4:#9c4f26}}
"""
#: How the parts of a picture look.
STYLE = """svg.graph text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;text-anchor:middle;fill:var(--fg)}
svg.graph text.small{font-size:10.5px;fill:var(--soft)}svg.graph text.op{font-size:10.5px}svg.graph text.left{text-anchor:start}
svg.graph .t3 text.small,svg.graph .t4 text.small{fill:var(--fg)}svg.graph text.many{font-size:10.5px;font-weight:600;text-anchor:end}
svg.graph .edge{fill:none;stroke:var(--soft);stroke-width:1.1;opacity:.6}
svg.graph .box rect,svg.graph .key{fill:var(--bg);stroke:var(--f32);stroke-width:1.4}svg.graph .int8 rect,svg.graph .key.int8{stroke:var(--int8)}
svg.graph .bf16 rect,svg.graph .key.bf16{stroke:var(--bf16)}svg.graph .asis rect,svg.graph .key.asis{stroke:var(--asis)}
svg.graph .simulated rect,svg.graph .key.simulated{stroke:var(--simulated)}svg.graph .ends rect{stroke:var(--line);fill:var(--panel)}
svg.graph .t0 rect,svg.graph .key.t0{fill:var(--t0)}svg.graph .t1 rect,svg.graph .key.t1{fill:var(--t1)}svg.graph .t2 rect,svg.graph .key.t2{fill:var(--t2)}
svg.graph .t3 rect,svg.graph .key.t3{fill:var(--t3)}svg.graph .t4 rect,svg.graph .key.t4{fill:var(--t4)}
svg.graph .box rect.bar{stroke:none;fill:var(--f32)}svg.graph .box rect.bar.int8{fill:var(--int8)}
svg.graph .box rect.bar.bf16{fill:var(--bf16)}svg.graph .box rect.bar.asis{fill:var(--asis)}svg.graph .box rect.bar.simulated{fill:var(--simulated)}
svg.graph .box rect.kernel{fill:none;stroke-width:1;stroke-dasharray:4 3}
svg.graph .block{fill:var(--panel);stroke:var(--line);stroke-width:1.5}svg.graph .key.none{stroke:var(--line)}
svg.graph .key.kernel{fill:none;stroke-dasharray:4 3}
"""


class Row(Protocol):
    """What a picture needs of a report's row: see ``graphwright.report.SiteRow``."""

    @property
    def site(self) -> str: ...
    @property
    def sites(self) -> tuple[str, ...]: ...
    @property
    def op(self) -> str: ...
    @property
    def decision(self) -> str: ...
    @property
    def kernel(self) -> str: ...
    @property
    def ms(self) -> float | None: ...
    @property
    def share(self) -> float | None: ...


def css_class(decision: str) -> str:
    """The colour class of a decision."""
    if decision.startswith("simulated "):
        return "simulated"
    return {"int8": "int8", "int4": "int8", "bf16": "bf16", "fp16": "bf16", "f32": "f32"}.get(decision, "asis")


def of_program(program: Program, report: Any, detailed: bool | None, path: str | os.PathLike[str] | None) -> str:
    """See ``Program.to_svg``; ``report``: of the result that runs the program, or None."""
    known = report.graph.dots if report is not None and report.graph is not None else ()
    picture = Picture.of(program, {d.name: d.step for d in known if d.step})
    rows = report.sites if report is not None else ()
    found = repeats(picture)
    wanted = len(_kernels(picture, found)[0]) <= _AT_ONCE if detailed is None else detailed
    inner = every_op(picture, rows, most=len(picture.dots)) if wanted else overview(picture, rows)
    assert inner is not None
    style = VARIABLES.replace(":root", "svg") + STYLE + "svg.graph{background:var(--bg)}"
    head, _, rest = inner.partition(">")
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n{head}><style>{style}</style>{rest}\n'
    if path is not None:
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise SaveError(f"{path} cannot be written: {error.strerror or error}", hint="Choose another folder.") from error
    return text


def overview(picture: Picture, rows: Sequence[Row]) -> str:
    """Ops of one module as one box, repeated blocks as one: few enough to be read at a glance."""
    found = repeats(picture)
    alive = [k for k, s in enumerate(found.stands) if s == k]
    at = {k: n for n, k in enumerate(alive)}
    edges = sorted({(at[found.stands[a]], at[found.stands[b]]) for a, b in picture.edges if found.stands[a] < found.stands[b]})
    boxes, _ = Picture([picture.dots[k] for k in alive], edges).folded(READABLE)
    return _drawn(picture, [(label, [alive[n] for n in members]) for label, members in boxes], found, rows)


def every_op(picture: Picture, rows: Sequence[Row], most: int = DETAILED) -> str | None:
    """A box per kernel, its ops in it, repeated blocks drawn once; None where that is more than ``most`` boxes."""
    found = repeats(picture)
    groups, _ = _kernels(picture, found)
    return None if len(groups) > most else _drawn(picture, groups, found, rows)


def _kernels(picture: Picture, found: Repeats) -> tuple[list[tuple[str, list[int]]], bool]:
    """Dots of one kernel together, as far as an order of the boxes is left; whether one was."""
    groups: dict[Any, list[int]] = {}
    for k, dot in enumerate(picture.dots):
        if found.stands[k] == k:
            groups.setdefault(dot.step or k, []).append(k)
    order = _sorted(list(groups.values()), picture, found)
    if order is None:
        order = [[k] for k, s in enumerate(found.stands) if s == k]
    return [(picture.dots[_leader(picture, g)].site, g) for g in order], len(order) == len(groups)


def _leader(picture: Picture, group: Sequence[int]) -> int:
    """The dot that a kernel's box is named after: the one that its step is called by."""
    return next((k for k in group if picture.dots[k].step == picture.dots[k].name), group[0])


def _sorted(groups: list[list[int]], picture: Picture, found: Repeats) -> list[list[int]] | None:
    """Groups such that all edges lead forwards, early ones first; None where there is a circle."""
    of = {k: n for n, g in enumerate(groups) for k in g}
    edges = {(of[a], of[b]) for a, b in _edges(picture, found) if of[a] != of[b]}
    waits = Counter(b for _, b in edges)
    after: dict[int, list[int]] = {}
    for a, b in edges:
        after.setdefault(a, []).append(b)
    ready = [(g[0], n) for n, g in enumerate(groups) if not waits[n]]
    heapq.heapify(ready)
    order = []
    while ready:
        _, n = heapq.heappop(ready)
        order.append(groups[n])
        for b in after.get(n, ()):
            waits[b] -= 1
            if not waits[b]:
                heapq.heappush(ready, (groups[b][0], b))
    return order if len(order) == len(groups) else None


def _edges(picture: Picture, found: Repeats) -> set[tuple[int, int]]:
    """Between dots that are drawn; what leads from one block to the next of its kind is left out."""
    s = found.stands
    return {(s[a], s[b]) for a, b in picture.edges if s[a] < s[b]}


# -- boxes -------------------------------------------------------------------------------------------------------------


@dataclass
class Box:
    """One box: what is written on it, and how its time divides among decisions."""

    label: str
    dots: Sequence[Dot]
    rows: Sequence[Row]
    times: int = 1
    kernel: bool = False
    parts: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ms = sum(r.ms or 0.0 for r in self.rows)
        self.share = sum(r.share or 0.0 for r in self.rows)
        ops = [d for d in self.dots if d.op not in ("input", "output")]
        self.plain = not ops
        names = [_bare(d.op) for d in ops]
        self.title = short(self.label, 34)
        listed = Counter(names) if self.kernel else Counter()
        self.lines = [f"{name} × {n}" if n > 1 else name for name, n in listed.items()]
        if len(self.lines) > _LISTED:
            self.lines = [*self.lines[: _LISTED - 1], f"and {len(self.lines) - _LISTED + 1} more"]
        kernels = list(dict.fromkeys(r.kernel for r in self.rows if r.kernel))
        size = self.dots[0].shape if len(self.dots) == 1 else kernels[0] if self.kernel and len(kernels) == 1 else "one kernel" if self.kernel else f"{len(ops)} ops"
        self.below = clip(", ".join(p for p in (f"{show_ms(self.ms)} ms" if self.ms else "", names[0] if len(ops) == 1 else "", size) if p), 44)
        for r in self.rows:
            self.parts[css_class(r.decision)] = self.parts.get(css_class(r.decision), 0.0) + (r.ms or 1e-6)
        self.hover = "\n".join(self._hover(names))
        letters = max(len(self.title) * 7.2, len(self.below) * 6.2, *(len(line) * 6.2 for line in self.lines), 0)
        self.width = min(max(70.0, letters + 2 * _PAD + (22 if self.times > 1 else 0)), 310.0)
        self.height = _HEIGHT + (len(self.lines) * _LINE + 14 if self.lines else 0)

    def _hover(self, names: Sequence[str]) -> list[str]:
        lines = [self.label + (f" and {self.times - 1} more like it" if self.times > 1 else "")]
        lines += [f"{show_ms(self.ms)} ms, {show_share(self.share)} of the time" + (", all of them" if self.times > 1 else "")] if self.ms else []
        lines += [clip(", ".join(dict.fromkeys(names)), 200)] if names else []
        sites = list(dict.fromkeys(s for r in self.rows for s in r.sites) or dict.fromkeys(d.site for d in self.dots))
        lines += [clip("sites: " + ", ".join(sites[:8]) + (f" and {len(sites) - 8} more" if len(sites) > 8 else ""), 400)] if len(sites) > 1 else []
        return lines + [
            f"{r.site}: {r.decision}, {r.kernel or r.op}, {show_ms(r.ms)} ms"
            for r in sorted(self.rows, key=lambda r: -(r.ms or 0.0))[:12]
        ]

    def shade(self, slowest: float) -> str:
        """The class of its fill."""
        part = self.ms / slowest if slowest else 0.0
        return "" if self.plain else f"t{max(k for k, least in enumerate(_SHADES) if part >= least)}"

    def svg(self, x: float, y: float, slowest: float) -> str:
        left, top = x - self.width / 2, y - self.height / 2
        kind = "ends" if self.plain else max(self.parts, key=self.parts.__getitem__) if self.parts else ""
        out = [
            f'<g class="box {kind} {self.shade(slowest)}"><title>{escape(self.hover)}</title>',
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{self.width:.1f}" height="{self.height:.1f}" rx="5"/>',
            f'<text x="{x:.1f}" y="{top + 17:.1f}">{escape(self.title)}</text>',
            f'<text class="small" x="{x:.1f}" y="{top + 31:.1f}">{escape(self.below)}</text>',
        ]
        if self.times > 1:
            out.append(f'<text class="many" x="{left + self.width - 5:.1f}" y="{top + 13:.1f}">×{self.times}</text>')
        if self.lines:
            tall = len(self.lines) * _LINE + 5
            out.append(f'<rect class="kernel" x="{left + 8:.1f}" y="{top + 38:.1f}" width="{self.width - 16:.1f}" height="{tall:.1f}" rx="4"/>')
            out += [f'<text class="op" x="{x:.1f}" y="{top + 50 + k * _LINE:.1f}">{escape(line)}</text>' for k, line in enumerate(self.lines)]
        whole, at = (self.width - 4) * (self.ms / slowest if slowest else 0.0), left + 2
        total = sum(self.parts.values())
        for part, ms in self.parts.items():
            length = whole * ms / total if total else 0.0
            if length >= 0.5:
                out.append(f'<rect class="bar {part}" x="{at:.1f}" y="{top + self.height - 6:.1f}" width="{length:.1f}" height="4"/>')
            at += length
        return "".join(out) + "</g>"


def _bare(op: str) -> str:
    return op.removeprefix("aten.").removeprefix("graphwright.")


def _rows_of(picture: Picture, rows: Sequence[Row]) -> Mapping[int, Row]:
    """The row of each dot that has one: of its site and op; where no op fits, the first of the site."""
    exact = {(s, r.op): r for r in rows for s in r.sites}
    by_site = {s: r for r in rows for s in r.sites}
    found: dict[int, Row] = {}
    given: set[int] = set()
    for k, dot in enumerate(picture.dots):
        op = "convert" if dot.op == "input" else dot.op
        row = exact.get((dot.name, op)) or exact.get((dot.site, op))
        if row is not None and dot.op != "output":
            found[k] = row
            given.add(id(row))
    for k, dot in enumerate(picture.dots):
        row = by_site.get(dot.site)
        if k not in found and row is not None and id(row) not in given and dot.op not in ("input", "output"):
            found[k] = row
            given.add(id(row))
    return found


def _drawn(picture: Picture, groups: Sequence[tuple[str, list[int]]], found: Repeats, rows: Sequence[Row]) -> str:
    """Boxes of these dots, which stand for all that repeat them."""
    row_of = _rows_of(picture, rows)
    stood: dict[int, list[int]] = {}
    for k, s in enumerate(found.stands):
        stood.setdefault(s, []).append(k)
    boxes = []
    for label, members in groups:
        everyone = [k for m in members for k in stood[m]]
        own = {id(row_of[k]): row_of[k] for k in everyone if k in row_of}
        dots = [picture.dots[k] for k in members]
        kernel = len(members) > 1 and bool(dots[0].step) and len({d.step for d in dots}) == 1
        boxes.append(Box(label, dots, list(own.values()), max(len(stood[m]) for m in members), kernel))
    of = {k: n for n, (_, members) in enumerate(groups) for k in members}
    edges = sorted({(of[a], of[b]) for a, b in _edges(picture, found) if of[a] < of[b]})
    return _svg(boxes, edges, _framed(found.blocks, of))


def _framed(blocks: Sequence[Block], of: Mapping[int, int]) -> list[tuple[Block, list[int]]]:
    """Blocks and the boxes that they are drawn as; boxes that hold more than the block make no frame."""
    framed = []
    for block in blocks:
        boxes = sorted({of[k] for k in block.dots if k in of})
        inside = set(block.dots)
        if boxes and all(k in inside for k, box in of.items() if box in boxes):
            framed.append((block, boxes))
    return framed


def _svg(boxes: Sequence[Box], edges: Sequence[tuple[int, int]], framed: Sequence[tuple[Block, list[int]]] = ()) -> str:
    layout = arrange([b.width for b in boxes], [b.height for b in boxes], edges, rise=30.0)
    slowest = max((b.ms for b in boxes), default=0.0)
    width = max(layout.width, 660.0) + 2 * _MARGIN
    height = layout.height + 2 * _MARGIN + _LEGEND
    shift = (width - 2 * _MARGIN - layout.width) / 2
    frame = f'width="{width:.0f}" height="{height:.0f}" viewBox="{-_MARGIN} {-_MARGIN} {width:.0f} {height:.0f}"'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" class="graph" role="img" aria-label="the program" {frame}>', _legend(boxes, slowest, bool(framed))]
    out.append(f'<g transform="translate({shift:.1f} {_LEGEND:.1f})">')
    out += [_frame(block, members, boxes, layout) for block, members in framed]
    out += [f'<path class="edge" d="{_path(boxes[a], boxes[b], route, layout)}"/>' for (a, b), route in layout.routes.items()]
    out += [b.svg(x, y, slowest) for b, (x, y) in zip(boxes, layout.centres, strict=True)]
    return "".join(out) + "</g></svg>"


def _frame(block: Block, members: Sequence[int], boxes: Sequence[Box], layout: Layout) -> str:
    """A ground under a repeated block, where nothing else stands on it."""
    spans = [(x - b.width / 2, y - b.height / 2, x + b.width / 2, y + b.height / 2) for b, (x, y) in zip(boxes, layout.centres, strict=True)]
    left, top = min(spans[k][0] for k in members) - 8, min(spans[k][1] for k in members) - 12
    right, bottom = max(spans[k][2] for k in members) + 8, max(spans[k][3] for k in members) + 12
    own = set(members)
    if any(k not in own and l < right and r > left and t < bottom and b > top for k, (l, t, r, b) in enumerate(spans)):
        return ""
    title = escape(f"{block.first} to {block.last}: {block.count} alike, the first is drawn; times are those of all")
    return f'<g><title>{title}</title><rect class="block" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" rx="9"/></g>'


def _legend(boxes: Sequence[Box], slowest: float, blocks: bool) -> str:
    """What colours and frames mean, of those that occur."""
    out: list[str] = []
    x = 0.0

    def key(classes: str, words: str, y: float) -> None:
        nonlocal x
        out.append(f'<rect class="key {classes}" x="{x:.1f}" y="{y:.1f}" width="16" height="11" rx="2"/>'
                   f'<text class="small left" x="{x + 21:.1f}" y="{y + 9.5:.1f}">{escape(words)}</text>')  # fmt: skip
        x += 21 + len(words) * 5.9 + 14

    if slowest:
        for k, least in enumerate(_SHADES):
            key(f"none t{k}", f"{show_ms(least * slowest)} ms on" if k else "less", 0.0)
    else:
        key("none t0", "no times are known: they come with a result, fast.program.to_svg(path)", 0.0)
    x = 0.0
    seen = {part for b in boxes for part in b.parts}
    for part, words in (("int8", "int8"), ("bf16", "bf16 or fp16"), ("f32", "f32"), ("asis", "left as it was"), ("simulated", "simulated")):
        if part in seen:
            key(part, words, 18.0)
    if any(b.kernel for b in boxes):
        key("kernel", "ops of one kernel", 18.0)
    if blocks or any(b.times > 1 for b in boxes):
        key("none block", "×n: drawn once, times of all", 18.0)
    return "".join(out)


def _path(start: Box, end: Box, points: list[tuple[float, float]], layout: Layout) -> str:
    """Smooth between layers, straight past the boxes."""
    (x, y), last = points[0], len(points) - 1
    floor = y + layout.reach[y]
    d = [f"M{x:.1f} {y + start.height / 2:.1f}L{x:.1f} {floor:.1f}"]
    for k, (nx, ny) in enumerate(points[1:], 1):
        top = ny - layout.reach[ny]
        middle = (floor + top) / 2
        d.append(f"C{points[k - 1][0]:.1f} {middle:.1f} {nx:.1f} {middle:.1f} {nx:.1f} {top:.1f}")
        floor = ny + layout.reach[ny]
        d.append(f"L{nx:.1f} {floor if k < last else ny - end.height / 2:.1f}")
    return "".join(d)
