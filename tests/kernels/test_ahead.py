"""Compiling ahead: the right kernels, no thread left behind, and nothing lost where it can't be done."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import graphwright as gw
from graphwright.errors import InputError, InternalError
from graphwright.kernels import ahead
from graphwright.kernels.native import Native


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Native, "on_disk", lambda self: False)


def test_every_sign_speaks_of_a_kernel() -> None:
    assert set(ahead._SIGNS) <= set(ahead._natives())


@pytest.mark.parametrize(("names", "quantizing", "wanted", "unwanted"), [
    (["Conv2d", "ReLU", "MaxPool2d"], False, ["max_pool", "conv2d_winograd_simple"], ["pointwise_simple", "conv2d_int8_simple", "norm", "attention"]),
    (["Conv2d", "ReLU", "MaxPool2d"], True, ["max_pool", "pointwise_simple", "conv2d_int8_simple"],
     ["pointwise_smooth", "norm", "conv2d_winograd_simple"]),
    (["BertSelfAttention", "LayerNorm", "GELUActivation"], True, ["norm", "attention", "pointwise_smooth"], ["max_pool"]),
    (["aten.scaled_dot_product_attention", "aten.rms_norm"], False, ["attention", "norm"], ["attention_int8", "pointwise_smooth"]),
    (["aten.mean.dim", "graphwright.conv", "relu"], True, ["mean_pool", "conv2d_int8_simple"], ["pointwise_smooth", "norm"]),
    (["BatchNorm2d", "Embedding"], False, [], ["norm"]),
])  # fmt: skip
@pytest.mark.usefixtures("empty")
def test_names_say_which_kernels_are_wanted(names: list[str], quantizing: bool, wanted: list[str], unwanted: list[str]) -> None:
    found = ahead._missing(names, quantizing)
    assert set(wanted) <= set(found) and not set(unwanted) & set(found)


def test_no_thread_where_all_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Native, "on_disk", lambda self: True)
    ahead.start(["MaxPool2d"], True)
    assert ahead._running is None
    ahead.finish(["MaxPool2d"], True)


@pytest.mark.usefixtures("empty")
def test_what_is_still_wanted_is_finished_and_the_rest_left(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, str]] = []
    go = threading.Event()

    def warm(self: Native) -> None:
        if threading.current_thread().name == "graphwright-kernels":
            go.wait(60)
        compiled.append((threading.current_thread().name, self.name))

    monkeypatch.setattr(Native, "warm", warm)
    ahead.start(["MaxPool2d", "AdaptiveAvgPool2d", "LayerNorm"], False)
    thread = ahead._running
    assert thread is not None and thread.is_alive()
    ahead.start(["Attention"], False)
    assert ahead._running is thread
    threading.Timer(0.2, go.set).start()
    ahead.finish(["aten.mean.dim"], False)
    assert not thread.is_alive() and ahead._running is None
    assert compiled == [("MainThread", "mean_pool"), ("graphwright-kernels", "max_pool")]


@pytest.mark.usefixtures("empty")
def test_a_kernel_that_fails_is_left_to_whoever_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def warm(self: Native) -> None:
        tried.append(self.name)
        raise InternalError("no")

    monkeypatch.setattr(Native, "warm", warm)
    ahead.start(["MaxPool2d", "LayerNorm"], False)
    thread = ahead._running
    assert thread is not None
    thread.join(60)
    assert tried == ["max_pool", "norm"]
    ahead.finish(["aten.layer_norm"], False)
    assert tried == ["max_pool", "norm", "norm"]


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
def test_the_thread_fills_the_cache_and_ends_with_the_program(tmp_path: Path) -> None:
    code = (
        "from graphwright.kernels import ahead\n"
        "ahead.start(['MaxPool2d', 'Attention', 'LayerNorm', 'Linear', 'GELU'], True)\n"
        "print('end')"
    )
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "end", done.stderr
    left = [f.name for f in tmp_path.rglob("*.kernel")]
    assert len(left) <= 2, left  # the one that it was at, not all of them


def test_a_process_that_forks_while_kernels_are_compiled_can_compile_in_its_child(tmp_path: Path) -> None:
    code = (
        "import os, torch\n"
        "torch.set_num_threads(1)\n"
        "from graphwright.kernels import ahead, softmax\n"
        "ahead.start(['LayerNorm', 'MaxPool2d', 'Attention'], False)\n"
        "child = os.fork()\n"
        "print(softmax.run(torch.zeros(2, 4), None, 1.0, False).sum().item(), flush=True)\n"
        "os._exit(0) if child == 0 else os.waitpid(child, 0)"
    )
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.count("2.0") == 2, done.stderr  # two processes write: lines may meet
