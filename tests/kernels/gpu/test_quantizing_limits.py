"""What the norms, activations and attention in Triton refuse, and that each refusal names its limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphwright.kernels import gpu

if gpu.unavailable() is not None:
    pytest.skip(str(gpu.unavailable()), allow_module_level=True)

HALF, F64 = torch.float16, torch.float64
GRID = (0.1, 0, -127, 127, torch.int8)


def _t(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _heads(*rest: Any, width: int = 64, groups: int = 4, dtype: torch.dtype = HALF, mask: Any = None, out: Any = HALF) -> tuple[Any, ...]:
    kept = _t(2, groups, 9, width, dtype=dtype)
    return _t(2, 8, 5, width, dtype=dtype), kept, kept, mask, None, False, True, 1.0, 0, 0, 0, out


CASES = [
    ("norm_quantize_rows", (_t(2, 16385), None, None, None, 1e-5, True, False, False), "16384"),
    ("norm_quantize_rows", (_t(2, 8), _t(8), None, None, 1e-5, True, False, False), "not broadcast"),
    ("norm_quantize_rows", (_t(2, 8), None, _t(7), None, 1e-5, True, False, False), "(8,)"),
    ("norm_quantize", (_t(2, 8, dtype=F64), None, None, None, 1e-5, True, False, False, *GRID), "float64"),
    ("norm_quantize", (_t(2, 8), None, None, None, 1e-5, True, False, False, 0.1, 0, -9, 9, torch.int32), "int32"),
    ("activate_quantize", (_t(2, 8), _t(3, 2, 8), None, "relu", [], *GRID), "does not broadcast"),
    ("activate_quantize", (_t(2, 8), None, None, "softsign", [], *GRID), "softsign"),
    ("activate_quantize", (_t(2, 8), None, None, "relu", [], 0.1, 0, -999, 999, torch.int8), "255"),
    ("activate_quantize_rows", (_t(2, 8), _t(8), "silu", []), "not broadcast"),
    ("activate_quantize_rows", (_t(2, 8, dtype=torch.int32), None, "silu", []), "int32"),
    ("attention_int8_qk", _heads(width=129), "128"),
    ("attention_int8_qk", _heads(groups=3), "do not belong together"),
    ("attention_int8_qk", _heads(dtype=F64), "float64"),
    ("attention_int8_qk", _heads(mask=_t(5, 8)), "does not broadcast"),
    ("attention_int8_qk", _heads(mask=_t(5, 9, dtype=torch.int32)), "int32"),
    ("attention_int8_qk", _heads(out=torch.int32), "int32"),
]


@pytest.mark.parametrize(("name", "args", "said"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_refusal_names_the_limit(name: str, args: tuple[Any, ...], said: str) -> None:
    assert said in str(gpu.families()[name].supports(*args))


@pytest.mark.parametrize("name", ["norm_quantize_rows", "activate_quantize", "activate_quantize_rows", "attention_int8_qk"])
def test_plans_are_for_one_bucket_of_calls(name: str) -> None:
    """A choice for a bucket may be used for every call in it: the bucket tells dtypes and sizes apart."""
    family = gpu.families()[name]
    buckets = [family.bucket(*args) for _, args in family.ahead()]
    assert len(set(buckets)) == len(buckets)
    for _, args in family.ahead():
        config = next(c for c in family.configs if family.fits(c, *args) is None)
        guess = family.estimate(config, *args)
        least = family.cost(*args)
        assert guess.dram >= least.bytes > 0 and guess.programs > 0 and guess.ops > 0
