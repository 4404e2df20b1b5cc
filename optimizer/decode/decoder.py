"""``Decoder``: what ``optimize_decoder`` returns; prefill and one-token step over shared weights, and ``generate``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graphwright.decode.convention import Prompt
from graphwright.decode.report import DecoderReport
from graphwright.decode.sampling import Repetition, Sampling, greedy
from graphwright.decode.steps import Half, Steps, Traits
from graphwright.errors import InputError, UnsupportedError
from graphwright.ir import Program
from graphwright.optimized import Optimized


@dataclass(frozen=True)
class Generation:
    """What ``generate(..., return_dict=True)`` returns.

    Attributes:
        sequences: ``i64[batch, prompt + new]``: the prompt, and what was generated.
        lengths: ``i64[batch]``: new tokens per row, the one that ended it among them.
        prefill_ms: until the first token was known.
        tokens_per_second: of the steps after it, over all rows; None where there were none.
    """

    sequences: Tensor
    lengths: Tensor
    prefill_ms: float
    tokens_per_second: float | None


class Decoder(nn.Module):
    """A causal language model as two programs over one set of weights: prefill, and the step for one token.

    A snapshot like every result: later edits to the user's model don't reach it. Not callable: ``generate`` runs it, and
    ``gw.optimize`` serves a single forward pass.

    Attributes:
        report: both programs' reports, and how fast original and result generate.
        traits: limits and special tokens.
    """

    def __init__(self, prefill: Optimized, step: Optimized, traits: Traits, report: DecoderReport | None = None):
        super().__init__()
        self.training = False
        hidden = self.__dict__  # no submodules: nothing of torch may move or cast them
        hidden["_prefill"], hidden["_step"] = Half(prefill), Half(step)
        hidden["traits"], hidden["_report"] = traits, report

    # -- generating --------------------------------------------------------------------------------------------

    def generate(
        self, input_ids: Any, max_new_tokens: int = 20, *, attention_mask: Tensor | None = None, do_sample: bool = False,
        temperature: float | None = None, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | Sequence[int] | None | Literal["model"] = "model", pad_token_id: int | None = None,
        seed: int | None = None, generator: torch.Generator | None = None, streamer: Any = None, return_dict: bool = False,
    ) -> Tensor | Generation:  # fmt: skip
        """Continue prompts.

        Args:
            input_ids: token numbers ``i64[batch, length]``, or what a tokenizer gives: a mapping with ``input_ids`` and ``attention_mask``.
            max_new_tokens: at the most this many per row.
            attention_mask: ``[batch, length]``, 1 where a token stands; prompts are padded on the left.
            do_sample: draw tokens; else the most probable one is taken.
            temperature, top_k, top_p, min_p: see ``Sampling``; for ``do_sample=True``.
            repetition_penalty: see ``Repetition``; None: the logits stay as they are.
            eos_token_id: tokens that end a row; ``"model"``: those of the model's own configuration; None: none.
            pad_token_id: what fills rows that have ended; the model's, else the first that ends a row.
            seed, generator: where random numbers come from; one of the two. Equal seeds give equal answers.
            streamer: called with ``i64[batch]`` after each token, and stops by returning True; or an object with ``put`` and
                ``end`` such as transformers' ``TextStreamer``, which is given the prompt first.
            return_dict: return a ``Generation`` with lengths and times.

        Returns:
            ``i64[batch, length + new]``: prompts and answers, until the longest answer has ended.

        Raises:
            InputError: an argument is unusable, or prompt and answer exceed ``max_length``.
            CoverageError: the batch size is not covered (after ``load``, with a static cache).
        """
        prompt = Prompt.of(input_ids, attention_mask)
        self._check(prompt, max_new_tokens)
        choose = _chooser(do_sample, temperature, top_k, top_p, min_p, seed, generator)
        if repetition_penalty is not None:
            choose = _penalizing(choose, Repetition(repetition_penalty, prompt.ids))
        ends = self._ends(eos_token_id)
        pad = pad_token_id if pad_token_id is not None else self.traits.pad if self.traits.pad is not None else (ends[0] if ends else 0)
        with torch.no_grad():
            return _generate(self, prompt, max_new_tokens, choose, ends, pad, _listener(streamer, prompt), return_dict)

    def _check(self, prompt: Prompt, new: Any) -> None:
        if isinstance(new, bool) or not isinstance(new, int) or new < 1:
            raise InputError(f"max_new_tokens={new!r}", where="generate", hint="A whole number, 1 or more.")
        limit, length = self.traits.max_length, prompt.ids.shape[1]
        if limit is not None and length + new > limit:
            room = limit - length
            raise InputError(
                f"a prompt of {length} tokens and {new} new ones exceed max_length={limit}", where="generate",
                hint=(f"Ask for max_new_tokens={room}, or shorten the prompt" if room > 0 else "Shorten the prompt (keep its last tokens)")
                + ", or optimize_decoder(..., max_length=...) with more.")  # fmt: skip
        if prompt.padded and not self.traits.mask:
            raise InputError("the prompts are padded, and the model takes no attention_mask", where="generate",
                             hint="Give it prompts of equal length, or one at a time.")  # fmt: skip
        size = self.traits.vocabulary
        low, high = int(prompt.ids.min()), int(prompt.ids.max())
        if low < 0 or (size is not None and high >= size):
            raise InputError(f"input_ids holds {low if low < 0 else high}; tokens go from 0 to {size - 1 if size else 'the size of the vocabulary'}", where="generate")

    def _ends(self, given: Any) -> tuple[int, ...]:
        if isinstance(given, str) and given == "model":
            return self.traits.eos
        found = () if given is None else (given,) if isinstance(given, int) else tuple(given) if isinstance(given, (list, tuple)) else None
        if found is None or not all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in found):
            raise InputError(f"eos_token_id={given!r}", where="generate", hint='A token number, several of them, None for none, or "model".')
        return found

    def begin(self, prompt: Prompt) -> tuple[Tensor, list[Tensor]]:
        """Run the prompt: logits of the last token ``[batch, vocabulary]``, and the cache in the order of the step's ``Inputs.cache``."""
        half = self._prefill
        leaves = half.inputs.leaves(prompt.ids, prompt.mask, prompt.positions, ())
        variant = half.serving(leaves)
        outs = variant.built.lowered.runner(*leaves)  # type: ignore[union-attr]
        places = half.places(variant)[1]
        return outs[places.logits][:, -1], [outs[k] for k in places.places]

    def steps(self, prompt: Prompt, cache: Sequence[Tensor], count: int) -> Steps:
        """Ready to run ``count`` one-token steps after ``begin``."""
        return Steps(self._step, self.traits, prompt, cache, count)

    # -- looking -----------------------------------------------------------------------------------------------

    @property
    def report(self) -> DecoderReport:
        """What was done to both programs, and how fast original and result generate."""
        assert self._report is not None
        return self._report

    @property
    def programs(self) -> dict[str, Program]:
        """The programs that run for the prompts given to ``optimize_decoder``: ``"prefill"`` and ``"step"``."""
        return {"prefill": self._prefill.fast.program, "step": self._step.fast.program}

    def size_bytes(self) -> int:
        """Bytes of both programs' tensors; what they share counts once."""
        held = [t.untyped_storage() for p in self.programs.values() for t in p.tensors().values()]
        return sum({s.data_ptr(): s.nbytes() for s in held}.values())

    def explain(self, site: str = "*") -> str:
        """What happened at the sites that match an ``fnmatch`` pattern, in the prefill and in the step.

        Raises:
            SiteError: none matches.
        """
        return "\n\n".join(f"{name}\n{half.fast.explain(site)}" for name, half in (("Prefill", self._prefill), ("Step", self._step)))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_prefill" not in self.__dict__:
                raise
        if hasattr(Optimized, name):  # a method of results that are called
            raise AttributeError(f"a decoder has no attribute {name!r}")
        return getattr(self._prefill.fast, name)

    def profile(self, *args: Any, **kwargs: Any) -> Any:
        """Not offered: ``report.step`` has each site's time within a step."""
        raise UnsupportedError("a decoder is not profiled as a whole", where="profile()", hint="report.prefill and report.step have each site's time.")

    def __repr__(self) -> str:
        return f"Decoder({self.report.model}, {self.traits.cache} cache: {self.report.verdict})" if self._report else "Decoder()"

    # -- storing -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write both programs to one data-only file, shared weights once; ``gw.load`` gives the decoder back.

        Raises:
            SaveError: the file can't be written (an older one survives).
        """
        from graphwright.decode.storing import save

        save(self, path)

    # -- what nn.Module offers and a snapshot does not ---------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError("a decoder is not called", where="forward()", hint="Use .generate(input_ids); gw.optimize(model, inputs) serves single forward passes.")

    def train(self, mode: bool = True) -> Decoder:
        self._prefill.fast.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return self._prefill.fast._apply(fn)

    def to(self, *args: Any, **kwargs: Any) -> Decoder:
        """Returns itself where nothing would change; anything else is refused."""
        self._prefill.fast.to(*args, **kwargs)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Tensors of both programs, by name, ``prefill.`` and ``step.`` before each."""
        return {f"{k}.{name}": t.detach() for k, p in self.programs.items() for name, t in p.tensors().items()}

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._prefill.fast.load_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoder:
        raise UnsupportedError("a decoder is not copied: it holds no state between calls", where="copy.deepcopy", hint="Use the same one, several threads too.")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError("an optimized model is not pickled", where="torch.save / pickle",
                               hint="Use decoder.save(path) and gw.load(path): data only, no code runs on load.")  # fmt: skip


def _generate(decoder: Decoder, prompt: Prompt, new: int, choose: Callable[[Tensor], Tensor], ends: tuple[int, ...], pad: int,
              tell: Callable[[Tensor | None], bool], return_dict: bool) -> Tensor | Generation:  # fmt: skip
    start = time.perf_counter()
    logits, cache = decoder.begin(prompt)
    token = choose(logits)
    middle = time.perf_counter()
    batch = prompt.ids.shape[0]
    tokens, going = [token], torch.ones(batch, dtype=torch.bool)
    stops = torch.tensor(ends) if ends else None
    lengths = torch.ones(batch, dtype=torch.long)
    stop = tell(token)
    if new > 1 and not stop:
        steps = decoder.steps(prompt, cache, new - 1)
        del cache
        for _ in range(new - 1):
            if stops is not None:
                going &= ~torch.isin(token, stops)
                if not bool(going.any()):
                    break
            token = choose(steps(token))
            if stops is not None:
                token = torch.where(going, token, pad)
            lengths += going
            tokens.append(token)
            if tell(token):
                break
    tell(None)
    sequences = torch.cat([prompt.ids, torch.stack(tokens, 1)], 1)
    if not return_dict:
        return sequences
    spent, count = time.perf_counter() - middle, len(tokens) - 1
    return Generation(sequences, lengths, 1e3 * (middle - start), batch * count / spent if count else None)


def _chooser(do_sample: bool, temperature: Any, top_k: Any, top_p: Any, min_p: Any, seed: Any, generator: Any) -> Callable[[Tensor], Tensor]:
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed, "generator": generator}
    named = [k for k, v in given.items() if v is not None]
    if not do_sample:
        if named:
            raise InputError(f"{', '.join(named)} given, and nothing is drawn", where="generate", hint="Pass do_sample=True as well.")
        return greedy
    if seed is not None and generator is not None:
        raise InputError("seed and generator are both given", where="generate", hint="Pass one of them.")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator is a {type(generator).__name__}", where="generate", hint="A torch.Generator is wanted.")
    if seed is not None:
        if not isinstance(seed, int):
            raise InputError(f"seed={seed!r}", where="generate", hint="A whole number is wanted.")
        generator = torch.Generator().manual_seed(seed)
    sampling = Sampling(1.0 if temperature is None else temperature, top_k, top_p, min_p)
    return lambda logits: sampling.draw(logits, generator)


def _penalizing(choose: Callable[[Tensor], Tensor], seen: Repetition) -> Callable[[Tensor], Tensor]:
    return lambda logits: seen.note(choose(seen.penalized(logits)))


def _listener(streamer: Any, prompt: Prompt) -> Callable[[Tensor | None], bool]:
    """What is told of each token, and of the end by None; True: stop."""
    if streamer is None:
        return lambda token: False
    if hasattr(streamer, "put") and hasattr(streamer, "end"):
        streamer.put(prompt.ids)
        return lambda token: bool(streamer.end() if token is None else streamer.put(token))
    if not callable(streamer):
        raise InputError(f"streamer is a {type(streamer).__name__}", where="generate", hint="A function of the tokens, or an object with put and end.")
    return lambda token: token is not None and streamer(token) is True


__all__ = ["Decoder", "Generation", "Traits"]
