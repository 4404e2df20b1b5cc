"""Lowering: works without quantize/dequantize, checked candidates, the choice over the graph, the runner."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphwright import backends
from graphwright.backends import onednn
from graphwright.backends.base import NATIVE, NATIVE_LAST, Q_LAST, ROWS, Candidate, Format, Q, QParams
from graphwright.capture import capture
from graphwright.lower import lower
from graphwright.lower.conversions import conversion, possible
from graphwright.lower.graph import analyse
from graphwright.lower.runner import emit
from graphwright.lower.select import NoAssignment, Problem, solve
from graphwright.lower.stopwatch import Stopwatch, check, sample
from graphwright.manager import Pipeline
from graphwright.numerics import Exact, run_double, run_pure, sqnr_db
from graphwright.passes.pipeline import resolve

needs_vnni = pytest.mark.skipif(onednn.int8_reason() is not None, reason=str(onednn.int8_reason()))


class Block(nn.Module):
    """A residual block: the shape of computation that int8 accumulates in place."""

    def __init__(self, channels: int = 24):
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.two = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x):
        return torch.relu(self.two(torch.relu(self.norm(self.one(x)))) + x)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.a, self.b = Block(), Block()
        self.head = nn.Linear(24, 7)

    def forward(self, x):
        x = self.b(self.a(self.pool(torch.relu(self.stem(x)))))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int = 48, heads: int = 3):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        b, s, w = x.shape
        q, k, v = (f(x).view(b, s, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, w)
        x = self.norm(x + self.out(y))
        return self.norm(x + self.down(nn.functional.gelu(self.up(x))))


def program_of(model, x, recipe="default"):
    torch.manual_seed(0)
    program = capture(model.eval(), (x,)).program
    program.example = (x,)
    if recipe == "int8":
        program.calibration = [(x,), (torch.randn_like(x),)]
    return program, Pipeline(resolve(recipe)).run(program)[0]


def cases():
    torch.manual_seed(0)
    return [("cnn", Small(), torch.randn(2, 3, 33, 41)), ("attention", Attention(), torch.randn(3, 19, 48))]


@pytest.mark.parametrize(("name", "model", "x"), cases(), ids=lambda v: v if isinstance(v, str) else "")
def test_exact_lowering_keeps_the_fp64_rule(name, model, x):
    captured, program = program_of(model, x)
    lowered = lower(program)
    (reference,), (before,) = run_double(captured, (x,)), run_pure(captured, (x,))
    assert Exact().failure(reference, before, lowered.runner(x)[0]) is None
    assert {c.precision for c in lowered.choices} == {"f32"}


@needs_vnni
@pytest.mark.parametrize(("name", "model", "x"), cases(), ids=lambda v: v if isinstance(v, str) else "")
def test_int8_lowering_computes_what_the_ir_says(name, model, x):
    captured, program = program_of(model, x, "int8")
    lowered = lower(program, allowed={"f32", "int8"})
    simulated = run_pure(program, (x,))[0]
    assert sqnr_db(simulated, lowered.runner(x)[0]) > 25
    assert sqnr_db(run_pure(captured, (x,))[0], lowered.runner(x)[0]) > 20


@needs_vnni
@pytest.mark.parametrize(("name", "model", "x"), cases(), ids=lambda v: v if isinstance(v, str) else "")
def test_every_candidate_alone_agrees_with_its_op(name, model, x):
    """Whatever the stopwatch would pick: each candidate that builds passes the check that timing demands."""
    _, program = program_of(model, x, "int8")
    analysis, tried = analyse(program), set()
    watch = Stopwatch(0, fresh=True)
    for work in analysis.works:
        options = list(backends.candidates(work, frozenset({"f32", "bf16", "fp16", "int8"})))
        for option, found in zip(options, watch.work(work, options), strict=True):
            tried.add(option.name)
            slow = option.name.startswith("aten.fp16") and str(found).startswith("refused: this processor multiplies no float16")
            assert isinstance(found, float) or slow, f"{work.site} {option.name}: {found}"
    assert {"aten.bf16", "aten.fp16", "onednn.int8-q", "onednn.int8-f32", "onednn.f32", "aten.native"} <= tried


def test_a_wrong_candidate_gets_no_time():
    program = program_of(nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8))[1]
    work = analyse(program).works[0]
    native = next(c for c in backends.candidates(work, frozenset({"f32"})) if c.name == "aten.native")
    wrong = Candidate("test.wrong", native.needs, native.gives, "f32", lambda: lambda x: native.build()(x) * 1.01)
    broken = Candidate("test.broken", native.needs, native.gives, "f32", lambda: 1 / 0)
    found = Stopwatch(0, fresh=True).work(work, [wrong, broken, native])
    assert "wrong result" in found[0]
    assert "ZeroDivisionError" in found[1]
    assert isinstance(found[2], float)


def test_quantize_pairs_become_facts_about_values():
    _, program = program_of(Small(), torch.randn(2, 3, 32, 32), "int8")
    analysis = analyse(program)
    ops = [w.op for w in analysis.works]
    assert not any("quantize" in op for op in ops)
    convs = [w for w in analysis.works if w.op == "graphwright.conv"]
    assert len(convs) == 5
    assert all(w.reads[0].quantized and w.weights["weight"].values.dtype == torch.int8 for w in convs)


@needs_vnni
def test_rows_quantized_at_run_time_become_real_products():
    x = torch.randn(3, 19, 48)
    captured, _ = program_of(Attention(), x)
    program = Pipeline(resolve("int8-dynamic")).run(captured)[0]
    analysis = analyse(program)
    assert not any("dynamic" in w.op for w in analysis.works)
    linears = [w for w in analysis.works if "linear" in w.op]
    assert linears and all(r.rows and not r.quantized for w in linears for r in w.reads[:1])
    watch, tried = Stopwatch(0, fresh=True), set()
    for work in analysis.works:
        options = list(backends.candidates(work, frozenset({"f32", "int8"})))
        tried |= {o.name for o in options}
        assert not [f for f in watch.work(work, options) if isinstance(f, str)]
    assert {"llvm.int8-rows-f32", "llvm.attention-int8-f32", "onednn.f32"} <= tried
    lowered = lower(program, allowed={"int8"}, plan={w.node.name: "llvm.int8-rows-f32" for w in linears})
    assert not [n for n in lowered.notes if "does not exist" in n]
    assert sqnr_db(run_pure(program, (x,))[0], lowered.runner(x)[0]) > 35


def test_a_dynamic_pair_whose_parts_have_other_readers_stands():
    class Odd(nn.Module):
        def forward(self, x):
            q, scale, point = torch.ops.graphwright.quantize_dynamic(x, True, False, 0, 255, torch.uint8)
            return torch.ops.graphwright.dequantize_dynamic(q, scale, point, torch.float32), scale

    program = capture(Odd(), (torch.randn(4, 8),)).program
    assert [w.op for w in analyse(program).works if "dynamic" in w.op] == ["graphwright.quantize_dynamic", "graphwright.dequantize_dynamic"]
    x = torch.randn(4, 8)
    for got, wanted in zip(lower(program).runner(x), Odd()(x), strict=True):
        assert torch.equal(got, wanted)


@needs_vnni
def test_without_vnni_int8_attention_runs_in_float(monkeypatch):
    from graphwright.backends import llvm_int8
    from graphwright.kernels import attention_int8, linear_int8, vnni

    for module in (attention_int8, linear_int8, vnni):
        monkeypatch.setattr(module, "unfit", lambda: "the processor has no AVX-512 VNNI")
    llvm_int8.reason.cache_clear()
    try:
        _, program = program_of(Attention(), torch.randn(3, 19, 48), "int8")
        names = {c.name for w in analyse(program).works for c in backends.candidates(w, frozenset({"f32", "int8"}))}
        assert "llvm.attention-f32" in names and not any("attention-int8" in n or n.startswith("llvm.int8") for n in names)
        assert "VNNI" in backends.reasons()["llvm_int8"]
    finally:
        llvm_int8.reason.cache_clear()


def test_clobbered_values_that_live_on_are_copied():
    """A residual accumulated in place must not change what a later op, or the caller, still reads."""

    class Twice(nn.Module):
        def forward(self, x):
            y = torch.relu(x)
            return torch.sigmoid(y), y + 1

    x = torch.randn(5, 6)
    program = capture(Twice().eval(), (x,)).program
    analysis = analyse(program)

    def chosen(work):
        native = next(c for c in backends.candidates(work, frozenset({"f32"})) if c.name == "aten.native")
        if work.op == "aten.sigmoid":  # an implementation that overwrites what it reads
            return Candidate("test.inplace", native.needs, native.gives, "f32", native.build, clobbers=0), torch.sigmoid_
        return native, native.build()

    runner = emit(analysis, [chosen(w) for w in analysis.works])
    kept = x.clone()
    got = runner(x)
    for a, b in zip(got, Twice()(kept), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(x, kept)


@pytest.mark.skipif(onednn.reason() is not None, reason="needs oneDNN")
@pytest.mark.parametrize("shown", [False, True], ids=["last reader", "returned too"])
def test_sums_start_from_a_residual_that_nothing_reads_later(shown):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Conv2d(8, 16, 3, padding=1), *(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

        def forward(self, x):
            x = self.first(x).relu()
            x = torch.relu(self.second(x) + x)  # its input is its residual: not in place
            y = torch.relu(self.third(self.second(x)) + x)
            return (y, x) if shown else y

    x = torch.randn(1, 8, 9, 9)
    captured, program = program_of(Residual(), x)
    names = {c.name for w in analyse(program).works for c in backends.candidates(w, frozenset({"f32"}))}
    assert ("onednn.f32-sum-last" in names) is not shown
    convolutions = [w.node.name for w in analyse(program).works if onednn.matrix(w) is not None]
    last = "onednn.f32-last" if shown else "onednn.f32-sum-last"
    lowered = lower(program, plan=dict(zip(convolutions, ("onednn.f32-last",) * 3 + (last,), strict=True)))
    assert sum(s.name == "onednn.f32-sum-last" for s in lowered.runner.steps) == (not shown)
    assert not any(s.name == "copy" for s in lowered.runner.steps)
    for got, wanted in zip(lowered.runner(x), run_pure(captured, (x,)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_inputs_are_never_overwritten():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x, y):
            return self.conv(x) + y

    x, y = torch.randn(1, 8, 6, 6), torch.randn(1, 8, 6, 6)
    program = capture(Sum().eval(), (x, y)).program
    program.example, program.calibration = (x, y), [(x, y)]
    program = Pipeline(resolve("int8")).run(program)[0]
    kept = y.clone()
    lower(program, allowed={"f32", "int8"}).runner(x, y)
    assert torch.equal(y, kept)


def test_a_plan_gives_the_same_bits_and_times_nothing(monkeypatch):
    x = torch.randn(2, 3, 40, 40)
    _, program = program_of(Small(), x, "int8")
    first = lower(program, allowed={"f32", "int8"})
    monkeypatch.setattr(Stopwatch, "work", lambda *a: pytest.fail("a plan times nothing"))
    second = lower(program, allowed={"f32", "int8"}, plan=first.plan)
    assert torch.equal(first.runner(x)[0], second.runner(x)[0])
    assert second.plan == first.plan


def test_a_plan_from_elsewhere_runs_natively_with_a_note():
    x = torch.randn(4, 8)
    _, program = program_of(nn.Sequential(nn.Linear(8, 8)), x)
    plan = dict.fromkeys(lower(program).plan, "elsewhere.kernel")
    lowered = lower(program, plan=plan)
    assert any("elsewhere.kernel" in note for note in lowered.notes)
    torch.testing.assert_close(lowered.runner(x)[0], run_pure(program, (x,))[0])


# -- selection -------------------------------------------------------------------------------------------------------


def chain(costs, convert):
    """A problem over a real chain of three elementwise ops with made-up candidates."""
    x = torch.randn(1, 4, 6, 6)
    program = capture(nn.Sequential(nn.ReLU(), nn.Sigmoid(), nn.Tanh()).eval(), (x,)).program
    works = analyse(program).works
    plain = Candidate("a.plain", (NATIVE,), (NATIVE,), "f32", lambda: None)
    last = Candidate("a.last", (NATIVE_LAST,), (NATIVE_LAST,), "f32", lambda: None)
    values = [program.placeholders[0], *(w.node for w in works)]
    table = {(v, s, t): convert for v in values for s in (NATIVE, NATIVE_LAST) for t in (NATIVE, NATIVE_LAST) if s != t}
    return Problem(works, [[plain, last]] * 3, costs, {program.placeholders[0]}, [(works[-1].node, NATIVE)], table)


def test_selection_pays_for_conversions():
    costs = [[5.0, 4.0], [5.0, 4.0], [5.0, 4.0]]
    assert solve(chain(costs, convert=1.0)) == [1, 1, 1]    # 12 + 2 beats 15
    assert solve(chain(costs, convert=2.0)) == [0, 0, 0]    # 12 + 4 does not
    assert solve(chain([[5.0, 9.0], [9.0, 1.0], [5.0, 9.0]], convert=1.0)) == [0, 1, 0]


def test_selection_equals_brute_force():
    import itertools
    import random

    rng = random.Random(0)
    for _ in range(20):
        costs = [[rng.uniform(0, 3), rng.uniform(0, 3)] for _ in range(3)]
        convert = rng.uniform(0, 2)

        def total(picks, costs=costs, convert=convert):
            layouts = [0, *picks, 0]
            return sum(c[p] for c, p in zip(costs, picks, strict=True)) + convert * sum(a != b for a, b in itertools.pairwise(layouts))

        best = min(itertools.product((0, 1), repeat=3), key=total)
        assert total(solve(chain(costs, convert))) == pytest.approx(total(best))


def test_selection_says_when_nothing_serves():
    problem = chain([[1.0, 1.0]] * 3, convert=1.0)
    with pytest.raises(NoAssignment):
        solve(problem, allowed=[set(), {0}, {0}])


# -- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [Format("bf16"), Format("fp16"), NATIVE_LAST, Q, Q_LAST, Format("bf16", "last")])
def test_conversions_come_back(target):
    params = QParams(0.05, 100, 0, 255, torch.uint8)
    x = (torch.randint(0, 200, (2, 5, 7, 3)) - 100) * 0.0625 * 0.8  # exact in bf16 and on the grid of 0.05
    there, back = conversion(NATIVE, target, params, x), conversion(target, NATIVE, params, x)
    assert possible(NATIVE, target)
    moved = there(x)
    if target.layout == "last":
        assert moved.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(back(moved), x, rtol={"bf16": 1e-2, "fp16": 1e-3}.get(target.kind, 1e-6), atol=1e-6)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_halves_turn_into_integers_and_back_without_a_stop(kind):
    params, half = QParams(0.05, 100, 0, 255, torch.uint8), Format(kind)
    x = (torch.randint(0, 200, (2, 5, 7, 3)) - 100) * 0.05
    short = conversion(NATIVE, half, params, x)(x)
    integers = conversion(half, Q, params, x)(short)
    assert possible(half, Q) and possible(Q, half) and possible(Format("bf16"), Format("fp16")) and not possible(ROWS, half)
    again = conversion(Q, half, params, x)(integers)
    assert integers.dtype == torch.uint8 and again.dtype == short.dtype
    assert sqnr_db(x, again.float()) > 35
    values, scales = conversion(half, ROWS, params, x)(short)
    assert values.dtype == torch.int8 and sqnr_db(x, values * scales) > 35


def test_samples_have_the_strides_of_the_value():
    x = torch.randn(2, 5, 7)
    program = capture(nn.Sequential(nn.Softmax(-1)).eval(), (x.transpose(1, 2),)).program
    made = sample(program.placeholders[0].meta["val"], NATIVE, None)
    assert made.shape == (2, 7, 5)
    assert made.stride() == x.transpose(1, 2).stride()


def test_check_knows_integers_from_floats():
    _, program = program_of(Small(), torch.randn(2, 3, 32, 32), "int8")
    work = next(w for w in analyse(program).works if w.op == "graphwright.conv" and w.qparams)
    good = next(c for c in backends.candidates(work, frozenset({"f32", "int8"})) if c.gives == (Q_LAST,))
    inputs = [sample(r.value.meta["val"], NATIVE, None) for r in work.reads]
    wanted = next(c for c in backends.candidates(work, frozenset({"f32"})) if c.name == "aten.native").build()(*inputs)
    off = work.qparams
    shifted = (wanted / off.scale + off.zero_point + 5).round().clamp(off.low, off.high).to(off.dtype)
    assert "integers off" in check(work, good, lambda *a: shifted, inputs, wanted)


@needs_vnni
def test_zeros_are_padded_round_integers():
    class Padded(nn.Module):
        """As TensorFlow pads for a stride of 2: below and to the right alone."""

        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3, stride=2)

        def forward(self, x):
            return self.two(nn.functional.pad(torch.relu(self.one(x)), (0, 1, 0, 1)))

    x = torch.randn(2, 3, 12, 15)
    _, program = program_of(Padded(), x, "int8")
    work = next(w for w in analyse(program).works if "pad" in w.op)
    options = list(backends.candidates(work, frozenset({"f32", "int8"})))
    assert "llvm.pad-q" in {o.name for o in options}
    assert not [f for f in Stopwatch(0, fresh=True).work(work, options) if isinstance(f, str)]
    lowered = lower(program, allowed={"int8"}, plan={work.node.name: "llvm.pad-q"})
    assert sqnr_db(run_pure(program, (x,))[0], lowered.runner(x)[0]) > 25


def test_weights_alone_are_read_as_integers():
    x = torch.randn(3, 19, 48)
    captured, _ = program_of(Attention(), x)
    program = Pipeline(resolve("w8")).run(captured)[0]
    linears = [w for w in analyse(program).works if "linear" in w.op]
    for work in linears:
        options = list(backends.candidates(work, frozenset({"f32", "int8"})))
        assert "llvm.w8" in {o.name for o in options}
        assert not [f for f in Stopwatch(0, fresh=True).work(work, options) if isinstance(f, str)]
    lowered = lower(program, allowed={"int8"}, plan={w.node.name: "llvm.w8" for w in linears})
    assert sqnr_db(run_pure(program, (x,))[0], lowered.runner(x)[0]) > 100


def test_chains_of_views_are_one_call_whatever_the_strides():
    class Heads(nn.Module):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in x.split(16, -1))
            return q.exp(), k, v[:, 1:3, ::2], torch.view_as_real(torch.complex(x, x)).transpose(0, 1)[1]

    x = torch.randn(2, 5, 48)
    program = capture(Heads(), (x,)).program
    program.example = (x,)
    lowered = lower(program)
    assert len(lowered.runner.steps) <= len([n for n in program.nodes]) - 8  # split, its parts and their reshapes are gone
    for given in (x, torch.randn(2, 48, 5).transpose(1, 2), torch.randn(4, 5, 96)[::2, :, ::2]):
        for got, wanted in zip(lowered.runner(given), Heads()(given), strict=True):
            assert torch.equal(got, wanted)


def test_an_assignment_that_fails_whole_drops_out(monkeypatch):
    from graphwright import lower as lowering

    _, program = program_of(Small(), torch.randn(2, 3, 33, 41))
    real, broken = lowering._assignments, []

    def assignments(problem):
        found = real(problem)
        first = next(iter(found.values()))
        other = [(k + 1) % len(o) for k, o in zip(first, problem.options, strict=True)]
        return {"broken": other, **found} if broken == [] else found

    def emit(analysis, chosen, fused=()):
        runner = original(analysis, chosen, fused)
        if not broken:
            broken.append(runner)
            runner.forward = lambda *leaves: 1 / 0
        return runner

    original = lowering.emit
    monkeypatch.setattr(lowering, "_assignments", assignments)
    monkeypatch.setattr(lowering, "emit", emit)
    lowered = lower(program)
    assert lowered.runner is not broken[0]
    assert any("'broken' does not run: ZeroDivisionError" in n for n in lowered.notes)


class Sound(nn.Module):
    """Convolutions along one axis: steps, groups, dilation, a residual, an activation that oneDNN does not fuse."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv1d(5, 12, 3, stride=2), nn.Conv1d(12, 12, 3, padding=2, dilation=2, groups=4)
        self.three, self.four = nn.Conv1d(12, 7, 2, bias=False), nn.Conv1d(7, 7, 1)

    def forward(self, x):
        x = nn.functional.gelu(self.one(x))
        x = nn.functional.mish(self.three(torch.relu(self.two(x) + x)))
        return self.four(x) + x


def test_convolutions_along_one_axis_are_packed():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 41)
    captured = capture(Sound().eval(), (x,)).program
    captured.example = (x,)
    program, _ = Pipeline(resolve("default")).run(captured)
    convs = [w for w in analyse(program).works if w.op == "graphwright.conv"]
    lowered = lower(program, plan={w.node.name: "onednn.f32" for w in convs})
    assert len(convs) == 4 == sum(s.name == "onednn.f32" for s in lowered.runner.steps) and not lowered.notes
    assert Exact().failure(run_double(captured, (x,))[0], run_pure(captured, (x,))[0], lowered.runner(x)[0]) is None
