"""Observers: from the values seen during calibration to the range that a quantized value covers.

A ``Histogram`` keeps what was seen of one value in fixed memory; a rule (``MinMax``, ``Percentile``, ``Mse``) reads a
range off it; ``grid`` turns a range into scale and zero point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from graphwright.errors import RecipeError, nearest

BINS = 2048

#: Elements per batch that enter a histogram; minimum and maximum always see all of them. ``torch.histc`` costs 22 ns
#: an element, so that whole activations would take longer than the network itself.
SAMPLE = 32768


@dataclass(frozen=True)
class Grid:
    """How real numbers stand as integers: ``real = (q - zero_point) * scale``, ``low <= q <= high``."""

    scale: float
    zero_point: int
    low: int
    high: int
    dtype: torch.dtype


@dataclass
class Histogram:
    """Running minimum, maximum and histogram of one value.

    Bins are ``[k·width, (k + 1)·width)`` for ``BINS`` consecutive integers k. When a value falls outside, the width
    doubles and neighbours merge, so that no count is ever split or lost.

    Attributes:
        low, high: exact minimum and maximum of all finite values; ``low > high`` while there are none.
        seen: elements seen; bad: those of them that were NaN or infinite.
        width: bin width, 0 while all values are equal; start: index k of the first bin; counts: float64 [BINS].
    """

    low: float = math.inf
    high: float = -math.inf
    seen: int = 0
    bad: int = 0
    width: float = 0.0
    start: int = 0
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """Take in one batch's value: floating, any shape."""
        x = x.detach().reshape(-1)
        self.seen += x.numel()
        if not x.numel():
            return
        low, high = (float(v) for v in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = torch.isfinite(x)
            self.bad += int((~finite).sum())
            x = x[finite]
            if not x.numel():
                return
            low, high = (float(v) for v in torch.aminmax(x))
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._cover()
        sample = thinned(x).float()
        start, width = self.start * self.width, self.width
        # Extremes are exact in ``low`` and ``high``; rounding of the bin edges must not drop them from the counts.
        sample = sample.clamp(start, start + BINS * width)
        self.counts += torch.histc(sample, BINS, start, start + BINS * width).cpu().double() * (x.numel() / sample.numel())

    def _cover(self) -> None:
        """Widen or move the bins until they hold ``low`` to ``high``."""
        if self.width == 0.0:
            span = max(self.high - self.low, 1e-6 * abs(self.high), 1e-6 * abs(self.low), 1e-30)
            self.width = 2.0 ** math.ceil(math.log2(span / (BINS - 2)))
        first, last = self._bounds()
        while last - first >= BINS:
            self._double()
            first, last = self._bounds()
        if first < self.start or last >= self.start + BINS:
            self._move(first)

    def _bounds(self) -> tuple[int, int]:
        """Indices of the bins of ``low`` and ``high``; widths are powers of two, so that these divisions are exact."""
        return math.floor(self.low / self.width), math.floor(self.high / self.width)

    def _move(self, start: int) -> None:
        """Let the bins begin at ``start``; what ``histc`` rounded across the new edge goes into the edge bin."""
        index = (torch.arange(BINS) + (self.start - start)).clamp(0, BINS - 1)
        self.counts = torch.zeros_like(self.counts).index_add_(0, index, self.counts)
        self.start = start

    def _double(self) -> None:
        padded = torch.zeros(BINS + 2, dtype=torch.float64)
        odd = self.start % 2
        padded[odd : odd + BINS] = self.counts
        self.counts = torch.zeros_like(self.counts)
        self.counts[: BINS // 2 + 1] = padded.reshape(-1, 2).sum(1)
        self.start, self.width = self.start // 2, self.width * 2

    @property
    def centers(self) -> Tensor:
        """The middle of each bin, float64 [BINS]."""
        return (torch.arange(BINS, dtype=torch.float64) + (self.start + 0.5)) * self.width

    def merged(self, other: Histogram) -> Histogram:
        """The histogram of both values together (exact up to the wider bins)."""
        both = Histogram(min(self.low, other.low), max(self.high, other.high), self.seen + other.seen, self.bad + other.bad)
        both.width = max(self.width, other.width)
        if both.width == 0.0:
            return both
        both.start = math.floor(both.low / both.width)
        both._cover()
        for part in (self, other):
            if part.width:
                index = torch.floor(part.centers / both.width).long() - both.start
                both.counts.index_add_(0, index.clamp(0, BINS - 1), part.counts)
        return both


def thinned(x: Tensor, limit: int = SAMPLE) -> Tensor:
    """At most ``limit`` elements of a flat tensor, evenly spread.

    The stride has no factor in common with the length: no axis's size divides it, so that every channel has its share.
    """
    if x.numel() <= limit:
        return x
    stride = -(-x.numel() // limit)
    while math.gcd(stride, x.numel()) != 1:
        stride += 1
    return x[::stride]


# -- rules -----------------------------------------------------------------------------------------------------------


class Rule(Protocol):
    """Reads off a histogram which range of reals the integers should span."""

    def range(self, seen: Histogram, symmetric: bool) -> tuple[float, float]:
        """``(low, high)``; the histogram holds at least one finite value."""
        ...


@dataclass(frozen=True)
class MinMax:
    """Everything that was seen."""

    def range(self, seen: Histogram, symmetric: bool) -> tuple[float, float]:
        return seen.low, seen.high


@dataclass(frozen=True)
class Percentile:
    """All but the outermost values: ``percent`` of them lie below the upper end, and as many above the lower end."""

    percent: float = 99.99

    def range(self, seen: Histogram, symmetric: bool) -> tuple[float, float]:
        share = self.percent / 100
        total = torch.cumsum(seen.counts, 0)
        count = float(total[-1])
        upper = int(torch.searchsorted(total, share * count))
        lower = int(torch.searchsorted(total, (1 - share) * count, right=True))
        low, high = (lower + seen.start) * seen.width, (upper + 1 + seen.start) * seen.width
        return max(seen.low, low), min(seen.high, high)


@dataclass(frozen=True)
class Mse:
    """The range with the least mean squared error, rounding and saturation together.

    Args:
        steps: ranges tried per side and round.
        least: the smallest range tried, as a share of what was seen.
        power: exponent of the error.
    """

    steps: int = 48
    least: float = 0.25
    power: float = 2.0

    def range(self, seen: Histogram, symmetric: bool) -> tuple[float, float]:
        used = torch.nonzero(seen.counts).flatten()
        points, counts = seen.centers[used].clamp(seen.low, seen.high).numpy(), seen.counts[used].numpy()
        shares = np.linspace(self.least, 1.0, self.steps)
        if symmetric:
            bound = max(abs(seen.low), abs(seen.high))
            best = self._best(points, counts, -bound * shares, bound * shares, symmetric)
            return -bound * shares[best], bound * shares[best]
        low, high = min(seen.low, 0.0), max(seen.high, 0.0)
        for _ in range(2):  # each side in turn; a second round sees the other side's choice
            if seen.high > 0:
                ends = max(seen.high, 0.0) * shares
                high = float(ends[self._best(points, counts, np.full_like(ends, low), ends, symmetric)])
            if seen.low < 0:
                ends = min(seen.low, 0.0) * shares
                low = float(ends[self._best(points, counts, ends, np.full_like(ends, high), symmetric)])
        return low, high

    def _best(self, points: np.ndarray, counts: np.ndarray, lows: np.ndarray, highs: np.ndarray, symmetric: bool) -> int:
        """Index of the range with the least error."""
        scale = (np.maximum(np.abs(lows), highs) / 127 if symmetric else (highs - lows) / 255)[:, None]
        zero = 0 if symmetric else np.round(-lows[:, None] / scale)
        bottom, top = (-128, 127) if symmetric else (0, 255)
        q = np.clip(np.round(points / scale) + zero, bottom, top)
        error = np.abs((q - zero) * scale - points)
        return int(np.argmin((error**self.power) @ counts))


_RULES: dict[str, Rule] = {"min-max": MinMax(), "percentile": Percentile(), "mse": Mse()}


def rule(name: str | Rule) -> Rule:
    """The rule of that name, or the rule itself.

    Raises:
        RecipeError: no rule has that name.
    """
    if not isinstance(name, str):
        return name
    if name not in _RULES:
        raise RecipeError(f"there is no observer {name!r}; there are {', '.join(_RULES)}", hint=nearest(name, _RULES) or None)
    return _RULES[name]


def grid(low: float, high: float, *, symmetric: bool) -> Grid:
    """Scale and zero point of 8-bit integers that span ``low`` to ``high``; 0.0 is always representable exactly.

    Asymmetric: uint8 in [0, 255]. Symmetric: int8 in [-128, 127], zero point 0. The scale is a float32 number.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    span = max(-low, high) / 127 if symmetric else (high - low) / 255
    scale = max(float(np.float32(span)), float(np.finfo(np.float32).tiny))
    if symmetric:
        return Grid(scale, 0, -128, 127, torch.int8)
    return Grid(scale, min(255, max(0, round(-low / scale))), 0, 255, torch.uint8)
