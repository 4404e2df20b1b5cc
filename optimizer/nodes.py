"""Nodes of a program: their sites, their arguments by name, their values in words."""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from graphwright.errors import InternalError

#: Scalar functions that may stand in the graph beside ops: arithmetic on symbolic sizes, and tuple access.
SCALAR_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{m.__name__}.{n}": getattr(m, n)
    for m, names in (
        (operator, ["getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_"]),
        (math, ["ceil", "floor", "trunc", "sqrt"]),
        (builtins, ["max", "min", "abs", "round", "int", "float"]),
        (torch, ["sym_max", "sym_min", "sym_int", "sym_float", "sym_ite", "sym_not", "sym_sum"]),
    )
    for n in names
    if hasattr(m, n)
}


def sites_of(node: fx.Node) -> tuple[str, ...]:
    """The sites a node stands for, first the one it was born with."""
    return tuple(node.meta.get("sites") or ())


def site_of(node: fx.Node) -> str:
    """One name for a node: its first site, or the node's own name where it has none."""
    return next(iter(sites_of(node)), node.name)


def op_name(target: Any) -> str:
    """``"aten.linear"``, ``"aten.add.Tensor"``, ``"graphwright.conv"`` or ``"operator.getitem"``."""
    if isinstance(target, OpOverload):
        name = str(target)
        return name.removesuffix(".default")
    for name, function in SCALAR_FUNCTIONS.items():
        if function is target:
            return name
    return getattr(target, "__name__", repr(target))


def arg(node: fx.Node, name: str) -> Any:
    """The argument of a normalised node by its schema name."""
    if name in node.kwargs:
        return node.kwargs[name]
    for k, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if a.name == name:
            return node.args[k]
    raise InternalError(f"{node.target} has no argument {name!r}")


def args_by_name(node: fx.Node) -> dict[str, Any]:
    """Every argument of a normalised node by its schema name."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def set_arg(node: fx.Node, name: str, value: Any) -> None:
    """Change one argument of a normalised node."""
    if name in node.kwargs:
        node.update_kwarg(name, value)
        return
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    node.update_arg(names.index(name), value)


def normalise(target: OpOverload, args: Iterable[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Complete the arguments: all positional ones in schema order, keyword-only ones by name, defaults filled in.

    Raises:
        InternalError: an argument is missing or unknown.
    """
    schema, args, rest = target._schema, list(args), dict(kwargs)
    full: list[Any] = []
    named: dict[str, Any] = {}
    for k, a in enumerate(schema.arguments):
        if a.kwarg_only:
            value = rest.pop(a.name, a.default_value if a.has_default_value() else None)
            named[a.name] = value
        elif k < len(args):
            full.append(args[k])
        elif a.name in rest:
            full.append(rest.pop(a.name))
        elif a.has_default_value():
            full.append(a.default_value)
        else:
            raise InternalError(f"{target}: argument {a.name!r} is missing")
    if rest:
        raise InternalError(f"{target}: unknown arguments {sorted(rest)}")
    if len(args) > len(full):
        raise InternalError(f"{target}: {len(args)} positional arguments, it takes {len(full)}")
    return tuple(full), named


_SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
    torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


def describe(value: Any) -> str:
    """``"f32[2, 8]"`` for a tensor, ``"(f32[2], i64[])"`` for several, the type's name for a scalar."""
    if isinstance(value, torch.Tensor):
        return f"{_SHORT.get(value.dtype, str(value.dtype))}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(describe, value))})"
    return "none" if value is None else type(value).__name__


def show(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (tuple, list)):
        open_, close = ("(", ")") if isinstance(value, tuple) else ("[", "]")
        return f"{open_}{', '.join(map(show, value))}{close}"
    if isinstance(value, float):
        return repr(value)
    return str(value) if not isinstance(value, str) else repr(value)


def line(name: str, op: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    """A node as ``Program.text`` shows it: name, shape, op, arguments, sites."""
    if op == "output":
        return f"return {show(args[0])}"
    said = describe(meta.get("val"))
    if op == "placeholder":
        return f"{name}: {said} = input"
    if op == "get_attr":
        return f"{name}: {said} = tensor {target}"
    shown = [show(a) for a in args] + [f"{k}={show(v)}" for k, v in kwargs.items()]
    site = ", ".join(meta.get("sites") or ())
    return f"{name}: {said} = {op_name(target)}({', '.join(shown)})" + (f"  # {site}" if site else "")


def walk_nodes(value: Any) -> Iterator[fx.Node]:
    """Every node inside nested arguments."""
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    yield from found
