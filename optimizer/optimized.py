"""``Optimized``: what ``optimize`` and ``load`` return."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphwright import store
from graphwright.accelerator import device_of
from graphwright.capture import Capture, Guard, weights_fingerprint
from graphwright.capture.dynamic import Sizes
from graphwright.capture.rehearse import untouched
from graphwright.errors import CoverageError, InputError, SaveError, UnsupportedError
from graphwright.ir import Program
from graphwright.report import Report, explain
from graphwright.search import Built
from graphwright.structure import Spec, flatten_call

if TYPE_CHECKING:
    from graphwright.report.profile import Profile

#: captured shapes and structures that one result holds at the most; the oldest goes first, save the one that the report is about
MAX_VARIANTS = 8

#: held while a model is captured and optimized: tracing switches global settings of torch, and stopwatches disturb each other
WORKING = threading.RLock()


@dataclass(eq=False)
class Variant:
    """One captured structure: how to recognise a call that it covers, and what runs then.

    Attributes:
        built: None where the model could not be captured whole; then ``pieces`` runs, and ``parts`` are the builds in it.
        fixed: sizes, by (input, dimension), that were to vary and could not.
    """

    spec: Spec
    capture: Capture
    built: Built | None
    guard: Guard | None
    pieces: Callable[..., Any] | None = None
    parts: list[Built] = field(default_factory=list)
    fixed: frozenset[tuple[int, int]] = frozenset()

    def covers(self, leaves: list[Tensor], spec: Spec) -> str | None:
        """None, or why this variant can't serve the call."""
        if spec is not self.spec:
            if spec != self.spec:
                return f"the call's structure is {spec.describe()}; covered: {self.spec.describe()}"
            self.spec = spec  # structures of mere tensors are one object: the next comparison is free
        return self.guard.check(leaves) if self.guard is not None else None

    def sizes(self) -> Sizes | None:
        """Of every input, what is covered; None for a size that varies. None where the model was not captured whole."""
        if self.capture.program is None:
            return None
        shapes = (p.meta["val"].shape for p in self.capture.program.placeholders)
        return tuple(tuple(n if isinstance(n, int) else None for n in shape) for shape in shapes)

    def run(self, leaves: list[Tensor]) -> Any:
        if self.built is None:
            args, kwargs = self.spec.unflatten(leaves)
            assert self.pieces is not None
            with torch.no_grad():
                return self.pieces(*args, **kwargs)
        outs = self.built.lowered.runner(*leaves)
        return self.built.running.signature.outputs.unflatten(outs)

    @contextmanager
    def preserved(self, leaves: Sequence[Tensor]) -> Iterator[None]:
        """Runs inside leave no trace in the result's own state, nor in the inputs."""
        if self.built is not None:
            with self.built.captured.preserved(leaves):
                yield
            return
        assert self.capture.run is not None
        kept = [(t, t.clone(), t._version) for t in leaves]
        with untouched(self.capture.run):
            yield
        with torch.no_grad():
            for tensor, value, version in kept:
                if tensor._version != version:
                    tensor.copy_(value)


def _joined(reasons: list[str]) -> str:
    """Why no program covers a call; what they do cover is told together where it is the same size or shape."""
    parts = [r.partition("; covered: ") for r in dict.fromkeys(reasons)]
    if len({said for said, _, _ in parts}) == 1:
        return "".join(parts[0][:2]) + " or ".join(covered for *_, covered in parts)
    return "; ".join("".join(p) for p in parts)


class Optimized(nn.Module):
    """The fastest version of a model that was found; called like the model.

    It is a snapshot: later edits to the user's model don't reach it. A call whose shapes, dtypes or structure no
    captured program covers is captured anew while the user's model is alive and unedited (at most ``MAX_VARIANTS`` are
    kept), and sizes that have changed are left open then; after ``load`` it raises ``CoverageError``.

    Attributes:
        report: what was done and measured; ``print(report)``, ``.to_json()``, ``.to_html(path)``.
    """

    def __init__(self, compile_: Callable[..., Variant] | None, model: nn.Module | None, attributes: Mapping[str, Any] | None = None):
        super().__init__()
        self.training = False
        hidden = self.__dict__
        hidden["_compile"] = compile_
        hidden["_model"] = weakref.ref(model) if model is not None else None
        hidden["_marks"] = None
        hidden["_attributes"] = dict(attributes or {})
        hidden["_variants"] = []
        hidden["_report"] = None

    # -- calling -----------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = flatten_call(args, kwargs)
        variant = self._covering(leaves, spec)
        if variant is None:
            with WORKING:  # another thread may have captured the same meanwhile
                variant = self._covering(leaves, spec) or self._recapture(args, kwargs, leaves, spec)
        elif torch.is_grad_enabled() and any(x.requires_grad for x in leaves):
            raise UnsupportedError("gradients do not flow through an optimized model", where="input that requires grad",
                                   hint="Call it under torch.no_grad() or detach the inputs; train the original model instead.")  # fmt: skip
        return variant.run(leaves)

    def _covering(self, leaves: list[Tensor], spec: Spec) -> Variant | None:
        for variant in self.__dict__["_variants"]:
            if variant.covers(leaves, spec) is None:
                return variant
        return None

    def _recapture(self, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Tensor], spec: Spec) -> Variant:
        near = [v for v in self._variants if v.spec == spec]
        if self._compile is None:
            reasons = [v.covers(leaves, spec) or "" for v in near or self._variants]
            raise CoverageError(f"this call is not covered: {_joined(reasons) if reasons else 'nothing is covered yet'}",
                                hint="A loaded model covers what it was captured for: optimize again on inputs of these shapes, with dynamic='auto' (batch "
                                     "and tokens), or with the sizes that vary by name: dynamic={'x': {1: 'length'}}.")  # fmt: skip
        model = self._model() if self._model is not None else None
        if model is None:
            raise CoverageError("this call is not covered, and the original model is gone",
                                hint="Keep a reference to the original model while new shapes may come, or optimize with dynamic='auto'.")  # fmt: skip
        if self._marks is not None and self._fingerprint(model) != self._marks:
            raise CoverageError("this call is not covered, and the original model was edited since optimize()",
                                hint="Call optimize() again: the result is a snapshot of the model as it was.")  # fmt: skip
        with self._state_of_now(model):
            variant = self._compile(model, args, kwargs, near=near)
        self._add(variant, model)
        return variant

    @contextmanager
    def _state_of_now(self, model: nn.Module) -> Iterator[None]:
        """Lend the model the buffers as the captured programs have written them, so that a new one goes on from there."""
        written = {m.buffer: p.tensor(m.buffer) for p in self._captured() for m in p.signature.mutations if m.buffer}
        if not written:
            yield
            return
        with untouched(model):
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if name in written:
                        buffer.copy_(written[name])
            yield

    def _captured(self) -> list[Program]:
        return [v.built.captured for v in self._variants if v.built is not None]

    def _add(self, variant: Variant, model: nn.Module | None) -> None:
        """Take a variant in, and note how the model's weights stand: later ones must be captured from the same."""
        self.__dict__["_variants"] = [variant, *self._variants[:-1][: MAX_VARIANTS - 2], *self._variants[-1:]]
        if model is not None:
            self.__dict__["_marks"] = self._fingerprint(model)

    def _fingerprint(self, model: nn.Module) -> Any:
        return weights_fingerprint(model, ignore=[m.buffer for p in self._captured() for m in p.signature.mutations if m.buffer])

    # -- looking -----------------------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        """What was done and measured.

        Raises:
            InputError: no inputs have been seen yet.
        """
        if self._report is None:
            raise InputError("nothing has been optimized yet", where="Optimized.report",
                             hint="optimize(model) without example inputs waits for the first call: call the model once.")  # fmt: skip
        return self._report

    @property
    def program(self) -> Program:
        """The program that runs, for the inputs that were given to ``optimize``.

        Raises:
            InputError: the model could not be captured as one program, or no inputs have been seen.
        """
        built = self._first().built
        if built is None:
            raise InputError("the model was not captured as one program", where="Optimized.program",
                             hint="report.regions names what stands in the way.")  # fmt: skip
        program = built.running.settled()
        program.measured = self._report
        return program

    @property
    def captured(self) -> Program:
        """The program as it was captured, before any pass: ``fast.captured.diff(fast.program)`` shows what the passes made of it.

        Raises:
            InputError: as for ``program``; or the result was loaded or copied: a file holds what runs.
        """
        built = self._first().built
        if built is not None and built.captured is built.program:
            raise InputError("the captured program is not held", where="Optimized.captured",
                             hint="It stays with the result of optimize(): files and copies hold the program that runs.")  # fmt: skip
        return self.program if built is None else built.captured.settled()

    def _first(self) -> Variant:
        if not self._variants:
            _ = self.report
        return self._variants[-1]

    def explain(self, site: str = "*") -> str:
        """What happened at the sites that match an ``fnmatch`` pattern.

        Raises:
            SiteError: none matches.
        """
        built = self._first().built
        return explain(self.report, site, program=built.running if built else None)

    def profile(self, *args: Any, rounds: int = 20, budget_s: float = 5.0, **kwargs: Any) -> Profile:
        """How long each kernel takes while the model runs on these inputs, and what lies between; state and inputs stay as they were.

        Args:
            args, kwargs: as for a call; without any, the inputs that ``optimize`` was given.
            rounds: calls that are measured, at least 3, until ``budget_s`` seconds are over.

        Returns:
            ``print`` it; ``.to_chrome_trace(path)`` for Perfetto, ``.to_json(path)``, ``.rows``.

        Raises:
            CoverageError: no captured program covers the inputs, and the original model is gone.
        """
        from graphwright.profiling import profile

        return profile(self, args, kwargs, rounds=rounds, budget_s=budget_s)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            pass
        attributes = self.__dict__.get("_attributes") or {}
        if name in attributes:
            return attributes[name]
        reference = self.__dict__.get("_model")
        model = reference() if reference is not None else None
        if model is not None and not name.startswith("_"):
            value = getattr(model, name, None)
            if value is not None and not callable(value) and not isinstance(value, (nn.Module, Tensor)):
                return value
        raise AttributeError(f"an optimized model has no attribute {name!r}; submodules and methods of the original stay there")

    def __repr__(self) -> str:
        if not self._variants:
            return "Optimized(waiting for the first call)"
        return f"Optimized({self.report.model}: {self.report.verdict})"

    # -- storing -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write everything to one data-only file; ``gw.load`` needs neither the model's source nor pickle.

        Raises:
            SaveError: parts of the model were not captured, or the file can't be written (an older one survives).
        """
        from graphwright.saving import archive_of

        for variant in self._variants:
            if variant.built is None:
                named = "; ".join(map(str, variant.capture.regions))
                raise SaveError(f"parts of the model were not captured: {named}", where=str(path),
                                hint="Only captured programs can be stored; rewrite those lines so that torch.export takes them.")  # fmt: skip
        if not self._variants:
            raise SaveError("nothing has been optimized yet", where=str(path), hint="Call the model once first.")
        store.save(path, archive_of(self))
        self.report.file_bytes = Path(path).stat().st_size

    def export_onnx(self, path: str | Path) -> None:
        """Not offered yet; says what to do instead."""
        raise UnsupportedError("ONNX export is not offered yet", where=f"export_onnx({str(path)!r})",
                               hint="save() keeps the result for Graphwright; torch.onnx.export takes the original model.")  # fmt: skip

    # -- what nn.Module offers and a snapshot does not ---------------------------------------------------------

    def train(self, mode: bool = True) -> Optimized:
        if mode:
            raise UnsupportedError("an optimized model can't be trained", where="train()", hint="Train the original and optimize it again.")
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Optimized:
        raise UnsupportedError("an optimized model can't be moved or cast: its kernels were chosen for this device and dtype",
                               where=".to() / .half() / .cuda()", hint="Move the original model, then optimize it there.")  # fmt: skip

    def cuda(self, device: Any = None) -> Optimized:
        return self.to("cuda" if device is None else torch.device("cuda", device) if isinstance(device, int) else device)

    def cpu(self) -> Optimized:
        return self.to("cpu")

    def to(self, *args: Any, **kwargs: Any) -> Optimized:
        """Returns itself where nothing would change; anything else is refused."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        here, tensors = self._home(), [t for p in self._captured() for t in p.tensors().values() if t.is_floating_point()]
        stays = device is None or device.type == here.type and device.index in (None, here.index)
        if stays and (dtype in (None, torch.float32) and here.type == "cpu" or all(dtype in (None, t.dtype) for t in tensors)):
            return self
        return self._apply(None)

    def _home(self) -> torch.device:
        """Where it runs."""
        found = [device_of(p) for p in self._captured()]
        return next((d for d in found if d.type != "cpu"), torch.device("cpu"))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Tensors of the program that runs, by name: those that no pass replaced keep the original's names."""
        return {name: t.detach() for name, t in self.program.tensors().items()}

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError("weights can't be loaded into an optimized model: they are packed", where="load_state_dict()",
                               hint="Load them into the original and optimize it again.")  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimized:
        from graphwright.saving import twin

        return twin(self)

    def __copy__(self) -> Optimized:
        return copy.deepcopy(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError("an optimized model is not pickled", where="torch.save / pickle",
                               hint="Use fast.save(path) and gw.load(path): data only, no code runs on load.")  # fmt: skip
