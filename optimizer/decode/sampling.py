"""The next token from logits: greedy, or drawn after temperature, top-k, top-p and min-p; tokens seen before made less probable."""

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
        min_p: only tokens at least this share as probable as the most probable one are left (Nguyen et al. 2024); None or 0: all.

    Raises:
        InputError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not _number(self.temperature) or not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature={self.temperature!r}", where="generate", hint="A number above 0; do_sample=False always takes the most probable token.")
        if self.top_k is not None and (isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1):
            raise InputError(f"top_k={self.top_k!r}", where="generate", hint="A whole number, 1 or more, or None for all tokens.")
        if self.top_p is not None and (not _number(self.top_p) or not 0 < self.top_p <= 1):
            raise InputError(f"top_p={self.top_p!r}", where="generate", hint="A probability above 0 and up to 1, or None for all tokens.")
        if self.min_p is not None and (not _number(self.min_p) or not 0 <= self.min_p <= 1):
            raise InputError(f"min_p={self.min_p!r}", where="generate", hint="A share from 0 to 1, or None for all tokens.")

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
        if self.min_p:
            shares = scores.softmax(-1)
            scores = scores.masked_fill(shares < self.min_p * shares.amax(-1, keepdim=True), float("-inf"))
        return scores

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """One token per row, ``i64[batch]``."""
        return torch.multinomial(self.filtered(logits).softmax(-1), 1, generator=generator).squeeze(1)


class Repetition:
    """Makes tokens less probable that stand in the prompt or were chosen before (Keskar et al. 2019): their logits are divided
    by ``penalty`` where positive, else multiplied by it. Padding counts as part of the prompt, as in transformers.

    Args:
        penalty: above 0; above 1 discourages, below 1 encourages what was seen.
        ids: the prompts, ``i64[batch, length]``.

    Raises:
        InputError: the penalty is out of its range.
    """

    def __init__(self, penalty: float, ids: Tensor):
        if not _number(penalty) or not 0 < penalty < float("inf"):
            raise InputError(f"repetition_penalty={penalty!r}", where="generate", hint="A number above 0; 1 leaves the logits as they are.")
        self.penalty, self._recent = penalty, ids
        self._seen: Tensor | None = None

    def penalized(self, logits: Tensor) -> Tensor:
        """Logits ``[batch, vocabulary]`` in float32, lowered where a token was seen."""
        scores = logits.float()
        if self._seen is None:
            self._seen = torch.zeros_like(scores, dtype=torch.bool)
        self._seen.scatter_(1, self._recent, True)
        return torch.where(self._seen, torch.where(scores < 0, scores * self.penalty, scores / self.penalty), scores)

    def note(self, token: Tensor) -> Tensor:
        """Remember the tokens ``i64[batch]`` that were chosen; gives them back."""
        self._recent = token[:, None]
        return token


def greedy(logits: Tensor) -> Tensor:
    """The most probable token per row, ``i64[batch]``; the first of several."""
    return logits.argmax(-1)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
