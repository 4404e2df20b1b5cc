"""Compiled kernels on disk: object code, so that a later process neither translates nor optimizes anything.

A file holds a line of JSON (a digest, what the code calls from elsewhere) and the code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from graphwright.cache import write_atomic
from graphwright.kernels import llvm

_VERSION = 2


def place(folder: Path, name: str) -> Path:
    """The file of a kernel: code for another processor has another name."""
    return folder / f"{name}-{hashlib.sha256(llvm.described().encode()).hexdigest()[:12]}.kernel"


def write(path: Path, code: bytes) -> None:
    """Keep a kernel's object code; others see the old file or the new one. Failing costs only the file."""
    head = {"version": _VERSION, "sha256": hashlib.sha256(code).hexdigest()}
    with contextlib.suppress(OSError):
        write_atomic(path, json.dumps(head).encode() + b"\n" + code)


def read(path: Path, name: str) -> tuple[Any, int] | None:
    """What owns the code, and the address of the kernel ``name``; None where there is no such file or it is damaged."""
    try:
        line, _, code = path.read_bytes().partition(b"\n")
        head = json.loads(line)
        if head["version"] != _VERSION or hashlib.sha256(code).hexdigest() != head["sha256"]:
            return None
        owner, address = llvm.linked(code, name)
    except Exception:  # noqa: BLE001  whatever a file of another day brings: the kernel is compiled anew
        return None
    return (owner, address) if address else None
