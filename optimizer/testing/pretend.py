"""A GPU that is none: what ``accelerator.Cuda`` offers, done on the CPU, and a log of what was asked in which order.

    pretend = Pretend()
    runner.replay = Replay(runner.launched, program, pretend)
    pretend.log         # ["wait", "record", "replay", ...]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from graphwright.accelerator import Cuda


class Pretend(Cuda):
    """Tensors lie on the CPU; a graph is a function that is called again and whose results go where the first ones lay.

    Args:
        refuses: what recording fails with.
        spoils: a replay gives numbers that are off by this much.
        wall: events tell the time of the wall instead of ``now``.

    Attributes:
        log: what was asked, in order.
        now: milliseconds on the clock of events; calls that take time add to it.
    """

    def __init__(self, refuses: Exception | None = None, spoils: float = 0.0, wall: bool = False):
        super().__init__(torch.device("cpu"))
        self.refuses, self.spoils, self.wall = refuses, spoils, wall
        self.log: list[str] = []
        self.now, self.bytes = 0.0, 0
        self.busy = False
        self.facts, self.cache_bytes = {"gpu": "pretend", "driver": "0"}, 1024

    def held(self) -> int:
        return self.bytes

    def peak(self, run: Callable[[], Any]) -> tuple[int, int]:
        self.log.append("peak")
        run()
        return 2**20, 3

    def wait(self) -> None:
        self.log.append("wait")

    def event(self, *, timing: bool = True) -> Any:
        return _Event(self)

    def flush(self) -> None:
        self.log.append("flush")

    def recording(self) -> bool:
        return self.busy

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.log.append("aside")
        yield
        self.log.append("back")

    def pool(self) -> Any:
        return "pool"

    def record(self, run: Callable[[], Any], pool: Any = None) -> tuple[Any, Any]:
        self.log.append("record")
        if self.refuses is not None:
            raise self.refuses
        result = run()
        self.bytes += 2**20
        for out in result if isinstance(result, tuple) else ():
            if isinstance(out, Tensor) and out.is_floating_point() and out.is_leaf:
                out.fill_(float("nan"))  # recording computes nothing
        return (run, result), result

    def replay(self, graph: Any) -> None:
        self.log.append("replay")
        run, result = graph
        again = run()
        for old, new in zip(result, again, strict=True) if isinstance(result, tuple) else ():
            if isinstance(old, Tensor) and old is not new:
                old.copy_(new + self.spoils if new.is_floating_point() else new)

    def order(self, event: Any) -> None:
        self.log.append("order")


class _Event:
    def __init__(self, cuda: Pretend):
        self._cuda, self.at = cuda, 0.0

    def record(self) -> None:
        self._cuda.log.append("mark")
        self.at = 1e3 * time.perf_counter() if self._cuda.wall else self._cuda.now

    def synchronize(self) -> None:
        self._cuda.log.append("reached")

    def elapsed_time(self, other: _Event) -> float:
        return other.at - self.at
