"""Structures of inputs and outputs in a vocabulary of our own: which containers stand round the tensors of a call.

    leaves, spec = flatten({"x": tensor, "more": (tensor, None, 3)})
    spec.unflatten(leaves)                 # the same value again
    Spec.from_json(spec.to_json()) == spec

A ``Spec`` is data: it names the user's types but never imports them. Where a type is loaded already it is reused,
elsewhere ``Output`` (keys, attributes, indices) takes its place.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphwright.errors import InputError, LoadError
from graphwright.output import (
    BUILD,
    CACHES,
    LAYERS,
    SIMPLE,
    CacheOutput,
    NamedOutput,
    Output,
    build,
    plain,
    type_name,
)


@dataclass(frozen=True)
class Spec:
    """The structure of one value.

    Attributes:
        kind: tensor, none, const, tuple, list, dict, mapping, namedtuple, dataclass, cache or cache-layer.
        type: for a constant its kind; else the user's type as ``module:qualified.name``, where it matters.
        keys: the names of the children, where they have names.
        children: the structures inside.
        value: what a constant is, as data.
    """

    kind: str
    type: str | None = None
    keys: tuple[Any, ...] = ()
    children: tuple[Spec, ...] = ()
    value: Any = None
    count: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        count = 1 if self.kind == "tensor" else sum(c.count for c in self.children)
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "_hash", hash((self.kind, self.type, self.keys, self.children, self.value)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    # -- rebuilding --------------------------------------------------------------------------------------------

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The value with ``leaves`` (``count`` of them, in order) at its tensor places.

        Raises:
            InputError: the number of leaves is wrong.
        """
        if len(leaves) != self.count:
            raise InputError(f"{len(leaves)} tensors given for a structure of {self.count}: {self.describe()}")
        return build(self, iter(leaves))

    # -- words -------------------------------------------------------------------------------------------------

    def paths(self, start: str = "") -> list[str]:
        """Where each leaf stands, as one would write it in Python: ``[0].past_key_values[2].keys``."""
        if self.kind == "tensor":
            return [start]
        found: list[str] = []
        for k, child in enumerate(self.children):
            found += child.paths(start + self._step(k))
        return found

    def _step(self, k: int) -> str:
        if self.kind in ("dict", "mapping"):
            return f"[{plain(self.keys[k])!r}]"
        return f".{self.keys[k]}" if self.kind in ("dataclass", "namedtuple", "cache-layer") else f"[{k}]"

    def describe(self) -> str:
        """One line for humans: ``{'x': tensor, 'more': (tensor, None, 3)}``."""
        inner = [c.describe() for c in self.children]
        if self.kind in ("tensor", "none"):
            return "None" if self.kind == "none" else "tensor"
        if self.kind == "const":
            return repr(self.value) if self.type in SIMPLE else f"{self.value}"
        if self.kind in ("dict", "mapping"):
            return "{" + ", ".join(f"{plain(k)!r}: {c}" for k, c in zip(self.keys, inner, strict=True)) + "}"
        if self.kind == "list":
            return f"[{', '.join(inner)}]"
        if self.kind == "tuple":
            return f"({', '.join(inner)}{',' if len(inner) == 1 else ''})"
        name = (self.type or "").rpartition(":")[2]
        if self.kind == "cache":
            return f"{name}({len(inner)} layers)"
        return f"{name}({', '.join(f'{k}={c}' for k, c in zip(self.keys, inner, strict=True))})"

    # -- data --------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """As JSON data: dicts, lists, strings, numbers."""
        data: dict[str, Any] = {"kind": self.kind}
        if self.type is not None:
            data["type"] = self.type
        if self.keys:
            data["keys"] = [list(k) if isinstance(k, tuple) else k for k in self.keys]
        if self.children:
            data["children"] = [c.to_json() for c in self.children]
        if self.value is not None:
            data["value"] = list(self.value) if isinstance(self.value, tuple) else self.value
        return data

    @staticmethod
    def from_json(data: Any, *, depth: int = 0) -> Spec:
        """The spec that ``to_json`` wrote.

        Raises:
            LoadError: the data are no spec.
        """
        if not isinstance(data, dict) or depth > 200 or data.get("kind") not in BUILD:
            raise LoadError("a structure in the file is malformed, or nested too deep", hint="Save the model again.")
        children = data.get("children", [])
        keys, value, type_ = data.get("keys", []), data.get("value"), data.get("type")
        if not isinstance(children, list) or not isinstance(keys, list) or not isinstance(type_, (str, type(None))):
            raise LoadError(f"a structure in the file is malformed: a {data['kind']}", hint="Save the model again.")
        spec = Spec(
            data["kind"], type_,
            tuple(tuple(k) if isinstance(k, list) else k for k in keys),
            tuple(Spec.from_json(c, depth=depth + 1) for c in children),
            tuple(value) if isinstance(value, list) else value,
        )  # fmt: skip
        _check(spec)
        return spec


TENSOR = Spec("tensor")
NONE = Spec("none")


# -- taking apart ----------------------------------------------------------------------------------------------------


def flatten(value: Any, *, name: str = "") -> tuple[list[torch.Tensor], Spec]:
    """The tensors of a nested value, in order, and its structure.

    Args:
        name: what stands before the path in an error message.

    Raises:
        InputError: a leaf is no tensor, None or constant; the message says where.
    """
    leaves: list[torch.Tensor] = []
    return leaves, _flatten(value, leaves, name)


def flatten_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[torch.Tensor], Spec]:
    """Like ``flatten`` of ``(args, kwargs)``; the order in which keywords were written does not matter."""
    names = sorted(kwargs)
    leaves = [*args, *(kwargs[n] for n in names)]
    if all(isinstance(v, torch.Tensor) for v in leaves):
        return leaves, _tensors_only(len(args), tuple(names))
    leaves = []
    positional = Spec("tuple", None, (), tuple(_flatten(a, leaves, f"argument {k}") for k, a in enumerate(args)))
    named = Spec("dict", None, tuple(names), tuple(_flatten(kwargs[n], leaves, n) for n in names))
    return leaves, Spec("tuple", None, (), (positional, named))


@functools.lru_cache(maxsize=256)
def _tensors_only(count: int, names: tuple[str, ...]) -> Spec:
    """The structure of a call with ``count`` tensors and one tensor by each name: the same object each time, quick to compare."""
    return Spec("tuple", None, (), (Spec("tuple", None, (), (TENSOR,) * count), Spec("dict", None, names, (TENSOR,) * len(names))))


def _flatten(value: Any, leaves: list[torch.Tensor], path: str) -> Spec:
    if isinstance(value, torch.Tensor):
        leaves.append(value)
        return TENSOR
    if value is None:
        return NONE
    kind = type(value)
    if kind in (tuple, list):
        parts = tuple(_flatten(v, leaves, f"{path}[{k}]") for k, v in enumerate(value))
        return Spec(kind.__name__, None, (), parts)
    if kind is dict:
        return _flatten_mapping("dict", None, value, leaves, path)
    constant = _constant(value)
    if constant is not None:
        return constant
    if type_name(kind) in CACHES or isinstance(value, CacheOutput):
        return _flatten_cache(value, leaves, path)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        if isinstance(value, OrderedDict):
            names += [k for k in value if k not in names]
        read = [value[k] if isinstance(value, OrderedDict) and k in value else getattr(value, k, None) for k in names]
        parts = tuple(_flatten(v, leaves, f"{path}.{k}") for k, v in zip(names, read, strict=True))
        return Spec("dataclass", type_name(kind), tuple(names), parts)
    if isinstance(value, tuple):
        return _flatten_tuple(value, leaves, path)
    if isinstance(value, list):
        return Spec("list", None, (), tuple(_flatten(v, leaves, f"{path}[{k}]") for k, v in enumerate(value)))
    if isinstance(value, OrderedDict) or type(value).__name__ == "defaultdict":
        return _flatten_mapping("dict", None if kind is not OrderedDict else type_name(kind), value, leaves, path)
    if isinstance(value, Output):
        parts = tuple(_flatten(v, leaves, f"{path}.{k}") for k, v in value._fields.items())
        return Spec("dataclass", value._type, tuple(value._fields), parts)
    if isinstance(value, Mapping):
        return _flatten_mapping("mapping", type_name(kind), value, leaves, path)
    raise InputError(
        f"a value of type {kind.__module__}.{kind.__qualname__} cannot be part of a captured model's inputs or outputs",
        where=path or None,
        hint="Tensors, None, numbers, strings, dtypes, devices, tuples, lists, dicts, namedtuples, dataclasses and "
        "transformers' DynamicCache can; turn NumPy arrays into tensors with torch.as_tensor.",
    )


def _flatten_mapping(kind: str, type_: str | None, value: Mapping[Any, Any], leaves: list, path: str) -> Spec:
    keys = []
    for k in value:
        if type(k) not in (str, int, bool, float):
            raise InputError(f"a dict key of type {type(k).__name__}", where=path or None, hint="Use strings or numbers.")
        keys.append(k if isinstance(k, str) else (type(k).__name__, k))
    return Spec(kind, type_, tuple(keys), tuple(_flatten(v, leaves, f"{path}[{k!r}]") for k, v in value.items()))


def _flatten_tuple(value: tuple, leaves: list[torch.Tensor], path: str) -> Spec:
    kind = type(value)
    names = getattr(kind, "_fields", None)
    if names is None and hasattr(kind, "n_fields"):  # torch.return_types.*
        names = [k for k in dir(kind) if not k.startswith("_") and isinstance(getattr(value, k, None), torch.Tensor)]
        names = sorted(names, key=lambda n: next(i for i, v in enumerate(value) if v is getattr(value, n)))
    if isinstance(value, NamedOutput):
        names = value._fields
    if names is None:
        type_ = type_name(kind) if kind is torch.Size else None
        return Spec("tuple", type_, (), tuple(_flatten(v, leaves, f"{path}[{k}]") for k, v in enumerate(value)))
    parts = tuple(_flatten(v, leaves, f"{path}.{k}") for k, v in zip(names, value, strict=True))
    return Spec("namedtuple", type_name(kind), tuple(names), parts)


def _flatten_cache(value: Any, leaves: list[torch.Tensor], path: str) -> Spec:
    type_ = value._type if isinstance(value, Output) else type_name(type(value))
    if not hasattr(value, "layers"):
        names = ("self_attention_cache", "cross_attention_cache")
        parts = tuple(_flatten(getattr(value, n), leaves, f"{path}.{n}") for n in names)
        return Spec("cache", type_, names, parts)
    layers = tuple(_flatten_layer(layer, leaves, f"{path}[{k}]") for k, layer in enumerate(value.layers))
    return Spec("cache", type_, (), layers)


def _flatten_layer(layer: Any, leaves: list[torch.Tensor], path: str) -> Spec:
    if type_name(type(layer)) not in LAYERS and not isinstance(layer, Output):
        known = ", ".join(n.rpartition(":")[2] for n in LAYERS)
        raise InputError(f"a cache layer of type {type(layer).__name__} is not known", where=path, hint=f"Known: {known}.")
    type_ = layer._type if isinstance(layer, Output) else type_name(type(layer))
    window = getattr(layer, "sliding_window", None)
    if layer.keys is None or getattr(layer, "is_initialized", True) is False:
        return Spec("cache-layer", type_, (), (), window)
    leaves += [layer.keys, layer.values]
    value: Any = window
    if window is not None and not bool(layer.cumulative_length == layer.keys.shape[-2]):
        value = (window, int(layer.cumulative_length))
    return Spec("cache-layer", type_, ("keys", "values"), (TENSOR, TENSOR), value)


def _constant(value: Any) -> Spec | None:
    """The spec of a constant, by value; None for anything else."""
    kind = type(value)
    if kind.__name__ in SIMPLE and kind is SIMPLE[kind.__name__]:
        plain = repr(value) if kind is float and not math.isfinite(value) else value
        return Spec("const", kind.__name__, value=plain)
    if isinstance(value, (torch.dtype, torch.device, torch.memory_format, torch.layout)):
        return Spec("const", kind.__name__, value=str(value).removeprefix("torch."))
    if isinstance(value, enum.Enum) and isinstance(value.value, (bool, int, float, str)):
        return Spec("const", f"enum {type_name(kind)}", value=value.value)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        raise InputError("a number that depends on the inputs' sizes cannot be returned by a captured model as it is",
                         hint="Return it as a tensor.")  # fmt: skip
    return None


def _check(spec: Spec) -> None:
    """Refuse what ``flatten`` never writes, so that a file cannot build anything else."""
    named = spec.kind in ("dict", "mapping", "namedtuple", "dataclass")
    good = not named or len(spec.keys) == len(spec.children)
    if spec.kind in ("namedtuple", "dataclass"):
        good &= all(isinstance(k, str) and k.isidentifier() and not k.startswith("__") for k in spec.keys)
    elif named:
        good &= all(isinstance(k, str) or (isinstance(k, tuple) and len(k) == 2 and k[0] in SIMPLE) for k in spec.keys)
    elif spec.kind == "cache-layer":
        window = spec.value[0] if isinstance(spec.value, tuple) and len(spec.value) == 2 else spec.value
        good &= spec.keys in ((), ("keys", "values")) and all(c.kind == "tensor" for c in spec.children)
        good &= len(spec.keys) == len(spec.children) and isinstance(window, (int, type(None)))
    elif spec.kind == "cache":
        good &= spec.keys in ((), ("self_attention_cache", "cross_attention_cache"))
        good &= not spec.keys or len(spec.children) == 2
    elif spec.kind == "const":
        good &= _good_constant(spec)
    elif spec.kind in ("tensor", "none"):
        good &= not spec.children
    if not good:
        raise LoadError(f"a structure in the file is malformed: {spec.kind}", hint="Save the model again.")


def _good_constant(spec: Spec) -> bool:
    kind, value = str(spec.type), spec.value
    if kind in SIMPLE:
        return type(value) is SIMPLE[kind] or (kind == "float" and value in ("nan", "inf", "-inf"))
    if kind in ("dtype", "memory_format", "layout"):
        return isinstance(value, str) and type(getattr(torch, value, None)).__name__ == kind
    return isinstance(value, str) if kind == "device" else kind.startswith("enum ") and isinstance(
        value, (bool, int, float, str))  # fmt: skip
