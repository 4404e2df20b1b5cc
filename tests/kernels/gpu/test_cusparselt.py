"""The cuSPARSELt path without a GPU: what it hands to the library by the library's own shape rule, and its numbers with the library's product
played by a dense one, in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from graphwright.kernels import linear_sparse24_cusparselt as cslt

_PLAYED = """
import torch
from dataclasses import replace
from graphwright.kernels import linear_sparse24_cusparselt as cslt
from graphwright.testing import check_kernel

def compress(dense):
    return dense.clone()

def product(a, b, *, transpose_result=False, out_dtype=None):
    assert b.stride(0) == 1 and b.shape[1] % (16 if a.dtype == torch.int8 else 8) == 0 and transpose_result
    exact = a.double() @ b.double()
    return exact.t().to(out_dtype or a.dtype).contiguous()

torch._cslt_compress, torch._cslt_sparse_mm = compress, product
kernel = replace(cslt.KERNEL, supports=lambda *args: cslt.unfit(args[0], args[2]))
print(check_kernel(kernel, samples=[s for s in cslt.samples() if not s.bench], threads=(1,)), "checked")
"""


@pytest.mark.parametrize(("dtype", "rows", "padded", "out"), [
    (torch.int8, 33, 48, torch.int32), (torch.float16, 33, 40, torch.float16), (torch.bfloat16, 8, 8, torch.bfloat16), (torch.int8, 1, 16, torch.int32),
])  # fmt: skip
def test_operands_are_what_the_library_takes(dtype: torch.dtype, rows: int, padded: int, out: torch.dtype) -> None:
    x = torch.zeros(rows, 2 * 64, dtype=dtype)[:, ::2]
    right, options = cslt.operands(x)
    assert right.shape == (64, padded) and right.stride() == (1, 64)
    stored = torch.empty(96, 36, dtype=dtype, device="meta")
    sums = torch._cslt_sparse_mm(stored, right.to("meta"), **options)
    assert sums.shape == (padded, 96) and sums.dtype == out


def test_numbers_with_a_dense_product_in_its_place() -> None:
    done = subprocess.run([sys.executable, "-c", _PLAYED], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False)
    assert done.returncode == 0 and "3 checked" in done.stdout, done.stdout + done.stderr


def test_refusals_name_the_limit() -> None:
    half, byte = torch.zeros(4, 64, dtype=torch.float16), torch.zeros(4, 64, dtype=torch.int8)
    assert "multiples of 16" in (cslt.unfit(half, torch.zeros(24, 32, dtype=torch.float16)) or "")
    assert "multiples of 32" in (cslt.unfit(byte, torch.zeros(48, 32, dtype=torch.int8)) or "")
    assert "float32" in (cslt.unfit(half.float(), torch.zeros(32, 32)) or "")
    assert cslt.unfit(byte, torch.zeros(64, 32, dtype=torch.int8)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_without_a_device_it_says_so() -> None:
    args = next(s for s in cslt.samples() if not s.bench).args(torch.Generator().manual_seed(0))
    assert cslt.KERNEL.supports(*args) == "there is no CUDA device"


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Where there is a GPU: the real library, on all small samples."""
    from dataclasses import replace

    from graphwright.kernel import Sample
    from graphwright.testing import check_kernel

    if (reason := cslt.unavailable()) is not None:
        pytest.skip(reason)

    def there(sample: Sample) -> Sample:
        return replace(sample, args=lambda g: tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in sample.args(g)))

    check_kernel(cslt.KERNEL, samples=[there(s) for s in cslt.samples() if not s.bench], threads=(1,))
