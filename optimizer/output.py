"""What structured outputs come back as where the user's own types are not loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch


class Output(Mapping):
    """What a dataclass, a model output or a cache comes back as where its own type is not loaded.

    Reads like a mapping (entries that are None are left out, as transformers does), by attribute, and by integer index.

    Args:
        type_: the type it stands for, as ``module:name``.
    """

    def __init__(self, type_: str, fields: Mapping[str, Any]):
        object.__setattr__(self, "_type", type_)
        object.__setattr__(self, "_name", type_.rpartition(":")[2].rpartition(".")[2])
        object.__setattr__(self, "_fields", dict(fields))

    def __getattribute__(self, key: str) -> Any:
        if not key.startswith("_"):  # fields come first: a field may be called "keys" or "values"
            fields = object.__getattribute__(self, "__dict__").get("_fields", {})
            if key in fields:
                return fields[key]
        return object.__getattribute__(self, key)

    def __getattr__(self, key: str) -> Any:
        raise AttributeError(f"{self.__dict__.get('_name', 'Output')} has no field {key!r}")

    def __setattr__(self, key: str, value: Any) -> None:
        self._fields[key] = value

    def __getitem__(self, key: str | int | slice) -> Any:
        return self.to_tuple()[key] if isinstance(key, (int, slice)) else self._fields[key]

    def __iter__(self) -> Iterator[str]:
        return (k for k, v in self._fields.items() if v is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        body = ", ".join(f"{k}={_brief(v)}" for k, v in self._fields.items())
        return f"{self._name}({body})"

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def to_tuple(self) -> tuple[Any, ...]:
        """The entries that are not None, in order."""
        return tuple(v for v in self._fields.values() if v is not None)


class NamedOutput(tuple):
    """What a namedtuple comes back as where its own type is not loaded: a tuple with attributes."""

    _fields: tuple[str, ...]

    def __new__(cls, fields: Sequence[str], values: Sequence[Any]) -> Self:
        self = super().__new__(cls, values)
        self._fields = tuple(fields)
        return self

    def __getattr__(self, key: str) -> Any:
        fields = self.__dict__.get("_fields", ())
        if key in fields:
            return self[fields.index(key)]
        raise AttributeError(f"no field {key!r}; the fields are {', '.join(fields)}")

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self._fields, tuple(self)


class CacheOutput(Output):
    """What a key-value cache comes back as without transformers: ``layers[k].keys`` and ``.values``, and its length."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held, 0 for an empty cache."""
        fields = self._fields
        if "layers" not in fields:  # self- and cross-attention
            return fields["self_attention_cache"].get_seq_length(layer_idx)
        layers = fields["layers"]
        return 0 if layer_idx >= len(layers) else layers[layer_idx].keys.shape[-2]


def _brief(value: Any) -> str:
    return f"tensor{list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
