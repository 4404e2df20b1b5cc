"""The first session on a GPU, as far as it can be tried without one: imports, the order of work, what survives a crash, the report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu as session
from bench import gpu_targets, gpu_work
from graphwright.kernels import gpu


def test_it_needs_no_installation(tmp_path: Path) -> None:
    code = "import graphwright, graphwright.passes, graphwright.kernels.gpu as g, bench.gpu_work; print(graphwright.__file__, len(g.families()))"
    done = subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path += {sys.path!r}; {code}"], env=session.linked(), cwd=tmp_path,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert "graphwright-" in done.stdout.split()[0] and int(done.stdout.split()[1]) > 10


def test_targets_are_shapes_that_kernels_take() -> None:
    for target in gpu_targets.TARGETS:
        assert gpu_targets.sample_of(target).name and gpu_targets.asked(target), target
    assert len(set(gpu_targets.TARGETS)) == len(gpu_targets.TARGETS)


def test_every_kernel_has_its_turn() -> None:
    assert set(session._kernels()) == set(gpu.families()) and set(session.FIRST) <= set(gpu.families())
    timed = {(name, s.name) for stage in ("plain", "rest") for name, s, _ in gpu_work.plan_of(stage)}
    assert {(f.name, s.name) for f in gpu.families().values() for s in f.samples() if s.bench} <= timed


@pytest.mark.parametrize("k", [1, 2, 5])
def test_predictions_stay_below_what_the_machine_can(k: int) -> None:
    found = gpu_targets.predict(gpu_targets.TARGETS[k])
    assert found.seconds > 0 and 0 < found.of_copy <= 1 and 0 < found.of_peak < 1


SCRIPT = """
import json, sys, time
path, first = sys.argv[1], int(sys.argv[2])
def say(**line):
    with open(path, "a") as f:
        f.write(json.dumps({"stage": "plain", **line}) + "\\n")
for k in range(first, 5):
    say(item=k, state="begun")
    if k == 1:
        sys.exit(-6)
    if k == 3:
        time.sleep(60)
    say(item=k, state="done")
"""


def test_a_crash_and_a_hang_cost_their_own_sample_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = session.Session(tmp_path, 2.0)
    monkeypatch.setattr(here, "start", lambda *words: subprocess.Popen([sys.executable, "-S", "-c", SCRIPT, str(tmp_path / "speed.jsonl"), words[1]]))
    monkeypatch.setattr(session, "EACH", {"plain": 3})
    monkeypatch.setattr(session, "START", 0)
    here.speed("plain")
    held = gpu_work.lines(tmp_path, "speed")
    assert [line["item"] for line in held if line["state"] == "done"] == [0, 2, 4]
    assert [line["item"] for line in held if line["state"] == "begun"] == [0, 1, 2, 3, 4]


def test_the_report_sets_measured_beside_predicted(tmp_path: Path) -> None:
    times = {"least": 0.05, "p20": 0.05, "p50": 0.06, "p80": 0.07}
    result = {"op": "graphwright.linear_int8", "backend": "triton", "sample": "16x8192x28672", "verdict": "ok", "bytes": 1, "flops": 1, "unit": "int8", "times": times,
              "replay": times, "peers": [{"name": "inductor", "times": times, "ratio": 0.9, "reason": ""}, {"name": "int_mm", "times": None, "ratio": None, "reason": "M"}],
              "gb_per_s": 3900.0, "gop_per_s": 1e5, "of_copy": 0.9, "of_peak": 0.1, "compile_s": 1.0}  # fmt: skip
    where = {"stage": "plain", "item": 0, "kernel": "linear_int8_few", "sample": "16x8192x28672"}
    gpu_work.append(tmp_path, "speed", {**where, "state": "begun"})
    gpu_work.append(tmp_path, "speed", {**where, "state": "done", "key": "k", "config": "BM=16", "result": result})
    gpu_work.append(tmp_path, "speed", {**where, "item": 1, "sample": "x", "state": "begun"})
    gpu_work.append(tmp_path, "numbers", {"kernel": "linear_w4", "sample": "1x1", "config": "c", "problem": "off by a mile"})
    with (tmp_path / "speed.jsonl").open("a") as file:
        file.write('{"cut": "in the mid')
    (tmp_path / "predicted.json").write_text(json.dumps([1e-4] * len(gpu_targets.TARGETS)))
    gpu_work.report(tmp_path)
    page = (tmp_path / "report.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| linear_int8_few | 16x"))
    assert "reached" in row and "BEHIND inductor (0.90)" in row and "int_mm" not in row.split("|")[-2]
    assert "WRONG linear_w4, 1x1, c: off by a mile" in page and "did not come back" in page and "not reached" in page
    assert json.loads((tmp_path / "kernels.json").read_text())["tuned"] == {"k": "BM=16"}
    assert "linear_int8" in (tmp_path / "kernels.csv").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert session.main(["--out", str(tmp_path / "out"), "--minutes", "1"]) == 1
    assert "there is no GPU" in capsys.readouterr().out
