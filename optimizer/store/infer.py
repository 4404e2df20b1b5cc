"""What the nodes of a file give: as the file says, checked by running every op on tensors that have no memory.

The check runs on meta tensors at the sizes of capture, which takes a tenth of the time of running symbolic fakes.
Where it can't (sizes that depend on data, other devices), or finds something else, the fakes have the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from graphwright import ops
from graphwright.errors import LoadError
from graphwright.ir import op_name
from graphwright.store.reading import bad, want_int
from graphwright.store.symbols import Scope
from graphwright.store.tensors import dtype_name
from graphwright.store.values import agrees, build_value

_META = torch.device("meta")
#: How many tensors an op gives, from its arguments by name: not to be left to a file's word.
_COUNTS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "aten::unbind": lambda a: a["self"].shape[a["dim"]],
    **dict.fromkeys(
        ("aten::split", "aten::unsafe_split"),
        lambda a: -(-a["self"].shape[a["dim"]] // a["split_size"]) if type(a.get("split_size")) is int else 0,
    ),
    **dict.fromkeys(("aten::chunk", "aten::unsafe_chunk"), lambda a: a["chunks"]),
    **{
        f"aten::{n}": lambda a: a["sections"] if type(a.get("sections")) is int else 0
        for n in ("tensor_split", "hsplit", "vsplit", "dsplit")
    },
}


class _Unknown(Exception):
    """This cannot be checked on meta tensors."""


class Rehearsal:
    """Runs a graph, node by node, as it is read.

    Args:
        trusted: the very same graph was found right earlier: it is as the file says.

    Attributes:
        held: what each node gives at the sizes of capture: meta tensors and plain numbers; unknown ones are missing.
    """

    def __init__(self, scope: Scope, trusted: bool = False):
        self.scope, self.trusted = scope, trusted
        self.held: dict[fx.Node, Any] = {}

    def give(self, node: fx.Node, value: Any) -> None:
        """Note what an input or a constant is."""
        node.meta["val"] = value
        if self.trusted:
            return
        try:
            self.held[node] = self._sample(value)
        except _Unknown:
            pass

    def call(self, node: fx.Node, said: Any, where: str) -> None:
        """Check a call and set its value.

        Raises:
            LoadError: the op does not take these arguments, or gives something else than the file says.
        """
        target = node.target
        if self.trusted:
            node.meta["val"] = self._build(said, where)
            return
        if all(n in self.held for n in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.held.__getitem__)
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        if isinstance(target, OpOverload):
            _check_count(target, args, kwargs, said, where)
        else:
            _check_scalars(op_name(target), args, where)
        try:
            self.held[node] = self._rehearse(node, said, where)
            node.meta["val"] = self._build(said, where)
        except _Unknown:
            self.held.pop(node, None)
            self.give(node, self._on_fakes(node, said, where))

    # -- on meta tensors ---------------------------------------------------------------------------------------

    def _rehearse(self, node: fx.Node, said: Any, where: str) -> Any:
        if any(n not in self.held for n in node.all_input_nodes):
            raise _Unknown
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.held.__getitem__)
        if isinstance(node.target, OpOverload):
            args, kwargs = _without_memory(node.target, args, kwargs)
        try:
            with torch.no_grad():
                found = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:  # no kernel for meta tensors, or nonsense: fakes tell the two apart
            raise _Unknown from error
        if not self._fits(said, found, where):
            raise _Unknown
        return found

    def _fits(self, said: Any, found: Any, where: str) -> bool:
        if isinstance(found, Tensor):
            if (
                not isinstance(said, dict)
                or said.get("dtype") != dtype_name(found.dtype)
                or said.get("device") != "cpu"
            ):
                return False
            shape, stride = ([self._number(s, where) for s in said.get(k, ())] for k in ("shape", "stride"))
            dense = _dense(shape, stride) and _dense(found.shape, found.stride())
            return shape == list(found.shape) and (
                stride == list(found.stride()) or (dense and len(shape) == len(stride))
            )
        if isinstance(found, (tuple, list)):
            items = said.get("tuple" if isinstance(found, tuple) else "list") if isinstance(said, dict) else None
            return (
                type(items) is list
                and len(items) == len(found)
                and all(self._fits(s, f, where) for s, f in zip(items, found, strict=True))
            )
        if isinstance(said, dict) and list(said) == ["symint"]:
            return type(found) is int and self._number(said["symint"], where) == found
        return type(said) is type(found) and said == found and isinstance(said, (int, float))

    def _number(self, size: Any, where: str) -> int:
        number = self.scope.at_capture(size, where)
        if number is None:
            raise _Unknown
        return number

    def _build(self, said: Any, where: str) -> Any:
        """As ``build_value``; a tensor of fixed sizes takes the short way."""
        if (
            isinstance(said, dict)
            and "dtype" in said
            and all(type(s) is int for k in ("shape", "stride") for s in said[k])
        ):
            return self.scope.fake(said["shape"], said["stride"], said["dtype"])
        return build_value(said, self.scope, where)

    def _sample(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.device.type != "cpu":
                raise _Unknown
            sizes = [[self._sample(s) for s in v] for v in (value.shape, value.stride())]
            return torch.empty_strided(*sizes, dtype=value.dtype, device=_META)
        if isinstance(value, (tuple, list)):
            return type(value)(self._sample(v) for v in value)
        if isinstance(value, torch.SymInt):
            if value.node.hint is None:
                raise _Unknown
            return int(value.node.hint)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise _Unknown
        return value

    # -- on fakes ----------------------------------------------------------------------------------------------

    def _on_fakes(self, node: fx.Node, said: Any, where: str) -> Any:
        """What the node gives, on fake tensors; for an op that fakes cannot run, what the file says."""
        target, scope = node.target, self.scope
        scope.late.settle(node.graph.nodes)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        try:
            with scope.mode, torch.no_grad():
                found = target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            if not isinstance(target, OpOverload) or ops.row(target) is not None:
                raise LoadError(
                    f"{where}: {op_name(target)} does not take what the file gives it ({_line(error)})"
                ) from error
            return build_value(said, scope, where)
        if type(found) is int:
            want_int(found, where)
        if not agrees(said, found, scope):
            bad(where, f"{op_name(target)} gives another shape or type than the file says")
        return found


def _without_memory(
    target: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with ``device`` set so that nothing is allocated.

    Raises:
        _Unknown: the call names another device than the CPU.
    """
    names = [a.name for a in target._schema.arguments]
    changed, named = list(args), dict(kwargs)
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        if isinstance(value, torch.device) and value.type != "cpu":
            raise _Unknown
        if name == "device":
            if name in named:
                named[name] = _META
            else:
                changed[names.index(name)] = _META
    return tuple(changed), named


def _dense(shape: Any, stride: Any) -> bool:
    """Every element at a place of its own, without holes, in whatever order of the axes."""
    reach = 1
    for step, size in sorted(zip(stride, shape, strict=False)):
        if size > 1 and step != reach:
            return False
        reach *= max(size, 1)
    return True


def _check_count(target: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], said: Any, where: str) -> None:
    """Some ops give as many tensors as a size says: look before they do."""
    count = _COUNTS.get(target._schema.name)
    if count is not None:
        names = (a.name for a in target._schema.arguments)
        given = said.get("list", said.get("tuple")) if isinstance(said, dict) else None
        if type(given) is not list or count({**dict(zip(names, args, strict=False)), **kwargs}) > len(given):
            bad(where, f"{op_name(target)} gives another number of tensors than the file says")


def _check_scalars(name: str, args: tuple[Any, ...], where: str) -> None:
    """Scalar functions compute with numbers; repeated lists and towers of powers are nobody's sizes."""
    numbers = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    if name == "operator.getitem":
        if len(args) != 2 or not isinstance(args[0], (tuple, list)) or type(args[1]) is not int:
            bad(where, "getitem takes an element of several by its number")
        return
    flat = [v for a in args for v in (a if isinstance(a, (tuple, list)) and name == "torch.sym_sum" else [a])]
    if not all(isinstance(v, numbers) for v in flat):
        bad(where, f"{name} takes numbers")
    if name == "operator.pow" and not (len(args) == 2 and type(args[1]) in (int, float) and abs(args[1]) <= 8):
        bad(where, "a power that no size is made of")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
