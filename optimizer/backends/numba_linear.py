"""Our own int8 linear: everything behind the product fused, rows quantized ahead or as they come."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from graphwright.backends import numba_cpu
from graphwright.backends.base import NATIVE, Candidate, Format, Q, QParams, Work
from graphwright.backends.onednn import Matrix, matrix


@functools.cache
def reason() -> str | None:
    """None, or why the kernel can't run here."""
    if numba_cpu.reason():
        return None  # said once, by the module beside
    from graphwright.kernels.vnni import unfit

    return unfit()


def candidates(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Linears with an int8 weight whose input is read quantized: ahead (uint8), or row by row at run time."""
    if "int8" not in allowed or numba_cpu.kernel("graphwright.linear_int8") is None or reason():
        return
    m = matrix(work)
    if m is None or m.conv or m.int_weight is None or not work.is_float or not work.static:
        return
    from graphwright.kernels.linear_int8 import unfit_rest

    w, read = m.int_weight, work.reads[m.x]
    if w.values.dtype != torch.int8 or not w.symmetric or w.axis != 0 or work.val(m.x).dtype != torch.float32:
        return
    other = None if m.other is None else work.val(m.other)
    if unfit_rest(m.activation, w.values.shape[1], other, None) or other is not None and tuple(other.shape) != tuple(work.out.shape):
        return
    outs: list[tuple[Format, str, QParams | None]] = [(NATIVE, "f32", None)]
    if work.qparams is not None and work.qparams.dtype in (torch.uint8, torch.int8):
        outs.append((Q, "q", work.qparams))
    q = work.read_qparams[m.x] if read.quantized else None
    for form, tag, out in outs:
        if q is not None and q.dtype == torch.uint8:
            needs = tuple(Q if k == m.x else NATIVE for k in range(len(work.reads)))
            yield Candidate(f"numba.int8-{tag}", needs, (form,), "int8", functools.partial(_build, m, q, out))
        elif read.rows:
            yield Candidate(f"numba.int8-rows-{tag}", (NATIVE,) * len(work.reads), (form,), "int8",
                            functools.partial(_build, m, None, out), floor_db=20.0)  # fmt: skip


def _build(m: Matrix, q: QParams | None, out: QParams | None) -> Callable[..., Tensor]:
    from graphwright.kernels.linear_int8 import apply, pack

    assert m.int_weight is not None
    packed = pack(m.int_weight.values, m.int_weight.scales, m.bias)
    scale, zero = (1.0, 0) if q is None else (q.scale, q.zero_point)
    grid = (1.0, 0, 0, 0, None) if out is None else (out.scale, out.zero_point, out.low, out.high, out.dtype)
    x, other, name, scalars = m.x, m.other, m.activation, m.scalars
    if other is None:
        return lambda *r: apply(r[x], scale, zero, packed, None, name, scalars, *grid)
    return lambda *r: apply(r[x], scale, zero, packed, r[other], name, scalars, *grid)
