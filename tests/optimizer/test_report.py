"""The report: golden text, JSON round trip, a page that is self-contained and escaped, and the story of a site."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphwright.drawing.layout import arrange
from graphwright.drawing.picture import Dot
from graphwright.errors import LoadError, SaveError, SiteError
from graphwright.ir import Program, Signature
from graphwright.manager import PassRecord, PassResult
from graphwright.measure import Timing
from graphwright.report import Accuracy, Option, Picture, Region, Report, SiteRow, explain


def bert(layers: int = 12) -> Report:
    """Made-up figures in the shape of a real run: an encoder of ``layers`` layers in int8."""
    dots, edges, rows = [Dot("input_ids", "input_ids", "input", "i64[1, 128]")], [], []

    def add(site: str, op: str, shape: str, reads: list[int], **facts: object) -> int:
        dots.append(Dot(f"n{len(dots)}", site, op, shape))
        edges.extend((r, len(dots) - 1) for r in reads)
        rows.append(
            SiteRow(
                (site, *facts.pop("also", ())), op, shape=shape, trace=f"modeling_bert.py:{100 + len(site)}", **facts
            )
        )
        return len(dots) - 1

    def dense(site: str, i: int, o: int, reads: list[int], ms: float, db: float, also: tuple[str, ...] = ()) -> int:
        options = (
            Option("onednn.int8-linear", ms),
            Option("onednn.linear", 2.7 * ms),
            Option("aten.native", 3.4 * ms),
            Option("onednn.bf16-linear", None, "the recipe allows float32 and int8"),
        )
        return add(
            site,
            "graphwright.linear",
            f"f32[1, 128, {o}]",
            reads,
            decision="int8",
            kernel="onednn.int8-linear",
            backend="onednn",
            options=options,
            ms=ms,
            sqnr_db=db,
            flops=2 * 128 * i * o,
            bytes=i * o + 128 * (i + o) * 4,
            also=also,
        )

    x = add(
        "embeddings.word_embeddings",
        "aten.embedding",
        "f32[1, 128, 768]",
        [0],
        kernel="aten.native",
        backend="aten",
        ms=0.031,
    )
    x = add(
        "embeddings.LayerNorm",
        "graphwright.norm",
        "f32[1, 128, 768]",
        [x],
        decision="f32",
        kernel="llvm.norm",
        backend="llvm",
        ms=0.024,
    )
    for k in range(layers):
        at = f"encoder.layer.{k}"
        q, key, v = (
            dense(f"{at}.attention.self.{n}", 768, 768, [x], 0.21 + k / 900, 44.1 - k)
            for n in ("query", "key", "value")
        )
        views = [
            add(
                f"{at}.attention.self.{n}",
                "aten.view",
                "f32[1, 128, 12, 64]",
                [s],
                kernel="aten.native",
                backend="aten",
                ms=0.001,
            )
            for n, s in (("view", q), ("view#2", key), ("view#3", v))
        ]
        a = add(
            f"{at}.attention.self.scaled_dot_product_attention",
            "aten.scaled_dot_product_attention",
            "f32[1, 12, 128, 64]",
            views,
            decision="f32",
            kernel="aten.two-matmuls",
            backend="aten",
            ms=0.38,
            options=(Option("aten.two-matmuls", 0.36), Option("aten.native", 0.49)),
            reason="int8 attention: SQNR 14.2 dB at this site is below 20",
        )
        o = dense(f"{at}.attention.output.dense", 768, 768, [a, x], 0.23, 41.0 - k, (f"{at}.attention.output.add",))
        n1 = add(
            f"{at}.attention.output.LayerNorm",
            "graphwright.norm",
            "f32[1, 128, 768]",
            [o],
            decision="f32",
            kernel="llvm.norm-quantize",
            backend="llvm",
            ms=0.026,
        )
        h = dense(f"{at}.intermediate.dense", 768, 3072, [n1], 0.81, 38.5 - k, (f"{at}.intermediate.gelu",))
        d = dense(f"{at}.output.dense", 3072, 768, [h, n1], 0.77, 18.5 if k == 10 else 36.2 - k, (f"{at}.output.add",))
        x = add(
            f"{at}.output.LayerNorm",
            "graphwright.norm",
            "f32[1, 128, 768]",
            [d],
            decision="f32",
            kernel="llvm.norm-quantize",
            backend="llvm",
            ms=0.025,
        )
    p = dense("pooler.dense", 768, 768, [x], 0.03, 33.0)
    t = add("pooler.activation", "aten.tanh", "f32[1, 768]", [p], kernel="aten.native", backend="aten", ms=0.003)
    dots.append(Dot("output", "output", "output", ""))
    edges += [(x, len(dots) - 1), (t, len(dots) - 1)]
    total = sum(r.ms or 0 for r in rows)
    rows = [SiteRow(**{**vars(r), "share": (r.ms or 0) / total}) for r in rows]
    denses = [r.site for r in rows if r.decision == "int8"]
    attention = [r.site for r in rows if "scaled_dot" in r.site]
    passes = [
        PassRecord(
            "canonicalize",
            "exact",
            PassResult([(f"encoder.layer.{k}.output.dropout", "removed: eval mode") for k in range(layers)]),
            0.09,
            233,
            196,
            438_000_000,
            438_000_000,
            math.inf,
        ),
        PassRecord("fold-batch-norm", "exact", PassResult(), 0.01, 196, 196, 438_000_000, 438_000_000),
        PassRecord(
            "fuse-activation",
            "exact",
            PassResult(
                [(f"encoder.layer.{k}.intermediate.dense", "took in gelu") for k in range(layers)],
                [("pooler.activation", "the linear before it has another reader")],
            ),
            0.06,
            196,
            184,
            438_000_000,
            438_000_000,
            131.4,
        ),
        PassRecord(
            "merge-parallel-linears",
            "exact",
            PassResult(
                refusals=[(f"encoder.layer.{k}.attention.self.query", "undone: measured slower") for k in range(layers)]
            ),
            0.3,
            184,
            184,
            438_000_000,
            438_000_000,
            None,
            "undone: output 0: RMS error 2.1e-06 against float64 exceeds 1.7e-06",
        ),
        PassRecord(
            "quantize",
            "lossy",
            PassResult(
                [(s, "int8, weights per channel") for s in denses],
                [(s, "softmax inputs are left in float") for s in attention],
                ["calibrated on 64 batches"],
            ),
            2.41,
            184,
            402,
            438_000_000,
            110_300_000,
            32.6,
        ),
    ]
    return Report(
        "BertModel",
        "int8",
        "3.27x faster than the original; outputs within 32.6 dB of it.",
        "2026-03-01T10:11:12+00:00",
        {"cpu": "Example CPU (6/143/8)", "isa": "AVX512", "cores": 2, "flags": ["avx512_vnni", "avx512_bf16"]},
        {"graphwright": "0.1.0", "torch": "2.13.0"},
        2,
        Timing(173.2, 176.4, 189.0, 30),
        Timing(52.9, 54.1, 58.8, 30),
        438_000_000,
        110_300_000,
        110_654_321,
        61.2,
        38.0,
        Accuracy(0.8412, 0.8395, "Pearson", 0.005),
        32.6,
        0.0412,
        passes,
        rows,
        [Region("modeling_bert.py:301", "print() reads a tensor's value")],
        ["past key values were not given and are not computed"],
        ["all sites: score drops by 0.0017, budget 0.005"],
        ["the machine was busy while timing: the spread is 11 %"],
        {"capture": 2.2, "passes": 2.9, "lowering": 4.1},
        Picture(dots, edges),
    )


GOLDEN = """\
BertModel, recipe int8
3.27x faster than the original; outputs within 32.6 dB of it.
2026-03-01; Example CPU (6/143/8); 2 threads; graphwright 0.1.0, torch 2.13.0; optimized in 9.2 s
                  original  optimized
latency, minimum    173 ms    52.9 ms  3.27x
latency, median     176 ms    54.1 ms  3.26x
latency, p95        189 ms    58.8 ms  3.21x
tensors             438 MB     110 MB  3.97x smaller
peak memory        64.2 MB    39.8 MB  1.61x smaller
saved file                     111 MB
Pearson             0.8412     0.8395  -0.0017 of 0.005 allowed
output error                           SQNR 32.6 dB, largest 0.0412
Warning: the machine was busy while timing: the spread is 11 %

Passes
pass                             changed  declined      nodes          tensors  SQNR dB     s
canonicalize                           3         0  233 > 196           438 MB    equal  0.09
fuse-activation                        3         1  196 > 184           438 MB    131.4  0.06
merge-parallel-linears (undone)        0         3        184           438 MB           0.30
quantize                              19         3  184 > 402  438 MB > 110 MB     32.6  2.41
  nothing to do for fold-batch-norm

Sites, the slowest 12 of 40
  Decisions: int8 19, left as it was 11, f32 10
  Time: onednn 84 %, aten 14 %, llvm 2 %
  Quantization: real at 19 ops, simulated at 0
site                                    decision  kernel                 ms  share  gain  SQNR dB
encoder.layer.0.intermediate.dense      int8      onednn.int8-linear  0.810  9.3 %  2.7x     38.5
encoder.layer.1.intermediate.dense      int8      onednn.int8-linear  0.810  9.3 %  2.7x     37.5
encoder.layer.2.intermediate.dense      int8      onednn.int8-linear  0.810  9.3 %  2.7x     36.5
encoder.layer.0.output.dense            int8      onednn.int8-linear  0.770  8.8 %  2.7x     36.2
encoder.layer.1.output.dense            int8      onednn.int8-linear  0.770  8.8 %  2.7x     35.2
encoder.layer.2.output.dense            int8      onednn.int8-linear  0.770  8.8 %  2.7x     34.2
e.l.0.a.s.scaled_dot_product_attention  f32       aten.two-matmuls    0.380  4.4 %  1.4x
e.l.1.a.s.scaled_dot_product_attention  f32       aten.two-matmuls    0.380  4.4 %  1.4x
e.l.2.a.s.scaled_dot_product_attention  f32       aten.two-matmuls    0.380  4.4 %  1.4x
encoder.layer.0.attention.output.dense  int8      onednn.int8-linear  0.230  2.6 %  2.7x     41.0
encoder.layer.1.attention.output.dense  int8      onednn.int8-linear  0.230  2.6 %  2.7x     40.0
encoder.layer.2.attention.output.dense  int8      onednn.int8-linear  0.230  2.6 %  2.7x     39.0
  and 28 more, 24.7 % of the time: report.text(full=True)

Declined, 10 times
    3  merge-parallel-linears: undone: measured slower (encoder.layer.0.attention.self.query and 2
       more)
    3  quantize: softmax inputs are left in float (e.l.0.a.s.scaled_dot_product_attention and 2
       more)
    3  lowering: int8 attention: SQNR 14.2 dB at this site is below 20
       (e.l.0.a.s.scaled_dot_product_attention and 2 more)
    1  fuse-activation: the linear before it has another reader (pooler.activation)

Not captured: runs as you wrote it
  modeling_bert.py:301: print() reads a tensor's value

Search
  all sites: score drops by 0.0017, budget 0.005

Notes
  past key values were not given and are not computed"""


def test_the_text_at_width_100() -> None:
    assert bert(3).text(width=100) == GOLDEN


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_no_line_is_wider_than_asked(width: int) -> None:
    for full in (False, True):
        text = bert(2).text(full=full, width=width)
        assert max(map(len, text.splitlines())) <= width
        assert "\x1b" not in text


def test_the_full_text_has_every_site_and_the_short_one_says_what_is_left_out() -> None:
    report = bert()
    full, short = report.text(full=True, width=160), report.text(width=160)
    assert all(r.site[-20:] in full for r in report.sites)
    assert len(short.splitlines()) < 60 and "text(full=True)" in short
    assert str(report) == report.text()


def test_colour_only_on_a_terminal() -> None:
    for terminal in (True, False):
        out = io.StringIO()
        Console(file=out, force_terminal=terminal, color_system="standard" if terminal else None, width=100).print(
            bert(2)
        )
        assert ("\x1b[" in out.getvalue()) == terminal


def test_an_empty_report_is_shown_too() -> None:
    report = Report("Tiny", "default", "Not faster: the captured graph runs unchanged.", "2026-03-01T00:00:00+00:00")
    assert report.text(width=100).splitlines() == [
        "Tiny, recipe default",
        "Not faster: the captured graph runs unchanged.",
        "2026-03-01",
    ]
    assert "captured graph runs unchanged" in report.to_html()
    assert Report.from_json(report.to_json()) == report


def test_facts_that_follow() -> None:
    report = bert()
    assert report.speedup == pytest.approx(173.2 / 52.9)
    assert sum(report.backend_shares().values()) == pytest.approx(1)
    assert next(iter(report.backend_shares())) == "onednn"
    assert report.refusals()[0] == ("fuse-activation", "pooler.activation", "the linear before it has another reader")
    assert [len(s) for _, _, s in report.grouped_refusals()] == [12, 12, 12, 1]
    assert report.by_time()[0].ms == max(r.ms or 0 for r in report.sites)
    simulated = Report(
        "m",
        "int8",
        "v",
        sites=[SiteRow(("a",), "aten.linear", "simulated int8"), SiteRow(("b",), "aten.linear", "int8")],
    )
    assert "real at 1 op, simulated at 1" in simulated.text()


def test_json_keeps_everything() -> None:
    report = bert()
    twin = Report.from_json(report.to_json())
    assert twin == report and twin.passes[0].error == math.inf
    assert Report.from_dict(report.to_dict()) == report
    assert twin.to_html() == report.to_html()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"model": 1}',
        "[" * 99_999,
        '{"model":"m","recipe":"r","verdict":"v","sites":[{"sites":"ab","op":"x"}]}',
        '{"model":"m","recipe":"r","verdict":"v","threads":true}',
        '{"model":"m","recipe":"r","verdict":"v","graph":{"dots":[],"edges":[[1]]}}',
    ],
)
def test_wrong_json_is_refused(text: str) -> None:
    with pytest.raises(LoadError, match="report"):
        Report.from_json(text)


# -- the page --------------------------------------------------------------------------------------------------------


VOID = {"meta", "br"}


class Checker(HTMLParser):
    """Well-nested, nothing fetched, no scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert tag not in ("script", "link", "img", "iframe", "object", "form")
        for name, value in attrs:
            assert name not in ("src", "href", "onload", "onclick", "onerror"), (name, value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag


def check_page(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert not checker.open
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import", text)
    return checker


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    report = bert()
    text = report.to_html(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == text
    seen = check_page(text).seen
    assert seen.count("svg") == 2 and "prefers-color-scheme:dark" in text
    assert all(f">{r.site}<" in text for r in report.sites)
    assert len(text) < 2_000_000
    with pytest.raises(SaveError, match="cannot be written"):
        report.to_html(tmp_path / "missing" / "r.html")


NASTY = "<script>alert('x')</script>\"&'"


def test_everything_is_escaped() -> None:
    report = Report(
        NASTY,
        NASTY,
        NASTY,
        NASTY,
        {NASTY: NASTY},
        {NASTY: NASTY},
        warnings=[NASTY],
        notes=[NASTY],
        log=[NASTY],
        regions=[Region(NASTY, NASTY)],
        passes=[
            PassRecord(
                NASTY, NASTY, PassResult([(NASTY, NASTY)], [(NASTY, NASTY)], [NASTY]), 1.0, 1, 1, 1, 1, 1.0, NASTY
            )
        ],
        seconds={NASTY: 1.0},
        accuracy=Accuracy(1.0, 1.0, NASTY),
        sites=[
            SiteRow(
                (NASTY, NASTY),
                NASTY,
                NASTY,
                NASTY,
                NASTY,
                NASTY,
                (Option(NASTY, 1.0, NASTY),),
                1.0,
                1.0,
                1.0,
                1,
                1,
                NASTY,
                NASTY,
            )
        ],
        graph=Picture([Dot(NASTY, NASTY, NASTY, NASTY), Dot("o", NASTY, "output", NASTY)], [(0, 1)]),
    )
    text = report.to_html()
    check_page(text)
    assert "<script" not in text
    assert NASTY[:20] in report.text(width=160)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=30), st.floats(allow_nan=True, allow_infinity=True), st.text(max_size=10))
def test_any_words_and_figures(words: str, figure: float, more: str) -> None:
    row = SiteRow(
        (words, more),
        more,
        words,
        more,
        words,
        options=(Option(more, figure),),
        ms=abs(figure) if math.isfinite(figure) else None,
        sqnr_db=figure,
        reason=more,
    )
    report = Report(
        words, more, words, sqnr_db=figure, max_abs=figure, sites=[row], graph=Picture([Dot("a", words, more, "")], [])
    )
    check_page(report.to_html())
    assert report.text(width=80)
    assert repr(Report.from_json(report.to_json())) == repr(report)


# -- the picture -----------------------------------------------------------------------------------------------------


def test_large_graphs_fold_by_module() -> None:
    picture = bert().graph
    boxes, edges = picture.folded()
    assert len(boxes) <= 64 < len(picture.dots)
    assert sorted(k for _, members in boxes for k in members) == list(range(len(picture.dots)))
    assert all(a < b for a, b in edges)
    assert {"encoder.layer.0.attention", "encoder.layer.11.output"} <= {
        label for label, _ in boxes
    } or "encoder.layer.0" in {label for label, _ in boxes}


def test_names_without_structure_fold_into_equal_parts() -> None:
    dots = [Dot(f"n{k}", f"conv#{k}", "aten.conv2d", "") for k in range(1000)]
    boxes, edges = Picture(dots, [(k, k + 1) for k in range(999)]).folded()
    assert len(boxes) <= 64 and len(edges) == len(boxes) - 1


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_boxes_never_overlap(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 25))
    widths = [float(data.draw(st.integers(20, 300))) for _ in range(count)]
    pairs = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(lambda p: p[0] < p[1])
    edges = data.draw(st.lists(pairs, max_size=40, unique=True)) if count > 1 else []
    layout = arrange(widths, 40.0, edges)
    spots = [(x - w / 2, x + w / 2, y) for (x, y), w in zip(layout.centres, widths, strict=True)]
    for k, (left, right, y) in enumerate(spots):
        assert -0.01 <= left and right <= layout.width + 0.01
        for left2, right2, y2 in spots[:k]:
            assert y != y2 or right <= left2 + 0.01 or right2 <= left + 0.01
    assert all(layout.centres[a][1] < layout.centres[b][1] for a, b in edges)
    assert all(
        route[0] == layout.centres[a] and route[-1] == layout.centres[b] for (a, b), route in layout.routes.items()
    )


def small_program() -> Program:
    """A linear and a relu in one module, and an add outside of it."""
    mode = FakeTensorMode()
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = mode.from_tensor(torch.zeros(2, 4))
    graph.output((x,))
    program = Program(fx.GraphModule(nn.Module(), graph), Signature(), mode)
    weight = program.add_tensor("head.fc.weight", torch.zeros(4, 4))
    with program.graph.inserting_before(program.output):
        a = program.call(torch.ops.aten.linear.default, program.placeholders[0], weight, sites=["head.fc", "head.fc2"])
        b = program.call(torch.ops.aten.relu.default, a, sites=["head.relu"])
        c = program.call(torch.ops.aten.add.Tensor, a, b, sites=["add"])
    a.meta["trace"] = "model.py:7"
    program.output.args = ((c,),)
    return program


def test_the_picture_of_a_program() -> None:
    picture = Picture.of(small_program())
    assert [(d.site, d.op, d.shape) for d in picture.dots] == [
        ("x", "input", "f32[2, 4]"),
        ("head.fc", "aten.linear", "f32[2, 4]"),
        ("head.relu", "aten.relu", "f32[2, 4]"),
        ("add", "aten.add.Tensor", "f32[2, 4]"),
        ("output", "output", ""),
    ]
    assert picture.edges == [(0, 1), (1, 2), (1, 3), (2, 3), (3, 4)]
    boxes, edges = picture.folded(4)
    assert boxes == [("x", [0]), ("head", [1, 2]), ("add", [3]), ("output", [4])]
    assert edges == [(0, 1), (1, 2), (2, 3)]


def test_ops_without_a_row_are_explained_from_the_program() -> None:
    text = explain(Report("m", "r", "v"), "head.fc2", program=small_program())
    assert text.splitlines()[0] == "head.fc (with head.fc2)"
    assert "aten.linear gives f32[2, 4], from model.py:7" in text


# -- explain ---------------------------------------------------------------------------------------------------------


def test_the_story_of_a_site() -> None:
    assert (
        explain(bert(2), "encoder.layer.1.intermediate.dense")
        == """\
encoder.layer.1.intermediate.dense (with encoder.layer.1.intermediate.gelu)
  captured         graphwright.linear gives f32[1, 128, 3072], from modeling_bert.py:134
  fuse-activation  took in gelu
  quantize         int8, weights per channel
  now              int8: onednn.int8-linear, 0.810 ms, 13.9 % of the time, SQNR 37.5 dB, 746 GFLOP/s, 5.3 GB/s
  timed             0.810 ms  onednn.int8-linear  taken, 2.7x faster than the next
                     2.19 ms  onednn.linear
                     2.75 ms  aten.native
  not usable       onednn.bf16-linear: the recipe allows float32 and int8"""
    )


def test_sites_that_are_gone_or_merged_are_explained_too() -> None:
    report = bert(2)
    assert "gone" in explain(report, "encoder.layer.0.output.dropout")
    assert explain(report, "encoder.layer.0.intermediate.gelu").startswith("encoder.layer.0.intermediate.dense (with")
    assert explain(report, "encoder.layer.0.*").count("\n\n") > 8


def test_a_pattern_without_a_match_names_its_neighbours() -> None:
    with pytest.raises(SiteError, match=r"pooler.dens' matches no site(.|\n)*'pooler.dense'"):
        explain(bert(2), "pooler.dens")
