"""Symbolic sizes of a program on disk, and shape environments built anew from what is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from graphwright.errors import SaveError
from graphwright.ir import Program, Span
from graphwright.outline import Late, fresh
from graphwright.store.reading import INT_MAX, Record, bad, want, want_int
from graphwright.store.tensors import DTYPES

if TYPE_CHECKING:
    import sympy
    from torch.fx.experimental.symbolic_shapes import ShapeEnv


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
        late: makes the fake tensors, once there is something that only they can answer.
        symbols: by the name in the file.
        hints: the size that each symbol stood for when the model was captured.
        spans: what the signature says, by the name of the rebuilt symbol.
    """

    late: Late = field(init=False)
    symbols: dict[str, sympy.Symbol] = field(default_factory=dict)
    hints: dict[sympy.Symbol, sympy.Integer] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)
    reading: bool = True
    _numbers: dict[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.late = Late(self._make_mode)

    def _make_mode(self) -> Any:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        # an op that no shape rule knows must not run on real memory, the size of which the file chose
        return FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_fallback_kernels=not self.reading)

    def finish(self) -> Any:
        """The file is read: the mode for ``Program``."""
        self.reading = False
        if not self.late.made:
            return self.late
        self.mode.allow_fallback_kernels = True
        return self.mode

    @property
    def mode(self) -> Any:
        return self.late.mode

    @property
    def env(self) -> ShapeEnv:
        return self.mode.shape_env

    def size(self, data: Any, where: str, low: int = 0) -> int | torch.SymInt:
        """A size from its JSON: an integer, or a symbolic one in this program's environment."""
        if type(data) is int:
            return want_int(data, where, low)
        from graphwright.store.expressions import decode

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
            from graphwright.store.expressions import decode

            self._numbers[key] = self._known(decode(data, self.symbols, where), where, -INT_MAX)
        return self._numbers[key]

    def _known(self, expr: sympy.Expr, where: str, low: int) -> int | None:
        value = expr.xreplace(self.hints)
        number = int(value) if value.is_Integer else None
        if number is not None and not low <= number <= INT_MAX:
            bad(where, f"a size of {str(number)[:24]}")
        return number

    def fake(self, shape: Sequence[int], stride: Sequence[int], dtype: str, device: str = "cpu") -> torch.Tensor:
        """A fake tensor of fixed sizes; an outline while there is no mode yet."""
        if self.late.made or device != "cpu":
            return fresh(shape, stride, DTYPES[dtype], torch.device(device), self.mode)
        torch.empty_strided(shape, stride, dtype=DTYPES[dtype], device="meta")  # sizes that no tensor can have
        return self.late.outline(shape, stride, DTYPES[dtype])

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
    scope = Scope()
    for name, entry in want(data, dict, where).items():
        record = Record(entry, "hint low high span", f"{where}.{name[:40]}")
        known = name
        if record.raw("hint") is not None:
            low = record.integer("low", 0)
            high = None if record.raw("high") is None else record.integer("high", low)
            hint = record.integer("hint", max(low, 2), INT_MAX if high is None else high)
            import sympy

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
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StrictMinMaxConstraint
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges

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
