"""Pictures of programs: every op is in one box, kernels and repeated blocks are told, and the SVG is well-formed."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.capture import capture
from graphwright.drawing.layout import arrange
from graphwright.drawing.picture import Dot, Picture
from graphwright.drawing.repeats import repeats
from graphwright.drawing.svg import _kernels, every_op, overview
from graphwright.report import SiteRow

SVG = "{http://www.w3.org/2000/svg}"


def boxes(svg: str) -> list[ET.Element]:
    return [g for g in ET.fromstring(svg).iter(f"{SVG}g") if "box" in (g.get("class") or "")]


def titles(svg: str) -> list[str]:
    return [g.findtext(f"{SVG}text") or "" for g in boxes(svg)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.relu(self.a(x)))


def blocks(count: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), *(Block() for _ in range(count)), nn.Tanh()).eval()


def test_repeated_blocks_are_drawn_once():
    program = capture(blocks(30), (torch.randn(2, 8),)).program
    assert program is not None
    found = repeats(Picture.of(program))
    assert [(b.first, b.last, b.count, len(b.dots)) for b in found.blocks] == [("1", "30", 30, 4)]
    svg = program.to_svg()
    assert titles(svg) == ["input_1", "0", "1.a", "1.relu", "1.b", "1.add", "31", "output"]
    assert svg.count("×30") == 4 and "1 to 30: 30 alike" in svg


def test_a_block_that_differs_is_drawn_by_itself():
    program = capture(blocks(6), (torch.randn(2, 8),)).program
    assert program is not None
    other = Picture.of(program)
    dots = [Dot(d.name, d.site, "aten.gelu" if d.site == "3.relu" else d.op, d.shape) for d in other.dots]
    assert [(b.first, b.last) for b in repeats(Picture(dots, other.edges)).blocks] == [("1", "2"), ("4", "6")]


def test_kernels_and_times(tmp_path):
    x = torch.randn(2, 3, 12, 12)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()).eval()
    fast = gw.optimize(model, x, "int8", calibration=[x], goal=gw.Goal(size_mb=100))
    svg = fast.program.to_svg(tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text() == svg
    fused = [g for g in boxes(svg) if g.find(f"{SVG}rect[@class='kernel']") is not None]
    assert any({"conv", "dequantize_channel"} <= {t.text for t in g.findall(f"{SVG}text")} for g in fused)
    assert any("sites: 0, 1, 2" in (g.findtext(f"{SVG}title") or "") for g in fused), "sites are hover text"
    assert any(re.search(r"\bt4\b", g.get("class") or "") for g in boxes(svg)), "the slowest box has the darkest shade"
    total = sum(r.ms or 0.0 for r in fast.report.sites)
    shown = sum(float(ms) for ms in re.findall(r"<title>[^<]*?\n([\d.]+) ms, ", svg))
    assert shown == pytest.approx(total, rel=0.15), "no time is lost, none told twice"
    assert "ops of one kernel" in svg and "ms on" in svg
    fast.save(tmp_path / "m.gw")
    assert gw.load(tmp_path / "m.gw").program.to_svg() == svg
    page = fast.report.to_html()
    assert page.count("<svg") == 2 and "ops of one kernel" in page


def test_without_a_result_no_times_are_claimed(tmp_path):
    program = capture(blocks(1), (torch.randn(2, 8),)).program
    assert program is not None
    assert "no times are known" in program.to_svg() and " ms" not in program.to_svg()
    with pytest.raises(gw.SaveError, match="cannot be written"):
        program.to_svg(tmp_path / "no" / "p.svg")


@st.composite
def pictures(draw: st.DrawFn) -> Picture:
    """Graphs with numbered modules, kernels of neighbours and of strangers, and hostile names."""
    count = draw(st.integers(1, 40))
    site = st.sampled_from(["a.0.x", "a.1.x", "a.2.x", "a.0.y", "a.1.y", "b", "<&>\"'", "a.0.z.1.q", "é.3"])
    op = st.sampled_from(["aten.add", "aten.mul", "graphwright.conv"])
    dots = [Dot(f"n{k}", draw(site), draw(op), "f32[2]", draw(st.sampled_from(["", "", "s1", "s2"]))) for k in range(count)]
    pairs = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(lambda p: p[0] < p[1])
    return Picture(dots, sorted(set(draw(st.lists(pairs, max_size=60)) if count > 1 else [])))


@settings(max_examples=120, deadline=None)
@given(pictures())
def test_any_picture_is_drawn_whole(picture):
    found = repeats(picture)
    assert all(found.stands[s] == s for s in found.stands)
    groups, _ = _kernels(picture, found)
    assert sorted(k for _, g in groups for k in g) == [k for k, s in enumerate(found.stands) if s == k]
    place = {k: n for n, (_, g) in enumerate(groups) for k in g}
    for a, b in picture.edges:
        a, b = found.stands[a], found.stands[b]
        assert a >= b or place[a] <= place[b], "no edge leads backwards"
    rows = [SiteRow((d.site,), d.op, "int8", "llvm.k", ms=1.0) for d in picture.dots]
    for svg in (every_op(picture, rows), overview(picture, rows)):
        assert svg is not None
        ET.fromstring(svg)
    assert len(boxes(overview(picture, rows))) <= 64


def test_a_large_graph_without_names_is_folded():
    dots = [Dot(f"n{k}", f"op#{k}", "aten.add", "") for k in range(900)]
    svg = overview(Picture(dots, [(k, k + 1) for k in range(899)]), [])
    assert 20 <= len(boxes(svg)) <= 64
    assert every_op(Picture(dots, []), []) is None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_boxes_of_several_heights_never_overlap(data):
    count = data.draw(st.integers(1, 20))
    sizes = [(float(data.draw(st.integers(20, 300))), float(data.draw(st.integers(20, 200)))) for _ in range(count)]
    pairs = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(lambda p: p[0] < p[1])
    edges = data.draw(st.lists(pairs, max_size=30, unique=True)) if count > 1 else []
    layout = arrange([w for w, _ in sizes], [h for _, h in sizes], edges)
    spots = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for (x, y), (w, h) in zip(layout.centres, sizes, strict=True)]
    for k, (l, t, r, b) in enumerate(spots):
        assert -0.01 <= l and -0.01 <= t and r <= layout.width + 0.01 and b <= layout.height + 0.01
        assert all(r <= l2 + 0.01 or r2 <= l + 0.01 or b <= t2 + 0.01 or b2 <= t + 0.01 for l2, t2, r2, b2 in spots[:k])
