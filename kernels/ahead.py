"""Kernels compiled ahead, by a thread, while a model is captured and rewritten or a saved one is put together.

Compiling takes half a second to a second and a half per kernel, once per machine. Most of that is LLVM's, which leaves Python to others. Nothing
depends on the thread: what it has not done is compiled where it is needed. ``finish`` ends it before kernels are timed.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterable

from graphwright.kernels import native

_SMOOTH = r"gelu|silu|swish|sigmoid|tanh|mish|\belu|softplus"
#: By kernel, likeliest first: what in the names of modules, ops and fused activations speaks for it, and the programs it serves:
#: ``"int8"``, ``"float"`` or any. A kernel that is not named is compiled when it is first timed.
_SIGNS: dict[str, tuple[str, str]] = {
    "max_pool": ("maxpool", "any"),
    "mean_pool": (r"avgpool|aten\.mean", "any"),
    "norm": ("layernorm|rmsnorm", "any"),
    "conv2d_winograd_simple": (r"conv2d|graphwright\.conv", "float"),
    "finish_simple": ("linear", "float"),
    "pointwise_simple": ("conv|linear|relu", "int8"),
    "linear_int8_simple": ("linear", "int8"),
    "conv2d_int8_simple": (r"conv2d|graphwright\.conv", "int8"),
    "frame": (r"conv2d|graphwright\.conv", "int8"),
    "attention_int8": ("attention", "int8"),
    "attention": ("attention", "any"),
    "finish_smooth": (_SMOOTH, "float"),
    "pointwise_smooth": (_SMOOTH, "int8"),
    "linear_int8_smooth": (_SMOOTH, "int8"),
}

_lock = threading.Lock()
_running: _Compiler | None = None


class _Compiler(threading.Thread):
    """Compiles what is pending, in order. Not a daemon: the interpreter must not be torn down under LLVM."""

    def __init__(self, pending: list[str]):
        super().__init__(name="graphwright-kernels")
        self.pending = pending

    def run(self) -> None:
        natives = _natives()
        while threading.main_thread().is_alive():
            with _lock:
                if not self.pending:
                    return
                name = self.pending.pop(0)
            with contextlib.suppress(Exception):  # it is compiled, and fails in sight, where it is needed
                natives[name].warm()


def start(names: Iterable[str], quantizing: bool) -> None:
    """Compile what a model with modules or ops of these names will ask for and is not on disk yet. Returns at once."""
    global _running
    missing = _missing(names, quantizing)
    with _lock:
        if _running is not None and _running.is_alive():
            return
        _running = _Compiler(missing) if missing else None
    if _running is not None:
        _running.start()


def finish(names: Iterable[str], quantizing: bool) -> None:
    """Have what a program with these ops asks for, and end the thread: kernels are about to be timed."""
    for name in _missing(names, quantizing):
        with contextlib.suppress(Exception):
            _natives()[name].warm()
    stop()


def stop() -> None:
    """End the thread, if there is one, after the kernel that it is at."""
    global _running
    with _lock:
        thread, _running = _running, None
        if thread is not None:
            thread.pending.clear()
    if thread is not None and thread is not threading.current_thread():
        thread.join()


def _before_fork() -> None:
    """No thread is compiling when a process forks: its child would wait for ever for locks that nobody there holds."""
    stop()
    native.COMPILING.acquire()


os.register_at_fork(before=_before_fork, after_in_parent=native.COMPILING.release, after_in_child=native.COMPILING.release)


def _missing(names: Iterable[str], quantizing: bool) -> list[str]:
    """Names of the kernels that are wanted and not on disk, likeliest first."""
    if native.unavailable() is not None:
        return []
    text = "\n".join({n.lower().replace("_", "") for n in names})
    known = _natives()
    return [kernel for kernel, (sign, kind) in _SIGNS.items() if kernel in known and kind in ("any", "int8" if quantizing else "float")
            and re.search(sign, text) and not known[kernel].on_disk()]  # fmt: skip


def _natives() -> dict[str, native.Native]:
    """Every compiled kernel of this package by its name."""
    from importlib import import_module

    from graphwright import kernels

    modules = {import_module(kernel.run.__module__) for several in kernels.load().values() for kernel in several}
    modules.add(import_module("graphwright.kernels.finish"))  # a part of candidates, no op of its own
    return {v.name: v for m in modules for v in vars(m).values() if isinstance(v, native.Native)}
