"""The two programs of a decoder as they run: which variant serves a call, and one-token steps over a cache with room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphwright.backends.room import reserve
from graphwright.decode.convention import Inputs, Outputs, Prompt
from graphwright.errors import CoverageError, UnsupportedError
from graphwright.optimized import WORKING, Optimized, Variant
from graphwright.structure import Spec


@dataclass(frozen=True)
class Traits:
    """What a decoder knows about its model; plain data, stored with it.

    Attributes:
        cache: ``"dynamic"`` or ``"static"``.
        max_length: tokens of prompt and answer together at the most; None: no limit.
        mask: the model takes ``attention_mask``; without it prompts can't be padded.
        eos: tokens that end an answer; pad: what follows one in a row that has ended.
        vocabulary: number of tokens, where the model says it.
    """

    cache: str
    max_length: int | None = None
    mask: bool = True
    eos: tuple[int, ...] = ()
    pad: int | None = None
    vocabulary: int | None = None


class Half:
    """One of the two programs, for every shape that it was captured for.

    Attributes:
        fast: its variants and how to capture more.
    """

    def __init__(self, fast: Optimized):
        self.fast = fast
        self._places: dict[int, tuple[Spec, Inputs, Outputs]] = {}

    def places(self, variant: Variant) -> tuple[Inputs, Outputs]:
        """Where inputs and outputs of a variant stand; remembered, since reading them from the structures takes a while."""
        found = self._places.get(id(variant))
        signature = variant.built.running.signature  # type: ignore[union-attr]
        if found is None or found[0] is not signature.inputs:
            found = signature.inputs, Inputs.of(signature.inputs), Outputs.of(signature.outputs)
            self._places[id(variant)] = found
        return found[1], found[2]

    @property
    def inputs(self) -> Inputs:
        return self.places(self.fast._variants[-1])[0]

    def serving(self, leaves: list[Tensor]) -> Variant:
        """The variant that covers these flat inputs; captured anew where none does and the model is alive.

        Raises:
            CoverageError: none does, and none can be made.
        """
        found = self._covering(leaves)
        if found is None:
            spec = self.fast._variants[-1].spec
            args, kwargs = spec.unflatten(leaves)
            batch, length = leaves[self.inputs.ids].shape
            try:
                with WORKING:
                    found = self._covering(leaves) or self.fast._recapture(args, kwargs, leaves, spec)
            except CoverageError as error:
                raise CoverageError(f"a batch of {batch} ({length} tokens a row) is not covered: {error.what}", where="generate",
                                    hint="Optimize on a prompt of this batch, or generate once for each batch before save(); "
                                         'cache="dynamic" covers all of them where the model allows.') from error  # fmt: skip
            if found.built is None:
                raise UnsupportedError(f"for these sizes the model can't be captured whole: {'; '.join(map(str, found.capture.regions))}", where="generate")
        return found

    def _covering(self, leaves: list[Tensor]) -> Variant | None:
        return next((v for v in self.fast._variants if v.guard is not None and v.guard.check(leaves) is None), None)


class Steps:
    """One-token steps over a cache with room for all of them; a call takes ``i64[batch]`` and gives logits ``[batch, vocabulary]``.

    Dynamic: the cache is a view of what is filled, one token longer each time. Static: it is a window of ``max_length - 1`` tokens, the
    past at its right end and masked slots before it, that moves along the buffer by one token per step: every shape is
    fixed, and distances between tokens, which windows and linear biases read, are the true ones.
    """

    def __init__(self, half: Half, traits: Traits, prompt: Prompt, cache: Sequence[Tensor], count: int):
        batch, length = prompt.ids.shape
        self.static = traits.cache == "static"
        self.window = (traits.max_length or 0) - 1 if self.static else length
        before = self.window - length  # slots that stay empty
        total = self.window + count
        self.mask = prompt.mask.new_ones(batch, total)
        self.mask[:, :before] = 0
        self.mask[:, before : self.window] = prompt.mask
        self.positions = prompt.mask.sum(1, keepdim=True) + torch.arange(count)
        self.done = 0
        roomy = [_roomy(c, before, self.window, total) for c in cache]
        first = prompt.ids[:, -1:]
        self.leaves = half.inputs.leaves(first, self.mask.narrow(1, 0, self.window + 1), self.positions[:, :1], roomy)
        variant = half.serving(self.leaves)
        ins, outs = half.places(variant)
        self.run = variant.built.lowered.runner  # type: ignore[union-attr]
        self.ids, self.mask_at, self.positions_at, self.logits = ins.ids, ins.mask, ins.positions, outs.logits
        where = dict(zip(outs.cache, outs.places, strict=True))
        self.pairs = [(place, where[name]) for name, place in zip(ins.cache, ins.places, strict=True)]

    def __call__(self, token: Tensor) -> Tensor:
        leaves, t, window = self.leaves, self.done, self.window
        leaves[self.ids] = token.unsqueeze(1)
        if self.mask_at is not None:
            leaves[self.mask_at] = self.mask.narrow(1, t, window + 1) if self.static else self.mask.narrow(1, 0, window + 1 + t)
        if self.positions_at is not None:
            leaves[self.positions_at] = self.positions.narrow(1, t, 1)
        outs = self.run(*leaves)
        if self.static:
            for place, k in self.pairs:
                leaves[place] = outs[k].narrow(2, 1, window)
        else:
            for place, k in self.pairs:
                leaves[place] = outs[k]
        self.done = t + 1
        return outs[self.logits][:, -1]


def _roomy(cache: Tensor, before: int, window: int, total: int) -> Tensor:
    """The cache ``[batch, heads, length, size]`` behind ``before`` empty slots in a buffer of ``total``: the view of its first ``window`` slots."""
    buffer = reserve(cache, total)
    buffer[:, :, :before] = 0  # masked, but 0 times what memory happens to hold may be NaN
    buffer[:, :, before:window] = cache
    return buffer.narrow(2, 0, window)
