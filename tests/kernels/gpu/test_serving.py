"""Ops by their Triton kernels: the kernel where it serves, plain torch where it refuses. In Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from graphwright.kernels import gpu

_CODE = """
import torch
from graphwright import ops
from graphwright.kernels.gpu import serving
from graphwright.kernels.gpu.launch import Family
from graphwright.ops.registry import implement

ran, real = [], Family.under
Family.under = lambda self, config, *args: ran.append(self.name) or real(self, config, *args)
serve = serving.serve("graphwright.quantize_rows")
reference = ops.row(ops.resolve("graphwright.quantize_rows")).reference
x = torch.randn(3, 40)
q, scales = serve(x)
assert ran == ["quantize_rows"] and (q.int() - reference(x)[0].int()).abs().max() <= 1
wide = torch.randn(1, 40_000)
assert torch.equal(serve(wide)[0], reference(wide)[0]) and ran == ["quantize_rows"]

implement("graphwright.quantize_rows", "cpu", serve)   # what register() does for CUDA
torch.ops.graphwright.quantize_rows(x)
assert ran == ["quantize_rows"] * 2
assert {f.op for several in serving.by_op().values() for f in several} == set(serving.by_op())
assert serving._expected_best(list(serving.by_op()["graphwright.quantize_rows"]), (x,)).name == "quantize_rows"
print("fine")
"""


@pytest.mark.skipif(gpu.unavailable() is not None, reason=str(gpu.unavailable()))
def test_the_kernel_serves_and_plain_torch_where_it_refuses() -> None:
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False)
    assert done.returncode == 0 and "fine" in done.stdout, done.stdout + done.stderr[-3000:]
