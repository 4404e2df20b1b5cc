"""Our Triton kernels on a GPU: int8 and weight-only matrix products with everything behind them fused, and what quantizes for them.

For each op of ours that a work can be spelled as, every Triton kernel of that op is a candidate of its own; what its ``supports``
refuses can't be built, with its reason. Where a recipe allows half precision, values that are float32 are also read and written
in it. Ops that have no Triton kernel (yet) are not offered. With ``TRITON_INTERPRET=1`` in the environment the same is offered
for tensors on the CPU, where Triton's interpreter computes it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.backends.base import (
    NATIVE,
    Q_LAST,
    ROWS,
    Candidate,
    Format,
    Q,
    Slot,
    Work,
    alike,
    served,
)  # fmt: skip
from graphwright.backends.onednn import Matrix, matrix
from graphwright.backends.triton_offer import (
    BYTES,
    FLOAT,
    Bind,
    arguments_of,
    as_is,
    cast_to,
    families,
    floats,
    grid_of,
    offer,
    outs,
    reason,
)  # fmt: skip
from graphwright.ops.fused import activation_of

#: its kernels are for tensors there (and in the interpreter, see ``backends.devices``)
DEVICES = ("cuda",)
#: what rounding each row to 8 bits may cost against the op on floats, and what weights as they are stored may
_ROWS_DB, _WEIGHTS_DB = 20.0, 60.0


def candidates(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Kernels that serve the work."""
    if reason():
        return
    m = matrix(work)
    if m is not None:
        yield from _matrix(work, m, allowed)
        return
    several = _OFFERS.get(work.op)
    if several is not None:
        yield from several(work, allowed)
    elif activation_of(work.target, work.named):
        yield from _activation(work, allowed)


def kernel(op: str) -> Callable[..., Any] | None:
    """One of our ops by its Triton kernels (plain torch where they refuse); None where it has none, or none can run here."""
    if reason() or not families(op):
        return None
    from graphwright.kernels.gpu.serving import serve

    return serve(op)


# -- products ----------------------------------------------------------------------------------------------------------


def _matrix(work: Work, m: Matrix, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Linears and convolutions whose weight is stored as integers."""
    w = m.int_weight
    if "int8" not in allowed or w is None or not work.is_float or not served(work.val(m.x)):
        return
    if w.axis != 0 or m.other is not None and not alike(work.val(m.other), work.out):
        return
    if w.bits == 4 and not m.conv and not work.reads[m.x].quantized:
        yield from _four_bits(work, m, allowed)
    if w.values.dtype != torch.int8:
        return
    if w.scales.ndim != 1:
        if not m.conv and w.scales.ndim == 2:
            yield from _groups(work, m, allowed)
    elif m.conv:
        yield from _convolution(work, m, allowed) if w.symmetric else ()
    elif work.reads[m.x].quantized:
        yield from _static(work, m, allowed) if w.symmetric else ()
    elif work.reads[m.x].rows or work.reads[m.x].even:
        yield from _rows(work, m, allowed) if w.symmetric else ()
    else:
        yield from _weight_only(work, m, allowed)


def _weights(m: Matrix) -> tuple[Tensor, Tensor]:
    """Integers and a scale for each output channel."""
    assert m.int_weight is not None
    values, scales = m.int_weight.values.detach(), m.int_weight.scales.detach().float()
    return values, scales.expand(values.shape[0]).contiguous() if scales.numel() == 1 else scales.contiguous()


def _behind(m: Matrix) -> dict[str, Any]:
    """What follows the product, constants alone."""
    return {"bias": None if m.bias is None else m.bias.detach(), "activation": m.activation, "scalars": list(m.scalars)}


def _needs(work: Work, m: Matrix, x: Format, other: Format = NATIVE) -> tuple[Format, ...]:
    return tuple(x if k == m.x else other if k == m.other else NATIVE for k in range(len(work.reads)))


def _static(work: Work, m: Matrix, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Linears that read integers under one scale."""
    q = work.read_qparams[m.x]
    if q is None or q.dtype not in BYTES or m.other == m.x:
        return
    weight, scales = _weights(m)
    fixed = {**_behind(m), "weight": weight, "weight_scales": scales, "x_scale": q.scale, "x_zero_point": q.zero_point,
             "x_scales": None, "x_zero_points": None}  # fmt: skip
    for form, beside, tag, grid in outs(work, allowed):
        bind = _bound(m, {**fixed, **grid})
        yield from offer(work, "graphwright.linear_int8", f"static-{tag}", _needs(work, m, Q, beside), (form,), "int8", bind)


def _rows(work: Work, m: Matrix, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Linears whose input is quantized row by row at run time: about zero, whatever the program says, so that a scale is all a row needs."""
    if m.other == m.x:
        return
    weight, scales = _weights(m)
    fixed = {**_behind(m), "weight": weight, "weight_scales": scales, "x_scale": 1.0, "x_zero_point": 0, "x_zero_points": None}

    at, other = m.x, m.other  # not m itself: it holds the weight as floats

    def bind(grid: dict[str, Any], r: tuple[Any, ...]) -> dict[str, Any]:
        x, x_scales = r[at]
        return {**fixed, **grid, "x": x, "x_scales": x_scales, "other": None if other is None else r[other]}

    for form, beside, tag, grid in outs(work, allowed):
        yield from offer(work, "graphwright.linear_int8", f"rows-{tag}", _needs(work, m, ROWS, beside), (form,), "int8",
                          functools.partial(bind, grid), floor_db=_ROWS_DB)  # fmt: skip


def _bound(m: Matrix, fixed: dict[str, Any]) -> Bind:
    """The arguments of a call: input and residual from the reads, the rest as it is."""
    x, other = m.x, m.other  # not m itself: it holds the weight as floats
    return lambda r: {**fixed, "x": r[x], "other": None if other is None else r[other]}


def _weight_only(work: Work, m: Matrix, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Linears with float inputs and a scale for each output channel: one group as long as the row."""
    w = m.int_weight
    assert w is not None
    weight, scales = _weights(m)
    if w.symmetric:
        yield from _by_floats(work, m, allowed, "graphwright.linear_w8", {**_behind(m), "weight": weight, "weight_scales": scales})
    points = None if w.symmetric else w.zero_points.detach().float().expand(scales.shape)[:, None].contiguous()  # type: ignore[union-attr]
    fixed = {**_behind(m), "weight": weight, "scales": scales[:, None], "zero_points": points, "group": weight.shape[1]}
    yield from _by_floats(work, m, allowed, "graphwright.linear_w8_groups", fixed)


def _by_floats(work: Work, m: Matrix, allowed: frozenset[str], op: str, fixed: dict[str, Any]) -> Iterator[Candidate]:
    """Linears that read floats, whose weight is stored as integers."""
    for form, tag, dtype in floats(work, allowed):
        more = {"dtype": dtype} if "dtype" in arguments_of(op) else {}
        yield from offer(work, op, tag.removeprefix("-"), _needs(work, m, form, form), (form,), "int8", _bound(m, {**fixed, **more}), cast_to(dtype), _WEIGHTS_DB)


def _groups(work: Work, m: Matrix, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Linears with float inputs and a scale for every so many weights of a row."""
    w = m.int_weight
    assert w is not None
    (out, wide), (rows, count) = w.values.shape, w.scales.shape
    if rows != out or wide % count or work.reads[m.x].quantized or work.reads[m.x].rows or work.reads[m.x].even:
        return
    points = None if w.symmetric else w.zero_points.detach().float()  # type: ignore[union-attr]
    fixed = {**_behind(m), "weight": w.values.detach(), "scales": w.scales.detach(), "zero_points": points, "group": wide // count}
    yield from _by_floats(work, m, allowed, "graphwright.linear_w8_groups", fixed)


def _four_bits(work: Work, m: Matrix, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Linears with a weight of 4-bit numbers: by float inputs, or by rows of int8 about zero."""
    w, read, at, other = m.int_weight, work.reads[m.x], m.x, m.other
    assert w is not None
    points = None if w.zero_points is None else w.zero_points.detach().float()
    fixed = {**_behind(m), "weight": w.values.detach(), "scales": w.scales.detach(), "zero_points": points, "group": w.group}
    if not read.rows and not read.even:
        yield from _by_floats(work, m, allowed, "graphwright.linear_w4", fixed)
    elif other != at:

        def bind(dtype: torch.dtype, r: tuple[Any, ...]) -> dict[str, Any]:
            x, x_scales = r[at]
            return {**fixed, "dtype": dtype, "x": x, "x_scales": x_scales, "other": None if other is None else r[other]}

        for form, tag, dtype in floats(work, allowed):
            yield from offer(work, "graphwright.linear_w4a8", tag.removeprefix("-"), _needs(work, m, ROWS, form), (form,), "int8",
                              functools.partial(bind, dtype), cast_to(dtype), _ROWS_DB)  # fmt: skip


def _convolution(work: Work, m: Matrix, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Two-dimensional ones from integers under one scale; the residual as integers where it is read so."""
    q = work.read_qparams[m.x] if work.reads[m.x].quantized else None
    if q is None or q.dtype not in BYTES or m.rank != 2 or work.val(m.x).dim() != 4 or m.other == m.x:
        return
    weight, scales = _weights(m)
    residual = None
    if m.other is not None and work.reads[m.other].quantized and (found := work.read_qparams[m.other]) is not None and found.dtype in BYTES:
        residual = found
    fixed = {**_behind(m), "weight": weight, "weight_scales": scales, "x_scale": q.scale, "x_zero_point": q.zero_point,
             "stride": list(m.stride), "padding": list(m.padding), "dilation": list(m.dilation), "groups": m.groups,
             "other_scale": residual.scale if residual else 1.0, "other_zero_point": residual.zero_point if residual else 0}  # fmt: skip
    for given, beside, tag, grid in outs(work, allowed, "last"):
        bind, form = _bound(m, {**fixed, **grid}), Q_LAST if residual else beside
        yield from offer(work, "graphwright.conv2d_int8", tag, _needs(work, m, Q_LAST, form), (given,), "int8", bind)


# -- what stands between products --------------------------------------------------------------------------------------


def _norm(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Norms over the last axis: float, under one scale, or row by row, with the floats beside the integers where others read them."""
    a = work.named
    weight, bias, shape = a["weight"], a.get("bias"), a["normalized_shape"]
    if not work.is_float or len(shape) != 1 or len(work.reads) != 1 or not isinstance(a["input"], Slot) or isinstance(weight, Slot) or isinstance(bias, Slot):
        return
    eps = torch.finfo(work.out.dtype).eps if a["eps"] is None else a["eps"]
    fixed = {"residual": None, "weight": weight, "bias": bias, "eps": eps, "rms": "rms" in work.op, "want_sum": False}

    def bind(more: dict[str, Any], r: tuple[Any, ...]) -> dict[str, Any]:
        return {**fixed, **more, "x": r[0]}

    for form, tag, dtype in floats(work, allowed):
        cast = cast_to(dtype)
        if work.rows_wanted:
            op = "graphwright.norm_quantize_rows"
            yield from offer(work, op, f"rows{tag}", (form,), (ROWS,), "int8", functools.partial(bind, {"want_float": False}), tuple, _ROWS_DB)
            yield from offer(work, op, f"both{tag}", (form,), (form, ROWS), "int8", functools.partial(bind, {"want_float": True}),
                              lambda found, cast=cast: (cast(found[0]), (found[1], found[2])), _ROWS_DB)  # fmt: skip
        op = "graphwright.norm_quantize"
        yield from offer(work, op, f"f{tag}", (form,), (form,), form.kind if tag else "f32",
                          functools.partial(bind, {**FLOAT, "dtype": None, "want_float": True}), lambda found, cast=cast: cast(found[0]))  # fmt: skip
        if work.qparams is not None:
            grid = grid_of(work.qparams)
            yield from offer(work, op, f"q{tag}", (form,), (Q,), "int8", functools.partial(bind, {**grid, "want_float": False}), lambda found: found[0])


def _activation(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Elementwise functions whose value is read as integers: one pass reads floats and writes them."""
    found = activation_of(work.target, work.named)
    if found is None or len(work.reads) != 1 or not work.is_float or not served(work.val(0)):
        return
    name, scalars = found
    yield from _written(work, allowed, {"activation": name, "scalars": list(scalars), "gate": None}, lambda r: {"x": r[0]})


def _product(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Products of two values of one shape, such as a gate's, that are read as integers."""
    a = work.named
    x, gate = a["self"], a["other"]
    if not work.is_float or not (isinstance(x, Slot) and isinstance(gate, Slot)) or not all(alike(work.val(s.index), work.out) for s in (x, gate)):
        return
    i, j = x.index, gate.index
    if all(work.val(k).dtype == work.out.dtype for k in (i, j)):
        yield from _written(work, allowed, {"activation": "none", "scalars": []}, lambda r: {"x": r[i], "gate": r[j]})


def _written(work: Work, allowed: frozenset[str], fixed: dict[str, Any], bind: Bind) -> Iterator[Candidate]:
    for form, tag, _ in floats(work, allowed):
        needs, tag = (form,) * len(work.reads), tag.removeprefix("-")
        if work.rows_wanted:
            yield from offer(work, "graphwright.activate_quantize_rows", tag, needs, (ROWS,), "int8", lambda r: {**fixed, **bind(r)}, tuple, _ROWS_DB)
        if work.qparams is not None:
            more = {**fixed, **grid_of(work.qparams), "other": None}
            yield from offer(work, "graphwright.activate_quantize", tag, needs, (Q,), "int8", lambda r, more=more: {**more, **bind(r)})


def _attention(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Attention with int8 products, where the program has it so; one that rounds queries and keys alone will do as well."""
    a = work.named
    query, key, value, mask = (a[k] for k in ("query", "key", "value", "mask"))
    if not work.is_float or not all(isinstance(t, Slot) and work.val(t.index).dim() == 4 for t in (query, key, value)):
        return
    tensors = {"query": query, "key": key, "value": value, "mask": mask}
    fixed = {k: a[k] for k in ("attention_scale", "causal", "merge")}

    def bind(grid: dict[str, Any], r: tuple[Any, ...]) -> dict[str, Any]:
        return {**fixed, **grid, **{k: r[t.index] if isinstance(t, Slot) else t for k, t in tensors.items()}}

    for op, (form, beside, tag, grid) in itertools.product(("graphwright.attention_int8", "graphwright.attention_int8_qk"), list(outs(work, allowed))):
        needs = tuple(beside if work.val(k).dtype == torch.float32 else NATIVE for k in range(len(work.reads)))
        yield from offer(work, op, tag, needs, (form,), "int8", functools.partial(bind, grid), as_is if form == Q else cast_to(grid["dtype"]), _ROWS_DB)


_OFFERS: dict[str, Callable[[Work, frozenset[str]], Iterator[Candidate]]] = {
    "aten.layer_norm": _norm, "aten.rms_norm": _norm, "graphwright.attention_int8": _attention, "aten.mul.Tensor": _product,
}  # fmt: skip
