"""``gw.compare``: a result's values against the original's, site by site: as it runs, and each kernel alone."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.accelerator import random_devices
from graphwright.api import arguments
from graphwright.backends.aten import implementation
from graphwright.backends.base import NATIVE, Candidate, Format, Read, Work
from graphwright.calibrate import Calibration
from graphwright.capture import Capture, Guard, capture
from graphwright.capture.rehearse import clone_sharing, untouched
from graphwright.cut import values_of
from graphwright.errors import InputError
from graphwright.ir import Program, describe, sites_of
from graphwright.lower import Lowered
from graphwright.lower.conversions import conversion
from graphwright.lower.runner import Runner, Step, emit
from graphwright.meters import Meter, Spot, agreement, arranged, site_pairs
from graphwright.ops import VIEW
from graphwright.optimized import WORKING, Optimized, Variant
from graphwright.report.comparison import Comparison, Deviation, OutputError
from graphwright.structure import Spec, flatten, flatten_call

#: an op that rounds nothing and agrees with a value by less stands for another value
_SAME_DB = 20.0


def compare(model: nn.Module, fast: Optimized, inputs: Any) -> Comparison:
    """A result's values against the original's, site by site, the worst first.

    At each site that keeps a value of the original's, the error is told twice: as it runs, with what the ops before it have
    lost already, and alone: its kernel on the original's own values. Comparing the two shows where an error arises.

    Args:
        model: the original; it is captured anew and not modified.
        fast: what ``optimize`` or ``load`` gave.
        inputs: one input in the form of ``example_inputs`` (a tensor, a tuple or a dict), or an iterable of such (a list, a
            loader, ``gw.Calibration``).

    Raises:
        InputError: an argument is unusable, or the model rejects an input.
        CoverageError: a loaded result does not cover an input.
    """
    if isinstance(model, Optimized) or not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, the original nn.Module is wanted", where="compare(model=...)")
    if not isinstance(fast, Optimized):
        raise InputError(f"fast is a {type(fast).__name__}, a result of gw.optimize or gw.load is wanted", where="compare(fast=...)",
                         hint="The order is compare(original, result, inputs).")  # fmt: skip
    items = _items(inputs)
    with WORKING, torch.random.fork_rng(devices=random_devices()):
        job = _Job(model, fast)
        for k, item in enumerate(items):
            job.run(k, *arguments(item))
        return job.told(len(items))


def _items(inputs: Any) -> list[Any]:
    if isinstance(inputs, (Tensor, tuple, Mapping)):
        return [inputs]
    if isinstance(inputs, str) or not isinstance(inputs, (Iterable, Calibration)):
        raise InputError(f"inputs is a {type(inputs).__name__}", where="compare(inputs=...)",
                         hint="Pass a tensor, a tuple, a dict, or an iterable of these.")  # fmt: skip
    found = list(inputs)
    if not found:
        raise InputError("there is no input to compare on", where="compare(inputs=...)", hint="A generator can be read once only: pass a list.")
    return found


# -- one result ------------------------------------------------------------------------------------------------------


class _Job:
    def __init__(self, model: nn.Module, fast: Optimized):
        self.model, self.fast = model, fast
        self.spots: dict[Any, Spot] = {}
        self.outputs: dict[str, tuple[str, Meter]] = {}
        self.captures: list[tuple[Spec, Capture, Guard | None]] = []
        self.storage: dict[int, torch.UntypedStorage] = {}
        self.notes: list[str] = []
        self.sites: dict[str, None] = {}
        self.emitted: dict[int, Runner] = {}
        self.others: dict[str, None] = {}

    def run(self, k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, spec = flatten_call(args, kwargs)
        leaves = [x.detach() for x in leaves]
        wanted = self._answer(self.model, spec, leaves)
        variant = self._variant(leaves, spec)
        with _kept(variant, leaves):
            got = self._answer(self.fast, spec, leaves)
        self._outputs(k, wanted, got)
        found = self._captured(spec, leaves, bool(variant.built is not None and variant.built.running.signature.symbols))
        if variant.built is not None:
            if found.program is None:
                self._note("the original could not be captured whole this time: " + "; ".join(map(str, found.regions[:2])))
                return
            self._sites(k, found.program, leaves, variant.built.lowered, leaves)
            return
        self._pieces(k, found, variant, spec, leaves)

    def _answer(self, called: nn.Module, spec: Spec, leaves: Sequence[Tensor]) -> tuple[list[Tensor], Spec] | None:
        """What a call returns; the original leaves no trace."""
        args, kwargs = spec.unflatten(clone_sharing(leaves))
        torch.manual_seed(0)
        with untouched(self.model), torch.no_grad():
            try:
                answer = called(*args, **kwargs)
            except InputError:
                raise
            except Exception as error:
                if called is self.fast:
                    raise
                raise InputError(f"the model rejects an input: {type(error).__name__}: {error}", where="compare(inputs=...)") from error
            try:
                tensors, found = flatten(answer)
            except InputError as error:
                self._note(f"outputs are not compared: {error.what}")
                return None
            return [t.clone() for t in tensors], found

    def _variant(self, leaves: list[Tensor], spec: Spec) -> Variant:
        variant = self.fast._covering(leaves, spec)
        if variant is None:
            args, kwargs = spec.unflatten(clone_sharing(leaves))
            variant = self.fast._recapture(args, kwargs, *flatten_call(args, kwargs))
        return variant

    def _outputs(self, k: int, wanted: tuple[list[Tensor], Spec] | None, got: tuple[list[Tensor], Spec] | None) -> None:
        if wanted is None or got is None:
            return
        if len(wanted[0]) != len(got[0]):
            self._note(f"the original returns {len(wanted[0])} tensors, the result {len(got[0])}")
            return
        for path, a, b in zip(wanted[1].paths(), *(w[0] for w in (wanted, got)), strict=True):
            meter = self.outputs.setdefault(path or "output", (describe(a), Meter()))[1]
            if a.shape != b.shape:
                self._note(f"{path or 'output'} is {describe(b)} instead of {describe(a)}")
                meter.add(torch.full_like(a, 1, dtype=torch.float64), torch.full_like(a, math.nan, dtype=torch.float64), k)
                continue
            meter.add(a, b, k)

    def _captured(self, spec: Spec, leaves: list[Tensor], dynamic: bool) -> Capture:
        """The original as a program that covers this call; captured once per shape, or once for many."""
        for known, found, guard in self.captures:
            if known == spec and (guard is not None and guard.check(leaves) is None):
                return found
        args, kwargs = spec.unflatten(leaves)
        found = capture(self.model, args, kwargs, dynamic="auto" if dynamic else None, storage=self.storage)
        guard = Guard(found.program) if found.program is not None else None
        if guard is not None and guard.check(leaves) is not None:
            found = capture(self.model, args, kwargs, storage=self.storage)
            guard = Guard(found.program) if found.program is not None else None
        self.captures.append((spec, found, guard))
        return found

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    # -- pieces ------------------------------------------------------------------------------------------------

    def _pieces(self, k: int, found: Capture, variant: Variant, spec: Spec, leaves: list[Tensor]) -> None:
        """A model that is captured in pieces: each against the same piece of the original, on the first call of it."""
        slots = {(p.site, i): s for p in variant.capture.pieces for i, s in enumerate(p.variants)}
        parts = {id(part.lowered.runner): part.lowered for part in variant.parts}
        if not slots or variant.pieces is None or found.run is None:
            self._note("the result runs the original's own code: there is nothing to compare inside it")
            return
        olds = {(p.site, i): s for p in found.pieces for i, s in enumerate(p.variants)}
        with _watched(slots) as mine, _kept(variant, leaves), torch.no_grad():
            args, kwargs = spec.unflatten(clone_sharing(leaves))
            variant.pieces(*args, **kwargs)
        with _watched(olds) as theirs, untouched(found.run), torch.no_grad():
            args, kwargs = spec.unflatten(clone_sharing(leaves))
            found.run(*args, **kwargs)
        for key, slot in slots.items():
            lowered = parts.get(id(slot.run))
            if lowered is not None and key in theirs and key in mine:
                self._sites(k, olds[key].program, theirs[key], lowered, mine[key])

    # -- one program -------------------------------------------------------------------------------------------

    def _sites(self, k: int, original: Program, theirs: Sequence[Tensor], lowered: Lowered, mine: Sequence[Tensor]) -> None:
        """Run both programs and compare what they hold.

        Args:
            theirs, mine: flat inputs of the original, and of the result: the same but for pieces inside a larger model.
        """
        works = lowered.analysis.works
        self.sites |= dict.fromkeys(s for n in original.nodes if not _moves(n) for s in sites_of(n))
        pairs = {a: b for a, b in site_pairs(original, works).items()}
        held = values_of(original, theirs, set(pairs.values()))
        truth = _Truth(lowered, {a: held[b] for a, b in pairs.items()}, theirs, original)
        runner = self.emitted.setdefault(id(lowered), emit(lowered.analysis, lowered.chosen, apart=True))
        chosen = {w.node: c for w, (c, _) in zip(works, lowered.chosen, strict=True)}
        makers = _makers(works, {c.work.node: c.name for c in lowered.choices}, chosen)
        position = {w.node: j for j, w in enumerate(works)}

        def do(step: Step, reads: list[Any]) -> Any:
            result = step.call(*reads)
            work = step.work
            if work is None:
                return result
            candidate = chosen[work.node]
            given = truth.alone(work, candidate, step)
            value = _native(result, candidate, work)
            expected = truth.expected(work, given if isinstance(given, Tensor) else value)
            if expected is not None and isinstance(value, Tensor) and not (_moves(work.node) and _moves(pairs[work.node])):
                spot = self._spot(work, *makers[work.node], expected[1], position[work.node])
                spot.runs.add(expected[0], value, k)
                if isinstance(given, Tensor) and spot.alone is not None:
                    spot.alone.add(expected[0], given, k)
                else:
                    spot.alone = None
            truth.settle(work, expected, given)
            return result

        runner.step_through(clone_sharing(list(mine)), do)
        self.others |= dict.fromkeys(truth.others)
        moved = truth.moved()
        if moved:
            self._note(f"the result's state is no longer the original's ({', '.join(moved[:3])}{', …' if len(moved) > 3 else ''}): what reads it differs")

    def _spot(self, work: Work, kernel: str, precision: str, note: str, position: int) -> Spot:
        sites = sites_of(work.node) or (work.node.name,)
        if sites not in self.spots:
            self.spots[sites] = Spot(sites, work.op, position, kernel, precision, describe(work.out), note=note)
        return self.spots[sites]

    def told(self, inputs: int) -> Comparison:
        rows = [
            Deviation(s.sites, s.op, s.position, s.kernel, s.precision, s.shape, s.runs.error(), s.alone.error() if s.alone is not None else None,
                      s.runs.worst[1], s.note)
            for s in self.spots.values()
        ]  # fmt: skip
        rows.sort(key=lambda d: (d.as_it_runs.sqnr_db, d.position))
        here = {s for d in rows for s in d.sites}
        if self.others:
            some = list(self.others)
            far = any(m.error().sqnr_db < _SAME_DB for _, m in self.outputs.values())
            why = "a pass moved the site, or this is not the model that the result was made from" if far else "a pass moved the site"
            self._note(f"{len(some)} op{'s give' if len(some) > 1 else ' gives'} by meaning another value than the original's of that site "
                       f"({', '.join(some[:3])}{', …' if len(some) > 3 else ''}): {why}")
        if self.sites and not here and not self.others:
            self._note("the result and this model have no site in common: is it the model that the result was made from?")
        outputs = tuple(OutputError(path, shape, m.error(), m.differing, m.count) for path, (shape, m) in self.outputs.items())
        report = self.fast._report
        if any(v.built is not None and v.built.unchanged for v in self.fast._variants):
            self._note("the captured graph runs unchanged: it was not faster optimized")
        return Comparison(type(self.model).__name__, report.recipe if report is not None else "", inputs, outputs, tuple(rows),
                          tuple(s for s in self.sites if s not in here), tuple(self.notes))  # fmt: skip


class _Truth:
    """The original's values, where a work's reads are looked up; what it does not have is computed from what it has."""

    def __init__(self, lowered: Lowered, values: Mapping[fx.Node, Any], leaves: Sequence[Tensor], original: Program):
        program = lowered.analysis.program
        self.values, self.params = values, lowered.analysis.qparams
        self.env: dict[fx.Node, Any] = dict(zip(program.placeholders, leaves, strict=True))
        state = {m.buffer: original.tensor(m.buffer) for m in original.signature.mutations if m.buffer}  # the result's may have moved on
        self.others: list[str] = []
        self._state = {name: (t, program.tensor(name)) for name, t in state.items() if name in program.tensors()}
        self.env |= {n: state.get(str(n.target), program.tensor(str(n.target))) for n in program.graph.nodes if n.op == "get_attr"}

    def alone(self, work: Work, candidate: Candidate, step: Step) -> Any:
        """The work's kernel on the original's values, native; None where it can't be run on them."""
        reads = []
        for read, form in zip(work.reads, candidate.needs, strict=True):
            value = self.env.get(read.value)
            if value is None:
                return None
            reads.append(self._held(value, form, read))
        try:
            return _native(step.call(*reads), candidate, work)
        except Exception:  # noqa: BLE001  a kernel may want particular strides that the original's value has not
            return None

    def _held(self, value: Any, form: Format, read: Read) -> Any:
        if not isinstance(value, Tensor):
            return value
        if form != NATIVE:
            value = conversion(NATIVE, form, self.params.get(read.value), value)(value)
        return tuple(v.clone() for v in value) if isinstance(value, tuple) else value.clone()  # kernels may write into what they read

    def expected(self, work: Work, like: Any) -> tuple[Tensor, str] | None:
        """The original's value as this work holds it, and how, where it can be told."""
        value = self.values.get(work.node)
        if not isinstance(value, Tensor) or not isinstance(like, Tensor):
            return None
        found = arranged(value, like)
        if found is not None and self._another(work, found[0], like):
            self.others.append(work.site)
            return None
        return found

    def moved(self) -> list[str]:
        """Buffers that the two hold with other values."""
        return [name for name, (a, b) in self._state.items() if not torch.equal(a, b)]

    def _another(self, work: Work, value: Tensor, given: Tensor) -> bool:
        """Whether the work's op, unquantized, gives something else on the original's values by its very meaning: a pass let
        its site stand for another value."""
        rounds = work.weights or any(r.quantized or r.rows for r in work.reads)
        if rounds or not value.is_floating_point() or agreement(value, given) >= _SAME_DB:
            return False
        reads = [self.env.get(r.value) for r in work.reads]
        if any(r is None for r in reads):
            return False
        try:
            meant = implementation(work)(*[r.clone() if isinstance(r, Tensor) else r for r in reads])
        except Exception:  # noqa: BLE001  the values have not the strides that it wants
            return False
        return isinstance(meant, Tensor) and agreement(value, meant) < _SAME_DB

    def settle(self, work: Work, expected: tuple[Tensor, str] | None, given: Any) -> None:
        """What later works read: the original's value, or what follows from it."""
        value = self.values.get(work.node)
        if expected is not None:
            self.env[work.node] = expected[0]
        elif value is not None and not isinstance(value, Tensor):
            self.env[work.node] = value
        elif given is not None:
            self.env[work.node] = given


def _makers(works: Sequence[Work], names: Mapping[fx.Node, str], chosen: Mapping[fx.Node, Candidate]) -> dict[fx.Node, tuple[str, str]]:
    """Per work the kernel and precision that its value comes from: of a part of a merged product, those of the product."""
    found: dict[fx.Node, tuple[str, str]] = {}
    for work in works:
        source = work.reads[0].value if work.reads and _moves(work.node) else None
        found[work.node] = found[source] if source in found else (names[work.node], chosen[work.node].precision)
    return found


def _moves(node: fx.Node) -> bool:
    """Whether a node only moves values, or picks one of several."""
    from graphwright.ops import row

    if node.target is operator.getitem or not isinstance(node.target, torch._ops.OpOverload):
        return True
    found = row(node.target)
    return found is not None and VIEW in found.traits


def _native(result: Any, candidate: Candidate, work: Work) -> Any:
    """What a kernel gave, in the form that the program speaks of."""
    results = (result,) if len(candidate.gives) == 1 else tuple(result)
    form, value = next(((f, r) for f, r in zip(candidate.gives, results, strict=True) if f.kind == "native"), (candidate.gives[0], results[0]))
    if form.kind == "native" or not isinstance(value, (Tensor, tuple)):
        return value
    return conversion(form, NATIVE, work.qparams, work.out)(value)


@contextmanager
def _watched(slots: Mapping[Any, Any]) -> Iterator[dict[Any, list[Tensor]]]:
    """The inputs of each captured piece's first call, while the model runs inside."""
    seen: dict[Any, list[Tensor]] = {}
    runs = {key: slot.run for key, slot in slots.items()}

    def watching(key: Any) -> Any:
        def run(*leaves: Tensor) -> Any:
            seen.setdefault(key, [x.detach().clone() for x in leaves])
            return runs[key](*leaves)

        return run

    for key, slot in slots.items():
        slot.run = watching(key)
    try:
        yield seen
    finally:
        for key, slot in slots.items():
            slot.run = runs[key]


@contextmanager
def _kept(variant: Variant, leaves: Sequence[Tensor]) -> Iterator[None]:
    """The result's own state comes back."""
    if variant.built is not None:
        with variant.built.running.preserved(leaves), variant.built.captured.preserved(leaves):
            yield
    elif variant.pieces is not None:
        with untouched(variant.pieces):  # type: ignore[arg-type]
            yield
    else:
        yield
