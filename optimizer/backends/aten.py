"""ATen: every op as it stands, and the forms of a value that cheap ops hand through unchanged."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from graphwright.backends.base import (
    HALF,
    NATIVE,
    NATIVE_LAST,
    Q_LAST,
    ROWS,
    Candidate,
    Format,
    Q,
    Refused,
    Slot,
    Work,
    filler,
    has_layouts,
    hint,
)  # fmt: skip
from graphwright.backends.direct import direct, without_defaults
from graphwright.backends.onednn import Matrix, matrix, no_float16
from graphwright.backends.room import append
from graphwright.ops import CAST, CONTRACTION, ELEMENTWISE, LAYOUT_FREE, RANDOM, VIEW
from graphwright.ops.fused import activate

#: ops that move values without arithmetic on them, so that integers under the same QParams pass through
_ANY_DTYPE_VIEWS = {
    "aten.view", "aten.reshape", "aten.transpose.int", "aten.permute", "aten.flatten.using_ints", "aten.squeeze.dim",
    "aten.unsqueeze", "aten.slice.Tensor", "aten.select.int", "aten.expand", "aten.contiguous", "aten.clone", "aten.cat", "aten.squeeze",
    "aten.squeeze.dims", "aten.unflatten.int", "aten.chunk", "aten.split.Tensor", "aten.split_with_sizes", "aten.t", "aten.unbind.int",
}  # fmt: skip
#: ops of the table's view kind that copy, always or at times: worth a stopwatch
COPIES = {"aten.reshape", "aten.flatten.using_ints", "aten.contiguous", "aten.clone", "aten.cat", "aten.repeat", "aten.stack"}
#: views that may be asked of a channels-last value because they give the same numbers whatever the strides
_STRIDE_FREE = {"aten.reshape", "aten.flatten.using_ints", "aten.cat", "aten.permute"}
#: ops that read memory as another type
_REINTERPRETING = {torch.ops.aten.view_as_complex.default, torch.ops.aten.view.dtype}
_POOLS_LAST = {"aten.max_pool2d", "aten.avg_pool2d", "aten.adaptive_avg_pool2d", "aten.mean.dim", "aten.amax"}


#: what it offers runs wherever its tensors lie
DEVICES = ("cpu", "cuda")


def reason() -> str | None:
    """ATen is always there."""
    return None


def candidates(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """The op as it stands first; then channels-last, bfloat16 and quantized hand-through where they are sound."""
    call = lambda: implementation(work)
    if work.op in ("graphwright.attention", "graphwright.attention_int8"):
        yield from _attention(work, allowed)
    if work.device == "cuda" and (m := matrix(work)) is not None:
        yield from _int_mm(work, m)
        yield from _epilogue(work, m)
    floats = [isinstance(work.val(k), Tensor) and work.val(k).dtype == torch.float32 for k in range(len(work.reads))]
    view, shares = work.has(VIEW), may_share(work)
    # ops that merely look at their input are not worth a stopwatch
    several = isinstance(work.out, (tuple, list))
    timed = (not view or work.op in COPIES) and not (several and view) and not isinstance(work.out, (torch.SymInt, int, bool))
    yield Candidate("aten.native", (NATIVE,) * len(work.reads), (NATIVE,), "f32", call, aliases=shares or several or not timed, timed=timed)
    last = _last_needs(work)
    if last is not None:
        yield Candidate("aten.last", last, (NATIVE_LAST,), "f32", call, aliases=shares)
    if work.op in _ANY_DTYPE_VIEWS and _same_qparams(work):
        yield Candidate("aten.q", (Q,) * len(work.reads), (Q,), "int8", call, aliases=True, timed=False)
        if last is not None:
            yield Candidate("aten.q-last", tuple(Q_LAST if f == NATIVE_LAST else Q for f in last), (Q_LAST,), "int8", call, aliases=True)
    if work.op in _STRIDE_FREE and last is None and any(has_layouts(work.val(k)) for k in range(len(work.reads))):
        yield Candidate("aten.from-last", tuple(NATIVE_LAST if has_layouts(work.val(k)) else NATIVE for k in range(len(floats))),
                        (NATIVE,), "f32", call, aliases=True, timed=timed)  # fmt: skip
        if _same_qparams(work):
            yield Candidate("aten.q-from-last", (Q_LAST,) * len(floats), (Q,), "int8", call, aliases=True, timed=timed)
    yield from _halves(work, allowed, last, shares, timed)


def _halves(work: Work, allowed: frozenset[str], last: tuple[Format, ...] | None, shares: bool, timed: bool) -> Iterator[Candidate]:
    """The op in half precision, which its float32 reads and result are held in; constants are converted when it is built."""
    if work.target is not operator.getitem and (work.row is None or work.row.traits & {RANDOM, CAST}):
        return
    outs, reads = _tensors(work.out), [_tensors(work.val(k)) for k in range(len(work.reads))]
    floats = [bool(r) and all(v.dtype == torch.float32 for v in r) for r in reads]
    if not outs or any(v.dtype != torch.float32 for v in outs) or not (any(floats) or _constants(work)):
        return
    if (several := len(outs) > 1 or any(len(r) > 1 for r in reads)) and not (work.has(VIEW) or work.target is operator.getitem):
        return
    for kind in HALF:
        if kind in allowed:
            needs = tuple(Format(kind) if f else NATIVE for f in floats)
            build = functools.partial(_narrow, work, kind)
            yield Candidate(f"aten.{kind}", needs, (Format(kind),), kind, build, aliases=shares or several, timed=timed and not several)
            if last is not None:
                needs = tuple(Format(kind, form.layout) if f else form for f, form in zip(floats, last, strict=True))
                yield Candidate(f"aten.{kind}-last", needs, (Format(kind, "last"),), kind, build, aliases=shares)


def _tensors(value: Any) -> list[Tensor]:
    """A fake value's tensors; none where it holds anything else."""
    several = list(value) if isinstance(value, (tuple, list)) else [value]
    return several if all(isinstance(v, Tensor) for v in several) else []


def _constants(work: Work) -> bool:
    return any(isinstance(v, Tensor) and v.dtype == torch.float32 for v in (*work.args, *work.kwargs.values()))


def _narrow(work: Work, kind: str) -> Callable[..., Any]:
    """The op with its float constants, and dtypes that it names, in half precision.

    Raises:
        Refused: its products would take loops of scalars here.
    """
    dtype = HALF[kind]
    if kind == "fp16" and work.has(CONTRACTION) and work.device == "cpu" and (why := no_float16()):
        raise Refused(why)

    def narrow(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(narrow, value))
        if isinstance(value, Tensor):
            return value.to(dtype) if value.dtype == torch.float32 else value
        return dtype if value is torch.float32 else value

    twin = Work(work.program, work.node, work.reads, narrow(work.args), {k: narrow(v) for k, v in work.kwargs.items()}, None, work.read_qparams)
    run = implementation(twin)
    # some of our own ops give float32 whatever they read
    return run if work.op.startswith("aten.") or not isinstance(work.out, Tensor) else lambda *reads: run(*reads).to(dtype)


def _attention(work: Work, allowed: frozenset[str]) -> Iterator[Candidate]:
    """Our attention op by ATen's own, with the heads merged afterwards where the program wants that."""
    a = work.named
    query, key, value, mask = (a[k] for k in ("query", "key", "value", "mask"))
    if not work.is_float or not all(isinstance(t, Slot) and work.val(t.index).dim() == 4 for t in (query, key, value)):
        return
    factor, causal, merge = a["attention_scale"], a["causal"], bool(a["merge"])
    floor = 20.0 if work.op == "graphwright.attention_int8" else None  # it rounds less than that does
    attend = torch.nn.functional.scaled_dot_product_attention

    def pick(t: Any) -> Callable[[tuple[Any, ...]], Any]:
        return (lambda r, i=t.index: r[i]) if isinstance(t, Slot) else (lambda r, t=t: t)

    q, k, v = pick(query), pick(key), pick(value)

    def build(dtype: torch.dtype | None = None) -> Callable[..., Tensor]:
        m = pick(mask if dtype is None or not isinstance(mask, Tensor) or mask.dtype == torch.bool else mask.to(dtype))

        def run(*r: Any) -> Tensor:
            query, key = q(r), k(r)
            y = attend(query, key, v(r), m(r), 0.0, causal, scale=factor, enable_gqa=key.shape[1] != query.shape[1])
            return y.transpose(1, 2).flatten(2) if merge else y

        return run

    yield Candidate("aten.sdpa", (NATIVE,) * len(work.reads), (NATIVE,), "f32", build, floor_db=floor)
    floats = [work.val(i).dtype == torch.float32 for i in range(len(work.reads))]
    if work.out.dtype != torch.float32 or not all(floats[t.index] for t in (query, key, value)):
        return
    for kind in (k for k in HALF if k in allowed):  # the fast ones on a GPU read halves alone
        needs = tuple(Format(kind) if f else NATIVE for f in floats)
        yield Candidate(f"aten.sdpa-{kind}", needs, (Format(kind),), kind, functools.partial(build, HALF[kind]))


def _epilogue(work: Work, m: Matrix) -> Iterator[Candidate]:
    """A linear with bias and activation in cuBLAS's own epilogue."""
    if m.conv or m.other is not None or m.bias is None or m.activation not in ("relu", "gelu_tanh") or not work.is_float or not work.static:
        return
    if work.val(m.x).dtype != m.weight.dtype:
        return
    x, weight, bias, gelu, shape = m.x, m.weight.detach().t(), m.bias.detach(), m.activation == "gelu_tanh", tuple(work.out.shape)
    run = lambda *r: torch._addmm_activation(bias, r[x].reshape(-1, weight.shape[0]), weight, use_gelu=gelu).view(shape)
    yield Candidate("aten.epilogue", (NATIVE,) * len(work.reads), (NATIVE,), "f32", lambda: run)


def _int_mm(work: Work, m: Matrix) -> Iterator[Candidate]:
    """A linear on integers by cuBLAS's product of int8, scales, bias and activation after it; rows under a scale each."""
    w = m.int_weight
    if w is None or m.conv or not w.symmetric or w.values.dtype != torch.int8 or w.axis != 0 or w.scales.ndim != 1 or not work.is_float:
        return
    read, (out, wide) = work.reads[m.x], w.values.shape
    if not (read.rows or read.even) or wide % 8 or out % 8 or not work.static or work.val(m.x).numel() // max(wide, 1) <= 16:
        return  # torch._int_mm asks for that
    weight, scales = w.values.detach().t(), w.scales.detach().float().expand(out)
    bias = None if m.bias is None else m.bias.detach().float()
    x, other, name, scalars, dtype = m.x, m.other, m.activation, m.scalars, work.out.dtype

    def run(*r: Any) -> Tensor:
        q, rows = r[x]
        y = torch._int_mm(q.reshape(-1, wide), weight).float().view(*q.shape[:-1], out) * (rows * scales)
        y = y if bias is None else y + bias
        return activate(y if other is None else y + r[other].float(), name, scalars).to(dtype)

    needs = tuple(ROWS if k == x else NATIVE for k in range(len(work.reads)))
    if other != x:
        yield Candidate("aten.int8-mm", needs, (NATIVE,), "int8", lambda: run, floor_db=20.0)


def may_share(work: Work) -> bool:
    """Whether the op's result may lie in the memory of what it reads: views, casts that cast nothing, dropout in eval mode."""
    if work.row is None or work.has(VIEW) or work.has(CAST) or work.has(RANDOM):
        return True
    schema = getattr(work.target, "_schema", None)
    return schema is None or any(r.alias_info is not None for r in schema.returns)


def implementation(work: Work) -> Callable[..., Any]:
    """Call the op on its reads, constants filled in."""
    # a kernel may give other strides than the op it stands for: what asks for particular ones must not fail, or misread
    target = torch.ops.aten.reshape.default if work.op == "aten.view" else work.target
    if work.op == "aten.as_strided":
        return _as_strided(work)
    if work.target in _REINTERPRETING:
        return _reinterpreting(work)
    if work.op == "graphwright.cache_append":
        target = append
    kwargs = without_defaults(target, work.kwargs)
    target, count = direct(target), sum(isinstance(a, Slot) for a in work.args)
    in_order = all(isinstance(a, Slot) and a.index == k for k, a in enumerate(work.args[:count]))
    if count and count == len(work.reads) and in_order:  # what is read, then constants
        rest = work.args[count:]
        if not rest and not kwargs:
            return target
        return (lambda *reads: target(*reads, *rest, **kwargs)) if kwargs else (lambda *reads: target(*reads, *rest))
    fill = filler(work.args, kwargs)

    def run(*reads: Any) -> Any:
        args, kwargs = fill(*reads)
        return target(*args, **kwargs)

    return run


def _reinterpreting(work: Work) -> Callable[..., Any]:
    """Reading memory as another type takes strides that allow it: the kernel before may have given others."""
    fill = filler(work.args, work.kwargs)

    def run(*reads: Any) -> Any:
        (x, *rest), kwargs = fill(*reads)
        step = max(1, rest[0].itemsize // x.itemsize) if rest else 2
        fits = not x.dim() or (x.stride(-1) == 1 and not x.storage_offset() % step and not any(s % step for s in x.stride()[:-1]))
        return work.target(x if fits else x.contiguous(), *rest, **kwargs)

    return run


def _as_strided(work: Work) -> Callable[..., Any]:
    """``as_strided`` reads memory: its input first gets the strides that the IR gave it."""
    fill, val = filler(work.args, work.kwargs), work.val(0)
    shape, strides = [hint(s) for s in val.shape], [hint(s) for s in val.stride()]

    def run(*reads: Any) -> Any:
        (x, *rest), kwargs = fill(*reads)
        if list(x.stride()) != strides and list(x.shape) == shape:
            x = torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device).copy_(x)
        return work.target(x, *rest, **kwargs)

    return run


def _last_needs(work: Work) -> tuple[Format, ...] | None:
    """Formats of the reads for a channels-last run, or None where the op can't be trusted to keep the layout."""
    if not has_layouts(work.out):
        return None
    shape = tuple(work.out.shape)
    if work.op in _POOLS_LAST and work.reads and has_layouts(work.val(0)):
        return (NATIVE_LAST,) + (NATIVE,) * (len(work.reads) - 1)
    if work.op == "aten.cat":
        return (NATIVE_LAST,) * len(work.reads) if all(has_layouts(work.val(k)) for k in range(len(work.reads))) else None
    if not (work.has(ELEMENTWISE) or work.has(LAYOUT_FREE)):
        return None
    needs = [NATIVE_LAST if has_layouts(v) and tuple(v.shape) == shape else NATIVE
             for v in (work.val(k) for k in range(len(work.reads)))]  # fmt: skip
    others_small = all(f == NATIVE_LAST or not isinstance(work.val(k), Tensor) or work.val(k).dim() in (0, work.out.dim()) for k, f in enumerate(needs))
    return tuple(needs) if NATIVE_LAST in needs and others_small else None


def _same_qparams(work: Work) -> bool:
    """All reads are quantized reads under the parameters of the result."""
    return bool(work.reads) and work.qparams is not None and all(
        r.quantized and q == work.qparams for r, q in zip(work.reads, work.read_qparams, strict=True)
    )
