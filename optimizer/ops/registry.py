"""The registry behind the op table: the row record, the ``@op`` decorator, and look-up by ``OpOverload``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload

from graphwright.errors import InternalError

# Traits: facts that passes ask for. A trait is added only when two rooms need it.
CONTRACTION = "contraction"    # multiplies and sums over an axis: linear, conv, matmul
ELEMENTWISE = "elementwise"    # each output element depends on the elements at its own (broadcast) position alone
REDUCTION = "reduction"        # reduces over axes
NORM = "norm"                  # normalisation with affine parameters
SOFTMAX = "softmax"
POOL = "pool"                  # max or mean over windows
VIEW = "view"                  # moves no numbers, or only copies them: reshape, slice, transpose, cat, expand
CAST = "cast"                  # changes dtype, device or layout alone
SHAPE = "shape"                # returns sizes, not tensors
COMMUTATIVE = "commutative"    # f(a, b) == f(b, a), with every other argument at its default
LAYOUT_FREE = "layout-free"    # same numbers for any memory format, and gives its input's format back
RANDOM = "random"              # not a function of its inputs alone
QUANT = "quant"                # quantize / dequantize

Tensors = Mapping[str, Any]


@dataclass(frozen=True)
class OpRow:
    """One op.

    Attributes:
        name: ``"aten.linear"`` or ``"graphwright.conv"``: namespace and op without the overload.
        overload: the ``OpOverload`` that the row describes.
        reference: the body: oracle, fallback, shape rule.
        axes: spelling of the tensor arguments and the output (``"* i, o i, o -> * o"``, see ``graphwright.ops.axes``),
            or a callable ``(**arguments by name, as fake values) -> spelling or None`` where it depends on the
            arguments (grouped convolution, reshape, cat), or None when neither applies.
        traits: facts, see the constants above.
        flops: ``(args by name, output) -> int`` where the spelling does not give it.
        owner: the module that registered it from outside; empty for Graphwright's own rows.
    """

    name: str
    overload: OpOverload
    reference: Callable[..., Any]
    axes: str | Callable[..., str | None] | None = None
    traits: frozenset[str] = frozenset()
    flops: Callable[[Tensors, Any], int] | None = None
    params: tuple[str, ...] = field(default=())
    owner: str = ""

    @property
    def summary(self) -> str:
        """The first line of the reference's docstring."""
        return (inspect.getdoc(self.reference) or self.name).splitlines()[0]

    def bind(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by schema name; the node's arguments are already complete."""
        return {**dict(zip(self.params, args, strict=False)), **kwargs}

    def spelling(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> str | None:
        """The einops spelling for these (fake) arguments, or None."""
        return self.axes(**self.bind(args, kwargs)) if callable(self.axes) else self.axes


_ROWS: dict[OpOverload, OpRow] = {}
_MISSING: list[str] = []
_DEFINED: dict[str, torch.library.CustomOpDef] = {}


def op(
    name: str,
    *,
    axes: str | Callable[..., str | None] | None = None,
    traits: Iterable[str] = (),
    flops: Callable[[Tensors, Any], int] | None = None,
    overloads: Iterable[str] = ("default",),
    fake: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a row to the op table; see the package docstring.

    ``name`` is ``"aten.linear"`` for an op that exists (``overloads`` names those that the row covers), or
    ``"graphwright.name"`` for one of ours, which is registered with ``torch.library.custom_op`` from the body's
    type hints: the body is its CPU and CUDA implementation, its shape rule and, re-run, its gradient. ``fake`` is a
    shorter shape rule, for a body of many ops that stands in a graph hundreds of times; it gives what the body would.

    An ATen overload that this torch does not have is left out and named by ``missing``.

    Raises:
        InternalError: the name stands in the table already, or the op does not exist.
    """

    def add(body: Callable[..., Any]) -> Callable[..., Any]:
        namespace, _, short = name.partition(".")
        if namespace == "graphwright":
            _define(name.replace(".", "::"), body, fake or body)
        for overload in overloads:
            try:
                target = getattr(getattr(getattr(torch.ops, namespace), short), overload)
            except AttributeError:
                if namespace == "aten":
                    _MISSING.append(f"{name}.{overload}")
                    continue
                raise InternalError(f"op {name}.{overload} does not exist in torch {torch.__version__}") from None
            if target in _ROWS:
                raise InternalError(f"op {name}.{overload} has two rows")
            params = tuple(a.name for a in target._schema.arguments)
            _ROWS[target] = OpRow(name, target, body, axes, frozenset(traits), flops, params)
        return body

    return add


def _define(qualified: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register one of our own ops: implementation and gradient both come from ``body``."""
    defined = _DEFINED[qualified] = torch.library.custom_op(qualified, body, mutates_args=())
    defined.register_fake(fake)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))
        ctx.layout = [None if isinstance(x, torch.Tensor) else (x,) for x in inputs]

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if slot is None else slot[0] for slot in ctx.layout]
        args = [a.detach().requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a for a in args]
        with torch.enable_grad():
            out = body(*args)
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None and o.requires_grad]
        wanted = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
        found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        by_id = {id(a): g for a, g in zip(wanted, found, strict=True)}
        return tuple(by_id.get(id(a)) for a in args)

    defined.register_autograd(backward, setup_context=setup_context)


def implement(name: str, device: str, run: Callable[..., Any]) -> None:
    """Let ``run`` compute one of our own ops for tensors on a kind of device; elsewhere the row's body still does.

    Args:
        name: ``"graphwright.linear_int8"``.
        device: ``"cuda"``, as ``torch.device(...).type`` has it.
        run: takes the op's arguments and gives what the body gives, in memory of its own.

    Raises:
        InternalError: the op is none of ours.
    """
    defined = _DEFINED.get(name.replace(".", "::"))
    if defined is None:
        raise InternalError(f"{name} is no op of the table's own: there is nothing to implement")
    defined.register_kernel(device, run)


def row(target: Any) -> OpRow | None:
    """The row of an op, or None: opaque."""
    return _ROWS.get(target)


def rows() -> tuple[OpRow, ...]:
    """Every row, in order of registration."""
    return tuple(_ROWS.values())


def described(body: Callable[..., Any], summary: str) -> Callable[..., Any]:
    """``body`` under a docstring: for rows whose body is a lambda or a function of torch."""

    def reference(*args: Any, **kwargs: Any) -> Any:
        return body(*args, **kwargs)

    reference.__doc__ = summary
    return reference


def missing() -> tuple[str, ...]:
    """ATen overloads that the table describes and this torch lacks."""
    return tuple(_MISSING)


def resolve(name: str) -> OpOverload | None:
    """The overload that ``"aten.add.Tensor"`` or ``"graphwright.quantize"`` names, if it exists in this torch."""
    namespace, _, rest = name.partition(".")
    short, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace, None), short, None)
    found = getattr(packet, overload or "default", None)
    return found if isinstance(found, OpOverload) else None
