"""Ops from outside: a row for an op of the user's own, or of another library, with a reference body.

The row makes the op a citizen: it is captured as one node with its work and traffic, patterns match it, files may name
it, and kernels can be registered for it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from graphwright.errors import InputError, InternalError, nearest
from graphwright.ops import axes as spelling
from graphwright.ops import registry
from graphwright.ops.registry import OpRow

_NAME = re.compile(r"([A-Za-z_]\w*)(?:\.|::)([A-Za-z_]\w*)\Z")
_TRAITS = (registry.CONTRACTION, registry.ELEMENTWISE, registry.REDUCTION, registry.NORM, registry.SOFTMAX, registry.POOL, registry.VIEW,
           registry.CAST, registry.SHAPE, registry.COMMUTATIVE, registry.LAYOUT_FREE, registry.RANDOM, registry.QUANT)  # fmt: skip


def register_op(
    name: str,
    *,
    axes: str | Callable[..., str | None] | None = None,
    traits: Iterable[str] = (),
    flops: Callable[[Mapping[str, Any], Any], int] | None = None,
    overload: str = "default",
    fake: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Give an op a row in the op table, with the decorated function as its reference::

        @gw.register_op("mylib.scaled_softsign", traits={"elementwise"})
        def scaled_softsign(x: Tensor, scale: float = 1.0) -> Tensor:
            return scale * x / (1 + x.abs())

    Where ``torch.ops.mylib.scaled_softsign`` does not exist, it is defined from the function's type hints: the function
    computes it on every device and, run again, its gradient. Where it exists (``torch.library``, a compiled extension), the row
    describes it, and the function serves for what the op lacks: a shape rule, an implementation for the CPU. A function in
    torch's own ops is the shape rule, too; one that leaves torch (NumPy, ctypes) needs ``fake``.

    Args:
        name: ``"library.op"``.
        axes: spelling of the tensor arguments and results, as in ``"* i, o i -> * o"``, see ``graphwright.ops.axes``; from it follow
            FLOPs and what quantization and pruning may ask.
        traits: facts that passes ask for: ``"elementwise"``, ``"contraction"``, ``"commutative"``, …
        flops: ``(arguments by name, result) -> int``, where axes and traits don't say it.
        overload: of an existing op with several.
        fake: a shape rule: same parameters, gives empty tensors of the result's shape and dtype.

    Returns:
        The op, ``torch.ops.library.op``: what a model calls.

    Raises:
        InputError: the name is none, reserved or taken, or the function does not fit the op.
    """
    namespace, short = _split(name)
    where = f"register_op({name!r})"
    row_name = f"{namespace}.{short}"
    found = _existing(namespace, short, overload, where)

    def add(body: Callable[..., Any]) -> Any:
        if not callable(body):
            raise InputError(f"{body!r} is no function", where=where, hint="Put @gw.register_op(...) above the op's reference.")
        owner = getattr(body, "__module__", None) or "__main__"
        _allowed(found, row_name, owner, where)
        wanted, mine = _traits(traits, where), found is None or row_name in _DEFINED
        if mine:
            _axes(axes, None, where)
            target = _define(row_name, body, fake or body, where)
        else:
            target = found
            _check_signature(target, body, where)
        row = OpRow(row_name, target, body, _axes(axes, target, where), wanted, flops, tuple(a.name for a in target._schema.arguments), owner)
        if not mine:
            _complete(target, body, fake)
        if mine and found is not None:
            registry._ROWS.pop(found, None)  # its schema may have changed, and then it is another op
        registry._ROWS[target] = row
        return getattr(getattr(torch.ops, namespace), short)

    return add


def unregister_op(name: str) -> None:
    """Undo ``register_op``: the row is gone. An op that was defined for it stays in torch, which has no way to forget one."""
    namespace, short = _split(name)
    for target, row in list(registry._ROWS.items()):
        if row.name == f"{namespace}.{short}" and row.owner:
            del registry._ROWS[target]


def _split(name: str) -> tuple[str, str]:
    match = _NAME.match(name) if isinstance(name, str) else None
    if match is None:
        raise InputError(f"{name!r} is no name of an op", where="register_op", hint='Write "library.op", as in "mylib.softsign".')
    return match[1], match[2]


def _existing(namespace: str, short: str, overload: str, where: str) -> OpOverload | None:
    """The op of that name, or None where it is to be defined.

    Raises:
        InputError: the name belongs to torch or Graphwright, or the op can't have a row.
    """
    name = f"{namespace}.{short}"
    if namespace == "graphwright":
        raise InputError("the namespace graphwright is taken by Graphwright itself", where=where, hint=f"Name it after your library: 'mylib.{short}'.")
    packet = getattr(getattr(torch.ops, namespace), short, None)
    if packet is None:
        if namespace in ("aten", "prim", "prims", "quantized"):
            known = dir(torch.ops.aten) if namespace == "aten" else ()
            raise InputError(f"torch {torch.__version__} has no op {name}", where=where, hint=nearest(short, known) or f"Name yours after your library: 'mylib.{short}'.")
        return None
    target = getattr(packet, overload, None)
    if target is None:
        raise InputError(f"op {name} has no overload {overload!r}", where=where, hint=f"It has {', '.join(packet.overloads())}: pass overload=...")
    if target._schema.is_mutable:
        raise InputError(f"op {name} writes into its arguments", where=where, hint="Register a functional one, which returns its result.")
    row = registry.row(target)
    if row is not None and not row.owner:
        raise InputError(f"op {name} has a row already: it is one of Graphwright's own", where=where, hint="Register a kernel for it: gw.register_kernel.")
    return target


def _allowed(target: OpOverload | None, name: str, owner: str, where: str) -> None:
    """No other package has described the op."""
    row = None if target is None else registry.row(target)
    if row is not None and row.owner.partition(".")[0] != owner.partition(".")[0]:
        raise InputError(f"op {name} has a row already, registered by {row.owner}", where=where,
                         hint=f"Choose another name, or call graphwright.ops.extend.unregister_op({name!r}) first.")  # fmt: skip


@dataclass
class _Defined:
    """An op that ``register_op`` has defined; it stays in torch, and what it computes may be exchanged."""

    schema: str
    body: Callable[..., Any]
    fake: Callable[..., Any]


_DEFINED: dict[str, _Defined] = {}


def _shape(name: str, op: _Defined, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return op.fake(*args, **kwargs)
    except RuntimeError as error:
        if op.fake is not op.body:
            raise
        raise RuntimeError(f"{error} (in the reference of op {name}, run on tensors without contents for its shapes; "
                           "where that can't be done, pass fake= to gw.register_op)") from error  # fmt: skip


@contextmanager
def _same_packet(namespace: str, short: str) -> Iterator[None]:
    """Let ``torch.ops.namespace.short`` stay the object that it was while the op is defined anew: the one that callers hold would
    point into memory that torch has freed."""
    home = getattr(torch.ops, namespace)
    known = vars(home).get(short)
    yield
    if known is not None:
        vars(known).clear()
        vars(known).update(vars(getattr(home, short)))
        setattr(home, short, known)


def _define(name: str, body: Callable[..., Any], fake: Callable[..., Any], where: str) -> OpOverload:
    """Define an op, or exchange what it computes where its schema stays."""
    try:
        signature = inspect.signature(body, eval_str=True)
        made = _Defined("", body, fake)

        def run(*args: Any, **kwargs: Any) -> Any:
            return made.body(*args, **kwargs)

        run.__signature__ = signature  # type: ignore[attr-defined]
        made.schema = torch.library.infer_schema(run, mutates_args=())
        known = _DEFINED.get(name)
        if known is not None and known.schema == made.schema:
            known.body, known.fake = body, fake
        else:
            with _same_packet(*name.split(".")):
                registry._define(name.replace(".", "::"), run, lambda *args, **kwargs: _shape(name, made, args, kwargs))
            _DEFINED[name] = made
    except (ValueError, TypeError, NameError, RuntimeError) as error:
        raise InputError(f"no op can be made of {getattr(body, '__name__', body)!r}: {str(error).strip().splitlines()[0]}", where=where,
                         hint="Give every parameter and the result a type hint: Tensor, int, float, bool, str, lists and optional ones of these.") from error  # fmt: skip
    found = registry.resolve(name)
    assert found is not None
    return found


def _complete(target: OpOverload, body: Callable[..., Any], fake: Callable[..., Any] | None) -> None:
    """Let the reference serve for what an existing op lacks: a shape rule, an implementation for the CPU."""
    from torch._library.custom_ops import OPDEFS
    from torch._library.simple_registry import singleton

    name, has = target.name(), torch._C._dispatch_has_kernel_for_dispatch_key
    whole = any(has(name, key) for key in ("CompositeExplicitAutograd", "CompositeImplicitAutograd"))
    if not whole and not has(name, "CPU"):
        torch.library.impl(target._schema.name, "CPU")(body)
    made = OPDEFS.get(name.removesuffix(".default"))
    if made is not None:  # it has a Meta kernel in any case, which fails where nothing was registered for it
        lacks = made._abstract_fn is None
    else:
        lacks = not has(name, "Meta") and not has(name, "CompositeImplicitAutograd") and singleton.find(name).fake_impl.kernel is None
    if fake is not None or lacks:
        torch.library.register_fake(name.removesuffix(".default"), fake or body, allow_override=True)


def _check_signature(target: OpOverload, body: Callable[..., Any], where: str) -> None:
    """The reference takes what the op takes, under the same names."""
    try:
        parameters = inspect.signature(body).parameters.values()
    except (TypeError, ValueError):
        return
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return
    mine, theirs = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD], [a.name for a in target._schema.arguments]
    if mine != theirs:
        raise InputError(f"the reference takes ({', '.join(mine)}), the op takes ({', '.join(theirs)})", where=where, hint=f"The op's schema: {target._schema}")


def _traits(traits: Iterable[str], where: str) -> frozenset[str]:
    found = (traits,) if isinstance(traits, str) else tuple(traits)
    for trait in found:
        if trait not in _TRAITS:
            raise InputError(f"there is no trait {trait!r}", where=where, hint=nearest(str(trait), _TRAITS) or f"The traits are {', '.join(_TRAITS)}.")
    return frozenset(found)


def _axes(axes: Any, target: OpOverload | None, where: str) -> Any:
    """The spelling, with as many operands as the op has where that is known."""
    if axes is None or callable(axes):
        return axes
    hint = 'One word per axis, an operand per tensor argument, "->", an operand per result: "* i, o i -> * o".'
    if not isinstance(axes, str) or axes.count("->") != 1:
        raise InputError(f"{axes!r} spells no axes", where=where, hint=hint)
    counts = []
    for side in axes.split("->"):
        try:
            counts.append(len(spelling._words(side.strip())))
        except InternalError as error:
            raise InputError(error.what, where=where, hint=hint) from None
    if target is None:
        return axes
    tensors = [a for a in target._schema.arguments if "Tensor" in str(a.type)]
    lists = any("[]" in str(a.type) for a in tensors)
    if not lists and (counts[0] != len(tensors) or counts[1] != len(target._schema.returns)):
        raise InputError(f"the axes {axes!r} spell {counts[0]} arguments and {counts[1]} results; the op has {len(tensors)} and "
                         f"{len(target._schema.returns)}", where=where, hint=hint)  # fmt: skip
    return axes


def example(row: OpRow, args: Iterable[Any]) -> tuple[list[Any], Any]:
    """Fake arguments like these (in schema order), and what the op's shape rule gives on them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def faked(x: Any) -> Any:
        if isinstance(x, Tensor):
            return mode.from_tensor(x.detach(), static_shapes=True)
        return type(x)(map(faked, x)) if isinstance(x, (list, tuple)) else x

    mode = FakeTensorMode()
    given = [faked(a) for a in args]
    schema = row.overload._schema.arguments
    named = {a.name: v for a, v in zip(schema, given, strict=False) if a.kwarg_only}
    with mode, torch.no_grad():
        return given, row.overload(*[v for a, v in zip(schema, given, strict=False) if not a.kwarg_only], **named)
