"""The runner: wrong outputs get no time, failures cost a line, rounds are interleaved, dying processes are survived."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bench import models, peers, results, run, worker

TINY = models.get("tiny")
QUICK = run.Settings(rounds=3, calls=2, threads=1, calibration_batches=2, processes=False, pause_s=0)


@dataclass(frozen=True)
class Scripted(peers.Peer):
    """The right answer times `factor`; misbehaves as told, from the given call on."""

    factor: float = 1.0
    missing: str | None = None
    raises_at: int | None = None
    wrong_from: int | None = None

    def available(self) -> str | None:
        return self.missing

    def prepare(
        self, model: torch.nn.Module, inputs: models.Inputs, calibration: Sequence[models.Inputs]
    ) -> peers.Runner:
        calls = 0

        def answer(inputs: models.Inputs) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if self.raises_at is not None and calls > self.raises_at:
                raise RuntimeError("\n  first words\nsecond line")
            late = self.wrong_from is not None and calls > self.wrong_from
            with torch.no_grad():
                return model(*inputs) * (0.0 if late else self.factor)

        return answer


def measure(*chosen: peers.Peer, settings: run.Settings = QUICK, said: list[str] | None = None) -> dict[str, dict]:
    said = [] if said is None else said
    record = run.measure(TINY, chosen, settings, said.append)
    return {row["peer"]: row for row in record["peers"]}


EAGER = peers.get("eager")


def test_a_right_peer_is_timed_and_compared_with_eager():
    rows = measure(EAGER, Scripted("same", "float32"))
    for row in rows.values():
        assert row["status"] == "ok"
        assert row["latency"]["calls"] == 6
        assert len(row["rounds_ms"]) == 3
        assert 0 < row["latency"]["min_ms"] <= row["latency"]["median_ms"] <= row["latency"]["p95_ms"]
        assert row["sqnr_db"] > 100
    assert rows["eager"]["speedup"] == {"median": 1.0, "low": 1.0, "high": 1.0, "of_minima": 1.0}
    assert rows["same"]["speedup"]["median"] > 0


def test_a_peer_with_wrong_outputs_gets_no_time():
    said: list[str] = []
    rows = measure(EAGER, Scripted("off", "float32", factor=1.1), said=said)
    assert rows["off"]["status"] == "wrong"
    assert rows["off"]["latency"] is rows["off"]["speedup"] is None
    assert rows["off"]["rounds_ms"] == []
    assert rows["off"]["sqnr_db"] == pytest.approx(20, abs=0.1)
    assert "SQNR 20.0 dB is below the bound of 60 dB" in rows["off"]["reason"]
    assert rows["eager"]["status"] == "ok"
    assert any(line.startswith("  off: wrong: output 0") for line in said)


def test_the_bound_is_that_of_the_precision():
    assert measure(Scripted("off", "int8", factor=1.1))["off"]["status"] == "ok"


def test_a_peer_that_turns_wrong_while_it_is_timed_loses_its_time():
    rows = measure(EAGER, Scripted("late", "float32", wrong_from=5))
    assert rows["late"]["status"] == "wrong"
    assert rows["late"]["reason"].startswith("after the rounds: output 0")
    assert rows["late"]["latency"] is None


def test_missing_and_raising_peers_cost_one_line_each():
    said: list[str] = []
    rows = measure(
        Scripted("absent", "int8", missing="thing: not installed"),
        Scripted("first", "int8", raises_at=0),
        Scripted("check", "int8", raises_at=1),
        Scripted("round", "int8", raises_at=5),
        EAGER,
        said=said,
    )
    assert (rows["absent"]["status"], rows["absent"]["reason"]) == ("skipped", "thing: not installed")
    assert (rows["first"]["status"], rows["first"]["reason"]) == ("failed", "RuntimeError: first words")
    assert (rows["check"]["status"], rows["check"]["reason"]) == ("failed", "RuntimeError: first words")
    assert (rows["round"]["status"], rows["round"]["reason"]) == ("failed", "in round 1: RuntimeError: first words")
    assert rows["eager"]["status"] == "ok"
    for name in ("absent", "first", "check", "round"):
        assert rows[name]["latency"] is None
        assert len([line for line in said if line.startswith(f"  {name}: {rows[name]['status']}: ")]) == 1


def test_without_eager_there_is_no_ratio():
    row = measure(Scripted("same", "float32"))["same"]
    assert row["latency"] is not None
    assert row["speedup"] is None


def test_rounds_are_interleaved_and_shuffled():
    turns: list[str] = []

    class Seat(worker.LocalSeat):
        def time(self, warmup: int, calls: int) -> list[float]:
            turns.append(self.peer.name)
            return [1.0] * calls

    chosen = [Scripted(name, "float32") for name in "abc"]
    settings = run.Settings(rounds=6, threads=1, processes=False, pause_s=0)
    run.measure(TINY, chosen, settings, lambda line: None, lambda e, p, s: Seat(e, p, 1, 1))
    rounds = [tuple(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert [sorted(one) for one in rounds] == [["a", "b", "c"]] * 6
    assert len(set(rounds)) > 1


def test_a_peer_in_its_own_process_gives_the_same_outputs():
    seat, here = worker.ProcessSeat(TINY, EAGER, 1, 2), worker.LocalSeat(TINY, EAGER, 1, 2)
    try:
        prepared = seat.prepare()
        assert (prepared.status, prepared.reason) == ("ok", None)
        assert prepared.prepare_s > 0
        assert prepared.memory_mb is None or 0 < prepared.memory_mb <= prepared.peak_memory_mb
        assert here.prepare().status == "ok"
        assert results.check(here.outputs(), seat.outputs(), 100.0)[1] is None
        assert len(seat.time(1, 4)) == 4
        os.kill(seat._process.pid, signal.SIGKILL)
        with pytest.raises(ChildProcessError, match="ended with signal 9"):
            seat.time(0, 1)
    finally:
        seat.close()
    seat.close()  # twice is no error


def test_a_process_that_dies_or_hangs_while_preparing_is_a_failed_peer(monkeypatch: pytest.MonkeyPatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        dead = worker.ProcessSeat(TINY, EAGER, 1, 2)
    prepared = dead.prepare()
    assert prepared.status == "failed"
    assert "ended with exit status 1" in prepared.reason
    slow = worker.ProcessSeat(TINY, EAGER, 1, 2, timeout_s=0.0)
    prepared = slow.prepare()
    assert prepared.status == "failed"
    assert "no answer to 'prepare'" in prepared.reason
    for _ in range(100):
        if slow._process.poll() is not None:
            break
        time.sleep(0.05)
    assert slow._process.poll() is not None


def test_the_command_line_writes_a_file_and_prints_a_table(tmp_path: Path):
    script, out = Path(run.__file__), tmp_path / "x.json"
    words = [
        sys.executable,
        str(script),
        "--model",
        "tiny",
        "--peers",
        "eager,eager-bf16",
        "--rounds",
        "2",
        "--calls",
        "1",
        "--threads",
        "1",
        "--one-process",
        "--out",
        str(out),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=120)
    record = results.load(out)
    assert [row["peer"] for row in record["models"][0]["peers"]] == ["eager", "eager-bf16"]
    assert record["settings"]["threads"] == 1
    assert "| eager-bf16 |" in done.stdout
    assert "SQNR" in done.stderr


def test_a_run_that_is_stopped_leaves_no_process_and_no_folder(tmp_path: Path):
    words = [sys.executable, run.__file__, "--model", "tiny", "--peers", "eager", "--rounds", "1000000"]
    process = subprocess.Popen(words, env={**os.environ, "TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "eager: ready" in line:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1 and list(tmp_path.glob("bench-eager-*"))
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert not Path(f"/proc/{children[0]}").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "resnet99"], "no model 'resnet99' in the zoo; known: resnet50"),
        (["--model", "tiny", "--peers", "eager,magic"], "no peer 'magic'; known: eager"),
    ],
)
def test_unknown_names_are_told_with_the_known_ones(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert run.main([*words, "--rounds", "1"]) == 2
    assert said in capsys.readouterr().err


def test_rounds_must_be_positive(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run.main(["--rounds", "0"])
    assert "must be at least 1" in capsys.readouterr().err
