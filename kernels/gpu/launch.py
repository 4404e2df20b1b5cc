"""How a Triton kernel is described, planned and launched.

A *family* is one op's kernel with all the ways to cut it into tiles (``Config``). Its ``plan`` takes the op's arguments and a
config and gives what is to be done: result tensors and one or more ``Launch``. The same plan serves all purposes: with CUDA
tensors it runs; with CPU tensors it runs in the interpreter; with tensors on the ``meta`` device it compiles ahead of time.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.kernels.gpu import interpreting

if interpreting():
    from graphwright.kernels.gpu import interpret

    interpret.mend()


@dataclass(frozen=True)
class Config:
    """One way to cut a problem into tiles.

    Attributes:
        tiles: values of the kernel's constexpr parameters, by name.
        warps: per program.
        stages: of the software pipeline.
    """

    tiles: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 2

    @classmethod
    def of(cls, warps: int = 4, stages: int = 2, **tiles: int) -> Config:
        """``Config.of(BM=128, BN=128, BK=64, warps=8, stages=3)``."""
        return cls(tuple(tiles.items()), warps, stages)

    def __getitem__(self, name: str) -> int:
        return dict(self.tiles)[name]

    def __str__(self) -> str:
        return " ".join([*(f"{k}={v}" for k, v in self.tiles), f"warps={self.warps}", f"stages={self.stages}"])


@dataclass(frozen=True)
class Launch:
    """One launch of a ``@triton.jit`` function.

    Attributes:
        fn: the function. Where it has a parameter ``PTX``, that is True where NVIDIA's inline assembly may be used.
        grid: programs along up to three axes.
        args: tensors, numbers and None in the order of the function's parameters that are not constexpr.
        constants: values of its constexpr parameters that are not tiles of ``config``.
        scratch: it makes tensor descriptors, for which Triton wants memory on the device.
    """

    fn: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    config: Config
    scratch: bool = False

    def constexprs(self, ptx: bool) -> dict[str, Any]:
        """All constexpr parameters of the function by name; tiles that it does not have are left out."""
        names = set(self.fn.arg_names)
        known = {**dict(self.config.tiles), **self.constants, "PTX": ptx}
        return {k: v for k, v in known.items() if k in names}

    def go(self) -> None:
        """Launch on the current stream of the tensors' device, or run in the interpreter. An empty grid does nothing."""
        if min(self.grid) <= 0:
            return
        if self.scratch and not interpreting():
            contextvars.copy_context().run(self._go_with_scratch)  # what allocates is set for this launch alone
        else:
            self._go()

    def _go(self) -> None:
        options = {} if interpreting() else {"num_warps": self.config.warps, "num_stages": self.config.stages}
        self.fn[self.grid](*self.args, **self.constexprs(_nvidia()), **options)

    def _go_with_scratch(self) -> None:
        device = next(tensors_of(self.args)).device
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        self._go()


@functools.cache
def _nvidia() -> bool:
    return not interpreting() and torch.cuda.is_available() and torch.version.hip is None


@dataclass(frozen=True)
class Plan:
    """What a call does: the launches in order, and what it gives."""

    result: Any
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class Estimate:
    """What a config is expected to cost; the tuner ranks by it (see ``tuning.predict``).

    Attributes:
        ops: multiply-adds times two, padding of ragged tiles included.
        unit: what does them: ``"int8"``, ``"fp16"`` (fp16 and bf16), ``"fp8"``, ``"f32"`` (no matrix unit).
        dram: bytes that come from or go to device memory at the least.
        l2: bytes that the programs read or write in all, each program's own tiles counted every time.
        programs: how many there are.
        shared: bytes of shared memory that a program takes, about.
        steps: turns of a program's main loop, one after the other.
    """

    ops: int
    unit: str
    dram: int
    l2: int
    programs: int
    shared: int = 0
    steps: int = 1


@dataclass(frozen=True)
class Family:
    """One op's Triton kernel with all of its configs.

    Attributes:
        op: row of the op table that it computes; the row's body is the oracle.
        plan: ``(*arguments of the op, config) -> Plan``. Allocates results (and fixed workspaces) on the arguments' device, never
            looks at a tensor's contents and never waits for the device.
        configs: every config that may be tried.
        supports: takes the op's arguments; None, or the reason why not. Devices are checked by ``unfit_device``, not here.
        fits: ``(config, *arguments) -> None or why not``: configs that make no sense for these shapes.
        estimate: ``(config, *arguments) -> Estimate``.
        bucket: takes the op's arguments; what a tuned choice depends on (sizes in buckets, dtypes, options that change the code).
        cost: takes the op's arguments; least bytes and operations.
        samples: for the correctness test (``bench=False``: small and odd) and the microbenchmark (``bench=True``).
        ahead: names and arguments on the ``meta`` device with which every config is compiled ahead of time.
        matrix: ``(config, *arguments, target) -> str``: a part of the name of the matrix instruction that machine code for the target
            (``"sm_80"``, ``"sm_90"``, ``"gfx942"``) must contain; empty: none is claimed.
        targets: what it compiles for.
        tolerance, precision, name: as for ``Kernel``.
    """

    op: str
    plan: Callable[..., Plan]
    configs: tuple[Config, ...]
    supports: Callable[..., str | None]
    estimate: Callable[..., Estimate]
    bucket: Callable[..., tuple[Any, ...]]
    cost: Callable[..., Cost]
    samples: Callable[[], Iterator[Sample]]
    ahead: Callable[[], Iterator[tuple[str, tuple[Any, ...]]]]
    fits: Callable[..., str | None] = lambda config, *args: None
    matrix: Callable[..., str] = lambda config, *args: ""
    targets: tuple[str, ...] = ("sm_80", "sm_90", "gfx942")
    tolerance: tuple[float, int] = (0.0, 1)
    precision: str = "int8"
    name: str = field(default="")

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.op.partition(".")[2])

    def run(self, *args: Any) -> Any:
        """The op's result, computed under the config that the tuner knows to be best."""
        from graphwright.kernels.gpu import tuning

        return self.under(tuning.choose(self, args), *args)

    def under(self, config: Config, *args: Any) -> Any:
        """The op's result, computed under this config."""
        plan = self.plan(*args, config=config)
        for launch in plan.launches:
            launch.go()
        return plan.result

    def refuses(self, *args: Any) -> str | None:
        """None, or why it can't serve these arguments where they lie."""
        reason = unfit_device(args) or self.supports(*args)
        if reason is None and all(self.fits(c, *args) for c in self.configs):
            reason = self.fits(self.configs[0], *args)
        return reason

    def kernel(self) -> Kernel:
        """The record by which tests, microbenchmark and lowering know it."""
        return Kernel(self.op, "cuda", "triton", self.run, self.refuses, self.cost, self.samples, self.tolerance, self.precision,
                      "" if self.name == self.op.partition(".")[2] else self.name)  # fmt: skip


def tensors_of(args: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, those in lists included."""
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)


def unfit_device(args: Sequence[Any]) -> str | None:
    """None, or that a tensor lies where the kernels can't reach it."""
    kinds = {t.device.type for t in tensors_of(args)}
    allowed = {"cpu", "meta"} if interpreting() else {"cuda", "meta"}
    wrong = sorted(kinds - allowed)
    return f"a tensor lies on {', '.join(wrong)}; wanted {' or '.join(sorted(allowed - {'meta'}))}" if wrong else None


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is not smaller."""
    return triton.next_power_of_2(n)


def bucket(n: int) -> int:
    """A size that varies from call to call, in buckets: the next power of two; all past 8192 together."""
    return min(power_of_two(max(n, 1)), 16384)


__all__ = ["Config", "Estimate", "Family", "Launch", "Plan", "bucket", "cdiv", "power_of_two", "tensors_of", "unfit_device"]
