"""What device code is made of: kinds, values, functions and intrinsics. ``graphwright.kernels.translate`` says how it is compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

try:
    from llvmlite import ir
except Exception as problem:  # noqa: BLE001  a broken llvmlite raises OSError
    ir = None
    IMPORT_PROBLEM = f"{type(problem).__name__}: {problem}"

#: Rounding and contraction (a*b + c in one step) may be chosen freely; NaN, infinities and the order of sums may not.
FAST = ("contract", "nsz")


@dataclass(frozen=True)
class Kind:
    """What a value is.

    Attributes:
        llvm: its type in LLVM's words.
        family: ``"int"``, ``"float"``, ``"bool"``, ``"vector"``, ``"pointer"`` or ``"void"``.
        signed: of integers.
        element: of pointers.
    """

    name: str
    llvm: Any
    family: str
    signed: bool = True
    element: Kind | None = None


def _int(bits: int, signed: bool = True) -> Kind:
    return Kind(("int" if signed else "uint") + str(bits), ir and ir.IntType(bits), "int", signed)


INT64, INT32, INT8, UINT8, UINT16 = _int(64), _int(32), _int(8), _int(8, False), _int(16, False)
FLOAT32, FLOAT64 = Kind("float32", ir and ir.FloatType(), "float"), Kind("float64", ir and ir.DoubleType(), "float")
BOOL, VOID = Kind("bool", ir and ir.IntType(1), "bool"), Kind("void", ir and ir.VoidType(), "void")


@dataclass(frozen=True, eq=False)
class Value:
    """A value of a kernel; ``known`` is the number, where that is known before the kernel runs."""

    kind: Kind
    llvm: Any
    known: Any = None


@dataclass(frozen=True, eq=False)
class Intrinsic:
    """A function whose instructions ``emit(builder, *llvm values)`` writes; it gives the LLVM value of the result."""

    result: Kind
    operands: tuple[Kind, ...]
    emit: Callable[..., Any]

    @property
    def __name__(self) -> str:
        return self.emit.__name__


def intrinsic(result: Kind, *operands: Kind) -> Callable[[Callable[..., Any]], Intrinsic]:
    return lambda emit: Intrinsic(result, operands, emit)


@dataclass(frozen=True, eq=False)
class Device:
    """A function that kernels call; ``flags`` are LLVM's for its floating-point operations."""

    body: Callable[..., Any]
    flags: tuple[str, ...] = FAST

    @property
    def __name__(self) -> str:
        return self.body.__name__


def pointer(element: Kind) -> Intrinsic:
    """``pointer(kind)(address)``: what can be indexed."""
    kind = Kind(f"pointer to {element.name}", element.llvm and element.llvm.as_pointer(), "pointer", element=element)
    return Intrinsic(kind, (INT64,), lambda at, address: at.inttoptr(address, kind.llvm))


def known(at: Any, name: str, result: Any, *args: Any) -> Any:
    """Call one of LLVM's own functions by its name."""
    function = at.module.globals.get(name) or ir.Function(at.module, ir.FunctionType(result, [a.type for a in args]), name)
    return at.call(function, args)


def loop(at: Any, times: Any, first: list[Any], turn: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """A loop of at least one turn: ``turn(step, values)`` writes one and gives the values of the next; gives the last.

    The builder may stand in another block afterwards. What is carried over stays in registers as far as there are enough.
    """
    start, head, done = at.block, at.append_basic_block("turn"), at.append_basic_block("turned")
    at.branch(head)
    at.position_at_end(head)
    step = at.phi(times.type)
    values = [at.phi(v.type) for v in first]
    after = turn(step, values)
    following, end = at.add(step, times.type(1)), at.block
    for phi, before, again in zip([step, *values], [times.type(0), *first], [following, *after], strict=True):
        phi.add_incoming(before, start)
        phi.add_incoming(again, end)
    at.cbranch(at.icmp_signed("<", following, times), head, done)
    at.position_at_end(done)
    return after


def maybe(at: Any, times: Any, first: list[Any], write: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """What ``write`` makes of the values where ``times`` is above 0, else those as they are."""
    start, some, done = at.block, at.append_basic_block("some"), at.append_basic_block("either")
    at.cbranch(at.icmp_signed(">", times, times.type(0)), some, done)
    at.position_at_end(some)
    after = write(first)
    end = at.block
    at.branch(done)
    at.position_at_end(done)
    values = []
    for before, behind in zip(first, after, strict=True):
        phi = at.phi(before.type)
        phi.add_incoming(before, start)
        phi.add_incoming(behind, end)
        values.append(phi)
    return values


#: Says that a device function becomes a function of its own; see the head of this file.
apart = Intrinsic(VOID, (), lambda at: None)
#: A loop whose turns do not touch one another's numbers: what LLVM cannot see where a result lies over an operand.
independent = range


# -- loops of independent turns: metadata of a kind that llvmlite has no call for ------------------------------------


@dataclass(frozen=True)
class _Metadata:
    """A node of a module's metadata, distinct from all others."""

    number: int
    operands: str = ""

    def get_reference(self) -> str:
        return f"!{self.number}"

    def __str__(self) -> str:
        return f"!{self.number} = distinct !{{ {self.operands} }}"


def _node(module: Any, operands: str = "") -> _Metadata:
    node = _Metadata(len(module.metadata), operands)
    module.metadata.append(node)
    return node


def parallel_accesses(module: Any) -> Any:
    """A group of loads and stores that a loop may name: see ``parallel_loop``."""
    return _node(module)


def parallel_loop(module: Any, accesses: Any) -> Any:
    """A loop whose turns may do these loads and stores in any order."""
    said = _node(module, f'!"llvm.loop.parallel_accesses", {accesses.get_reference()}')
    return _node(module, f"!{len(module.metadata)}, {said.get_reference()}")
