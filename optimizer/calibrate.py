"""Calibration data: from whatever a user passes to batches of flat tensors that the program takes, and running them.

    batches = collect(calibration, program.signature.inputs, program)
    observe(program, batches, {node: see})              # see(value) for every batch
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.errors import CalibrationError, InputError
from graphwright.ir import Program
from graphwright.structure import Spec, flatten_call

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Calibration:
    """Calibration data that need preparing, or of which only a part is wanted.

    Args:
        loader: any iterable, a ``DataLoader`` for instance.
        prepare: turns one item of ``loader`` into inputs in the form of ``example_inputs``.
        batches: how many items to read; None: all of them.
    """

    loader: Iterable[Any]
    prepare: Callable[[Any], Any] | None = None
    batches: int | None = None

    def __iter__(self) -> Iterator[Any]:
        for k, item in enumerate(self.loader):
            if self.batches is not None and k >= self.batches:
                return
            yield item if self.prepare is None else self.prepare(item)


def missing(what: str) -> CalibrationError:
    """The error for ``what`` (a pass or recipe, for the message) that was given no calibration data."""
    return CalibrationError(
        f"{what} needs calibration data, and none were given",
        hint="Pass calibration=[batch, ...], each batch in the form of example_inputs (a few hundred samples serve), "
        "or gw.Calibration(loader, prepare=fn, batches=n); recipes int8-dynamic, w8 and w4 need none.",
    )


def collect(calibration: Any, spec: Spec | None, program: Program) -> tuple[Batch, ...]:
    """Every batch as flat tensors in the order of the program's inputs, checked, on the program's devices.

    Where the program's batch size is fixed and the batches' differ, the samples are regrouped along axis 0; samples
    from the front fill up the last group.

    Args:
        calibration: an iterable of inputs in the form of ``example_inputs``, or a ``Calibration``.
        spec: structure of ``(args, kwargs)``; None: the program's own.

    Raises:
        CalibrationError: no batch, one batch instead of a sequence, or a batch that the program does not take
            (structure, shape, dtype, NaN, infinity); says which batch and which input.
    """
    spec = program.signature.inputs if spec is None else spec
    names = [_readable(p) for p in spec.paths()] if spec is not None else [p.name for p in program.placeholders]
    wanted = [p.meta["val"] for p in program.placeholders]
    return _fitted(_read(calibration, spec, names, wanted, program.example), program, names)


def calls(calibration: Any, spec: Spec, example: Sequence[Tensor]) -> tuple[Batch, ...]:
    """Like ``collect`` for a model that runs as the user wrote it: its calls may have any shapes.

    Args:
        spec, example: structure and tensors of the example call.

    Raises:
        CalibrationError: as ``collect`` does, shapes apart.
    """
    return tuple(_read(calibration, spec, [_readable(p) for p in spec.paths()], example, example))


def _read(calibration: Any, spec: Spec | None, names: Sequence[str], wanted: Sequence[Tensor],
          example: Sequence[Tensor] | None) -> list[Batch]:  # fmt: skip
    """Every batch as flat tensors with the dtypes and on the devices of ``wanted``."""
    found = [_checked(_flat(item, spec, f"calibration batch {k}"), wanted, example, names, f"calibration batch {k}")
             for k, item in enumerate(_items(calibration))]  # fmt: skip
    if not found:
        raise CalibrationError(
            "calibration holds no batch",
            hint="Pass at least one. A generator can be read only once: pass a list, or make a new generator.",
        )
    return found


def _items(calibration: Any) -> Iterator[Any]:
    """The items; an error of the user's own loader passes through unchanged."""
    if calibration is None:
        raise missing("this recipe")
    # A Mapping that is no iterable of batches: {"input_ids": ...} iterates over its keys.
    if isinstance(calibration, (Tensor, Mapping, str, bytes)) or not isinstance(calibration, Iterable):
        kind = type(calibration).__name__
        raise CalibrationError(f"calibration is one {kind}, not a sequence of batches",
                               hint="Pass calibration=[batch, ...], each in the form of example_inputs.")  # fmt: skip
    if isinstance(calibration, Calibration) and calibration.batches is not None and calibration.batches < 1:
        raise CalibrationError(f"Calibration(batches={calibration.batches}) reads nothing", hint="Ask for at least 1.")
    yield from calibration


def _flat(item: Any, spec: Spec | None, where: str) -> list[Tensor]:
    """The tensors of one batch.

    Raises:
        CalibrationError: its structure is not ``spec``.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(item, Mapping) and all(isinstance(k, str) for k in item):
        kwargs = dict(item)
    else:
        args = tuple(item) if isinstance(item, (tuple, list)) else (item,)
    try:
        leaves, found = flatten_call(args, kwargs)
        if found != spec and isinstance(item, list):  # a list is what loaders make of several inputs, or one input that is a list
            one_leaves, one = flatten_call((item,), {})
            leaves, found = (one_leaves, one) if one == spec else (leaves, found)
    except InputError as error:
        raise CalibrationError(error.what, where=f"{where}, {error.where}", hint=_prepare_hint(item)) from error
    if spec is not None and found != spec:
        raise CalibrationError(f"wrong structure: expected {_call(spec)}, got {_call(found)}", where=where,
                               hint=_prepare_hint(item))  # fmt: skip
    return leaves


def _prepare_hint(item: Any) -> str:
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return "If batches are (inputs, labels), pass gw.Calibration(loader, prepare=lambda batch: batch[0])."
    return "Give each batch the form of example_inputs, or pass gw.Calibration(loader, prepare=fn) to convert them."


def _call(spec: Spec) -> str:
    """A structure of ``(args, kwargs)`` as one would write the call."""
    positional, named = spec.children
    shown = [c.describe() for c in positional.children]
    shown += [f"{k}={c.describe()}" for k, c in zip(named.keys, named.children, strict=True)]
    return f"({', '.join(shown)})"


def _readable(path: str) -> str:
    """``[1]['input_ids']`` → ``input_ids``; ``[0][2]`` → ``argument 2``."""
    inner = path[3:]
    name, _, rest = inner[1:].partition("]")
    return (f"argument {name}" if path.startswith("[0]") else name.strip("'")) + rest


def _checked(leaves: Sequence[Tensor], like: Sequence[Tensor], example: Sequence[Tensor] | None, names: Sequence[str], where: str) -> Batch:
    """The leaves on the devices of ``like``.

    Raises:
        CalibrationError: one has another dtype than the program takes, or is not finite.
    """
    checked = []
    for k, (leaf, wanted) in enumerate(zip(leaves, like, strict=True)):
        place = f"{where}, {names[k]}"
        if leaf.dtype != wanted.dtype:
            raise CalibrationError(f"expected {wanted.dtype}, got {leaf.dtype}", where=place,
                                   hint=f"Convert it: x.to({wanted.dtype}).")  # fmt: skip
        if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()) and not _infinite_by_design(leaf, example, k):
            count = int((~torch.isfinite(leaf)).sum())
            raise CalibrationError(f"{count} of {leaf.numel()} values are NaN or infinite", where=place,
                                   hint="Remove or mend that batch: its ranges would be meaningless.")  # fmt: skip
        checked.append(leaf.detach().to(wanted.device))
    return tuple(checked)


def _infinite_by_design(leaf: Tensor, example: Sequence[Tensor] | None, k: int) -> bool:
    """Whether infinities belong into this input, as in an additive mask: the example has them too. NaN never does."""
    return not bool(leaf.isnan().any()) and example is not None and bool(example[k].isinf().any())


# -- shapes ----------------------------------------------------------------------------------------------------------


def _fitted(batches: list[Batch], program: Program, names: Sequence[str]) -> tuple[Batch, ...]:
    """The batches as they are where the program takes them all, regrouped where that helps.

    Raises:
        CalibrationError: names the first batch and input that does not fit.
    """
    misfits = [(k, *bad) for k, batch in enumerate(batches) if (bad := _misfit(batch, program)) is not None]
    if not misfits:
        return tuple(batches)
    regrouped = _regrouped(batches, program)
    if regrouped is not None:
        return regrouped
    k, leaf, said = misfits[0]
    raise CalibrationError(f"expected shape {said}, got {_shape(batches[k][leaf].shape)}",
                           where=f"calibration batch {k}, {names[leaf]}",
                           hint="Pad or crop it to the example's shape, or optimize with dynamic sizes.")  # fmt: skip


def _misfit(batch: Batch, program: Program) -> tuple[int, str] | None:
    """Index and wanted shape of the first leaf that the program does not take."""
    symbols: dict[Any, int] = {}
    for k, (leaf, node) in enumerate(zip(batch, program.placeholders, strict=True)):
        wanted = node.meta["val"].shape
        if len(wanted) != leaf.ndim or not all(
            _size_fits(w, s, symbols, program) for w, s in zip(wanted, leaf.shape, strict=True)
        ):
            return k, _shape(wanted)
    return None


def _size_fits(wanted: Any, size: int, symbols: dict[Any, int], program: Program) -> bool:
    if isinstance(wanted, int):
        return wanted == size
    expr = wanted.node.expr
    if expr.is_Symbol and expr not in symbols:
        symbols[expr] = size
        span = program.signature.symbols.get(str(expr))
        return span is None or (
            span.low <= size and (span.high is None or size <= span.high) and size % span.multiple == 0
        )
    value = expr.subs(symbols)
    return not value.is_number or int(value) == size


def _shape(shape: Iterable[Any]) -> str:
    return f"({', '.join(map(str, shape))})"


def _regrouped(batches: list[Batch], program: Program) -> tuple[Batch, ...] | None:
    """The samples in groups of the program's own batch size, or None where sizes other than the batch's differ too."""
    wanted = [tuple(n.meta["val"].shape) for n in program.placeholders]
    if any(not isinstance(s, int) for shape in wanted for s in shape):
        return None
    split = [k for k, w in enumerate(wanted) if any(tuple(b[k].shape) != w for b in batches)]
    if any(not wanted[k] or batch[k].ndim != len(wanted[k]) for k in split for batch in batches):
        return None
    sizes = {wanted[k][0] for k in split}
    same_tail = all(tuple(batch[k].shape[1:]) == wanted[k][1:] for k in split for batch in batches)
    one_size = len(sizes) == 1 and all(len({batch[k].shape[0] for k in split}) == 1 for batch in batches)
    rest = [k for k in range(len(wanted)) if k not in split]
    constant = all(torch.equal(batch[k], batches[0][k]) for k in rest for batch in batches)
    if not (same_tail and one_size and constant):
        return None
    size, joined = sizes.pop(), {k: torch.cat([b[k] for b in batches]) for k in split}
    total = next(iter(joined.values())).shape[0]
    if total == 0 or size == 0:
        return None
    index = torch.arange(-(-total // size) * size) % total
    return tuple(
        tuple(joined[k][rows.to(joined[k].device)] if k in joined else batches[0][k] for k in range(len(wanted)))
        for rows in index.split(size)
    )


# -- running ---------------------------------------------------------------------------------------------------------


class _Observer(fx.Interpreter):
    def __init__(self, program: Program, hooks: Mapping[fx.Node, Callable[[Tensor], None]]):
        super().__init__(program.graph_module, garbage_collect_values=True)
        self._hooks = hooks

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        hook = self._hooks.get(n)
        if hook is not None:
            hook(value)
        return value


def observe(program: Program, batches: Iterable[Batch], hooks: Mapping[fx.Node, Callable[[Tensor], None]]) -> None:
    """Run the program on every batch and hand the values of these nodes to their hooks as they are computed.

    Values live no longer than their last reader needs them; mutations of buffers and inputs are not applied.
    """
    runner = _Observer(program, hooks)
    with torch.no_grad():
        for batch in batches:
            runner.run(*batch)
