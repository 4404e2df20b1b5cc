"""Backends: each module offers ``candidates(work, allowed)`` for the works it can do, on the devices that its ``DEVICES`` names.

``allowed`` is the set of precisions that the recipe permits (``"f32"`` always; ``"bf16"``, ``"fp16"``, ``"int8"``).
A module that is not importable, or whose kernels this machine cannot run, offers nothing and says why in ``reason()``.
"""

from __future__ import annotations

from collections.abc import Iterator

from graphwright.backends import aten, llvm, llvm_f32, llvm_groups, llvm_int8, onednn, registered, triton
from graphwright.backends.base import Candidate, Work
from graphwright.kernel_registry import registered as registered_kernels
from graphwright.kernels.gpu import interpreting

BACKENDS = (onednn, llvm, llvm_f32, llvm_int8, llvm_groups, triton, registered, aten)


def candidates(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Every candidate of every backend for one work; ATen's native one, which always serves, is among them."""
    for backend in BACKENDS:
        if work.device in devices(backend):
            for candidate in backend.candidates(work, allowed):
                if candidate.precision in allowed and candidate.halves <= allowed:
                    yield candidate


def offered(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """The candidates for a work, without those in a half precision whose error was measured and found too large."""
    return (c for c in candidates(work, allowed) if withheld(work, c) is None)


def withheld(work: Work, candidate: Candidate) -> str | None:
    """None, or why a candidate in half precision is not offered: the error that was measured."""
    admitted = work.node.meta.get("halves")
    if admitted is None or candidate.halves <= admitted.keys():
        return None
    reasons = work.node.meta.get("halves_barred", {})
    return next((reasons[k] for k in sorted(candidate.halves) if k in reasons), "half precision was not asked for here")


def devices(backend: object) -> tuple[str, ...]:
    """Where a backend's kernels run; Triton's also on the CPU, in its interpreter, where the environment asks for that."""
    found: tuple[str, ...] = backend.DEVICES  # type: ignore[attr-defined]
    return ("cpu", *found) if backend is triton and interpreting() else found


def reasons(device: str = "cpu") -> dict[str, str]:
    """Backends that can't serve tensors on a device of this machine, and why; those made for a GPU alone are not missed on the CPU."""
    here = {b.__name__.rpartition(".")[2]: b for b in BACKENDS}
    found = {name: b.reason() for name, b in here.items() if device in devices(b)}
    if elsewhere := [name for name, b in here.items() if device not in devices(b)] if device != "cpu" else []:
        found[", ".join(elsewhere)] = f"their kernels are for the CPU, and the model is on {device}"
    return {name: why for name, why in found.items() if why}


def names() -> tuple[str, ...]:
    """What ``optimize(backend=...)`` may name: the backends whose kernels have a name of their own, and registered ones."""
    return tuple(dict.fromkeys(["aten", "onednn", "llvm", "triton", *(k.backend for k in registered_kernels())]))
