"""What a measurement is on disk: statistics, the check of outputs, the facts about machine and versions, the schema.

A file is one JSON object:

    schema      "graphwright-bench/1"
    date        UTC, ISO 8601, when the run began
    commit      {"hash", "dirty"} of the repository, or null outside one
    command     the command line
    machine     CPU model, flags that matter, cores, memory, governor (null where not told), load at the start
    versions    {"python", "torch", ...}: every library that a peer may use, null where not installed
    settings    rounds, calls, warmup, threads, calibration_batches, processes, warm_caches
    models      list of {"model", "description", "inputs", "parameters", "reference", "peers": [...]}

and each peer of a model

    peer, precision
    status            ok | skipped (can't run here) | failed (raised, died, too slow) | wrong (outputs out of tolerance)
    reason            null for ok, else one line
    sqnr_db, floor_db signal-to-noise ratio of the worst output against the reference, and the bound it must reach
    prepare_s         from `prepare` to the first answer
    memory_mb, peak_memory_mb
    latency           null unless ok, else {"median_ms", "min_ms", "p95_ms", "calls"}
    speedup           null unless ok and eager was timed, else {"median", "low", "high", "of_minima"}: how many times
                      as fast as eager; quartiles over rounds of eager's time divided by the peer's in that round
    rounds_ms         per round the median of its calls, in the order measured
    details           facts the peer tells about itself
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = "graphwright-bench/1"
FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
LIBRARIES = (
    "torch",
    "numpy",
    "transformers",
    "graphwright",
    "torchao",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "nncf",
    "llvmlite",
    "triton",
)
HIGHEST_DB = 300.0  # what identical outputs count as: JSON has no infinity


# -- statistics ------------------------------------------------------------------------------------------------


def latency(rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    """Median, minimum and 95th percentile over all calls of all rounds, in ms; ValueError without any call."""
    calls = [ms for turn in rounds for ms in turn]
    if not calls:
        raise ValueError("no timed call")
    return {
        "median_ms": round(statistics.median(calls), 4),
        "min_ms": round(min(calls), 4),
        "p95_ms": round(float(np.percentile(calls, 95)), 4),
        "calls": len(calls),
    }


def speedup(base: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> dict[str, float]:
    """How many times as fast `other` is as `base`, both measured in the same rounds.

    Each round gives one ratio of medians, so that whatever slows the machine for a while slows both sides of it.
    Returned: median and quartiles of these, and the ratio of the minima over everything.
    """
    ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(base, other, strict=True)]
    low, middle, high = (float(q) for q in np.percentile(ratios, [25, 50, 75]))
    minima = min(ms for turn in base for ms in turn) / min(ms for turn in other for ms in turn)
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3), "of_minima": round(minima, 3)}


def sqnr_db(reference: np.ndarray, value: np.ndarray) -> float:
    """10·log10 of signal power over error power; -300 for a non-finite value, at most 300 where there is no error."""
    signal, error = reference.astype(np.float64), value.astype(np.float64) - reference.astype(np.float64)
    if not np.isfinite(error).all():
        return -HIGHEST_DB
    noise, power = float(np.mean(error**2)), float(np.mean(signal**2))
    if noise == 0:
        return HIGHEST_DB
    return -HIGHEST_DB if power == 0 else float(np.clip(10 * math.log10(power / noise), -HIGHEST_DB, HIGHEST_DB))


def check(
    reference: list[list[np.ndarray]], outputs: list[list[np.ndarray]], floor_db: float
) -> tuple[float, str | None]:
    """The worst SQNR over all outputs of all check inputs, and one line that says what is wrong, or None.

    Number and shapes of the outputs must agree; integer outputs must be equal.
    """
    worst, reason = HIGHEST_DB, None
    for i, (expected, got) in enumerate(zip(reference, outputs, strict=True)):
        if len(expected) != len(got):
            return -HIGHEST_DB, f"{len(got)} outputs instead of {len(expected)} for check input {i}"
        for j, (want, have) in enumerate(zip(expected, got, strict=True)):
            place = f"output {j} for check input {i}"
            if want.shape != have.shape:
                return -HIGHEST_DB, f"{place} has shape {have.shape} instead of {want.shape}"
            if want.dtype.kind in "iub" and not np.array_equal(want, have):
                return -HIGHEST_DB, f"{place} differs; it is of an integer type and must be equal"
            value = sqnr_db(want, have)
            if value < worst:
                worst = value
                reason = f"{place}: SQNR {value:.1f} dB is below the bound of {floor_db:g} dB"
    return worst, reason if worst < floor_db else None


# -- machine, versions, commit -----------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What is known about this machine; null for what the system doesn't tell."""
    fields = _cpuinfo()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "cpu": fields.get("model name", platform.processor() or None),
        "architecture": platform.machine(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "physical_cores": physical_cores(),
        "logical_cores": os.cpu_count(),
        "memory_gb": round(memory, 1),
        "cache_kb": fields.get("cache size"),
        "system": f"{platform.system()} {platform.release()}",
        "governor": governor.read_text().strip() if governor.exists() else None,
        "load_at_start": [round(x, 2) for x in os.getloadavg()],
    }


def physical_cores() -> int:
    """Cores that this process may use, hyperthreads counted once."""
    usable = os.sched_getaffinity(0)
    cores = set()
    for cpu in usable:
        folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add((folder / "physical_package_id").read_text() + (folder / "core_id").read_text())
        except OSError:
            return len(usable)
    return max(len(cores), 1)


def versions() -> dict[str, str | None]:
    """Versions of Python and of every library that a peer may use; None where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit(folder: Path) -> dict[str, Any] | None:
    """Hash of the commit checked out in `folder` and whether tracked files differ from it; None without git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return {"hash": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def command(arguments: Sequence[str]) -> str:
    """The command line, without ``--out`` and ``--plot``: where files were put is no part of what was measured."""
    places = ("--out", "--plot")
    kept = [a for k, a in enumerate(arguments)
            if a not in places and not a.startswith(tuple(f"{p}=" for p in places)) and (not k or arguments[k - 1] not in places)]  # fmt: skip
    return shlex.join(["python", *kept])


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _cpuinfo() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


# -- files -----------------------------------------------------------------------------------------------------


def save(record: dict[str, Any], path: Path) -> None:
    """Check `record` against the schema and write it to `path`."""
    validate(record)
    write(record, path)


def write(record: dict[str, Any], path: Path) -> None:
    """Write `record` to `path` in one step; a file that is there survives whatever fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            json.dump(record, file, indent=1, allow_nan=False)
            file.write("\n")
        except BaseException:
            Path(file.name).unlink()
            raise
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def load(path: Path) -> dict[str, Any]:
    """The record in `path`; ValueError where it is none of ours."""
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    try:
        validate(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return record


_TOP = {
    "schema": str,
    "date": str,
    "commit": dict | None,
    "command": str,
    "machine": dict,
    "versions": dict,
    "settings": dict,
    "models": list,
}
_MODEL = {"model": str, "description": str, "inputs": dict, "parameters": int, "reference": str, "peers": list}
_PEER = {
    "peer": str,
    "precision": str,
    "status": str,
    "reason": str | None,
    "sqnr_db": float | None,
    "floor_db": float,
    "prepare_s": float | None,
    "memory_mb": float | None,
    "peak_memory_mb": float | None,
    "latency": dict | None,
    "speedup": dict | None,
    "rounds_ms": list,
    "details": dict,
}


def validate(record: Any) -> None:
    """ValueError, naming the place, unless `record` follows the schema and times nothing but right answers."""
    _fields(record, _TOP, "the file")
    _require(record["schema"] == SCHEMA, f"schema is {record['schema']!r}, expected {SCHEMA!r}")
    for model in record["models"]:
        _fields(model, _MODEL, "a model")
        for peer in model["peers"]:
            place = f"{model['model']}, {peer.get('peer', 'a peer')}" if isinstance(peer, dict) else "a peer"
            _fields(peer, _PEER, place)
            right = peer["status"] == "ok"
            _require(
                peer["status"] in ("ok", "skipped", "failed", "wrong"), f"{place}: unknown status {peer['status']!r}"
            )
            _require(
                right == (peer["latency"] is not None), f"{place}: a latency stands exactly where the status is ok"
            )
            _require(right == (peer["reason"] is None), f"{place}: a reason stands exactly where the status is not ok")


def _fields(value: Any, kinds: dict[str, Any], place: str) -> None:
    _require(isinstance(value, dict), f"{place}: expected an object")
    missing, extra = sorted(kinds.keys() - value.keys()), sorted(value.keys() - kinds.keys())
    _require(not missing and not extra, f"{place}: missing fields {missing}, unknown fields {extra}")
    for name, kind in kinds.items():
        _require(isinstance(value[name], kind), f"{place}: {name} is a {type(value[name]).__name__}")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
