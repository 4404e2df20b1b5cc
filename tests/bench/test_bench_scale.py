"""Nothing grows faster than the graph: function calls are counted on a graph and on one twice as large. No timing."""

from __future__ import annotations

import cProfile
import functools
import gc
import json
import sys
from collections.abc import Callable

import pytest
import torch

from bench import graphs, scale
from graphwright import backends, store
from graphwright.inference import Inference
from graphwright.ir import Program
from graphwright.lower.graph import analyse
from graphwright.lower.runner import emit
from graphwright.lower.select import pose, solve
from graphwright.lower.stopwatch import Stopwatch, signature
from graphwright.manager import Pipeline
from graphwright.numerics import run_pure
from graphwright.passes.pipeline import DEFAULT
from graphwright.report import Picture

SIZES = (250, 500)
#: twice the nodes may take this many times the calls; n log n gives 2.2
MOST = 2.3


def calls(run: Callable[[], object]) -> int:
    """How many functions ``run`` calls, C ones included; those that a garbage collection calls are nobody's."""
    profile = cProfile.Profile()
    gc.collect()
    gc.disable()
    try:
        profile.enable()
        run()
    finally:
        profile.disable()
        gc.enable()
    return sum(entry.callcount for entry in profile.getstats())


@functools.cache
def built(size: int, form: str) -> Program:
    return graphs.build(size, form)


def generated(size: int, form: str) -> Program:
    """A copy, since what is asked of it may change it, which has inferred nothing yet."""
    program = built(size, form).copy()
    program._inference = Inference()
    return program


def growth(form: str, made: Callable[[Program], Callable[[], object]]) -> float:
    """Calls per node on the larger graph over those on the smaller one, times two."""
    made(generated(SIZES[0] // 2, form))()  # imports
    counts = []
    for size in SIZES:
        program = generated(size, form)
        counts.append(calls(made(program)) / len(program.nodes))
    return 2 * counts[1] / counts[0]


def optimized(program: Program) -> Program:
    program.example = None
    return Pipeline(DEFAULT).run(program)[0]


@pytest.mark.parametrize("form", graphs.FORMS)
@pytest.mark.parametrize("example", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_the_default_pipeline(form, example):
    def made(program):
        program.example = program.example if example else None
        return lambda: Pipeline(DEFAULT).run(program)

    assert growth(form, made) < MOST


@pytest.mark.soak
@pytest.mark.parametrize("form", graphs.FORMS)
def test_each_pass(form):
    slow = {}
    for p in DEFAULT:
        ratio = growth(form, lambda program, p=p: lambda: p.run(program))
        if ratio >= 1.1 * MOST:  # one pass's share of two random graphs differs
            slow[p.name] = ratio
    assert not slow


@pytest.mark.parametrize("form", graphs.FORMS)
def test_what_programs_are_asked(form):
    questions: dict[str, Callable[[Program], object]] = {
        "copy": Program.copy, "verify": Program.verify, "text": str, "tidy": Program.tidy, "sites": Program.sites,
        "size": Program.size_bytes, "run": lambda p: run_pure(p, p.example), "picture": lambda p: Picture.of(p).folded(),
    }  # fmt: skip
    for name, ask in questions.items():
        assert growth(form, lambda program, ask=ask: lambda: ask(program)) < MOST, name


@pytest.mark.parametrize("form", graphs.FORMS)
def test_save_and_load(form, tmp_path):
    path = tmp_path / "program.gw"

    def save(program):
        store.save(path, store.Archive([store.Variant(program)]))

    assert growth(form, lambda program: lambda: save(program)) < MOST

    def load(program):
        save(program)
        return lambda: store.load(path)

    assert growth(form, load) < MOST


@pytest.mark.parametrize("form", graphs.FORMS)
def test_lowering(form):
    def lowered(program):
        program = optimized(program)

        def run():
            analysis = analyse(program)
            options = [list(backends.candidates(w, frozenset({"f32"}))) for w in analysis.works]
            times = [[scale._made_up(signature(w), c.name) for c in o] for w, o in zip(analysis.works, options, strict=True)]
            picks = solve(pose(analysis, options, times, lambda *conversion: 0.05))
            emit(analysis, [(o[k], lambda *reads: None) for o, k in zip(options, picks, strict=True)])

        return run

    assert growth(form, lowered) < MOST


def test_equal_blocks_are_measured_once(monkeypatch):
    """The stopwatch races the candidates of a work once, however many blocks repeat it."""
    races = []
    race = Stopwatch._race
    monkeypatch.setattr(Stopwatch, "_race", lambda self, work, options: (races.append((work, options)), race(self, work, options))[1])
    monkeypatch.setattr("graphwright.lower.stopwatch._BUDGET_S", 0.0)
    counts = []
    for size in (170, 400):
        races.clear()
        program = optimized(graphs.build(size, "blocks"))
        watch = Stopwatch(0, fresh=True)
        works = analyse(program).works
        for work in works:
            watch.work(work, list(backends.candidates(work, frozenset({"f32"}))))
        counts.append(len(races))
        # an addition may be done in place where nobody reads the residual later: then there are other candidates
        assert len({(signature(w), *(c.name for c in options)) for w, options in races}) == len(races) < len(works)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("form", graphs.FORMS)
def test_generated_programs(form):
    program = graphs.build(300, form)
    assert program.text() == graphs.build(300, form).text()
    assert 300 <= len(program.nodes) < 400 or form == "random" and 290 <= len(program.nodes) < 400
    program.verify()
    outputs = run_pure(program, program.example)
    assert [tuple(t.shape) for t in outputs] == [(2, 16, 8), (2, 8, 4, 4)]
    assert all(bool(torch.isfinite(t).all()) and float(t.std()) > 0 for t in outputs)
    after, records = Pipeline(DEFAULT).run(program)
    assert not [r.name for r in records if r.undone]
    fired = {r.name for r in records if r.result.changes}
    assert {"canonicalize", "raise-attention", "fold-constants", "common-subexpressions", "raise-activations", "raise-norms",
            "fold-padding", "fold-batch-norm", "fold-scale", "merge-heads", "fuse-epilogue", "merge-linears"} <= fired  # fmt: skip
    assert len(after.nodes) < 0.8 * len(program.nodes)


def test_a_form_that_does_not_exist():
    with pytest.raises(ValueError, match="there is no form 'rings'; there are blocks, random"):
        graphs.build(10, "rings")


def test_exponents():
    nodes = [100, 1000, 2000, 4000]
    points = [{"form": "blocks", "nodes": n, "seconds": {"a": 3e-4 * n**1.5, "b": 1e-3 * n}} for n in nodes]
    found = {f["stage"]: f for f in scale.fits(points)}
    assert found["a"]["exponent"] == 1.5 and found["b"]["exponent"] == 1.0
    assert 1.1 < found["a"]["n_log_n"] < 1.2
    assert scale.fits(points[:2]) == []


def test_the_command_writes_what_it_measures(tmp_path, capsys, monkeypatch):
    out = tmp_path / "scale.json"
    monkeypatch.setattr(sys, "argv", ["bench/scale.py", "--out", str(out), "--rounds", "1"])
    assert scale.main(["--sizes", "100,200", "--forms", "random", "--rounds", "1", "--from", "50", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["schema"] == scale.SCHEMA and record["machine"]["cpu"] is not None and record["versions"]["torch"]
    assert [p["form"] for p in record["points"]] == ["random"] * 2
    assert record["command"] == "python bench/scale.py --rounds 1"
    stages = set(record["points"][0]["seconds"])
    assert stages == {f["stage"] for f in record["fits"]}
    assert {p.name for p in DEFAULT} == set(record["points"][0]["passes"])
    shown = capsys.readouterr().out
    assert all(stage in shown for stage in stages)


def test_plots_need_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        scale.main(["--plot", "x.svg"])
    assert "pip install -c constraints.txt -e '.[bench]'" in capsys.readouterr().err


def test_the_plot_shows_every_stage(tmp_path):
    pytest.importorskip("matplotlib")
    points = [{"form": f, "nodes": n, "seconds": {"pipeline": 1e-3 * n, "save": 1e-4 * n}} for f in graphs.FORMS for n in (1000, 2000)]
    path = tmp_path / "plots" / "scale.svg"
    scale.plot({"points": points, "fits": scale.fits(points)}, path)
    assert path.read_text().lstrip().startswith("<?xml")
