"""ATen rows: tensors from nothing: constants, ranges, windows, random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright.ops.registry import LAYOUT_FREE, RANDOM, described, op


def _zero(args: Any, out: Any) -> int:
    return 0


def _create(
    name: str, body: Any, summary: str, overloads: Sequence[str] = ("default",), traits: Sequence[str] = ()
) -> None:
    op(f"aten.{name}", axes=None, traits=traits, flops=_zero, overloads=overloads)(described(body, summary))


def _where(options: dict[str, Any]) -> dict[str, Any]:
    """The options that a tensor is made with, without those that are not given."""
    found = {k: options[k] for k in ("dtype", "device") if options.get(k) is not None}
    return found | {"dtype": torch.int64} if isinstance(found.get("dtype"), int) else found  # a schema's own default


def _like(x: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    return {"dtype": x.dtype, "device": x.device, **_where(options)}


def _filled(size: Any, value: Any, options: dict[str, Any]) -> Tensor:
    return torch.full(list(size), value, **({"dtype": torch.get_default_dtype()} | _where(options)))


_create("zeros", lambda size, **o: _filled(size, 0, o), "Zeros.")
_create("ones", lambda size, **o: _filled(size, 1, o), "Ones.")
_create("full", lambda size, fill_value, **o: torch.full(list(size), fill_value, **_where(o)), "One number everywhere.")
_create("scalar_tensor", lambda s, **o: _filled([], s, o), "A number as a tensor.")
_create("new_zeros", lambda x, size, **o: _filled(size, 0, _like(x, o)), "Zeros of another tensor's kind.")
_create("new_ones", lambda x, size, **o: _filled(size, 1, _like(x, o)), "Ones of another tensor's kind.")
_create(
    "new_full",
    lambda x, size, value, **o: _filled(size, value, _like(x, o)),
    "One number everywhere, of another tensor's kind.",
)


def _strided_like(x: Tensor, value: Any, options: dict[str, Any]) -> Tensor:
    return torch.empty_like(x, memory_format=options.get("memory_format"), **_where(options)).fill_(value)


_create("zeros_like", lambda x, **o: _strided_like(x, 0, o), "Zeros in another tensor's shape.")
_create("ones_like", lambda x, **o: _strided_like(x, 1, o), "Ones in another tensor's shape.")
_create("full_like", lambda x, value, **o: _strided_like(x, value, o), "One number in another tensor's shape.")
_create(
    "fill",
    lambda x, value: torch.where(
        torch.zeros_like(x, dtype=torch.bool), x, torch.as_tensor(value, dtype=x.dtype, device=x.device)
    ),
    "One number in another tensor's shape.",
    ("Scalar", "Tensor"),
)
_create(
    "copy",
    lambda x, src, non_blocking=False: torch.broadcast_to(src, x.shape).to(x.dtype, copy=True),
    "src in the shape, dtype and layout of self.",
)


def _arange(start: Any, end: Any, step: Any, options: dict[str, Any]) -> Tensor:
    numbers = torch.arange(start, end, step, **_where(options))
    return numbers


_create("arange", lambda end, **o: _arange(0, end, 1, o), "0, 1, ... below end.")
_create("arange", lambda start, end, **o: _arange(start, end, 1, o), "start, start + 1, ... below end.", ("start",))
_create(
    "arange",
    lambda start, end, step=1, **o: _arange(start, end, step, o),
    "start, start + step, ... before end.",
    ("start_step",),
)


def _linspace(start: Any, end: Any, steps: int, **options: Any) -> Tensor:
    """So many numbers from start to end, equally far apart."""
    at = _arange(0, steps, 1, {**options, "dtype": torch.float64})
    numbers = start + at * ((end - start) / max(steps - 1, 1))
    return numbers.to(options.get("dtype") or torch.get_default_dtype())


op("aten.linspace", flops=_zero)(_linspace)


def _eye(n: Any, m: Any, options: dict[str, Any]) -> Tensor:
    row, column = (torch.arange(k, device=options.get("device")) for k in (n, m))
    return (row.unsqueeze(1) == column).to(options.get("dtype") or torch.get_default_dtype())


_create("eye", lambda n, **o: _eye(n, n, o), "Ones on the diagonal.")
_create("eye", lambda n, m, **o: _eye(n, m, o), "Ones on the diagonal.", ("m",))
_create("hann_window", lambda n, **o: _hann(n, True, o), "The Hann window, periodic.")
_create("hann_window", lambda n, periodic, **o: _hann(n, periodic, o), "The Hann window.", ("periodic",))


def _hann(size: int, periodic: bool, options: dict[str, Any]) -> Tensor:
    span = size if periodic else size - 1
    at = _arange(0, size, 1, {**options, "dtype": torch.float64}) / max(span, 1)
    return (0.5 - 0.5 * torch.cos(2 * math.pi * at)).to(options.get("dtype") or torch.get_default_dtype())


# -- memory as it comes, random numbers ------------------------------------------------------------------------------

_create(
    "empty",
    lambda size, *, memory_format=None, **o: torch.empty(list(size), **_where(o)),
    "Memory as it comes.",
    ("memory_format",),
    (RANDOM,),
)
_create(
    "new_empty",
    lambda x, size, **o: torch.empty(list(size), **_like(x, o)),
    "Memory as it comes, of another tensor's kind.",
    traits=(RANDOM,),
)
_create(
    "empty_like",
    lambda x, **o: torch.empty_like(x, memory_format=o.get("memory_format"), **_where(o)),
    "Memory in another tensor's shape.",
    traits=(RANDOM,),
)
_create(
    "rand", lambda size, **o: torch.rand(list(size), **_where(o)), "Uniform random numbers below 1.", traits=(RANDOM,)
)
_create("randn", lambda size, **o: torch.randn(list(size), **_where(o)), "Normal random numbers.", traits=(RANDOM,))
_create(
    "rand_like",
    lambda x, **o: torch.rand_like(x, **_where(o)),
    "Uniform random numbers in another tensor's shape.",
    traits=(RANDOM, LAYOUT_FREE),
)
_create(
    "randn_like",
    lambda x, **o: torch.randn_like(x, **_where(o)),
    "Normal random numbers in another tensor's shape.",
    traits=(RANDOM, LAYOUT_FREE),
)
_create(
    "randint",
    lambda high, size, **o: torch.randint(high, list(size), **({"dtype": torch.int64} | _where(o))),
    "Random integers below high.",
    traits=(RANDOM,),
)
_create(
    "randint",
    lambda low, high, size, **o: torch.randint(low, high, list(size), **({"dtype": torch.int64} | _where(o))),
    "Random integers from low, below high.",
    ("low",),
    (RANDOM,),
)
_create(
    "bernoulli",
    lambda x, *, generator=None: torch.bernoulli(x, generator=generator),
    "1 with probability x, else 0.",
    traits=(RANDOM,),
)
_create(
    "multinomial",
    lambda x, n, replacement=False, *, generator=None: torch.multinomial(x, n, replacement, generator=generator),
    "Indices drawn with the probabilities x.",
    traits=(RANDOM,),
)
