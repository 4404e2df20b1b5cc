"""Reading JSON that nobody vouches for: every field is asked for by name and type, and anything else is refused.

Values that JSON lacks (NaN, infinities) are written as ``{"$float": "nan"}``; a dict with a key that starts with ``$``
as ``{"$dict": [[key, value], ...]}``. Python's own ``NaN`` and ``Infinity`` spellings are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from graphwright.errors import LoadError, SaveError

T = TypeVar("T")

#: Sizes, strides, offsets and literals are 64-bit integers.
INT_MAX = 2**63 - 1


def bad(where: str, what: str) -> NoReturn:
    raise LoadError(f"{where}: {what}")


def dumps(value: Any) -> str:
    """Compact JSON text; the same value always gives the same text."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def loads(text: str | bytes, where: str) -> Any:
    """Strict JSON.

    Raises:
        LoadError: no JSON, a key twice in one object, NaN or Infinity, nested too deeply.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            bad(where, "an object has the same key twice")
        return found

    def constant(name: str) -> NoReturn:
        bad(where, f"{name} is no JSON number")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{where}: no valid JSON ({error})") from None


def want(value: Any, kind: type[T], where: str) -> T:
    """``value``, which is a ``kind`` (exactly: True is no int), or LoadError."""
    if type(value) is not kind:
        bad(where, f"wanted {kind.__name__}, found {_brief(value)}")
    return value


def want_int(value: Any, where: str, low: int = -INT_MAX - 1, high: int = INT_MAX) -> int:
    """An integer within bounds, or LoadError."""
    number = want(value, int, where)
    if not low <= number <= high:
        bad(where, f"{str(number)[:24]} is out of range")
    return number


def want_strings(value: Any, where: str) -> tuple[str, ...]:
    """A list of strings as a tuple, or LoadError."""
    return tuple(want(v, str, f"{where}[{k}]") for k, v in enumerate(want(value, list, where)))


class Record:
    """A JSON object with exactly the expected keys.

    Args:
        value: what the JSON says.
        keys: the keys that it must have; ``"name?"`` may be missing and then reads as None.
        where: the place, for messages.
    """

    def __init__(self, value: Any, keys: str, where: str):
        self.data, self.where = want(value, dict, where), where
        allowed = keys.split()
        for key in allowed:
            if not key.endswith("?") and key not in self.data:
                bad(where, f"{key!r} is missing")
        unknown = sorted(set(self.data) - {k.rstrip("?") for k in allowed})
        if unknown:
            bad(where, f"unknown entry {unknown[0][:80]!r}")

    def raw(self, key: str) -> Any:
        return self.data.get(key)

    def get(self, key: str, kind: type[T]) -> T:
        return want(self.data.get(key), kind, f"{self.where}.{key}")

    def integer(self, key: str, low: int = -INT_MAX - 1, high: int = INT_MAX) -> int:
        return want_int(self.data.get(key), f"{self.where}.{key}", low, high)

    def strings(self, key: str) -> tuple[str, ...]:
        return want_strings(self.data.get(key), f"{self.where}.{key}")


def to_json(value: Any, where: str) -> Any:
    """Plain data (dicts with string keys, lists, strings, numbers, bools, None) as strict JSON; tuples become lists.

    Raises:
        SaveError: anything else; says where.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, (list, tuple)):
        return [to_json(v, f"{where}[{k}]") for k, v in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise SaveError(
                    f"{where} has the key {key!r}, which is no string", hint="Only plain data can be saved."
                )
        items = {k: to_json(v, f"{where}[{k!r}]") for k, v in value.items()}
        return {"$dict": [[k, v] for k, v in items.items()]} if any(k.startswith("$") for k in items) else items
    raise SaveError(
        f"{where} is a {type(value).__name__}, which is no plain data",
        hint="Only dicts with string keys, lists, strings, numbers, booleans and None can be saved.",
    )


def from_json(value: Any, where: str) -> Any:
    """What ``to_json`` wrote.

    Raises:
        LoadError: an unknown ``$`` entry.
    """
    if isinstance(value, list):
        return [from_json(v, where) for v in value]
    if not isinstance(value, dict):
        return value
    if not any(k.startswith("$") for k in value):
        return {k: from_json(v, where) for k, v in value.items()}
    if list(value) == ["$float"]:
        return special_float(value["$float"], where)
    items = want(Record(value, "$dict", where).raw("$dict"), list, where)
    if any(type(i) is not list or len(i) != 2 or type(i[0]) is not str for i in items):
        bad(where, "a $dict is no list of [key, value]")
    if len({i[0] for i in items}) != len(items):
        bad(where, "a $dict has the same key twice")
    return {k: from_json(v, where) for k, v in items}


def special_float(word: Any, where: str) -> float:
    """``"nan"``, ``"inf"`` or ``"-inf"`` as a float."""
    if word not in ("nan", "inf", "-inf"):
        bad(where, f"unknown number {_brief(word)}")
    return float(word)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
