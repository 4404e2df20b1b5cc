"""``linear_sparse24`` for many rows on NVIDIA GPUs: the product by cuSPARSELt through PyTorch, all that follows by a kernel of ours.

    y = activation(x @ expand(weight, indices)^T + bias + other)

The tensors are those of ``kernels.gpu.linear_sparse24``; the sparse matrix units multiply at up to twice the speed of a dense weight. int8
products come back as int32; those of halves are rounded to halves before bias and residual are added, which is all that cuSPARSELt
offers: sums beyond 65504 overflow in float16. The library's own packed form is made once, by ``pack``. Bound by the matrix units.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphwright.kernel import Cost, Kernel, Sample
from graphwright.kernels import linear_sparse24 as cpu
from graphwright.kernels.common import rows_of
from graphwright.ops.sparse import expand

#: What cuSPARSELt wants of a dtype: (multiples of rows and columns of the weight, multiple of the rows of x).
_MULTIPLES = {torch.float16: (16, 8), torch.bfloat16: (16, 8), torch.int8: (32, 16)}


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight in cuSPARSELt's form, ``stored``, whose layout is its own affair; ``out`` outputs."""

    stored: Tensor
    out: int


def unavailable() -> str | None:
    """None, or why cuSPARSELt can't be used in this process."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is not None or not torch.backends.cusparselt.is_available():
        return "this PyTorch comes without cuSPARSELt"
    major, _ = torch.cuda.get_device_capability()
    return None if major >= 8 else f"compute capability {major}; sparse matrix units come with 8.0"


def pack(weight: Tensor, indices: Tensor) -> Packed:
    """Expand a compressed weight and hand it to cuSPARSELt, once.

    Raises:
        InputError: ``indices`` are not those of such a weight.
    """
    return Packed(torch._cslt_compress(expand(weight.detach(), indices).contiguous()), weight.shape[0])


def operands(x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """x as the right-hand side of cuSPARSELt, ``[i, rows]`` with the inputs of a row adjacent, and the options of the product.

    Rows are padded with zeros to the multiple that the library wants. The result is to be ``[rows, o]``, contiguous.
    """
    rows = rows_of(x).contiguous()
    if short := -rows.shape[0] % _MULTIPLES[x.dtype][1]:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, short))
    return rows.t(), {"transpose_result": True, **({"out_dtype": torch.int32} if x.dtype == torch.int8 else {})}


def product(x: Tensor, packed: Packed) -> Tensor:
    """``[at least the rows of x, o]``: int32 for int8, else x's dtype."""
    right, options = operands(x)
    return torch._cslt_sparse_mm(packed.stored, right, **options)


def apply(x: Tensor, x_scales: Tensor | None, packed: Packed, weight_scales: Tensor | None, *rest: Any) -> Tensor:
    """``run`` with a weight packed ahead; ``rest`` are bias, other, activation, scalars and dtype."""
    from graphwright.kernels.gpu.sparse_epilogue import epilogue

    if not x.numel():
        return x.new_empty((*x.shape[:-1], packed.out), dtype=rest[-1] or torch.float32)
    return epilogue(product(x, packed), x, x_scales, weight_scales, *rest)


def run(x: Tensor, x_scales: Tensor | None, weight: Tensor, indices: Tensor, weight_scales: Tensor | None, *rest: Any) -> Tensor:
    """See ``graphwright.ops.sparse.linear_sparse24``."""
    return apply(x, x_scales, pack(weight, indices), weight_scales, *rest)


def supports(*args: Any) -> str | None:
    if (reason := unavailable()) is not None:
        return reason
    from graphwright.kernels import gpu

    if (reason := gpu.unavailable()) is not None:
        return reason
    if any(isinstance(t, Tensor) and t.device.type not in ("cuda", "meta") for t in args):
        return "a tensor does not lie on CUDA"
    from graphwright.kernels.gpu import linear_sparse24

    return unfit(args[0], args[2]) or linear_sparse24.supports(*args)


def unfit(x: Tensor, weight: Tensor) -> str | None:
    """None, or why cuSPARSELt does not take a weight of this shape and dtype."""
    if x.dtype not in _MULTIPLES:
        return f"x is {x.dtype}; wanted float16, bfloat16 or int8 (float32 would be rounded to tf32)"
    multiple = _MULTIPLES[x.dtype][0]
    if weight.ndim != 2 or weight.shape[0] % multiple or 2 * weight.shape[1] % multiple or not weight.numel():
        return f"a compressed weight of shape {tuple(weight.shape)}; outputs and inputs must be multiples of {multiple} for {x.dtype}"
    return None


def cost(*args: Any) -> Cost:
    return cpu.cost(*args)


def samples() -> Iterator[Sample]:
    half, i8 = torch.float16, torch.int8
    for kind, name in ((half, ""), (i8, " int8")):
        yield cpu.make(f"4096x4096x14336{name}", (4096,), 4096, 14336, kind=kind, bias=False, dtype=half, bench=True)
        yield cpu.make(f"4096x768x3072 gelu{name}", (32, 128), 768, 3072, kind=kind, activation="gelu", dtype=half, bench=True)
    yield cpu.make("33x64x96 int8 silu", (33,), 64, 96, kind=i8, activation="silu", dtype=half, other=half)
    yield cpu.make("3x5x48x32 bf16", (3, 5), 48, 32, kind=torch.bfloat16, dtype=torch.bfloat16)
    yield cpu.make("0x64x32", (0,), 64, 32, kind=half)


def ready(x: Tensor, x_scales: Tensor | None, weight: Tensor, indices: Tensor, weight_scales: Tensor | None, *rest: Any) -> Callable[[], Tensor]:
    """See ``Kernel.ready``."""
    return functools.partial(apply, x, x_scales, pack(weight, indices), weight_scales, *rest)


# Products of halves come back as halves: one rounding more than the reference has.
KERNEL = Kernel("graphwright.linear_sparse24", "cuda", "cusparselt", run, supports, cost, samples, tolerance=(4e-3, 1), ready=ready)
