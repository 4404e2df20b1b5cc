"""What tensors take: measured peaks, and what a lowered program no longer holds."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.capture import capture
from graphwright.lower import lower
from graphwright.lower.graph import Analysis
from graphwright.manager import Pipeline
from graphwright.memory import fault_us, faults, peak, process_peak_mb, release
from graphwright.passes.pipeline import resolve

MIB = 2**18  # float32 elements


def test_the_peak_counts_what_is_held_at_a_time():
    def run():
        a = torch.empty(MIB)
        b = a + 1
        del a
        c = b * 2
        del b
        return c

    found = peak(run)
    assert found is not None and 2.0 <= found.mb < 2.1 and found.allocations >= 3


def test_memory_from_before_is_not_counted_even_when_it_goes():
    kept = [torch.ones(4 * MIB)]

    def run():
        kept.clear()
        return torch.ones(MIB)

    found = peak(run)
    assert found is not None and 1.0 <= found.mb < 1.1


def test_temporaries_of_our_own_kernels_are_seen():
    from graphwright.kernels.native import unavailable

    if unavailable():
        pytest.skip(unavailable())
    from graphwright.backends import llvm

    run, x = llvm.kernel("graphwright.softmax"), torch.randn(1024, 256)
    run(x, None, 1.0, False)
    found = peak(lambda: run(x, None, 1.0, False))
    assert found is not None and found.mb >= 1.0


def test_a_second_profiler_is_no_error():
    def run():
        assert peak(lambda: torch.ones(3)) is None

    peak(run)


def test_a_run_that_fails_leaves_no_profiler_behind():
    with pytest.raises(ZeroDivisionError):
        peak(lambda: 1 / 0)
    assert peak(lambda: torch.ones(3)) is not None


def test_what_the_process_took_is_told_and_given_back():
    held = torch.ones(16 * MIB)
    assert process_peak_mb() > 16
    del held
    release()


@pytest.mark.parametrize("recipe", ["int8", "w8"])
def test_float_copies_of_integer_weights_go_once_the_program_is_lowered(recipe, monkeypatch):
    copies: list[weakref.ref] = []
    let_go = Analysis.let_go

    def noted(analysis):
        copies.extend(weakref.ref(t) for t in analysis.dequantized.values())
        let_go(analysis)

    monkeypatch.setattr(Analysis, "let_go", noted)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval(), torch.randn(32, 64)
    program = capture(model, (x,)).program
    program.example, program.calibration = (x,), [(x,)]
    program = Pipeline(resolve(recipe)).run(program)[0]
    linears = [n.name for n in program.nodes if "linear" in str(n.target)]
    names = {"int8": "onednn.int8-f32", "w8": "llvm.w8"}
    lowered = lower(program, allowed={"f32", "int8"}, plan=dict.fromkeys(linears, names[recipe]))
    if {lowered.plan[n] for n in linears} != {names[recipe]}:
        pytest.skip("this machine has no such kernel")
    gc.collect()
    assert len(copies) == 2 and all(c() is None for c in copies)
    for work in lowered.analysis.works:
        if work.weights:
            shell = next(t for t in (*work.args, *work.kwargs.values()) if isinstance(t, torch.Tensor) and t.dim() == 2)
            assert shell.device.type == "meta" and shell.shape == work.weights["weight"].values.shape
    with torch.no_grad():
        assert torch.nn.functional.cosine_similarity(lowered.runner(x)[0].flatten(), model(x).flatten(), dim=0) > 0.999


def test_an_implementation_that_needs_a_float_copy_keeps_it():
    model, x = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval(), torch.randn(32, 64)
    program = capture(model, (x,)).program
    program.example = (x,)
    program = Pipeline(resolve("w8")).run(program)[0]
    with torch.no_grad():
        torch.testing.assert_close(lower(program, plan={}).runner(x)[0], program(x)[0], rtol=1e-4, atol=1e-5)


class Wide(nn.Module):
    """Two values of 4 MiB are held at a time, weights hardly matter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1024, 64))  # a product must be written out, whatever is fused behind it

    def forward(self, x):
        y = torch.sin(x @ self.weight.T)
        return torch.cos(y).sum(1)


def test_the_report_tells_the_measured_peak_of_both_sides_and_whether_the_goal_is_met():
    x = torch.randn(1024, 64)
    fast = gw.optimize(Wide().eval(), x, goal=gw.Goal(memory_mb=1.0))
    report = fast.report
    assert report.memory_before_mb == pytest.approx(8.0, rel=0.1)  # the product and its sine
    assert report.memory_after_mb is not None and 4.0 <= report.memory_after_mb <= report.memory_before_mb + 0.1
    assert any("goal missed: peak memory" in w and "goal 1.0 MB" in w for w in report.warnings)
    assert report.process_peak_mb > 100 and report.allocations_before >= 4
    assert "peak memory" in str(report)
    assert peak(lambda: fast(x)).mb == pytest.approx(report.memory_after_mb, rel=0.05)
    again = type(report).from_json(report.to_json())
    assert (again.memory_before_mb, again.process_peak_mb) == (report.memory_before_mb, report.process_peak_mb)


def test_pages_that_a_call_maps_are_counted():
    import mmap

    pages = 600

    def touch() -> None:
        with mmap.mmap(-1, pages * mmap.PAGESIZE) as block:
            for at in range(0, len(block), mmap.PAGESIZE):
                block[at] = 1

    assert pages <= faults(touch) < pages + 200
    assert faults(lambda: None) < 50 and 0.0 <= fault_us() < 1000.0


_CALLS = """
import sys, torch
from graphwright.memory import faults, keep_heap
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    keep_heap()
def call():
    held = [torch.ones(2**18) for _ in range(40)]  # 40 MiB, gone when it returns
for _ in range(3):
    call()
print(faults(call))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ, reason="glibc's own thresholds")
def test_memory_of_a_call_is_kept_for_the_next():
    def pages(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", _CALLS, how], check=True, capture_output=True, text=True).stdout)

    assert pages("kept") < 200 and pages("as it is") > 5000


def test_mapping_is_told_where_it_costs(monkeypatch):
    from graphwright import reporting

    model, x = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    monkeypatch.setattr(reporting, "fault_us", lambda: 1.0)
    for count, said in ((0, False), (10**6, True)):
        monkeypatch.setattr(reporting, "faults", lambda run, count=count: count)
        notes = gw.optimize(model, x).report.notes
        assert any(f"{count} pages are mapped in each call" in n and "glibc.malloc.mmap_max=0" in n for n in notes) is said
