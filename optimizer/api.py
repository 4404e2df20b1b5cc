"""The public call: ``optimize`` and ``load``."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphwright import backends, search
from graphwright.accelerator import on, random_devices
from graphwright.calibrate import Calibration, calls, collect, missing
from graphwright.capture import Capture, Guard, capture
from graphwright.capture.dynamic import Changed
from graphwright.capture.export import positional_names
from graphwright.capture.rehearse import clone_sharing, untouched
from graphwright.capture.weights import leaf_names
from graphwright.errors import CalibrationError, CoverageError, InputError, PassError
from graphwright.ir import Program
from graphwright.manager import Pass, check_patterns, narrowed
from graphwright.memory import release
from graphwright.optimized import WORKING, Optimized, Variant
from graphwright.passes.pipeline import precisions, resolve
from graphwright.reporting import make_report
from graphwright.search import Built, Goal
from graphwright.structure import Spec, flatten_call

Say = Callable[[str], None]


def optimize(
    model: nn.Module,
    example_inputs: Any = None,
    recipe: str | Pass | Sequence[str | Pass] = "default",
    *,
    calibration: Iterable[Any] | Calibration | None = None,
    evaluate: Callable[[Any], float] | None = None,
    goal: Goal | None = None,
    backend: str = "auto",
    dynamic: Any = None,
    seed: int = 0,
    progress: Say | None = None,
) -> Optimized:
    """The fastest version of ``model`` that still meets the accuracy budget on this machine.

    Args:
        model: is never modified.
        example_inputs: a Tensor, a tuple (positional) or a dict (keyword). None: the first call supplies them.
        recipe: ``"default"`` (same numbers up to float rounding), ``"bf16"``, ``"int8"``, …; a pass; or a sequence of these.
        calibration: an iterable of inputs in the form of ``example_inputs``, or ``gw.Calibration``; recipes that quantize
            activations need it.
        evaluate: ``fn(model) -> float``, higher is better; run on the original and on the result.
        goal: limits, see ``gw.Goal``; with ``evaluate`` and ``max_drop``, sites that err most stay in float until it holds.
        backend: ``"auto"``: every backend of this machine competes. The name of one (``"triton"``, ``"onednn"``, …): its kernels run wherever
            they can, even where others are faster; then the result stands whether or not it is faster, and the report says which.
        dynamic: None: these sizes. ``"auto"``: batch and sequence sizes may vary. Or sizes as ``torch.export`` takes them.
        seed: for anything random while optimizing.
        progress: told what is going on, a line at a time.

    Raises:
        InputError, RecipeError, SiteError, CalibrationError: an argument is unusable; nothing was changed.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, an nn.Module is wanted", where="optimize(model=...)")
    if isinstance(model, Optimized):
        raise InputError("this model is optimized already", where="optimize(model=...)", hint="Optimize the original again.")
    if backend != "auto" and backend not in backends.names():
        raise InputError(f"backend {backend!r} does not exist", where="optimize(backend=...)",
                         hint=f"There are 'auto', {', '.join(map(repr, backends.names()))}.")  # fmt: skip
    if evaluate is not None and not callable(evaluate):
        raise InputError("evaluate is not callable", where="optimize(evaluate=...)", hint="fn(model) -> float, higher is better")
    if goal is not None and not isinstance(goal, Goal):
        raise InputError(f"goal is a {type(goal).__name__}, a gw.Goal is wanted", where="optimize(goal=...)", hint="goal=gw.Goal(max_drop=0.01)")
    if goal is not None and goal.max_drop is not None and evaluate is None:
        raise InputError("max_drop limits what evaluate may lose, and there is no evaluate", where="optimize(goal=...)",
                         hint="Pass evaluate=fn, fn(model) -> float, higher is better.")  # fmt: skip
    if progress is not None and not callable(progress):
        raise InputError("progress is not callable", where="optimize(progress=...)", hint="fn(text), print for instance")
    if not isinstance(seed, int):
        raise InputError(f"seed is a {type(seed).__name__}, an int is wanted", where="optimize(seed=...)")
    job = Job(recipe, calibration, evaluate, goal or Goal(), dynamic, seed, progress or (lambda text: None), backend)
    fast = Optimized(job.again, model, _attributes(model))
    job.result = fast
    if example_inputs is not None:
        args, kwargs = arguments(example_inputs)
        with WORKING:
            fast._add(job.first(model, args, kwargs), model)
    return fast


def load(path: str | os.PathLike[str]) -> Any:
    """A saved result, ``Optimized`` or ``Decoder``, ready to run: no model source, no pickle, no timing.

    Raises:
        LoadError: the file is truncated, altered, foreign or of an unknown version.
    """
    from graphwright.saving import restore

    return restore(Path(path))


class Job:
    """One ``optimize`` call: kept by its result so that new shapes are treated in the same way."""

    def __init__(self, recipe: Any, calibration: Any, evaluate: Any, goal: Goal, dynamic: Any, seed: int, say: Say, backend: str = "auto"):
        self.passes = resolve(recipe)
        self.recipe_name = recipe if isinstance(recipe, str) else ", ".join(p.name for p in self.passes)
        self.calibration = calibration
        self.evaluate, self.goal, self.dynamic, self.seed, self.say = evaluate, goal, dynamic, seed, say
        self.backend = None if backend == "auto" else backend
        self.result: Optimized | None = None
        if calibration is None and any(getattr(p, "needs_calibration", False) and not p.guest for p in self.passes):
            raise missing(f"recipe {recipe!r}" if isinstance(recipe, str) else "the recipe")
        self._baseline: float | None = None
        self._measuring = False
        self._storage: dict[int, torch.UntypedStorage] = {}  # later captures share the copied weights
        if isinstance(calibration, Iterable) and not isinstance(calibration, (Sequence, Calibration, Tensor, Mapping)) and hasattr(calibration, "__next__"):
            self.calibration = list(calibration)  # a generator gives its items once, and new shapes need them again

    def twin(self, result: Optimized, copies: Mapping[int, torch.UntypedStorage]) -> Job:
        """The same for a copy of the result, whose memory stands in ``copies`` by the address of what it was copied from."""
        other = copy.copy(self)
        other.result, other._storage = result, {k: copies.get(s.data_ptr(), s) for k, s in self._storage.items()}
        return other

    def first(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Variant:
        """Optimize for the given inputs, with evaluation and report."""
        start, self._measuring = time.perf_counter(), True
        with torch.random.fork_rng(devices=random_devices()), on(_home(model)):
            torch.manual_seed(self.seed)
            variant, leaves = self._variant(model, args, kwargs, self.dynamic)
            if self.evaluate is not None and self.goal.max_drop is not None:
                self._tuned(model, variant) if variant.built is not None else self._tuned_pieces(model, variant, leaves)
            if self.goal.time_budget:
                self._with_regions(model, variant, start + self.goal.time_budget)
            self.economize(variant)
            assert self.result is not None
            self.result.__dict__["_report"] = make_report(self, model, variant, leaves, start)
        release()
        return variant

    def again(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, near: Sequence[Variant]) -> Variant:
        """Optimize for a call that is not covered; sizes in which it differs from those of ``near`` are left open, as are batch and sequence."""
        assert self.result is not None
        if self.result._report is None and not self.result._variants and not self._measuring:
            return self.first(model, args, kwargs)
        changed = None
        if near and (self.dynamic is None or self.dynamic is True or self.dynamic == "auto"):
            changed = Changed(tuple(s for s in (v.sizes() for v in near) if s is not None), near[0].fixed.union(*(v.fixed for v in near)))
        with on(_home(model)):
            try:
                variant = self._variant(model, args, kwargs, changed or self.dynamic)[0]
            except PassError as error:
                if changed is None:
                    raise
                variant = self._variant(model, args, kwargs, "auto")[0]
                variant.capture.notes.append(f"not optimized with varying sizes: {error.what}")
            except CalibrationError as error:
                wider = self._sizes_of_both(model, args, kwargs)
                if wider is None:
                    raise CoverageError(f"this call's inputs need calibration data of their own: {error}",
                                        hint="Optimize again, with batches that have these sizes.") from error  # fmt: skip
                variant = self._variant(model, args, kwargs, wider)[0]
            if changed is not None:
                sizes = variant.sizes()
                variant.fixed = changed.fixed.union(p for p in changed.differing(flatten_call(args, kwargs)[0]) if sizes is None or sizes[p[0]][p[1]] is not None)
            self.economize(variant)
        return variant

    def _sizes_of_both(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, dict[int, str]] | None:
        """For ``capture(dynamic=...)``: the sizes in which a call and the calibration data differ; None where they don't fit at all."""
        leaves, spec = flatten_call(args, kwargs)
        try:
            batches = calls(self.calibration, spec, leaves)
        except CalibrationError:
            return None
        if any(len(t.shape) != len(x.shape) for batch in batches for t, x in zip(batch, leaves, strict=True)):
            return None
        found: dict[str, dict[int, str]] = {}
        for k, name in enumerate(leaf_names(spec.paths(), positional_names(model))):
            for d, size in enumerate(leaves[k].shape):
                sizes = [batch[k].shape[d] for batch in batches]
                if any(s != size for s in sizes):  # sizes that are equal everywhere are one size
                    found.setdefault(name, {})[d] = "_".join(map(str, ["size", size, *sizes]))
        return found or None

    def _variant(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Any) -> tuple[Variant, list[Tensor]]:
        from graphwright.kernels import ahead

        leaves, spec = flatten_call(args, kwargs)
        if all(t.device.type == "cpu" for t in (*leaves, *model.parameters())):  # kernels for the CPU, compiled meanwhile
            ahead.start((type(m).__name__ for m in model.modules()), "int8" in precisions(self.passes))
        try:
            self.say("capturing the model")
            found = capture(model, args, kwargs, dynamic=dynamic, storage=self._storage)
            if found.program is None:
                return self._in_pieces(found, spec, leaves), leaves
            found.program.example = tuple(x.detach() for x in leaves)
            if self.calibration is not None:
                found.program.calibration = collect(self.calibration, found.program.signature.inputs, found.program)
            return Variant(spec, found, self._build(found.program, self.passes), Guard(found.program)), leaves
        finally:
            ahead.stop()

    def _build(self, program: Program, passes: Sequence[Pass]) -> Built:
        return search.build(program, passes, precisions(passes), self.say, backend=self.backend)

    def _in_pieces(self, found: Capture, spec: Spec, leaves: list[Tensor]) -> Variant:
        """What was captured of a model that could not be captured whole: each piece is optimized by itself."""
        feed_pieces(found, spec, leaves, self.calibration)
        assert found.run is not None
        variant = Variant(spec, found, None, None, pieces=found.run)
        self._build_parts(variant, self.passes)
        return variant

    def _build_parts(self, variant: Variant, passes: Sequence[Pass]) -> None:
        """Optimize every piece that the example reaches; a pattern need match in one of them only."""
        programs = [s.program for s in reached(variant.capture)]
        check_patterns(passes, *programs)
        _install(variant, [self._build(p, narrowed(passes, p)) for p in programs])

    def _tuned_pieces(self, model: nn.Module, variant: Variant, leaves: list[Tensor]) -> None:
        """The accuracy budget where a model is in pieces: all lossy passes, or none of them."""
        lossy = search.lossy_passes(self.passes)
        lost = self._original(model) - self._candidate(model, variant) if lossy else 0.0
        variant.capture.notes.append(f"in pieces: score drops by {lost:.4g}, budget {self.goal.max_drop:.4g}")
        if lost <= self.goal.max_drop:
            return
        self.say("falling back to the exact passes")
        self.passes = tuple(p for k, p in enumerate(self.passes) if k not in lossy)
        self._build_parts(variant, self.passes)
        variant.capture.notes.append("in pieces there is no search over sites: no lossy pass was kept")

    def _tuned(self, model: nn.Module, variant: Variant) -> None:
        """Retreat from lossy sites until the accuracy budget holds; later shapes are treated like the outcome."""
        assert variant.built is not None and self.goal.max_drop is not None
        baseline, program = self._original(model), variant.built.captured

        def attempt(passes: Sequence[Pass]) -> Built:
            self.passes = tuple(passes)
            return self._build(program, passes)

        def drop(built: Built) -> float:
            return baseline - self._candidate(model, Variant(variant.spec, variant.capture, built, variant.guard))

        deadline = time.perf_counter() + (self.goal.time_budget or math.inf)
        variant.built, log = search.within_budget(variant.built, self.passes, attempt, drop, self.goal.max_drop, deadline, self.say)
        variant.capture.notes.extend(log)

    def _with_regions(self, model: nn.Module, variant: Variant, deadline: float) -> None:
        """Spend what is left of the time budget on regions; they are exact, yet the accuracy budget has the last word."""
        before = variant.parts if variant.built is None else [variant.built]
        after = [search.with_regions(b, deadline, self.say) for b in before]
        _install(variant, after)
        if self.evaluate is not None and self.goal.max_drop is not None and any(a.lowered.regions != b.lowered.regions for a, b in zip(after, before, strict=True)):
            lost = self._original(model) - self._candidate(model, variant)
            if lost > self.goal.max_drop:
                _install(variant, before)
                variant.capture.notes.append(f"regions compiled by Inductor are left out: score drops by {lost:.4g}, budget {self.goal.max_drop:.4g}")

    def economize(self, variant: Variant) -> None:
        """Lower the peak of memory where the goal limits it."""
        if self.goal.memory_mb is not None:
            parts = variant.parts if variant.built is None else [variant.built]
            _install(variant, [search.economized(b, self.goal.memory_mb, self.say) for b in parts])

    def scores(self, model: nn.Module, variant: Variant) -> tuple[float, float] | None:
        """The user's figure for the original and for the result; None without ``evaluate``."""
        return None if self.evaluate is None else (self._original(model), self._candidate(model, variant))

    def _original(self, model: nn.Module) -> float:
        if self._baseline is None:
            self.say("evaluating the original")
            self._baseline = score(self.evaluate, model)
        return self._baseline

    def _candidate(self, model: nn.Module, variant: Variant) -> float:
        """Score one variant; shapes that it does not cover are captured as they would be for the result."""
        self.say("evaluating the result")
        trial = Optimized(self.again, model, _attributes(model))
        trial._add(variant, model)
        return score(self.evaluate, trial)


def feed_pieces(found: Capture, spec: Spec, leaves: list[Tensor], calibration: Any) -> None:
    """Give every captured piece that the example reaches the inputs it gets there as its own, and those of the calibration data."""
    assert found.run is not None
    seen: dict[int, list[tuple[Tensor, ...]]] = {}
    slots = [v for piece in found.pieces for v in piece.variants]
    for slot in slots:
        slot.run = _recorder(slot.program, seen.setdefault(id(slot), []))
    batches = [leaves, *(calls(calibration, spec, leaves) if calibration is not None else ())]
    with torch.no_grad(), untouched(found.run):
        for batch in batches:
            args, kwargs = spec.unflatten(clone_sharing(batch))
            found.run(*args, **kwargs)
    for slot in slots:
        slot.run = slot.program
        if seen[id(slot)]:
            slot.program.example, *rest = seen[id(slot)]
            slot.program.calibration = tuple(rest)


def reached(found: Capture) -> list[Any]:
    """Of a model in pieces: the captured pieces that the example reaches."""
    return [s for piece in found.pieces for s in piece.variants if s.program.example is not None]


def _install(variant: Variant, builds: Sequence[Built]) -> None:
    """Let these builds run: the one of a model captured whole, or one per piece that is reached."""
    if variant.pieces is None:
        (variant.built,) = builds
        return
    variant.parts = list(builds)
    for slot, part in zip(reached(variant.capture), builds, strict=True):
        slot.run = part.lowered.runner


def _recorder(program: Any, into: list[tuple[Tensor, ...]]) -> Callable[..., Any]:
    def run(*leaves: Tensor) -> Any:
        into.append(tuple(x.detach().clone() for x in leaves))
        return program(*leaves)

    return run


def score(evaluate: Callable[[Any], float] | None, model: Any) -> float:
    """The user's figure, as a finite float.

    Raises:
        InputError: it is none.
    """
    assert evaluate is not None
    with torch.no_grad():
        found = evaluate(model)
    try:
        value = float(found)
    except (TypeError, ValueError):
        raise InputError(f"evaluate returned {type(found).__name__}, a number is wanted", where="optimize(evaluate=...)") from None
    if not math.isfinite(value):
        raise InputError(f"evaluate returned {'NaN' if math.isnan(value) else 'infinity'}", where="optimize(evaluate=...)", hint="Return a finite number, higher is better.")
    return value


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of an example."""
    if isinstance(example, Mapping):
        if not all(isinstance(k, str) for k in example):
            raise InputError("a dict of example inputs has argument names for keys", where="optimize(example_inputs=...)")
        return (), dict(example)
    return (example if type(example) is tuple else (example,)), {}


def _home(model: nn.Module) -> torch.device:
    """Where the model lies: its first parameter or buffer."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _attributes(model: nn.Module) -> dict[str, Any]:
    """Plain attributes of the model, ``.config`` among them: no tensors, modules or hooks."""
    found = {}
    for name, value in vars(model).items():
        if name.startswith("_") or name == "training" or callable(value) or isinstance(value, (Tensor, nn.Module)):
            continue
        found[name] = value
    return found
