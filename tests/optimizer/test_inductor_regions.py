"""Regions through Inductor: which works, checked and timed before they are taken, saved as data, restored or said to be missing."""

from __future__ import annotations

import copy
import hashlib
import os
import random
import re
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphwright as gw
from graphwright.backends import inductor
from graphwright.backends.inductor import Fragment, FragmentModule, NotCompiled, encode
from graphwright.capture import capture
from graphwright.errors import InternalError
from graphwright.lower import chains, lower, regions, restored
from graphwright.lower.graph import Region, schedule
from graphwright.lower.runner import Fused, emit
from graphwright.measure import Timing
from graphwright.numerics import Exact, run_double, run_pure

NOWHERE = 1e30  # a deadline that never comes


class Odd(nn.Module):
    """A linear, then a chain that nothing fuses: gate, rotation, softplus, and a scaled residual."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x):
        u, v = self.up(x).chunk(2, -1)
        h = torch.sinh(u).sin() * torch.sigmoid(v) + 0.1 * torch.sin(v)
        one, two = h.chunk(2, -1)
        h = h * self.scale + torch.cat([-two, one], -1) * torch.softmax(v, -1)
        return x + self.down(F.softplus(h) - torch.exp(-h.abs())) * self.scale


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Odd(), Odd())

    def forward(self, x):
        return self.blocks(x)


def lowered_of(model, *xs):
    """The program op by op through ATen."""
    torch.manual_seed(0)
    program = capture(model.eval(), xs).program
    program.example = xs
    return lower(program, plan={})


def found(lowered):
    return chains.find(lowered.analysis, dict(zip(lowered.analysis.works, lowered.chosen, strict=True)))


def ops_of(region):
    return [w.op.removeprefix("aten.") for w in region.works]


class Compiler:
    """In Inductor's place: a library is the fragment run op by op."""

    def __init__(self):
        self.made: dict[str, Fragment] = {}
        self.asked: list[Fragment] = []
        self.spoil = lambda results, inputs: results
        self.fails: str | None = None
        self.missing: str | None = None
        self.race = [1.0, 0.5]
        self.whole = [2.0, 1.0]

    def compile(self, fragment, seconds):
        self.asked.append(fragment)
        if self.fails:
            raise NotCompiled(self.fails)
        self.made[fragment.key] = fragment

    def open(self, fragment):
        if fragment.key not in self.made:
            return None
        module = FragmentModule(fragment)
        return lambda inputs: self.spoil([t.clone() for t in module(*inputs)], inputs)


@pytest.fixture
def compiler(monkeypatch):
    made = Compiler()
    monkeypatch.setattr(regions, "generated", lambda lowered, *_: lowered)  # or nothing would be left to Inductor
    monkeypatch.setattr(inductor, "compile_library", made.compile)
    monkeypatch.setattr(inductor, "open_library", made.open)
    monkeypatch.setattr(inductor, "reason", lambda: made.missing)
    monkeypatch.setattr(inductor, "expected_seconds", lambda: 13.0)
    monkeypatch.setattr(regions, "race", lambda calls, reads: [r for r, c in zip(made.race, calls, strict=True) if c(*reads) is not None])
    monkeypatch.setattr(regions, "interleaved", lambda calls, **_: [Timing(w, w, w, 1) for w, c in zip(made.whole, calls, strict=True) if c()])
    return made


# -- which works -----------------------------------------------------------------------------------------------------


def test_a_chain_between_contractions_is_one_region():
    (region, tail) = found(lowered_of(Odd(), torch.randn(3, 5, 24)))
    assert not {"linear"} & {*ops_of(region), *ops_of(tail)}
    assert {"sinh", "sin", "sigmoid", "softmax.int", "cat", "softplus", "exp", "sub.Tensor"} <= set(ops_of(region))
    assert len(region.writes) == 1
    assert ops_of(tail) == ["mul.Tensor", "add.Tensor"]


def test_single_ops_and_mere_views_are_no_region():
    class Views(nn.Module):
        def forward(self, x):
            return torch.relu(x).transpose(0, 1).unsqueeze(0), x[1:].t()

    assert found(lowered_of(Views(), torch.randn(4, 6))) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_other_dtypes_stay_outside(dtype):
    class Wide(nn.Module):
        def forward(self, x):
            return (x.to(dtype) * 2 + 1).real.to(torch.float32) if dtype.is_complex else (x.to(dtype) * 2 + 1).float()

    assert found(lowered_of(Wide(), torch.randn(4, 6))) == []


def test_random_ops_and_open_sizes_stay_outside():
    class Noise(nn.Module):
        def forward(self, x):
            return torch.sin(x) + torch.rand_like(x) * torch.cos(x)

    (region,) = found(lowered_of(Noise(), torch.randn(4, 6)))
    assert "rand_like" not in ops_of(region)
    program = capture(nn.Sequential(nn.Tanh(), nn.Sigmoid(), nn.Softmax(-1)), (torch.randn(4, 6),), dynamic="auto").program
    program.example = (torch.randn(4, 6),)
    assert found(lower(program, plan={})) == []


def test_what_has_to_run_in_between_splits_a_region():
    """sin → linear → add and sin → add: one region of sin and add would wait for itself."""

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            y = torch.sin(x).cos()
            return torch.exp(self.linear(y) + y) * 2

    (first, second) = found(lowered_of(Between(), torch.randn(4, 6)))
    assert ops_of(first) == ["sin", "cos"]
    assert ops_of(second) == ["add.Tensor", "exp", "mul.Tensor"]


def test_views_of_inputs_that_others_read_stay_outside():
    """What a region gives must not share memory with what it reads."""

    class Halves(nn.Module):
        def forward(self, x):
            a, b = x[:, :3].t(), x[:, 3:]
            return a, torch.sin(a) * torch.cos(a) + b.sum()

    lowered = lowered_of(Halves(), torch.randn(4, 6))
    (region,) = found(lowered)
    assert not any(n.target is torch.ops.aten.t.default for n in region.writes)
    assert any(n.target is torch.ops.aten.t.default for n in region.reads)


def test_the_order_keeps_random_numbers_and_finds_circles():
    class Two(nn.Module):
        def forward(self, x):
            a = torch.sin(x).cos()
            b = torch.rand_like(x)
            return a + b, torch.rand_like(x)

    lowered = lowered_of(Two(), torch.randn(3))
    works = lowered.analysis.works
    names = [w.op for w in schedule(lowered.analysis, [Region.of(lowered.analysis, works[:2])])[1:]]
    assert names == ["aten.rand_like", "aten.add.Tensor", "aten.rand_like"]
    circle = Region.of(lowered.analysis, [works[0], next(w for w in works if w.op == "aten.add.Tensor")])
    with pytest.raises(InternalError, match="depends on it"):
        schedule(lowered.analysis, [circle])
    with pytest.raises(InternalError, match="share"):
        schedule(lowered.analysis, [circle, Region.of(lowered.analysis, works[:2])])


class Tangle(nn.Module):
    """A random graph of cheap ops, views and products."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        rng, values = random.Random(self.seed), [x, x + 1]
        steps = [torch.sin, lambda t: t.transpose(-1, -2), self.linear, lambda t: t.softmax(-1), lambda t: t * 0.5, torch.tanh,
                 lambda t: torch.cat(t.chunk(2, -1)[::-1], -1), lambda t: t.reshape(2, 8).reshape(4, 4), lambda t: t.contiguous()]  # fmt: skip
        for _ in range(22):
            if rng.random() < 0.4:
                values.append(rng.choice(values) + rng.choice(values[-4:]))
            else:
                values.append(rng.choice(steps)(rng.choice(values[-5:])))
        return tuple(values[-1 - k] for k in range(rng.randint(1, 3)))


@pytest.mark.parametrize("seed", range(8))
def test_any_graph_computes_the_same_with_its_regions(seed):
    x = torch.randn(4, 4)
    lowered = lowered_of(Tangle(seed), x)
    chosen = dict(zip(lowered.analysis.works, lowered.chosen, strict=True))
    fused = []
    for k, region in enumerate(found(lowered)):
        fragment, constants = chains.fragment_of(region, [n.meta["val"].stride() for n in region.reads])
        module = FragmentModule(Fragment.of(fragment.text))
        call = chains.bind(fragment, constants, lambda given, m=module: list(m(*given))) if k % 2 else chains.chain(region, chosen)
        fused.append(Fused(region, f"inductor.region{k}", call))
    runner = emit(lowered.analysis, lowered.chosen, fused)
    for want, got in zip(lowered.runner(x), runner(x), strict=True):
        assert torch.equal(want, got)
        assert got.data_ptr() != x.data_ptr() or want.data_ptr() == x.data_ptr()


# -- fragments -------------------------------------------------------------------------------------------------------


def test_a_fragment_says_every_kind_of_argument():
    args = (True, 2, 0.5, float("-inf"), "none", None, [1, [2]], torch.float32, torch.device("cpu"), torch.channels_last, torch.strided)
    said = encode(args, lambda v: 0)
    again = Fragment.of(Fragment((), (("aten.x.y", said, {}),), ()).text)
    assert tuple(inductor._decode(a, False) for a in again.steps[0][1]) == args
    assert inductor._decode(encode(torch.float32, lambda v: 0), True) is torch.float64
    with pytest.raises(TypeError, match="complex"):
        encode(1j, lambda v: 0)


def test_equal_regions_have_one_fragment_and_others_do_not():
    x = torch.randn(3, 5, 24)
    lowered = lowered_of(Twice(), x)
    big = [r for r in found(lowered) if len(r.works) > 10]
    texts = {chains.fragment_of(r, [n.meta["val"].stride() for n in r.reads])[0].text for r in big}
    assert (len(big), len(texts)) == (2, 1)
    other = {chains.fragment_of(r, [(1, 2, 3)] * len(r.reads))[0].text for r in big}
    assert not texts & other


def test_inputs_of_other_strides_are_brought_to_the_stated_ones():
    fragment = Fragment((("float32", (3, 4), (4, 1)),), (("aten.sin.default", [{"value": 0}], {}),), (1,))
    seen = []
    call = chains.bind(fragment, [], lambda given: seen.append(given[0]) or list(FragmentModule(fragment)(*given)))
    x = torch.randn(4, 3).t()
    torch.testing.assert_close(call(x), x.sin())
    assert seen[0].stride() == (4, 1)
    row = torch.randn(1, 4)
    wide = Fragment((("float32", (1, 4), (77, 1)),), fragment.steps, (1,))
    chains.bind(wide, [], lambda given: seen.append(given[0]) or [given[0]])(row)
    assert seen[1] is row  # the stride of an axis of size one says nothing


def test_strides_that_can_not_be_made_anew():
    x = (3, 4)
    assert all(chains.sound(x, s) for s in [(4, 1), (1, 3), (9, 2), [40, 1]])
    assert not any(chains.sound(x, s) for s in [(0, 1), (1, 1), (3, 1), (4, -1), (4,), (4, 1.0), (10**9, 1), None, "41"])
    assert chains.sound((1, 4), (0, 1)) and chains.sound((), ())


# -- taking ----------------------------------------------------------------------------------------------------------


def test_regions_are_compiled_once_checked_and_taken(compiler):
    x = torch.randn(3, 5, 24)
    plain = lowered_of(Twice(), x)
    program = plain.analysis.program
    result = regions.compiled(plain, (x,), NOWHERE)
    kinds = [c.name.partition(".")[0] for c in result.choices]
    assert len({f.key for f in compiler.asked}) == len(compiler.asked) <= 3
    assert len(result.regions) >= 3
    assert len(result.runner.steps) < len(plain.runner.steps)
    assert "inductor" in kinds
    assert result.plan == plain.plan  # what runs where no library is to be had
    assert Exact().failure(run_double(program, (x,))[0], run_pure(program, (x,))[0], result.runner(x)[0]) is None
    assert any("through Inductor" in n and "(2 times)" in n for n in result.notes)
    assert [label for label, _ in result.variants][:2] == ["regions through Inductor", "without them"]


@pytest.mark.parametrize(("set_up", "says"), [
    (lambda c: setattr(c, "missing", "there is no C++ compiler (g++) on this machine"), "there is no C\\+\\+ compiler"),
    (lambda c: setattr(c, "fails", "g++: internal compiler error"), "internal compiler error"),
    (lambda c: setattr(c, "spoil", lambda out, given: [t * 1.001 for t in out]), "not right .*RMS error"),
    (lambda c: setattr(c, "spoil", lambda out, given: [t[:1] for t in out]), "not right .*instead of"),
    (lambda c: setattr(c, "spoil", lambda out, given: [given[0].view(-1)[: t.numel()].view(t.shape).copy_(t) for t in out]), "gives back an input"),
    (lambda c: setattr(c, "race", [1.0, 0.95]), "not clearly below"),
    (lambda c: setattr(c, "whole", [1.0, 1.0]), "the whole is not faster"),
])  # fmt: skip
def test_what_fails_or_does_not_pay_is_left_out_with_the_reason(compiler, set_up, says):
    x = torch.randn(3, 5, 24)
    plain = lowered_of(Odd(), x)
    set_up(compiler)
    result = regions.compiled(plain, (x,), NOWHERE)
    assert result.regions == [] and result.runner is plain.runner
    assert any(re.search(says, note) for note in result.notes), result.notes


def test_one_failure_does_not_stop_the_others(compiler, monkeypatch):
    def sometimes(fragment, seconds):
        compiler.fails = None if compiler.asked else "no luck"
        Compiler.compile(compiler, fragment, seconds)

    monkeypatch.setattr(inductor, "compile_library", sometimes)
    x = torch.randn(3, 5, 24)
    result = regions.compiled(lowered_of(Twice(), x), (x,), NOWHERE)
    assert any("no luck" in n for n in result.notes)
    assert result.regions


def test_the_budget_ends_the_compiling(compiler, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(regions, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(inductor, "compile_library", lambda f, s: (compiler.compile(f, s), setattr(clock, "now", clock.now + 20)))
    x = torch.randn(3, 5, 24)
    plain = lowered_of(Odd(), x)
    result = regions.compiled(plain, (x,), 12.0)  # less than what one takes
    assert not compiler.asked and any("about 13 s, 12 s of the time budget are left" in n for n in result.notes)
    result = regions.compiled(plain, (x,), 33.0)  # the first leaves 13 s, and took 20
    assert len(compiler.asked) == 1 and any("about 20 s, 13 s of the time budget are left" in n for n in result.notes)
    clock.now = 100.0
    again = regions.compiled(plain, (x,), 0.0)  # what lies in the cache costs nothing
    assert len(compiler.asked) == 1 and again.regions == result.regions != []


def test_only_a_time_budget_grants_it(compiler):
    x = torch.randn(3, 5, 24)
    assert "inductor" not in gw.optimize(Odd().eval(), x).report.backend_shares()
    assert not compiler.asked
    fast = gw.optimize(Odd().eval(), x, goal=gw.Goal(time_budget=500))
    assert compiler.asked
    assert "inductor" in str(fast.report.text(full=True)) or fast.report.verdict.startswith("not faster")
    compiler.missing = "there is no C++ compiler (g++) on this machine"
    notes = gw.optimize(Odd().eval(), x, goal=gw.Goal(time_budget=500)).report.notes
    assert any("no C++ compiler" in n for n in notes)


def test_a_regions_time_stands_at_its_first_op(saved):
    rows = [r for r in saved.fast.report.sites if r.backend == "inductor"]
    named = {r.kernel for r in rows}
    assert len(rows) > len(named) and all(r.flops is None for r in rows)
    for name in named:
        assert [r.ms is not None for r in rows if r.kernel == name].count(True) >= 1
    assert "inductor.region1" in saved.fast.explain(rows[-1].site) or "inductor.region2" in saved.fast.explain(rows[-1].site)


def test_the_accuracy_budget_has_the_last_word(compiler, monkeypatch):
    model, x = Odd().eval(), torch.randn(3, 5, 24)
    monkeypatch.setattr("graphwright.search.revert", lambda built, why: built)
    strict = lambda m: -float(m is not model and any(s.name.startswith("inductor") for s in m._variants[0].built.lowered.runner.steps))
    fast = gw.optimize(model, x, evaluate=strict, goal=gw.Goal(time_budget=500, max_drop=0.5))
    assert any("left out: score drops" in n for n in fast.report.notes)
    assert not fast._variants[0].built.lowered.regions


def test_pieces_of_a_model_have_regions_too(compiler, monkeypatch):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = Odd()

        def forward(self, x):
            y = self.one(x)
            return y.tanh() if y.sum() > 1e6 else y

    monkeypatch.setattr("graphwright.search.revert", lambda built, why: built)
    x, model = torch.randn(3, 5, 24), Branch().eval()
    fast = gw.optimize(model, x, goal=gw.Goal(time_budget=500))
    assert fast.report.regions and any(part.lowered.regions for part in fast._variants[0].parts)
    assert any("through Inductor" in n for n in fast.report.notes)
    torch.testing.assert_close(fast(x), model(x))


# -- saving ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(compiler, monkeypatch, tmp_path):
    """A result with regions on disk, and what it gives."""
    monkeypatch.setattr("graphwright.search.revert", lambda built, why: built)
    model, x = Odd().eval(), torch.randn(3, 5, 24)
    fast = gw.optimize(model, x, goal=gw.Goal(time_budget=500))
    assert "inductor" in fast.report.backend_shares()
    fast.save(tmp_path / "odd.gw")
    return SimpleNamespace(path=tmp_path / "odd.gw", x=x, y=fast(x), fast=fast)


def steps_of(fast):
    return [s.name.partition(".")[0] for s in fast._variants[0].built.lowered.runner.steps]


def test_the_file_names_the_regions_and_load_takes_their_libraries(compiler, saved):
    asked = len(compiler.asked)
    compiler.missing = "there is no C++ compiler (g++) on this machine"  # a library that is there needs none
    for again in (gw.load(saved.path), copy.deepcopy(saved.fast)):
        assert "inductor" in steps_of(again) and len(compiler.asked) == asked
        assert torch.equal(again(saved.x), saved.y)
    again.save(saved.path)
    assert "inductor" in steps_of(gw.load(saved.path))


def test_without_library_and_compiler_the_chain_runs_and_load_says_so(compiler, saved):
    compiler.made.clear()
    compiler.missing = "there is no C++ compiler (g++) on this machine"
    again = gw.load(saved.path)
    assert "inductor" not in steps_of(again)
    assert any("no C++ compiler" in w and "ms longer" in w for w in again.report.warnings)
    torch.testing.assert_close(again(saved.x), saved.y, rtol=1e-5, atol=1e-6)


def test_without_library_the_first_call_compiles(compiler, saved):
    compiler.made.clear()
    compiler.asked.clear()
    again = gw.load(saved.path)
    assert not compiler.asked and any("compiled at the first call" in w for w in again.report.warnings)
    with pytest.warns(UserWarning, match="is compiled now"):
        assert torch.equal(again(saved.x), saved.y)
    count = len(compiler.asked)
    assert torch.equal(again(saved.x), saved.y)
    assert len(compiler.asked) == count > 0


@pytest.mark.parametrize("harm", [lambda c: setattr(c, "fails", "disk full"), lambda c: setattr(c, "spoil", lambda out, given: [-t for t in out])])
def test_where_the_first_call_can_not_compile_the_chain_runs(compiler, saved, harm):
    compiler.made.clear()
    harm(compiler)
    again = gw.load(saved.path)
    with pytest.warns(UserWarning, match="was not compiled"):
        first = again(saved.x)
    torch.testing.assert_close(first, saved.y, rtol=1e-5, atol=1e-6)
    assert torch.equal(again(saved.x), first)


def test_what_a_file_says_of_regions_is_not_believed(compiler):
    x = torch.randn(3, 5, 24)
    plain = lowered_of(Odd(), x)
    good = regions.compiled(plain, (x,), NOWHERE).regions
    names = [w.node.name for w in plain.analysis.works]
    linear = next(w.node.name for w in plain.analysis.works if w.op == "aten.linear")
    first = good[0]
    bad = [{**first, "nodes": ["nobody"]}, {**first, "nodes": []}, {**first, "nodes": [linear]}, {**first, "nodes": names}, {**first, "nodes": 7}, {},
           {**first, "strides": [[1]]}, {**first, "strides": "x"}, {**first, "strides": [[0, 0, 0]] * len(first["strides"])},
           {**first, "strides": [[10**12, 10**6, 1]] * len(first["strides"])}, {**first, "strides": None}, {**first, "ms": float("nan")}, {**first, "nodes": first["nodes"] * 2},
           {**first, "nodes": [first["nodes"][0], first["nodes"][-1]]}, 3]  # fmt: skip
    for entry in bad:
        again = restored.restored(plain, [entry])
        assert again.regions == [] and any("does not fit" in n for n in again.notes), entry
        assert torch.equal(again.runner(x)[0], plain.runner(x)[0])
    assert len(restored.restored(plain, [*good, *good]).regions) == len(good)
    assert restored.restored(plain, None).regions == []


# -- the library -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(inductor, "_opened", {})
    return tmp_path


SINE = Fragment((("float32", (3, 4), (4, 1)),), (("aten.sin.default", [{"value": 0}], {}), ("aten.mul.Tensor", [{"value": 1}, 2.0], {})), (2,))


def test_a_broken_library_is_dropped(cache):
    path = inductor._library(SINE.key)
    path.write_bytes(b"\x7fELF and no more")
    path.with_suffix(".sha256").write_text("0" * 64)
    assert inductor.open_library(SINE) is None and not path.exists()
    path.write_bytes(b"no library at all")
    path.with_suffix(".sha256").write_text(hashlib.sha256(b"no library at all").hexdigest())
    assert inductor.open_library(SINE) is None and not path.exists()


def test_the_oldest_libraries_go(cache, monkeypatch):
    monkeypatch.setattr(inductor, "_MAX_LIBRARIES", 2)
    for k in range(4):
        path = inductor._library(f"{k}")
        path.touch()
        os.utime(path, (k, k))
    inductor._prune(path.parent)
    assert sorted(p.name for p in path.parent.glob("*.so")) == ["2.so", "3.so"]


def test_a_compiler_that_takes_too_long_is_stopped(cache):
    with pytest.raises(NotCompiled, match="stopped after"):
        inductor.compile_library(SINE, 0.2)
    assert inductor.open_library(SINE) is None


def test_zeros_have_the_stated_strides():
    inputs = (("float32", (3, 4), (0, 1)), ("int64", (2, 1, 5), (40, 7, 2)), ("bool", (), ()))
    made = Fragment(inputs, (), ()).zeros()
    assert [(str(x.dtype)[6:], tuple(x.shape), x.stride()) for x in made] == list(inputs)
    assert not any(x.any() for x in made)


def test_no_compiler_no_inductor(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert "no C++ compiler (/no/such/compiler)" in inductor.reason()
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "no Inductor" in inductor.reason()


RELOAD = """
    import sys, torch, graphwright as gw
    x, y = torch.load(sys.argv[2])
    fast = gw.load(sys.argv[1])
    names = [s.name for s in fast._variants[0].built.lowered.runner.steps]
    print(sum("inductor" in n for n in names), torch.equal(fast(x), y), "torch._inductor.compile_fx" in sys.modules, len(fast.report.warnings))
    torch.testing.assert_close(fast(x), y, rtol=1e-5, atol=1e-6)
"""


@pytest.mark.slow
@pytest.mark.skipif(inductor.reason() is not None, reason=str(inductor.reason()))
def test_real_libraries_give_the_same_bits_in_another_process(cache, monkeypatch, tmp_path):
    """Compiled, saved, loaded: with the compiler, without it, and without the libraries."""
    monkeypatch.setattr(regions, "race", lambda calls, reads: [1.0, 0.5])
    monkeypatch.setattr(regions, "interleaved", lambda calls, **_: [Timing(t, t, t, 1) for t in (2.0, 1.0)])
    monkeypatch.setattr("graphwright.search.revert", lambda built, why: built)
    model, x = Odd(64).eval(), torch.randn(4, 33, 64)
    fast = gw.optimize(model, x, goal=gw.Goal(time_budget=500))
    assert fast._variants[0].built.lowered.regions, fast.report.notes
    assert fast.report.sqnr_db > 100
    fast.save(tmp_path / "odd.gw")
    torch.save((x, fast(x)), tmp_path / "odd.pt")

    def reload(**env):
        run = subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(RELOAD), str(tmp_path / "odd.gw"), str(tmp_path / "odd.pt")],
                             env={**os.environ, **env}, capture_output=True, text=True, check=False)  # fmt: skip
        assert run.returncode == 0, run.stderr
        return run.stdout.split()

    count = str(len(fast._variants[0].built.lowered.regions))
    assert reload() == [count, "True", "False", "0"]
    assert reload(CXX="/no/such/compiler") == [count, "True", "False", "0"]
    without = reload(CXX="/no/such/compiler", XDG_CACHE_HOME=str(tmp_path / "elsewhere"))
    assert without[0] == "0" and without[3] != "0"


@pytest.mark.slow
@pytest.mark.skipif(inductor.reason() is not None, reason=str(inductor.reason()))
def test_what_the_compiling_process_dies_of_is_told(cache):
    wrong = Fragment(SINE.inputs, (("aten.no_such_op.default", [{"value": 0}], {}),), (1,))
    with pytest.raises(NotCompiled, match="no_such_op"):
        inductor.compile_library(wrong, 120)
