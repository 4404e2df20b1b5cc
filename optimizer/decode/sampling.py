"""The next token from logits: greedy, or drawn after temperature, top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Args:
        temperature: logits are divided by it; above 0.
        top_k: only the k most probable tokens are left; None: all.
        top_p: only the most probable tokens that together reach this probability are left (nucleus sampling, Holtzman et al.
            2019), at least one; None or 1: all.

    Raises:
        InputError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not _number(self.temperature) or not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature={self.temperature!r}", where="generate", hint="A number above 0; do_sample=False always takes the most probable token.")
        if self.top_k is not None and (isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1):
            raise InputError(f"top_k={self.top_k!r}", where="generate", hint="A whole number, 1 or more, or None for all tokens.")
        if self.top_p is not None and (not _number(self.top_p) or not 0 < self.top_p <= 1):
            raise InputError(f"top_p={self.top_p!r}", where="generate", hint="A probability above 0 and up to 1, or None for all tokens.")

    def filtered(self, logits: Tensor) -> Tensor:
        """Logits ``[batch, vocabulary]`` in float32, divided by the temperature, with -inf where a token is left out."""
        scores = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        if self.top_p is not None and self.top_p < 1:
            ordered, order = scores.sort(dim=-1, descending=True, stable=True)
            shares = ordered.softmax(-1)
            before = shares.cumsum(-1) - shares  # what the more probable tokens reach without this one
            gone = before >= self.top_p
            gone[:, 0] = False
            scores = scores.masked_fill(torch.zeros_like(gone).scatter_(1, order, gone), float("-inf"))
        return scores

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """One token per row, ``i64[batch]``."""
        return torch.multinomial(self.filtered(logits).softmax(-1), 1, generator=generator).squeeze(1)


def greedy(logits: Tensor) -> Tensor:
    """The most probable token per row, ``i64[batch]``; the first of several."""
    return logits.argmax(-1)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
