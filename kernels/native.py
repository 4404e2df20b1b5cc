"""Host side of the kernels: can they be compiled, compile on demand, launch on PyTorch's own OpenMP threads.

A kernel is a C function ``void (void *params)``, started with ``GOMP_parallel`` of the OpenMP
library that PyTorch has loaded already. That leaves one pool of threads in the process and makes a call cost 1 to 3 µs. ``params`` is a block of eight-byte slots packed by ``struct``; slots 0 and 1 hold the
addresses of ``omp_get_thread_num`` and ``omp_get_num_threads``, or zeros for a call on the caller's thread alone.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import struct
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from graphwright.errors import InternalError
from graphwright.kernels import disk, llvm, translate

#: Held while a kernel is compiled or read: one at a time.
COMPILING = threading.Lock()
#: Elements below which a further thread does not pay for its start.
GRAIN = 16384

_Launch = Callable[..., None]


@functools.cache
def unavailable() -> str | None:
    """None, or why kernels cannot run in this process."""
    if (reason := translate.unavailable()) is not None:
        return reason
    if sys.byteorder != "little" or struct.calcsize("P") != 8:
        return "compiled kernels need a 64-bit little-endian machine"
    return None


class _OpenMP:
    """The OpenMP library of this process: its fork call and the two addresses that kernels ask for thread numbers."""

    def __init__(self, library: ctypes.CDLL):
        self.fork = library.GOMP_parallel
        self.fork.restype, self.fork.argtypes = None, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint)
        self.thread_num = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p).value or 0
        self.num_threads = ctypes.cast(library.omp_get_num_threads, ctypes.c_void_p).value or 0


@functools.cache
def openmp() -> _OpenMP | None:
    """PyTorch's OpenMP library, or None where it has none with GNU entry points: kernels then use one thread."""
    candidates: list[str] = []
    try:
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.split(maxsplit=5)[-1]
            if any(name in os.path.basename(path) for name in ("libgomp", "libiomp5", "libomp")) and path not in candidates:
                candidates.append(path)
    except OSError:
        pass
    # Two libraries may be loaded (scikit-learn brings one): the one beside torch is the one whose threads are warm.
    candidates.sort(key=lambda path: not path.startswith(os.path.dirname(torch.__file__)))
    for path in candidates:
        try:
            return _OpenMP(ctypes.CDLL(path))
        except (OSError, AttributeError):
            continue
    return None


def threads_for(elements: int) -> int:
    """How many of PyTorch's threads a pass over so many elements deserves."""
    if elements < 2 * GRAIN:
        return 1
    return min(torch.get_num_threads(), elements // GRAIN)


def specialized(body: Callable[[int], None], name: str, **names: Any) -> Callable[[int], None]:
    """A kernel's body with these names put in, under a name of its own: the cache on disk goes by it."""
    made = types.FunctionType(body.__code__, {**body.__globals__, **names}, name)  # type: ignore[attr-defined]
    made.__qualname__, made.__module__ = name, body.__module__
    return made


class Native:
    """One compiled kernel; compiled, or read from the disk cache, on its first call.

    Args:
        body: ``(params: int) -> None`` in the language of ``graphwright.kernels.translate``; ``params`` is the address of the slots.
        slots: one ``struct`` letter per parameter after the two of OpenMP: ``q`` integer or address, ``d`` float.
    """

    def __init__(self, body: Callable[[int], None], slots: str):
        self.name = body.__name__.strip("_")
        self._body = body
        self._pack = struct.Struct("qq" + slots).pack
        self._alone: _Launch | None = None
        self._address = 0
        self._handle: Any = None

    def __call__(self, threads: int, *params: float) -> None:
        """Run on so many threads. The caller vouches for every address: nothing is checked here."""
        if self._alone is None:
            self.warm()
        if threads > 1 and (omp := openmp()) is not None:
            omp.fork(self._address, self._pack(omp.thread_num, omp.num_threads, *params), threads, 0)
        else:
            self._alone(self._pack(0, 0, *params))  # type: ignore[misc]

    def on_disk(self) -> bool:
        """Whether an earlier process has left the compiled kernel; True where nothing can be left."""
        path = None if unavailable() else _file(self._body)
        return path is None or path.is_file()

    def warm(self) -> None:
        """Compile now.

        Raises:
            InternalError: kernels can't be compiled here (``unavailable()`` says why), or this one is outside the language.
        """
        with COMPILING:
            if self._alone is not None:
                return
            if (reason := unavailable()) is not None:
                raise InternalError(reason, where=f"kernel {self.name}")
            self._handle, self._address = _compile(self._body)
            self._alone = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._address)


def _file(body: Callable[[int], None]) -> Path | None:
    """Where a compiled kernel is kept; None where none can be."""
    folder = cache_folder()
    return None if folder is None else disk.place(folder, f"{body.__module__.rpartition('.')[2]}.{body.__name__}{_foreign(body)}")


def _foreign(body: Callable[[int], None]) -> str:
    """Nothing for our own kernels, whose sources name the folder; for another package's, a digest of the file it stands in."""
    if body.__module__.startswith(f"{__package__}."):
        return ""
    return "-" + hashlib.sha256(body.__module__.encode() + b"\n" + Path(body.__code__.co_filename).read_bytes()).hexdigest()[:16]


def _compile(body: Callable[[int], None]) -> tuple[Any, int]:
    """The owner of a kernel's code and the address of it, from the disk or compiled now."""
    name = body.__name__.strip("_")
    path = _file(body)
    found = None if path is None else disk.read(path, name)
    if found is None:
        code = llvm.compiled(translate.translate(body, name))
        found = llvm.linked(code, name)
        if path is not None:
            disk.write(path, code)
    return found


@functools.cache
def cache_folder() -> Path | None:
    """Private folder of compiled kernels, or None (no caching) where none can be had.

    What lies there is run, so the folder must be the user's own and closed to others. Its name holds a digest of the device
    code and the versions.
    """
    digest = hashlib.sha256(sys.version.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "graphwright" / "kernels" / digest.hexdigest()[:16]
    try:
        for path in (base / "graphwright", base / "graphwright" / "kernels", folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                return None
            if path.stat().st_mode & 0o077:
                path.chmod(0o700)
        return folder if os.access(folder, os.W_OK | os.X_OK) else None
    except (OSError, RuntimeError):
        return None
