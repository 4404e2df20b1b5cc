"""What lowering and the backends share: formats, units of work, candidates.

A ``Work`` is one op of the program with the quantize/dequantize pairs round it taken off: they turn into facts about
values. A value then has a *native* form (what the IR says), and perhaps a quantized form and forms in half precision; four- and
five-dimensional values also come channels-last. Candidates say which forms they read and give; lowering pays for
the conversions between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from graphwright import ops
from graphwright.ir import Program, args_by_name, op_name, site_of
from graphwright.kernels.gpu import interpreting
from graphwright.ops.axes import same

HALVES = (torch.float16, torch.bfloat16)
#: half precisions in which a float32 value may be held: kind of format and name of the precision, and the dtype
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, order=True)
class Format:
    """The form in which a value is held.

    Attributes:
        kind: ``"native"`` (the dtype that the IR says), ``"bf16"`` or ``"fp16"``, ``"q"`` (integers under the value's QParams), or ``"rows"``: a pair of
            int8 integers and their float32 scales ``[*, 1]``, one per row, as ``graphwright.quantize_rows`` gives them.
        layout: ``"plain"`` (any strides) or ``"last"`` (channels last; 4-D and 5-D values only).
    """

    kind: str = "native"
    layout: str = "plain"

    def __str__(self) -> str:
        return self.kind + ("/last" if self.layout == "last" else "")


NATIVE, NATIVE_LAST = Format(), Format("native", "last")
Q, Q_LAST = Format("q"), Format("q", "last")
ROWS = Format("rows")


@dataclass(frozen=True)
class QParams:
    """Per-tensor affine quantization: ``real = (q - zero_point) * scale`` with ``low <= q <= high``."""

    scale: float
    zero_point: int
    low: int
    high: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Read:
    """One tensor (or symbolic size) that a work reads.

    Attributes:
        value: the node that makes it.
        quantized: it is read through quantize/dequantize, so that the quantized form will do.
        rows: it is read through a pair that quantizes each row at run time, from 0 to 255.
        even: the same, about zero, so that a row has a scale alone.
    """

    value: fx.Node
    quantized: bool = False
    rows: bool = False
    even: bool = False


@dataclass(frozen=True)
class Slot:
    """In an argument template: the place of the k-th read."""

    index: int


@dataclass(eq=False)
class Work:
    """One unit of work.

    Attributes:
        reads: what it reads at run time, constants left out.
        args, kwargs: its arguments with ``Slot`` for reads and real tensors for constants.
        qparams: of its own value; None where nothing reads it quantized.
        weights: for each argument that is a dequantized constant: its integer form.
        rows_wanted: its value is read through a pair that quantizes each row.
    """

    program: Program
    node: fx.Node
    reads: tuple[Read, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    qparams: QParams | None
    read_qparams: tuple[QParams | None, ...]
    weights: dict[str, IntWeight] = field(default_factory=dict)
    rows_wanted: bool = False

    @cached_property
    def target(self) -> Any:
        return self.node.target

    @cached_property
    def op(self) -> str:
        return op_name(self.target)

    @cached_property
    def row(self) -> ops.OpRow | None:
        return ops.row(self.target)

    @property
    def site(self) -> str:
        return site_of(self.node)

    @cached_property
    def named(self) -> dict[str, Any]:
        """Arguments by schema name: ``Slot``, real tensor, or plain value; empty for scalar functions."""
        if not isinstance(self.target, torch._ops.OpOverload):
            return {}
        names = [a.name for a in self.target._schema.arguments]
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}

    def has(self, trait: str) -> bool:
        return self.row is not None and trait in self.row.traits

    def val(self, index: int) -> Any:
        """The fake value of the k-th read."""
        return self.reads[index].value.meta["val"]

    @property
    def out(self) -> Any:
        return self.node.meta["val"]

    @cached_property
    def static(self) -> bool:
        """No read and no result has a symbolic size."""
        values = [r.value.meta["val"] for r in self.reads] + [self.out]
        return all(is_static(v) for v in values)

    @cached_property
    def device(self) -> str:
        """Where it is done: ``"cpu"`` or ``"cuda"``; the first tensor among result and reads that is no scalar says it."""
        values = [v for x in (self.out, *(r.value.meta["val"] for r in self.reads)) for v in (x if isinstance(x, (tuple, list)) else [x])]
        known = [v for v in values if isinstance(v, Tensor)]
        return next((v.device.type for v in known if v.dim()), known[0].device.type if known else "cpu")

    @property
    def is_float(self) -> bool:
        """The result is in a float that kernels are made for: float32, and on a GPU shorter ones."""
        return isinstance(self.out, Tensor) and served(self.out)


@dataclass(frozen=True)
class IntWeight:
    """A constant as it is stored.

    Attributes:
        values: integers; of 4 bits two a byte, the even one in the lower half.
        scales, zero_points: per channel, or one, or by blocks as many axes as the values; no zero points: 0 (8 for 4 bits).
        axis: of the channels.
        group: where there is a scale for so many inputs of each row ``[o, i]``: how many; None: no scales by groups.
        bits: of each integer.
    """

    values: Tensor
    scales: Tensor
    zero_points: Tensor | None
    axis: int
    group: int | None = None
    bits: int = 8

    @property
    def plain(self) -> bool:
        """Signed bytes around 0 with a scale for each output channel, or one for all: what int8 products take."""
        return self.values.dtype == torch.int8 and self.scales.ndim < 2 and self.axis == 0 and self.symmetric

    @property
    def symmetric(self) -> bool:
        return self.zero_points is None or not bool(self.zero_points.any())


@dataclass(frozen=True)
class Candidate:
    """One way to do a work.

    Attributes:
        name: ``"onednn.int8"``: unique among the work's candidates, stable across runs (it is stored in saved files).
        needs: the format of each read.
        gives: the formats of the result that one run produces; the implementation returns one tensor for one format,
            a tuple in this order for several.
        precision: ``"f32"`` (exact up to rounding), ``"bf16"``, ``"fp16"`` or ``"int8"``.
        build: makes the implementation: tensors of the reads, in order, to the result. May raise: the candidate is
            then dropped and the reason kept.
        clobbers: index of a read whose memory the implementation overwrites.
        aliases: the result may share memory with a read.
        timed: False: too cheap to time; costs nothing.
        floor_db: what its result must reach against the op's own reference, where one of the two rounds and the other
            does not; None: what its precision is held to.
        version: state of its code, part of the key under which its time is kept.
        foreign: it was registered from outside: times and verdicts on it are not kept on disk, since its code may change, and
            what it does to its arguments is watched.
    """

    name: str
    needs: tuple[Format, ...]
    gives: tuple[Format, ...]
    precision: str
    build: Callable[[], Callable[..., Any]]
    clobbers: int | None = None
    aliases: bool = False
    timed: bool = True
    floor_db: float | None = None
    foreign: bool = False
    version: str = ""

    @property
    def backend(self) -> str:
        return self.name.partition(".")[0]

    @property
    def halves(self) -> frozenset[str]:
        """The half precisions in which it reads, computes or gives values that are float32 otherwise."""
        return frozenset(HALF.keys() & {self.precision, *(f.kind for f in (*self.needs, *self.gives))})


class Refused(Exception):
    """A registered kernel can't serve a work; the message is its reason."""


def is_static(value: Any) -> bool:
    """No symbolic size in a fake value."""
    if isinstance(value, Tensor):
        return all(isinstance(s, int) for s in (*value.shape, *value.stride()))
    if isinstance(value, (tuple, list)):
        return all(is_static(v) for v in value)
    return not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def hint(size: Any) -> int:
    """A symbolic size at the example inputs; an integer as it is."""
    if isinstance(size, torch.SymInt):
        found = size.node.hint
        return int(found) if found is not None else 8
    return int(size)


def template(value: Any, fill: Callable[[fx.Node], Any]) -> Any:
    """Nested arguments with every node replaced."""
    return fx.node.map_arg(value, fill)


def filler(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., tuple[list[Any], dict[str, Any]]]:
    """A function from reads to complete arguments; flat templates take a fast path."""

    def nested(value: Any) -> bool:
        return isinstance(value, (tuple, list)) and any(isinstance(v, Slot) or nested(v) for v in value)

    if not any(nested(v) for v in (*args, *kwargs.values())):
        spots = [(k, v.index) for k, v in enumerate(args) if isinstance(v, Slot)]
        named = [(k, v.index) for k, v in kwargs.items() if isinstance(v, Slot)]

        def flat(*reads: Any) -> tuple[list[Any], dict[str, Any]]:
            full = list(args)
            for k, i in spots:
                full[k] = reads[i]
            return full, {**kwargs, **{k: reads[i] for k, i in named}} if named else kwargs

        return flat

    def fill(value: Any, reads: tuple[Any, ...]) -> Any:
        if isinstance(value, Slot):
            return reads[value.index]
        if isinstance(value, (tuple, list)):
            return type(value)(fill(v, reads) for v in value)
        return value

    return lambda *reads: ([fill(a, reads) for a in args], {k: fill(v, reads) for k, v in kwargs.items()})


def channels_last(value: Any) -> torch.memory_format:
    """The channels-last format for a value's rank (4 or 5)."""
    return torch.channels_last if value.dim() == 4 else torch.channels_last_3d


def served(value: Tensor) -> bool:
    """Whether a tensor holds floats that kernels are made for: float32; on a GPU (and where Triton interprets) half precision too."""
    return value.dtype == torch.float32 or (value.dtype in HALVES and (value.device.type == "cuda" or interpreting()))


def has_layouts(value: Any) -> bool:
    """Whether a value may be held channels-last: a float tensor of rank 4 or 5."""
    return isinstance(value, Tensor) and value.dim() in (4, 5) and served(value)


def alike(x: Tensor, y: Tensor) -> bool:
    """Whether two fake tensors have the same shape, symbolic sizes by name."""
    return x.dim() == y.dim() and all(same(a, b) for a, b in zip(x.shape, y.shape, strict=True))


def by_integers(name: str) -> bool:
    """Whether the candidate of this name reads weights as integers."""
    return "int8" in name or name.partition(".")[2].removeprefix("linear-").startswith(("w8", "w4"))


def reads_of(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes among a node's arguments, each once, in order."""
    yield from dict.fromkeys(node.all_input_nodes)


__all__ = [
    "HALF",
    "HALVES",
    "NATIVE",
    "NATIVE_LAST",
    "Q_LAST",
    "ROWS",
    "Candidate",
    "Format",
    "IntWeight",
    "Q",
    "QParams",
    "Read",
    "Refused",
    "Slot",
    "Work",
    "alike",
    "args_by_name",
    "by_integers",
    "channels_last",
    "filler",
    "has_layouts",
    "hint",
    "is_static",
    "reads_of",
    "served",
    "template",
]  # fmt: skip
