"""``optimize_decoder``: from a causal language model to a ``Decoder``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graphwright import search
from graphwright.accelerator import random_devices
from graphwright.api import Job, _attributes
from graphwright.backends.packs import shared
from graphwright.calibrate import Calibration
from graphwright.capture.rehearse import untouched
from graphwright.decode import race
from graphwright.decode.convention import Convention, Prompt, split_output
from graphwright.decode.decoder import Decoder, Traits
from graphwright.decode.sharing import Shelf
from graphwright.errors import CalibrationError, InputError, UnsupportedError
from graphwright.ir import Program
from graphwright.manager import Pass
from graphwright.optimized import WORKING, Optimized
from graphwright.passes.append_cache import AppendCache
from graphwright.search import Built, Goal
from graphwright.structure import Spec, flatten

Say = Callable[[str], None]
_WHERE = "optimize_decoder"


def optimize_decoder(
    model: nn.Module,
    prompt: Any,
    recipe: str | Pass | Sequence[str | Pass] = "default",
    *,
    cache: Literal["dynamic", "static"] = "dynamic",
    max_length: int | None = None,
    calibration: Iterable[Any] | Calibration | None = None,
    goal: Goal | None = None,
    seed: int = 0,
    progress: Say | None = None,
) -> Decoder:
    """A causal language model that generates faster: prefill and one-token step, optimized over one set of weights.

    A door of its own beside ``gw.optimize``: that one takes a model and one call and gives something that is called alike; a
    decoder takes prompts, makes two calls of them whose shapes follow from each other, is run by ``generate``, and is
    judged by how fast answers come.

    The model is one of transformers' causal language models, or an ``nn.Module`` with ``forward(input_ids, past_key_values=None,
    ...)`` where ``past_key_values`` is a tuple of ``(keys, values)`` per layer, each ``[batch, heads, tokens, size]``, and which returns
    ``(logits, past_key_values)``, or an object or dict with these two fields. If ``forward`` takes them, it is also given
    ``attention_mask`` (``i64[batch, past + present]``, 1 where a token stands), ``position_ids`` (``i64[batch, present]``),
    ``use_cache=True`` and ``logits_to_keep=1``.

    Args:
        model: is never modified.
        prompt: token numbers ``i64[batch, length]``, or a mapping with ``input_ids`` and ``attention_mask`` (padded on the left), like
            those that will come: batch and length may differ later, kernels are chosen for these.
        recipe: as for ``gw.optimize``.
        cache: ``"dynamic"``: it grows with the answer, in memory that is reserved for it. ``"static"``: the step has fixed shapes,
            for the batch of ``prompt`` and ``max_length`` tokens; it attends to all of these slots, empty ones masked.
        max_length: tokens of prompt and answer together at the most. By default what the model's config says (``max_position_embeddings``,
            ``n_positions``); needed for a static cache.
        calibration: an iterable of prompts, for recipes that quantize activations.
        goal: ``gw.Goal(size_mb=...)`` keeps programs that are smaller though not faster; ``time_budget`` counts for each program.

    Raises:
        UnsupportedError: the model has no such cache, is an encoder and decoder, or can't be captured whole.
        InputError, RecipeError, SiteError, CalibrationError: an argument is unusable; nothing was changed.
    """
    start = time.perf_counter()
    model, limit = _checked(model, cache, max_length, goal)
    convention, given, say = Convention.of(model), Prompt.of(prompt, where=_WHERE), progress or (lambda text: None)
    if given.padded and not convention.mask:
        raise InputError("the prompts are padded, and the model takes no attention_mask", where=_WHERE, hint="Pass prompts of equal length.")
    if limit is not None and given.ids.shape[1] >= limit:
        raise InputError(f"the prompt has {given.ids.shape[1]} tokens, max_length is {limit}", where=_WHERE, hint="Pass a shorter prompt, or a larger max_length.")
    traits = _traits(model, convention, cache, limit)
    if isinstance(calibration, Iterable) and not isinstance(calibration, (list, tuple)):
        calibration = list(calibration)
    calls = Calls(model, convention, traits)
    with WORKING, torch.random.fork_rng(devices=random_devices()), shared():
        torch.manual_seed(seed)
        shelf = Shelf()
        first, second = calls.prefill(given), calls.step(given)
        if cache == "static":
            calls.check_static(given)
        halves = []
        for name, call, extra, dynamic in (("prefill", first, (), "auto"), ("step", second, (AppendCache(),), "auto" if cache == "dynamic" else False)):
            data = calls.calibration(calibration, name, given.ids.shape[0])
            job = _Job(recipe, data, goal or Goal(), dynamic, seed, lambda text, name=name: say(f"{name}: {text}"), shelf, extra)
            fast = Optimized(job.again, model, _attributes(model))
            job.result = fast
            fast._add(job.first(model, (), call), model)
            if fast._first().built is None:
                named = "; ".join(map(str, fast._first().capture.regions))
                raise UnsupportedError(f"the {name} can't be captured whole: {named}", where=_WHERE,
                                       hint="Rewrite those lines so that torch.export takes them, or optimize the model in pieces with gw.optimize.")  # fmt: skip
            halves.append(fast)
        decoder = Decoder(*halves, traits)
        _check_names(decoder)
        say("generating with original and result in turns")
        with untouched(model):
            decoder.__dict__["_report"] = race.compared(decoder, calls, given, recipe, goal or Goal())
        decoder.report.notes += _unfollowed(model)
        decoder.report.seconds["total"] = time.perf_counter() - start
    return decoder


def _checked(model: Any, cache: Any, max_length: Any, goal: Any) -> tuple[nn.Module, int | None]:
    """The model itself, and the limit on tokens.

    Raises:
        InputError: an argument is unusable.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, an nn.Module is wanted", where=_WHERE)
    if isinstance(model, (Optimized, Decoder)):
        raise InputError("this model is optimized already", where=_WHERE, hint="Optimize the original again.")
    if cache not in ("dynamic", "static"):
        raise InputError(f"cache={cache!r}", where=_WHERE, hint='"dynamic" or "static".')
    if goal is not None and not isinstance(goal, Goal):
        raise InputError(f"goal is a {type(goal).__name__}, a gw.Goal is wanted", where=_WHERE)
    if goal is not None and goal.max_drop is not None:
        raise InputError("max_drop needs evaluate, which optimize_decoder does not take", where=_WHERE,
                         hint="Tune the recipe with gw.optimize(model, inputs, evaluate=...), then pass its passes here.")  # fmt: skip
    model = getattr(model, "_orig_mod", model)
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    own = next((v for n in ("max_position_embeddings", "n_positions", "max_seq_len") if isinstance(v := getattr(config, n, None), int) and v > 0), None)
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2):
        raise InputError(f"max_length={max_length!r}", where=_WHERE, hint="A whole number, 2 or more: tokens of prompt and answer together.")
    if max_length is not None and own is not None and max_length > own:
        raise InputError(f"max_length={max_length}, and the model's config knows {own} positions", where=_WHERE, hint=f"Pass max_length={own} or less.")
    if cache == "static" and max_length is None:
        raise InputError("a static cache needs max_length", where=_WHERE, hint="Pass max_length=...: its buffers hold so many tokens, and every step attends to all of them.")
    return model, max_length if max_length is not None else own


def _traits(model: nn.Module, convention: Convention, cache: str, limit: int | None) -> Traits:
    """What the model's own configuration says about special tokens."""
    config, generation = getattr(model, "config", None), getattr(model, "generation_config", None)
    ends = next((v for c in (generation, config) if (v := getattr(c, "eos_token_id", None)) is not None), None)
    ends = () if ends is None else (ends,) if isinstance(ends, int) else tuple(int(t) for t in ends)
    pad = next((v for c in (generation, config) if isinstance(v := getattr(c, "pad_token_id", None), int) and v >= 0), None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return Traits(cache, limit, convention.mask, tuple(t for t in ends if t >= 0), pad, size if isinstance(size, int) else None)


#: What ``generate`` takes, and what of a generation config means nothing here: caches, what is returned, and what beams alone heed.
_ARGUMENTS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_KNOWN = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "max_length", "max_new_tokens", "use_cache", "cache_implementation",
          "cache_config", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores", "output_logits", "transformers_version",
          "length_penalty", "early_stopping", "disable_compile", "compile_config")  # fmt: skip
#: Values that change nothing.
_IDLE = {"temperature": 1, "top_k": 50, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1,
         "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1, "diversity_penalty": 0, "min_length": 0, "typical_p": 1,
         "epsilon_cutoff": 0, "eta_cutoff": 0}  # fmt: skip


def _unfollowed(model: nn.Module) -> list[str]:
    """What the model's generation config asks for and ``generate`` does not do by itself, as notes for the report."""
    generation = getattr(model, "generation_config", None)
    asked = generation.to_diff_dict() if hasattr(generation, "to_diff_dict") else {}
    asked = {k: v for k, v in asked.items() if k not in _KNOWN and not k.startswith("_") and v not in (None, False, [], {}) and not (k in _IDLE and v == _IDLE[k])}
    passed, left = ({k: v for k, v in asked.items() if (k in _ARGUMENTS) is inside} for inside in (True, False))
    notes = []
    if passed:
        notes.append(f"the model's generation config asks for {_listed(passed)}: pass that to generate, which takes the most probable token by itself")
    if left:
        notes.append(f"generate does not follow {_listed(left)} of the model's generation config: transformers' own may answer otherwise")
    return notes


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in settings.items())


class _Job(Job):
    """An ``optimize`` call for one of the two programs: its weights come from, and go to, the shelf of both."""

    def __init__(self, recipe: Any, calibration: Any, goal: Goal, dynamic: Any, seed: int, say: Say, shelf: Shelf, extra: tuple[Pass, ...]):
        super().__init__(recipe, calibration, None, goal, dynamic, seed, say)
        self.shelf, self._storage = shelf, shelf.storage
        self.passes = (*self.passes, *extra)

    def _build(self, program: Program, passes: Sequence[Pass]) -> Built:
        from graphwright.passes.pipeline import precisions

        return search.build(program, passes, precisions(passes), self.say, self.shelf.share)


class Calls:
    """Calls of the original: what the two programs are captured from, calibrated on, and compared with."""

    def __init__(self, model: nn.Module, convention: Convention, traits: Traits):
        self.model, self.convention, self.traits = model, convention, traits

    def prefill(self, prompt: Prompt) -> dict[str, Any]:
        return self.convention.call(prompt.ids, prompt.mask, prompt.positions, None)

    def run(self, call: dict[str, Any]) -> tuple[Tensor, Any]:
        """Logits of the last token, and the cache."""
        with torch.no_grad(), untouched(self.model):
            logits, past = split_output(self.model(**call))
        return logits[:, -1], past

    def past(self, prompt: Prompt) -> tuple[Tensor, list[Tensor], Spec]:
        """The original's logits after a prompt, its cache's tensors, and their structure.

        Raises:
            UnsupportedError: the cache holds something else than keys and values ``[batch, heads, tokens, size]``.
        """
        logits, past = self.run(self.prefill(prompt))
        batch, length = prompt.ids.shape
        try:
            leaves, spec = flatten(past, name="past_key_values")
        except InputError as error:
            raise UnsupportedError(f"the model's cache is none of keys and values: {error.what}", where=_WHERE,
                                   hint="Recurrent and hybrid models keep another state: gw.optimize(model, inputs) serves single calls.") from error  # fmt: skip
        odd = next((t for t in leaves if t.ndim != 4 or t.shape[0] != batch or t.shape[2] != length), None)
        if odd is not None or not leaves:
            what = "nothing" if odd is None else f"a tensor of shape {list(odd.shape)}"
            raise UnsupportedError(f"the model's cache holds {what}; keys and values [{batch}, heads, {length}, size] are wanted", where=_WHERE)
        return logits, leaves, spec

    def step(self, prompt: Prompt, token: Tensor | None = None) -> dict[str, Any]:
        """The call for the token after a prompt: the most probable one, or the one given."""
        logits, leaves, spec = self.past(prompt)
        return self._step(prompt, logits.argmax(-1) if token is None else token, leaves, spec, self.traits.cache == "static")

    def _step(self, prompt: Prompt, token: Tensor, leaves: Sequence[Tensor], spec: Spec, static: bool) -> dict[str, Any]:
        mask = torch.cat([prompt.mask, prompt.mask.new_ones(prompt.ids.shape[0], 1)], 1)
        if static:
            empty = (self.traits.max_length or 0) - 1 - prompt.ids.shape[1]
            mask = torch.nn.functional.pad(mask, (empty, 0))
            leaves = [torch.nn.functional.pad(t, (0, 0, empty, 0)) for t in leaves]
        positions = prompt.mask.sum(1, keepdim=True)
        return self.convention.call(token.unsqueeze(1), mask, positions, spec.unflatten([t.clone(memory_format=torch.contiguous_format) for t in leaves]))

    def check_static(self, prompt: Prompt) -> None:
        """Whether the original computes the same over a cache with empty slots in front.

        Raises:
            UnsupportedError: it does not: it can't mask them, or takes positions from the length of the cache.
        """
        logits, leaves, spec = self.past(prompt)
        token = logits.argmax(-1)
        plain, padded = (self.run(self._step(prompt, token, leaves, spec, static))[0].double() for static in (False, True))
        if not torch.allclose(plain, padded, rtol=1e-2, atol=1e-2 * float(plain.abs().max())):
            raise UnsupportedError("over a cache with masked empty slots the model computes something else", where='optimize_decoder(cache="static")',
                                   hint="Its forward must honour attention_mask, and take position_ids or derive positions from the mask; or use cache=\"dynamic\".")  # fmt: skip

    def calibration(self, prompts: Any, name: str, batch: int) -> list[dict[str, Any]] | None:
        """Calls of one of the programs for each calibration prompt; for the step, the prompt's last token after the others.

        Raises:
            CalibrationError: a prompt is unusable, or none is long enough.
        """
        if prompts is None:
            return None
        found: list[dict[str, Any]] = []
        if isinstance(prompts, Tensor) or not isinstance(prompts, Iterable):
            raise CalibrationError(f"calibration is one {type(prompts).__name__}", hint="Pass a list of prompts, each i64[batch, length].")
        for k, item in enumerate(prompts):
            try:
                prompt = Prompt.of(item, where=f"calibration prompt {k}")
            except InputError as error:
                raise CalibrationError(error.what, where=error.where, hint=error.hint) from error
            if self.traits.max_length is not None and prompt.ids.shape[1] >= self.traits.max_length:
                raise CalibrationError(f"it has {prompt.ids.shape[1]} tokens, max_length is {self.traits.max_length}", where=f"calibration prompt {k}", hint="Shorten it.")
            if name == "prefill":
                found.append(self.prefill(prompt))
            elif bool(prompt.mask[:, :-1].any(1).all()):
                before = Prompt(prompt.ids[:, :-1], prompt.mask[:, :-1], prompt.padded)
                found.append(self.step(before, prompt.ids[:, -1]))
        if not found:
            raise CalibrationError("no calibration prompt of two tokens or more" if prompts else "calibration holds no prompt",
                                   hint="Pass at least one longer prompt: the step is calibrated on its last token.")  # fmt: skip
        return found


def _check_names(decoder: Decoder) -> None:
    """The step takes the cache that the prefill gives, and gives it back."""
    (_, given), (taken, back) = (half.places(half.fast._first()) for half in (decoder._prefill, decoder._step))
    if not given.cache == taken.cache == back.cache:
        raise UnsupportedError(f"the cache has {len(given.cache)} tensors after the prompt, {len(taken.cache)} and {len(back.cache)} before and after a token",
                               where=_WHERE, hint="gw.optimize(model, inputs) serves single calls of such a model.")  # fmt: skip


__all__ = ["Calls", "optimize_decoder"]
