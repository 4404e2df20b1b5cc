"""Triton kernels: one fused op per file, for NVIDIA (sm_80 and later) and AMD (gfx942) GPUs.

Nothing heavy is imported here. Without a GPU the same files run in Triton's interpreter (``TRITON_INTERPRET=1`` in the
environment before the first import) and compile ahead of time (``python -m graphwright.kernels.gpu.ahead``).
"""

from __future__ import annotations

import functools
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphwright.kernels.gpu.launch import Family

# Triton's default is about to change: multiply and add in one instruction, as the record of machine code has it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

#: Files of this folder that hold no kernel.
_SHARED = {"__init__", "ahead", "dialect", "generate", "generated", "interpret", "language", "launch", "machine", "scalar", "serving", "tuning", "versions"}


def interpreting() -> bool:
    """The environment asks for Triton's interpreter: kernels run on CPU tensors, slowly, to check their numbers."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def unavailable() -> str | None:
    """None, or why the Triton kernels can't even be read here."""
    try:
        import triton
    except ImportError as error:
        return f"triton can't be imported ({error}); install graphwright[gpu]"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return None if version >= (3, 6) else f"triton {triton.__version__} is too old; 3.6 or later is supported"


def wanted() -> bool:
    """There is something to run them on: a CUDA device, or the interpreter."""
    import torch

    return (interpreting() or torch.cuda.is_available()) and unavailable() is None


@functools.cache
def families() -> dict[str, Family]:
    """Every Triton kernel by its name. A file takes part by defining ``FAMILY`` or ``FAMILIES``.

    Raises:
        ImportError: triton is missing or too old.
    """
    if (reason := unavailable()) is not None:
        raise ImportError(reason)
    found: dict[str, Family] = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.stem not in _SHARED:
            module = import_module(f"graphwright.kernels.gpu.{file.stem}")
            for family in (*getattr(module, "FAMILIES", ()), *filter(None, [getattr(module, "FAMILY", None)])):
                found[family.name] = family
    return found
