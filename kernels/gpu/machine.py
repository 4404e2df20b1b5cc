"""What the ranking of configs knows of a GPU: rates and sizes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """Rates are what the hardware can reach at best, from the makers' data sheets.

    Attributes:
        name: as the driver gives it.
        target: whose machine code it runs, as ``ahead.TARGETS`` names it; empty for others.
        processors: multiprocessors, or compute units.
        shared: bytes of shared memory per processor.
        registers: 32-bit ones per processor.
        threads: that a processor holds at a time.
        dram: bytes per second of device memory.
        l2: bytes per second of the last-level cache.
        rates: operations per second by unit, as ``Estimate.unit`` names them.
    """

    name: str
    target: str
    processors: int
    shared: int
    registers: int
    threads: int
    dram: float
    l2: float
    rates: tuple[tuple[str, float], ...]

    def rate(self, unit: str) -> float:
        """Operations per second of a unit."""
        return dict(self.rates)[unit]


def _nvidia(name: str, target: str, processors: int, shared: int, dram: float, l2: float, half: float, fp8: bool, f32: float) -> Gpu:
    rates = (("int8", 2 * half), ("fp16", half), ("fp8", 2 * half if fp8 else half), ("f32", f32))
    return Gpu(name, target, processors, shared * 1024, 65536, 2048, dram, l2, rates)


#: By a word of the name; the first that occurs in it wins.
KNOWN = {
    "H200": _nvidia("H200", "sm_90", 132, 228, 4.8e12, 7e12, 989e12, True, 67e12),
    "H100 PCIe": _nvidia("H100 PCIe", "sm_90", 114, 228, 2.0e12, 5e12, 756e12, True, 51e12),
    "H100": _nvidia("H100", "sm_90", 132, 228, 3.35e12, 7e12, 989e12, True, 67e12),
    "A100": _nvidia("A100", "sm_80", 108, 164, 2.0e12, 5e12, 312e12, False, 19.5e12),
    "MI300X": Gpu("MI300X", "gfx942", 304, 64 * 1024, 131072, 2048, 5.3e12, 17e12,
                  (("int8", 2615e12), ("fp16", 1307e12), ("fp8", 2615e12), ("f32", 163e12))),
}  # fmt: skip


@functools.cache
def here() -> Gpu | None:
    """The current CUDA device; None where there is none. Unknown ones are scaled from the nearest known by their processors."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    for word, gpu in KNOWN.items():
        if word in found.name:
            return gpu
    arch = getattr(found, "gcnArchName", "").partition(":")[0]
    target = arch if arch == "gfx942" else {8: "sm_80", 9: "sm_90"}.get(found.major, "") if torch.version.hip is None else ""
    like = next(g for g in KNOWN.values() if g.target == (target or "sm_80"))
    share = found.multi_processor_count / like.processors
    rates = tuple((unit, rate * share) for unit, rate in like.rates)
    return Gpu(found.name, target, found.multi_processor_count, like.shared, like.registers, like.threads, like.dram * share, like.l2 * share, rates)
