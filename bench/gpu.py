"""The first session on a GPU: is every kernel right there, and how fast is it at the shapes that matter, beside its peers?

    python -m bench.gpu --out results/gpu --minutes 9

Needs a checkout, Python 3.11 or later, PyTorch for CUDA, Triton and NumPy: nothing is installed, and where ``graphwright`` can't be imported the
checkout's folders are linked below that name. In turns:

1. the machine: a copy and matrix products (``facts.jsonl``);
2. numbers: the small samples of each kernel against its op's reference in float64, several kernels at a time, and what will be timed is
   compiled (``numbers.jsonl``);
3. speed: the targets of ``gpu_targets.py`` by importance, each checked, tuned and timed alone, with cold caches, as a replayed
   graph, beside PyTorch's own calls; then beside Inductor's; then all other samples (``speed.jsonl``).

Every step is a line on the disk before the next begins, in a process that may crash or hang: the next one goes on behind it. ``report.md``
(predictions beside measurements), ``kernels.csv`` and ``kernels.json`` (its ``tuned`` is what ``kernels/gpu/tuned/<name of the GPU>.json`` holds)
are made of the lines after each part, and again by ``--report``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

#: What a process ends with that wants to be followed by another which goes on behind what broke it.
AGAIN = 3

ROOT = Path(__file__).resolve().parent.parent

#: Share of the time that the numbers may take, seconds that one timed sample may take, and processes that check beside each other.
NUMBERS, EACH, BESIDE = 0.45, {"plain": 60, "compiled": 150, "rest": 45}, 12

#: Seconds that a process may take on top until its first sample is done.
START = 30

#: By importance, families of one op one after the other; all others follow.
FIRST = (
    "linear_int8_persistent", "linear_int8", "linear_int8_few", "linear_w4", "conv2d_int8", "attention_int8_qk", "norm_quantize_rows", "linear_block_sparse",
    "quantize_rows", "attention_int8_qk_few", "linear_fp8", "linear_fp8_few", "linear_w8_groups", "linear_w4a8", "linear_sparse24",
)  # fmt: skip


def linked() -> dict[str, str]:
    """The environment in which ``graphwright`` and ``bench`` can be imported from this checkout, installed or not."""
    top = Path(tempfile.mkdtemp(prefix="graphwright-"))
    package = top / "graphwright"
    package.mkdir()
    for path in (ROOT / "optimizer").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    for name in ("passes", "kernels"):
        (package / name).symlink_to(ROOT / name)
    paths = [str(top), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}


class Session:
    """One run: where its files go, until when, and with which environment its processes run."""

    def __init__(self, folder: Path, minutes: float):
        self.folder, self.begin, self.minutes, self.env = folder, time.monotonic(), minutes, linked()
        folder.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Nothing of an earlier session is left."""
        for path in self.folder.glob("*.jsonl"):
            path.unlink()

    def left(self, share: float = 1.0) -> float:
        """Seconds until so much of the time is over."""
        return self.begin + 60 * self.minutes * share - time.monotonic()

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """A process of ``bench.gpu_work``; what it says on stderr goes to ``log.txt``."""
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "bench.gpu_work", words[0], str(self.folder.resolve()), *words[1:]],
                                    env=self.env, cwd=ROOT, stderr=log)  # fmt: skip

    def say(self, text: str) -> None:
        """A line with the time since the beginning."""
        print(f"[{time.monotonic() - self.begin:5.0f} s] {text}", flush=True)

    def wait(self, process: subprocess.Popen[bytes], seconds: float) -> bool:
        """Whether it ended well in time; else it is ended."""
        try:
            return process.wait(max(seconds, 1.0)) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return False

    def report(self) -> None:
        """Make the report of what there is."""
        if not self.wait(self.start("report"), 120):
            self.say("the report can't be made: see log.txt")

    def numbers(self, kernels: Sequence[str]) -> None:
        """Check the kernels, several beside each other; in their order, as far as the time goes."""
        waiting, running = list(kernels), dict[str, subprocess.Popen[bytes]]()
        beside = max(1, min(BESIDE, (os.cpu_count() or 2) - 2))
        while (waiting or running) and self.left(NUMBERS) > 0:
            while waiting and len(running) < beside:
                running[waiting[0]] = self.start("numbers", waiting[0])
                waiting.pop(0)
            for name in [n for n, p in running.items() if p.poll() is not None]:
                code = running.pop(name).returncode
                if code == AGAIN:
                    waiting.insert(0, name)
                self.say(f"numbers of {name}: {'done' if code == 0 else f'ended with {code}, see log.txt'}")
            time.sleep(0.2)
        for name, process in running.items():
            process.kill()
            process.wait()
            self.say(f"numbers of {name}: cut short")
        if waiting:
            self.say(f"numbers not reached: {', '.join(waiting)}")

    def speed(self, stage: str) -> None:
        """Time a stage's samples, one after the other; a process that crashes or hangs is followed by another that goes on behind it."""
        first = 0
        while self.left() > 20:
            process = self.start("speed", str(first), stage)
            item, since = first, time.monotonic()
            while process.poll() is None and self.left() > 5 and time.monotonic() - since < EACH[stage] + START * (item == first):
                time.sleep(0.5)
                if (now := self.reached(stage)) > item:
                    item, since = now, time.monotonic()
            if process.poll() == 0:
                return
            process.kill()
            process.wait()
            first = max(self.reached(stage), first) + 1
            if self.left() > 20:
                self.say(f"{stage} {first - 1} did not come back: going on behind it")

    def reached(self, stage: str) -> int:
        """The sample that was begun last; -1: none."""
        path = self.folder / "speed.jsonl"
        held = [json.loads(t) for t in path.read_text().splitlines() if t.endswith("}")] if path.exists() else []
        return max((line["item"] for line in held if line["stage"] == stage), default=-1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the session; 1 where a number was wrong or nothing was measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it")
    parser.add_argument("--kernel", action="append", default=[], help="check the numbers of these alone")
    parser.add_argument("--report", action="store_true", help="only make the report again from the lines in the folder")
    options = parser.parse_args(argv)
    session = Session(options.out, options.minutes)
    if not options.report:
        session.clear()
        if not session.wait(session.start("facts"), min(120.0, session.left())):
            session.say(f"there is no GPU that works here: {session.folder / 'log.txt'} says why")
            return 1
        session.say("the machine is known")
        predicting = session.start("report")  # what it takes longest for are the predictions: beside the numbers they cost nothing
        session.numbers(options.kernel or _kernels())
        session.wait(predicting, 60)
        session.report()
        for stage in ("plain", "compiled", "rest"):
            session.say(f"speed: {stage}")
            session.speed(stage)
            session.report()
    else:
        session.report()
    page = session.folder / "report.md"
    text = page.read_text() if page.exists() else ""
    print(text)
    return int("WRONG" in text or "µs" not in text)


def _kernels() -> list[str]:
    """Every kernel by name, from its record of machine code, the important ones first."""
    found = sorted(p.stem for p in (ROOT / "kernels" / "gpu" / "resources").glob("*.json") if p.stem != "versions")
    return [n for n in FIRST if n in found] + [n for n in found if n not in FIRST]


if __name__ == "__main__":
    sys.exit(main())
