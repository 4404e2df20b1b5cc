"""Symbolic sizes on disk: expressions as small JSON trees, and shape environments built anew from what is known.

An expression is an integer, or ``["name", argument, ...]`` with a name from ``FUNCTIONS``, or ``["sym", "s27"]``.
Nothing is ever parsed from source text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
from torch.utils._sympy import functions
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from graphwright.errors import SaveError
from graphwright.ir import Program, Span
from graphwright.store.reading import INT_MAX, Record, bad, want, want_int
from graphwright.store.tensors import DTYPES

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


def _mentioned(data: Any) -> set[Any]:
    """Names of the symbols in an expression's JSON; "opaque" and what is ill-formed counts as an unknown one."""
    if type(data) is int:
        return set()
    if type(data) is not list or not data or data == ["opaque"]:
        return {None}
    if data[0] == "sym":
        return {data[1] if len(data) == 2 and type(data[1]) is str else None}
    return {s for d in data[1:] for s in _mentioned(d)}


# -- shape environments ----------------------------------------------------------------------------------------------


@dataclass
class Scope:
    """The symbols of one program while it is loaded.

    Attributes:
        mode: makes the fake tensors.
        symbols: by the name in the file.
        hints: the size that each symbol stood for when the model was captured.
        spans: what the signature says, by the name of the rebuilt symbol.
    """

    mode: FakeTensorMode
    symbols: dict[str, sympy.Symbol] = field(default_factory=dict)
    hints: dict[sympy.Symbol, sympy.Integer] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)
    _numbers: dict[str, int | None] = field(default_factory=dict)

    @property
    def env(self) -> ShapeEnv:
        return self.mode.shape_env

    def size(self, data: Any, where: str, low: int = 0) -> int | torch.SymInt:
        """A size from its JSON: an integer, or a symbolic one in this program's environment."""
        if type(data) is int:
            return want_int(data, where, low)
        expr = decode(data, self.symbols, where)
        return self.env.create_symintnode(expr, hint=self._known(expr, where, low))

    def at_capture(self, data: Any, where: str) -> int | None:
        """What a size was when the model was captured; None where that is unknown."""
        if type(data) is int:
            return want_int(data, where)
        if type(data) is not list or any(s not in self.symbols for s in _mentioned(data)):
            return None
        key = repr(data)
        if key not in self._numbers:
            self._numbers[key] = self._known(decode(data, self.symbols, where), where, -INT_MAX)
        return self._numbers[key]

    def _known(self, expr: sympy.Expr, where: str, low: int) -> int | None:
        value = expr.xreplace(self.hints)
        number = int(value) if value.is_Integer else None
        if number is not None and not low <= number <= INT_MAX:
            bad(where, f"a size of {str(number)[:24]}")
        return number

    def fake(self, shape: Sequence[int], stride: Sequence[int], dtype: str, device: str = "cpu") -> torch.Tensor:
        """A fake tensor of fixed sizes."""
        bare = torch.empty_strided(shape, stride, dtype=DTYPES[dtype], device="meta")
        return self.mode.fake_tensor_converter.from_meta_and_device(self.mode, bare, torch.device(device))

    def names(self) -> dict[sympy.Symbol, str]:
        """What the rebuilt symbols are called in the file."""
        return {s: n for n, s in self.symbols.items()}


def describe_symbols(program: Program) -> dict[str, Any]:
    """JSON of the symbols in the placeholders' sizes: value at capture, range, and the signature's ``Span``.

    Raises:
        SaveError: a symbol is not bound to a value (unbacked).
    """
    free: dict[str, sympy.Symbol] = {}
    for node in program.placeholders:
        for size in _symints(node.meta.get("val")):
            free.update({str(s): s for s in size.node.expr.free_symbols})
    env = program.fake_mode.shape_env if program.fake_mode is not None else None
    values: Any = {}
    if env is not None:
        values = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    described = {}
    for name in sorted({*free, *program.signature.symbols}):
        symbol, span = free.get(name), program.signature.symbols.get(name)
        entry: dict[str, Any] = {"hint": None, "low": None, "high": None, "span": None}
        if symbol is not None:
            if symbol not in values:
                raise SaveError(f"the input size {name} has no value", hint="Capture the model with an example first.")
            bounds = env.var_to_range.get(symbol)
            entry |= {"hint": int(values[symbol]), "low": _bound(bounds.lower), "high": _bound(bounds.upper)}
        if span is not None:
            entry["span"] = [span.low, span.high, span.multiple]
        described[name] = entry
    return described


def _bound(value: Any) -> int | None:
    return int(value) if getattr(value, "is_Integer", False) else None


def _symints(value: Any) -> list[torch.SymInt]:
    if isinstance(value, torch.Tensor):
        return [s for s in (*value.shape, *value.stride()) if isinstance(s, torch.SymInt)]
    return [value] if isinstance(value, torch.SymInt) else []


def rebuild_symbols(data: Any, where: str) -> Scope:
    """A fresh fake mode whose shape environment knows the symbols of the file under their old names.

    Raises:
        LoadError: values outside their range, or wrong types.
    """
    scope = Scope(FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True))
    # an op that no shape rule knows must not run on real memory, the size of which the file chose
    scope.mode.allow_fallback_kernels = False
    for name, entry in want(data, dict, where).items():
        record = Record(entry, "hint low high span", f"{where}.{name[:40]}")
        known = name
        if record.raw("hint") is not None:
            low = record.integer("low", 0)
            high = None if record.raw("high") is None else record.integer("high", low)
            hint = record.integer("hint", max(low, 2), INT_MAX if high is None else high)
            symbol = _create(scope.env, name, hint, low, high)
            scope.symbols[name], scope.hints[symbol], known = symbol, sympy.Integer(hint), str(symbol)
        if record.raw("span") is not None:
            scope.spans[known] = span = _read_span(record.raw("span"), record.where)
            if record.raw("hint") is not None and span.multiple > 1:
                _assume_multiple(scope, name, span.multiple, record.where)
    return scope


def _read_span(value: Any, where: str) -> Span:
    items = want(value, list, where)
    if len(items) != 3:
        bad(where, "a span is [low, high, multiple]")
    low = want_int(items[0], where, 0)
    high = None if items[1] is None else want_int(items[1], where, low)
    return Span(low, high, want_int(items[2], where, 1))


def _create(env: ShapeEnv, name: str, hint: int, low: int, high: int | None) -> sympy.Symbol:
    """A new size symbol, under its old name where this torch lets us choose the number behind the ``s``."""
    from torch._dynamo.source import ConstantSource  # takes seconds to import, unless a fake mode has done so

    number = int(name[1:]) if name[:1] == "s" and name[1:].isascii() and name[1:].isdigit() and len(name) < 10 else None
    if number is not None and hasattr(env, "_generate_unique_id") and number not in env.unique_ids:
        env.unique_ids.add(number)
        env._generate_unique_id = lambda source_name: number  # type: ignore[method-assign]
    try:
        limits = StrictMinMaxConstraint(warn_only=False, vr=ValueRanges(low, int_oo if high is None else high))
        return env.create_symbol(hint, ConstantSource(f"__size_{name}"), DimDynamic.DYNAMIC, limits)
    finally:
        vars(env).pop("_generate_unique_id", None)


def _assume_multiple(scope: Scope, name: str, multiple: int, where: str) -> None:
    if scope.hints[scope.symbols[name]] % multiple:
        bad(where, f"its value {scope.hints[scope.symbols[name]]} is no multiple of {multiple}")
    torch._check(scope.size(["sym", name], where) % multiple == 0)
