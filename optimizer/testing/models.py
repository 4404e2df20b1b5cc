"""Small programs on which passes are tried: what models are made of, and random graphs of it."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphwright.errors import InputError
from graphwright.ir import Program


class Function(nn.Module):
    """A function of the model and tensors as a model; the modules it uses are its parts."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def program_of(model: nn.Module, args: tuple[Tensor, ...], dynamic: Any = None) -> Program:
    """A model captured in eval mode, with its inputs as the example.

    Raises:
        InputError: it can't be captured whole.
    """
    from graphwright.capture import capture

    found = capture(model.eval(), args, {}, dynamic=dynamic)
    if found.program is None:
        raise InputError("this model cannot be captured whole", where="check_pass", hint="Pass one that can, or a Program.")
    found.program.example = args
    return found.program


class Attention(nn.Module):
    """Attention written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1) @ v
        return x + self.out(y.transpose(1, 2).flatten(2))


class Counting(nn.Module):
    """Writes into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


class Tied(nn.Module):
    """One table read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(F.gelu(self.table(ids)), self.table.weight)


def _fixed() -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...], Any]]:
    image, rows = torch.randn(2, 3, 9, 9), torch.randn(2, 5, 8)
    yield "convolutions", nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.SiLU(),
                                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), (image,), None  # fmt: skip
    yield "perceptron", nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(), nn.Linear(16, 8), nn.LayerNorm(8)), (rows,), None
    yield "attention", Attention(), (rows,), None
    yield "any batch", nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), (rows,), {"input": {0: "batch"}}
    yield "a buffer", Counting(), (rows,), None
    yield "a table", Tied(), (torch.randint(0, 11, (2, 5)),), None
    yield "no ops", nn.Identity(), (rows,), None
    yield "two results", Function(lambda m, x: (x.relu() * x.relu(), {"sum": x.sum(-1), "largest": x.argmax(-1)})), (rows,), None
    yield "bfloat16", nn.Sequential(nn.Linear(8, 8), nn.ReLU()).bfloat16(), (rows.bfloat16(),), None
    yield "float64", nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double(), (rows.double(),), None
    yield "nothing in it", nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (torch.randn(0, 8),), None
    yield "odd values", Function(lambda m, x: torch.softmax(x, -1).masked_fill(x > 1, float("-inf"))), (rows,), None


_UNARY = (torch.relu, torch.tanh, torch.sigmoid, F.gelu, F.silu, torch.abs, lambda x: x * 0.5, lambda x: x + 1.0, lambda x: x.transpose(0, 1).transpose(0, 1),
          lambda x: x.reshape(-1, x.shape[-1]).view(x.shape), lambda x: x - x.mean(-1, keepdim=True), lambda x: torch.softmax(x, -1), lambda x: x.square(),
          lambda x: x.clamp(-1, 1), lambda x: torch.cat([x[..., 4:], x[..., :4]], -1))  # fmt: skip
_BINARY = (torch.add, torch.mul, torch.sub, torch.maximum, lambda x, y: x / (1 + y.abs()))
_PARTS = (lambda: nn.Linear(8, 8), lambda: nn.Linear(8, 8, bias=False), lambda: nn.LayerNorm(8), nn.Dropout, nn.Identity)


class Random(nn.Module):
    """Steps drawn at random over ``[3, 5, 8]``; values are read more than once, some by nothing, several are results."""

    def __init__(self, rng: random.Random):
        super().__init__()
        self.steps: list[tuple[Any, tuple[int, ...]]] = []
        self.parts = nn.ModuleList()
        for k in range(rng.randint(2, 10)):
            pick = lambda k=k: rng.choice((k, k, k, rng.randint(0, k)))
            kind = rng.random()
            if kind < 0.35:
                reused = len(self.parts) and rng.random() < 0.2
                if not reused:
                    self.parts.append(rng.choice(_PARTS)())
                self.steps.append((rng.randrange(len(self.parts)) if reused else len(self.parts) - 1, (pick(),)))
            else:
                self.steps.append((rng.choice(_UNARY), (pick(),)) if kind < 0.75 else (rng.choice(_BINARY), (pick(), pick())))
        self.results = sorted({len(self.steps), rng.randint(0, len(self.steps))})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for step, reads in self.steps:
            call = self.parts[step] if isinstance(step, int) else step
            values.append(call(*(values[r] for r in reads)))
        return tuple(values[k] for k in self.results)


@functools.cache
def programs(seed: int = 0, drawn: int = 12) -> dict[str, Program]:
    """The built-in programs by name, and ``drawn`` random ones."""
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, model, args, dynamic in _fixed():
            found[name] = program_of(model, args, dynamic)
        for k in range(drawn):
            found[f"random {seed}.{k}"] = program_of(Random(random.Random(f"{seed}.{k}")), (torch.randn(3, 5, 8),))
    return found
