"""Kernels: one fused op per file. Nothing heavy is imported here; ``load()`` imports the files on demand."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphwright.kernel import Kernel

__all__ = ["load", "warm"]


@functools.cache
def load() -> dict[str, list[Kernel]]:
    """Every kernel, by the op it computes. A file takes part by defining ``KERNEL`` or ``KERNELS``.

    Those in ``gpu/`` come along where there is something to run them on.
    """
    from importlib import import_module
    from pathlib import Path

    from graphwright.kernels import gpu

    found: dict[str, list[Kernel]] = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.stem == "__init__":
            continue
        module = import_module(f"graphwright.kernels.{file.stem}")
        for kernel in (*getattr(module, "KERNELS", ()), *filter(None, [getattr(module, "KERNEL", None)])):
            found.setdefault(kernel.op, []).append(kernel)
    if gpu.wanted():
        import_module("graphwright.kernels.gpu.serving").register()
        for family in gpu.families().values():
            found.setdefault(family.op, []).append(family.kernel())
    return found


def warm(ops: Iterable[str]) -> None:
    """Compile the kernels of these ops now (about a second each, once per machine) rather than on their first call.

    Ops without a kernel, and kernels that cannot run here, are passed over: ``supports`` gives the reason.
    """
    from importlib import import_module

    from graphwright.errors import InternalError
    from graphwright.kernels import native

    if native.unavailable() is not None:
        return
    for name in ops:
        for kernel in load().get(name, ()):
            for held in vars(import_module(kernel.run.__module__)).values():
                if isinstance(held, native.Native):
                    with contextlib.suppress(InternalError):  # the processor lacks an instruction: nothing will call it
                        held.warm()
