"""Dataclasses to plain data and back, by their type hints; for data that come from files, hence strict."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any, TypeVar

from graphwright.errors import LoadError

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Dicts, lists, strings, numbers, None; floats that JSON lacks become ``"inf"``, ``"-inf"`` and ``"nan"``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(float(value))
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def from_plain(kind: type[T], data: Any, where: str) -> T:
    """The dataclass that ``to_plain`` took apart. Missing fields take their defaults, unknown ones are ignored.

    Raises:
        LoadError: a wrong type, or a field that is missing and has no default; says where.
    """
    if not isinstance(data, dict):
        raise LoadError(f"{where}: wanted an object, found {type(data).__name__}")
    hints = _hints(kind)
    found = {}
    for f in dataclasses.fields(kind):  # type: ignore[arg-type]
        if f.name in data:
            found[f.name] = _read(hints[f.name], data[f.name], f"{where}.{f.name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise LoadError(f"{where}: {f.name!r} is missing")
    return kind(**found)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _read(hint: Any, data: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return data
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in args:
            return None
        return _read(next(a for a in args if a is not type(None)), data, where)
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast(type, hint), data, where)
    if origin in (list, tuple):
        if not isinstance(data, list):
            raise LoadError(f"{where}: wanted a list, found {type(data).__name__}")
        if origin is tuple and args[-1] is not Ellipsis:
            if len(args) != len(data):
                raise LoadError(f"{where}: wanted {len(args)} entries, found {len(data)}")
            return tuple(_read(a, v, where) for a, v in zip(args, data, strict=True))
        items = [_read(args[0], v, f"{where}[{k}]") for k, v in enumerate(data)]
        return items if origin is list else tuple(items)
    if origin is dict:
        if not isinstance(data, dict):
            raise LoadError(f"{where}: wanted an object, found {type(data).__name__}")
        return {k: _read(args[1], v, f"{where}.{k}") for k, v in data.items()}
    if hint is float and data in ("inf", "-inf", "nan"):
        return float(data)
    allowed = (int, float) if hint is float else hint
    if not isinstance(data, allowed) or (isinstance(data, bool) and hint is not bool):
        raise LoadError(f"{where}: wanted {hint.__name__}, found {type(data).__name__}")
    return float(data) if hint is float else data
