"""Compiled kernels on disk: machine code as Numba linked it, so that a later process neither types nor optimizes anything.

A file holds a line of JSON (what the code is called, how long its parts are, a digest) and the parts. It is read with what
``import numba`` brings alone; Numba's own cache imports and sets up its whole library of overloads first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from graphwright.cache import write_atomic

_VERSION = 1


def place(folder: Path, name: str) -> Path:
    """The file of a kernel: code for another processor has another name."""
    return folder / f"{name}-{hashlib.sha256(repr(_codegen().magic_tuple()).encode()).hexdigest()[:12]}.kernel"


def _codegen() -> Any:
    """Numba's linker, with the symbols of its runtime known."""
    from numba.core.registry import cpu_target
    from numba.core.runtime import rtsys

    rtsys.initialize(cpu_target.target_context)
    return cpu_target.target_context.codegen()


def _wanted(library: Any) -> list[str]:
    """Names that the code refers to and does not define."""
    module = library._final_module
    return [v.name for v in (*module.functions, *module.global_variables)
            if v.is_declaration and not v.name.startswith("llvm.")]  # fmt: skip


def write(path: Path, function: Any) -> None:
    """Keep a compiled C function (``numba.cfunc``); others see the old file or the new one. Failing costs only the file."""
    library = function._library
    _, kind, parts = library.serialize_using_object_code()
    head = {"version": _VERSION, "kind": kind, "library": library.name, "function": function.native_name,
            "wanted": _wanted(library), "sizes": [len(p) for p in parts], "sha256": hashlib.sha256(b"".join(parts)).hexdigest()}  # fmt: skip
    with contextlib.suppress(OSError):
        write_atomic(path, b"\n".join([json.dumps(head).encode(), b"".join(parts)]))


def read(path: Path) -> tuple[Any, int] | None:
    """What owns the code, and the function's address; None where there is no such file or it is damaged."""
    try:
        line, _, rest = path.read_bytes().partition(b"\n")
        head = json.loads(line)
        first, second = head["sizes"]
        if head["version"] != _VERSION or len(rest) != first + second or hashlib.sha256(rest).hexdigest() != head["sha256"]:
            return None
        from llvmlite import binding

        codegen = _codegen()
        if not all(map(binding.address_of_symbol, head["wanted"])):
            return None  # linking it would end the process
        library = codegen.unserialize_library((head["library"], head["kind"], (rest[:first], rest[first:])))
        address = library.get_pointer_to_function(head["function"])
    except Exception:  # noqa: BLE001  whatever a file of another day brings: the kernel is compiled anew
        return None
    return (library, address) if address else None
