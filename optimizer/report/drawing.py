"""The program as an SVG picture: boxes coloured by decision, their bars as long as the time they take."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from graphwright.report.layout import arrange
from graphwright.report.model import SIMULATED, SiteRow
from graphwright.report.picture import Dot, Picture
from graphwright.report.words import clip, short, show_ms, show_share

_HEIGHT, _PAD = 40.0, 14.0
#: Pictures of every single op are drawn up to this size.
DETAILED = 700


def css_class(decision: str) -> str:
    """The colour class of a decision."""
    if decision.startswith(SIMULATED):
        return "simulated"
    return {"int8": "int8", "bf16": "bf16", "f32": "f32"}.get(decision, "asis")


def overview(picture: Picture, rows: Sequence[SiteRow]) -> str:
    """Ops of one module as one box, few enough to be read at a glance."""
    by_site = {s: r for r in rows for s in r.sites}
    boxes, edges = picture.folded()
    return _svg([Box.of(label, [picture.dots[k] for k in members], by_site) for label, members in boxes], edges)


def every_op(picture: Picture, rows: Sequence[SiteRow]) -> str | None:
    """A box per op, or None where that is too much to draw."""
    if len(picture.dots) > DETAILED:
        return None
    by_site = {s: r for r in rows for s in r.sites}
    return _svg([Box.of(d.site, [d], by_site) for d in picture.dots], picture.edges)


class Box:
    """One box: what is written on it, and how its time divides among decisions."""

    def __init__(self, label: str, dots: Sequence[Dot], rows: Sequence[SiteRow]):
        self.ms = sum(r.ms or 0.0 for r in rows)
        self.share = sum(r.share or 0.0 for r in rows)
        ops = [d for d in dots if d.op not in ("input", "output")]
        self.plain = not ops
        kinds = ", ".join(dict.fromkeys(d.op.removeprefix("aten.").removeprefix("graphwright.") for d in ops))
        self.title = short(label, 34)
        sizes = dots[0].shape if len(dots) == 1 else f"{len(ops)} ops"
        below = "  ".join(
            p for p in (f"{show_ms(self.ms)} ms" if self.ms else "", kinds if len(ops) == 1 else "", sizes) if p
        )
        self.below = clip(below, 44)
        self.parts: dict[str, float] = {}
        for r in rows:
            self.parts[css_class(r.decision)] = self.parts.get(css_class(r.decision), 0.0) + (r.ms or 1e-6)
        lines = [label, f"{show_ms(self.ms)} ms, {show_share(self.share)} of the time" if self.ms else "", kinds]
        lines += [
            f"{r.site}: {r.decision}, {r.kernel or r.op}, {show_ms(r.ms)} ms"
            for r in sorted(rows, key=lambda r: -(r.ms or 0.0))[:12]
        ]
        self.hover = "\n".join(line for line in lines if line)
        letters = max(len(self.title) * 7.2, len(self.below) * 6.2)
        self.width = min(max(70.0, letters + 2 * _PAD), 290.0)

    @classmethod
    def of(cls, label: str, dots: Sequence[Dot], by_site: dict[str, SiteRow]) -> Box:
        rows = {
            id(by_site[d.site]): by_site[d.site] for d in dots if d.site in by_site and d.op not in ("input", "output")
        }
        return cls(label, dots, list(rows.values()))

    def svg(self, x: float, y: float, slowest: float) -> str:
        left, top = x - self.width / 2, y - _HEIGHT / 2
        kind = "ends" if self.plain else max(self.parts, key=self.parts.__getitem__) if self.parts else "asis"
        out = [
            f'<g class="box {kind}"><title>{escape(self.hover)}</title>',
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{self.width:.1f}" height="{_HEIGHT}" rx="5"/>',
            f'<text x="{x:.1f}" y="{y - 3:.1f}">{escape(self.title)}</text>',
            f'<text class="small" x="{x:.1f}" y="{y + 11:.1f}">{escape(self.below)}</text>',
        ]
        whole, at = (self.width - 4) * (self.ms / slowest if slowest else 0.0), left + 2
        total = sum(self.parts.values())
        for part, ms in self.parts.items():
            length = whole * ms / total if total else 0.0
            if length >= 0.5:
                out.append(
                    f'<rect class="bar {part}" x="{at:.1f}" y="{top + _HEIGHT - 6:.1f}" '
                    f'width="{length:.1f}" height="4"/>'
                )
            at += length
        return "".join(out) + "</g>"


def _svg(boxes: Sequence[Box], edges: Sequence[tuple[int, int]]) -> str:
    layout = arrange([b.width for b in boxes], _HEIGHT, edges)
    slowest = max((b.ms for b in boxes), default=0.0)
    margin = 8
    width, height = layout.width + 2 * margin, layout.height + 2 * margin
    frame = f'width="{width:.0f}" height="{height:.0f}" viewBox="{-margin} {-margin} {width:.0f} {height:.0f}"'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" class="graph" role="img" aria-label="the program" {frame}>']
    out += [f'<path class="edge" d="{_path(route)}"/>' for route in layout.routes.values()]
    out += [b.svg(x, y, slowest) for b, (x, y) in zip(boxes, layout.centres, strict=True)]
    return "".join(out) + "</svg>"


def _path(points: list[tuple[float, float]]) -> str:
    """Smooth between layers, straight past the boxes."""
    (x, y), half = points[0], _HEIGHT / 2
    d = [f"M{x:.1f} {y + half:.1f}"]
    for k, (nx, ny) in enumerate(points[1:], 1):
        top = ny - half
        middle = (points[k - 1][1] + half + top) / 2
        d.append(f"C{points[k - 1][0]:.1f} {middle:.1f} {nx:.1f} {middle:.1f} {nx:.1f} {top:.1f}")
        if k < len(points) - 1:
            d.append(f"L{nx:.1f} {ny + half:.1f}")
    return "".join(d)
