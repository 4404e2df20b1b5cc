"""Conditions on sizes that vary, tried on numbers."""

from __future__ import annotations

import builtins
import itertools
import math
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
    """A guard as a function of sizes; what divides by zero does not hold. Sympy itself takes milliseconds for each set of numbers, and thousands are tried."""
    from torch.utils._sympy.printers import PythonPrinter

    names = [str(s) for s in free]
    try:
        found = eval(f"lambda {', '.join(names)}: {PythonPrinter().doprint(expression)}", {"math": math})
    except (LookupError, NotImplementedError, SyntaxError, TypeError):
        found = None
    if found is None or not set(found.__code__.co_names) <= {"math", *dir(math), *dir(builtins)}:  # a function without a form in Python
        found = lambda *sizes: expression.subs(dict(zip(free, sizes, strict=True)))

    def test(*sizes: int) -> bool:
        try:
            return bool(found(*sizes))
        except ZeroDivisionError:
            return False

    return test
