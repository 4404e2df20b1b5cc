"""From a program to units of work: quantize/dequantize pairs become facts about values, weights become constants."""

from __future__ import annotations

import heapq
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from graphwright import ops
from graphwright.backends.base import IntWeight, QParams, Read, Slot, Work, served, template
from graphwright.errors import InternalError
from graphwright.ir import Program, args_by_name
from graphwright.ops import RANDOM, VIEW

_QUANTIZE = "graphwright::quantize"
_DEQUANTIZE = "graphwright::dequantize"
_DEQUANTIZE_CHANNEL = "graphwright::dequantize_channel"
_DEQUANTIZE_PACKED = "graphwright::dequantize_packed"
_QUANTIZE_DYNAMIC = "graphwright::quantize_dynamic"
_DEQUANTIZE_DYNAMIC = "graphwright::dequantize_dynamic"


@dataclass(eq=False)
class Analysis:
    """A program seen as works.

    Attributes:
        works: in program order.
        qparams: values that have a quantized form.
        outputs: what the program returns, in order: a read, or a constant value.
        dequantized: constants that the program holds as integers, as floats, by node.
        absorbed: quantize and dequantize nodes that are no works, and the node whose kernel does what they say.
    """

    program: Program
    works: list[Work]
    qparams: dict[fx.Node, QParams]
    outputs: list[Read | Any]
    dequantized: dict[fx.Node, Tensor] = field(default_factory=dict)
    absorbed: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def let_go(self) -> None:
        """Drop the float copies of integer constants: an implementation that needs one holds it, and works know shape and dtype."""
        shells = {id(t): torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in self.dequantized.values()}

        def shell(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(map(shell, value))
            return shells.get(id(value), value)

        for work in self.works if shells else ():
            work.args, work.kwargs = tuple(map(shell, work.args)), {k: shell(v) for k, v in work.kwargs.items()}
            work.__dict__.pop("named", None)  # found anew from these when it is next asked for
        self.dequantized.clear()

    @cached_property
    def readers(self) -> dict[fx.Node, list[Work]]:
        """The works that read each value."""
        found: dict[fx.Node, list[Work]] = {}
        for work in self.works:
            for read in work.reads:
                found.setdefault(read.value, []).append(work)
        return found

    @cached_property
    def returned(self) -> frozenset[fx.Node]:
        """The values that the program returns."""
        return frozenset(o.value for o in self.outputs if isinstance(o, Read))


@dataclass(eq=False)
class Region:
    """Works that may run as one.

    Attributes:
        works: in program order.
        reads: values that they read and do not make, in the order of first use.
        writes: values that they make and others read, or the program returns.
    """

    works: tuple[Work, ...]
    reads: tuple[fx.Node, ...]
    writes: tuple[fx.Node, ...]

    @property
    def head(self) -> Work:
        """The first work that computes: the region's name and place in a report."""
        return next((w for w in self.works if w.row is not None and not w.has(VIEW)), self.works[0])

    @classmethod
    def of(cls, analysis: Analysis, works: Sequence[Work]) -> Region:
        """The region of these works, in program order."""
        inside = {w.node for w in works}
        outer = {n for n in inside if n in analysis.returned or any(w.node not in inside for w in analysis.readers.get(n, ()))}
        reads = dict.fromkeys(r.value for w in works for r in w.reads if r.value not in inside)
        return cls(tuple(works), tuple(reads), tuple(w.node for w in works if w.node in outer))


def schedule(analysis: Analysis, regions: Sequence[Region]) -> list[Work | Region]:
    """Works and regions in an order in which each finds what it reads; program order wherever that allows it.

    Raises:
        InternalError: a region reads what depends on it, or two share a work.
    """
    if not regions:
        return list(analysis.works)
    place = {w: k for k, w in enumerate(analysis.works)}
    unit: dict[Work, Work | Region] = {w: w for w in analysis.works}
    for region in regions:
        for work in region.works:
            if unit[work] is not work:
                raise InternalError(f"two regions share {work.site}")
            unit[work] = region
    maker = {w.node: w for w in analysis.works}
    after: dict[Work | Region, set[Work | Region]] = {u: set() for u in unit.values()}
    waits = dict.fromkeys(after, 0)
    edges = [(maker[r.value], w) for w in analysis.works for r in w.reads if r.value in maker]
    # what may do more than compute keeps its turn
    fixed = [w for w in analysis.works if w.has(RANDOM) or w.row is None and isinstance(w.target, torch._ops.OpOverload)]
    for first, then in [*edges, *itertools.pairwise(fixed)]:
        a, b = unit[first], unit[then]
        if a is not b and b not in after[a]:
            after[a].add(b)
            waits[b] += 1
    turn = {u: place[u.works[-1] if isinstance(u, Region) else u] for u in after}
    whose = {k: u for u, k in turn.items()}
    ready = [turn[u] for u, n in waits.items() if not n]
    heapq.heapify(ready)
    order: list[Work | Region] = []
    while ready:
        order.append(whose[heapq.heappop(ready)])
        for u in after[order[-1]]:
            waits[u] -= 1
            if not waits[u]:
                heapq.heappush(ready, turn[u])
    if len(order) != len(after):
        raise InternalError("a region reads what depends on it")
    return order


def analyse(program: Program) -> Analysis:
    """Take the quantize/dequantize pairs off; see ``Analysis``."""
    return _Analyser(program).run()


def _is(node: Any, schema: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "name", "") == schema


class _Analyser:
    def __init__(self, program: Program):
        self.program = program
        self.qparams: dict[fx.Node, QParams] = {}
        self.absorbed: dict[fx.Node, fx.Node] = {}  # dequantize (or absorbed quantize) → the value it stands for
        self.rows: set[fx.Node] = set()  # those of them that quantize each row at run time, from 0 to 255
        self.even: set[fx.Node] = set()  # the same, about zero
        self.weights: dict[fx.Node, IntWeight] = {}
        self.materialised: dict[fx.Node, Tensor] = {}

    def run(self) -> Analysis:
        for node in self.program.nodes:
            if _is(node, _QUANTIZE):
                self._quantize(node)
            elif _is(node, _QUANTIZE_DYNAMIC):
                self._quantize_dynamic(node)
            elif any(_is(node, kind) for kind in (_DEQUANTIZE, _DEQUANTIZE_CHANNEL, _DEQUANTIZE_PACKED)):
                self._weight(node)
        works = [self._work(n) for n in self.program.nodes if n not in self.absorbed and n not in self.weights]
        wanted = {r.value for w in works for r in w.reads if r.rows or r.even}
        for work in works:
            work.rows_wanted = work.node in wanted
        outputs = [self._read(a) if isinstance(a, fx.Node) else a for a in self.program.output.args[0]]
        absorbed = {**self.absorbed, **{n: next(iter(n.users)) for n in self.weights if n.users}}
        return Analysis(self.program, works, self.qparams, outputs, self.materialised, absorbed)

    def _quantize(self, node: fx.Node) -> None:
        """Absorb a quantize whose readers all dequantize with its own parameters."""
        a = args_by_name(node)
        value = a["x"]
        if not isinstance(value, fx.Node) or value.op == "get_attr" or value in self.absorbed:
            return
        if not isinstance(value.meta["val"], Tensor) or not served(value.meta["val"]):
            return
        wanted = value.meta["val"].dtype
        params = QParams(float(a["scale"]), int(a["zero_point"]), int(a["low"]), int(a["high"]), a["dtype"])
        if self.qparams.get(value, params) != params or not node.users:
            return
        for user in node.users:
            u = args_by_name(user) if _is(user, _DEQUANTIZE) else None
            if u is None or float(u["scale"]) != params.scale or int(u["zero_point"]) != params.zero_point or u["dtype"] != wanted:
                return
        self.qparams[value] = params
        self.absorbed[node] = value
        for user in node.users:
            self.absorbed[user] = value

    def _quantize_dynamic(self, node: fx.Node) -> None:
        """Absorb a quantize with scales found at run time whose parts are all put together again."""
        a = args_by_name(node)
        value, parts = a["x"], list(node.users)
        readers = {user for part in parts for user in part.users}
        known = all(p.target is operator.getitem for p in parts) and all(_is(r, _DEQUANTIZE_DYNAMIC) for r in readers)
        whole = all(len({p.args[1] for p in r.all_input_nodes}) == 3 for r in readers) if known else False
        if not isinstance(value, fx.Node) or not whole or any(r.meta["val"].dtype != value.meta["val"].dtype for r in readers):
            return
        asymmetric = (a["rows"], a["symmetric"], a["low"], a["high"], a["dtype"]) == (True, False, 0, 255, torch.uint8)
        even = a["rows"] and a["symmetric"] and a["dtype"] == torch.int8 and a["high"] == 127
        for absorbed in (node, *parts, *readers):
            self.absorbed[absorbed] = value
            if asymmetric:
                self.rows.add(absorbed)
            elif even:
                self.even.add(absorbed)

    def _weight(self, node: fx.Node) -> None:
        """Absorb the dequantize of a constant."""
        if node in self.absorbed:
            return
        a = args_by_name(node)
        stored = self.program.constant(a["q"])
        if stored is None:
            return
        if _is(node, _DEQUANTIZE):
            self.weights[node] = IntWeight(stored, *(torch.tensor([a[k]], device=stored.device) for k in ("scale", "zero_point")), 0)
            return
        scales, zeros = self.program.constant(a["scales"]), self.program.constant(a["zero_points"])
        if scales is None or (zeros is None and a["zero_points"] is not None):
            return
        if _is(node, _DEQUANTIZE_PACKED):
            self.weights[node] = IntWeight(stored, scales, zeros, 0, int(a["group"]), 4)
            return
        by_row = scales.ndim == stored.ndim == 2 and scales.shape[0] == stored.shape[0]
        self.weights[node] = IntWeight(stored, scales, zeros, int(a["axis"]), stored.shape[1] // scales.shape[1] if by_row and scales.shape[1] else None)

    def _read(self, node: fx.Node) -> Read:
        value = self.absorbed.get(node)
        return Read(node) if value is None else Read(value, value in self.qparams and node not in self.rows | self.even, node in self.rows, node in self.even)

    def _constant(self, node: fx.Node) -> Tensor | None:
        if node in self.weights:
            if node not in self.materialised:
                a = args_by_name(node)
                filled = {k: self.program.constant(v) if isinstance(v, fx.Node) else v for k, v in a.items()}
                row = ops.row(node.target)
                assert row is not None
                with torch.no_grad():  # its body: the op itself would import PyTorch's compiler
                    self.materialised[node] = row.reference(**filled)
            return self.materialised[node]
        return self.program.constant(node)

    def _work(self, node: fx.Node) -> Work:
        reads: list[Read] = []
        weights: dict[str, IntWeight] = {}

        def fill(n: fx.Node) -> Any:
            constant = self._constant(n)
            if constant is not None:
                return constant
            read = self._read(n)
            if read not in reads:
                reads.append(read)
            return Slot(reads.index(read))

        if isinstance(node.target, torch._ops.OpOverload):
            weights = {k: self.weights[v] for k, v in args_by_name(node).items() if isinstance(v, fx.Node) and v in self.weights}
        args, kwargs = template((node.args, dict(node.kwargs)), fill)
        read_qparams = tuple(self.qparams.get(r.value) for r in reads)
        return Work(self.program, node, tuple(reads), tuple(args), kwargs, self.qparams.get(node), read_qparams, weights)
