"""Capture: a user's model becomes a ``Program``.

    found = capture(model, (x,), {"mask": mask}, dynamic="auto")
    found.program, found.notes, found.regions
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from graphwright import ir
from graphwright.capture.guard import Guard, covers, key, weights_fingerprint
from graphwright.capture.rehearse import rehearse
from graphwright.capture.whole import Whole
from graphwright.structure import flatten_call

__all__ = ["Capture", "Guard", "Region", "capture", "covers", "key", "weights_fingerprint"]


@dataclass(frozen=True)
class Region:
    """A part of the model that could not be captured.

    Attributes:
        site: the module it lies in.
        where: the user's ``file:line``.
        reason: what stands in the way.
    """

    site: str
    where: str | None
    reason: str


@dataclass(eq=False)
class Capture:
    """What capturing gave.

    Attributes:
        program: the whole model, or None where it could not be captured as one.
        notes: lines for humans.
        regions: what was not captured.
    """

    program: ir.Program | None
    notes: list[str] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)


def capture(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *,
            dynamic: Any = None) -> Capture:  # fmt: skip
    """Capture a model on example inputs.

    Args:
        args, kwargs: the example call; only shapes, dtypes and structure matter, not the numbers.
        dynamic: which sizes may vary: None, ``"auto"``, or by input ``{"x": {0: "batch"}}``.

    Raises:
        InputError: the model itself rejects the inputs, or ``dynamic`` names what does not exist.
    """
    leaves, spec = flatten_call(args, kwargs or {})
    said = rehearse(model, leaves, spec)
    whole = Whole(model, leaves, spec, said, dynamic)
    program = whole.run()
    if program is None:
        raise whole.failure
    return Capture(program, whole.notes)
