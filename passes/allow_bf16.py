"""Where lowering may compute in bfloat16: site by site, by the error that it makes there."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphwright.accelerator import random_devices
from graphwright.errors import RecipeError
from graphwright.ir import Program, site_of
from graphwright.manager import Pass, PassResult
from graphwright.numerics import Lossy, sqnr_db
from graphwright.ops import CONTRACTION, ELEMENTWISE, POOL, RANDOM, VIEW, row

#: Batches that errors are measured on, the example apart.
_BATCHES = 2


@dataclass(frozen=True)
class AllowBf16(Pass):
    """Let lowering compute in bfloat16 where that measures faster, at the sites where its error stays small.

    Every op that may be offered a kernel in bfloat16 is run in it (arguments, weights and result rounded) on the values that it reads
    in the model, for the example and the first calibration batches. Where its result falls below ``floor_db`` against float32, the
    site keeps float32 and the reason is told. Ops of any kind are also run on rounded arguments alone: where that loses too much,
    what they read is not computed in bfloat16 either. It wants to stand last: what later passes put into the place of a measured op has not been measured.

    Args:
        floor_db: SQNR that each op must reach by itself, in dB. Rounding to bfloat16 alone gives some 50; what is lost beyond that
            is cancellation, long sums in bfloat16, or numbers that its 8 bits can't tell apart.
    """

    name: ClassVar[str] = "allow-bf16"
    numerics: ClassVar[Lossy] = Lossy(5.0)
    precisions: ClassVar[frozenset[str]] = frozenset({"bf16"})

    floor_db: float = 30.0

    def __post_init__(self) -> None:
        if not isinstance(self.floor_db, (int, float)) or math.isnan(self.floor_db):
            raise RecipeError(f"AllowBf16(floor_db={self.floor_db!r}): a number of decibels is wanted")

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        if program.example is None:
            result.notes.append("there is no example to measure on: bfloat16 is allowed where it measures faster")
            return result
        wanted = [n for n in program.nodes if _float32(n) and not _moves(n) and not self.refused(result, n)]
        measured = _Measured(program, set(wanted))
        for node in program.nodes:
            node.meta["bf16"] = _moves(node) or node in measured.wanted
        with torch.no_grad(), torch.random.fork_rng(devices=random_devices()):
            torch.manual_seed(0)
            for leaves in itertools.islice([program.example, *program.calibration], _BATCHES + 1):
                measured.run(*leaves)
        barred = self._barred(measured)
        for node in wanted:
            reason = self._reason(measured, node) or barred.get(node)
            if reason:
                node.meta["bf16"] = False
                result.refuse(site_of(node), reason)
            else:
                node.meta["bf16_db"] = measured.worst.get(node, math.inf)
        result.notes.append(self._note(wanted))
        return result

    def _reason(self, measured: _Measured, node: fx.Node) -> str | None:
        if node in measured.unable:
            return f"it does not run in bfloat16: {measured.unable[node]}"
        got = measured.worst.get(node, math.inf)
        said = "numbers that are not finite" if got == -math.inf else f"SQNR {got:.1f} dB"
        return None if got >= self.floor_db else f"bfloat16 gives {said} here, {self.floor_db:g} dB are asked"

    def _barred(self, measured: _Measured) -> dict[fx.Node, str]:
        """Ops whose values are not to be rounded, since what reads them does not bear it; and why."""
        found: dict[fx.Node, str] = {}
        for node, db in measured.reading.items():
            if db < self.floor_db:
                for source in _sources(node):
                    found.setdefault(source, f"{site_of(node)} reads it and gives SQNR {db:.1f} dB once it is rounded, {self.floor_db:g} dB are asked")
        return found

    def _note(self, wanted: list[fx.Node]) -> str:
        kept = [n for n in wanted if n.meta["bf16"]]
        worst = min(kept, key=lambda n: n.meta["bf16_db"], default=None)
        least = f"; least SQNR {worst.meta['bf16_db']:.1f} dB at {site_of(worst)}" if worst is not None else ""
        return f"bfloat16 is allowed at {len(kept)} of {len(wanted)} float32 ops, where it measures faster{least}"


def _float32(node: fx.Node) -> bool:
    """Whether a kernel in bfloat16 may be offered: an op on float32 values that computes element by element, a product or a pool."""
    found = row(node.target)  # type: ignore[arg-type]
    if found is None or not found.traits & {CONTRACTION, ELEMENTWISE, POOL}:
        return False
    value = node.meta.get("val")
    given = [n.meta.get("val") for n in node.all_input_nodes]
    floats = [v for v in given if isinstance(v, Tensor) and v.dtype == torch.float32]
    return isinstance(value, Tensor) and value.dtype == torch.float32 and bool(floats)


def _sources(node: fx.Node) -> set[fx.Node]:
    """The ops that compute what a node reads, looked up through those that only move values."""
    found: set[fx.Node] = set()
    queue = list(node.all_input_nodes)
    while queue:
        source = queue.pop()
        if source.op == "call_function" and source not in found:
            if _moves(source):
                queue += source.all_input_nodes
            else:
                found.add(source)
    return found


def _moves(node: fx.Node) -> bool:
    """Whether a node only moves values: whatever form they are in, it loses nothing."""
    found = row(node.target)  # type: ignore[arg-type]
    return node.target is operator.getitem or not isinstance(node.target, torch._ops.OpOverload) or (found is not None and VIEW in found.traits)


class _Measured(fx.Interpreter):
    """Runs a program in float32, and every op of ``wanted`` in bfloat16 beside it.

    Attributes:
        worst: the least SQNR of each over all runs, in dB.
        reading: the same of every op that computes, in float32 on values that were rounded to bfloat16.
        unable: why an op can't run in bfloat16.
    """

    def __init__(self, program: Program, wanted: set[fx.Node]):
        super().__init__(program.graph_module, garbage_collect_values=True)
        self.wanted = wanted
        self.worst: dict[fx.Node, float] = {}
        self.reading: dict[fx.Node, float] = {}
        self.unable: dict[fx.Node, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or _moves(n):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        value = n.target(*args, **kwargs)  # type: ignore[operator]
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or RANDOM in getattr(row(n.target), "traits", ()):  # type: ignore[arg-type]
            return value
        rounded, given = fx.node.map_arg((n.args, dict(n.kwargs)), self._rounded)
        self._note(self.reading, n, value, lambda: n.target(*rounded, **given))  # type: ignore[operator]
        if n in self.wanted and n not in self.unable:
            said = self._note(self.worst, n, value, lambda: n.target(*_narrow(args), **_narrow(kwargs)))  # type: ignore[operator]
            if said is not None:
                self.unable[n] = said
        return value

    def _rounded(self, n: fx.Node) -> Any:
        value = self.env[n]
        held = isinstance(value, Tensor) and value.dtype == torch.float32 and n.op != "get_attr"
        return value.bfloat16().float() if held else value

    @staticmethod
    def _note(into: dict[fx.Node, float], n: fx.Node, value: Tensor, run: Callable[[], Tensor]) -> str | None:
        """Keep the SQNR of what ``run`` gives; None, or why it can't run."""
        try:
            narrow = run()
        except Exception as error:  # noqa: BLE001  an op may refuse a dtype in any way it likes
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        finite = torch.isfinite(value)
        db = sqnr_db(value[finite], narrow.float()[finite]) if bool(finite.any()) else math.inf
        into[n] = min(into.get(n, math.inf), db)
        return None


def _narrow(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.bfloat16() if value.dtype == torch.float32 else value
    if isinstance(value, (tuple, list)):
        return type(value)(_narrow(v) for v in value)
    if isinstance(value, dict):
        return {k: _narrow(v) for k, v in value.items()}
    return torch.bfloat16 if value is torch.float32 else value
