"""Symbolic sizes on disk: expressions as small JSON trees. An expression is an integer, or ``["name", argument, ...]`` with
a name from ``FUNCTIONS``, or ``["sym", "s27"]``. Nothing is ever parsed from source text.

SymPy takes most of a second to import: this module is imported where a size is symbolic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
from torch.utils._sympy import functions

from graphwright.errors import SaveError
from graphwright.store.reading import bad, want, want_int

_SYMPY = ("Add", "Mul", "Pow", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not")
_TORCH = (
    "FloorDiv",
    "ModularIndexing",
    "PythonMod",
    "Mod",
    "CleanDiv",
    "CeilToInt",
    "FloorToInt",
    "CeilDiv",
    "IntTrueDiv",
    "FloatTrueDiv",
    "TruncToInt",
    "RoundToInt",
    "ToFloat",
    "Where",
    "PowByNatural",
    "Max",
    "Min",
)
#: Every function that may stand in a size, by name.
FUNCTIONS: dict[str, Any] = {n: getattr(sympy, n) for n in _SYMPY} | {
    n: getattr(functions, n) for n in _TORCH if hasattr(functions, n)
}
_NAMES = {f: n for n, f in FUNCTIONS.items()} | {getattr(sympy, n): n for n in ("Max", "Min", "Mod")}
_ORDERLESS = {"Add", "Mul", "Eq", "Ne", "And", "Or", "Max", "Min"}
_DEPTH, _EXPONENT = 24, 8


def encode(expr: Any, names: Mapping[sympy.Symbol, str] | None = None) -> Any:
    """An expression as JSON; ``names`` says how symbols are called there. Commuting arguments stand in a fixed order.

    Raises:
        SaveError: it holds a function that no file may speak of.
    """
    if isinstance(expr, (int, sympy.Integer)) and not isinstance(expr, bool):
        return int(expr)
    if isinstance(expr, sympy.Symbol):
        return ["sym", names.get(expr, str(expr)) if names else str(expr)]
    if isinstance(expr, sympy.Rational):
        return ["ratio", int(expr.p), int(expr.q)]
    name = _NAMES.get(getattr(expr, "func", None))
    if name is None:
        raise SaveError(
            f"the symbolic size {expr} holds {type(expr).__name__}, which cannot be saved",
            hint="Optimize for fixed sizes (dynamic=None), or report this model.",
        )
    args = [encode(a, names) for a in expr.args]
    return [name, *(sorted(args, key=repr) if name in _ORDERLESS else args)]


def decode(data: Any, names: Mapping[str, sympy.Symbol], where: str, depth: int = 0) -> sympy.Expr:
    """The expression that ``encode`` wrote.

    Raises:
        LoadError: unknown functions or symbols, or powers and depths that nobody writes.
    """
    if type(data) is int:
        return sympy.Integer(want_int(data, where))
    items = want(data, list, where)
    if not items or depth > _DEPTH or len(items) > 256:
        bad(where, "an ill-formed size expression")
    head = want(items[0], str, where)
    if head == "sym":
        if len(items) != 2 or type(items[1]) is not str or items[1] not in names:
            bad(where, f"unknown symbol {str(items[1:])[:40]}")
        return names[items[1]]
    if head == "ratio":
        if len(items) != 3:
            bad(where, "an ill-formed ratio")
        return sympy.Rational(want_int(items[1], where), want_int(items[2], where, 1))
    if head not in FUNCTIONS:
        bad(where, f"unknown function {head[:40]!r} in a size")
    args = [decode(a, names, where, depth + 1) for a in items[1:]]
    if head in ("Pow", "PowByNatural"):
        steep = (
            len(args) != 2
            or not args[1].is_Integer
            or abs(int(args[1])) > _EXPONENT
            or args[0].has(sympy.Pow, functions.PowByNatural)
        )
        if steep or not args[0].free_symbols:
            bad(where, "a power that no size is made of")
    return FUNCTIONS[head](*args)
