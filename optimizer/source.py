"""A program as Python that runs: a function of its tensors and its inputs, shapes, dtypes and sites as comments.

    names = {}
    exec(program.code(), names)
    outputs = names["forward"](program.tensors(), *leaves)      # what program(*leaves) gives, bit for bit
"""

from __future__ import annotations

import builtins
import keyword
import math
import operator
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._ops import OpOverload

from graphwright.errors import InternalError, UnsupportedError
from graphwright.nodes import SCALAR_FUNCTIONS, describe, sites_of, walk_nodes

if TYPE_CHECKING:
    from graphwright.ir import Program

_INFIX = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//", operator.truediv: "/", operator.mod: "%",
    operator.pow: "**", operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
    operator.and_: "&", operator.or_: "|",
}  # fmt: skip
_MODULE = {id(f): name for name, f in SCALAR_FUNCTIONS.items()}
#: plain objects of torch whose ``repr`` is an expression
_TORCH_WORDS = (torch.dtype, torch.memory_format, torch.layout)


def code(program: Program) -> str:
    """The program as Python source: imports, then ``forward(tensors, *leaves)``; linear in the number of nodes.

    ``tensors`` maps the names of parameters, buffers and constants to tensors (``program.tensors()``); ``leaves`` are the flat input
    tensors. The function gives the flat tuple of the user's outputs and, as the program does, writes the new values of mutated
    buffers and inputs in place. ``forward`` follows ``torch.no_grad()`` and modes as it finds them.

    Raises:
        UnsupportedError: an argument has no spelling in Python (a random generator, say).
    """
    return "\n".join(_Writer(program).lines()) + "\n"


class _Writer:
    def __init__(self, program: Program):
        self.program = program
        self.spaces = {str(n.target.namespace) for n in program.nodes if isinstance(n.target, OpOverload)}
        self.taken = {"torch", "math", "operator", "tensors", "forward", *self.spaces, *keyword.kwlist, *dir(builtins)}
        self.names: dict[fx.Node, str] = {}
        for node in program.graph.nodes:
            self.names[node] = self._free(node.name)

    def _free(self, name: str) -> str:
        """A Python name that nothing else has."""
        plain = name.isascii() and name.isidentifier()  # Python takes some other letters for the same
        stem = name if plain else "v_" + re.sub(r"\W", "_", name, flags=re.ASCII)
        found, k = stem, 1
        while found in self.taken:
            k += 1
            found = f"{stem}_{k}"
        self.taken.add(found)
        return found

    def lines(self) -> Iterator[str]:
        body = list(self._body())
        yield from self._head(body)
        yield "def forward("
        yield "    tensors,"
        for node in self.program.placeholders:
            yield f"    {self.names[node]},{_comment(_said(node))}"
        yield "):"
        yield from body

    def _head(self, body: list[str]) -> Iterator[str]:
        program = self.program
        count, size = len(program.nodes), program.size_bytes() / 1e6
        yield f"# {count} op{'s' if count != 1 else ''}, {len(program.tensors())} tensors of {size:.3g} MB"
        for name, span in program.signature.symbols.items():
            top = f" <= {span.high}" if span.high is not None else ""
            multiple = f", a multiple of {span.multiple}" if span.multiple != 1 else ""
            yield _comment(f"{span.low} <= {name}{top}{multiple}").strip()
        yield from (f"import {name}" for name in ("math", "operator") if any(f"= {name}." in line for line in body))
        yield "import torch"
        if "graphwright" in self.spaces:
            yield "import graphwright.ops  # makes torch know the ops of graphwright"
        others = sorted(self.spaces - {"aten", "graphwright", "prims", "prim"})
        if others:
            yield f"# import what registers the ops of {', '.join(others)} before this runs"
        yield ""
        for space in sorted(self.spaces):
            yield f"{space} = torch.ops.{space}"
        yield ""
        yield ""

    def _body(self) -> Iterator[str]:
        loaded: set[fx.Node] = set()
        for node in self.program.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                continue
            for read in dict.fromkeys(walk_nodes((node.args, node.kwargs))):
                if read.op == "get_attr" and read not in loaded:  # named where it is first read
                    loaded.add(read)
                    yield f"    {self.names[read]} = tensors[{str(read.target)!r}]{_comment(_said(read))}"
            if node.op == "output":
                yield from self._return(node)
            else:
                comment = _comment("  ".join(part for part in (_said(node), ", ".join(sites_of(node))) if part))
                yield f"    {self.names[node]} = {self._call(node)}{comment}"

    def _return(self, node: fx.Node) -> Iterator[str]:
        signature = self.program.signature
        outs = list(node.args[0])  # type: ignore[arg-type]
        count = len(outs) - len(signature.mutations)
        if signature.mutations:
            yield "    with torch.no_grad():"
        for mutation, value in zip(signature.mutations, outs[count:], strict=True):
            target = f"tensors[{mutation.buffer!r}]" if mutation.buffer is not None else self.names[self.program.placeholders[mutation.input]]
            yield f"        {target}.copy_({self._value(value)})"
        structure = _comment(f"the model's own: {signature.outputs.describe()}") if signature.outputs is not None else ""
        yield f"    return {self._value(tuple(outs[:count]))}{structure}"

    def _call(self, node: fx.Node) -> str:
        args, kwargs = _shortest(node)
        args = [self._value(a) for a in args]
        if node.target is operator.getitem:
            return f"{args[0]}[{args[1]}]"
        sign = _INFIX.get(node.target)  # type: ignore[arg-type]
        if sign is not None and len(args) == 2:
            return f"{args[0]} {sign} {args[1]}"
        args += [f"{k}={self._value(v)}" for k, v in kwargs.items()]
        return f"{self._function(node.target)}({', '.join(args)})"

    def _function(self, target: Any) -> str:
        if isinstance(target, OpOverload):
            space, name = target._schema.name.split("::", 1)
            text = space
            for part in (name, target._overloadname):
                text = f"{text}.{part}" if part.isidentifier() and not keyword.iskeyword(part) else f"getattr({text}, {part!r})"
            return text
        name = _MODULE.get(id(target))
        if name is None:
            raise InternalError(f"{target!r} is neither an op nor a scalar function")
        return name.replace("builtins.", "").replace("_operator.", "operator.")

    def _value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, (tuple, list)):
            inner = ", ".join(map(self._value, value))
            return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{self._value(k)}: {self._value(v)}" for k, v in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({self._value(value.start)}, {self._value(value.stop)}, {self._value(value.step)})"
        if value is None or value is Ellipsis or isinstance(value, (bool, int, str)):
            return "..." if value is Ellipsis else repr(value)
        if isinstance(value, float):
            return repr(value) if math.isfinite(value) else f'float("{value!r}")'
        if isinstance(value, complex):
            return f"complex({self._value(value.real)}, {self._value(value.imag)})"
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        if isinstance(value, _TORCH_WORDS):
            return str(value)
        raise UnsupportedError(f"an argument of type {type(value).__name__} has no spelling in Python", where="Program.code()",
                               hint="program.text() shows it in words.")  # fmt: skip


def _shortest(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """The arguments without those that say what the op's schema says anyway."""
    args, kwargs = list(node.args), dict(node.kwargs)
    if not isinstance(node.target, OpOverload):
        return args, kwargs
    schema = node.target._schema.arguments
    usual = {a.name for a in schema if a.has_default_value() and _same(kwargs.get(a.name, ...), a.default_value)}
    while args and len(args) <= len(schema) and schema[len(args) - 1].has_default_value() and _same(args[-1], schema[len(args) - 1].default_value):
        args.pop()
    return args, {k: v for k, v in kwargs.items() if k not in usual}


def _same(value: Any, default: Any) -> bool:
    """Equal, and of one type: 1 and True are two things to an op."""
    if isinstance(default, list):
        return isinstance(value, (list, tuple)) and len(value) == len(default) and all(map(_same, value, default))
    return type(value) is type(default) and bool(value == default)


def _said(node: fx.Node) -> str:
    """Shape and dtype; the device where it is no CPU, the kind of a scalar."""
    value = node.meta.get("val")
    device = getattr(value, "device", None)
    text = describe(value)
    return text if device is None or device.type in ("cpu", "meta") else f"{text} on {device}"


def _comment(text: str) -> str:
    """Sites and symbols may come from a file: whatever could end a comment becomes a space."""
    return "  # " + re.sub(r"[^\S ]|[\x00-\x1f\x7f]", " ", text)
