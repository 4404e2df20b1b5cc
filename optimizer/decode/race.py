"""Original and result generate in turns: the figure that decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphwright import search
from graphwright.decode.convention import Prompt, split_output
from graphwright.decode.decoder import Decoder
from graphwright.decode.report import DecoderReport
from graphwright.measure import interleaved
from graphwright.optimized import Optimized
from graphwright.search import Goal

if TYPE_CHECKING:
    from graphwright.decode.build import Calls

#: new tokens of each generation that is timed
TOKENS = 16


def compared(decoder: Decoder, calls: Calls, prompt: Prompt, recipe: Any, goal: Goal) -> DecoderReport:
    """Generate greedily with both, decide whether the result stands, and write down what came of it."""
    limit = decoder.traits.max_length
    tokens = TOKENS if limit is None else min(TOKENS, limit - prompt.ids.shape[1])
    halves = (decoder._prefill.fast, decoder._step.fast)
    report = DecoderReport(
        halves[0].report.model, recipe if isinstance(recipe, str) else halves[0].report.recipe, decoder.traits.cache, "",
        halves[0].report, halves[1].report, *prompt.ids.shape, tokens, limit)  # fmt: skip
    original, result = lambda: eager(calls, prompt, tokens), lambda: ours(decoder, prompt, tokens)
    different = int((original() != result()).any(1).sum())
    if different:
        report.notes.append(f"greedy answers of {different} of {len(prompt.ids)} rows differ from the original's within {tokens} tokens")
    report.original, report.optimized = interleaved([original, result], rounds=10, budget_s=3.0, settled=4)
    if report.optimized.minimum >= report.original.minimum:  # a loss is not believed on one race: others may have used the machine
        report.original, report.optimized = interleaved([original, result], rounds=10, budget_s=3.0)
    before = _bytes(halves, captured=True)
    if report.optimized.minimum >= report.original.minimum and not (goal.about_size and _bytes(halves) < before):
        _revert(halves, report)
        report.original, report.optimized = interleaved([original, result], rounds=6, budget_s=2.0)
    else:
        a, b = report.original.minimum, report.optimized.minimum
        report.verdict = f"generates {a / b:.2f} times faster" if b < a else f"smaller, and generates {b / a:.2f} times slower"
    report.bytes_before, report.bytes_after = before, _bytes(halves)
    return report


def _revert(halves: tuple[Optimized, ...], report: DecoderReport) -> None:
    assert report.original is not None and report.optimized is not None
    reason = f"not faster: {report.optimized.minimum:.3g} ms against {report.original.minimum:.3g} ms for {report.tokens} tokens"
    for fast in halves:
        variant = fast._first()
        assert variant.built is not None
        if not variant.built.unchanged:
            variant.built = search.revert(variant.built, reason)
            fast.report.verdict += "; not used, since generation as a whole is " + reason
    report.verdict = f"{reason}; the captured graphs run unchanged"


def _bytes(halves: tuple[Optimized, ...], captured: bool = False) -> int:
    """Bytes of the tensors that the programs read, shared ones once."""
    builds = [b for fast in halves if (b := fast._first().built) is not None]
    held = [t.untyped_storage() for b in builds for t in (b.captured if captured else b.running).tensors().values()]
    return sum({s.data_ptr(): s.nbytes() for s in held}.values())


def eager(calls: Calls, prompt: Prompt, count: int) -> Tensor:
    """The original's greedy answer: a plain loop over its own cache."""
    convention, batch = calls.convention, prompt.ids.shape[0]
    mask, positions, token, past = prompt.mask, prompt.positions, prompt.ids, None
    after, tokens = prompt.mask.sum(1, keepdim=True), []
    with torch.no_grad():
        for k in range(count):
            logits, past = split_output(calls.model(**convention.call(token, mask, positions, past)))
            token = logits[:, -1:].argmax(-1)
            tokens.append(token)
            mask, positions = torch.cat([mask, mask.new_ones(batch, 1)], 1), after + k
    return torch.cat(tokens, 1)


def ours(decoder: Decoder, prompt: Prompt, count: int) -> Tensor:
    """The result's greedy answer of the same length."""
    found = decoder.generate(prompt.ids, count, attention_mask=prompt.mask, eos_token_id=None)
    assert isinstance(found, Tensor)
    return found[:, prompt.ids.shape[1] :]
