"""What ``bench.gpu`` has done in processes of their own: each appends a line of JSON per step, so that nothing is lost when it ends early.

    python -m bench.gpu_work facts|report FOLDER
    python -m bench.gpu_work numbers FOLDER KERNEL
    python -m bench.gpu_work speed FOLDER FIRST plain|compiled|rest
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.gpu_targets import TARGETS, Target, asked, name_of, predict, sample_of

#: What a process ends with whose kernel broke the device for it (see ``bench.gpu``): another one goes on behind that sample.
AGAIN = 3


def append(folder: Path, name: str, line: dict[str, Any]) -> None:
    """One line, on the disk when this returns; several processes may append to a file."""
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """All lines of a file; nothing where there is none."""
    path = folder / f"{name}.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines() if text.endswith("}")] if path.exists() else []


def facts(folder: Path) -> None:
    """The machine, and what it can do at best."""
    import torch

    from graphwright import accelerator, measure
    from graphwright.microbench import clock

    found = accelerator.of(torch.device("cuda"))
    assert found is not None
    record: dict[str, Any] = {"machine": measure.machine() | found.facts, "copy_gb_per_s": clock.copy_bandwidth("cuda"), "peak_gop_per_s": {}}
    for unit in ("int8", "fp16", "fp8"):
        try:
            record["peak_gop_per_s"][unit] = clock.peak(unit, "cuda")
        except RuntimeError as error:
            record[f"no {unit}"] = _first(error)
    append(folder, "facts", record)


def numbers(folder: Path, kernel: str) -> None:
    """Every small sample of a kernel against its reference; then the configs that will be timed are compiled, into the cache on disk."""
    from graphwright.kernels import gpu
    from graphwright.kernels.gpu import machine, tuning
    from graphwright.testing import gpu as checks
    from graphwright.testing.kernels import arguments

    family = gpu.families()[kernel]
    done = sum(line["kernel"] == kernel for line in lines(folder, "numbers"))
    for sample, config in list(checks.trials(family, large=False))[done:]:
        begin = time.perf_counter()
        problem = checks.check(family, sample, config)
        append(folder, "numbers", {"kernel": kernel, "sample": sample.name, "config": str(config), "problem": problem, "seconds": time.perf_counter() - begin})
        if problem and _fatal(problem):
            sys.exit(AGAIN)
    found = machine.here()
    assert found is not None
    for sample in (s for name, s, _ in plan_of("plain") if name == kernel):
        args = arguments(family.kernel(), sample)
        if family.refuses(*args) is None:
            for config in tuning.rank(family, args, found)[: tuning.FEW]:
                try:
                    family.under(config, *args)
                except Exception as error:  # noqa: BLE001  the tuner will meet it again, and pass over the config
                    append(folder, "numbers", {"kernel": kernel, "sample": sample.name, "config": str(config), "note": f"does not run: {_first(error)}"})


def plan_of(stage: str) -> list[tuple[str, Any, Target | None]]:
    """What is timed, in order: ``plain``, the targets; ``compiled``, those whose peers Inductor makes, again; ``rest``, all other samples."""
    from graphwright.kernels import gpu

    if stage != "rest":
        chosen = [t for t in TARGETS if stage == "plain" or {"inductor", "autotuned"} & set(t.ahead)]
        return [(t.kernel, sample_of(t), t) for t in chosen]
    known = {(t.kernel, name_of(t)) for t in TARGETS}
    return [(f.name, s, None) for f in gpu.families().values() for s in f.samples() if s.bench and (f.name, s.name) not in known]


def speed(folder: Path, first: int, stage: str) -> None:
    """Check, tune and time, from the ``first``-th on. A line before and a line after each: who has no second line did not come back."""
    from graphwright.kernels import gpu
    from graphwright.kernels.gpu import tuning
    from graphwright.microbench import Plan, bench, results
    from graphwright.microbench.peers import COMPILED, NAMES
    from graphwright.testing.kernels import arguments

    peers = frozenset(NAMES) - COMPILED if stage != "compiled" else frozenset({"inductor", "autotuned"})
    for k, (name, sample, _) in list(enumerate(plan_of(stage)))[first:]:
        where = {"stage": stage, "item": k, "kernel": name, "sample": sample.name}
        append(folder, "speed", {**where, "state": "begun"})
        family, begin = gpu.families()[name], time.perf_counter()
        try:
            result = bench(family.kernel(), sample, Plan(peers=peers))
            key, config = tuning.remembered(family, arguments(family.kernel(), sample)) if result.times else ("", "")
            append(folder, "speed", {**where, "state": "done", "seconds": time.perf_counter() - begin, "key": key, "config": config, "result": asdict(result)})
            print(results.line(result), flush=True)
        except Exception as error:
            append(folder, "speed", {**where, "state": "failed", "problem": _first(error)})
            if _fatal(str(error)):
                raise


def _fatal(problem: str) -> bool:
    """Nothing runs in this process any more."""
    return "CUDA error" in problem or "illegal memory access" in problem


def _first(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"


# -- the report ----------------------------------------------------------------------------------------------------------


def report(folder: Path) -> None:
    """From the lines that there are: ``report.md``, ``kernels.json`` (as the kernel benchmark writes it), ``kernels.csv``."""
    from graphwright.microbench.clock import Times
    from graphwright.microbench.results import Peer, Result, write_csv

    def times(held: dict[str, float] | None) -> Times | None:
        return None if held is None else Times(**held)

    timed = [line for line in lines(folder, "speed") if line["state"] == "done"]
    known = lines(folder, "facts")
    record = {"schema": "graphwright-kernels/2", "device": "cuda", "cold": True, **(known[-1] if known else {}), "results": [t["result"] for t in timed],
              "tuned": {t["key"]: t["config"] for t in timed if t["key"]}}  # fmt: skip
    (folder / "kernels.json").write_text(json.dumps(record, indent=1) + "\n")
    write_csv([Result(**{**r, "times": times(r["times"]), "replay": times(r["replay"]), "peers": tuple(Peer(**{**p, "times": times(p["times"])}) for p in r["peers"])})
               for r in record["results"]], folder / "kernels.csv")  # fmt: skip
    (folder / "report.md").write_text("\n".join(_pages(folder, known, timed)) + "\n")


def _pages(folder: Path, known: list[dict[str, Any]], timed: list[dict[str, Any]]) -> Iterator[str]:
    if known:
        peaks = ", ".join(f"{u} {v / 1e3:.0f} TOPS" for u, v in known[-1]["peak_gop_per_s"].items())
        yield f"# {known[-1]['machine'].get('gpu', 'GPU')}: copy {known[-1]['copy_gb_per_s']:.0f} GB/s, {peaks}"
    checked = [line for line in lines(folder, "numbers") if "problem" in line]
    wrong = [line for line in checked if line["problem"]]
    yield f"\n## Numbers: {len(checked)} trials, {len(wrong)} wrong\n"
    for kernel in dict.fromkeys(line["kernel"] for line in checked):
        mine = [line for line in checked if line["kernel"] == kernel]
        yield f"- {kernel}: {len(mine)} trials, {sum(bool(m['problem']) for m in mine)} wrong"
    yield from (f"- WRONG {w['kernel']}, {w['sample']}, {w['config']}: {w['problem']}" for w in wrong)
    yield "\n## Targets\n\n| kernel | shape | asked | predicted | measured | verdict |\n|---|---|---|---:|---:|---|"
    for target, guess in zip(TARGETS, _predicted(folder), strict=True):
        yield _row(target, guess, [t for t in timed if (t["kernel"], t["sample"]) == (target.kernel, str(sample_of(target).name))])
    yield "\n## All\n\n| kernel | shape | µs | GB/s | TOPS | copy | peak | config | peers: times as long |\n|---|---|---:|---:|---:|---:|---:|---|---|"
    for t in timed:
        r = t["result"]
        if r["times"] is None:
            yield f"| {t['kernel']} | {t['sample']} | {r['verdict'][:200]} | | | | | | |"
            continue
        peers = ", ".join(f"{p['name']} {p['ratio']:.2f}" if p["ratio"] else f"{p['name']}: {p['reason'][:60]}" for p in r["peers"])
        yield (f"| {t['kernel']} | {t['sample']} | {1e3 * r['times']['p50']:.1f} | {r['gb_per_s']:.0f} | {r['gop_per_s'] / 1e3:.0f} | {r['of_copy']:.0%} | "
               f"{r['of_peak']:.0%} | {t['config']} | {peers} |")  # fmt: skip
    ended = {(t["stage"], t["item"]) for t in lines(folder, "speed") if t["state"] != "begun"}
    for t in lines(folder, "speed"):
        if t["state"] == "failed" or t["state"] == "begun" and (t["stage"], t["item"]) not in ended:
            yield f"- {t['kernel']}, {t['sample']}: {t.get('problem', 'did not come back')}"


def _predicted(folder: Path) -> list[float]:
    """Seconds for every target, kept in the folder: they take longer than the rest of the report."""
    path = folder / "predicted.json"
    held = json.loads(path.read_text()) if path.exists() else []
    if len(held) != len(TARGETS):
        held = [predict(target).seconds for target in TARGETS]
        path.write_text(json.dumps(held) + "\n")
    return held


def _row(target: Target, guess: float, mine: list[dict[str, Any]]) -> str:
    begin = f"| {target.kernel} | {name_of(target)} | {asked(target)} | {1e6 * guess:.0f} µs |"
    good = [t["result"] for t in mine if t["result"]["times"]]
    if not good:
        return f"{begin} | {mine[0]['result']['verdict'][:120] if mine else 'not reached'} |"
    r = good[0]
    reached = {"peak": r["gop_per_s"] / 1979e3, "copy": r["of_copy"], "tops": r["gop_per_s"] / 1e3}.get(target.of, 0.0)
    ratios = {p["name"]: p["ratio"] for g in good for p in g["peers"] if p["name"] in target.ahead and p["ratio"]}
    verdicts = [] if not target.of else ["reached" if reached >= target.least else f"{reached:.0f} TOPS" if target.of == "tops" else f"{reached:.0%}"]
    verdicts += [f"{'ahead of' if ratio >= 1 else 'BEHIND'} {name} ({ratio:.2f})" for name, ratio in ratios.items()]
    return f"{begin} {1e3 * r['times']['p50']:.0f} µs, {r['gop_per_s'] / 1e3:.0f} TOPS, {r['of_copy']:.0%} of a copy | {', '.join(verdicts)} |"


def main(argv: list[str]) -> int:
    """See the module's docstring."""
    what, folder, rest = argv[0], Path(argv[1]), argv[2:]
    if what == "facts":
        facts(folder)
    elif what == "numbers":
        numbers(folder, rest[0])
    elif what == "speed":
        speed(folder, int(rest[0]), rest[1])
    else:
        report(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
