"""How a causal language model is called: which inputs it takes, where its cache stands among inputs and outputs."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphwright.errors import InputError, UnsupportedError
from graphwright.structure import Spec

PAST = "past_key_values"
_INPUT = re.compile(r"^\[1\]\['(\w+)'\](.*)$")


@dataclass(frozen=True)
class Convention:
    """What the model's ``forward`` takes, by name.

    Attributes:
        mask, positions: it takes ``attention_mask``, ``position_ids``.
        extra: what is passed besides, always the same.
        library: it is one of transformers' models, whose cache is a ``DynamicCache``.
    """

    mask: bool
    positions: bool
    extra: tuple[tuple[str, Any], ...] = ()
    library: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Convention:
        """Read it from the signature of ``forward``.

        Raises:
            UnsupportedError: an encoder and decoder, or a model without a cache of keys and values.
        """
        where = f"optimize_decoder({type(model).__name__})"
        names = inspect.signature(model.forward).parameters
        config = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in names:
            raise UnsupportedError("the model has an encoder and a decoder: there is no prompt that one cache continues", where=where,
                                   hint="gw.optimize(model.get_encoder(), inputs) optimizes its encoder, gw.optimize(model, inputs) one whole call.")  # fmt: skip
        if "input_ids" not in names:
            raise UnsupportedError("forward takes no input_ids", where=where, hint=_WANTED)
        if PAST not in names:
            raise UnsupportedError("the model has no cache of keys and values: forward takes no past_key_values", where=where, hint=_WANTED)
        if getattr(config, "is_decoder", True) is False and getattr(config, "model_type", None) in ("bert", "roberta"):
            raise UnsupportedError("the model is an encoder: its config says is_decoder=False", where=where,
                                   hint="Set config.is_decoder=True before it is built, or use gw.optimize(model, inputs).")  # fmt: skip
        library = sys.modules.get("transformers")
        ours = library is not None and isinstance(model, library.PreTrainedModel)
        extra: list[tuple[str, Any]] = [("use_cache", True)] if "use_cache" in names else []
        if "logits_to_keep" in names:  # logits of the last token: the rest of a prompt's would be thrown away
            extra.append(("logits_to_keep", 1))
        return cls("attention_mask" in names, "position_ids" in names, tuple(extra), ours)

    def call(self, ids: Tensor, mask: Tensor, positions: Tensor, past: Any) -> dict[str, Any]:
        """Keyword arguments of one call; ``past`` None: the first."""
        given: dict[str, Any] = {"input_ids": ids, **dict(self.extra)}
        if self.mask:
            given["attention_mask"] = mask
        if self.positions:
            given["position_ids"] = positions
        given[PAST] = self.empty() if past is None else past
        return given

    def empty(self) -> Any:
        """A cache that holds nothing: in transformers' models every layer keeps all tokens, and the masks do what a window asks."""
        return sys.modules["transformers"].DynamicCache() if self.library else None


_WANTED = ("It must take forward(input_ids, past_key_values=None, ...), past_key_values a tuple of (keys, values) per layer, each "
           "[batch, heads, tokens, size], and return (logits, past_key_values), or an object or dict with these two fields.")  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Where a program's flat inputs stand; ``cache`` in the order of their names."""

    ids: int
    mask: int | None
    positions: int | None
    cache: tuple[str, ...]
    places: tuple[int, ...]
    count: int

    @classmethod
    def of(cls, spec: Spec) -> Inputs:
        named: dict[str, int] = {}
        cache: dict[str, int] = {}
        paths = spec.paths()
        for k, path in enumerate(paths):
            found = _INPUT.match(path)
            if found is None:
                raise UnsupportedError(f"a program with the input {path} is none that decodes")
            name, rest = found.groups()
            (cache if name == PAST else named)[rest if name == PAST else name] = k
        names = tuple(sorted(cache))
        return cls(named["input_ids"], named.get("attention_mask"), named.get("position_ids"), names, tuple(cache[n] for n in names), len(paths))

    def leaves(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Sequence[Tensor]) -> list[Tensor]:
        """Flat inputs; ``cache`` in the order of ``Inputs.cache``."""
        found: list[Any] = [None] * self.count
        found[self.ids] = ids
        if self.mask is not None:
            found[self.mask] = mask
        if self.positions is not None:
            found[self.positions] = positions
        for place, tensor in zip(self.places, cache, strict=True):
            found[place] = tensor
        return found


@dataclass(frozen=True)
class Outputs:
    """Where logits and cache stand among a program's flat outputs; ``cache`` in the order of their names."""

    logits: int
    cache: tuple[str, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, spec: Spec) -> Outputs:
        """Raises UnsupportedError where there are no logits, or no cache."""
        logits, cache = None, {}
        for k, path in enumerate(spec.paths()):
            if path in (".logits", "['logits']", "[0]"):
                logits = k
                continue
            for start in (f".{PAST}", f"['{PAST}']", "[1]"):
                if path.startswith(start):
                    cache[path.removeprefix(start)] = k
                    break
        if logits is None or not cache:
            raise UnsupportedError(f"the model returns {spec.describe()}, in which {'logits' if logits is None else 'past_key_values'} can't be found",
                                   where="optimize_decoder", hint=_WANTED)  # fmt: skip
        names = tuple(sorted(cache))
        return cls(logits, names, tuple(cache[n] for n in names))


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts, each row padded on the left to one length.

    Attributes:
        ids: ``i64[batch, length]``.
        mask: ``i64[batch, length]``, 1 where a token stands, 0 where there is padding.
        padded: any row has padding.
    """

    ids: Tensor
    mask: Tensor
    padded: bool

    @property
    def positions(self) -> Tensor:
        """``i64[batch, length]``: the first token of each row stands at 0."""
        return (self.mask.cumsum(-1) - 1).clamp_(min=0)

    @classmethod
    def of(cls, given: Any, mask: Any = None, where: str = "generate") -> Prompt:
        """From token numbers, or from a mapping with ``input_ids`` and perhaps ``attention_mask``, as tokenizers give it.

        Raises:
            InputError: they are no token numbers, empty, or padded elsewhere than on the left.
        """
        if isinstance(given, Mapping):
            unknown = [k for k in given if k not in ("input_ids", "attention_mask", "token_type_ids")]
            if unknown or "input_ids" not in given:
                raise InputError(f"the prompt has the entries {', '.join(map(str, given))}", where=where, hint="input_ids and attention_mask are taken.")
            mask = given.get("attention_mask") if mask is None else mask
            given = given["input_ids"]
        if not isinstance(given, Tensor) or given.ndim != 2 or given.dtype not in (torch.int64, torch.int32):
            what = f"{given.dtype} of shape {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise InputError(f"input_ids is {what}", where=where, hint="Pass token numbers, an int64 tensor [batch, length]; for one prompt, ids.unsqueeze(0).")
        if not given.numel():
            raise InputError(f"the prompt is empty: shape {list(given.shape)}", where=where, hint="Give every row at least one token, a begin-of-text token for instance.")
        ids = given.detach().long()
        if mask is None:
            return cls(ids, torch.ones_like(ids), False)
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            what = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"attention_mask is {what}, input_ids of shape {list(ids.shape)}", where=where, hint="Give both the same shape.")
        mask = mask.detach().long()
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError("attention_mask holds other values than 0 and 1", where=where)
        if not bool(mask[:, -1].all()) or not bool((mask.diff(dim=1) >= 0).all()):
            raise InputError("the prompts are not padded on the left: a row's mask must be zeros, then ones", where=where,
                             hint='Pad on the left (tokenizer.padding_side = "left"): the next token follows the last column.')  # fmt: skip
        return cls(ids, mask, not bool(mask.all()))


def split_output(output: Any) -> tuple[Tensor, Any]:
    """Logits and cache of what a model returned.

    Raises:
        UnsupportedError: there are none.
    """
    if isinstance(output, tuple) and not hasattr(output, "logits") and len(output) >= 2:
        logits, past = output[:2]
    elif isinstance(output, Mapping):
        logits, past = output.get("logits"), output.get(PAST)
    else:
        logits, past = getattr(output, "logits", None), getattr(output, PAST, None)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or past is None:
        raise UnsupportedError(f"the model returned {type(output).__name__} without logits [batch, tokens, vocabulary] and past_key_values",
                               where="optimize_decoder", hint=_WANTED)  # fmt: skip
    return logits, past
