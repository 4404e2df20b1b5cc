"""Arguments of nodes and descriptions of their values, as JSON.

Arguments: None, booleans, integers, strings, finite floats and lists stand for themselves; all else is an object with
one key: ``{"node": name}``, ``{"dtype": "int8"}``, ``{"tuple": [...]}``, ``{"float": "inf"}``, ...

Values: ``{"dtype", "shape", "stride", "device"}`` for a tensor, ``{"list": [...]}`` or ``{"tuple": [...]}``,
``{"symint": expression}``, or a plain number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.errors import SaveError
from graphwright.store.reading import INT_MAX, Record, bad, special_float, want, want_int
from graphwright.store.symbols import Scope
from graphwright.store.tensors import dtype_name, read_dtype

_FORMATS = ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
_ENUMS: dict[str, dict[str, Any]] = {
    "memory_format": {n: getattr(torch, n) for n in _FORMATS},
    "layout": {n: getattr(torch, n) for n in ("strided", "sparse_coo", "sparse_csr")},
}
_OPAQUE = ["opaque"]
_DEVICES = ("cpu", "cuda", "meta")


# -- arguments -------------------------------------------------------------------------------------------------------


def encode_arg(value: Any, where: str) -> Any:
    """One argument as JSON.

    Raises:
        SaveError: it is no value that a file may hold.
    """
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int and abs(value) <= INT_MAX + 1:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if type(value) is complex:
        return {"complex": [encode_arg(value.real, where), encode_arg(value.imag, where)]}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, slice):
        return {"slice": [encode_arg(v, where) for v in (value.start, value.stop, value.step)]}
    for kind, known in _ENUMS.items():
        for name, constant in known.items():
            if type(value) is type(constant) and value == constant:
                return {kind: name}
    if isinstance(value, tuple):
        return {"tuple": [encode_arg(v, where) for v in value]}
    if isinstance(value, list):
        return [encode_arg(v, where) for v in value]
    raise SaveError(f"{where} has an argument that cannot be saved: {value!r}"[:300])


def decode_arg(data: Any, nodes: Mapping[str, fx.Node], where: str) -> Any:
    """The argument that ``encode_arg`` wrote; ``nodes`` are those that stand before it.

    Raises:
        LoadError: an unknown kind, or a node that does not stand before.
    """
    if data is None or type(data) in (bool, float, str):
        return data
    if type(data) is int:
        return want_int(data, where)
    if type(data) is list:
        return [decode_arg(v, nodes, where) for v in data]
    if type(data) is not dict or len(data) != 1:
        bad(where, "an ill-formed argument")
    ((kind, value),) = data.items()
    reader = _READERS.get(kind)
    if reader is None:
        bad(where, f"unknown kind of argument {kind[:40]!r}")
    return reader(value, nodes, where)


def _read_node(value: Any, nodes: Mapping[str, fx.Node], where: str) -> fx.Node:
    if type(value) is not str or value not in nodes:
        bad(where, f"it reads {str(value)[:60]!r}, which does not stand before it")
    return nodes[value]


def _read_list(value: Any, nodes: Mapping[str, fx.Node], where: str) -> list[Any]:
    return [decode_arg(v, nodes, where) for v in want(value, list, where)]


def _read_complex(value: Any, nodes: Mapping[str, fx.Node], where: str) -> complex:
    parts = _read_list(value, nodes, where)
    if len(parts) != 2 or any(type(p) is not float for p in parts):
        bad(where, "an ill-formed complex number")
    return complex(*parts)


def _read_slice(value: Any, nodes: Mapping[str, fx.Node], where: str) -> slice:
    parts = _read_list(value, nodes, where)
    if len(parts) != 3:
        bad(where, "an ill-formed slice")
    return slice(*parts)


def _read_device(value: Any, nodes: Mapping[str, fx.Node], where: str) -> torch.device:
    word = want(value, str, where)
    kind, _, number = word.partition(":")
    if kind not in _DEVICES or (number and not (number.isascii() and number.isdigit() and len(number) < 4)):
        bad(where, f"unknown device {word[:40]!r}")
    return torch.device(word)


def _enum_reader(kind: str) -> Callable[[Any, Mapping[str, fx.Node], str], Any]:
    def read(value: Any, nodes: Mapping[str, fx.Node], where: str) -> Any:
        if type(value) is not str or value not in _ENUMS[kind]:
            bad(where, f"unknown {kind} {str(value)[:40]!r}")
        return _ENUMS[kind][value]

    return read


_READERS: dict[str, Callable[[Any, Mapping[str, fx.Node], str], Any]] = {
    "node": _read_node,
    "tuple": lambda v, n, w: tuple(_read_list(v, n, w)),
    "float": lambda v, n, w: special_float(v, w),
    "complex": _read_complex,
    "slice": _read_slice,
    "dtype": lambda v, n, w: read_dtype(v, w),
    "device": _read_device,
    **{kind: _enum_reader(kind) for kind in _ENUMS},
}


# -- values ----------------------------------------------------------------------------------------------------------


def encode_value(value: Any, where: str, *, strict: bool = False) -> Any:
    """What a node gives, as JSON.

    Args:
        strict: a size that no file can describe is an error; otherwise it is left to be inferred anew.

    Raises:
        SaveError: as said, or a value of an unknown kind.
    """
    if isinstance(value, Tensor):
        sizes, strides = ([_encode_size(s, strict) for s in sizes] for sizes in (value.shape, value.stride()))
        return {"dtype": dtype_name(value.dtype), "shape": sizes, "stride": strides, "device": str(value.device)}
    if isinstance(value, torch.SymInt):
        return {"symint": _encode_size(value, strict)}
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return {"symbool" if isinstance(value, torch.SymBool) else "symfloat": None}
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [encode_value(v, where, strict=strict) for v in value]}
    return encode_arg(value, where)


def _encode_size(size: Any, strict: bool) -> Any:
    if not isinstance(size, torch.SymInt):
        return int(size)
    from graphwright.store.expressions import encode

    try:
        return encode(size.node.expr)
    except SaveError:
        if strict:
            raise
        return _OPAQUE


def build_value(data: Any, scope: Scope, where: str) -> Any:
    """Fake tensors and symbolic sizes as described; sizes that only exist at run time become fresh symbols.

    Raises:
        LoadError: an ill-formed description.
    """
    if not isinstance(data, dict):
        return decode_arg(data, {}, where)
    if "dtype" in data:
        record = Record(data, "dtype shape stride device", where)
        shape, stride = (_sizes(record.get(k, list), scope, f"{where}.{k}") for k in ("shape", "stride"))
        if len(shape) != len(stride):
            bad(where, f"{len(shape)} sizes and {len(stride)} strides")
        dtype, device = read_dtype(record.raw("dtype"), where), _read_device(record.raw("device"), {}, where)
        if device.type == "cpu" and all(type(s) is int for s in (*shape, *stride)):
            return scope.fake(shape, stride, dtype_name(dtype))
        with scope.mode:
            return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    if len(data) == 1:
        ((kind, value),) = data.items()
        if kind in ("tuple", "list"):
            items = [build_value(v, scope, where) for v in want(value, list, where)]
            return tuple(items) if kind == "tuple" else items
        if kind == "symint":
            return _sizes([value], scope, where, low=-INT_MAX)[0]
    return decode_arg(data, {}, where)


def _sizes(items: list[Any], scope: Scope, where: str, low: int = 0) -> list[Any]:
    if len(items) > 64:
        bad(where, f"{len(items)} axes")
    for item in items:
        if _unbound(item, scope):
            scope.symbols[item[1]] = scope.env.create_unbacked_symint().node.expr
    return [scope.size(item, where, low) for item in items]


def _unbound(size: Any, scope: Scope) -> bool:
    """A symbol of the kind that ops with data-dependent sizes make, met for the first time."""
    named = type(size) is list and len(size) == 2 and size[0] == "sym" and type(size[1]) is str
    return named and size[1] not in scope.symbols and size[1][:1] == "u" and size[1][1:].isdigit()


def agrees(data: Any, value: Any, scope: Scope) -> bool:
    """Whether the description of a value fits what inference gave (strides aside: they follow from the shapes)."""
    if isinstance(value, Tensor):
        fits = isinstance(data, dict) and type(data.get("shape")) is list and len(data["shape"]) == value.dim()
        if not fits or data.get("dtype") != dtype_name(value.dtype) or data.get("device") != str(value.device):
            return False
        return all(_size_agrees(d, s, scope) for d, s in zip(data["shape"], value.shape, strict=True))
    if isinstance(value, (tuple, list)):
        items = data.get("tuple" if isinstance(value, tuple) else "list") if isinstance(data, dict) else None
        return (
            type(items) is list
            and len(items) == len(value)
            and all(agrees(d, v, scope) for d, v in zip(items, value, strict=True))
        )
    if isinstance(value, torch.SymInt):
        return isinstance(data, dict) and "symint" in data and _size_agrees(data["symint"], value, scope)
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return data == {"symbool" if isinstance(value, torch.SymBool) else "symfloat": None}
    return data == encode_arg(value, "a value")


def _size_agrees(data: Any, size: Any, scope: Scope) -> bool:
    if not isinstance(size, torch.SymInt):
        return type(data) is int and data == size
    if data == _OPAQUE:
        return True
    from graphwright.store.expressions import encode

    if _unbound(data, scope) and size.node.expr.is_Symbol and str(size.node.expr).startswith("u"):
        scope.symbols[data[1]] = size.node.expr
    if encode(size.node.expr, scope.names()) == data:
        return True
    said, found = scope.size(data, "a size", -INT_MAX), size  # spelled in another way: the values at capture decide
    if not isinstance(said, torch.SymInt):
        return False
    if _data_decides(said) and _data_decides(found):
        return True  # two counts of the same trues: that they are equal was noted at capture and is in no file
    return said.node.hint is not None and said.node.hint == found.node.hint


def _data_decides(size: torch.SymInt) -> bool:
    return any(str(s).startswith("u") for s in size.node.expr.free_symbols)
