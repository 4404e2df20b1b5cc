"""A fault as a small program of its own: cut out of a model with its weights and inputs, kept in a data-only file, and replayed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright import store
from graphwright.backends.base import HALF
from graphwright.errors import InputError, LoadError
from graphwright.ir import Program, Signature, describe
from graphwright.lower import lower
from graphwright.manager import Pass
from graphwright.numerics import Exact, Lossy, run_double, run_pure, sqnr_db
from graphwright.passes.bisection import attempt
from graphwright.passes.pipeline import known_passes
from graphwright.report.words import show_db
from graphwright.structure import TENSOR, Spec, flatten_call

_ALL = frozenset({"f32", *HALF, "int8"})
#: Numbers that a replay shows of each output.
_SHOWN = 5


@dataclass(frozen=True)
class Difference:
    """One output on both sides.

    Attributes:
        sqnr_db: of ``after`` against ``before``; for exact passes both stand against float64 too, in ``problem``.
        differing: how many of the numbers are not the same.
        worst: the numbers furthest apart: ``(index, before, after, in float64)``.
        problem: why the promise is broken; None where it is kept.
    """

    output: int
    shape: str
    sqnr_db: float | None
    max_abs: float
    differing: int
    count: int
    worst: tuple[tuple[tuple[int, ...], float, float, float | None], ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class Replay:
    """What running a repro gave.

    Attributes:
        reproduced: the fault showed again.
        problem: in words.
    """

    name: str
    reproduced: bool
    problem: str | None
    outputs: tuple[Difference, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.name}: {'the fault shows: ' + str(self.problem) if self.reproduced else 'no fault shows'}"]
        for d in self.outputs:
            db = f", SQNR {show_db(d.sqnr_db)} dB" if d.sqnr_db is not None and math.isfinite(d.sqnr_db) else ""
            lines.append(f"  output {d.output} {d.shape}: {d.differing} of {d.count} numbers differ, by up to {d.max_abs:.4g}{db}")
            for index, was, now, wide in d.worst:
                exact = "" if wide is None else f" (in float64 {wide:.9g})"
                lines.append(f"    {list(index)}: before {was:.9g}, after {now:.9g}{exact}")
        return "\n".join(lines)


@dataclass(eq=False)
class Repro:
    """The smallest program found that shows a fault.

    Attributes:
        stage: ``"pass"`` or ``"kernel"``.
        name: of the pass or kernel.
        problem: what was wrong in the whole model.
        site: where.
        before: the sub-graph, with its weights; its inputs are ``inputs``.
        after: what the pass made of it; None where it raised, or left no program that could be kept.
        kernels: for the stage ``"kernel"``: the kernel of each node that is lowered to another than its own.
        options: of the pass, in words.
        by: the pass itself, as long as the process lives; a file does not hold it.
    """

    stage: str
    name: str
    problem: str
    site: str | None
    before: Program
    after: Program | None
    numerics: Exact | Lossy = field(default_factory=Exact)
    kernels: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    note: str = ""
    by: Pass | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The real values that the sub-graph was given in the model."""
        return self.before.example or ()

    def summary(self) -> str:
        """One line."""
        ops = len(self.before.nodes)
        shapes = ", ".join(describe(x) for x in self.inputs)
        return f"shown by a program of {ops} op{'s' * (ops != 1)} on {shapes or 'no inputs'}: .repro.replay(), .save(path)" + (f" ({self.note})" if self.note else "")

    def __str__(self) -> str:
        lines = [f"{self.stage} {self.name}" + (f" at {self.site}" if self.site else "") + f": {self.problem}", "before:"]
        lines += [f"  {line}" for line in self.before.text().splitlines()]
        if self.after is not None:
            lines += ["after:", *(f"  {line}" for line in self.after.text().splitlines())]
        lines += [f"  {node} runs as {kernel}" for node, kernel in self.kernels.items()]
        return "\n".join(lines)

    # -- replaying ---------------------------------------------------------------------------------------------

    def replay(self, again: Pass | None = None) -> Replay:
        """Run both sides on the inputs and compare.

        Args:
            again: run this pass on the ``before`` program now, in the place of what was kept: whether it is mended. Without
                it, a pass whose outcome could not be kept runs anew, after loading looked up by its name.

        Raises:
            InputError: the outcome was not kept, and no pass of that name is known here.
        """
        if self.stage == "kernel":
            return self._kernel()
        after = self.after
        if again is None and after is None:
            again = self.by or _known(self.name)
            if again is None:
                raise InputError(f"what pass {self.name!r} left was not kept, and no pass of that name is known here", where="replay()",
                                 hint="Pass it: repro.replay(MyPass()).")  # fmt: skip
        if again is not None:
            tried = attempt(again, self.before)
            if tried.kind:
                return Replay(again.name, True, tried.problem)
            after = tried.program
        assert after is not None
        try:
            now = run_pure(after, self.inputs)
        except Exception as error:  # noqa: BLE001  a program that does not run is the finding
            return Replay(self.name, True, f"the program no longer runs: {type(error).__name__}: {error}")
        return self._compared(now, self.numerics)

    def _kernel(self) -> Replay:
        lowered = lower(self.before, allowed=_ALL, plan=self.kernels)
        try:
            now = lowered.runner(*[x.clone() for x in self.inputs])
        except Exception as error:  # noqa: BLE001
            return Replay(self.name, True, f"it raised {type(error).__name__}: {error}")
        replay = self._compared(now, self.numerics)
        return replay if not lowered.notes else Replay(replay.name, replay.reproduced, "; ".join([str(replay.problem or ""), *lowered.notes]), replay.outputs)

    def _compared(self, now: Sequence[Any], numerics: Exact | Lossy) -> Replay:
        was = run_pure(self.before, self.inputs)
        try:
            wide: Sequence[Any] = run_double(self.before, self.inputs)
        except RuntimeError:  # an op without a float64 kernel
            wide = was
        found = [difference(k, w, a, b, numerics) for k, (w, a, b) in enumerate(zip(wide, was, now, strict=True)) if isinstance(a, Tensor)]
        problem = next((f"output {d.output}: {d.problem}" for d in found if d.problem), None)
        return Replay(self.name, problem is not None, problem, tuple(found))

    # -- on disk -----------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one data-only file: graphs, weights and inputs.

        Raises:
            SaveError: an op that no file may hold, or the file can't be written (an older one survives).
        """
        promise = [str(self.numerics), self.numerics.factor if isinstance(self.numerics, Exact) else self.numerics.floor_db]
        said = {"stage": self.stage, "name": self.name, "problem": self.problem, "site": self.site, "numerics": promise,
                "options": self.options, "note": self.note, "kept": self.after is not None}  # fmt: skip
        programs = [self.before, *([self.after] if self.after is not None else []), _holding(self.inputs)]
        variants = [store.Variant(p, {"kernels": self.kernels} if p is self.before else {}) for p in programs]
        store.save(path, store.Archive(variants, {"repro": said, "torch": torch.__version__}))


def load_repro(path: str | os.PathLike[str]) -> Repro:
    """A fault that ``gw.bisect`` cut out and saved: ``load_repro("bug.gw").replay()``. Data only: no code of the file's runs.

    Raises:
        LoadError: the file is truncated, altered, foreign, or a saved model (that is for ``gw.load``).
    """
    archive = store.load(path)
    said = archive.meta.get("repro")
    if not isinstance(said, dict):
        raise LoadError(f"{path} holds no repro", hint="It is a saved model: gw.load(path) reads it.")
    try:
        kept = bool(said["kept"])
        programs = [v.program.settled() for v in archive.variants]
        before, after, held = programs[0], programs[1] if kept else None, programs[-1]
        if len(programs) != 2 + kept or held.placeholders or len(held.output.args[0]) != len(before.placeholders):
            raise LoadError(f"{path}: programs and inputs do not fit together")
        kind, number = said["numerics"]
        numerics = Exact(float(number)) if kind == "exact" else Lossy(float(number))
        before.example = tuple(held())
        if after is not None:
            after.example = before.example
        kernels = {str(k): str(v) for k, v in archive.variants[0].plan.get("kernels", {}).items()}
        return Repro(str(said["stage"]), str(said["name"]), str(said["problem"]), said["site"], before, after, numerics, kernels,
                     dict(said["options"]), str(said["note"]))  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"{path}: the description of the repro is malformed ({error})") from error


def _known(name: str) -> Pass | None:
    kind = known_passes().get(name)
    return None if kind is None else kind()


def _holding(tensors: Sequence[Tensor]) -> Program:
    """A program without inputs that returns these tensors: how a file holds them."""
    graph, root = fx.Graph(), nn.Module()
    mode = torch._subclasses.FakeTensorMode()
    nodes = []
    for k, tensor in enumerate(tensors):
        root.register_buffer(f"input_{k}", tensor.detach())
        nodes.append(graph.create_node("get_attr", f"input_{k}", (), {}))
        nodes[-1].meta["val"] = mode.from_tensor(tensor.detach(), static_shapes=True)
    graph.output(tuple(nodes))
    return Program(fx.GraphModule(root, graph), Signature(flatten_call((), {})[1], Spec("tuple", None, (), (TENSOR,) * len(nodes))), mode)


def difference(k: int, wide: Tensor, was: Tensor, now: Any, numerics: Exact | Lossy) -> Difference:
    """One output compared: ``was`` and ``now``, with ``wide`` the same in float64."""
    problem = numerics.failure(wide, was, now)
    if not isinstance(now, Tensor) or now.shape != was.shape:
        return Difference(k, describe(was), None, math.inf, was.numel(), was.numel(), problem=problem)
    if was.is_complex():
        was, now, wide = (torch.view_as_real(t.resolve_conj()) for t in (was, now, wide))
    a, b, w = was.double(), now.double(), wide.double()
    off = (a - b).abs().nan_to_num(nan=math.inf)
    off = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, off)
    floats = was.is_floating_point()
    places = off.flatten().topk(min(_SHOWN, off.numel())).indices.tolist() if off.numel() else []
    worst = []
    for place in places:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), was.shape))
        if float(off[index]):
            worst.append((index, float(a[index]), float(b[index]), float(w[index]) if floats and wide is not was else None))
    db = sqnr_db(a.nan_to_num(), b.nan_to_num()) if floats else None
    return Difference(k, describe(was), db, float(off.max()) if off.numel() else 0.0, int((off > 0).sum()), off.numel(), tuple(worst), problem)
