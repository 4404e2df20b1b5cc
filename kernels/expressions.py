"""Expressions of device code as LLVM's instructions; see ``graphwright.kernels.translate`` for the language."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from graphwright.errors import InternalError
from graphwright.kernels.language import (
    BOOL,
    FLOAT32,
    FLOAT64,
    INT8,
    INT32,
    INT64,
    UINT8,
    UINT16,
    VOID,
    Device,
    Intrinsic,
    Kind,
    Value,
    ir,
)  # fmt: skip

_CASTS: dict[Any, Kind] = {np.int64: INT64, np.int32: INT32, np.int8: INT8, np.uint8: UINT8, np.uint16: UINT16, np.float32: FLOAT32}
_KNOWN: dict[type, Kind] = {bool: BOOL, np.bool_: BOOL, int: INT64, float: FLOAT64, **{k: v for k, v in _CASTS.items()}}


_INTEGER = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.FloorDiv: "", ast.Mod: "", ast.BitAnd: "and_", ast.BitOr: "or_",
            ast.BitXor: "xor", ast.LShift: "shl", ast.RShift: "ashr"}  # fmt: skip
_FLOATING = {ast.Add: "fadd", ast.Sub: "fsub", ast.Mult: "fmul", ast.Div: "fdiv"}
_COMPARED = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "<": lambda x, y: x < y, "<=": lambda x, y: x <= y, ">": lambda x, y: x > y, ">=": lambda x, y: x >= y,
    "==": lambda x, y: x == y, "!=": lambda x, y: x != y,
}  # fmt: skip
_FOLDED: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda x, y: x + y, ast.Sub: lambda x, y: x - y, ast.Mult: lambda x, y: x * y, ast.Div: lambda x, y: x / y,
    ast.FloorDiv: lambda x, y: x // y, ast.Mod: lambda x, y: x % y, ast.BitAnd: lambda x, y: x & y, ast.BitOr: lambda x, y: x | y,
    ast.BitXor: lambda x, y: x ^ y, ast.LShift: lambda x, y: x << y, ast.RShift: lambda x, y: x >> y, ast.Pow: lambda x, y: x**y,
}  # fmt: skip


class Text:
    """A function of device code given as text instead of as a Python function; Python never runs it.

    Args:
        name: what it is called, and what its compiled form is kept under.
        source: ``def name(...): ...``.
        names: what the names in it stand for that are not its own.
    """

    def __init__(self, name: str, source: str, names: dict[str, Any]):
        # what is asked of a function and of its code object
        self.__name__ = self.co_name = name
        self.__module__, self.__globals__, self.__code__ = "graphwright.kernels.generated", names, self
        self.co_filename, self.co_firstlineno, self.source = f"<{name}>", 1, source


@cache
def tree_of(code: Any) -> ast.FunctionDef:
    tree = ast.parse(code.source if isinstance(code, Text) else textwrap.dedent(inspect.getsource(code))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    return tree


@dataclass
class Expressions:
    """What is known where an expression stands.

    Attributes:
        at: LLVM's builder.
        device: the function whose names and flags hold.
        call: calls a device function: a list of values.
        variables: by name the address of a slot, with the kind of what lies there.
        fixed: parameters that nothing is assigned to.
        line: of the statement.
        accesses: in a loop of independent turns, LLVM's name of what they load and store.
    """

    at: Any
    device: Device
    call: Callable[[Any, Device, list[Value]], list[Value]]
    variables: dict[str, Value] = field(default_factory=dict)
    fixed: dict[str, Value] = field(default_factory=dict)
    line: int = 1
    accesses: Any = None

    def _marked(self, access: Any) -> Any:
        if self.accesses is not None:
            access.set_metadata("llvm.access.group", self.accesses)
        return access

    def _value(self, node: ast.expr) -> Value:
        values = self._values(node)
        if len(values) != 1:
            raise self._error(f"{ast.unparse(node)} is {len(values)} values where one is wanted", node)
        return values[0]

    def _values(self, node: ast.expr) -> list[Value]:
        match node:
            case ast.Tuple():
                return [self._value(e) for e in node.elts]
            case ast.Call():
                return self._call(node)
            case ast.Constant():
                return [self._number(node.value, node=node)]
            case ast.Name() if node.id in self.variables:
                return [self._read(self.variables[node.id])]
            case ast.Name() if node.id in self.fixed:
                return [self.fixed[node.id]]
            case ast.Name() | ast.Attribute():
                return [self._number(self._global(node), node=node)]
            case ast.Subscript():
                place, kind = self._place(node)
                return [Value(kind, self._marked(self.at.load(place, typ=kind.llvm)))]
            case ast.BinOp():
                return [self._binary(node.op, self._value(node.left), self._value(node.right), node)]
            case ast.UnaryOp():
                return [self._unary(node)]
            case ast.Compare() | ast.BoolOp():
                return [self._truth(node)]
            case ast.IfExp():
                return [self._either(node)]
        raise self._error(f"{ast.unparse(node)} is not part of the language of kernels", node)

    def _global(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Attribute):
            return getattr(self._global(node.value), node.attr)
        assert isinstance(node, ast.Name)
        names = self.device.body.__globals__
        if node.id in names:
            return names[node.id]
        if node.id in ("min", "max"):
            return node.id
        raise self._error(f"{node.id} is neither a variable here nor a name of the module", node)

    def _number(self, number: Any, kind: Kind | None = None, node: ast.AST | None = None) -> Value:
        kind = kind or _KNOWN.get(type(number))
        if kind is None:
            raise self._error(f"{number!r} is no number", node)
        number = float(number) if kind.family == "float" else int(number)
        return Value(kind, ir.Constant(kind.llvm, number), number)

    def _binary(self, op: ast.operator, x: Value, y: Value, node: ast.AST) -> Value:
        families = {x.kind.family, y.kind.family}
        if x.known is not None and y.known is not None and FLOAT32 not in (x.kind, y.kind):
            return self._number(_FOLDED[type(op)](x.known, y.known), node=node)
        if families == {"int"} and type(op) in _INTEGER:
            return self._integer(op, self._as(x, INT64), self._as(y, INT64))
        if families == {"float"} and x.kind == y.kind and type(op) in _FLOATING:
            return Value(x.kind, getattr(self.at, _FLOATING[type(op)])(x.llvm, y.llvm, flags=self.device.flags))
        raise self._error(f"{type(op).__name__} of a {x.kind.name} and a {y.kind.name}: convert one of them", node)

    def _integer(self, op: ast.operator, x: Value, y: Value) -> Value:
        at, zero = self.at, INT64.llvm(0)
        if not isinstance(op, (ast.FloorDiv, ast.Mod)):
            name = _INTEGER[type(op)]
            flags = {"flags": ("nsw",)} if name in ("add", "sub", "mul") else {}
            return Value(INT64, getattr(at, name)(x.llvm, y.llvm, **flags))
        if y.known and y.known > 0 and y.known & (y.known - 1) == 0:
            if isinstance(op, ast.Mod):
                return Value(INT64, at.and_(x.llvm, INT64.llvm(y.known - 1)))
            return Value(INT64, at.ashr(x.llvm, INT64.llvm(y.known.bit_length() - 1)))
        by = y.llvm if y.known else at.select(at.icmp_signed("==", y.llvm, zero), INT64.llvm(1), y.llvm)  # no trap, whatever comes
        rest = at.srem(x.llvm, by)
        off = at.and_(at.icmp_signed("!=", rest, zero), at.icmp_signed("<", at.xor(rest, by), zero))
        if isinstance(op, ast.Mod):
            return Value(INT64, at.select(off, at.add(rest, by), rest))
        return Value(INT64, at.sub(at.sdiv(x.llvm, by), at.zext(off, INT64.llvm)))

    def _unary(self, node: ast.UnaryOp) -> Value:
        if isinstance(node.op, ast.Not):
            test = self._truth(node.operand)
            return self._number(not test.known, BOOL) if test.known is not None else Value(BOOL, self.at.not_(test.llvm))
        x = self._value(node.operand)
        if not isinstance(node.op, ast.USub) or x.kind.family not in ("int", "float"):
            raise self._error(f"{ast.unparse(node)} is not part of the language of kernels", node)
        if x.known is not None:
            return self._number(-x.known, x.kind)
        if x.kind.family == "float":
            return Value(x.kind, self.at.fneg(x.llvm, flags=self.device.flags))
        return Value(INT64, self.at.neg(self._as(x, INT64).llvm))

    def _truth(self, node: ast.expr) -> Value:
        if isinstance(node, ast.BoolOp):
            return self._chain(isinstance(node.op, ast.And), [lambda v=v: self._truth(v) for v in node.values])
        if isinstance(node, ast.Compare):
            x, tests = self._value(node.left), []
            for op, right in zip(node.ops, node.comparators, strict=True):
                y = self._value(right)
                tests.append(lambda op=op, x=x, y=y: self._compare(op, x, y, node))
                x = y
            return self._chain(True, tests)
        value = self._value(node)
        if value.kind is BOOL:
            return value
        if value.kind.family == "int":
            return self._compare(ast.NotEq(), value, self._number(0, value.kind), node)
        raise self._error(f"a {value.kind.name} is neither true nor false", node)

    def _chain(self, every: bool, tests: list[Callable[[], Value]]) -> Value:
        """All of the tests, or any, each made only where those before leave it open."""
        found = tests[0]()
        for test in tests[1:]:
            if found.known is not None:
                found = test() if bool(found.known) == every else found
                continue
            before, more, after = self.at.block, self.at.append_basic_block(), self.at.append_basic_block()
            self.at.cbranch(found.llvm, *((more, after) if every else (after, more)))
            self.at.position_at_end(more)
            last = test()
            end = self.at.block
            self.at.branch(after)
            self.at.position_at_end(after)
            phi = self.at.phi(BOOL.llvm)
            phi.add_incoming(BOOL.llvm(0 if every else 1), before)
            phi.add_incoming(last.llvm, end)
            found = Value(BOOL, phi)
        return found

    def _compare(self, op: ast.cmpop, x: Value, y: Value, node: ast.AST) -> Value:
        sign = _COMPARED.get(type(op))
        families = {x.kind.family, y.kind.family}
        if sign and x.known is not None and y.known is not None:
            return self._number(_ORDER[sign](x.known, y.known), BOOL)
        if sign and families == {"int"}:
            same = x.kind == y.kind
            x, y = (x, y) if same else (self._as(x, INT64), self._as(y, INT64))
            compare = self.at.icmp_signed if x.kind.signed else self.at.icmp_unsigned
            return Value(BOOL, compare(sign, x.llvm, y.llvm))
        if sign and families == {"float"} and x.kind == y.kind:
            compare = self.at.fcmp_unordered if sign == "!=" else self.at.fcmp_ordered
            return Value(BOOL, compare(sign, x.llvm, y.llvm))
        raise self._error(f"a {x.kind.name} and a {y.kind.name} are not compared", node)

    def _either(self, node: ast.IfExp) -> Value:
        test = self._truth(node.test)
        if test.known is not None:
            return self._value(node.body if test.known else node.orelse)
        then, other, after = (self.at.append_basic_block() for _ in range(3))
        self.at.cbranch(test.llvm, then, other)
        self.at.position_at_end(then)
        x, x_end = self._value(node.body), self.at.block
        self.at.position_at_end(other)
        y, y_end = self._value(node.orelse), self.at.block
        kind = x.kind if x.kind == y.kind else INT64
        values = []
        for value, end in ((x, x_end), (y, y_end)):
            self.at.position_at_end(end)
            values.append((self._as(value, kind, node).llvm, end))
            self.at.branch(after)
        self.at.position_at_end(after)
        phi = self.at.phi(kind.llvm)
        for value, end in values:
            phi.add_incoming(value, end)
        return Value(kind, phi)

    # -- calls ------------------------------------------------------------------------------------------------------

    def _call(self, node: ast.Call) -> list[Value]:
        function = self._global(node.func)
        args = [self._value(a) for a in node.args]
        if function in ("min", "max"):
            return [self._extreme(function, args, node)]
        if isinstance(function, Device):
            return self.call(self.at, function, args)
        if isinstance(function, Intrinsic):
            if len(args) != len(function.operands):
                raise self._error(f"{function.__name__} takes {len(function.operands)} arguments, not {len(args)}", node)
            made = function.emit(self.at, *(self._as(a, k, node).llvm for a, k in zip(args, function.operands, strict=True)))
            return [] if function.result is VOID else [Value(function.result, made)]
        if function in _CASTS:
            return [self._cast(args[0], _CASTS[function], node)]
        raise self._error(f"{ast.unparse(node.func)} can't be called in a kernel", node)

    def _extreme(self, name: str, args: list[Value], node: ast.AST) -> Value:
        best = self._as(args[0], INT64, node)
        for arg in args[1:]:
            value = self._as(arg, INT64, node)
            best = Value(INT64, self.at.select(self.at.icmp_signed("<" if name == "min" else ">", value.llvm, best.llvm), value.llvm, best.llvm))
        return best

    def _as(self, value: Value, kind: Kind, node: ast.AST | None = None, *, narrow: bool = False) -> Value:
        """The value where ``kind`` is wanted: integers are widened, and narrowed only where it is stored."""
        if value.kind == kind:
            return value
        if value.kind.family == kind.family == "int" and (narrow or kind is INT64 or value.known is not None):
            return self._cast(value, kind, node)
        raise self._error(f"a {value.kind.name} where a {kind.name} is wanted", node)

    def _cast(self, x: Value, kind: Kind, node: ast.AST | None) -> Value:
        if x.kind == kind:
            return x
        source, target, at = x.kind.family, kind.family, self.at
        if x.known is not None and source in ("int", "float", "bool"):
            return self._known_cast(x.known, kind)
        if source == "int" and target == "int":
            wider = kind.llvm.width > x.kind.llvm.width
            if kind.llvm.width == x.kind.llvm.width:
                return Value(kind, x.llvm)
            return Value(kind, (at.sext if x.kind.signed else at.zext)(x.llvm, kind.llvm) if wider else at.trunc(x.llvm, kind.llvm))
        if source == "bool" and target == "int":
            return Value(kind, at.zext(x.llvm, kind.llvm))
        if source == "int" and target == "float":
            return Value(kind, (at.sitofp if x.kind.signed else at.uitofp)(x.llvm, kind.llvm))
        if source == "float" and target == "int":
            return Value(kind, (at.fptosi if kind.signed else at.fptoui)(x.llvm, kind.llvm))
        if (x.kind, kind) == (FLOAT64, FLOAT32):
            return Value(kind, at.fptrunc(x.llvm, kind.llvm))
        raise self._error(f"a {x.kind.name} can't become a {kind.name}", node)

    def _known_cast(self, number: Any, kind: Kind) -> Value:
        if kind.family == "float":
            return self._number(float(np.float32(number)) if kind is FLOAT32 else number, kind)
        bits = kind.llvm.width
        number = int(number) & (1 << bits) - 1
        return self._number(number - (1 << bits) if kind.signed and number >> bits - 1 else number, kind)

    def _read(self, slot: Value) -> Value:
        return Value(slot.kind, self.at.load(slot.llvm, typ=slot.kind.llvm))

    def _place(self, node: ast.Subscript) -> tuple[Any, Kind]:
        base, index = self._value(node.value), self._as(self._value(node.slice), INT64, node)
        if base.kind.element is None:
            raise self._error(f"a {base.kind.name} can't be indexed", node)
        return self.at.gep(base.llvm, [index.llvm], source_etype=base.kind.element.llvm), base.kind.element

    def _error(self, what: str, node: ast.AST | None = None) -> InternalError:
        code = self.device.body.__code__
        line = code.co_firstlineno + getattr(node, "lineno", self.line) - 1
        return InternalError(what, where=f"kernel {code.co_name}, {code.co_filename}:{line}")
