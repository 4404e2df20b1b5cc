"""Timing: interleaved rounds, minima and medians, weights rotated past the last-level cache."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call over ``rounds`` rounds."""

    minimum: float
    median: float
    p95: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        ms = sorted(1e3 * s for s in seconds)
        return cls(ms[0], statistics.median(ms), ms[min(len(ms) - 1, int(0.95 * len(ms)))], len(ms))

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def interleaved(calls: Sequence[Callable[[], Any]], *, rounds: int = 10, budget_s: float | None = None,
                settled: int | None = None, warmup: int = 1, wait: Callable[[], None] | None = None) -> list[Timing]:  # fmt: skip
    """Time the calls in turn, A B C A B C …, so that a drifting machine favours none.

    Args:
        rounds: how many turns at the most; at least 3 are always made.
        budget_s: stop starting new rounds past this many seconds.
        settled: stop after so many rounds where the slowest call of one is faster than the fastest of every other.
        wait: returns once what the calls launched is done; part of each call's time. By default the current GPU's, where one is in use.
    """
    wait = wait or (torch.cuda.synchronize if torch.cuda.is_initialized() else None)
    seconds: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(warmup):
            for call in calls:
                call()
        if wait is not None:
            wait()
        for k in range(rounds):
            if k >= 3 and budget_s is not None and time.perf_counter() - start > budget_s:
                break
            if settled is not None and len(calls) > 1 and k >= settled and min(map(max, seconds)) < sorted(map(min, seconds))[1]:
                break
            for call, times in zip(calls, seconds, strict=True):
                begin = time.perf_counter()
                call()
                if wait is not None:
                    wait()
                times.append(time.perf_counter() - begin)
    return [Timing.of(s) for s in seconds]


@functools.cache
def last_level_cache_bytes() -> int:
    """Size of the largest CPU cache, 32 MiB where the system does not say."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes) or 32 * 2**20


class CacheFlusher:
    """Reads a buffer larger than the last-level cache, so that the next call finds its weights in memory."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(last_level_cache_bytes() // 4)

    def __call__(self) -> None:
        self.buffer.sum()


@functools.cache
def machine() -> dict[str, Any]:
    """What a timing depends on: processor, instruction sets, cores, versions. Threads are keyed separately."""
    info: dict[str, Any] = {"cpu": "unknown", "isa": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text().split("\n\n")[0]
        facts = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        facts = {k.strip(): v.strip() for k, v in facts.items()}
        info["cpu"] = f"{facts.get('model name', 'unknown')} ({facts.get('cpu family')}/{facts.get('model')}/{facts.get('stepping')})"
        flags = set(facts.get("flags", "").split())
        wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "amx_fp16", "avx_vnni")
        info["flags"] = [f for f in wanted if f in flags]
    info["torch"] = torch.__version__
    return info


def has_fast_bf16() -> bool:
    """The processor multiplies bfloat16 in hardware."""
    return any(f in machine().get("flags", ()) for f in ("avx512_bf16", "amx_bf16"))


def has_fast_fp16() -> bool:
    """The processor multiplies float16 in hardware."""
    return any(f in machine().get("flags", ()) for f in ("avx512_fp16", "amx_fp16"))
