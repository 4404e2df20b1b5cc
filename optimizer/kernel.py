"""The record of one kernel. The files in ``kernels/`` each make one; nothing here imports Triton or llvmlite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What one call moves and computes at the least.

    Attributes:
        bytes: read plus written, each tensor once.
        flops: arithmetic operations (a multiply-add counts two).
    """

    bytes: int
    flops: int


@dataclass(frozen=True)
class Sample:
    """One set of arguments for the correctness test and the microbenchmark.

    Attributes:
        name: shape in words, for test ids and tables: ``"1024x384"``.
        args: ``(torch.Generator) -> tuple of arguments``; the same generator state gives the same arguments.
        bench: also timed by the microbenchmark (odd shapes are for correctness alone).
    """

    name: str
    args: Callable[[Any], tuple[Any, ...]]
    bench: bool = True


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op.

    Attributes:
        op: row of the op table that it computes (``"graphwright.norm_quantize"``); the row's body is the oracle.
        device: ``"cpu"`` or ``"cuda"``.
        backend: ``"llvm"``, ``"onednn"``, ``"triton"``, ``"aten"``.
        run: the implementation; same parameters and results as the op.
        supports: takes the same arguments (real or fake tensors); None, or the reason why it can't serve them.
        cost: takes the same arguments; least bytes and operations of the call.
        samples: gives the samples.
        tolerance: ``(float, quantized)``: relative RMS error allowed against the float64 oracle beyond the fp64 rule,
            and by how many steps integer outputs may differ (a value on a rounding boundary may go either way).
        precision: ``"f32"`` (exact up to rounding), ``"bf16"``, ``"fp16"`` or ``"int8"``: which recipes may choose a registered kernel.
        name: tells a registered kernel from others of its backend for the same op; the op's own name by default.
        ready: takes the same arguments, packs what is constant among them (weights) and gives the call that is left: how a model
            runs it, and what the microbenchmark times. None: ``run`` packs nothing.
    """

    op: str
    device: str
    backend: str
    run: Callable[..., Any]
    supports: Callable[..., str | None]
    cost: Callable[..., Cost]
    samples: Callable[[], Iterator[Sample]]
    tolerance: tuple[float, int] = (0.0, 1)
    precision: str = "f32"
    name: str = ""
    ready: Callable[..., Callable[[], Any]] | None = None

    def prepared(self, *args: Any) -> Callable[[], Any]:
        """The call on these arguments, with all that can be done ahead done."""
        return self.ready(*args) if self.ready else lambda: self.run(*args)

    @property
    def label(self) -> str:
        """The candidate's name: stable, since saved files hold it."""
        return f"{self.backend}.{self.name or self.op.split('.')[1]}"
