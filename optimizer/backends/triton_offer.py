"""From a Triton kernel to a candidate: what it reads and gives in which forms, and how a call of the op becomes a call of the kernel."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright import ops
from graphwright.backends.base import HALF, Q_LAST, Candidate, Format, Q, QParams, Refused, Work, hint
from graphwright.kernels import gpu

BYTES = (torch.uint8, torch.int8)
#: quantization arguments of a result that stays floating
FLOAT = {"scale": 1.0, "zero_point": 0, "low": 0, "high": 0}
Bind = Callable[[tuple[Any, ...]], dict[str, Any]]
Emit = Callable[[Any], Any]


@functools.cache
def reason() -> str | None:
    """None, or why the kernels can't run here."""
    if gpu.unavailable() is not None:
        return gpu.unavailable()
    return None if gpu.wanted() else "there is no CUDA device"


def families(op: str) -> tuple[Any, ...]:
    """The Triton kernels of one of our ops."""
    from graphwright.kernels.gpu.serving import by_op

    return by_op().get(op, ())


@functools.cache
def _state() -> str:
    """Digest of all kernels' source: a time is that of the code that was timed."""
    folder = Path(str(gpu.__file__)).parent
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in sorted(folder.glob("*.py")))).hexdigest()[:12]


def offer(work: Work, op: str, tag: str, needs: tuple[Format, ...], gives: tuple[Format, ...], precision: str, bind: Bind,
          emit: Emit = lambda result: result, floor_db: float | None = None) -> Iterator[Candidate]:  # fmt: skip
    """A candidate per kernel of an op.

    Args:
        bind: from the work's reads to the op's arguments by name.
        emit: from what the op gives to what the candidate gives.
    """
    for family in families(op):
        short = family.name.replace("_", "-") + (f"-{tag}" if tag else "")
        yield Candidate(f"triton.{short}", needs, gives, precision, functools.partial(_build, work, family, needs, bind, emit),
                        floor_db=floor_db, version=_state())  # fmt: skip


def _build(work: Work, family: Any, needs: tuple[Format, ...], bind: Bind, emit: Emit) -> Callable[..., Any]:
    """The kernel on the work's reads.

    Raises:
        Refused: it does not serve this work.
    """
    order = arguments_of(family.op)

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
def arguments_of(op: str) -> tuple[str, ...]:
    """The names of one of our ops' arguments, in the schema's order."""
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


def floats(work: Work, allowed: frozenset[str], layout: str = "plain") -> Iterator[tuple[Format, str, torch.dtype]]:
    """Floating forms of what is read and written: format, tag, dtype: the program's own, and halves in the place of float32."""
    yield Format("native", layout), "", work.out.dtype
    if work.out.dtype == torch.float32:
        yield from ((Format(k, layout), f"-{k}", d) for k, d in HALF.items() if k in allowed)


def outs(work: Work, allowed: frozenset[str], layout: str = "plain") -> Iterator[tuple[Format, Format, str, dict[str, Any]]]:
    """Result forms: format, that of a residual beside it, tag, quantization arguments: floats, and the value's own integers where it has them."""
    for form, tag, dtype in floats(work, allowed, layout):
        yield form, form, f"f{tag}", {**FLOAT, "dtype": dtype}
    if work.qparams is not None and work.qparams.dtype in BYTES:
        yield (Q_LAST if layout == "last" else Q), Format("native", layout), "q", grid_of(work.qparams)


def grid_of(q: QParams) -> dict[str, Any]:
    return {"scale": q.scale, "zero_point": q.zero_point, "low": q.low, "high": q.high, "dtype": q.dtype}


def as_is(result: Any) -> Any:
    return result


def cast_to(dtype: torch.dtype) -> Emit:
    """Results in the dtype that is wanted; a kernel may give float32 alone."""
    return lambda y: y if y.dtype == dtype else y.to(dtype)
