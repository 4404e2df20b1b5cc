"""The op table: one row per op, ATen's and our own.

A row is a reference implementation (oracle, fallback and, under FakeTensor, the shape rule) plus the facts that
several rooms of the compiler need. Importing this package registers every row::

    @op("aten.linear", axes="* i, o i, o -> * o", traits={CONTRACTION})
    def linear(input, weight, bias=None): ...

    row = ops.row(node.target)          # None: the op is opaque; it runs as it is and passes leave it alone
"""

from __future__ import annotations

from graphwright.ops.extend import register_op
from graphwright.ops.registry import (
    CAST,
    COMMUTATIVE,
    CONTRACTION,
    ELEMENTWISE,
    LAYOUT_FREE,
    NORM,
    POOL,
    QUANT,
    RANDOM,
    REDUCTION,
    SHAPE,
    SOFTMAX,
    VIEW,
    OpRow,
    op,
    resolve,
    row,
    rows,
)

__all__ = [
    "CAST", "COMMUTATIVE", "CONTRACTION", "ELEMENTWISE", "LAYOUT_FREE", "NORM", "POOL", "QUANT", "RANDOM", "REDUCTION",
    "SHAPE", "SOFTMAX", "VIEW", "OpRow", "op", "register_op", "resolve", "row", "rows",
]  # fmt: skip


def _load() -> None:
    """Import every file of rows beside this one (a new file of ops needs no list to be edited)."""
    from importlib import import_module
    from pathlib import Path

    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.stem not in ("__init__", "registry"):
            import_module(f"{__name__}.{file.stem}")


_load()
