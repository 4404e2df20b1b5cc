"""The ``torch.compile`` backend: ``torch.compile(model, backend="graphwright", options={"recipe": "bf16"})``.

Dynamo cuts a model into graphs and calls ``backend`` with each. A graph is optimized on its first call, when its inputs
are real tensors: captured, passed and lowered as ``optimize`` does, then raced against Dynamo's graph as it is. What
can't be captured, needs gradients or is not faster runs as Dynamo's graph, and a line in the log ``graphwright.dynamo``
says so.

Parameters and buffers that a graph does not write become constants, so that they can be folded and packed; each call
checks that they are the same tensors, unwritten since. After a write Dynamo's graph runs, and once the weights have stood
still for a few calls the graph is optimized again. Modules of one class share a graph: each gets a form of its own.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright import search
from graphwright.accelerator import random_devices
from graphwright.capture import Guard, capture
from graphwright.capture.fragment import Constants, Run, Split, Trial, inputs_of, mark, unfit
from graphwright.capture.sites import user_line
from graphwright.capture.whole import explain
from graphwright.errors import CalibrationError, CaptureError, GraphwrightError, RecipeError, nearest
from graphwright.manager import Pass
from graphwright.measure import interleaved
from graphwright.optimized import WORKING
from graphwright.passes.pipeline import precisions, resolve

log = logging.getLogger(__name__)

#: calls for which new or written weights must stand still before a graph is optimized for them
PATIENCE = 3
#: how often a graph is optimized for one set of weights at the most, and for how many sets
CHANCES, STATES = 4, 64


def backend(graph: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None,
            options: Mapping[str, Any] | None = None) -> Run:  # fmt: skip
    """Compile one graph of Dynamo's; the entry point behind ``torch.compile(..., backend="graphwright")``.

    Args:
        mode: Inductor's word for how hard to try; it changes nothing here, which is said once.
        options: ``{"recipe": ...}``: a name, a pass, or a sequence of these, as ``optimize`` takes it; else ``"default"``.

    Returns:
        A function of the graph's inputs that gives the graph's outputs. Where the options are unusable it raises
        ``RecipeError`` or ``CalibrationError`` when it is called: raised here, Dynamo would wrap them in an error of its own.
    """
    try:
        passes, name = _recipe(dict(options or {}))
    except GraphwrightError as error:
        return functools.partial(_refuse, error)
    if mode is not None:
        _once(f"mode={mode!r} changes nothing for backend='graphwright': every kernel is timed anyway")
    if not any(n.op.startswith("call_") for n in graph.graph.nodes):
        return graph.forward
    try:
        return Fragment(graph, example_inputs, passes, name)
    except Exception as error:  # noqa: BLE001 - inputs of a kind that we don't know: the user's program runs on
        log.warning("Dynamo's graph runs as it is: %s", explain(error)[1])
        return graph.forward


def _recipe(options: dict[str, Any]) -> tuple[tuple[Pass, ...], str]:
    recipe, where = options.pop("recipe", "default"), 'torch.compile(backend="graphwright", options=...)'
    if options:
        name = next(iter(options))
        raise RecipeError(f"there is no option {name!r}", where=where,
                          hint=f"{nearest(str(name), ['recipe'])} The one option is 'recipe'.".strip())  # fmt: skip
    passes = resolve(recipe)
    hungry = next((p.name for p in passes if getattr(p, "needs_calibration", False)), None)
    if hungry is not None:
        raise CalibrationError(
            f"recipe {recipe!r} needs calibration data (pass {hungry}), and torch.compile can't hand them over", where=where,
            hint="Call gw.optimize(model, example_inputs, recipe, calibration=[...]) instead.")  # fmt: skip
    return passes, recipe if isinstance(recipe, str) else ", ".join(p.name for p in passes)


def _refuse(error: GraphwrightError, *args: Any) -> Sequence[Any]:
    raise error.with_traceback(None)


@contextmanager
def _alone() -> Iterator[None]:
    """No other thread compiles or optimizes meanwhile: torch.export changes nn.Module itself while it traces."""
    from torch._dynamo import convert_frame

    with WORKING, getattr(convert_frame, "compile_lock", None) or nullcontext():
        yield


@functools.cache
def _once(text: str) -> None:
    log.warning(text)


@dataclass(eq=False)
class State:
    """How a graph stands with one set of weights. Modules of one class share a graph, each with weights of its own.

    Attributes:
        form: what runs instead of Dynamo's graph.
        marks, calm: the weights at the last call without a form that covers them, and how often they were so in a row.
        chances: how often a form may be made.
        seen: at which of the calls without a form the last one was.
    """

    form: Form | None = None
    marks: dict[int, Any] = field(default_factory=dict)
    calm: int = 0
    chances: int = CHANCES
    seen: int = 0


class Fragment:
    """One of Dynamo's graphs: called with its inputs, gives its outputs, optimized where that is right and faster.

    Attributes:
        verdict: what was decided, in words; None before the first call.
        states: by the identity of the weights.
    """

    def __init__(self, graph: fx.GraphModule, examples: Sequence[Any], passes: Sequence[Pass], recipe: str):
        self.graph, self.passes, self.recipe = graph, tuple(passes), recipe
        self.inputs = inputs_of(graph.graph, examples)
        ops = [n for n in graph.graph.nodes if n.op.startswith("call_")]
        line = next((found for n in ops if (found := user_line(n.meta.get("stack_trace")))), None)
        self.label = f"graph of {len(ops)} op{'s' * (len(ops) != 1)}" + (f" from {line}" if line else "")
        self.verdict: str | None = None
        self.states: dict[tuple[int, ...], State] = {}
        self._plain: Run = graph.forward
        self._lock = threading.Lock()
        self._kept = self._uncovered = False
        self._waits = 0
        self._weights = [k for k, i in enumerate(self.inputs) if i.weight]
        self._varying: set[int] = set()  # inputs that look like weights but change from call to call

    def __call__(self, *args: Any) -> Sequence[Any]:
        if self._kept:
            return self._plain(*args)
        state = self.states.get(tuple([id(args[k]) for k in self._weights]))
        form = None if state is None else state.form
        if form is None:
            return self._wait(state, args) if state is None or state.chances else self._plain(*args)
        assert state is not None
        try:
            if form.covers(args):
                return form.run(args)
        except Exception as error:  # noqa: BLE001 - inputs are written last: nothing has happened yet
            outputs = self._plain(*args)  # where this fails too, the error is the user's
            self._keep(state, f"the optimized one failed: {explain(error)[1]}")
            return outputs
        return self._otherwise(state, form, args)

    def _make(self, state: State, args: tuple[Any, ...]) -> Sequence[Any]:
        """Run Dynamo's graph, and optimize it by what it was seen to do."""
        if not self._lock.acquire(blocking=False):
            return self._plain(*args)  # another thread is at it
        try:
            reason = unfit(args)
            if reason is not None:
                self._keep(state, reason)
                return self._plain(*args)
            seen = Trial(self._plain, args)
            if seen.differentiable:
                self._kept, self.verdict = True, "Dynamo's graph runs as it is: gradients are needed"
                _once("gradients are on: backend='graphwright' runs graphs that need them as they are. Call the compiled model under "
                      "torch.no_grad() or torch.inference_mode() to have it optimized for inference.")  # fmt: skip
                return seen.outputs
            state.chances -= 1
            state.calm, state.marks = 0, {}
            try:
                with _alone(), torch.inference_mode(False), torch.no_grad():  # what is made here outlives the caller's mode
                    form = self._optimized(seen, state)
            except Exception as error:  # noqa: BLE001 - whatever goes wrong, the user's program runs on
                self._keep(state, explain(error)[1])
                return seen.outputs
            if self._weights != form.constants.slots:  # from now on constants alone tell one set of weights from another
                self._weights, self.states = form.constants.slots, {}
            state.form, self.verdict = form, "optimized"
            self.states[form.constants.key(args)] = state
            # it answers the first call too where asking twice leaves no trace
            return form.run(args) if seen.pure else seen.outputs
        finally:
            self._lock.release()

    def _keep(self, state: State, reason: str) -> None:
        """Let Dynamo's graph run: for good, unless it was optimized for other weights."""
        state.form, state.chances = None, 0
        log.warning("%s: Dynamo's graph runs as it is: %s", self.label, reason)
        if not any(s.form for s in self.states.values()):
            self._kept, self.states, self.verdict = True, {}, f"Dynamo's graph runs as it is: {reason}"

    def _optimized(self, seen: Trial, state: State) -> Form:
        """The form that runs from now on.

        Raises:
            CaptureError: Dynamo's graph is to stay; the reason.
            Exception: whatever a part refuses with.
        """
        if seen.refusal():
            raise CaptureError(str(seen.refusal()))
        split = Split(self.graph, self.inputs, seen, self._varying)
        held = {k: seen.args[k] for k in split.constants}
        constants = Constants(held, functools.partial(self._gone, state))  # as they are before they are copied
        with torch.random.fork_rng(devices=random_devices()):
            torch.manual_seed(0)
            leaves = split.leaves(seen.copies())
            found = capture(split.module, leaves, dynamic=split.dynamic or None)
            for note in found.notes:
                log.info("%s: %s", self.label, note)
            if found.program is None:
                raise CaptureError("; ".join(r.reason for r in found.regions) or "it could not be captured")
            found.program.example = leaves
            built = search.build(found.program, self.passes, precisions(self.passes), lambda text: log.debug("%s: %s", self.label, text))
            form = Form(built, split, constants, seen)
            self._race(form, seen.copies(keep=split.constants))
        return form

    def _race(self, form: Form, args: tuple[Any, ...]) -> None:
        """Refuse a form that is not faster, its checks of every call included; a loss is not believed on one race.

        Raises:
            CaptureError: it is not faster, or does not cover its own example.
        """
        if not form.covers(args):
            raise CaptureError(f"what was captured does not cover the example: {form.reason(args)}")
        for _ in range(2):
            before, after = interleaved([lambda: self._plain(*args), lambda: form.covers(args) and form.run(args)], rounds=25, budget_s=1.0)
            if after.minimum < before.minimum:
                log.info("%s: recipe %s is %.2f times faster than Dynamo's graph", self.label, self.recipe, before.minimum / after.minimum)
                return
        raise CaptureError(f"recipe {self.recipe} is not faster: {after.minimum:.3g} ms against {before.minimum:.3g} ms")

    # -- calls that the form does not cover ------------------------------------------------------------------------

    def _otherwise(self, state: State, form: Form, args: tuple[Any, ...]) -> Sequence[Any]:
        """A call that the form does not cover: Dynamo's graph answers."""
        changed = form.constants.changed(args)
        if changed:
            names = ", ".join(self.inputs[k].name for k in changed[:3]) + (", …" if len(changed) > 3 else "")
            log.warning("%s: weights were written since it was optimized (%s): Dynamo's graph runs%s", self.label, names,
                        f" until they stand still for {PATIENCE} calls" if state.chances else " from now on; torch.compiler.reset() starts anew")  # fmt: skip
            state.form = None
            return self._wait(state, args) if state.chances else self._plain(*args)
        if not self._uncovered:
            log.warning("%s: Dynamo's graph runs where the optimized one does not cover the call: %s", self.label, form.reason(args))
        self._uncovered = True
        return self._plain(*args)

    def _wait(self, state: State | None, args: tuple[Any, ...]) -> Sequence[Any]:
        """Weights that are new, or were written: once they stand still, a form is made of them; the first ones need not wait."""
        if state is None:
            state = State()
            if self.verdict is None:
                return self._make(state, args)
            if len(self.states) >= STATES:  # some that waited may be gone by now
                self.states = {k: s for k, s in self.states.items() if s.form is not None or self._waits - s.seen < 8 * STATES}
            if len(self.states) >= STATES:
                _once(f"{self.label}: it runs on more than {STATES} sets of weights; Dynamo's graph runs for the rest")
                return self._plain(*args)
            self.states[tuple([id(args[k]) for k in self._weights])] = state
        state.seen = self._waits = self._waits + 1
        marks = {k: mark(args[k]) for k in self._weights}
        moved = {k for k in marks if state.marks.get(k) != marks[k]}
        if moved and state.marks and not any(isinstance(args[k], nn.Parameter) for k in moved):
            # written between two calls while the parameters stood still: inputs like others
            self._varying |= moved
            self._weights, self.states = [k for k in self._weights if k not in moved], {}
        state.calm = 0 if moved else state.calm + 1
        state.marks = marks
        return self._make(state, args) if state.calm >= PATIENCE else self._plain(*args)

    def _gone(self, state: State) -> None:
        """The user dropped a constant: the model, most likely. What was made of it goes too."""
        state.form = None
        self.states = {k: s for k, s in self.states.items() if s is not state}


class Form:
    """The optimized form of a graph, and which calls it covers.

    Raises:
        CaptureError: its outputs have other strides, or share memory otherwise, than those of Dynamo's graph.
    """

    def __init__(self, built: search.Built, split: Split, constants: Constants, seen: Trial):
        self.constants, self.runner, self.guard = constants, built.lowered.runner, Guard(built.captured)
        self.free, self.fixed, self.tensors, self.rest = split.free, split.fixed, split.tensors, split.rest
        self.count = len(seen.outputs)
        self.grads = _grads(seen.args) if seen.gradients else None
        self.copied = self._copied(split, seen)

    def covers(self, args: tuple[Any, ...]) -> bool:
        """Whether it may answer a call."""
        if torch.is_grad_enabled() and self.grads != _grads(args):
            return False
        return (self.constants.same(args) and all(args[k] == value for k, value in self.fixed)
                and self.guard.check([args[k] for k in self.free]) is None)  # fmt: skip

    def reason(self, args: tuple[Any, ...]) -> str:
        """Why it does not cover a call."""
        if torch.is_grad_enabled() and self.grads != _grads(args):
            return "gradients are asked for"
        other = next((f"an integer is {args[k]}; covered: {v}" for k, v in self.fixed if args[k] != v), None)
        return other or self.guard.check([args[k] for k in self.free]) or "weights were written"

    def run(self, args: tuple[Any, ...]) -> Sequence[Any]:
        """Outputs as Dynamo's graph gives them."""
        outs = list(self.runner(*[args[k] for k in self.free]))
        for k, form in self.copied.items():
            outs[k] = outs[k].clone(memory_format=form)
        if self.rest is None:
            return outs
        mine, rest = iter(outs), iter(self.rest(*args))
        return [next(mine) if k in self.tensors else next(rest) for k in range(self.count)]

    def _copied(self, split: Split, seen: Trial) -> dict[int, torch.memory_format]:
        """Tensors to be copied before they are given away, and how they are to lie then.

        Their memory is ours, or shared where Dynamo's graph shares none, or it is laid out otherwise: strides are part of an
        answer, Dynamo may have reckoned with them.
        """
        wanted = [seen.outputs[k] for k in self.tensors]
        theirs = _sharing(wanted, [*split.leaves(seen.args), *(seen.args[k] for k in split.constants)])
        leaves, again = (split.leaves(seen.copies()) for _ in range(2))
        first, second = self.runner(*leaves), self.runner(*again)
        ours, kept = _sharing(first, leaves), {_place(t) for t in second} - {None}
        found = {}
        for k, (a, b) in enumerate(zip(first, wanted, strict=True)):
            form = _laid_out(a, b) if (a.shape, a.dtype) == (b.shape, b.dtype) else None
            if form is None:
                raise CaptureError(f"output {k} is {_words(a)} instead of {_words(b)}")
            if (ours[k] is None and _place(a) in kept) or (ours[k] is not None and theirs[k] is None) or form != torch.preserve_format:
                found[k] = form
            same = theirs[k] == ours[k] and a.storage_offset() == b.storage_offset() and k not in found
            if theirs[k] is not None and not (same and theirs[k] not in [("output", j) for j in found]):
                raise CaptureError(f"output {k} shares memory with an input or another output, and the captured graph's does not")
        return found


def _laid_out(tensor: Tensor, like: Tensor) -> torch.memory_format | None:
    """The memory format in which a copy of ``tensor`` has the strides of ``like``; None where there is none."""
    if _strides(tensor) == _strides(like):
        return torch.preserve_format
    formats = [torch.contiguous_format, *{4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(tensor.ndim, [])]
    return next((f for f in formats if _strides(tensor.clone(memory_format=f)) == _strides(like)), None)


def _strides(tensor: Tensor) -> list[int]:
    """Strides where they mean something: of dimensions longer than 1."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and tensor.numel()]


def _grads(args: Sequence[Any]) -> list[bool]:
    return [a.requires_grad for a in args if isinstance(a, Tensor)]


def _place(tensor: Tensor) -> int | None:
    """The address of a tensor's storage; None for an empty one."""
    return tensor.untyped_storage().data_ptr() or None


def _sharing(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[tuple[str, int] | None]:
    """For each output, the first input or earlier output that lies in the same memory."""
    seen: dict[int, tuple[str, int]] = {}
    found: list[tuple[str, int] | None] = []
    for kind, tensors in (("input", inputs), ("output", outputs)):
        for k, tensor in enumerate(tensors):
            place = _place(tensor)
            if kind == "output":
                found.append(seen.get(place) if place is not None else None)
            if place is not None:
                seen.setdefault(place, (kind, k))
    return found


def _words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} with strides {list(tensor.stride())}"


__all__ = ["Fragment", "backend"]
