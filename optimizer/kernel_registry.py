"""Kernels from outside: what ``register_kernel`` takes, checks and keeps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from graphwright import ops
from graphwright.errors import InputError, nearest
from graphwright.kernel import Cost, Kernel, Sample
from graphwright.ops.extend import example

#: Names of Graphwright's own backends: what they offer goes by them, also in saved files.
RESERVED = frozenset({"aten", "onednn", "mkl", "llvm", "llvm_f32", "llvm_int8", "llvm_groups", "inductor", "triton", "graphwright", "native"})
_WORD = re.compile(r"[A-Za-z_][\w\-]*\Z")


@dataclass(frozen=True)
class _Entry:
    kernel: Kernel
    owner: str


_KERNELS: dict[tuple[str, str], _Entry] = {}


def register_kernel(
    kernel: Kernel | str,
    *,
    backend: str = "",
    samples: Iterable[Sample] | Callable[[], Iterable[Sample]] = (),
    supports: Callable[..., str | None] | None = None,
    cost: Callable[..., Cost] | None = None,
    precision: str = "f32",
    tolerance: tuple[float, int] = (0.0, 1),
    device: str = "cpu",
    name: str = "",
) -> Any:
    """Let a kernel of one's own compete wherever its op stands in a model::

        @gw.register_kernel("mylib.softsign", backend="numpy", samples=[gw.Sample("64x256", lambda g: (torch.randn(64, 256, generator=g),))])
        def softsign(x, scale=1.0): ...

        gw.register_kernel(gw.Kernel(...))

    While a model is optimized, it is checked against the op's reference on the site's own shapes, timed beside the other
    candidates, and taken where it is faster; ``explain`` tells what came of it. It takes the op's arguments in the order of the
    op's schema, never writes into them, and gives new tensors.

    Args:
        kernel: the record, or the op for which a function is decorated: one with a row (``gw.register_op`` gives it one), as
            ``"mylib.softsign"``, ``"aten.gelu"``, or with an overload, ``"aten.add.Tensor"``.
        backend: what it is made with or where it comes from; the candidate is called ``backend.name``.
        samples: for ``gw.testing.check_kernel`` and ``graphwright bench kernels``.
        supports: takes the op's arguments, tensors without contents; None, or the reason why not. By default all is served.
        cost: takes the op's arguments; by default bytes and operations follow from the op's row.
        precision, tolerance, device, name: see ``gw.Kernel``.

    Returns:
        The record.

    Raises:
        InputError: the op has no row, a name is reserved or taken, or an argument is unusable.
    """
    if isinstance(kernel, Kernel):
        return _add(kernel)
    if not isinstance(kernel, str):
        raise InputError(f"a {type(kernel).__name__} is no kernel", where="register_kernel", hint='Pass a gw.Kernel, or decorate: @gw.register_kernel("library.op", backend="numpy").')

    def decorate(run: Callable[..., Any]) -> Kernel:
        given = samples if callable(samples) else lambda: iter(tuple(samples))
        return _add(Kernel(kernel, device, backend, run, supports or (lambda *args: None),  # type: ignore[arg-type]
                           cost or (lambda *args: least_cost(kernel, args)), given, tolerance, precision, name))  # type: ignore[arg-type] # fmt: skip

    return decorate


def unregister_kernel(kernel: Kernel) -> None:
    """Undo ``register_kernel``."""
    _KERNELS.pop((kernel.op, kernel.label), None)


def registered(*names: str) -> Iterator[Kernel]:
    """Registered kernels, in order: all, or those of an op by one of its names."""
    return (e.kernel for (op, _), e in list(_KERNELS.items()) if not names or op in names)


def owner_of(kernel: Kernel) -> str:
    """The module that registered a kernel."""
    return _KERNELS[kernel.op, kernel.label].owner


def row_of(op: str) -> ops.OpRow | None:
    """The row of an op by its name, with an overload or without."""
    exact = ops.resolve(op)
    found = ops.row(exact) if exact is not None else None
    return found or next((r for r in ops.rows() if r.name == op), None)


def _add(kernel: Kernel) -> Kernel:
    where = f"register_kernel({kernel.op!r})"
    row = row_of(kernel.op) if isinstance(kernel.op, str) else None
    if row is None:
        hint = nearest(str(kernel.op), {r.name for r in ops.rows()})
        raise InputError(f"op {kernel.op!r} has no row in the op table", where=where,
                         hint=f"{hint + ' ' if hint else ''}An op of your own gets one by gw.register_op.")  # fmt: skip
    if row.reference.__module__ == "graphwright.ops.lowered":
        raise InputError(f"op {kernel.op} never stands in a program: lowering alone makes it", where=where,
                         hint="Register the kernel for the op that a model has, such as aten.layer_norm.")  # fmt: skip
    _check(kernel, where)
    owner, other = getattr(kernel.run, "__module__", None) or "__main__", _KERNELS.get((kernel.op, kernel.label))
    if other is not None and other.owner.partition(".")[0] != owner.partition(".")[0]:
        raise InputError(f"a kernel {kernel.label!r} for {kernel.op} is registered already, by {other.owner}", where=where, hint='Give yours a name: name="...".')
    _KERNELS[kernel.op, kernel.label] = _Entry(kernel, owner)
    return kernel


def _check(kernel: Kernel, where: str) -> None:
    for option, value in (("backend", kernel.backend), *((("name", kernel.name),) if kernel.name else ())):
        if not isinstance(value, str) or not _WORD.match(value):
            raise InputError(f"{option}={value!r} is no name", where=where, hint=f"Say what it is made with, or your library's name: {option}='numpy'.")
    if kernel.backend in RESERVED:
        raise InputError(f"the backend name {kernel.backend!r} is Graphwright's own", where=where, hint="Name it after your library: backend='mylib'.")
    if kernel.device not in ("cpu", "cuda"):
        raise InputError(f"device={kernel.device!r}", where=where, hint="'cpu' or 'cuda'")
    if kernel.precision not in ("f32", "bf16", "fp16", "int8"):
        raise InputError(f"there is no precision {kernel.precision!r}", where=where, hint="'f32' (exact up to rounding), 'bf16', 'fp16' or 'int8'")
    for option in ("run", "supports", "cost", "samples"):
        if not callable(getattr(kernel, option)):
            raise InputError(f"{option} is a {type(getattr(kernel, option)).__name__}, a function is wanted", where=where)
    loose = kernel.tolerance
    if not (isinstance(loose, tuple) and len(loose) == 2 and isinstance(loose[0], (int, float)) and 0 <= loose[0] < 1 and isinstance(loose[1], int) and loose[1] >= 0):
        raise InputError(f"tolerance={loose!r}", where=where, hint="(relative RMS error of floats, steps of integers): (0.01, 1)")


def least_cost(op: str, args: tuple[Any, ...]) -> Cost:
    """What an op's row says that a call moves and computes at the least.

    Args:
        args: the op's arguments in schema order.
    """
    from graphwright import cost

    row = row_of(op)
    assert row is not None
    given, out = example(row, args)
    graph = fx.Graph()

    def node(x: Any) -> Any:
        if isinstance(x, Tensor):
            made = graph.placeholder("x")
            made.meta["val"] = x
            return made
        return type(x)(map(node, x)) if isinstance(x, (list, tuple)) else x

    positional, named = split(row, [node(x) for x in given])
    call = graph.call_function(row.overload, tuple(positional), named)
    call.meta["val"] = out
    found = cost.cost(call)
    return Cost(found.bytes, found.flops)


def split(row: ops.OpRow, args: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments in schema order as an op takes them, complete: positional ones, and those by keyword alone."""
    from graphwright.nodes import normalise

    schema = row.overload._schema.arguments
    named = {a.name: v for a, v in zip(schema, args, strict=False) if a.kwarg_only}
    positional, rest = normalise(row.overload, [v for a, v in zip(schema, args, strict=False) if not a.kwarg_only], named)
    return list(positional), rest


__all__ = ["RESERVED", "least_cost", "owner_of", "register_kernel", "registered", "row_of", "split", "unregister_kernel"]
