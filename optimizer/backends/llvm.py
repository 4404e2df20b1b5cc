"""Our own kernels, compiled by LLVM: norms, activations, softmax, attention, pools and residual adds, quantizing as they write."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from graphwright import kernels
from graphwright.backends.base import (
    NATIVE,
    NATIVE_LAST,
    Q_LAST,
    Candidate,
    Format,
    Q,
    QParams,
    Slot,
    Work,
    has_layouts,
)
from graphwright.kernel import Kernel
from graphwright.ops.fused import activation_of

#: its kernels are for tensors there
DEVICES = ("cpu",)
_NO_Q = (1.0, 0, 0, 0, None)


@functools.cache
def _kernels() -> dict[str, Kernel]:
    """One CPU kernel per op; the first of several wins."""
    found: dict[str, Kernel] = {}
    for op, several in kernels.load().items():
        for kernel in several:
            if kernel.device == "cpu" and kernel.backend == "llvm":
                found.setdefault(op, kernel)
    return found


@functools.cache
def reason() -> str | None:
    """None, or why our kernels can't run here."""
    from graphwright.kernels.native import unavailable

    return unavailable()


def kernel(op: str) -> Callable[..., Any] | None:
    """The implementation of one of our ops, or None where it can't run here."""
    found = None if reason() else _kernels().get(op)
    return found.run if found else None


def candidates(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Kernels that serve the work; int8 ones where its value or what it reads is quantized."""
    if reason() or not work.is_float and work.op != "aten.max_pool2d":
        return
    offer = _OFFERS.get(work.op, _activation if activation_of(work.target, work.named) else None)
    if offer is not None:
        yield from offer(work)


def _outs(work: Work) -> Iterator[tuple[Format, str, str, tuple[Any, ...]]]:
    """Result forms: format, tag, precision, the five quantization arguments."""
    yield NATIVE, "f32", "f32", _NO_Q
    q = work.qparams
    if q is not None:
        yield Q, "q", "int8", _grid(q)


def _grid(q: QParams) -> tuple[Any, ...]:
    return q.scale, q.zero_point, q.low, q.high, q.dtype


def _norm(work: Work) -> Iterator[Candidate]:
    run, a = kernel("graphwright.norm_quantize"), work.named
    rms = "rms" in work.op
    weight, bias = a["weight"], a.get("bias")
    if run is None or not isinstance(a["input"], Slot) or isinstance(weight, Slot) or isinstance(bias, Slot):
        return
    shape, eps = a["normalized_shape"], a["eps"]
    if len(shape) != 1 or len(work.reads) != 1 or work.val(0).dtype != torch.float32:
        return
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    for form, tag, precision, grid in _outs(work):
        floats = form == NATIVE
        yield Candidate(f"llvm.norm-{tag}", (NATIVE,), (form,), precision,
                        lambda floats=floats, grid=grid: lambda x: run(x, None, weight, bias, eps, rms, False, floats, *grid)[0])  # fmt: skip
    if work.qparams is not None:
        grid = _grid(work.qparams)
        yield Candidate("llvm.norm-both", (NATIVE,), (NATIVE, Q), "int8",
                        lambda: lambda x: run(x, None, weight, bias, eps, rms, False, True, *grid))  # fmt: skip


def _activation(work: Work) -> Iterator[Candidate]:
    run, found = kernel("graphwright.activate_quantize"), activation_of(work.target, work.named)
    if run is None or found is None or len(work.reads) != 1 or work.val(0).dtype != torch.float32:
        return
    name, scalars = found
    for form, tag, precision, grid in _outs(work):
        build = lambda grid=grid: lambda x: run(x, None, None, name, scalars, *grid)
        yield Candidate(f"llvm.activate-{tag}", (NATIVE,), (form,), precision, build)
        if has_layouts(work.out):
            last = NATIVE_LAST if form == NATIVE else Q_LAST
            yield Candidate(f"llvm.activate-{tag}-last", (NATIVE_LAST,), (last,), precision, build)


def _add(work: Work) -> Iterator[Candidate]:
    """A residual add between quantized values of one shape."""
    run, a = kernel("graphwright.add_quantize"), work.named
    x, other = a["self"], a["other"]
    if run is None or not (isinstance(x, Slot) and isinstance(other, Slot)) or a["alpha"] != 1 or work.qparams is None:
        return
    left, right = work.read_qparams[x.index], work.read_qparams[other.index]
    vals = [work.val(x.index), work.val(other.index)]
    quantized = [work.reads[x.index].quantized, work.reads[other.index].quantized]
    if any(v.dtype != torch.float32 or tuple(v.shape) != tuple(work.out.shape) for v in vals) or not all(quantized):
        return
    assert left is not None and right is not None
    i, j, grid = x.index, other.index, _grid(work.qparams)
    build = lambda: lambda *r: run(r[i], left.scale, left.zero_point, r[j], right.scale, right.zero_point, "none", (), *grid)
    for form in (Q_LAST,) if has_layouts(work.out) else (Q,):
        yield Candidate("llvm.add-q", (form,) * len(work.reads), (form,), "int8", build)


def _softmax(work: Work) -> Iterator[Candidate]:
    run, a = kernel("graphwright.softmax"), work.named
    if run is None or a["dim"] not in (-1, work.out.dim() - 1) or work.val(0).dtype != torch.float32 or work.out.dim() < 2:
        return
    yield Candidate("llvm.softmax", (NATIVE,), (NATIVE,), "f32", lambda: lambda x: run(x, None, 1.0, False))


def _attention(work: Work) -> Iterator[Candidate]:
    """ATen's attention op, or ours with merged heads and perhaps int8 products."""
    run, a = kernel("graphwright.attention"), work.named
    ours = work.op != "aten.scaled_dot_product_attention"
    query, key, value, mask = a["query"], a["key"], a["value"], a["mask" if ours else "attn_mask"]
    causal, factor = (a["causal"], a["attention_scale"]) if ours else (a["is_causal"], a["scale"])
    if run is None or not all(isinstance(t, Slot) and work.val(t.index).dim() == 4 for t in (query, key, value)):
        return
    if (not ours and a["dropout_p"]) or work.val(query.index).dtype != torch.float32:
        return
    merge = bool(ours and a["merge"])

    def pick(t: Any) -> Callable[[tuple[Any, ...]], Any]:
        return (lambda r, i=t.index: r[i]) if isinstance(t, Slot) else (lambda r, t=t: t)

    q, k, v, m = pick(query), pick(key), pick(value), pick(mask)
    runs, floor = [("attention", "f32", run)], None
    if work.op == "graphwright.attention_int8":
        from graphwright.kernels.attention_int8 import unfit

        floor = 20.0  # the others round less than it does
        runs += [] if unfit() else [("attention-int8", "int8", kernel("graphwright.attention_int8"))]
    for name, least, attend in runs:
        for form, tag, precision, grid in _outs(work) if attend is not None else ():
            yield Candidate(f"llvm.{name}-{tag}", (NATIVE,) * len(work.reads), (form,), precision if least == "f32" else least,
                            lambda attend=attend, grid=grid: lambda *r: attend(q(r), k(r), v(r), m(r), factor, causal, merge, *grid),
                            floor_db=floor)  # fmt: skip


def _copy(work: Work) -> Iterator[Candidate]:
    """A reshape or copy whose result is read quantized: one pass reads any strides and writes integers."""
    run = kernel("graphwright.activate_quantize")
    x = work.named.get("self", work.named.get("input"))
    if run is None or work.qparams is None or not isinstance(x, Slot) or work.val(x.index).dtype != torch.float32 or work.val(x.index).dim() > 4:
        return
    grid, index, shape = _grid(work.qparams), x.index, tuple(work.out.shape)
    if not all(isinstance(s, int) for s in shape):
        return
    yield Candidate("llvm.copy-q", (NATIVE,) * len(work.reads), (Q,), "int8",
                    lambda: lambda *r: run(r[index], None, None, "none", (), *grid).reshape(shape))  # fmt: skip


def _max_pool(work: Work) -> Iterator[Candidate]:
    run, a = kernel("graphwright.max_pool2d"), work.named
    if run is None or work.out.dim() != 4 or len(work.reads) != 1:
        return
    pair = lambda v: [int(i) for i in (v if len(v) == 2 else list(v) * 2)]
    size = pair(a["kernel_size"])
    stride = pair(a["stride"]) if a["stride"] else size
    padding, dilation, ceil = pair(a["padding"]), pair(a["dilation"]), a["ceil_mode"]
    build = lambda: lambda x: run(x, size, stride, padding, dilation, ceil)
    if work.is_float:
        yield Candidate("llvm.max-pool-last", (NATIVE_LAST,), (NATIVE_LAST,), "f32", build)
    if work.reads[0].quantized and work.qparams is not None and work.qparams == work.read_qparams[0]:
        yield Candidate("llvm.max-pool-q", (Q_LAST,), (Q_LAST,), "int8", build)


def _pad(work: Work) -> Iterator[Candidate]:
    """Zeros round integers: their zero point, written as they are copied."""
    a, x = work.named, work.named["self"]
    by = list(a["pad"])
    quantized = isinstance(x, Slot) and work.reads[x.index].quantized and work.qparams == work.read_qparams[x.index]
    if not quantized or len(work.reads) != 1 or not work.static or work.out.dim() != 4 or len(by) not in (2, 4) or min(by) < 0:
        return
    if a.get("mode", "constant") != "constant" or a.get("value"):
        return
    left, above = by[0], by[2] if len(by) == 4 else 0
    q, (_, channels, height, width) = work.qparams, work.out.shape
    assert q is not None
    if q.dtype not in (torch.uint8, torch.int8):
        return
    from graphwright.kernels.conv2d_int8 import frame

    yield Candidate("llvm.pad-q", (Q_LAST,), (Q_LAST,), "int8",
                    lambda: lambda x: frame(x, height, width, channels, above, left, q.zero_point))  # fmt: skip


def _mean_pool(work: Work) -> Iterator[Candidate]:
    """Global average over height and width, from integers or floats channels-last."""
    run, a = kernel("graphwright.mean_pool"), work.named
    if run is None or len(work.reads) != 1 or not has_layouts(work.val(0)):
        return
    if work.op == "aten.mean.dim":
        if sorted(d % 4 for d in (a["dim"] or [])) != [2, 3] or a["dtype"] not in (None, torch.float32):
            return
        keep = bool(a["keepdim"])
    elif list(a["output_size"]) != [1, 1]:
        return
    else:
        keep = True
    source = work.read_qparams[0] if work.reads[0].quantized else None
    for form, tag, precision, grid in _outs(work):
        yield Candidate(f"llvm.mean-pool-{tag}-last", (NATIVE_LAST,), (form,), precision,
                        lambda grid=grid: lambda x: run(x, 1.0, 0, keep, *grid))  # fmt: skip
        if source is not None:
            yield Candidate(f"llvm.mean-pool-{tag}-from-q", (Q_LAST,), (form,), "int8",
                            lambda grid=grid: lambda x: run(x, source.scale, source.zero_point, keep, *grid))  # fmt: skip


_OFFERS: dict[str, Callable[[Work], Iterator[Candidate]]] = {
    "aten.layer_norm": _norm, "aten.rms_norm": _norm, "aten.add.Tensor": _add, "aten.softmax.int": _softmax,
    "aten.scaled_dot_product_attention": _attention, "graphwright.attention": _attention,
    "graphwright.attention_int8": _attention, "aten.reshape": _copy,
    "aten.contiguous": _copy, "aten.clone": _copy, "aten.max_pool2d": _max_pool, "aten.mean.dim": _mean_pool,
    "aten.adaptive_avg_pool2d": _mean_pool, "aten.constant_pad_nd": _pad, "aten.pad": _pad,
}  # fmt: skip
