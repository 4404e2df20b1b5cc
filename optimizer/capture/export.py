"""Running torch.export on a user's model: flat tensors in, flat tensors out, the model left as it was."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from graphwright import ir
from graphwright.capture.build import Builder
from graphwright.capture.dynamic import Inexpressible, Plan, spans
from graphwright.capture.rehearse import ambient_autocast, plain_attention, untouched
from graphwright.errors import CaptureError
from graphwright.structure import Spec, flatten


class Flat(nn.Module):
    """The user's model behind a flat signature.

    Args:
        saw: told the structure of the outputs at each call (torch.export puts attributes back after tracing).
        plan: sizes that may vary, and how they relate.
        autocast: (device type, dtype) of the autocast regions that the caller stood in.
    """

    def __init__(self, model: nn.Module, inputs: Spec, saw: Callable[[Spec], None], plan: Plan,
                 autocast: Sequence[tuple[str, torch.dtype]]):  # fmt: skip
        super().__init__()
        self.model = model
        self.inputs, self.saw, self.plan, self.autocast = inputs, saw, plan, tuple(autocast)
        self.training = model.training

    def forward(self, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.plan.relate(leaves)
        args, kwargs = self.inputs.unflatten(leaves)
        with ExitStack() as stack:
            for device, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype))
            if self.plan.groups:
                stack.enter_context(_Legible())
            with writing_assigned_buffers(self.model):
                answer = self.model(*args, **kwargs)
        tensors, outputs = flatten(answer, name="output")
        self.saw(outputs)
        return tuple(tensors)


class _Legible(TorchFunctionMode):
    """Ends a trace whose sizes become long expressions: each op then takes seconds, and the guards can be told to nobody."""

    LIMIT = 32

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for size in out.shape if isinstance(out, torch.Tensor) else ():
            if isinstance(size, torch.SymInt) and size.node.expr.count_ops() > self.LIMIT:
                raise Inexpressible(f"what {getattr(func, '__name__', func)} gives has a size of {size.node.expr.count_ops()} operations on the inputs' sizes")
        return out


@contextmanager
def writing_assigned_buffers(model: nn.Module) -> Iterator[None]:
    """Turn ``self.buffer = new`` into a write to the buffer: torch.export sees that in the outermost module alone.

    Raises:
        CaptureError: a buffer is replaced by one of another shape or dtype.
    """
    before = [(n, m, k, b) for n, m in model.named_modules() for k, b in m._buffers.items() if b is not None]
    yield
    for name, module, leaf, old in before:
        new = module._buffers.get(leaf)
        if new is old:
            continue
        if new is None or new.shape != old.shape or new.dtype != old.dtype:
            raise CaptureError("the model replaces a buffer by one of another shape or dtype",
                               where=f"{name}.{leaf}".lstrip("."))  # fmt: skip
        module._buffers[leaf] = old
        with torch.no_grad():
            old.copy_(new)


@contextmanager
def tracing() -> Iterator[None]:
    """What torch.export wants round it: gradients on, its warnings and log lines silent."""
    loggers = [logging.getLogger(n) for n in ("torch.export", "torch._export", "torch._subclasses", "torch.fx", "torch._dynamo", "torch.fx.experimental")]
    levels = [(log, log.level) for log in loggers]
    try:
        with torch.enable_grad(), plain_attention(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for log in loggers:
                log.setLevel(logging.CRITICAL)
            with redirect_stderr(io.StringIO()):  # it prints the graph it had when it failed
                yield
    finally:
        for log, level in levels:
            log.setLevel(level)


def export(model: nn.Module, leaves: Sequence[torch.Tensor], inputs: Spec, names: Sequence[str],
           plan: Plan | None = None, prefix: str = "",
           storage: dict[int, torch.UntypedStorage] | None = None) -> ir.Program:  # fmt: skip
    """Capture the whole model through torch.export.

    Args:
        leaves: example tensors, in the order of ``inputs``.
        names: of the leaves.
        plan: sizes that may vary; None: all are fixed.
        prefix, storage: see ``Builder``.

    Raises:
        Exception: whatever torch.export or the building of the program refuses with.
    """
    plan = plan or Plan()
    shapes = {"leaves": tuple(plan.dims(len(leaves)))} if plan.groups else None
    outputs: list[Spec] = []
    with ambient_autocast() as autocast, untouched(model), tracing():
        wrapper = Flat(model, inputs, outputs.append, plan, autocast)
        exported = torch.export.export(wrapper, tuple(leaves), dynamic_shapes=shapes, strict=False)
        program = Builder(exported, model, names, prefix, storage).build(ir.Signature(inputs=inputs, outputs=outputs[-1]))
    symbols = spans(program.placeholders, plan.groups)
    program.signature = replace(program.signature, symbols=symbols)
    return program


def positional_names(model: nn.Module) -> list[str]:
    """Names of ``forward``'s positional parameters."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
