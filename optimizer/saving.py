"""From a result to what a file holds, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphwright import accelerator, store
from graphwright.backends.base import HALF
from graphwright.capture import Capture, Guard
from graphwright.capture.regions import Piece, Twin
from graphwright.capture.regions import Variant as Slot
from graphwright.capture.rehearse import clone_tensor
from graphwright.errors import LoadError
from graphwright.ir import Program, op_name
from graphwright.kernel_registry import RESERVED, registered
from graphwright.kernels import ahead
from graphwright.lower import Lowered, economy, lower, restored
from graphwright.optimized import Optimized, Variant
from graphwright.report import Report
from graphwright.search import Built
from graphwright.structure import Output


def archive_of(fast: Optimized) -> store.Archive:
    """Programs, plans and report; attributes that are plain data (a ``.config``) as such."""
    variants = []
    for v in fast._variants:
        assert v.built is not None
        shapes = [[list(map(int, x.shape)), str(x.dtype)] for x in (v.built.captured.example or ())]
        plan = {"kernels": v.built.lowered.plan, "regions": v.built.lowered.regions, "sequence": v.built.lowered.sequence, "unchanged": v.built.unchanged}
        variants.append(store.Variant(v.built.running, plan, shapes))
    attributes = {k: _plain(v) for k, v in fast._attributes.items()}
    meta = {"report": fast.report.to_dict(), "attributes": {k: v for k, v in attributes.items() if v is not None},
            "threads": torch.get_num_threads(), "torch": torch.__version__}  # fmt: skip
    if (cuda := accelerator.of(fast._home())) is not None:
        meta["gpu"] = cuda.facts
    return store.Archive(variants, meta)


def restore(path: str | Path) -> Any:
    """See ``graphwright.load``."""
    archive = store.load(path)
    if "report" not in archive.meta:
        raise LoadError(f"{path} holds no optimized model", hint="It is a fault cut out by gw.bisect: gw.load_repro(path) reads it." if "repro" in archive.meta else None)
    ahead.start(*_wanted(archive))
    _register(archive)
    if "decoder" in archive.meta:
        from graphwright.decode.storing import restored

        return restored(archive)
    return rebuilt(archive.variants, archive.meta)


def rebuilt(variants: Sequence[store.Variant], meta: Mapping[str, Any]) -> Optimized:
    """One result from its programs and what its file says about them."""
    fast = Optimized(None, None, {k: _object(v) for k, v in meta.get("attributes", {}).items()})
    report = Report.from_dict(meta["report"])
    for v in variants:
        lowered = _lowered(v.program, v.plan["kernels"], v.plan.get("regions", []), v.plan.get("sequence"))
        report.warnings.extend(n for n in lowered.notes if n not in report.warnings)
        built = Built(v.program, v.program, [], lowered, unchanged=v.plan["unchanged"])
        fast._variants.append(Variant(v.program.signature.inputs, Capture(v.program), built, Guard(v.program)))
    if (gpu := meta.get("gpu")) and (here := accelerator.of(fast._home())) is not None and here.facts["gpu"] != gpu["gpu"]:
        report.warnings.append(f"its kernels were chosen on {gpu['gpu']} and run on {here.facts['gpu']}: optimize it here to have them chosen here")
    fast.__dict__["_report"] = report
    return fast


def _wanted(archive: store.Archive) -> tuple[set[str], bool]:
    """Ops whose kernels the plans name, with the activations they fuse, and whether any is int8."""
    plans = [(n, v.plan["kernels"].get(n.name, "")) for v in archive.variants for n in v.program.nodes]
    ours = [(n, kernel) for n, kernel in plans if kernel.startswith("llvm.")]
    names = {op_name(n.target) for n, _ in ours} | {a for n, _ in ours for a in n.args if isinstance(a, str)}
    return names, any("int8" in kernel or kernel.endswith("-q") for _, kernel in ours)


def _register(archive: store.Archive) -> None:
    """Load installed plug-ins where a plan names a kernel that is not Graphwright's and not registered yet."""
    named = {kernel for v in archive.variants for kernel in v.plan["kernels"].values() if kernel.partition(".")[0] not in RESERVED}
    if named - {k.label for k in registered()}:
        from graphwright.passes.pipeline import load_plugins

        load_plugins()


def _lowered(program: Program, kernels: dict[str, str], saved: list[dict[str, Any]], sequence: list[int] | None) -> Lowered:
    """The program under a plan: nothing is timed."""
    return economy.restored(restored.restored(lower(program, allowed=("f32", *HALF, "int8"), plan=kernels), saved), sequence)


def twin(fast: Optimized) -> Optimized:
    """A result of its own: tensors are copied, kernels are put together again from the same plan."""
    model = fast._model() if fast._model is not None else None
    other = Optimized(None, model, copy.deepcopy(fast._attributes))
    other.__dict__["_marks"] = fast._marks
    copies: dict[int, torch.UntypedStorage] = {}  # one for all programs: what one writes, the others go on from
    for v in fast._variants:
        if v.built is not None:
            other._variants.append(Variant(v.spec, v.capture, _rebuilt(v.built, copies), v.guard, fixed=v.fixed))
        else:
            other._variants.append(_Pieces(v, copies).made)
    other.__dict__["_report"] = copy.deepcopy(fast._report)
    if fast._compile is not None:
        other.__dict__["_compile"] = fast._compile.__self__.twin(other, copies).again  # type: ignore[attr-defined]
    return other


class _Pieces(Twin):
    """Copies a variant in pieces: the modules between them, and each piece with what was built for it."""

    def __init__(self, variant: Variant, copies: dict[int, torch.UntypedStorage]):
        super().__init__({}, copies)
        self.built = {id(slot.program): part for part in variant.parts for slot in _slots(variant) if slot.run is part.lowered.runner}
        self.parts: list[Built] = []
        assert isinstance(variant.pieces, nn.Module)
        root = self.of(variant.pieces)
        capture = replace(variant.capture, run=root, pieces=self.pieces)
        self.made = Variant(variant.spec, capture, None, variant.guard, root, self.parts, variant.fixed)

    def of(self, module: nn.Module, *, plain: bool = False) -> nn.Module:
        if not isinstance(module, Piece):
            return super().of(module, plain=plain)
        if id(module) not in self.modules:
            made = Piece(module.site, [], self.of(module.original))
            made.variants = [self._slot(slot) for slot in module.variants]
            made.programs = nn.ModuleList(slot.program for slot in made.variants)
            self.pieces.append(made)
            self.modules[id(module)] = made
        return self.modules[id(module)]

    def _slot(self, slot: Slot) -> Slot:
        part = self.built.get(id(slot.program))
        if part is None:
            program = _own(slot.program, self.storage)
            return Slot(program, slot.guard, program)
        self.parts.append(_rebuilt(part, self.storage))
        return Slot(self.parts[-1].running, slot.guard, self.parts[-1].lowered.runner)


def _slots(variant: Variant) -> list[Slot]:
    return [slot for piece in variant.capture.pieces for slot in piece.variants]


def _rebuilt(built: Built, copies: dict[int, torch.UntypedStorage]) -> Built:
    program = _own(built.running, copies)
    lowered = _lowered(program, built.lowered.plan, built.lowered.regions, built.lowered.sequence)
    return Built(program, program, built.records, lowered, built.seconds, built.unchanged)


def _own(program: Program, copies: dict[int, torch.UntypedStorage]) -> Program:
    made = program.copy()
    for module in made.graph_module.modules():
        for store_ in (module._parameters, module._buffers):
            for name, tensor in store_.items():
                if tensor is not None:
                    store_[name] = clone_tensor(tensor, copies)
    return made


def _plain(value: Any) -> Any:
    """Plain data of an attribute (numbers, texts, lists, dicts; ``to_dict()`` of a config), or None."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (bool, int, float, str)) else None


def _object(value: Any) -> Any:
    """Plain data with attribute access, as a config has it."""
    return Output("config", {k: _object(v) for k, v in value.items()}) if isinstance(value, dict) else value
