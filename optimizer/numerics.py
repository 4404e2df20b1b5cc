"""Error metrics, and the two checks that a pass may promise: ``Exact`` and ``Lossy``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.errors import InternalError
from graphwright.ir import Program


def rms(x: Tensor) -> float:
    """Root mean square in float64; 0 for an empty tensor."""
    return float(x.detach().double().pow(2).mean().sqrt()) if x.numel() else 0.0


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Signal to quantization-noise ratio, 10·log10(Σ ref² / Σ (ref − value)²), in dB; inf where they are equal."""
    ref, noise = reference.detach().double(), reference.detach().double() - value.detach().double()
    if not noise.numel() or not bool(noise.any()):
        return math.inf
    signal = float(ref.pow(2).sum())
    power = float(noise.pow(2).sum())
    return 10 * math.log10(signal / power) if signal > 0 and math.isfinite(power) else -math.inf


@dataclass(frozen=True)
class Exact:
    """Reorders float arithmetic only: against float64, RMS error at most ``factor`` times eager's plus 4·eps·RMS(ref)."""

    factor: float = 2.0

    def __str__(self) -> str:
        return "exact"

    def failure(self, reference: Tensor, before: Tensor, after: Tensor) -> str | None:
        """None, or why ``after`` is too far from the float64 ``reference`` given how far ``before`` is."""
        problem = shape_failure(before, after)
        if problem or not before.is_floating_point():
            return problem or (None if torch.equal(before, after) else "integer or boolean values differ")
        finite = torch.isfinite(before)
        if not torch.equal(finite, torch.isfinite(after)):
            return "values that were finite are not, or the other way round"
        ref, old, new = (t.double()[finite] for t in (reference, before, after))
        if not torch.equal(before[~finite].nan_to_num(), after[~finite].nan_to_num()):
            return "infinities differ"
        was, now = rms(old - ref), rms(new - ref)
        allowed = self.factor * was + 4 * torch.finfo(before.dtype).eps * rms(ref)
        return None if now <= allowed else f"RMS error {now:.3g} against float64 exceeds {allowed:.3g} (eager: {was:.3g})"


@dataclass(frozen=True)
class Lossy:
    """Changes numbers: outputs stay finite and their SQNR stays above ``floor_db``."""

    floor_db: float = 0.0

    def __str__(self) -> str:
        return "lossy"

    def failure(self, reference: Tensor, before: Tensor, after: Tensor) -> str | None:
        problem = shape_failure(before, after)
        if problem or not before.is_floating_point():
            return problem
        finite = torch.isfinite(before)
        if not bool(torch.isfinite(after[finite]).all()):
            return "values that were finite are not"
        got = sqnr_db(reference[finite], after[finite])
        return None if got >= self.floor_db else f"SQNR {got:.1f} dB lies below {self.floor_db:.1f} dB"


def shape_failure(before: Tensor, after: Tensor) -> str | None:
    """None, or how shape or dtype differ."""
    if before.shape != after.shape or before.dtype != after.dtype:
        return f"{tuple(after.shape)} {after.dtype} instead of {tuple(before.shape)} {before.dtype}"
    return None


def run_double(program: Program, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Outputs of the program in float64 on inputs widened to float64; buffers of ``program`` stay as they are.

    Each tensor of the program is widened where it is read, so that one wide weight is held at a time, not all of them.
    """
    wide = [x.double() if x.is_floating_point() else x for x in leaves]
    with torch.no_grad(), _seeded():
        return _run(program, wide, widen=True)


def run_pure(program: Program, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Outputs of the program without applying its mutations, those of the mutated values included."""
    with torch.no_grad():
        return _outputs(program, list(leaves))


def _outputs(program: Program, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with _seeded():
        return _run(program, leaves)


@contextmanager
def _seeded() -> Iterator[None]:
    """Random ops give the same numbers in every run that is compared."""
    mode = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        yield
    finally:
        torch.random.set_rng_state(mode)


def _run(program: Program, leaves: Sequence[Tensor], *, widen: bool = False) -> tuple[Tensor, ...]:
    """The program node by node: for one run that is a third of what writing and compiling its Python code takes.

    Args:
        widen: the program's tensors, and dtype arguments that name a smaller float, are taken as float64.
    """
    nodes, tensors, given = list(program.graph.nodes), program.tensors(), iter(leaves)
    if len(leaves) != len(program.placeholders):
        raise TypeError(f"the program takes {len(program.placeholders)} inputs, {len(leaves)} were given")
    unread, last = set(nodes), {}
    for node in reversed(nodes):
        last[node] = [n for n in node.all_input_nodes if n in unread]
        unread.difference_update(last[node])
    values: dict[fx.Node, Any] = {}

    def load(node: fx.Node) -> Any:
        value = values[node]
        return value.detach().double() if widen and node.op == "get_attr" and value.is_floating_point() else value

    def compute(node: fx.Node) -> Any:
        if node.op == "placeholder":
            return next(given)
        if node.op == "get_attr":
            return tensors[str(node.target)]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), load)
        if widen:
            args, kwargs = tuple(map(_widened, args)), {k: _widened(v) for k, v in kwargs.items()}
        return tuple(args[0]) if node.op == "output" else node.target(*args, **kwargs)  # type: ignore[operator]

    for node in nodes:
        values[node] = compute(node)
        if node.op == "output":
            return values[node]
        for done in last[node]:
            del values[done]
    raise InternalError("the program has no output", program=program.text())


_NARROW = {torch.float32, torch.float16, torch.bfloat16}


def _widened(value: Any) -> Any:
    """float64 for a smaller float's dtype; anything else as it is."""
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value
