"""linear_fp8 around PyTorch's own product, and what samples don't say: NaN, infinity, refusals. Kernels run in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from graphwright.kernels import linear_fp8
from graphwright.ops.fp8 import quantize_fp8

_OVER_SCALED_MM = """
from dataclasses import replace
from graphwright.kernels import linear_fp8
from graphwright.testing.kernels import check_kernel
kernel = linear_fp8.KERNELS[1]
check_kernel(replace(kernel, supports=lambda *args: None), samples=[s for s in kernel.samples() if not s.bench], threads=(1,))
print("right")
"""

_ODD_ROWS = """
import torch
from graphwright.kernels import gpu
family = gpu.families()["linear_fp8"]
g = torch.Generator().manual_seed(0)
x, weight = torch.randn(5, 32, generator=g), torch.randn(16, 32, generator=g).to(torch.float8_e4m3fn)
args = weight, torch.ones(16), None, None, "none", ()
clean = family.run(x, *args, True, torch.float8_e4m3fn, None)
x[1, 3], x[4, 0] = torch.nan, -torch.inf
bad = family.run(x, *args, True, torch.float8_e4m3fn, None)
assert bad[[1, 4]].isnan().all() and torch.equal(bad[[0, 2, 3]], clean[[0, 2, 3]])
assert family.run(x, *args, False, torch.float8_e4m3fn, None).isnan().all()
print("right")
"""


def _interpreted(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False)
    return done.stdout if done.returncode == 0 else done.stdout + done.stderr


def test_both_ends_around_the_product_of_pytorch() -> None:
    assert _interpreted(_OVER_SCALED_MM) == "right\n"


def test_rows_with_nan_or_infinity_give_nan_and_leave_the_others() -> None:
    assert _interpreted(_ODD_ROWS) == "right\n"
    x, weight = torch.randn(3, 16), torch.ones(8, 16).to(torch.float8_e4m3fn)
    x[1, 2] = torch.inf
    y = linear_fp8.run_cpu(x, weight, torch.ones(8), None, None, "none", (), True, torch.float8_e4m3fn, None)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_the_largest_number_of_a_row_is_the_largest_of_its_kind() -> None:
    x = torch.tensor([[1.0, -3.0, 0.5], [0.0, 0.0, 0.0]])
    for kind in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
        q, scales = quantize_fp8(x, True, kind)
        assert q[0, 1].item() == -torch.finfo(kind).max and not q[1].float().any() and scales[1].item() == 1
        torch.testing.assert_close(q.float() * scales, x, rtol=2**-4, atol=0)


def test_refusals_name_what_is_wanted() -> None:
    x, weight = torch.zeros(3, 16), torch.zeros(8, 16).to(torch.float8_e5m2)
    assert "wanted float16" in str(linear_fp8.supports_cpu(x, weight, torch.ones(8), None, None, "none", (), True, torch.float8_e5m2, None))
    assert "CUDA" in str(linear_fp8.supports_cuda(x, weight, torch.ones(8), None, None, "none", (), True, torch.float8_e4m3fn, None))
