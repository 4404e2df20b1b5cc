"""Shapes of real models for the kernel benchmark, and shapes from a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from graphwright.errors import InputError


@dataclass(frozen=True)
class Shapes:
    """What the layers of a model look like, by kind.

    Attributes:
        linear: (rows, inputs, outputs).
        conv: (pictures, channels, height, width, output channels, window, stride); padded by half of the window.
        separable: the same of a convolution of each channel by itself, and the 1x1 one behind it that makes the output channels.
        rows: (rows, columns) of norms and activations.
        attention: (batch, heads, heads of keys, queries, width of a head, 1 where causal); as many keys as queries.
    """

    linear: tuple[tuple[int, ...], ...] = ()
    conv: tuple[tuple[int, ...], ...] = ()
    rows: tuple[tuple[int, ...], ...] = ()
    attention: tuple[tuple[int, ...], ...] = ()
    separable: tuple[tuple[int, ...], ...] = ()


_NUMBERS = {"linear": 3, "conv": 7, "rows": 2, "attention": 6, "separable": 7}

SETS = {
    # BERT-base on 8 texts of 128 tokens.
    "bert": Shapes(
        ((1024, 768, 2304), (1024, 768, 768), (1024, 768, 3072), (1024, 3072, 768), (128, 768, 768)), (),
        ((1024, 768), (1024, 3072)), ((8, 12, 12, 128, 64, 0),),
    ),
    # ViT-S/16 on one picture of 224x224.
    "vit": Shapes(((197, 384, 1152), (197, 384, 384), (197, 384, 1536), (197, 1536, 384)), (), ((197, 384), (197, 1536)), ((1, 6, 6, 197, 64, 0),)),
    # ResNet-50 on one picture of 224x224.
    "resnet": Shapes((), (
        (1, 3, 224, 224, 64, 7, 2), (1, 64, 56, 56, 64, 1, 1), (1, 64, 56, 56, 64, 3, 1), (1, 64, 56, 56, 256, 1, 1), (1, 256, 56, 56, 64, 1, 1),
        (1, 256, 56, 56, 128, 1, 1), (1, 128, 56, 56, 128, 3, 2), (1, 128, 28, 28, 512, 1, 1), (1, 512, 28, 28, 128, 1, 1), (1, 128, 28, 28, 128, 3, 1),
        (1, 512, 28, 28, 256, 1, 1), (1, 256, 28, 28, 256, 3, 2), (1, 256, 14, 14, 1024, 1, 1), (1, 1024, 14, 14, 256, 1, 1), (1, 256, 14, 14, 256, 3, 1),
        (1, 1024, 14, 14, 512, 1, 1), (1, 512, 14, 14, 512, 3, 2), (1, 512, 7, 7, 2048, 1, 1), (1, 2048, 7, 7, 512, 1, 1), (1, 512, 7, 7, 512, 3, 1),
    )),
    # MobileNet V1 on one picture of 224x224, and the second halves of MobileNet V2's blocks.
    "mobilenet": Shapes(separable=(
        (1, 32, 112, 112, 64, 3, 1), (1, 64, 112, 112, 128, 3, 2), (1, 128, 56, 56, 128, 3, 1), (1, 128, 56, 56, 256, 3, 2), (1, 256, 28, 28, 256, 3, 1),
        (1, 256, 28, 28, 512, 3, 2), (1, 512, 14, 14, 512, 3, 1), (1, 512, 14, 14, 1024, 3, 2), (1, 1024, 7, 7, 1024, 3, 1), (1, 96, 112, 112, 24, 3, 2),
        (1, 144, 56, 56, 24, 3, 1), (1, 144, 56, 56, 32, 3, 2), (1, 192, 28, 28, 32, 3, 1), (1, 384, 14, 14, 64, 3, 1), (1, 576, 14, 14, 96, 3, 1),
        (1, 960, 7, 7, 160, 3, 1),
    )),
    # A decoder of a billion parameters (Llama 3.2 1B): one token, sixteen, a prompt of 128.
    "llama": Shapes(
        tuple((m, k, n) for m in (1, 16, 128) for k, n in ((2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048))), (),
        ((1, 2048), (128, 2048), (128, 8192)), ((1, 32, 8, 128, 64, 1), (1, 32, 8, 1024, 64, 1)),
    ),
}  # fmt: skip


def shapes_of(name: str) -> Shapes:
    """A set by its name, or what a JSON file says: ``{"linear": [[1, 2048, 2048]], "conv": [...], "rows": [...], "attention": [...]}``.

    Raises:
        InputError: neither a set nor a readable file, an unknown kind, or numbers that are no shape.
    """
    if name in SETS:
        return SETS[name]
    path, hint = Path(name), f"Name one of {', '.join(SETS)}, or a JSON file such as {{\"linear\": [[1, 2048, 2048]]}}."
    try:
        held = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{name!r} is neither a set of shapes nor a file", where="--shapes", hint=hint) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{name} can't be read: {error}", where="--shapes", hint=hint) from None
    kinds = [f.name for f in fields(Shapes)]
    if not isinstance(held, dict) or set(held) - set(kinds):
        raise InputError(f"{name} must be an object with the keys {', '.join(kinds)}", where="--shapes", hint=hint)
    return Shapes(**{kind: tuple(_shape(kind, numbers, name) for numbers in several) for kind, several in held.items()})


def _shape(kind: str, numbers: object, name: str) -> tuple[int, ...]:
    right = isinstance(numbers, list) and len(numbers) == _NUMBERS[kind] and all(type(n) is int and n >= 0 for n in numbers)
    if not right:
        meaning = (Shapes.__doc__ or "").partition(f"{kind}: ")[2].partition("\n")[0]
        raise InputError(f"{numbers} under {kind!r} is no shape", where=name, hint=f"{kind}: {meaning}")
    assert isinstance(numbers, list)
    return tuple(numbers)
