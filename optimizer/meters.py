"""Errors of values against others, summed over inputs, and which values of two programs are the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from graphwright.backends.base import Work
from graphwright.ir import Program, sites_of
from graphwright.report.comparison import Error

#: a value held in another order of axes is taken for the original's where that agrees by so many dB more, and by so many at least
_CLEARER_DB, _AGREES_DB = 10.0, 10.0


@dataclass
class Meter:
    """Sums over inputs from which errors follow."""

    signal: float = 0.0
    noise: float = 0.0
    dot: float = 0.0
    square: float = 0.0
    max_abs: float = 0.0
    worst: tuple[float, int] = (math.inf, 0)
    differing: int = 0
    count: int = 0

    def add(self, reference: Tensor, value: Tensor, k: int) -> None:
        """Take in a value of the k-th input; what is not finite in both alike is left out."""
        if reference.is_complex():
            reference, value = torch.view_as_real(reference.resolve_conj()), torch.view_as_real(value.resolve_conj())
        a, b = reference.detach().double(), value.detach().double()
        equal = (a == b) | (a.isnan() & b.isnan())
        off = torch.where(equal, 0.0, a - b).nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)
        a, b = a.nan_to_num(posinf=0.0, neginf=0.0), b.nan_to_num(posinf=0.0, neginf=0.0)
        signal, noise = float(a.pow(2).sum()), float(off.pow(2).sum())
        self.signal, self.noise = self.signal + signal, self.noise + noise
        self.dot, self.square = self.dot + float((a * b).sum()), self.square + float(b.pow(2).sum())
        self.max_abs = max(self.max_abs, float(off.abs().max()) if off.numel() else 0.0)
        self.worst = min(self.worst, (_db(signal, noise), k))
        self.differing, self.count = self.differing + int((~equal).sum()), self.count + equal.numel()

    def error(self) -> Error:
        size = math.sqrt(self.signal) * math.sqrt(self.square)
        return Error(_db(self.signal, self.noise), self.max_abs, max(-1.0, min(1.0, self.dot / size)) if size else None, self.noise)


def _db(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf


@dataclass
class Spot:
    """What is known of one op, over the inputs so far."""

    sites: tuple[str, ...]
    op: str
    position: int
    kernel: str
    precision: str
    shape: str
    runs: Meter = field(default_factory=Meter)
    alone: Meter | None = field(default_factory=Meter)
    note: str = ""


# -- which values are the same ---------------------------------------------------------------------------------------


def site_pairs(original: Program, works: Sequence[Work]) -> dict[fx.Node, fx.Node]:
    """For works of a rewritten program, by their sites, the nodes of the original whose values they give.

    A work that stands for several sites gives the value of the last of them; of several works with one site, the last gives it.
    """
    order = {n: k for k, n in enumerate(original.graph.nodes)}
    last = {s: n for n in original.nodes for s in sites_of(n)}
    owner: dict[fx.Node, fx.Node] = {}
    for work in works:
        named = [last[s] for s in sites_of(work.node) if s in last]
        if named:
            owner[max(named, key=order.__getitem__)] = work.node
    return {a: b for b, a in owner.items()}


def arranged(value: Tensor, like: Tensor) -> tuple[Tensor, str] | None:
    """``value`` in the shape, and order of axes, in which ``like`` seems to hold it; None where no arrangement agrees."""
    if tuple(value.shape) == tuple(like.shape):
        plain = agreement(value, like)
        if plain >= 2 * _AGREES_DB or not 1 < value.dim() <= 5:
            return value, ""
        best, axes = max((agreement(value.permute(p), like), p) for p in _orders(value, like))
        return (value.permute(axes), f"held with its axes as {list(axes)}") if best >= max(plain + _CLEARER_DB, _AGREES_DB) else (value, "")
    if value.numel() != like.numel() or value.dtype.is_floating_point != like.dtype.is_floating_point:
        return None
    flat = value.reshape(like.shape)
    tries = [(agreement(flat, like), f"held as {list(like.shape)}", flat)]
    if value.dim() == like.dim() <= 5:
        tries += [(agreement(value.permute(p), like), f"held with its axes as {list(p)}", value.permute(p)) for p in _orders(value, like)]
    db, words, found = max(tries, key=lambda t: t[0])
    return (found, words) if db >= _AGREES_DB else None


def _orders(value: Tensor, like: Tensor) -> list[tuple[int, ...]]:
    found = [p for p in itertools.permutations(range(value.dim())) if tuple(value.shape[d] for d in p) == tuple(like.shape)]
    return found or [tuple(range(value.dim()))]


def agreement(a: Tensor, b: Tensor) -> float:
    if tuple(a.shape) != tuple(b.shape):
        return -math.inf
    meter = Meter()
    meter.add(a, b, 0)
    return _db(meter.signal, meter.noise)
