"""``gw.explain``: what capture, the passes and the choice of kernels would make of a model, without optimizing or timing it."""

from __future__ import annotations

import linecache
import operator
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphwright import backends
from graphwright.accelerator import device_of, random_devices
from graphwright.api import arguments, feed_pieces, reached
from graphwright.backends.base import Slot, Work
from graphwright.calibrate import Calibration, collect
from graphwright.capture import Capture, capture
from graphwright.errors import InputError, PassError
from graphwright.ir import Program, describe, sites_of
from graphwright.lower.graph import analyse
from graphwright.manager import Pass, PassRecord, Pipeline, check_patterns, narrowed
from graphwright.ops import CONTRACTION, VIEW
from graphwright.optimized import WORKING, Optimized
from graphwright.passes.pipeline import precisions, resolve
from graphwright.report.explanation import Explanation, OpRow, Refused
from graphwright.reporting import merged
from graphwright.structure import flatten_call


def explain(
    model: nn.Module,
    example_inputs: Any,
    recipe: str | Pass | Sequence[str | Pass] = "default",
    *,
    dynamic: Any = None,
    calibration: Iterable[Any] | Calibration | None = None,
    site: str | None = None,
) -> Explanation:
    """What ``optimize`` would do with a model and why not more, without timing a kernel or building a result.

    The model is captured, and the passes run with their numbers checked. A recipe that needs calibration data takes the
    example's ranges where none are given, which says where it would fire, not how well.

    Args:
        example_inputs: a Tensor, a tuple (positional) or a dict (keyword).
        dynamic: as for ``optimize``.
        site: tell of the sites that match this ``fnmatch`` pattern only; the same as ``explanation[site]``.

    Raises:
        InputError, RecipeError, SiteError, CalibrationError: an argument is unusable.
        PassError: a pass broke the program; ``gw.bisect`` finds the site.
    """
    if not isinstance(model, nn.Module) or isinstance(model, Optimized):
        hint = "It has been optimized already: print(fast.explain()) tells its story." if isinstance(model, Optimized) else None
        raise InputError(f"model is a {type(model).__name__}, the original nn.Module is wanted", where="explain(model=...)", hint=hint)
    if example_inputs is None:
        raise InputError("example inputs are missing", where="explain(example_inputs=...)", hint="Pass them as for optimize: a tensor, a tuple or a dict.")
    passes = resolve(recipe)
    name = recipe if isinstance(recipe, str) else ", ".join(p.name for p in passes)
    args, kwargs = arguments(example_inputs)
    leaves, spec = flatten_call(args, kwargs)
    with WORKING, torch.random.fork_rng(devices=random_devices()):
        torch.manual_seed(0)
        found = capture(model, args, kwargs, dynamic=dynamic)
        notes = list(found.notes)
        wanting = calibration is None and any(getattr(p, "needs_calibration", False) for p in passes)
        if wanting:
            notes.append("no calibration data were given: ranges come from the example alone")
        if found.program is not None:
            program = found.program
            program.example = tuple(x.detach() for x in leaves)
            if calibration is not None:
                program.calibration = collect(calibration, program.signature.inputs, program)
            programs = [program]
        else:
            feed_pieces(found, spec, leaves, calibration)
            programs = [slot.program for slot in reached(found)]
        for program in programs:
            if wanting and program.example is not None:
                program.calibration = (program.example,)
        story = _Story(passes, notes)
        story.run(programs)
    whole = found.program is not None
    told = Explanation(type(model).__name__, name, whole, _refused(found), tuple(p.site for p in found.pieces),
                       sum(len(p.nodes) for p in programs), len(story.ops), tuple(story.records.values()), tuple(story.ops),
                       tuple(dict.fromkeys(story.sites)), tuple(dict.fromkeys(story.notes)))  # fmt: skip
    return told if site is None else told[site]


class _Story:
    """What the passes did and what is left, over one program or several pieces."""

    def __init__(self, passes: Sequence[Pass], notes: list[str]):
        self.passes, self.notes = passes, notes
        self.records: dict[str, PassRecord] = {}
        self.ops: list[OpRow] = []
        self.sites: list[str] = []

    def run(self, programs: Sequence[Program]) -> None:
        if programs:
            check_patterns(self.passes, *programs)
        allowed = precisions(self.passes) | {"f32"}
        kinds = dict.fromkeys(device_of(p).type for p in programs)
        self.notes += [f"{name}: {why}" for kind in kinds for name, why in backends.reasons(kind).items()]
        for program in programs:
            self.sites += program.sites()
            passes = self.passes if len(programs) == 1 else narrowed(self.passes, program)
            try:
                after, records = Pipeline(tuple(passes)).run(program)
            except PassError as error:
                raise PassError(f"{error.what} (gw.bisect finds the site and makes a small program of it)", where=error.where,
                                hint=error.hint) from error  # fmt: skip
            for k, r in enumerate(records):
                key = r.name if len(programs) > 1 else f"{k} {r.name}"  # a recipe may hold a pass twice
                self.records[key] = merged(self.records[key], r) if key in self.records else r
            self.sites += [s for r in records for s, _ in (*r.result.changes, *r.result.refusals)]
            self.ops += [row_of(w, frozenset(allowed)) for w in analyse(after).works]
        self.sites += [s for row in self.ops for s in row.sites]


def row_of(work: Work, allowed: frozenset[str]) -> OpRow:
    """One op with the kernels that could do it; none is built."""
    names = tuple(c.name for c in backends.offered(work, allowed) if c.name != "aten.native" and c.timed)
    opaque = isinstance(work.target, torch._ops.OpOverload) and work.row is None
    trace = work.node.meta.get("trace")
    return OpRow(sites_of(work.node) or (work.node.name,), work.op, describe(work.out), str(trace) if trace else None, opaque, names,
                 None if names else _alone(work, opaque))  # fmt: skip


def _alone(work: Work, opaque: bool) -> str:
    """Why only the op's own kernel can do a work."""
    if opaque:
        return "no row in the op table: it runs as it is, and passes leave it alone"
    if work.target is operator.getitem or work.has(VIEW):
        return "it computes nothing"
    if not isinstance(work.target, torch._ops.OpOverload):
        return "arithmetic on sizes"
    if not isinstance(work.out, Tensor):
        return "it gives several values, or none"
    if not work.is_float:
        floats = "float32 and half precision" if work.device == "cuda" else "float32"
        return f"it gives {describe(work.out).partition('[')[0]}: kernels are for {floats}"
    if work.has(CONTRACTION) and isinstance(work.named.get("weight"), Slot):
        return "its weight is computed: only constants are packed"
    return "no backend offers a kernel for it"


def _refused(found: Capture) -> tuple[Refused, ...]:
    return tuple(Refused(r.site, r.where, source_line(r.where), r.reason) for r in found.regions)


def source_line(where: str | None) -> str | None:
    """The text of ``file.py:12``; the file is looked for where modules are."""
    file, _, number = (where or "").rpartition(":")
    if not file or not number.isdigit():
        return None
    for root in ("", *sys.path):
        path = Path(root) / file
        if path.is_file():
            return linecache.getline(str(path), int(number)).strip() or None
    return None


