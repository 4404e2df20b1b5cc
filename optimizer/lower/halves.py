"""What came of half precision: how many ops run in it, and what the conversions round them are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from graphwright.backends.base import HALF
from graphwright.ops import VIEW

if TYPE_CHECKING:
    from graphwright.lower import Choice
    from graphwright.lower.runner import Runner


def note(choices: Sequence[Choice], runner: Runner, allowed: Collection[str]) -> list[str]:
    """A line for the report where a recipe allows half precision: ops by precision, conversions of a call; or that float32 stays."""
    asked = [k for k in HALF if k in allowed]
    computing = [c for c in choices if c.work.row is not None and not c.work.has(VIEW)]
    could = [c for c in computing if any(c.work.node.meta.get("halves", dict.fromkeys(asked)).keys() & set(asked)) and len(c.options) > 1]
    if not asked or not could:
        return []
    taken = Counter(c.precision for c in computing if c.precision in HALF)
    if not taken:
        return [f"half precision: float32 measured faster at each of the {len(could)} ops that may run in {' or '.join(asked)}"]
    moved = Counter(name for s in runner.steps if (name := conversion(s.name)))
    casts = ", ".join(f"{count} × {name}" for name, count in sorted(moved.items())) or "none"
    ops = ", ".join(f"{taken[k]} ops in {k}" for k in HALF if taken[k])
    return [f"half precision: {ops}, of {len(could)} that may; conversions in a call: {casts} (weights were converted ahead)"]


def conversion(name: str) -> str | None:
    """``"native→bf16"`` of a step's name, where it converts to or from half precision."""
    word, _, told = name.partition(" ")
    kinds = {part.partition("/")[0] for part in told.split("→")}
    return told if word == "convert" and len(kinds) > 1 and kinds & HALF.keys() else None
