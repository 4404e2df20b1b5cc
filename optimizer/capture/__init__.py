"""Capture: a user's model becomes a ``Program``.

    found = capture(model, (x,), {"mask": mask}, dynamic="auto")
    found.program, found.notes, found.regions
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin

from graphwright import ir
from graphwright.capture.guard import Guard, covers, key, weights_fingerprint
from graphwright.capture.regions import Piece, Region, Regions
from graphwright.capture.rehearse import Rehearsal, rehearse
from graphwright.capture.whole import Whole
from graphwright.errors import CoverageError, InputError
from graphwright.structure import Spec, flatten_call

__all__ = ["Capture", "Guard", "Piece", "Region", "capture", "covers", "key", "weights_fingerprint"]


@dataclass(eq=False)
class Capture:
    """What capturing gave.

    Attributes:
        program: the whole model, or None where it could not be captured as one.
        notes: lines for humans.
        regions: what was not captured, and why; empty where there is a program.
        pieces: the submodules that were captured instead.
        run: called like the model, with its answers: the pieces, and between them the model's own code.
    """

    program: ir.Program | None
    notes: list[str] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    run: nn.Module | None = None


def capture(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *,
            dynamic: Any = None, storage: dict[int, torch.UntypedStorage] | None = None) -> Capture:  # fmt: skip
    """Capture a model on example inputs.

    Args:
        args, kwargs: the example call; only shapes, dtypes and structure matter, not the numbers.
        dynamic: which sizes may vary: None, ``"auto"``, or by input ``{"x": {0: "batch"}}``.

        storage: pass one dict to several captures of one model and their programs share weights; a new dict
            once the model's weights have changed.

    Raises:
        InputError: the model itself rejects the inputs, or ``dynamic`` names what does not exist.
    """
    model = getattr(model, "_orig_mod", model)  # behind torch.compile stands the model itself
    if any(isinstance(t, UninitializedTensorMixin) for t in [*model.parameters(), *model.buffers()]):
        raise InputError("the model has parameters without a shape yet (lazy modules)",
                         hint="Call the model once on an example first.")  # fmt: skip
    with torch.inference_mode(False):  # its tensors cannot be traced
        leaves, spec = flatten_call(args, kwargs or {})
        tensors = [*leaves, *model.parameters(), *model.buffers()]
        if tensors and all(t.is_meta for t in tensors):
            raise InputError("model and inputs are on device meta, where tensors hold no numbers",
                             hint="Load the weights first (model.to_empty(device='cpu'), then load_state_dict).")  # fmt: skip
        leaves = [t.clone() if t.is_inference() else t for t in leaves]
        return _capture(model, leaves, spec, dynamic, {} if storage is None else storage)


def _capture(model: nn.Module, leaves: list[torch.Tensor], spec: Spec, dynamic: Any,
             storage: dict[int, torch.UntypedStorage]) -> Capture:  # fmt: skip
    said = rehearse(model, leaves, spec)
    notes = observations(model, said)
    program, failure = None, None
    if said.refusal is not None:
        failure = InputError(said.refusal)
    else:
        whole = Whole(model, leaves, spec, said, dynamic, storage=storage)
        program, failure = whole.run(), whole.failure
        notes += whole.notes
    if program is not None:
        return Capture(program, notes, run=_Whole(program))
    found = Regions(model, leaves, spec, said, failure, dynamic, storage).run()
    return Capture(None, notes + found.notes, found.regions, found.pieces, found.run)


class _Whole(nn.Module):
    """A program, called like the model."""

    def __init__(self, program: ir.Program):
        super().__init__()
        self.program = program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = flatten_call(args, kwargs)
        signature = self.program.signature
        if spec != signature.inputs:
            raise CoverageError(f"inputs {spec.describe()}; covered: {signature.inputs.describe()}")
        return signature.outputs.unflatten(self.program(*leaves))


def observations(model: nn.Module, said: Rehearsal) -> list[str]:
    """What a user should know about how the model was captured."""
    notes = []
    if model.training:
        notes.append("the model is in train mode and is captured so; call model.eval() first for inference")
    elif any(m.training for m in model.modules()):
        notes.append("parts of the model are in train mode although the model is not")
    hooked = [n or "the model" for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    if hooked:
        shown = ", ".join(hooked[:3]) + (f" and {len(hooked) - 3} more" if len(hooked) > 3 else "")
        notes.append(f"forward hooks on {shown} ran while the model was captured: what they compute is part of the "
                     "result, their side effects are not")  # fmt: skip
    if said.fused_differs:
        notes.append("torch.nn's fused attention answers otherwise (padded positions become 0) when gradients are off: "
                     "what is captured is what the model computes with gradients on")  # fmt: skip
    if said.attributes:
        notes.append(f"the model sets {', '.join(said.attributes[:3])} while it runs: the optimized model does not")
    return notes
