"""Compiling ahead: the right kernels, no process left behind, and nothing lost where it can't be done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import graphwright as gw
from graphwright.errors import InputError
from graphwright.kernels import ahead
from graphwright.kernels.numba_cpu import Native


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Native, "on_disk", lambda self: False)


def test_every_sign_speaks_of_a_kernel() -> None:
    assert set(ahead._SIGNS) <= set(ahead._natives())


@pytest.mark.parametrize(("names", "quantizing", "wanted", "unwanted"), [
    (["Conv2d", "ReLU", "MaxPool2d"], False, ["max_pool"], ["pointwise_simple", "conv2d_int8_simple", "norm", "attention"]),
    (["Conv2d", "ReLU", "MaxPool2d"], True, ["max_pool", "pointwise_simple", "conv2d_int8_simple"], ["pointwise_smooth", "norm"]),
    (["BertSelfAttention", "LayerNorm", "GELUActivation"], True, ["norm", "attention", "pointwise_smooth"], ["max_pool"]),
    (["aten.scaled_dot_product_attention", "aten.rms_norm"], False, ["attention", "norm"], ["attention_int8", "pointwise_smooth"]),
    (["aten.mean.dim", "graphwright.conv", "relu"], True, ["mean_pool", "conv2d_int8_simple"], ["pointwise_smooth", "norm"]),
    (["BatchNorm2d", "Embedding"], False, [], ["norm"]),
])  # fmt: skip
@pytest.mark.usefixtures("empty")
def test_names_say_which_kernels_are_wanted(names: list[str], quantizing: bool, wanted: list[str], unwanted: list[str]) -> None:
    found = ahead._missing(names, quantizing)
    assert set(wanted) <= set(found) and not set(unwanted) & set(found)


def test_no_process_where_all_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Native, "on_disk", lambda self: True)
    ahead.start(["MaxPool2d"], True)
    assert ahead._running is None
    ahead.finish(["MaxPool2d"], True)


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize("python", ["", "/no/such/python", "/bin/sh"])
def test_no_process_where_there_is_no_python(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", python)
    ahead.start(["MaxPool2d"], False)
    assert ahead._running is None
    ahead.finish(["MaxPool2d"], False)
    ahead.stop()


def test_a_process_that_does_nothing_is_waited_for_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Native, "on_disk", lambda self: False)
    monkeypatch.setattr(Native, "warm", lambda self: compiled.append(self.name))
    monkeypatch.setattr(ahead, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(ahead, "_CHILD", "import time; time.sleep(600)")
    compiled: list[str] = []
    ahead.start(["MaxPool2d", "AdaptiveAvgPool2d", "LayerNorm"], False)
    child = ahead._running
    assert child is not None and child.poll() is None
    ahead.start(["Attention"], False)
    assert ahead._running is child
    ahead.finish(["aten.max_pool2d", "aten.mean.dim", "aten.layer_norm"], False)
    assert compiled == ["norm", "mean_pool"]  # the last first; the first one was the other's to do
    assert child.poll() == -signal.SIGKILL and ahead._running is None


@pytest.mark.parametrize("fits", [True, False])
def test_nothing_runs_on_while_kernels_are_timed_nor_afterwards(fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(ahead, "start", lambda names, quantizing: order.append(f"start {sorted(names)} {quantizing}"))
    monkeypatch.setattr(ahead, "finish", lambda names, quantizing: order.append(f"finish {sorted(names)} {quantizing}"))
    monkeypatch.setattr(ahead, "stop", lambda: order.append("stop"))
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.GELU()).eval(), torch.randn(2, 4 if fits else 5)
    with nullcontext() if fits else pytest.raises(InputError):
        gw.optimize(model, x, progress=lambda line: order.append("timing") if line.startswith("timing kernels") else None)
    assert order[0] == "start ['GELU', 'Linear', 'Sequential'] False" and order[-1] == "stop"
    if fits:
        middle = "finish ['gelu', 'graphwright.linear'] False"
        assert order.index("start ['GELU', 'Linear', 'Sequential'] False") < order.index(middle) < order.index("timing")


@pytest.mark.slow
def test_the_other_process_fills_the_cache(tmp_path: Path) -> None:
    code = (
        "import time\n"
        "from graphwright.kernels import ahead\n"
        "ahead.start(['MaxPool2d'], False)\n"
        "child = ahead._running\n"
        "print(ahead._missing(['MaxPool2d'], False), child.wait(300), ahead._missing(['MaxPool2d'], False))"
    )
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.stdout.strip() == "['max_pool'] 0 []", done.stderr


@pytest.mark.slow
def test_the_other_process_ends_with_this_one(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from graphwright.kernels import ahead\n"
        "ahead.start(['MaxPool2d', 'Attention', 'LayerNorm', 'Linear', 'GELU'], True)\n"
        "print(ahead._running.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=False)
    child = Path("/proc") / done.stdout.strip()
    end = time.monotonic() + 180
    while (child / "cmdline").exists() and b"ahead" in (child / "cmdline").read_bytes() and time.monotonic() < end:
        time.sleep(0.1)
    assert not child.exists() or b"ahead" not in (child / "cmdline").read_bytes()
