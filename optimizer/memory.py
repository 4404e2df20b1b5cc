"""What tensors take while something runs, and memory that is given back to the system."""

from __future__ import annotations

import ctypes
import functools
import mmap
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from graphwright.accelerator import Cuda


@dataclass(frozen=True)
class Peak:
    """What one run took from PyTorch's allocator, of the CPU or of a GPU.

    Attributes:
        mb: the most that was held at a time, beyond what was held before (weights), in MiB; results count, and so does what
            kernels allocate for themselves through PyTorch. oneDNN's and MKL's own scratch memory does not.
        allocations: how often memory was asked for.
    """

    mb: float
    allocations: int


def peak(run: Callable[[], Any]) -> Peak | None:
    """The largest amount of tensor memory that ``run`` holds at a time, on this thread; None where that cannot be seen.

    The allocator itself reports each block: temporaries within an op are seen, and those of our own kernels. Run it once
    before: what a first call allocates for good is not a call's own.
    """
    try:
        from torch._C._profiler import _ExperimentalConfig
        from torch.autograd import ProfilerConfig, ProfilerState, _disable_profiler_legacy, _enable_profiler_legacy

        # the older of PyTorch's two profilers: it starts in no time, prints nothing, and sees one thread alone
        _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig()))
    except (ImportError, AttributeError, TypeError, RuntimeError):  # another profiler is running, or this torch has none such
        return None
    records: Any = ()
    try:
        with torch.no_grad():
            run()
    finally:
        records = _disable_profiler_legacy()
    held = most = count = 0
    for event in (e for thread in records for e in thread if e.kind() == "memory_alloc"):
        held += event.cpu_memory_usage()
        count += event.cpu_memory_usage() > 0
        most = max(most, held)
    return Peak(most / 2**20, count)


def peak_on(cuda: Cuda | None, run: Callable[[], Any]) -> Peak | None:
    """``peak`` where ``run`` computes on a GPU: its memory. None for ``cuda``: the CPU's."""
    if cuda is None:
        return peak(run)
    with torch.no_grad():
        most, count = cuda.peak(run)
    return Peak(most / 2**20, count)


def faults(run: Callable[[], Any]) -> int:
    """Pages that one call makes the system map, in this process; run it before, until nothing is allocated for good."""
    counts = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        run()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)


@functools.cache
def fault_us() -> float:
    """Microseconds that mapping one page takes here: numbers written to fresh memory, less the same written again."""
    took: list[float] = []
    for _ in range(3):
        block = mmap.mmap(-1, 8 << 20)
        values = torch.frombuffer(block, dtype=torch.float32)
        times = []
        for _ in range(2):
            start = time.perf_counter()
            values.fill_(1.0)
            times.append(time.perf_counter() - start)
        took.append(times[0] - times[1])
    return max(0.0, 1e6 * min(took) / ((8 << 20) / mmap.PAGESIZE))


def release() -> None:
    """Give memory that tensors no longer use back to the system, where the C library keeps it for later: glibc does."""
    trim = _trim()
    if trim is not None:
        trim(0)


#: As large as a block may be from whose end glibc learns: 32 MiB with its header.
_LEARNT = 31 << 20


@functools.cache
def keep_heap() -> None:
    """Let glibc keep up to 62 MiB of memory that a call's values have left, instead of mapping it anew in the next call.

    It hands the top of its heap back to the system once that is larger than twice the largest mapped block that was freed so far: so
    whether each call of a model maps thousands of pages, a microsecond for each, hangs on what the process did before. A block
    that is freed untouched settles it. Thresholds that the user has set stay as they are, and other C libraries don't mind.
    """
    torch.empty(_LEARNT, dtype=torch.uint8, device="cpu")


def process_peak_mb() -> float:
    """The most memory that this process has held resident so far, weights and libraries included, in MiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = (ctypes.c_size_t,), ctypes.c_int
    return found
