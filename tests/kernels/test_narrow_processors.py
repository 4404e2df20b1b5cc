"""Processors without AVX-512: kernels that need it refuse, and nothing ends the process."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest
import torch

from graphwright import backends, kernels
from graphwright.backends import llvm_int8, onednn
from graphwright.capture import capture
from graphwright.errors import InternalError
from graphwright.kernels import ahead, linear_int8, llvm, native, translate, vnni
from graphwright.lower.graph import analyse
from graphwright.manager import Pipeline
from graphwright.passes.pipeline import resolve

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

#: Processors by LLVM's name: the flags that the system shows, and LLVM's features.
NARROW = {"haswell": (["avx2"], "+avx2,+fma,+f16c"), "alderlake": (["avx2", "avx_vnni"], "+avx2,+fma,+f16c,+avxvnni")}


@pytest.fixture(params=NARROW)
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    flags, features = NARROW[request.param]
    llvm._host()  # LLVM gets to know its targets there
    monkeypatch.setattr(llvm, "_host", lambda: (request.param, features))
    caches = llvm_int8.reason, onednn.int8_reason
    for module in (vnni, onednn):
        monkeypatch.setattr(module, "machine", lambda: {"flags": flags})
    for cache in caches:
        cache.cache_clear()
    yield request.param
    for cache in caches:
        cache.cache_clear()


@functools.cache
def _wide() -> dict[str, Any]:
    """Modules of the kernels that name an instruction of AVX-512."""
    found = {name: translate.translate(held._body, name) for name, held in ahead._natives().items()}
    return {name: module for name, module in found.items() if "llvm.x86.avx512" in str(module)}


@pytest.mark.usefixtures("narrow")
def test_what_needs_wide_registers_says_so_and_is_not_compiled() -> None:
    assert {"linear_int8_simple", "conv2d_int8_simple", "attention_int8"} <= set(_wide())
    for made in _wide().values():
        with pytest.raises(InternalError, match="needs avx512"):
            llvm.compiled(made)
    for several in kernels.load().values():
        for kernel in several:
            module = importlib.import_module(kernel.run.__module__)
            if kernel.device == "cpu" and any(isinstance(v, native.Native) and v.name in _wide() for v in vars(module).values()):
                args = next(iter(kernel.samples())).args(torch.Generator().manual_seed(0))
                assert "AVX-512 VNNI" in str(kernel.supports(*args)), kernel.name


@pytest.mark.usefixtures("narrow")
def test_what_does_not_is_compiled() -> None:
    held = ahead._natives()["linear_w8_simple"]
    assert llvm.compiled(translate.translate(held._body, held.name))


def test_compiling_ahead_passes_over_them(narrow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cache_folder", lambda: None)
    fresh = native.Native(linear_int8._SIMPLE._body, "q")
    monkeypatch.setattr(linear_int8, "_SIMPLE", fresh)
    monkeypatch.setattr(kernels, "load", lambda: {"graphwright.linear_int8": [linear_int8.KERNEL]})
    monkeypatch.setattr(linear_int8, "_SMOOTH", None)
    monkeypatch.setattr(linear_int8, "_ROUND_ROWS", None)
    kernels.warm(["graphwright.linear_int8"])
    assert fresh._alone is None


def test_int8_goes_to_onednn_where_that_has_vnni(narrow: str) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 16, 3), torch.nn.Flatten(), torch.nn.Linear(16 * 36, 32))
    x = torch.randn(2, 4, 8, 8)
    program = capture(model.eval(), (x,)).program
    program.example, program.calibration = (x,), [(x,), (torch.randn_like(x),)]
    program = Pipeline(resolve("int8")).run(program)[0]
    names = {c.name for w in analyse(program).works for c in backends.candidates(w, frozenset({"f32", "int8"}))}
    assert not any(n.startswith("llvm.int8") for n in names)
    assert any(n.startswith("onednn.int8") for n in names) == (narrow == "alderlake")
    assert "AVX-512 VNNI" in backends.reasons()["llvm_int8"]
