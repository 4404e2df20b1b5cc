"""When a model cannot be captured whole: its submodules are captured instead, the largest ones that can be.

What remains (the Python of the modules in between) runs as it was, on a twin of the module tree: the twin has its own
weights and calls a ``Piece`` wherever a submodule was captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graphwright import ir
from graphwright.capture.dynamic import Changed
from graphwright.capture.guard import Guard, key
from graphwright.capture.rehearse import (
    Rehearsal,
    _differs,
    clone_sharing,
    clone_tensor,
    plain_attention,
    rehearse,
    untouched,
)
from graphwright.capture.whole import Whole, explain
from graphwright.errors import InputError
from graphwright.structure import Spec, flatten, flatten_call

_CALLS = 4  # distinct calls of one submodule that are captured


@dataclass(frozen=True)
class Region:
    """A part of the model that was not captured; it runs as it was.

    Attributes:
        site: the module whose own code it is, ``""`` for the model itself.
        where: the user's ``file.py:12``, where known.
        reason: what stands in the way.
    """

    site: str
    where: str | None
    reason: str

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        return f"{self.site or 'the model itself'}{place}: {self.reason}"


@dataclass(eq=False)
class Variant:
    """One captured form of a submodule; ``run`` may be replaced by something faster than the program."""

    program: ir.Program
    guard: Guard
    run: Callable[..., Sequence[torch.Tensor]]


class Piece(nn.Module):
    """A captured submodule in its place: runs the first variant that covers a call, else the module as it was.

    Attributes:
        site: the submodule's qualified name.
        variants: one per structure and shape that the example run showed; without any the module runs as it was.
        original: the twin of the submodule, for calls that no variant covers.
    """

    def __init__(self, site: str, programs: Sequence[ir.Program], original: nn.Module):
        super().__init__()
        self.site = site
        self.variants = [Variant(p, Guard(p), p) for p in programs]
        self.programs = nn.ModuleList(programs)
        self.original = original
        self.training = original.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.variants:
            return self.original(*args, **kwargs)
        try:
            leaves, spec = flatten_call(args, kwargs)
        except InputError:
            return self.original(*args, **kwargs)
        for variant in self.variants:
            signature = variant.program.signature
            if spec == signature.inputs and variant.guard.check(leaves) is None:
                return signature.outputs.unflatten(variant.run(*leaves))
        return self.original(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # attributes that the model's code reads off its submodules
            return getattr(super().__getattr__("original"), name)


@dataclass
class Found:
    """What region capture gave: a callable like the model, and its parts."""

    run: nn.Module
    pieces: list[Piece] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Regions:
    """Captures what can be captured of a model that cannot be captured whole.

    Args:
        failure: why not whole.
    """

    def __init__(self, model: nn.Module, leaves: Sequence[torch.Tensor], spec: Spec, said: Rehearsal,
                 failure: BaseException, dynamic: Any,
                 storage: dict[int, torch.UntypedStorage]):  # fmt: skip
        self.model, self.leaves, self.spec, self.said = model, leaves, spec, said
        self.failure = failure
        self.dynamic = "auto" if isinstance(dynamic, Changed) else dynamic if dynamic in (None, False, True, "auto") else None
        self.storage = storage
        self.programs: dict[int, tuple[str, list[ir.Program]]] = {}
        self.regions: list[Region] = []
        self.notes: list[str] = []

    def run(self) -> Found:
        """Never fails: at worst nothing is captured and the twin is the whole model."""
        self._refused("", self.failure)
        try:
            self._descend(self.model, "")
        except Exception as error:  # noqa: BLE001 - whatever the user's modules do, the model still runs as it was
            self.notes.append(f"looking for smaller regions failed: {type(error).__name__}: {error}")
        twin = Twin(self.programs, self.storage)
        root = twin.of(self.model)
        wrong = self._wrong(root)
        if wrong is not None:
            self.notes.append(f"the captured parts together do not answer as the model does ({wrong}): none is used")
            twin = Twin({}, self.storage)
            root = twin.of(self.model)
        inner = {(r.where, r.reason) for r in self.regions if r.site}
        regions = [r for r in self.regions if r.site or (r.where, r.reason) not in inner]
        return Found(root, twin.pieces, regions, self.notes)

    def _refused(self, site: str, failure: BaseException) -> None:
        place, reason = explain(failure)
        self.regions.append(Region(site, place, reason))

    def _descend(self, module: nn.Module, path: str) -> None:
        """Capture the children of a module that could not be captured itself."""
        self._each(list(_called(module, path)))

    def _each(self, children: Sequence[tuple[str, nn.Module]]) -> None:
        children = [(p, m) for p, m in children if id(m) not in self.programs]
        if not children:
            return
        found = self._watch(children)
        for child, (site, calls) in found.items():
            programs: list[ir.Program] = []
            failure: BaseException | None = None
            for leaves, spec in calls:
                program, failure = self._one(child, site, leaves, spec)
                if program is None:
                    break
                programs.append(program)
            if failure is None and any(p.nodes for p in programs):
                self.programs[id(child)] = (site, programs)
            elif failure is not None:
                self._refused(site, failure)
                self._descend(child, site)
        # a module that holds others without being called itself: its user calls them
        self._each([inner for p, m in children if m not in found for inner in _called(m, p)])

    def _one(self, child: nn.Module, site: str, leaves: list[torch.Tensor], spec: Spec,
             ) -> tuple[ir.Program | None, BaseException | None]:  # fmt: skip
        try:
            said = rehearse(child, leaves, spec)
            if said.refusal is not None:
                return None, InputError(said.refusal)
            whole = Whole(child, leaves, spec, said, self.dynamic, site, self.storage)
            program = whole.run()
        except InputError as error:
            return None, error
        self.notes += [f"{site}: {note}" for note in whole.notes]
        return program, whole.failure

    def _watch(self, children: Sequence[tuple[str, nn.Module]]) -> dict[nn.Module, tuple[str, list[Any]]]:
        """Run the whole model once more and keep the inputs of the given submodules' first distinct calls."""
        found: dict[nn.Module, tuple[str, list[Any]]] = {}
        seen: set[Any] = set()
        handles = []
        for path, child in children:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                calls = found.setdefault(module, (path, []))[1]
                try:
                    leaves, spec = flatten_call(args, kwargs)
                except InputError:
                    return
                mark = (id(module), key(leaves, spec))
                if mark not in seen and len(calls) < _CALLS:
                    seen.add(mark)
                    calls.append((clone_sharing(leaves), spec))

            handles.append((child, hook))
        with untouched(self.model), plain_attention(), torch.no_grad():
            hooks = [m.register_forward_pre_hook(h, with_kwargs=True) for m, h in handles]
            try:
                torch.manual_seed(0)
                args, kwargs = self.spec.unflatten(clone_sharing(self.leaves))
                self.model(*args, **kwargs)
            finally:
                for handle in hooks:
                    handle.remove()
        return found

    def _wrong(self, root: nn.Module) -> str | None:
        """What the twin answers otherwise than the model, on the example."""
        if self.said.outputs is None:
            return None
        args, kwargs = self.spec.unflatten(clone_sharing(self.leaves))
        try:
            with untouched(root), plain_attention(), torch.no_grad():
                torch.manual_seed(0)
                outputs, spec = flatten(root(*args, **kwargs), name="output")
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything; nothing is then captured
            return f"{type(error).__name__}: {error}"
        if spec != self.said.spec:
            return f"{spec.describe()} instead of {self.said.spec.describe() if self.said.spec else None}"
        differences = (_differs(a, b) for a, b in zip(outputs, self.said.outputs, strict=True))
        return next((f"output {k} {d}" for k, d in enumerate(differences) if d), None)


def _called(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The submodules that a module's code calls itself: its children, and those inside its lists and dicts."""
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _called(child, full)
        else:
            yield full, child


class Twin:
    """Copies a module tree: own weights, own containers, and a ``Piece`` for each captured submodule."""

    def __init__(self, programs: dict[int, tuple[str, list[ir.Program]]],
                 storage: dict[int, torch.UntypedStorage]):  # fmt: skip
        self.programs = programs
        self.pieces: list[Piece] = []
        self.storage = storage
        self.tensors: dict[int, torch.Tensor] = {}
        self.modules: dict[int, nn.Module] = {}

    def of(self, module: nn.Module, *, plain: bool = False) -> nn.Module:
        """The twin of a module; ``plain`` leaves captured submodules out of account."""
        if id(module) in self.modules and not plain:
            return self.modules[id(module)]
        if id(module) in self.programs and not plain:
            site, programs = self.programs[id(module)]
            piece = Piece(site, programs, self.of(module, plain=True))
            self.pieces.append(piece)
            self.modules[id(module)] = piece
            return piece
        if isinstance(module, torch.jit.ScriptModule):
            return module  # cannot be rebuilt in Python; it runs as it is
        twin = object.__new__(type(module))
        if not plain:
            self.modules[id(module)] = twin
        held = {k: v.copy() if type(v) in (list, dict, set) else v for k, v in module.__dict__.items()}
        object.__setattr__(twin, "__dict__", held)
        held["_parameters"] = {k: self._tensor(v) for k, v in module._parameters.items()}
        held["_buffers"] = {k: self._tensor(v) for k, v in module._buffers.items()}
        held["_modules"] = {k: None if m is None else self.of(m, plain=plain) for k, m in module._modules.items()}
        return twin

    def _tensor(self, value: torch.Tensor | None) -> torch.Tensor | None:
        if value is None:
            return None
        if id(value) not in self.tensors:
            self.tensors[id(value)] = clone_tensor(value, self.storage)
        return self.tensors[id(value)]
