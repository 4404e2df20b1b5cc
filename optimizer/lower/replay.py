"""A runner's launches recorded as CUDA graphs, one per shape of its inputs, and replayed: one launch instead of hundreds.

A graph reads and writes fixed memory. Inputs are copied into buffers of its own before it runs, and results out of them after it,
so that a later call overwrites nothing that the caller holds. An input that the program writes (a cache) is written where it lies:
a graph then is for that memory, and holds it. What can't be recorded is launched step by step, and the reason kept.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphwright import ops
from graphwright.accelerator import Cuda
from graphwright.backends.base import is_static
from graphwright.ir import Program
from graphwright.numerics import sqnr_db
from graphwright.ops import RANDOM

#: shapes that are recorded at the most, and shapes that have come once and are remembered
_MOST, _SEEN = 8, 64
#: what a replay must agree with the launches that it was recorded from, in dB: the same kernels on the same numbers
_AGREE_DB = 80.0

Launch = Callable[[Sequence[Tensor]], tuple[Any, ...]]


@dataclass(eq=False)
class _Record:
    """One graph.

    Attributes:
        inputs: the memory that it reads; those that the program writes are the caller's own.
        outputs: what it fills, and values that are no tensors.
        same: outputs that are inputs handed back, by position: which.
    """

    graph: Any
    inputs: list[Tensor]
    outputs: tuple[Any, ...]
    same: dict[int, int]


class Replay:
    """Runs ``launch`` on flat inputs by graphs.

    Args:
        launch: the runner, step by step.
        program: what it computes: which inputs and buffers it writes, and whether anything in it can't be recorded.
        cuda: the device.

    Attributes:
        reason: why there are no graphs (any more); None where there are.
        held: bytes of device memory that the graphs keep for their values.
    """

    def __init__(self, launch: Launch, program: Program, cuda: Cuda):
        self._launch, self._program, self._cuda, self.device = launch, program, cuda, cuda.device
        self.reason = unfit(program, cuda.device)
        self.held = 0
        self._written = [m.input for m in program.signature.mutations if m.buffer is None and m.input is not None]
        self._random = any(RANDOM in row.traits for n in program.nodes if (row := ops.row(n.target)) is not None)
        # where sizes are open, or memory is the caller's, a call is worth recording once it has come back: a growing cache never does
        self._at_once = not self._written and all(is_static(n.meta["val"]) for n in program.placeholders)
        self._records: dict[Any, _Record] = {}
        self._seen: dict[Any, None] = {}
        self._pool: Any = None
        self._last: Any = None
        self._lock = threading.RLock()

    def __call__(self, leaves: Sequence[Tensor]) -> tuple[Any, ...]:
        if self.reason is not None or self._cuda.recording():
            return self._launch(leaves)
        with self._lock:  # one set of buffers for all threads
            record = self._record_for(leaves)
            return self._launch(leaves) if record is None else self._run(record, leaves)

    @property
    def shapes(self) -> int:
        """How many are recorded."""
        return len(self._records)

    def told(self) -> str:
        """One line for a report."""
        if self.reason is not None:
            return f"no CUDA graph: {self.reason}; kernels are launched one by one"
        if not self.shapes:
            what = "a shape of the inputs" if not self._written else "memory that it writes"
            return f"CUDA graphs: {what} is recorded when it comes " + ("first" if self._at_once else "again")
        plural = f"{self.shapes} shape{'s' if self.shapes > 1 else ''} of the inputs"
        return f"CUDA graphs: launches are recorded for {plural} and replayed; {self.held / 2**20:.1f} MB of device memory are held for their values"

    # -- inside ------------------------------------------------------------------------------------------------------------

    def _record_for(self, leaves: Sequence[Tensor]) -> _Record | None:
        key = tuple((x.shape, x.stride(), x.dtype, x.data_ptr() if k in self._written else 0) for k, x in enumerate(leaves))
        found = self._records.get(key)
        if found is not None or len(self._records) >= _MOST:
            return found
        if any(leaves[k].is_inference() for k in self._written):
            return None
        if not self._at_once and key not in self._seen:
            if len(self._seen) >= _SEEN:
                self._seen.pop(next(iter(self._seen)))
            self._seen[key] = None
            return None
        try:
            # inference tensors could not be written by calls outside of inference mode
            with torch.inference_mode(False), torch.no_grad(), self._cuda.working:
                self._records[key] = self._made(leaves)
        except Exception as error:  # what can't be recorded fails in as many ways as there are kernels  # noqa: BLE001
            said = (str(error).strip().splitlines() or [""])[0][:200]
            self.reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
        return self._records.get(key)

    def _made(self, leaves: Sequence[Tensor]) -> _Record:
        """Warmed up, recorded, and checked against the launches on the same inputs; buffers and inputs are as before."""
        cuda, before = self._cuda, self._cuda.held()
        inputs = [x.detach() if k in self._written else torch.empty_like(x) for k, x in enumerate(leaves)]
        written = [self._program.tensor(m.buffer) for m in self._program.signature.mutations if m.buffer is not None]
        written += [inputs[k] for k in self._written]
        kept = [(t, t.clone()) for t in written]

        def afresh() -> None:
            self._copy_in(inputs, leaves)
            for tensor, value in kept:
                tensor.copy_(value)

        try:
            with cuda.aside():  # first runs choose kernels and take workspaces, which must not be recorded
                for _ in range(2):
                    afresh()
                    wanted = [t.clone() if isinstance(t, Tensor) else t for t in self._launch(inputs)]
                wanted += [t.clone() for t in written]
                afresh()
            cuda.wait()
            self._pool = self._pool or cuda.pool()
            graph, outputs = cuda.record(lambda: self._launch(inputs), self._pool)
            afresh()
            cuda.replay(graph)
            cuda.wait()
            if not self._random:
                _compare(wanted, [*outputs, *written])
        finally:
            afresh()
        self.held += max(0, cuda.held() - before)
        same = {i: k for i, o in enumerate(outputs) for k, x in enumerate(inputs) if o is x}
        return _Record(graph, inputs, outputs, same)

    def _copy_in(self, inputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
        for k, (mine, x) in enumerate(zip(inputs, leaves, strict=True)):
            if k not in self._written:
                mine.copy_(x)

    def _run(self, record: _Record, leaves: Sequence[Tensor]) -> tuple[Any, ...]:
        cuda = self._cuda
        with torch.no_grad():
            if self._last is not None:
                cuda.order(self._last)  # the call before may have been on another stream
            self._copy_in(record.inputs, leaves)
            cuda.replay(record.graph)
            outs = tuple(leaves[record.same[i]] if i in record.same else o.clone() if isinstance(o, Tensor) else o for i, o in enumerate(record.outputs))
            self._last = self._last or cuda.event(timing=False)
            self._last.record()
        return outs


def unfit(program: Program, device: torch.device) -> str | None:
    """None, or why a program can't be recorded: something happens on the host, or may."""
    for node in program.placeholders:
        val = node.meta["val"]
        if not isinstance(val, Tensor) or val.device.type != device.type:
            return f"input {node.name} is {'no tensor' if not isinstance(val, Tensor) else f'on {val.device}'}"
    for node in program.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and ops.row(node.target) is None and node.target.namespace not in ("aten", "prims"):
            return f"what {node.target} does beside computing is not known"
        values = node.meta.get("val")
        for val in values if isinstance(values, (tuple, list)) else [values]:
            if isinstance(val, Tensor) and val.device.type not in (device.type, "meta"):
                return f"{node.name} is computed on {val.device}"
            if _unknown(val):
                return f"what {node.name} gives depends on numbers that the host has to read"
    return None


def _unknown(val: Any) -> bool:
    """Whether a size, or a number, is only known once the device has computed it."""
    if is_static(val):
        return False
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(free_unbacked_symbols(val))


def _compare(wanted: Sequence[Any], found: Sequence[Any]) -> None:
    """Raises RuntimeError where a replay gives other numbers than the launches did."""
    for k, (w, f) in enumerate(zip(wanted, found, strict=True)):
        if not isinstance(w, Tensor):
            same = w == f
        elif w.is_floating_point():
            same = torch.equal(w.isnan(), f.isnan()) and _close(w.nan_to_num(), f.nan_to_num())
        else:
            same = torch.equal(w, f)
        if not same:
            raise RuntimeError(f"replayed, output {k} is not what the launches gave")


def _close(w: Tensor, f: Tensor) -> bool:
    reached = sqnr_db(w, f)
    return math.isinf(reached) and reached > 0 or reached >= _AGREE_DB or torch.allclose(w, f)
