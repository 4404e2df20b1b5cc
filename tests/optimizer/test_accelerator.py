"""What is asked of a GPU while kernels are chosen, on one that is none; and where fake CUDA tensors tell enough, those."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import graphwright as gw
from graphwright import accelerator, backends, ops
from graphwright.accelerator import Clock
from graphwright.backends.base import NATIVE, Q_LAST, ROWS, Candidate, Q, QParams, served
from graphwright.capture import capture
from graphwright.errors import InternalError, LoadError
from graphwright.lower.conversions import conversion, possible
from graphwright.lower.graph import analyse
from graphwright.lower.stopwatch import Stopwatch, check, sample
from graphwright.manager import Pipeline
from graphwright.memory import peak_on
from graphwright.ops.registry import implement
from graphwright.passes.pipeline import resolve
from graphwright.testing.pretend import Pretend


def test_a_call_is_timed_between_marks_with_an_empty_cache_and_its_launches_recorded():
    cuda = Pretend()
    clock = Clock(cuda)

    def call(x):
        cuda.now += 2.0
        return (x + 1,)

    ready = clock.ready(call, [torch.ones(2)])
    assert cuda.log == ["aside", "back", "wait", "record"]
    cuda.log.clear()
    assert clock.once(ready, [torch.ones(2)]) == pytest.approx(2e-3)
    assert cuda.log == ["flush", "mark", "replay", "mark", "reached"]


def test_what_cannot_be_recorded_is_timed_with_its_launches():
    cuda = Pretend(refuses=RuntimeError("no"))
    clock, calls = Clock(cuda), []
    ready = clock.ready(calls.append, [1])
    cuda.log.clear()
    clock.once(ready, [1])
    assert "replay" not in cuda.log and calls == [1, 1, 1]


def test_times_are_kept_under_the_gpu_the_driver_and_the_state_of_the_kernels():
    one, other = Pretend(), Pretend()
    other.facts = {**one.facts, "driver": "1"}
    keys = {Stopwatch(0, cuda)._key("work", "triton.linear-int8") for cuda in (None, one, other)}
    assert len(keys) == 3
    work = next(w for w in analyse(capture(nn.Linear(4, 4).eval(), (torch.randn(2, 4),)).program).works)
    now = [10.0]

    def timed(version):
        watch = Stopwatch(0, cuda := Pretend(), fresh=False)
        watch._base = "test of versions"  # apart from all that is real

        def slow(*args):
            cuda.now += now[0]
            return native.build()(*args)

        native = next(c for c in backends.candidates(work, frozenset({"f32"})) if c.name == "aten.native")
        other = Candidate("triton.test", (NATIVE,), (NATIVE,), "f32", lambda: slow, version=version)
        return watch.work(work, [other, native])[0]

    assert timed("a") == pytest.approx(10.0)
    now[0] = 20.0
    assert timed("b") == pytest.approx(20.0), "another state of the code is timed anew"


def test_facts_of_a_gpu_can_be_stored():
    assert json.loads(json.dumps(Pretend().facts)) == Pretend().facts
    assert accelerator.of(torch.device("cpu")) is None and accelerator.of(None) is None


def test_the_memory_of_a_run_is_the_devices():
    found = peak_on(Pretend(), lambda: None)
    assert found is not None and found.mb == 1.0 and found.allocations == 3
    assert peak_on(None, lambda: torch.ones(1024)).mb > 0


# -- forms -------------------------------------------------------------------------------------------------------------------


def test_half_precision_is_served_on_a_gpu_alone():
    with FakeTensorMode():
        values = {(d, t): torch.empty(2, 3, dtype=t, device=d) for d in ("cpu", "cuda") for t in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}
    assert {k for k, v in values.items() if served(v)} == {
        ("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.float16), ("cuda", torch.bfloat16)}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_integers_come_back_in_the_values_own_dtype(dtype):
    x, params = torch.randn(3, 4, 5, 6).to(dtype), QParams(0.05, 128, 0, 255, torch.uint8)
    q = conversion(NATIVE, Q_LAST, params, x)(x)
    back = conversion(Q_LAST, NATIVE, params, x)(q)
    assert q.dtype == torch.uint8 and q.is_contiguous(memory_format=torch.channels_last)
    assert back.dtype == dtype and float((back.float() - x.float()).abs().max()) <= 0.026 + 4 * torch.finfo(dtype).eps


def test_rows_come_with_their_scales_and_lead_nowhere_else():
    x = torch.randn(5, 8)
    q, scales = conversion(NATIVE, ROWS, None, x)(x)
    assert q.dtype == torch.int8 and scales.shape == (5, 1)
    assert torch.allclose(conversion(ROWS, NATIVE, None, x)((q, scales)), x, atol=0.02)
    assert possible(NATIVE, ROWS) and not possible(ROWS, NATIVE) and not possible(ROWS, Q) and not possible(Q, ROWS)
    like = sample(x, ROWS, None)
    assert like[0].dtype == torch.int8 and like[1].shape == (5, 1)


def test_samples_lie_where_the_value_lies():
    with FakeTensorMode():
        for dtype in (torch.int64, torch.bool):
            made = sample(torch.empty(4, 6, device="cuda", dtype=dtype), NATIVE, None)
            assert made.device.type == "cuda" and made.dtype == dtype and made.shape == (4, 6)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(32), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        return x + self.two(torch.relu(self.one(self.norm(x))))


def dynamic(activations: str):
    program = capture(Two().eval(), (torch.randn(24, 32),)).program
    program.example = (torch.randn(24, 32),)
    program, _ = Pipeline((*resolve("default"), gw.Quantize(mode="dynamic", activations=activations))).run(program)
    return analyse(program)


def test_the_analysis_tells_rows_about_zero_from_others():
    for activations, rows, even in (("uint8", True, False), ("int8", False, True)):
        works = {w.site: w for w in dynamic(activations).works}
        for name in ("one", "two"):
            read = works[name].reads[0]
            assert (read.rows, read.even, read.quantized) == (rows, even, False)
        assert works["norm"].rows_wanted and works["one"].rows_wanted and not works["two"].rows_wanted


def test_cublas_int8_products_agree_with_the_op(monkeypatch):
    """What ATen offers on a GPU for integers, computed here."""
    from graphwright.backends import aten
    from graphwright.backends.onednn import matrix
    from graphwright.lower.stopwatch import _oracle

    offered = 0
    for work in dynamic("int8").works:
        m = matrix(work)
        for candidate in aten._int_mm(work, m) if m is not None else ():
            native = next(c for c in backends.candidates(work, frozenset({"f32"})) if c.name == "aten.native")
            inputs, wanted = _oracle(work, native)
            assert candidate.needs[m.x] == ROWS and check(work, candidate, candidate.build(), inputs, wanted) is None
            offered += 1
    assert offered == 2


def test_cublas_epilogues_agree_with_the_op():
    from graphwright.backends import aten
    from graphwright.backends.onednn import matrix
    from graphwright.lower.stopwatch import _oracle

    offered = 0
    program, _ = Pipeline(resolve("default")).run(capture(Two().eval(), (torch.randn(24, 32),)).program)
    for work in analyse(program).works:
        m = matrix(work)
        for candidate in aten._epilogue(work, m) if m is not None else ():
            native = next(c for c in backends.candidates(work, frozenset({"f32"})) if c.name == "aten.native")
            assert check(work, candidate, candidate.build(), *_oracle(work, native)) is None
            offered += 1
    assert offered == 1  # the other has a residual


# -- where kernels are offered -----------------------------------------------------------------------------------------------


def test_backends_for_the_cpu_refuse_a_gpu_at_once():
    told = backends.reasons("cuda")
    (elsewhere,) = [who for who, why in told.items() if "for the CPU" in why]
    assert {"onednn", "llvm", "llvm_int8"} <= set(elsewhere.split(", "))
    assert "triton" in told or torch.cuda.is_available()
    assert "triton" not in backends.reasons("cpu")
    assert set(backends.names()) >= {"aten", "onednn", "llvm", "triton"}


def test_a_backend_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(gw.InputError, match="'tpu' does not exist") as caught:
        gw.optimize(nn.Linear(2, 2), torch.randn(1, 2), backend="tpu")
    assert "'triton'" in caught.value.hint


def test_a_backend_that_is_asked_for_is_taken_and_stands():
    fast = gw.optimize(Two().eval(), torch.randn(24, 32), backend="onednn")
    kernels = {row.site: row.kernel for row in fast.report.sites}
    assert kernels["one"].startswith("onednn") and kernels["two"].startswith("onednn")
    assert "unchanged" not in fast.report.verdict and "times" in fast.report.verdict


# -- ops ---------------------------------------------------------------------------------------------------------------------


def test_an_op_can_be_implemented_for_a_kind_of_device():
    calls = []

    def mine(x):
        calls.append(x.shape)
        return x.new_zeros(x.shape, dtype=torch.int8), x.new_zeros(*x.shape[:-1], 1)

    before = ops.row(ops.resolve("graphwright.quantize_rows")).reference
    try:
        implement("graphwright.quantize_rows", "cpu", mine)
        q, _ = torch.ops.graphwright.quantize_rows(torch.ones(2, 3))
        assert calls == [(2, 3)] and not q.any()
    finally:
        implement("graphwright.quantize_rows", "cpu", before)
    assert torch.ops.graphwright.quantize_rows(torch.ones(2, 3))[0].eq(127).all()
    with pytest.raises(InternalError, match="no op of the table's own"):
        implement("aten.relu", "cpu", torch.relu)


# -- files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_file_made_on_a_gpu_says_what_it_needs(tmp_path):
    from graphwright import store
    from graphwright.saving import archive_of

    fast = gw.optimize(nn.Linear(4, 4).eval(), torch.randn(2, 4))
    archive = archive_of(fast)
    assert "gpu" not in archive.meta
    archive.meta["gpu"] = {"gpu": "NVIDIA H100", "driver": "550.54"}
    store.save(tmp_path / "x.gw", archive)
    with pytest.raises(LoadError, match="optimized on NVIDIA H100, .* no CUDA device here") as caught:
        gw.load(tmp_path / "x.gw")
    assert "for the CPU, optimize the model there" in caught.value.hint


def test_staying_where_it_is_is_no_move():
    fast = gw.optimize(nn.Linear(4, 4).eval(), torch.randn(2, 4))
    assert fast.to("cpu") is fast and fast.cpu() is fast
    for move in (lambda: fast.cuda(), lambda: fast.cuda(0), lambda: fast.to("cuda:0"), lambda: fast.to(torch.float16)):
        with pytest.raises(gw.UnsupportedError, match="can't be moved"):
            move()
