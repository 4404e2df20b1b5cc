"""Our Triton kernels on a GPU: int8 and weight-only matrix products with everything behind them fused, and what quantizes for them.

For each op of ours that a work can be spelled as, every Triton kernel of that op is a candidate of its own; what its ``supports``
refuses can't be built, with its reason. Where a recipe allows half precision, values that are float32 are also read and written in it. Ops that have no Triton kernel (yet) are not offered. With ``TRITON_INTERPRET=1`` in the
environment the same is offered for tensors on the CPU, where Triton's interpreter computes it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright import ops
from graphwright.backends.base import (
    HALF,
    NATIVE,
    Q_LAST,
    ROWS,
    Candidate,
    Format,
    Q,
    QParams,
    Refused,
    Slot,
    Work,
    alike,
    hint,
    served,
)  # fmt: skip
from graphwright.backends.onednn import Matrix, matrix
from graphwright.kernels import gpu
from graphwright.ops.fused import activation_of

#: its kernels are for tensors there (and in the interpreter, see ``backends.devices``)
DEVICES = ("cuda",)

_BYTES = (torch.uint8, torch.int8)
#: quantization arguments of a result that stays floating
_FLOAT = {"scale": 1.0, "zero_point": 0, "low": 0, "high": 0}
#: what rounding each row to 8 bits may cost against the op on floats, and what weights as they are stored may
_ROWS_DB, _WEIGHTS_DB = 20.0, 60.0

Bind = Callable[[tuple[Any, ...]], dict[str, Any]]
Emit = Callable[[Any], Any]


@functools.cache
def reason() -> str | None:
    """None, or why the kernels can't run here."""
    if gpu.unavailable() is not None:
        return gpu.unavailable()
    return None if gpu.wanted() else "there is no CUDA device"


def candidates(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Kernels that serve the work."""
    if reason():
        return
    m = matrix(work)
    if m is not None:
        yield from _matrix(work, m, allowed)
        return
    offer = _OFFERS.get(work.op)
    if offer is not None:
        yield from offer(work, allowed)
    elif activation_of(work.target, work.named):
        yield from _activation(work, allowed)


def kernel(op: str) -> Callable[..., Any] | None:
    """One of our ops by its Triton kernels (plain torch where they refuse); None where it has none, or none can run here."""
    if reason() or not _families(op):
        return None
    from graphwright.kernels.gpu.serving import serve

    return serve(op)


def _families(op: str) -> tuple[Any, ...]:
    from graphwright.kernels.gpu.serving import by_op

    return by_op().get(op, ())


@functools.cache
def _state() -> str:
    """Digest of all kernels' source: a time is that of the code that was timed."""
    folder = Path(str(gpu.__file__)).parent
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in sorted(folder.glob("*.py")))).hexdigest()[:12]


# -- from a kernel to a candidate --------------------------------------------------------------------------------------


def _offer(work: Work, op: str, tag: str, needs: tuple[Format, ...], gives: tuple[Format, ...], precision: str, bind: Bind,
           emit: Emit = lambda result: result, floor_db: float | None = None) -> Iterator[Candidate]:  # fmt: skip
    """A candidate per kernel of an op.

    Args:
        bind: from the work's reads to the op's arguments by name.
        emit: from what the op gives to what the candidate gives.
    """
    for family in _families(op):
        short = family.name.replace("_", "-") + (f"-{tag}" if tag else "")
        yield Candidate(f"triton.{short}", needs, gives, precision, functools.partial(_build, work, family, needs, bind, emit),
                        floor_db=floor_db, version=_state())  # fmt: skip


def _build(work: Work, family: Any, needs: tuple[Format, ...], bind: Bind, emit: Emit) -> Callable[..., Any]:
    """The kernel on the work's reads.

    Raises:
        Refused: it does not serve this work.
    """
    order = _arguments(family.op)

    def arguments(reads: tuple[Any, ...]) -> list[Any]:
        named = bind(reads)
        return [named[k] for k in order]

    why = family.refuses(*arguments(tuple(_outline(work, k, f) for k, f in enumerate(needs))))
    if why is not None:
        raise Refused(why)
    if work.static:
        return lambda *reads: emit(family.run(*arguments(reads)))
    from graphwright.kernels.gpu.serving import serve

    any_kernel = serve(family.op)  # sizes vary: asked at each call

    def run(*reads: Any) -> Any:
        args = arguments(reads)
        return emit(family.run(*args) if family.refuses(*args) is None else any_kernel(*args))

    return run


@functools.cache
def _arguments(op: str) -> tuple[str, ...]:
    target = ops.resolve(op)
    assert target is not None, op
    return tuple(a.name for a in target._schema.arguments)


def _outline(work: Work, index: int, form: Format) -> Any:
    """A read as a kernel is asked about it: without numbers, at the example's sizes."""
    val = work.val(index)
    if not isinstance(val, Tensor):
        return hint(val) if isinstance(val, (int, torch.SymInt)) else val
    shape, q = [hint(s) for s in val.shape], work.read_qparams[index]
    if form.kind == "rows":
        return torch.empty(shape, dtype=torch.int8, device="meta"), torch.empty([*shape[:-1], 1], device="meta")
    dtype = q.dtype if form.kind == "q" and q is not None else HALF.get(form.kind, val.dtype)
    if form.layout == "last":
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
    return torch.empty_strided(shape, [hint(s) for s in val.stride()], dtype=dtype, device="meta")


def _floats(work: Work, allowed: frozenset[str], layout: str = "plain") -> Iterator[tuple[Format, str, torch.dtype]]:
    """Floating forms of what is read and written: format, tag, dtype: the program's own, and halves in the place of float32."""
    yield Format("native", layout), "", work.out.dtype
    if work.out.dtype == torch.float32:
        yield from ((Format(k, layout), f"-{k}", d) for k, d in HALF.items() if k in allowed)


def _outs(work: Work, allowed: frozenset[str], layout: str = "plain") -> Iterator[tuple[Format, Format, str, dict[str, Any]]]:
    """Result forms: format, that of a residual beside it, tag, quantization arguments: floats, and the value's own integers where it has them."""
    for form, tag, dtype in _floats(work, allowed, layout):
        yield form, form, f"f{tag}", {**_FLOAT, "dtype": dtype}
    if work.qparams is not None and work.qparams.dtype in _BYTES:
        yield (Q_LAST if layout == "last" else Q), Format("native", layout), "q", _grid(work.qparams)


def _grid(q: QParams) -> dict[str, Any]:
    return {"scale": q.scale, "zero_point": q.zero_point, "low": q.low, "high": q.high, "dtype": q.dtype}


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
    if q is None or q.dtype not in _BYTES or m.other == m.x:
        return
    weight, scales = _weights(m)
    fixed = {**_behind(m), "weight": weight, "weight_scales": scales, "x_scale": q.scale, "x_zero_point": q.zero_point,
             "x_scales": None, "x_zero_points": None}  # fmt: skip
    for form, beside, tag, grid in _outs(work, allowed):
        bind = _bound(m, {**fixed, **grid})
        yield from _offer(work, "graphwright.linear_int8", f"static-{tag}", _needs(work, m, Q, beside), (form,), "int8", bind)


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

    for form, beside, tag, grid in _outs(work, allowed):
        yield from _offer(work, "graphwright.linear_int8", f"rows-{tag}", _needs(work, m, ROWS, beside), (form,), "int8",
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
    for form, tag, dtype in _floats(work, allowed):
        more = {"dtype": dtype} if "dtype" in _arguments(op) else {}
        yield from _offer(work, op, tag.removeprefix("-"), _needs(work, m, form, form), (form,), "int8", _bound(m, {**fixed, **more}), _cast(dtype), _WEIGHTS_DB)


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

        for form, tag, dtype in _floats(work, allowed):
            yield from _offer(work, "graphwright.linear_w4a8", tag.removeprefix("-"), _needs(work, m, ROWS, form), (form,), "int8",
                              functools.partial(bind, dtype), _cast(dtype), _ROWS_DB)  # fmt: skip


def _as_is(result: Any) -> Any:
    return result


def _cast(dtype: torch.dtype) -> Emit:
    """Results in the dtype that is wanted; a kernel may give float32 alone."""
    return lambda y: y if y.dtype == dtype else y.to(dtype)


def _convolution(work: Work, m: Matrix, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Two-dimensional ones from integers under one scale; the residual as integers where it is read so."""
    q = work.read_qparams[m.x] if work.reads[m.x].quantized else None
    if q is None or q.dtype not in _BYTES or m.rank != 2 or work.val(m.x).dim() != 4 or m.other == m.x:
        return
    weight, scales = _weights(m)
    residual = None
    if m.other is not None and work.reads[m.other].quantized and (found := work.read_qparams[m.other]) is not None and found.dtype in _BYTES:
        residual = found
    fixed = {**_behind(m), "weight": weight, "weight_scales": scales, "x_scale": q.scale, "x_zero_point": q.zero_point,
             "stride": list(m.stride), "padding": list(m.padding), "dilation": list(m.dilation), "groups": m.groups,
             "other_scale": residual.scale if residual else 1.0, "other_zero_point": residual.zero_point if residual else 0}  # fmt: skip
    for given, beside, tag, grid in _outs(work, allowed, "last"):
        bind, form = _bound(m, {**fixed, **grid}), Q_LAST if residual else beside
        yield from _offer(work, "graphwright.conv2d_int8", tag, _needs(work, m, Q_LAST, form), (given,), "int8", bind)


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

    for form, tag, dtype in _floats(work, allowed):
        cast = _cast(dtype)
        if work.rows_wanted:
            op = "graphwright.norm_quantize_rows"
            yield from _offer(work, op, f"rows{tag}", (form,), (ROWS,), "int8", functools.partial(bind, {"want_float": False}), tuple, _ROWS_DB)
            yield from _offer(work, op, f"both{tag}", (form,), (form, ROWS), "int8", functools.partial(bind, {"want_float": True}),
                              lambda found, cast=cast: (cast(found[0]), (found[1], found[2])), _ROWS_DB)  # fmt: skip
        op = "graphwright.norm_quantize"
        yield from _offer(work, op, f"f{tag}", (form,), (form,), form.kind if tag else "f32",
                          functools.partial(bind, {**_FLOAT, "dtype": None, "want_float": True}), lambda found, cast=cast: cast(found[0]))  # fmt: skip
        if work.qparams is not None:
            grid = _grid(work.qparams)
            yield from _offer(work, op, f"q{tag}", (form,), (Q,), "int8", functools.partial(bind, {**grid, "want_float": False}), lambda found: found[0])


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
    for form, tag, _ in _floats(work, allowed):
        needs, tag = (form,) * len(work.reads), tag.removeprefix("-")
        if work.rows_wanted:
            yield from _offer(work, "graphwright.activate_quantize_rows", tag, needs, (ROWS,), "int8", lambda r: {**fixed, **bind(r)}, tuple, _ROWS_DB)
        if work.qparams is not None:
            more = {**fixed, **_grid(work.qparams), "other": None}
            yield from _offer(work, "graphwright.activate_quantize", tag, needs, (Q,), "int8", lambda r, more=more: {**more, **bind(r)})


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

    for op, (form, beside, tag, grid) in itertools.product(("graphwright.attention_int8", "graphwright.attention_int8_qk"), list(_outs(work, allowed))):
        needs = tuple(beside if work.val(k).dtype == torch.float32 else NATIVE for k in range(len(work.reads)))
        yield from _offer(work, op, tag, needs, (form,), "int8", functools.partial(bind, grid), _as_is if form == Q else _cast(grid["dtype"]), _ROWS_DB)


_OFFERS: dict[str, Callable[[Work, frozenset[str]], Iterator[Candidate]]] = {
    "aten.layer_norm": _norm, "aten.rms_norm": _norm, "graphwright.attention_int8": _attention, "aten.mul.Tensor": _product,
}  # fmt: skip
