"""Values that hold one number everywhere, whatever their size: what ``ones``, ``zeros`` and arithmetic on them provably give."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphwright.ir import Program, args_by_name
from graphwright.passes._nodes import ALIASING, base, is_number, is_op, is_tensor, val

#: Constants larger than this are not read to find out.
MOST = 1 << 22
_FILLED = {"aten.ones": 1, "aten.ones_like": 1, "aten.new_ones": 1, "aten.zeros": 0, "aten.zeros_like": 0, "aten.new_zeros": 0}
_GIVEN = {"aten.full": "fill_value", "aten.full_like": "fill_value", "aten.new_full": "fill_value", "aten.scalar_tensor": "s", "aten.fill": "value"}
_COPIES = (*ALIASING, "aten.clone", "aten.contiguous", "aten.repeat")
_CASTS = ("aten.to", "aten._to_copy", "aten.type_as")
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "aten.add": operator.add, "aten.sub": operator.sub, "aten.mul": operator.mul, "aten.eq": operator.eq, "aten.ne": operator.ne, "aten.lt": operator.lt,
    "aten.le": operator.le, "aten.gt": operator.gt, "aten.ge": operator.ge, "aten.logical_and": lambda a, b: bool(a) and bool(b),
    "aten.logical_or": lambda a, b: bool(a) or bool(b), "aten.bitwise_and": operator.and_, "aten.bitwise_or": operator.or_, "aten.__and__": operator.and_,
    "aten.__or__": operator.or_,
}  # fmt: skip
_UNARY: dict[str, Callable[[Any], Any]] = {"aten.logical_not": lambda a: not a, "aten.neg": operator.neg, "aten.rsub": operator.neg}


def uniform(program: Program) -> dict[fx.Node, bool | int | float]:
    """Every tensor of the program that provably holds one number everywhere, and that number in the tensor's dtype."""
    found: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if not is_tensor(node) and not is_op(node, *ALIASING):
            continue
        value = _held(program, node) if node.op == "get_attr" else _computed(node, found) if node.op == "call_function" else None
        if value is not None:
            dtype = val(node).dtype if is_tensor(node) else val(node)[0].dtype
            if not dtype.is_complex:
                found[node] = torch.tensor(value).to(dtype).item()
    return found


def _held(program: Program, node: fx.Node) -> Any:
    tensor = program.constant(node)
    if tensor is None or not 0 < tensor.numel() <= MOST or tensor.is_complex():
        return None
    first = tensor.detach().reshape(-1)[0]
    if isinstance(tensor, torch.nn.Parameter) or not bool((tensor == first).all()):
        return None  # a parameter may be trained
    return first.item()


def _computed(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    name = base(node)
    if name in _FILLED:
        return _FILLED[name]
    given = args_by_name(node) if hasattr(node.target, "_schema") else {}
    if name in _GIVEN:
        value = given.get(_GIVEN[name])
        return value if isinstance(value, (bool, int, float)) else None

    def number(a: Any) -> Any:
        if isinstance(a, fx.Node):
            return known.get(a)
        return a if is_number(a) or isinstance(a, bool) else None

    if node.target is torch.ops.aten.view.dtype:
        return None  # the same bits, another number
    if name in _COPIES or name in _CASTS:
        return known.get(node.args[0])  # type: ignore[arg-type]
    if name == "aten.cat":
        parts = {number(p) for p in node.args[0]}  # type: ignore[union-attr]
        return parts.pop() if len(parts) == 1 else None
    if name in _UNARY and name != "aten.rsub":
        a = number(node.args[0])
        return None if a is None else _UNARY[name](a)
    if name == "aten.rsub" and given.get("alpha", 1) == 1:
        a, b = number(node.args[0]), number(node.args[1])
        return None if a is None or b is None else b - a
    if name in _BINARY and len(node.args) >= 2 and given.get("alpha", 1) == 1:
        a, b = number(node.args[0]), number(node.args[1])
        if name == "aten.mul" and (a == 0 or b == 0) and (a is None or b is None):
            return None  # zero times what may be infinite
        return None if a is None or b is None or isinstance(a, bool) and name == "aten.sub" else _BINARY[name](a, b)
    if name == "aten.masked_fill":
        x, mask, value = number(node.args[0]), number(node.args[1]), number(node.args[2])
        return x if mask is False else value if mask is True else None
    if name == "aten.where" and len(node.args) == 3:
        mask, a, b = (number(n) for n in node.args)
        return a if mask is True else b if mask is False else None
    return None
