"""Putting structured values together again: from a ``Spec`` (see ``graphwright.structure``) and tensors.

Where the user's own type is not loaded, ``Output`` and its kin take its place.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections import OrderedDict, UserDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch

PAIR = "transformers.cache_utils:EncoderDecoderCache"
CACHES = ("transformers.cache_utils:DynamicCache", PAIR)
LAYERS = ("transformers.cache_utils:DynamicLayer", "transformers.cache_utils:DynamicSlidingWindowLayer")
SIMPLE = {"bool": bool, "int": int, "float": float, "str": str}


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


# -- building --------------------------------------------------------------------------------------------------------


def _build_constant(spec: Any, leaves: Iterator[Any]) -> Any:
    kind, value = str(spec.type), spec.value
    if kind in SIMPLE:
        return SIMPLE[kind](value)
    if kind == "device":
        return torch.device(value)
    if kind.startswith("enum "):
        found = _loaded(kind[5:], enum.Enum)
        return value if found is None else found._value2member_map_.get(value, value)
    return getattr(torch, value)


def _build_sequence(spec: Any, leaves: Iterator[Any]) -> Any:
    parts = [build(c, leaves) for c in spec.children]
    if spec.kind == "list":
        return parts
    return torch.Size(parts) if spec.type == "torch:Size" else tuple(parts)


def _build_mapping(spec: Any, leaves: Iterator[Any]) -> Any:
    built = {plain(k): build(c, leaves) for k, c in zip(spec.keys, spec.children, strict=True)}
    if spec.kind == "dict":
        return OrderedDict(built) if spec.type else built
    kind = _loaded(spec.type, UserDict)
    return Output(str(spec.type), built) if kind is None else kind(built)


def _build_namedtuple(spec: Any, leaves: Iterator[Any]) -> Any:
    values = [build(c, leaves) for c in spec.children]
    kind = _loaded(spec.type, tuple)
    if kind is None or kind is NamedOutput:
        return NamedOutput(spec.keys, values)
    return tuple.__new__(kind, values) if hasattr(kind, "_fields") else kind(values)


def _build_dataclass(spec: Any, leaves: Iterator[Any]) -> Any:
    values = {k: build(c, leaves) for k, c in zip(spec.keys, spec.children, strict=True)}
    kind = _loaded(spec.type, object)
    if kind is None or not dataclasses.is_dataclass(kind):
        return Output(str(spec.type), values)
    if issubclass(kind, OrderedDict):
        names = {f.name for f in dataclasses.fields(kind)}
        built = kind(**{k: v for k, v in values.items() if k in names})
        for k in [k for k in values if k not in names]:
            built[k] = values[k]
        return built
    built = object.__new__(kind)
    for k, v in values.items():  # past __init__ and __post_init__: the values are those that an instance had
        object.__setattr__(built, k, v)
    return built


def _build_cache(spec: Any, leaves: Iterator[Any]) -> Any:
    parts = [build(c, leaves) for c in spec.children]
    kind = _loaded(spec.type, object) if spec.type in CACHES else None
    if spec.keys:
        return CacheOutput(str(spec.type), dict(zip(spec.keys, parts, strict=True))) if kind is None else kind(*parts)
    if kind is None:
        return CacheOutput(str(spec.type), {"layers": parts})
    cache = kind()
    cache.layers = parts
    return cache


def _build_layer(spec: Any, leaves: Iterator[Any]) -> Any:
    keys, values = (next(leaves), next(leaves)) if spec.keys else (None, None)
    window, seen = spec.value if isinstance(spec.value, tuple) else (spec.value, None)
    kind = _loaded(spec.type, object) if spec.type in LAYERS else None
    if kind is None:
        fields = {"keys": keys, "values": values}
        if window is not None:
            fields |= {"sliding_window": window, "cumulative_length": keys.shape[-2] if seen is None else seen}
        return Output(str(spec.type), fields)
    layer = kind() if window is None else kind(sliding_window=window)
    if keys is not None:
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if window is not None:
            layer.cumulative_length = keys.shape[-2] if seen is None else seen
    return layer


BUILD = {
    "tensor": lambda spec, leaves: next(leaves),
    "none": lambda spec, leaves: None,
    "const": _build_constant,
    "tuple": _build_sequence,
    "list": _build_sequence,
    "dict": _build_mapping,
    "mapping": _build_mapping,
    "namedtuple": _build_namedtuple,
    "dataclass": _build_dataclass,
    "cache": _build_cache,
    "cache-layer": _build_layer,
}


def build(spec: Any, leaves: Iterator[Any]) -> Any:
    """The value of one spec, taking its tensors from ``leaves``."""
    return BUILD[spec.kind](spec, leaves)


# -- types -----------------------------------------------------------------------------------------------------------


def type_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _loaded(name: str | None, base: type) -> Any:
    """The type of that name where its module is loaded and it really is a class below ``base``; nothing is imported."""
    module, _, path = (name or "").partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None) if found is not None and part else None
    return found if isinstance(found, type) and issubclass(found, base) and type_name(found) == name else None


def plain(key: Any) -> Any:
    return SIMPLE[key[0]](key[1]) if isinstance(key, tuple) else key
