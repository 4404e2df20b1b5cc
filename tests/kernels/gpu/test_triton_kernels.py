"""Triton kernels without a GPU: numbers by the interpreter, machine code by ahead-of-time compilation. Each in a process of its own,
since one process either interprets or compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graphwright import ops
from graphwright.kernels import gpu

NAMES = sorted(gpu.families()) if gpu.unavailable() is None else []


def _run(*command: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=env, check=False)


def test_triton_is_there() -> None:
    assert gpu.unavailable() is None and NAMES, "the tests need triton: install graphwright[test]"


# The interpreter takes seconds to half a minute for each: two of them stand for all in the quick run.
@pytest.mark.parametrize("name", [n if n in ("quantize_rows", "linear_int8") else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_numbers(name: str) -> None:
    done = _run("graphwright.testing.gpu", name, interpret=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_machine_code(name: str) -> None:
    done = _run("graphwright.kernels.gpu.ahead", name, "--check", "--sample", "2", interpret=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_all_machine_code(name: str) -> None:
    done = _run("graphwright.kernels.gpu.ahead", name, "--check", "--all", interpret=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_numbers_under_every_config(name: str) -> None:
    done = _run("graphwright.testing.gpu", name, "--every", interpret=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize("name", NAMES)
def test_op_is_a_good_citizen(name: str) -> None:
    """Schema, fake tensors and dynamic shapes of the custom op behind each kernel, on its first small sample."""
    family = gpu.families()[name]
    target = ops.resolve(family.op)
    assert target is not None
    sample = next(s for s in family.samples() if not s.bench)
    args = sample.args(torch.Generator().manual_seed(0))
    narrow = any(isinstance(a, torch.Tensor) and a.is_floating_point() and a.element_size() == 1 for a in args)
    # The schema's test multiplies arguments, which torch can't do with 8-bit floats; that none is written is checked with the numbers.
    tests = ("test_faketensor", "test_aot_dispatch_dynamic") if narrow else ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    verdicts = torch.library.opcheck(target, args, test_utils=tests)
    assert set(verdicts.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", NAMES)
def test_configs_and_files(name: str) -> None:
    from graphwright.kernels.gpu import ahead

    family = gpu.families()[name]
    assert len({str(c) for c in family.configs}) == len(family.configs)
    assert (Path(ahead.TABLES) / f"{name}.json").exists(), f"python -m graphwright.kernels.gpu.ahead {name} --update"


def test_a_wrong_kernel_is_found() -> None:
    """The check can fail: a kernel whose scales are off by a percent does not pass."""
    code = (
        "from dataclasses import replace; from graphwright.kernels import gpu; from graphwright.testing import gpu as t\n"
        "from graphwright.kernels.gpu.launch import Plan\n"
        "f = gpu.families()['quantize_rows']\n"
        "class Off(type(f)):\n"
        "    def under(self, config, *args):\n"
        "        q, s = super().under(config, *args)\n"
        "        return q, s * 1.01\n"
        "off = Off(**{k: getattr(f, k) for k in f.__dataclass_fields__})\n"
        "sample, config = next(t.trials(off)); print(t.check(off, sample, config))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False)
    assert done.returncode == 0 and "result 1" in done.stdout, done.stdout + done.stderr
