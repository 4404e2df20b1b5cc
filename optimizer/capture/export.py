"""Running torch.export on a user's model: flat tensors in, flat tensors out, the model left as it was."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graphwright import ir
from graphwright.capture.build import Builder, leaf_names
from graphwright.structure import Spec, flatten


class Flat(nn.Module):
    """The user's model behind a flat signature.

    Args:
        saw: told the structure of the outputs at each call (torch.export puts attributes back after tracing).
    """

    def __init__(self, model: nn.Module, inputs: Spec, saw: Callable[[Spec], None]):
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.saw = saw
        self.training = model.training

    def forward(self, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = self.inputs.unflatten(leaves)
        tensors, outputs = flatten(self.model(*args, **kwargs), name="output")
        self.saw(outputs)
        return tuple(tensors)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the model inside without leaving a trace: buffers, plain attributes and the random state come back."""
    buffers = [(b, b.detach().clone(), b._version) for b in model.buffers()]
    state = [(m, dict(m.__dict__), dict(m._buffers), dict(m._parameters)) for m in model.modules()]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            for buffer, kept, version in buffers:
                if buffer._version != version:
                    with torch.no_grad():
                        buffer.copy_(kept)
            for module, attributes, held, parameters in state:
                inner = {k: module.__dict__[k] for k in ("_buffers", "_parameters", "_modules") if k in module.__dict__}
                module.__dict__.clear()
                module.__dict__.update(attributes)
                module.__dict__.update(inner)
                module._buffers.update(held)
                module._parameters.update(parameters)


@contextmanager
def tracing() -> Iterator[None]:
    """What torch.export wants round it: gradients on, fused inference paths of torch.nn off, its warnings silent."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def export(model: nn.Module, leaves: Sequence[torch.Tensor], inputs: Spec, sizes: Sequence[Mapping[int, Any]] | None = None,
           ) -> ir.Program:  # fmt: skip
    """Capture the whole model through torch.export.

    Args:
        leaves: example tensors, in the order of ``inputs``.
        sizes: for each leaf, ``torch.export.Dim`` s by dimension; None: all sizes fixed.

    Raises:
        Exception: whatever torch.export or the building of the program refuses with.
    """
    outputs: list[Spec] = []
    wrapper = Flat(model, inputs, outputs.append)
    shapes = None if sizes is None else {"leaves": tuple(dict(s) for s in sizes)}
    with untouched(model), tracing():
        exported = torch.export.export(wrapper, tuple(leaves), dynamic_shapes=shapes, strict=False)
    names = leaf_names(inputs.paths(), positional_names(model))
    return Builder(exported, model, names).build(ir.Signature(inputs=inputs, outputs=outputs[-1]))


def positional_names(model: nn.Module) -> list[str]:
    """Names of ``forward``'s positional parameters."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
