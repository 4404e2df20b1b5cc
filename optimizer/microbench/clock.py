"""Timing calls on the CPU or on a GPU, beside each other, and what the machine can do at best."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphwright import measure

Call = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Milliseconds of a call: least, and percentiles over the rounds."""

    least: float
    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        ms = sorted(1e3 * s for s in seconds)
        cuts = statistics.quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else ms * 4
        return cls(ms[0], cuts[0], statistics.median(ms), cuts[3])


def timed(calls: Sequence[Call], device: str = "cpu", *, rounds: int = 30, budget_s: float = 1.0, cold: bool = True) -> list[Times]:
    """Time the calls in turns, A B C A B C …

    Args:
        rounds: at most; at least 3, and no new one after ``budget_s`` seconds per call.
        cold: caches are emptied before each call.
    """
    flush = _flusher(device) if cold else None
    once = _once_cuda if device == "cuda" else _once
    seconds: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        for call in calls:
            call()
        begin = time.perf_counter()
        for turn in range(rounds):
            if turn >= 3 and time.perf_counter() - begin > budget_s * len(calls):
                break
            for call, found in zip(calls, seconds, strict=True):
                found.append(once(call, flush))
    return [Times.of(s) for s in seconds]


def _once(call: Call, flush: Call | None) -> float:
    if flush is not None:
        flush()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _once_cuda(call: Call, flush: Call | None) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if flush is not None:
        flush()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def recorded(call: Call) -> Call:
    """A call as a replayed CUDA graph; the call itself where it can't be recorded (it waits for the device, say)."""
    graph = _graph(call, 1)
    return call if graph is None else graph.replay


def replayed(call: Call, *, repeats: int = 20, rounds: int = 10) -> Times | None:
    """A call's time among many in one replayed CUDA graph: without the host's part of a launch. Caches are warm. None where it can't be recorded."""
    graph = _graph(call, repeats)
    if graph is None:
        return None
    graph.replay()
    return Times.of([_once_cuda(graph.replay, None) / repeats for _ in range(rounds)])


def _graph(call: Call, repeats: int) -> Any:
    """``call`` as often as asked in one graph; None where it can't be recorded."""
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                for _ in range(repeats):
                    call()
        except RuntimeError:
            torch.cuda.set_stream(here)  # a recording that fails leaves its own behind
            torch.cuda.synchronize()
            return None
    return graph


@functools.cache
def _flusher(device: str) -> Call:
    if device == "cuda":
        held = torch.zeros(64 * 2**20, device="cuda")
        return lambda: held.sum()  # read, not written: what is written would have to leave the cache within the time that is taken
    flusher = measure.CacheFlusher()
    return lambda: flusher()


@functools.cache
def copy_bandwidth(device: str = "cpu") -> float:
    """GB/s read plus written by a copy far larger than the caches; measured once per process and device."""
    size = max(64 * 2**20, 2 * measure.last_level_cache_bytes()) if device == "cpu" else 2**30
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    best = timed([lambda: target.copy_(source)], device, rounds=12, cold=False)[0].least
    return 2 * source.numel() * 4 / best / 1e6


@functools.cache
def peak(unit: str, device: str = "cpu") -> float:
    """10^9 operations per second of a large matrix product in ``unit`` (``"int8"``, ``"f32"``, ``"fp16"``, ``"fp8"``), measured once per process."""
    size = 2048 if device == "cpu" else 8192
    return 2 * size**3 / min(t.least for t in timed(_products(unit, device, size), device, rounds=5, budget_s=3.0, cold=False)) / 1e6


def _products(unit: str, device: str, size: int) -> list[Call]:
    if unit == "fp8":
        u, v = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=device)
        return [lambda: torch._scaled_mm(u, v.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)]
    if unit != "int8":
        a, b = (torch.randn(size, size, device=device, dtype=torch.float32 if unit == "f32" else torch.float16) for _ in range(2))
        return [lambda: a @ b]
    p, q = (torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2))
    calls: list[Call] = [lambda: torch._int_mm(p, q.t())]
    if device == "cpu" and hasattr(torch.ops.onednn, "qlinear_prepack"):
        packed = torch.ops.onednn.qlinear_prepack(q, [size, size])
        ones, zeros, bytes_ = torch.ones(size), torch.zeros(size, dtype=torch.int32), p.to(torch.uint8)
        calls.append(lambda: torch.ops.onednn.qlinear_pointwise(bytes_, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""))
    return calls


__all__ = ["Times", "copy_bandwidth", "peak", "recorded", "replayed", "timed"]
