"""Inductor's C++: a whole region of ops as one library, compiled ahead of time in a process of its own.

A region is described by a ``Fragment``: plain data, the same for equal regions wherever they stand, so that it names the
library in the private cache and travels to the compiler. Compiling takes a C++ compiler and many seconds; a library
that is there is opened in milliseconds, without Inductor and without a compiler.

    fragment = Fragment(inputs, steps, outputs)
    compile_library(fragment, seconds=60)      # may raise NotCompiled
    run = open_library(fragment)               # None where there is none
    run([x, y])                                # list of tensors

Generated code asks OpenMP for its threads at run time (``cpp.dynamic_threads``): ``torch.set_num_threads`` holds for it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import operator
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphwright.backends.base import Slot, filler
from graphwright.cache import JsonCache, folder, write_atomic
from graphwright.errors import GraphwrightError
from graphwright.measure import machine

_VERSION = 1
#: what compiling one region takes where this machine has not shown it yet, in seconds
_FIRST_S = 13.0
#: libraries that the cache keeps at the most; the one unused for longest goes first
_MAX_LIBRARIES = 128
_OPTIONS: dict[str, Any] = {
    "cpp.dynamic_threads": True,
    "aot_inductor.compile_wrapper_opt_level": "O0",  # the wrapper allocates and calls: optimizing it costs more than it brings
    "aot_inductor.precompile_headers": False,  # takes longer than it saves until the fourth region
    "aot_inductor.enable_line_tables": False,
}

Run = Callable[[list[Tensor]], list[Tensor]]


class NotCompiled(GraphwrightError):
    """Inductor or the C++ compiler failed, or took longer than it was given."""


@dataclass(frozen=True)
class Fragment:
    """A region as plain data.

    Attributes:
        inputs: dtype (``"float32"``), shape and strides of each.
        steps: op (``"aten.add.Tensor"``, or ``"getitem"`` for one of several results), positional and keyword arguments as ``encode`` gives them; values are numbered,
            inputs first, then the steps' results.
        outputs: numbers of the values that it returns.
    """

    inputs: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    steps: tuple[tuple[str, Any, Any], ...]
    outputs: tuple[int, ...]

    @cached_property
    def text(self) -> str:
        return json.dumps([self.inputs, self.steps, self.outputs], sort_keys=True)

    @classmethod
    def of(cls, text: str) -> Fragment:
        """What ``text`` was made from."""
        inputs, steps, outputs = json.loads(text)
        return cls(tuple((d, tuple(s), tuple(t)) for d, s, t in inputs), tuple(map(tuple, steps)), tuple(outputs))

    @cached_property
    def key(self) -> str:
        """Name of its library: machine, versions and content."""
        return hashlib.sha256(json.dumps([_VERSION, machine(), _OPTIONS, self.text], sort_keys=True).encode()).hexdigest()[:40]

    def zeros(self, device: str = "cpu") -> list[Tensor]:
        """Inputs of the right shapes and strides, all zero; a stride may be 0. On ``"meta"`` they take no memory."""
        reach = [1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) for _, shape, strides in self.inputs]
        return [torch.zeros(n, dtype=getattr(torch, dtype), device=device).as_strided(shape, strides)
                for n, (dtype, shape, strides) in zip(reach, self.inputs, strict=True)]  # fmt: skip


class FragmentModule(nn.Module):
    """A fragment, op by op; with ``double`` in float64: tensors are widened, and so are dtypes among the arguments."""

    def __init__(self, fragment: Fragment, *, double: bool = False):
        super().__init__()
        self._wide = double
        self._steps = [(_op(name), filler(tuple(_decode(a, double) for a in args), {k: _decode(v, double) for k, v in kwargs.items()}))
                       for name, args, kwargs in fragment.steps]  # fmt: skip
        self._outputs = fragment.outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values = self.trace(inputs)
        return tuple(values[k] for k in self._outputs)

    def trace(self, inputs: Sequence[Tensor]) -> list[Any]:
        """Every value: the inputs, then what each step gives."""
        values: list[Any] = [x.double() if self._wide and x.is_floating_point() else x for x in inputs]
        for call, fill in self._steps:
            args, kwargs = fill(*values)
            values.append(call(*args, **kwargs))
        return values


def encode(value: Any, number: Callable[[Any], int]) -> Any:
    """An argument as plain data; ``number`` gives the number of a ``Slot`` or a tensor.

    Raises:
        TypeError: it is nothing that plain data can say.
    """
    if isinstance(value, (Slot, Tensor)):
        return {"value": number(value)}
    if isinstance(value, (tuple, list)):
        return [encode(v, number) for v in value]
    for kind in ("dtype", "memory_format", "layout", "device"):
        if isinstance(value, getattr(torch, kind)):
            return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    raise TypeError(f"a {type(value).__name__} among the arguments")


def _decode(value: Any, double: bool) -> Any:
    if isinstance(value, list):
        return [_decode(v, double) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, said),) = value.items()
    if kind == "value":
        return Slot(said)
    if kind == "device":
        return torch.device(said)
    return torch.float64 if double and said in ("float32", "float16", "bfloat16") else getattr(torch, said)


def _op(name: str) -> Any:
    if name == "getitem":
        return operator.getitem
    namespace, op, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), op), overload)


# -- libraries -------------------------------------------------------------------------------------------------------


def reason() -> str | None:
    """None, or why nothing can be compiled on this machine."""
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler}) on this machine"
    if importlib.util.find_spec("torch._inductor") is None or not hasattr(torch._C, "_aoti"):
        return "this torch has no Inductor"
    if not sys.executable:
        return "the Python interpreter that would run Inductor is unknown"
    return None


def expected_seconds() -> float:
    """The least that compiling one region ever took here: a machine that was busy then may be idle now."""
    found = JsonCache("inductor", shards=1).get("seconds")
    return float(found) if isinstance(found, (int, float)) else _FIRST_S


_opened: dict[str, Run] = {}


def open_library(fragment: Fragment) -> Run | None:
    """The region's function if its library is in the cache and sound: flat tensors of the stated strides in, new tensors out."""
    if fragment.key not in _opened:
        path, sums = _library(fragment.key), _library(fragment.key).with_suffix(".sha256")
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest() != sums.read_text():
                raise ValueError("the library was altered")
            container = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)
        except (OSError, ValueError, RuntimeError, AttributeError):
            for file in (path, sums):
                with suppress(OSError):
                    file.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        _opened[fragment.key] = container.run
    return _opened[fragment.key]


def compile_library(fragment: Fragment, seconds: float) -> None:
    """Put the library of ``fragment`` into the cache.

    Args:
        seconds: the compiler is stopped past this many.

    Raises:
        NotCompiled: it was stopped, or it failed; the message has its last words.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="graphwright-inductor-") as place:
        job = json.dumps({"fragment": fragment.text, "threads": torch.get_num_threads(), "place": place})
        answer = _child(job, seconds)
        try:
            library = Path(json.loads(answer)["library"]).read_bytes()
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise NotCompiled(f"Inductor gave no library ({error})") from error
    path = _library(fragment.key)
    try:
        write_atomic(path, library)
        write_atomic(path.with_suffix(".sha256"), hashlib.sha256(library).hexdigest().encode())
    except OSError as error:
        raise NotCompiled(f"the library cannot be stored: {error.strerror or error}") from error
    _prune(path.parent)
    took, known = time.perf_counter() - start, JsonCache("inductor", shards=1)
    known.put("seconds", round(min(took, known.get("seconds", took)), 1))
    known.flush()


def _library(key: str) -> Path:
    return folder("inductor") / f"{key}.so"


def _prune(place: Path) -> None:
    with suppress(OSError):
        found = sorted(place.glob("*.so"), key=lambda p: p.stat().st_mtime)
        for path in found[:-_MAX_LIBRARIES]:
            path.unlink(missing_ok=True)
            path.with_suffix(".sha256").unlink(missing_ok=True)


def _child(job: str, seconds: float) -> str:
    """Run this module as a program on ``job`` and give the last line that it prints; its compilers end with it."""
    scratch = folder("inductor") / "scratch"  # Inductor keeps there what it found out about the compiler
    settings = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TORCHINDUCTOR_CACHE_DIR": str(scratch),
                "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # fmt: skip
    if machine()["isa"] == "AVX512":  # torch's own kernels run with it: Inductor need not find out by compiling
        settings["TORCHINDUCTOR_VEC_ISA_OK"] = "1"
    with subprocess.Popen([sys.executable, "-P", "-W", "ignore", "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, env={**os.environ, **settings}, start_new_session=True) as child:  # fmt: skip
        try:
            said, complained = child.communicate(job, timeout=seconds)
        except BaseException as error:  # an interrupted user, too, leaves no compiler behind
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise NotCompiled(f"it was stopped after {seconds:.0f} s") from None
            raise
    lines = (said if child.returncode == 0 else complained).strip().splitlines()
    if child.returncode or not lines:
        raise NotCompiled(lines[-1][:300] if lines else f"the compiling process ended with status {child.returncode}")
    return lines[-1]


def main(job: str) -> str:
    """In the child: compile one region; where its library lies, as JSON."""
    from torch._inductor import aot_compile

    asked = json.loads(job)
    torch.set_num_threads(asked["threads"])
    fragment = Fragment.of(asked["fragment"])
    example = tuple(fragment.zeros())
    with torch.no_grad():
        exported = torch.export.export(FragmentModule(fragment), example, strict=False)
        made: str | Sequence[str] = aot_compile(exported.module(), example, options={**_OPTIONS, "aot_inductor.output_path": asked["place"]})
    files = [made] if isinstance(made, str) else list(made)
    if len(files) != 1 or not files[0].endswith(".so"):
        raise NotCompiled(f"Inductor left ops of the region outside its library: {', '.join(Path(f).name for f in files)}")
    return json.dumps({"library": files[0]})


if __name__ == "__main__":
    print(main(sys.stdin.read()))
