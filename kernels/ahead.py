"""Kernels compiled ahead, by another process, while a model is captured and rewritten.

Compiling takes a second or two per kernel, once per machine, and most of that is Python: a thread would only be in the way.
The other process fills the cache on disk and does nothing else, so that nothing ever depends on it: what it has not done is
compiled where it is needed. It ends with this process, since its input closes then, and ``finish`` ends it before kernels are
timed.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable

from graphwright.kernels import numba_cpu

_SMOOTH = r"gelu|silu|swish|sigmoid|tanh|mish|\belu|softplus"
#: By kernel, likeliest first: what in the names of modules, ops and fused activations speaks for it, and whether it serves int8
#: programs alone. A kernel that is not named is compiled when it is first timed.
_SIGNS: dict[str, tuple[str, bool]] = {
    "max_pool": ("maxpool", False),
    "mean_pool": (r"avgpool|aten\.mean", False),
    "norm": ("layernorm|rmsnorm", False),
    "pointwise_simple": ("conv|linear|relu", True),
    "linear_int8_simple": ("linear", True),
    "conv2d_int8_simple": (r"conv2d|graphwright\.conv", True),
    "frame": (r"conv2d|graphwright\.conv", True),
    "attention_int8": ("attention", True),
    "attention": ("attention", False),
    "pointwise_smooth": (_SMOOTH, True),
    "linear_int8_smooth": (_SMOOTH, True),
}
#: Seconds that the last kernel is waited for; compiling it here takes about as long.
_PATIENCE_S = 3.0
#: What the other process runs: it ends when its input closes, and that from its first moment on.
_CHILD = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
from graphwright.kernels import ahead
ahead._compile(sys.argv[1:])
os._exit(0)
"""

_lock = threading.Lock()
_running: subprocess.Popen[bytes] | None = None


def start(names: Iterable[str], quantizing: bool) -> None:
    """Compile what a model with modules or ops of these names will ask for and is not on disk yet. Returns at once."""
    global _running
    with _lock:
        if _alive():
            return
        missing = _missing(names, quantizing)
        # an application that embeds Python may stand there in its stead
        python = "python" in os.path.basename(sys.executable or "") and not getattr(sys, "frozen", False)
        if not missing or not python or (os.cpu_count() or 1) < 2:
            return
        # -P and the path: the same packages as here, and nothing that happens to lie in the current folder
        path = os.pathsep.join(p for p in sys.path if p)
        with contextlib.suppress(OSError):
            _running = subprocess.Popen(
                [sys.executable, "-P", "-c", _CHILD, *missing], env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=True,
            )  # fmt: skip


def finish(names: Iterable[str], quantizing: bool) -> None:
    """Have what a program with these ops asks for, and end the other process: kernels are about to be timed.

    The two work towards each other: what the other process would come to last is compiled here.
    """
    names = list(names)
    for name in reversed(_missing(names, quantizing)[1:]):
        if not _alive():
            break
        native = _natives()[name]
        if not native.on_disk():
            with contextlib.suppress(Exception):  # it fails in sight where it is timed
                native.warm()
    end = time.monotonic() + _PATIENCE_S
    while _alive() and time.monotonic() < end and _missing(names, quantizing):
        time.sleep(0.02)
    stop()


def _alive() -> bool:
    child = _running
    return child is not None and child.poll() is None


def stop() -> None:
    """End the other process, if there is one."""
    global _running
    with _lock:
        child, _running = _running, None
    if child is not None:
        child.kill()
        child.wait()
        if child.stdin is not None:
            child.stdin.close()


def _missing(names: Iterable[str], quantizing: bool) -> list[str]:
    """Names of the kernels that are wanted and not on disk, likeliest first."""
    if numba_cpu.unavailable() is not None:
        return []
    text = "\n".join({n.lower().replace("_", "") for n in names})
    known = _natives()
    return [kernel for kernel, (sign, int8) in _SIGNS.items() if kernel in known and (quantizing or not int8)
            and re.search(sign, text) and not known[kernel].on_disk()]  # fmt: skip


def _natives() -> dict[str, numba_cpu.Native]:
    """Every compiled kernel of this package by its name."""
    from importlib import import_module

    from graphwright import kernels

    modules = {import_module(kernel.run.__module__) for several in kernels.load().values() for kernel in several}
    return {v.name: v for m in modules for v in vars(m).values() if isinstance(v, numba_cpu.Native)}


def _compile(names: Iterable[str]) -> None:
    known = _natives()
    for name in names:
        with contextlib.suppress(Exception):  # it is compiled, and fails in sight, where it is needed
            known[name].warm()
