"""From Python to LLVM: the small static language in which the CPU kernels are written.

A kernel is a function of one address. It and the ``device`` functions that it calls use what has one machine meaning: numbers
with a fixed kind, addresses, loops over ``range``, ``while``, ``if``, and intrinsics that emit instructions of their own.

    int op int -> int64 (also for narrower ones)      float32 op float32 -> float32      anything else: an error with its line
    //, %  round down                                 a if c else b, and, or: evaluate what they need only
    pointer(address)[i]  loads or stores              a variable keeps the kind that it begins with
    for i in independent(...): as range; what one turn writes, no other turn reads or writes, whatever the addresses

Names that are not local are looked up when the kernel is compiled: numbers become constants, and what they decide is decided
then. Device functions without a loop are put in where they are called; the others become functions of their own, which LLVM
may put in unless they say ``apart()``. One pass over the syntax tree suffices, so a kernel is ready for LLVM within a tenth of a second.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from graphwright.errors import InternalError
from graphwright.kernels import language
from graphwright.kernels.expressions import Expressions, tree_of
from graphwright.kernels.language import (
    INT64,
    VOID,
    Device,
    Kind,
    Value,
    apart,
    ir,
    parallel_accesses,
    parallel_loop,
)  # fmt: skip


@cache
def _has_source() -> bool:
    try:
        return bool(inspect.getsource(_has_source.__wrapped__))
    except OSError:
        return False


def unavailable() -> str | None:
    """None, or why kernels can't be translated in this process."""
    if ir is None:
        return f"llvmlite cannot be imported ({language.IMPORT_PROBLEM}); install it with: pip install llvmlite"
    return None if _has_source() else "kernels are compiled from their Python source, which this installation lacks"


def translate(body: Callable[[int], None], name: str) -> Any:
    """An LLVM module with the kernel ``void name(address)``.

    Raises:
        InternalError: a construct outside the language, with its file and line.
    """
    module = ir.Module(name)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)]), name)
    _Functions(module).fill(function, Device(body), (INT64,), VOID)
    return module


class _Functions:
    """The functions of one module."""

    def __init__(self, module: Any):
        self.module = module
        self.made: dict[tuple[Any, tuple[Kind, ...]], tuple[Any, Kind]] = {}

    def fill(self, function: Any, device: Device, kinds: tuple[Kind, ...], result: Kind) -> None:
        function.attributes.add("nounwind")
        # LLVM's own choice for the AVX-512 processors before Ice Lake is half their width; measured 1.2 to 1.5 times slower
        set.add(function.attributes, '"prefer-vector-width"="512"')
        at = ir.IRBuilder(function.append_basic_block())
        params = [Value(k, a) for k, a in zip(kinds, function.args, strict=True)]
        given = _Body(at, device, self.call).run(params)
        if result is VOID:
            at.ret_void()
        else:
            at.ret(given[0].llvm)

    def call(self, at: Any, device: Device, args: list[Value]) -> list[Value]:
        """What a device function gives: its body is put in here, or is a function of its own that is called."""
        if not _loops(device) and not _calls(device, apart):
            return _Body(at, device, self.call).run(args)
        kinds = tuple(a.kind for a in args)
        if (device.body, kinds) not in self.made:
            result = self._result(device, kinds)
            function = ir.Function(self.module, ir.FunctionType(result.llvm, [k.llvm for k in kinds]), f"{device.__name__}.{len(self.made)}")
            # Not "internal": LLVM would put a large function into its only caller, where its loops lack registers.
            function.linkage = "linkonce_odr"
            if _calls(device, apart):
                function.attributes.add("noinline")
            self.made[device.body, kinds] = function, result
            self.fill(function, device, kinds, result)
        function, result = self.made[device.body, kinds]
        made = at.call(function, [a.llvm for a in args])
        return [] if result is VOID else [Value(result, made)]

    def _result(self, device: Device, kinds: tuple[Kind, ...]) -> Kind:
        """What a device function gives: found by translating it into a module that is thrown away."""
        if not any(isinstance(n, ast.Return) and n.value is not None for n in ast.walk(tree_of(device.body.__code__))):
            return VOID
        draft = ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), [k.llvm for k in kinds]), "draft")
        params = [Value(k, a) for k, a in zip(kinds, draft.args, strict=True)]
        given = _Body(ir.IRBuilder(draft.append_basic_block()), device, _Functions(draft.module).call).run(params)
        if len(given) != 1:
            raise InternalError(f"a device function with a loop gives one value, not {len(given)}", where=f"kernel {device.__name__}")
        return given[0].kind


@dataclass
class _Loop:
    again: Any
    done: Any


@dataclass
class _Body(Expressions):
    """The body of one device function, written to where the builder stands."""

    loops: list[_Loop] = field(default_factory=list)
    slots: list[Value] = field(default_factory=list)  # of what is returned

    def run(self, params: list[Value]) -> list[Value]:
        tree = tree_of(self.device.body.__code__)
        assigned = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        names = [a.arg for a in tree.args.args]
        if len(names) != len(params):
            raise self._error(f"{tree.name} takes {len(names)} arguments, not {len(params)}", tree)
        self.done = self.at.append_basic_block()
        for name, value in zip(names, params, strict=True):
            if name in assigned:
                self._assign(name, value)
            else:
                self.fixed[name] = value
        self._block(tree.body)
        if not self.at.block.is_terminated:
            self.at.branch(self.done)
        self.at.position_at_end(self.done)
        return [self._read(slot) for slot in self.slots]

    # -- statements -------------------------------------------------------------------------------------------------

    def _block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if self.at.block.is_terminated:  # what follows a return, break or continue
                return
            self.line = statement.lineno
            handler = getattr(self, f"_do_{type(statement).__name__.lower()}", None)
            if handler is None:
                raise self._error(f"{type(statement).__name__} is not part of the language of kernels", statement)
            handler(statement)

    def _do_expr(self, s: ast.Expr) -> None:
        if not isinstance(s.value, ast.Constant):  # a docstring
            self._values(s.value)

    def _do_pass(self, s: ast.Pass) -> None:
        pass

    def _do_assign(self, s: ast.Assign) -> None:
        for target in s.targets:
            if isinstance(target, ast.Tuple):
                values = self._values(s.value)
                if len(values) != len(target.elts):
                    raise self._error(f"{len(values)} values for {len(target.elts)} names", s)
                for name, value in zip(target.elts, values, strict=True):
                    self._put(name, value)
            else:
                self._put(target, self._value(s.value))

    def _do_augassign(self, s: ast.AugAssign) -> None:
        self._put(s.target, self._binary(s.op, self._value(s.target), self._value(s.value), s))

    def _do_return(self, s: ast.Return) -> None:
        values = [] if s.value is None else self._values(s.value)
        if not self.slots:
            self.slots = [Value(v.kind, self._slot(v.kind)) for v in values]
        for slot, value in zip(self.slots, values, strict=True):
            self.at.store(self._as(value, slot.kind, s).llvm, slot.llvm)
        self.at.branch(self.done)

    def _do_if(self, s: ast.If) -> None:
        test = self._truth(s.test)
        if test.known is not None:
            self._block(s.body if test.known else s.orelse)
            return
        then, other, after = (self.at.append_basic_block() for _ in range(3))
        self.at.cbranch(test.llvm, then, other)
        reached = False
        for block, statements in ((then, s.body), (other, s.orelse)):
            self.at.position_at_end(block)
            self._block(statements)
            if not self.at.block.is_terminated:
                self.at.branch(after)
                reached = True
        self.at.position_at_end(after)
        if not reached:
            self.at.unreachable()

    def _do_while(self, s: ast.While) -> None:
        head, body, done = (self.at.append_basic_block() for _ in range(3))
        self.at.branch(head)
        self.at.position_at_end(head)
        test = self._truth(s.test)
        self.at.cbranch(test.llvm, body, done)
        self._looped(s.body, body, _Loop(head, done), head)

    def _do_for(self, s: ast.For) -> None:
        call = s.iter
        named = call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""
        if named not in ("range", "independent") or not isinstance(s.target, ast.Name):
            raise self._error("a loop runs over range() or independent() with one variable", s)
        bounds = [self._as(self._value(a), INT64, s) for a in call.args]
        first, end = (self._number(0, INT64), bounds[0]) if len(bounds) == 1 else bounds[:2]
        step = bounds[2].known if len(bounds) == 3 else 1
        if not step or step < 0:
            raise self._error("the step of range() is a positive constant", s)
        head, body, latch, done = (self.at.append_basic_block() for _ in range(4))
        start = self.at.block
        self.at.branch(head)
        self.at.position_at_end(head)
        count = self.at.phi(INT64.llvm)
        count.add_incoming(first.llvm, start)
        self.at.cbranch(self.at.icmp_signed("<", count, end.llvm), body, done)
        self.at.position_at_end(body)
        self._assign(s.target.id, Value(INT64, count))
        outer, self.accesses = self.accesses, parallel_accesses(self.at.module) if named == "independent" else None
        self._looped(s.body, self.at.block, _Loop(latch, done), latch)
        self.at.position_at_end(latch)
        count.add_incoming(self.at.add(count, INT64.llvm(step), flags=("nsw",)), latch)
        back = self.at.branch(head)
        if self.accesses is not None:
            back.set_metadata("llvm.loop", parallel_loop(self.at.module, self.accesses))
        self.accesses = outer
        self.at.position_at_end(done)

    def _looped(self, statements: list[ast.stmt], body: Any, loop: _Loop, following: Any) -> None:
        self.at.position_at_end(body)
        self.loops.append(loop)
        self._block(statements)
        self.loops.pop()
        if not self.at.block.is_terminated:
            self.at.branch(following)
        self.at.position_at_end(loop.done)

    def _do_break(self, s: ast.Break) -> None:
        self.at.branch(self.loops[-1].done)

    def _do_continue(self, s: ast.Continue) -> None:
        self.at.branch(self.loops[-1].again)

    # -- variables --------------------------------------------------------------------------------------------------

    def _slot(self, kind: Kind) -> Any:
        with self.at.goto_entry_block():
            return self.at.alloca(kind.llvm)

    def _put(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self._assign(target.id, value)
        elif isinstance(target, ast.Subscript):
            place, kind = self._place(target)
            self._marked(self.at.store(self._as(value, kind, target, narrow=True).llvm, place))
        else:
            raise self._error("only names and elements are assigned to", target)

    def _assign(self, name: str, value: Value) -> None:
        if name not in self.variables:
            self.variables[name] = Value(value.kind, self._slot(value.kind))
        slot = self.variables[name]
        if slot.kind != value.kind and slot.kind.family != "int":
            raise self._error(f"{name} is a {slot.kind.name} and becomes a {value.kind.name}")
        self.at.store(self._as(value, slot.kind).llvm, slot.llvm)


def _loops(device: Device) -> bool:
    return any(isinstance(n, (ast.For, ast.While)) for n in ast.walk(tree_of(device.body.__code__)))


def _calls(device: Device, function: Any) -> bool:
    return any(isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and device.body.__globals__.get(n.func.id) is function
               for n in ast.walk(tree_of(device.body.__code__)))  # fmt: skip
