"""Ops by their Triton kernels: for each call the kernel that serves it, else the op's reference.

    serve("graphwright.quantize_rows")(x)       # any x: the kernel, or plain torch where it refuses
    register()                                  # from then on torch.ops.graphwright.quantize_rows(x) does that for tensors on CUDA
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from graphwright import ops
from graphwright.kernels import gpu
from graphwright.kernels.gpu.launch import Family
from graphwright.ops.registry import implement


@functools.cache
def by_op() -> dict[str, tuple[Family, ...]]:
    """The kernels of every op that has any."""
    found: dict[str, tuple[Family, ...]] = {}
    for family in gpu.families().values():
        found[family.op] = (*found.get(family.op, ()), family)
    return found


@functools.cache
def serve(op: str) -> Callable[..., Any]:
    """The op as a function: its kernel expected to be fastest among those that take the arguments; the reference where none does.

    Args:
        op: ``"graphwright.quantize_rows"``.
    """
    families = by_op().get(op, ())
    target = ops.resolve(op)
    row = None if target is None else ops.row(target)
    assert row is not None, op
    reference = row.reference

    def run(*args: Any) -> Any:
        serving = [f for f in families if f.refuses(*args) is None]
        if not serving:
            return reference(*args)
        return (serving[0] if len(serving) == 1 else _expected_best(serving, args)).run(*args)

    run.__doc__ = row.summary
    return run


def _expected_best(families: list[Family], args: tuple[Any, ...]) -> Family:
    """By the model that ranks configs; the first where it knows no GPU."""
    from graphwright.kernels.gpu import machine, tuning

    found = machine.here()
    if found is None:
        return families[0]

    def seconds(family: Family) -> float:
        best = tuning.rank(family, args, found)[0]
        return tuning.predict(best, family.estimate(best, *args), found)

    return min(families, key=seconds)


@functools.cache
def register() -> None:
    """Let the kernels compute their ops for tensors on CUDA; once per process, nothing where there is no such device."""
    import torch

    if torch.cuda.is_available() and gpu.unavailable() is None:
        for op in by_op():
            implement(op, "cuda", serve(op))


__all__ = ["by_op", "register", "serve"]
