"""One peer with one model, ready to be timed: in this process, or in one of its own.

Every peer sits in a process of its own by default. Thread pools of different libraries then can't fight (each spins
for a while after its work, and two OpenMP runtimes in one process share settings), one that crashes takes nobody
along, and peak memory is the peer's own. Only one process works at any moment: the others wait for their turn.

A process is asked in lines of JSON on its standard input and answers in lines of JSON on its standard output:

    {"do": "prepare"}                            -> {"status": "ok", "prepare_s": 3.2, ...} or {"status": "failed", ...}
    {"do": "outputs", "path": "x.npz"}      -> {"count": [2, 2]}        outputs per check input, saved to path
    {"do": "time", "warmup": 1, "calls": 3}      -> {"ms": [60.1, 60.3, 59.9]}
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

if __package__ in (None, ""):
    # Run as a file: the repository's root goes last, so that its folders hide no installed package.
    sys.path[0:1] = []
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from bench import models, peers

Outputs = list[list[np.ndarray]]


@dataclass(frozen=True)
class Prepared:
    """How preparing went. `status` is ok, skipped (it can't run here) or failed (it raised, died or took too long).

    `prepare_s`: from the call of `prepare` to the end of the first answer, packages imported before, caches empty
    unless asked otherwise. `memory_mb`: the process's resident memory with the model built and nothing prepared;
    `peak_memory_mb`: the highest until after the first answer (compilers that it starts not counted).
    """

    status: str
    reason: str | None = None
    prepare_s: float | None = None
    memory_mb: float | None = None
    peak_memory_mb: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


class Seat(Protocol):
    """What the runner needs of a peer."""

    def prepare(self) -> Prepared: ...
    def outputs(self) -> Outputs: ...
    def time(self, warmup: int, calls: int) -> list[float]: ...
    def close(self) -> None: ...


class LocalSeat:
    """A peer in this process."""

    def __init__(self, entry: models.Entry, peer: peers.Peer, threads: int, batches: int) -> None:
        self.entry, self.peer, self.threads, self.batches = entry, peer, threads, batches
        self.run: peers.Runner | None = None

    def prepare(self) -> Prepared:
        """Build the model, prepare the peer, call it once; never raises for what the peer does wrong."""
        torch.set_num_threads(self.threads)
        if reason := self.peer.available():
            return Prepared("skipped", reason)
        model, inputs = self.entry.model(), self.entry.example()
        calibration = self.entry.calibration(self.batches)
        before, _ = _memory_mb()
        try:
            start = time.perf_counter()
            run = self.peer.prepare(model, inputs, calibration)
            run(inputs)
            elapsed = time.perf_counter() - start
        except Exception as error:  # noqa: BLE001 - a peer may raise anything
            return Prepared("failed", peers.first_line(error))
        self.run = run
        _, peak = _memory_mb()
        del model
        _give_back_memory()
        return Prepared("ok", None, round(elapsed, 4), before, peak, self._details(run))

    def outputs(self) -> Outputs:
        """The outputs for each of the entry's check inputs."""
        run = self._ready()
        return [[a.copy() for a in peers.arrays(run(inputs))] for inputs in self.entry.checks()]

    def time(self, warmup: int, calls: int) -> list[float]:
        """Milliseconds of each of `calls` calls, after `warmup` that don't count; no garbage collection within."""
        run, inputs, spent = self._ready(), self.entry.example(), []
        gc.collect()
        gc.disable()
        try:
            for _ in range(warmup):
                run(inputs)
            for _ in range(calls):
                start = time.perf_counter()
                run(inputs)
                spent.append(1e3 * (time.perf_counter() - start))
        finally:
            gc.enable()
        return spent

    def close(self) -> None:
        """Drop the prepared model."""
        self.run = None
        gc.collect()

    def _details(self, run: peers.Runner) -> dict[str, Any]:
        try:
            return self.peer.details(run)
        except Exception as error:  # noqa: BLE001 - facts on the side must not cost a peer its place
            return {"error": peers.first_line(error)}

    def _ready(self) -> peers.Runner:
        if self.run is None:
            raise RuntimeError(f"{self.peer.name}: not prepared")
        return self.run


class ProcessSeat:
    """A peer in a process of its own: the same methods, over a pipe."""

    def __init__(
        self,
        entry: models.Entry,
        peer: peers.Peer,
        threads: int,
        batches: int,
        *,
        timeout_s: float = 900,
        warm_caches: bool = False,
    ) -> None:
        self.entry, self.peer, self.timeout_s = entry, peer, timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix=f"bench-{peer.name}-")
        self._log = Path(self._folder.name) / "log.txt"
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--model",
            entry.name,
            "--peer",
            peer.name,
            "--threads",
            str(threads),
            "--batches",
            str(batches),
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment(threads, warm_caches),
                bufsize=0,
                start_new_session=True,
            )

    def prepare(self) -> Prepared:
        """As LocalSeat's; a process that dies or takes longer than `timeout_s` gives status failed."""
        try:
            return Prepared(**self._ask(do="prepare"))
        except (ChildProcessError, TimeoutError) as error:
            self.close()
            return Prepared("failed", peers.first_line(error))

    def outputs(self) -> Outputs:
        """As LocalSeat's; raises ChildProcessError or TimeoutError where the process is gone or silent."""
        path = Path(self._folder.name) / "outputs.npz"
        counts = self._ask(do="outputs", path=str(path))["count"]
        with np.load(path) as file:
            return [[file[f"{i}_{j}"] for j in range(count)] for i, count in enumerate(counts)]

    def time(self, warmup: int, calls: int) -> list[float]:
        """As LocalSeat's; raises ChildProcessError or TimeoutError where the process is gone or silent."""
        return self._ask(do="time", warmup=warmup, calls=calls)["ms"]

    def close(self) -> None:
        """End the process and the compilers it started, and remove its folder; safe to call twice."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        with contextlib.suppress(OSError):  # a compiler that is still dying may write into it
            self._folder.cleanup()

    def _environment(self, threads: int, warm_caches: bool) -> dict[str, str]:
        count = str(threads)
        environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        if not warm_caches:
            for name in ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
                environment[name] = str(Path(self._folder.name) / name.lower())
        return environment

    def _ask(self, **request: Any) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
        except (BrokenPipeError, ValueError):
            raise ChildProcessError(self._ended()) from None
        ready, _, _ = select.select([process.stdout], [], [], self.timeout_s)
        if not ready:
            raise TimeoutError(f"no answer to {request['do']!r} within {self.timeout_s:.0f} s")
        line = process.stdout.readline()
        if not line:
            raise ChildProcessError(self._ended())
        answer = json.loads(line)
        if "error" in answer:
            raise ChildProcessError(answer["error"])
        return answer

    def _ended(self) -> str:
        code = self._process.wait()
        lines = (
            [x for x in self._log.read_text(errors="replace").splitlines() if x.strip()] if self._log.exists() else []
        )
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        return f"the process ended with {how}" + (f"; its last line: {lines[-1].strip()[:200]}" if lines else "")


def _give_back_memory() -> None:
    """Return freed memory to the system: a dozen processes wait beside each other, and preparing needs much of it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _memory_mb() -> tuple[float | None, float | None]:
    """Resident memory of this process now and at its highest, in MB; None where /proc doesn't tell."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        now, peak = (int(fields[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError, ValueError):
        return None, None
    return round(now, 1), round(peak, 1)


def serve(seat: LocalSeat, read: Callable[[], bytes], write: Callable[[bytes], object]) -> None:
    """Answer requests until the input ends."""
    while line := read():
        request = json.loads(line)
        try:
            answer = _answer(seat, request)
        except Exception as error:  # noqa: BLE001 - a peer may raise anything
            answer = {"error": peers.first_line(error)}
        write(json.dumps(answer).encode() + b"\n")


def _answer(seat: LocalSeat, request: dict[str, Any]) -> dict[str, Any]:
    match request["do"]:
        case "prepare":
            return vars(seat.prepare())
        case "outputs":
            outputs = seat.outputs()
            np.savez(request["path"], **{f"{i}_{j}": a for i, row in enumerate(outputs) for j, a in enumerate(row)})
            return {"count": [len(row) for row in outputs]}
        case "time":
            return {"ms": seat.time(request["warmup"], request["calls"])}
        case other:
            raise ValueError(f"unknown request {other!r}")


def main() -> None:
    """The worker process. Whatever libraries print goes to the log: standard output carries answers only."""
    parser = argparse.ArgumentParser(description="One peer, one model, asked in JSON lines; started by bench/run.py.")
    for name, kind in (("model", str), ("peer", str), ("threads", int), ("batches", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    seat = LocalSeat(models.get(options.model), peers.get(options.peer), options.threads, options.batches)
    serve(seat, sys.stdin.buffer.readline, answers.write)


if __name__ == "__main__":
    main()
