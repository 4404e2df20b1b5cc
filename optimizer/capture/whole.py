"""Capturing a model as one program: the plan for varying sizes, attempts in order of worth, and checks by running."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from graphwright import ir
from graphwright.capture import dynamic as sizes
from graphwright.capture.dynamic import Changed, Group, Plan
from graphwright.capture.export import export, positional_names
from graphwright.capture.rehearse import Rehearsal, disagreement, rehearse, where
from graphwright.capture.weights import leaf_names
from graphwright.errors import CaptureError, GraphwrightError, InputError
from graphwright.structure import Spec


class Whole:
    """One attempt to capture a model as a whole.

    Args:
        said: what the model answered on the example.
        dynamic: as the user gave it.
        prefix, storage: see ``Builder``.

    Attributes:
        notes: what to tell the user.
        failure: why there is no program, once ``run`` gave None.
    """

    def __init__(self, model: nn.Module, leaves: Sequence[torch.Tensor], spec: Spec, said: Rehearsal, dynamic: Any,
                 prefix: str = "", storage: dict[int, torch.UntypedStorage] | None = None):  # fmt: skip
        self.model, self.leaves, self.spec, self.said = model, list(leaves), spec, said
        self.prefix, self.storage = prefix, storage
        self.notes: list[str] = []
        self.failure: BaseException | None = None
        positional = positional_names(model)
        self.names = leaf_names(spec.paths(), positional)
        if dynamic is None or dynamic is False:
            self.plan = Plan()
        elif dynamic is True or dynamic == "auto" or isinstance(dynamic, Changed):
            self.plan = sizes.automatic(leaves, self.names, spec.paths())
            if isinstance(dynamic, Changed):
                self.plan = dynamic.opened(self.plan, leaves)
        else:
            self.plan = sizes.stated(dynamic, leaves, self.names, positional)

    def run(self) -> ir.Program | None:
        """The program that lets most sizes vary, or None: then ``failure`` says why."""
        if self.plan.groups:
            program = self._attempt(self.plan)
            if program is not None:
                return self._said(program)
        fixed = self._attempt(Plan())
        if fixed is None or not self.plan.groups:
            return fixed
        kinds = list(dict.fromkeys(g.kind for g in self.plan.groups))
        drops = [("sequence", "cache"), ("batch",)] if {"batch", "sequence"} <= set(kinds) else [(k,) for k in kinds if k != "size"]
        if "size" in kinds:
            drops = [("size",), *drops, *(("size", *drop) for drop in drops)]
        for drop in (d for d in drops if set(kinds) - set(d)):
            program = self._attempt(self.plan.without(*drop))
            if program is not None:
                return self._said(program)
        self.failure = None
        return self._said(fixed)

    # -- one attempt -------------------------------------------------------------------------------------------------

    def _attempt(self, plan: Plan) -> ir.Program | None:
        """A program for this plan that answers as the model did, or None."""
        try:
            program = export(self.model, self._grown(plan), self.spec, self.names, plan, self.prefix, self.storage)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - torch.export refuses with many types; each becomes a reason
            self.failure = error
            if plan.groups:
                self._note(plan, f"{_reason(error)}")
            return None
        wrong = disagreement(program, self.leaves, self.said)
        if wrong is not None:
            self.failure = CaptureError(f"the captured graph does not answer as the model does: {wrong}")
            if plan.groups:
                self._note(plan, wrong)
            return None
        return self._lowered(program, plan)

    def _note(self, plan: Plan, reason: str) -> None:
        kinds = " and ".join(dict.fromkeys(g.kind for g in plan.groups))
        self.notes.append(f"not captured with varying {kinds}: {reason}")

    def _grown(self, plan: Plan) -> list[torch.Tensor]:
        """The example with every varying size of 1 doubled: torch.export would take 1 for a constant."""
        leaves, seen = [leaf.detach() for leaf in self.leaves], set()  # torch.export leaves marks on what it is given
        for k, leaf in enumerate(leaves):
            place = leaf.untyped_storage().data_ptr() if leaf.layout is torch.strided else id(leaf)
            if place in seen:  # one tensor passed twice would be captured as one input
                leaves[k] = leaf = leaf.clone()
            seen.add(place)
            if leaf.layout is torch.strided and not leaf.is_contiguous() and not _dense(leaf):
                leaves[k] = leaf.contiguous()  # strides of a slice would be sizes of their own
        for group in plan.groups:
            if group.size == 1:
                for k, d in group.members:
                    leaves[k] = torch.cat([leaves[k], leaves[k]], dim=d)
        return leaves

    def _lowered(self, program: ir.Program, plan: Plan) -> ir.Program:
        """Let the sizes that vary go down to 1 where the program answers as the model does there."""
        symbols = dict(program.signature.symbols)
        for group in plan.groups:
            name = _symbol(program, group)
            if name is None or symbols[name].low != 2 or symbols[name].multiple != 1:
                continue
            if group.low is not None and group.low > 1:
                continue
            small = self._shrunk(plan, group)
            if small is None:
                continue
            try:
                said = self.said if group.size == 1 else rehearse(self.model, small, self.spec)
            except InputError:
                continue
            if disagreement(program, small, said) is None:
                symbols[name] = replace(symbols[name], low=1)
            else:
                self.notes.append(f"a {group.kind} of 1 is captured on its own: the model computes something else there")
        program.signature = replace(program.signature, symbols=symbols)
        return program

    def _shrunk(self, plan: Plan, group: Group) -> list[torch.Tensor] | None:
        leaves = list(self.leaves)
        for k, d in group.members:
            leaves[k] = leaves[k].narrow(d, 0, 1)
        for (k, d), parts, extra in plan.sums:
            size = sum(leaves[j].shape[e] for j, e in parts) + extra
            if size > leaves[k].shape[d]:
                return None
            leaves[k] = leaves[k].narrow(d, 0, size)
        return leaves

    def _said(self, program: ir.Program) -> ir.Program:
        """Note which of the sizes that were to vary did not."""
        for group in self.plan.groups:
            places = [(k, d) for k, d in group.members
                      if isinstance(program.placeholders[k].meta["val"].shape[d], int)]  # fmt: skip
            if places:
                shown = ", ".join(f"dimension {d} of {self.names[k]}" for k, d in places[:3])
                more = f" and {len(places) - 3} more" if len(places) > 3 else ""
                self.notes.append(f"{group.kind} is fixed at {group.size} ({shown}{more}): the model's code depends on it")
        return program


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one block of memory, in whatever order of dimensions."""
    order = sorted(range(tensor.ndim), key=lambda d: tensor.stride(d))
    expected = 1
    for d in order:
        if tensor.shape[d] > 1 and tensor.stride(d) != expected:
            return False
        expected *= tensor.shape[d]
    return True


def _symbol(program: ir.Program, group: Group) -> str | None:
    k, d = group.members[0]
    size = program.placeholders[k].meta["val"].shape[d]
    name = str(size) if isinstance(size, torch.SymInt) else ""
    return name if name in program.signature.symbols else None


def explain(error: BaseException) -> tuple[str | None, str]:
    """The user's line and the reason, in one line of plain words, for a refusal of torch.export or of ours."""
    if isinstance(error, GraphwrightError):
        return error.where, error.what
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    said = said.partition(" (unhinted")[0]  # torch's own bookkeeping
    for sign, words in _PLAIN.items():
        if sign in f"{type(error).__name__}: {error}":
            return where(error), f"{words} ({type(error).__name__}: {said})"
    return where(error), f"{type(error).__name__}: {said}"


_PLAIN = {
    "DataDependent": "control flow depends on the values of tensors",
    "data-dependent": "control flow depends on the values of tensors",
    "DynamicOutputShape": "an output's shape depends on the values of tensors",
    "Fake": "the model's code leaves torch, where a trace cannot follow",
}


def _reason(error: BaseException) -> str:
    place, reason = explain(error)
    return f"{reason} ({place})" if place else reason
