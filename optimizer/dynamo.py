"""The ``torch.compile`` backend: ``torch.compile(model, backend="graphwright", options={"recipe": "bf16"})``.

Dynamo cuts a model into graphs and calls ``backend`` with each. A graph is optimized on its first call, when its inputs
are real tensors: captured, passed and lowered as ``optimize`` does, then raced against Dynamo's graph as it is. What
can't be captured, needs gradients or is not faster runs as Dynamo's graph, and a line in the log ``graphwright.dynamo``
says so.

Parameters and buffers that a graph does not write become constants, so that they can be folded and packed; each call
checks that they are the same tensors, unwritten since. After a write Dynamo's graph runs, and once the weights have stood
still for a few calls the graph is optimized again.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright import search
from graphwright.capture import Guard, capture
from graphwright.capture.fragment import Constants, Run, Split, Trial, inputs_of, mark
from graphwright.capture.sites import user_line
from graphwright.capture.whole import explain
from graphwright.errors import CalibrationError, CaptureError, GraphwrightError, RecipeError, nearest
from graphwright.manager import Pass
from graphwright.measure import interleaved
from graphwright.passes.pipeline import precisions, resolve

log = logging.getLogger(__name__)

#: calls for which written weights must stand still before a graph is optimized again, and how often that may happen
PATIENCE = 3
CHANCES = 3


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
    return Fragment(graph, passes, name)


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


def _compiling() -> AbstractContextManager[Any]:
    """Dynamo's own lock, under which it compiles."""
    from torch._dynamo import convert_frame

    return getattr(convert_frame, "compile_lock", None) or nullcontext()


@functools.cache
def _once(text: str) -> None:
    log.warning(text)


class Fragment:
    """One of Dynamo's graphs: called with its inputs, gives its outputs, optimized where that is right and faster.

    Attributes:
        form: what runs instead of Dynamo's graph; None before the first call and where nothing does.
        verdict: what was decided, in words; None before the first call.
    """

    def __init__(self, graph: fx.GraphModule, passes: Sequence[Pass], recipe: str):
        self.graph, self.passes, self.recipe = graph, tuple(passes), recipe
        self.inputs = inputs_of(graph.graph)
        ops = [n for n in graph.graph.nodes if n.op.startswith("call_")]
        line = next((found for n in ops if (found := user_line(n.meta.get("stack_trace")))), None)
        self.label = f"graph of {len(ops)} op{'s' * (len(ops) != 1)}" + (f" from {line}" if line else "")
        self.form: Form | None = None
        self.verdict: str | None = None
        self._plain: Run = graph.forward
        self._lock = threading.Lock()
        self._chances, self._calm, self._uncovered = CHANCES, 0, False
        self._marks: dict[int, Any] = {}
        self._varying: set[int] = set()  # inputs that look like weights but change from call to call

    def __call__(self, *args: Any) -> Sequence[Any]:
        form = self.form
        if form is None:
            return self._first(args) if self.verdict is None else self._plain(*args)
        return form.run(args) if form.covers(args) else self._otherwise(form, args)

    def _first(self, args: tuple[Any, ...]) -> Sequence[Any]:
        """Run Dynamo's graph, and optimize it by what it was seen to do."""
        if not self._lock.acquire(blocking=False):
            return self._plain(*args)  # another thread is at it
        try:
            seen = Trial(self._plain, args)
            if seen.differentiable:
                self.verdict = "Dynamo's graph runs as it is: gradients are needed"
                _once("gradients are on: backend='graphwright' runs graphs that need them as they are. Call the compiled model under "
                      "torch.no_grad() or torch.inference_mode() to have it optimized for inference.")  # fmt: skip
                return seen.outputs
            try:
                # torch.export changes nn.Module while it traces: no other thread may compile meanwhile;
                # what is made here outlives the caller's mode
                with _compiling(), torch.inference_mode(False), torch.no_grad():
                    form = self._optimized(seen)
            except Exception as error:  # noqa: BLE001 - whatever goes wrong, the user's program runs on
                self.verdict = f"Dynamo's graph runs as it is: {explain(error)[1]}"
                log.warning("%s: %s", self.label, self.verdict)
                return seen.outputs
            self.form, self.verdict = form, "optimized"
            # it answers the first call too where asking twice leaves no trace
            return form.run(args) if seen.pure else seen.outputs
        finally:
            self._lock.release()

    def _optimized(self, seen: Trial) -> Form:
        """The form that runs from now on.

        Raises:
            CaptureError: Dynamo's graph is to stay; the reason.
            Exception: whatever a part refuses with.
        """
        seen.check()
        split = Split(self.graph, self.inputs, seen, self._varying)
        constants = Constants({k: seen.args[k] for k in split.constants}, self._gone)  # as they are before they are copied
        with torch.random.fork_rng(devices=[]):
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

    def _otherwise(self, form: Form, args: tuple[Any, ...]) -> Sequence[Any]:
        """Dynamo's graph answers; weights that were written and then stand still lead to a new form."""
        changed = form.constants.changed(args)
        if not changed:
            if not self._uncovered:
                log.warning("%s: Dynamo's graph runs where the optimized one does not cover the call: %s", self.label, form.reason(args))
            self._uncovered = True
            return self._plain(*args)
        marks = {k: mark(args[k]) for k in form.constants.slots if k not in self._varying}
        if not self._marks:
            names = ", ".join(self.inputs[k].name for k in changed[:3]) + (", …" if len(changed) > 3 else "")
            log.warning("%s: weights were written since it was optimized (%s): Dynamo's graph runs%s", self.label, names,
                        f" until they stand still for {PATIENCE} calls" if self._chances else " from now on; torch.compiler.reset() starts anew")  # fmt: skip
            moved = set(marks)
        else:
            moved = {k for k, m in marks.items() if m != self._marks.get(k)}
            # another object in each call, or a buffer written between any two: no weight
            self._varying |= {k for k in moved if marks[k][0] != self._marks[k][0] or not isinstance(args[k], nn.Parameter)}
        self._calm = 0 if moved - self._varying else self._calm + 1
        self._marks = marks
        if self._calm < PATIENCE or not self._chances:
            return self._plain(*args)
        self._anew()
        return self._first(args)

    def _anew(self) -> None:
        self._chances -= 1
        self._calm, self._marks, self.form, self.verdict = 0, {}, None, None

    def _gone(self) -> None:
        """The user dropped a constant: the model, most likely. What was made of it is freed; a later call starts anew."""
        if self.form is not None and self._chances:
            self._anew()


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
        for k in self.copied:
            outs[k] = outs[k].clone()
        if self.rest is None:
            return outs
        mine, rest = iter(outs), iter(self.rest(*args))
        return [next(mine) if k in self.tensors else next(rest) for k in range(self.count)]

    def _copied(self, split: Split, seen: Trial) -> list[int]:
        """Tensors to be copied before they are given away: their memory is ours, or shared where Dynamo's graph shares none."""
        wanted = [seen.outputs[k] for k in self.tensors]
        theirs = _sharing(wanted, [*split.leaves(seen.args), *(seen.args[k] for k in split.constants)])
        leaves, again = (split.leaves(seen.copies()) for _ in range(2))
        first, second = self.runner(*leaves), self.runner(*again)
        ours, kept = _sharing(first, leaves), {_place(t) for t in second} - {None}
        lasting = [ours[k] is None and _place(t) in kept for k, t in enumerate(first)]
        for k, (a, b) in enumerate(zip(first, wanted, strict=True)):
            if (a.shape, a.stride(), a.dtype) != (b.shape, b.stride(), b.dtype):
                raise CaptureError(f"output {k} is {_words(a)} instead of {_words(b)}")
            if theirs[k] is not None and (theirs[k] != ours[k] or a.storage_offset() != b.storage_offset()):
                raise CaptureError(f"output {k} shares memory with an input or another output, and the captured graph's does not")
            if lasting[k] and ("output", k) in theirs:
                raise CaptureError(f"output {k} is a constant that shares memory with another output")
        return [k for k in range(len(first)) if lasting[k] or (ours[k] is not None and theirs[k] is None)]


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
