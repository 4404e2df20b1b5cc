"""Trees of numbers: what a generated kernel computes at each element, and per row.

A row is what a region reduces over: any axes of its space, the same for all of its reductions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

#: What a term may be, by dtype: float32 arithmetic, whole numbers (held in 64 bits), or true and false.
FAMILY = {torch.float32: "f", torch.bool: "b", torch.int64: "i", torch.int32: "i", torch.int8: "i", torch.uint8: "i"}
#: The same where halves are read and written too.
WITH_HALVES = FAMILY | {torch.float16: "f", torch.bfloat16: "f"}


class Unfit(Exception):
    """A region that no kernel can be generated for; says why."""


@dataclass(frozen=True, eq=False)
class Term:
    """A number at each element of a region, or one for each of its rows.

    Attributes:
        op: ``"read"``, ``"constant"``, ``"call"``, ``"sum"``, ``"max"`` or ``"cat"``.
        family: ``"f"``, ``"i"`` or ``"b"``.
        args: terms. ``text`` is a format of their names; of a read, the number of the operand; of a constant, how it is written.
        cost: what it takes beyond its operands, an addition being 1.
        bounds: of ``cat``: where each operand begins, and the end.
    """

    op: str
    family: str
    args: tuple[Term, ...] = ()
    text: str = ""
    cost: float = 0.0
    bounds: tuple[int, ...] = ()


def constant(value: Any, family: str) -> Term:
    """A number that is known now."""
    if family == "f":
        value = float(value)
        said = repr(value) if math.isfinite(value) else ("nan" if math.isnan(value) else "inf" if value > 0 else "-inf")
        return Term("constant", "f", text=f"real({said})")
    if family == "b":
        return Term("constant", "b", text=str(bool(value)))
    if isinstance(value, float) and not value.is_integer():
        raise Unfit(f"{value} among whole numbers")
    return Term("constant", "i", text=str(int(value)))


def call(text: str, family: str, *args: Term, cost: float = 1.0) -> Term:
    """A scalar operation: ``text`` with ``{0}``, ``{1}`` for the names of its operands."""
    return Term("call", family, args, text, cost=cost)


def cast(x: Term, family: str) -> Term:
    """The same number in another family."""
    if x.family == family:
        return x
    if x.op == "constant" and x.family != "b":
        return constant(float(x.text[5:-1]) if x.family == "f" else int(x.text), family)
    text = {"bf": "(real(1.0) if {0} else real(0.0))", "bi": "(1 if {0} else 0)", "if": "real({0})", "ib": "{0} != 0",
            "fb": "is_not_zero({0}) != 0"}.get(x.family + family)  # fmt: skip
    if text is None:
        raise Unfit("a float becomes a whole number")
    return call(text, family, x)


def add(x: Term, y: Term) -> Term:
    return call("{0} + {1}", x.family, x, y)


def mul(x: Term, y: Term) -> Term:
    return call("{0} * {1}", x.family, x, y)


def total(x: Term) -> Term:
    """The sum over a row."""
    return Term("sum", "f", (cast(x, "f"),), cost=1.0)


def top(x: Term) -> Term:
    """The largest number of a row."""
    if x.family != "f":
        raise Unfit("a maximum of numbers that are no floats")
    return Term("max", "f", (x,), cost=1.0)


def mean(x: Term, columns: int, less: int = 0) -> Term:
    if columns - less <= 0:
        raise Unfit("a mean of no numbers")
    return mul(total(x), constant(1.0 / (columns - less), "f"))


def centred(x: Term, columns: int) -> Term:
    return call("{0} - {1}", "f", cast(x, "f"), mean(x, columns))


def squared(x: Term) -> Term:
    return call("{0} * {0}", x.family, x)


def root(x: Term) -> Term:
    return call("root({0})", "f", x, cost=6.0)


def inverse(x: Term) -> Term:
    return call("real(1.0) / {0}", "f", x, cost=4.0)


@dataclass(frozen=True)
class Call:
    """One op of a region, its arguments by name: terms for tensors, plain values else.

    Attributes:
        family: of its result.
        columns: how many elements are reduced to one, if it reduces.
    """

    named: dict[str, Any]
    family: str
    columns: int

    def __getitem__(self, name: str) -> Any:
        return self.named.get(name)

    def term(self, name: str, family: str | None = None) -> Term:
        """An argument as a term, in the result's family unless another is asked for."""
        value, family = self.named[name], family or self.family
        return cast(value, family) if isinstance(value, Term) else constant(value, family)

    def together(self, *names: str) -> list[Term]:
        """Arguments in the family that can hold all of them."""
        values = [self.named[n] for n in names]
        kinds = {v.family if isinstance(v, Term) else "b" if isinstance(v, bool) else "i" if isinstance(v, int) else "f" for v in values}
        family = next(f for f in "fib" if f in kinds)
        return [self.term(n, family) for n in names]


Rule = Callable[[Call], Term]
