"""Backends: each module offers ``candidates(work, allowed)`` for the works it can do.

``allowed`` is the set of precisions that the recipe permits (``"f32"`` always; ``"bf16"``, ``"int8"``).
A module that is not importable, or whose kernels this machine cannot run, offers nothing and says why in ``reason()``.
"""

from __future__ import annotations

from collections.abc import Iterator

from graphwright.backends import aten, llvm, llvm_f32, llvm_int8, onednn, registered
from graphwright.backends.base import Candidate, Work

BACKENDS = (onednn, llvm, llvm_f32, llvm_int8, registered, aten)


def candidates(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Every candidate of every backend for one work; ATen's native one, which always serves, is among them."""
    for backend in BACKENDS:
        for candidate in backend.candidates(work, allowed):
            if candidate.precision in allowed:
                yield candidate


def offered(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """The candidates for a work, without those in bfloat16 where its error was measured and found too large."""
    return (c for c in candidates(work, allowed) if c.precision != "bf16" or work.node.meta.get("bf16", True))


def reasons() -> dict[str, str]:
    """Backends that can't serve on this machine, and why."""
    found = {b.__name__.rpartition(".")[2]: b.reason() for b in BACKENDS}
    return {name: why for name, why in found.items() if why}
