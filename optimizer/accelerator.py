"""What Graphwright asks of a GPU beside computing: clocks, streams, recorded launches, memory. One object per device.

    cuda = accelerator.of(tensor.device)        # None for the CPU
    with cuda.aside(): ...                      # on a stream of its own, both ways in order
    graph, out = cuda.record(run)               # the launches of ``run`` as one, ``cuda.replay(graph)`` runs them

Everything that touches ``torch.cuda`` for those purposes goes through ``Cuda``: tests put an object of their own in its place.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright.ir import Program

#: Where the driver does not tell the size of the L2 cache: the largest that is sold.
_L2 = 128 * 2**20


class Cuda:
    """One CUDA (or ROCm) device.

    Args:
        device: with its index.

    Attributes:
        working: held by whoever warms up and records: all do so on one stream, for which cuBLAS then has its workspace.
    """

    def __init__(self, device: torch.device):
        self.device, self.working = device, threading.RLock()
        self._flushed: Tensor | None = None

    # -- what it is --------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What a timing on it depends on: name, capability, driver, versions of CUDA and Triton."""
        found = torch.cuda.get_device_properties(self.device)
        return {"gpu": found.name, "capability": f"{found.major}.{found.minor}", "processors": found.multi_processor_count,
                "memory_gb": round(found.total_memory / 2**30), "driver": _driver(), "cuda": torch.version.cuda or torch.version.hip,
                "triton": _triton(), "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]}  # fmt: skip

    @functools.cached_property
    def cache_bytes(self) -> int:
        """Size of the L2 cache."""
        return int(getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0)) or _L2

    def held(self) -> int:
        """Bytes that PyTorch's allocator has taken from the device."""
        return torch.cuda.memory_reserved(self.device)

    def peak(self, run: Callable[[], Any]) -> tuple[int, int]:
        """Bytes that ``run`` holds at the most beyond what was held before, and how many blocks it asks for."""
        self.wait()
        blocks = torch.cuda.memory_stats(self.device).get("allocation.all.allocated", 0)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.wait()
        after = torch.cuda.memory_stats(self.device).get("allocation.all.allocated", 0)
        return max(0, torch.cuda.max_memory_allocated(self.device) - before), int(after - blocks)

    # -- time --------------------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Until all that was launched is done."""
        torch.cuda.synchronize(self.device)

    def event(self, *, timing: bool = True) -> Any:
        """A mark in the current stream: ``record()``, ``synchronize()``, ``a.elapsed_time(b)`` in ms."""
        return torch.cuda.Event(enable_timing=timing)

    def flush(self) -> None:
        """Overwrite the L2 cache."""
        if self._flushed is None:
            self._flushed = torch.empty(2 * self.cache_bytes, dtype=torch.uint8, device=self.device)
        self._flushed.zero_()

    # -- streams and graphs ------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _side(self) -> Any:
        return torch.cuda.Stream(self.device)

    def recording(self) -> bool:
        """Whether the current stream is being recorded, by whomever."""
        return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Launch on the stream that is recorded, after what the current one has been given; the current one then waits for it."""
        here, side = torch.cuda.current_stream(self.device), self._side
        side.wait_stream(here)
        with torch.cuda.stream(side):
            yield
        here.wait_stream(side)

    def pool(self) -> Any:
        """Memory that several graphs may share, as long as they never run at the same time."""
        return torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Any], pool: Any = None) -> tuple[Any, Any]:
        """The launches of ``run`` as a graph, and what ``run`` gave: tensors that each replay fills.

        Raises:
            RuntimeError: it waits for the device, or does something else that can't be recorded.
        """
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # other threads (a loader that pins memory) may go on using the device
            with torch.cuda.graph(graph, pool=pool, stream=self._side, capture_error_mode="thread_local"):
                result = run()
        finally:
            torch.cuda.set_stream(here)  # a recording that fails leaves its own behind
        return graph, result

    def replay(self, graph: Any) -> None:
        """Launch what was recorded, on the current stream."""
        graph.replay()

    def order(self, event: Any) -> None:
        """Let the current stream wait for a mark of another."""
        torch.cuda.current_stream(self.device).wait_event(event)


@functools.cache
def _cuda(index: int) -> Cuda:
    return Cuda(torch.device("cuda", index))


def of(device: torch.device | None) -> Cuda | None:
    """The device's object; None where it is no GPU."""
    if device is None or device.type != "cuda":
        return None
    return _cuda(torch.cuda.current_device() if device.index is None else device.index)


def device_of(program: Program) -> torch.device:
    """Where a program runs: on the GPU that any of its inputs or tensors lies on, else on the CPU."""
    values = [*(n.meta.get("val") for n in program.placeholders), *program.tensors().values()]
    return next((v.device for v in values if isinstance(v, Tensor) and v.device.type not in ("cpu", "meta")), torch.device("cpu"))


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches inside go to this device: Triton's go to the current one, wherever the tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def random_devices() -> list[int]:
    """GPUs whose random state is worth keeping: for ``torch.random.fork_rng(devices=...)``."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


class Clock:
    """Times calls on a device: by the wall on the CPU, by events between an emptied cache and the call's last launch on a GPU.

    Args:
        cold: the last-level cache is overwritten before each call. On a GPU it always is: weights of other ops would be there.
    """

    def __init__(self, cuda: Cuda | None, flush: Callable[[], None] | None = None):
        self.cuda, self._flush = cuda, flush

    def once(self, call: Callable[..., Any], inputs: Iterable[Any] = ()) -> float:
        """Seconds of one call."""
        if self.cuda is None:
            if self._flush is not None:
                self._flush()
            begin = time.perf_counter()
            call(*inputs)
            return time.perf_counter() - begin
        first, last = self.cuda.event(), self.cuda.event()
        self.cuda.flush()
        first.record()
        call(*inputs)
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def ready(self, call: Callable[..., Any], inputs: Iterable[Any]) -> Callable[..., Any]:
        """``call`` warmed up on these inputs; on a GPU as a recorded graph, so that launching it costs next to nothing, as in a model
        that is replayed whole. What can't be recorded is timed with its launches."""
        inputs = tuple(inputs)
        call(*inputs)
        if self.cuda is None:
            return call
        cuda = self.cuda
        try:
            with cuda.working:
                with cuda.aside():
                    call(*inputs)
                cuda.wait()
                graph, result = cuda.record(lambda: call(*inputs))
        except RuntimeError:
            cuda.wait()
            return call

        def replay(*_: Any, held: Any = result) -> None:  # results stay alive as long as the graph
            cuda.replay(graph)

        return replay


def _driver() -> str:
    """The driver's version; empty where it does not tell."""
    with suppress(OSError):
        found = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found[0]
    try:
        return str(torch._C._cuda_getDriverVersion())
    except (AttributeError, RuntimeError):
        return ""


def _triton() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


__all__ = ["Clock", "Cuda", "device_of", "of", "on", "random_devices"]
