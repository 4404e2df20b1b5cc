"""Conditions on sizes that vary, tried on numbers."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphwright.ir import Span


def always(expression: Any, found: Mapping[str, Span]) -> bool:
    """Whether a guard on several sizes holds for all sizes within their spans: checked on a grid, small and large."""
    free = sorted(expression.free_symbols, key=str)
    if len(free) > 3 or not all(str(s) in found for s in free):
        return False
    values = []
    for symbol in free:
        span = found[str(symbol)]
        start = -(-max(span.low, 1) // span.multiple) * span.multiple
        tried = [start + k * span.multiple for k in (0, 1, 2, 3, 4, 6, 7, 15, 32, 127, 1000)]
        values.append([v for v in tried if span.high is None or v <= span.high])
    test = as_function(expression, free)
    return all(test(*v) for v in itertools.product(*values))


def as_function(expression: Any, free: Sequence[Any]) -> Callable[..., bool]:
    """A guard as a function of sizes; what divides by zero does not hold. Sympy itself takes milliseconds for each set of numbers, and thousands are tried.

    Nothing is run as text: sizes may have come from a file.
    """
    found = _closure(expression, {s: k for k, s in enumerate(free)})

    def test(*sizes: int) -> bool:
        try:
            return bool(found(sizes) if found is not None else expression.subs(dict(zip(free, sizes, strict=True))))
        except ZeroDivisionError:
            return False

    return test


def _closure(expression: Any, places: Mapping[Any, int]) -> Callable[[Sequence[int]], Any] | None:
    """The value of an expression by those of its parts; None where one of them has no form here."""
    if expression in places:
        return operator.itemgetter(places[expression])
    if expression.is_Integer or expression.is_Boolean and not expression.args:
        number = int(bool(expression)) if expression.is_Boolean else int(expression)
        return lambda sizes: number
    how = _OPS.get(type(expression).__name__)
    if how is None or (how is operator.pow and not (expression.args[1].is_Integer and expression.args[1] >= 0)):
        return None
    parts = [_closure(part, places) for part in expression.args]
    if None in parts:
        return None
    return lambda sizes: how(*[part(sizes) for part in parts])  # type: ignore[misc]


#: What sympy's classes, and torch's own, do to whole numbers.
_OPS: dict[str, Callable[..., Any]] = {
    "Add": lambda *parts: sum(parts), "Mul": lambda *parts: math.prod(parts), "Pow": operator.pow, "FloorDiv": operator.floordiv,
    "Mod": operator.mod, "PythonMod": operator.mod, "Max": max, "Min": min, "Equality": operator.eq, "Unequality": operator.ne,
    "LessThan": operator.le, "StrictLessThan": operator.lt, "GreaterThan": operator.ge, "StrictGreaterThan": operator.gt,
    "And": lambda *parts: all(parts), "Or": lambda *parts: any(parts), "Not": operator.not_,
}  # fmt: skip
