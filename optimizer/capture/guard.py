"""Which calls a program covers, and when two calls or two states of a model are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from graphwright import ir
from graphwright.structure import Spec

#: One size of an input: fixed, ``(symbol, scale, offset)`` for ``scale * symbol + offset``, or a sympy expression.
Size = Any


class Guard:
    """Checks flat inputs against a program's placeholders; build it once, call ``check`` per run.

    Args:
        program: its placeholders' fake values and ``signature.symbols`` say what is covered.
    """

    def __init__(self, program: ir.Program):
        self.symbols = dict(program.signature.symbols)
        self.names = [str(n.target) for n in program.placeholders]
        self.rows = [self._row(n) for n in program.placeholders]
        self.written = [m.input for m in program.signature.mutations if m.input is not None]
        self.late = [(k, d, s) for k, row in enumerate(self.rows) for d, s in enumerate(row[3])
                     if isinstance(s, _Expression)]  # fmt: skip

    def _row(self, node: fx.Node) -> tuple[torch.dtype, torch.device, tuple[int, ...] | None, tuple[Size, ...], torch.layout]:
        value = node.meta["val"]
        sizes = tuple(_size(s) for s in value.shape)
        fixed = sizes if all(isinstance(s, int) for s in sizes) else None
        return value.dtype, value.device, fixed, sizes, value.layout

    def check(self, leaves: Sequence[torch.Tensor]) -> str | None:
        """None where the program covers these inputs, else the first reason why not."""
        if len(leaves) != len(self.rows):
            return f"{len(leaves)} tensors given, {len(self.rows)} expected"
        bound: dict[str, int] = {}
        for k, (dtype, device, fixed, sizes, layout) in enumerate(self.rows):
            leaf = leaves[k]
            shape = leaf.shape
            if leaf.dtype is dtype and leaf.device == device and leaf.layout is layout and (
                shape == fixed if fixed is not None else _match(shape, sizes, bound)):  # fmt: skip
                continue
            return self._mismatch(k, leaf)
        if self.written:
            places = [t.untyped_storage().data_ptr() for t in leaves]
            shared = next((k for k in self.written if places.count(places[k]) > 1), None)
            if shared is not None:
                return f"{self.names[shared]} is written by the model and shares memory with another input"
        for k, d, size in self.late:
            if size(bound) != leaves[k].shape[d]:
                return f"dimension {d} of {self.names[k]} is {leaves[k].shape[d]}; covered: {size} = {size(bound)}"
        for name, value in bound.items():
            span = self.symbols.get(name)
            if span is not None and (value < span.low or (span.high is not None and value > span.high)
                                     or value % span.multiple):  # fmt: skip
                return f"{self._where(name)} is {value}; covered: {span_text(span)}"
        return None

    def _mismatch(self, k: int, leaf: torch.Tensor) -> str:
        dtype, device, _, sizes, layout = self.rows[k]
        name = self.names[k]
        if leaf.layout is not layout:
            return f"{name} has layout {leaf.layout}; covered: {layout}"
        if leaf.dtype is not dtype:
            return f"{name} is {leaf.dtype}; covered: {dtype}"
        if leaf.device != device:
            return f"{name} is on {leaf.device}; covered: {device}"
        return f"{name} has shape {list(leaf.shape)}; covered: [{', '.join(map(_size_text, sizes))}]"

    def _where(self, symbol: str) -> str:
        for name, (_, _, _, sizes, _) in zip(self.names, self.rows, strict=True):
            for d, size in enumerate(sizes):
                if isinstance(size, tuple) and size[0] == symbol:
                    return f"dimension {d} of {name}"
        return symbol

    def describe(self) -> str:
        """What is covered, for humans: shapes by input, then the sizes that may vary."""
        lines = [f"{name}: {str(dtype).removeprefix('torch.')}[{', '.join(map(_size_text, sizes))}] on {device}"
                 for name, (dtype, device, _, sizes, _) in zip(self.names, self.rows, strict=True)]  # fmt: skip
        return "\n".join(lines + [f"{name}: {span_text(span)}" for name, span in self.symbols.items()])


def covers(program: ir.Program, leaves: Sequence[torch.Tensor]) -> str | None:
    """One-off form of ``Guard(program).check(leaves)``."""
    return Guard(program).check(leaves)


def key(leaves: Sequence[torch.Tensor], spec: Spec) -> tuple[Any, ...]:
    """Equal for two calls that one static program serves: structure, shapes, dtypes and devices."""
    return spec, tuple((t.shape, t.dtype, t.device) for t in leaves)


def weights_fingerprint(model: nn.Module, *, ignore: Sequence[str] = ()) -> tuple[Any, ...]:
    """Changes when a weight or buffer is written or replaced, or a module's mode, hooks or plain settings change.

    Args:
        ignore: buffers that the model itself writes while it runs.
    """
    skipped = set(ignore)
    tensors: list[tuple[str, torch.Tensor]] = [*model.named_parameters(remove_duplicate=False),
                                               *model.named_buffers(remove_duplicate=False)]  # fmt: skip
    held = tuple((name, t.data_ptr() if t.layout is torch.strided else id(t),
                  0 if t.is_inference() else t._version, t.dtype, t.device)
                 for name, t in tensors if name not in skipped)  # fmt: skip
    modes = tuple((_hooks(m._forward_hooks), _hooks(m._forward_pre_hooks), _settings(m)) for m in model.modules())
    return held, modes


def _hooks(held: Mapping[int, Any]) -> int:
    """How many there are, but for those that transformers' models put into themselves on their first call."""
    return sum(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in held.values())


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Plain attributes that the model's code may read, ``training`` among them."""
    return tuple((k, repr(v)) for k, v in vars(module).items() if not k.startswith("_") and type(v) in (bool, int, float, str))


# -- sizes -----------------------------------------------------------------------------------------------------------


def _size(size: Any) -> Size:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    if expression.is_number:
        return int(expression)
    symbols = sorted(expression.free_symbols, key=str)
    if len(symbols) == 1:
        s = symbols[0]
        scale, offset = expression.coeff(s), expression.subs(s, 0)
        if scale.is_integer and offset.is_integer and expression == scale * s + offset:
            return str(s), int(scale), int(offset)
    return _Expression(expression)


class _Expression:
    """A size that depends on several symbols: evaluated once all of them are known."""

    def __init__(self, expression: Any):
        self.expression = expression
        self.symbols = {str(s): s for s in expression.free_symbols}

    def __call__(self, bound: dict[str, int]) -> int | None:
        if not self.symbols.keys() <= bound.keys():
            return None
        return int(self.expression.subs({s: bound[n] for n, s in self.symbols.items()}))

    def __str__(self) -> str:
        return str(self.expression)


def _match(shape: Sequence[int], sizes: tuple[Size, ...], bound: dict[str, int]) -> bool:
    if len(shape) != len(sizes):
        return False
    for actual, size in zip(shape, sizes, strict=True):
        if type(size) is int:
            if actual != size:
                return False
        elif type(size) is tuple:
            symbol, scale, offset = size
            value = bound.get(symbol)
            if value is None:
                value, rest = divmod(actual - offset, scale)
                if rest:
                    return False
                bound[symbol] = value
            elif value * scale + offset != actual:
                return False
    return True


def _size_text(size: Size) -> str:
    if not isinstance(size, tuple):
        return str(size)
    symbol, scale, offset = size
    text = symbol if scale == 1 else f"{scale}*{symbol}"
    return text if not offset else f"{text} {'+' if offset > 0 else '-'} {abs(offset)}"


def span_text(span: ir.Span) -> str:
    """``"2 to 512, a multiple of 8"``."""
    text = f"{span.low} to {span.high}" if span.high is not None else f"{span.low} or more"
    return text if span.multiple == 1 else f"{text}, a multiple of {span.multiple}"
