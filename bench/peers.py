"""The peers: every other way to run the same model, and Graphwright's own recipes, behind one small interface.

A peer turns a model into a function that is called like it:

    run = peer.prepare(model, example_inputs, calibration_batches)
    outputs = run(example_inputs)

`available()` says in one line why a peer can't run here (a missing package, no C++ compiler), or None. Packages are
imported inside it and inside `prepare`, so that each is optional. Peers are used as their own documentation
advises, with no tuning beyond it. Every one takes the number of threads that torch is set to.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.models import Inputs, call, cast, tensors

Runner = Callable[[Inputs], object]


@dataclass(frozen=True)
class Peer(ABC):
    """One way to run a model. `precision` (float32, bf16 or int8) picks the tolerance for its outputs."""

    name: str
    precision: str
    packages: tuple[str, ...] = ()

    def available(self) -> str | None:
        """None, or one line that says what is missing; imports what `prepare` needs."""
        for package in self.packages:
            try:
                importlib.import_module(package)
            except Exception as error:  # noqa: BLE001 - a broken install raises anything on import
                return f"{package}: {first_line(error)}"
        return None

    @abstractmethod
    def prepare(self, model: nn.Module, inputs: Inputs, calibration: Sequence[Inputs]) -> Runner:
        """A function from inputs to outputs; `model` may be consumed. Raises whatever the peer raises."""

    def details(self, run: Runner) -> dict[str, Any]:
        """Facts about the prepared model worth keeping beside its timing; empty by default."""
        return {}


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


def arrays(outputs: object) -> list[np.ndarray]:
    """Every tensor or array in `outputs` in order, bf16 and float16 widened to float32; other leaves are dropped."""
    return [_array(leaf) for leaf in _leaves(outputs) if isinstance(leaf, Tensor | np.ndarray)]


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):  # ModelOutput is one
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _array(leaf: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(leaf, Tensor):
        leaf = leaf.detach()
        leaf = (leaf.float() if leaf.dtype in (torch.bfloat16, torch.float16) else leaf).numpy()
    return leaf.astype(np.float32) if leaf.dtype == np.float16 else leaf


# -- PyTorch itself --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Eager(Peer):
    """The model as it is, in inference mode; in bf16 weights and floating-point inputs are converted."""

    def prepare(self, model: nn.Module, inputs: Inputs, calibration: Sequence[Inputs]) -> Runner:
        return _inference(*_in_precision(model, self.precision))


@dataclass(frozen=True)
class Inductor(Peer):
    """`torch.compile` with frozen weights, which lets Inductor prepack them."""

    def available(self) -> str | None:
        return super().available() or _compiler()

    def prepare(self, model: nn.Module, inputs: Inputs, calibration: Sequence[Inputs]) -> Runner:
        model, dtype = _in_precision(model, self.precision)
        return _frozen(model, inputs, dtype)


@dataclass(frozen=True)
class TorchAO(Peer):
    """torchao's PT2E quantization with the x86 quantizer (static, per channel), compiled by Inductor, frozen."""

    def available(self) -> str | None:
        return super().available() or _compiler()

    def prepare(self, model: nn.Module, inputs: Inputs, calibration: Sequence[Inputs]) -> Runner:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        with torch.no_grad():
            observed = prepare_pt2e(_exported(model, inputs).module(), quantizer)
            for batch in calibration:
                call(observed, batch)
            quantized = convert_pt2e(observed)
        return _frozen(quantized, inputs, torch.float32)


def _in_precision(model: nn.Module, precision: str) -> tuple[nn.Module, torch.dtype]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return (model.to(dtype) if dtype != torch.float32 else model), dtype


def _inference(model: Callable[..., object], dtype: torch.dtype) -> Runner:
    def run(inputs: Inputs) -> object:
        # no_grad, not inference_mode: Inductor freezes only under it, and all PyTorch peers shall do the same
        with torch.no_grad():
            return call(model, inputs if dtype == torch.float32 else cast(inputs, dtype))

    return run


def _frozen(model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> Runner:
    """`model` compiled by Inductor with its weights as constants; compiled before this returns.

    The setting must hold globally while Dynamo traces: passed as `options={"freezing": True}` it comes too late,
    the weights stay inputs and nothing that depends on constant weights is folded.
    """
    from torch._inductor import config

    run = _inference(torch.compile(model, dynamic=False), dtype)
    with config.patch(freezing=True):
        run(inputs)
    return run


def _exported(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    with torch.no_grad():
        if isinstance(inputs, dict):
            return torch.export.export(model, (), dict(inputs))
        return torch.export.export(model, tuple(inputs))


def _compiler() -> str | None:
    return None if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler (g++ or clang++) for Inductor"


# -- ONNX Runtime ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnnxRuntime(Peer):
    """ONNX Runtime's CPU provider, all graph optimizations; int8 is static QDQ, weights per channel."""

    def prepare(self, model: nn.Module, inputs: Inputs, calibration: Sequence[Inputs]) -> Runner:
        import onnxruntime as ort

        with tempfile.TemporaryDirectory(prefix="bench-onnx-") as folder:
            path = _export_onnx(model, inputs, Path(folder) / "model.onnx")
            names = [i.name for i in ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs()]
            if self.precision == "int8":
                path = _quantize_onnx(path, [_feed(names, batch) for batch in calibration])
            options = ort.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.inter_op_num_threads = 1
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(None, _feed(names, inputs))


def _feed(names: list[str], inputs: Inputs) -> dict[str, np.ndarray]:
    if isinstance(inputs, dict):
        return {name: inputs[name].numpy() for name in names}
    return {name: t.numpy() for name, t in zip(names, inputs, strict=True)}


def _export_onnx(model: nn.Module, inputs: Inputs, path: Path) -> Path:
    """`model` in ONNX at `path`, through torch.export; inputs keep the names of the model's arguments."""
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, dict) else (tuple(inputs), None)
    with torch.no_grad():
        torch.onnx.export(model, args, str(path), kwargs=kwargs, dynamo=True, verbose=False)
    return path


def _quantize_onnx(path: Path, feeds: list[dict[str, np.ndarray]]) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rest, None)

    ready, quantized = path.with_name("ready.onnx"), path.with_name("int8.onnx")
    quant_pre_process(str(path), str(ready))
    quantize_static(
        str(ready),
        str(quantized),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return quantized


# -- OpenVINO --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenVINO(Peer):
    """OpenVINO's CPU plugin with the latency hint; int8 through NNCF's post-training quantization."""

    def available(self) -> str | None:
        if reason := super().available():
            return reason
        import openvino as ov

        if self.precision == "bf16" and "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return "openvino: this CPU has no bf16 instructions, and OpenVINO would run float32 instead"
        return None

    def prepare(self, model: nn.Module, inputs: Inputs, calibration: Sequence[Inputs]) -> Runner:
        import openvino as ov

        core = ov.Core()
        graph = ov.convert_model(_exported(model, inputs))
        if self.precision == "int8":
            graph = _quantize_openvino(graph, model, calibration)
        # What stays float in the int8 model runs in the type that the plugin prefers on this CPU.
        precision = {"float32": {"INFERENCE_PRECISION_HINT": "f32"}, "bf16": {"INFERENCE_PRECISION_HINT": "bf16"}}
        compiled = core.compile_model(
            graph,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": "1",
                "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
                **precision.get(self.precision, {}),
            },
        )
        request = compiled.create_infer_request()

        def run(inputs: Inputs) -> object:
            results = request.infer([t.numpy() for t in tensors(inputs)], share_inputs=True)
            return [results[port] for port in compiled.outputs]

        return run


def _quantize_openvino(graph: Any, model: nn.Module, calibration: Sequence[Inputs]) -> Any:
    import nncf

    attention = any("attention" in type(m).__name__.lower() for m in model.modules())
    data = nncf.Dataset(list(calibration), lambda batch: [t.numpy() for t in tensors(batch)])
    return nncf.quantize(
        graph, data, subset_size=len(calibration), model_type=nncf.ModelType.TRANSFORMER if attention else None
    )


# -- Graphwright -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graphwright(Peer):
    """`graphwright.optimize` with one of its recipes; static int8 gets the calibration batches."""

    recipe: str = "default"

    def available(self) -> str | None:
        reason = super().available()
        if reason is None and not hasattr(importlib.import_module("graphwright"), "optimize"):
            return "graphwright: has no `optimize`"
        return reason

    def prepare(self, model: nn.Module, inputs: Inputs, calibration: Sequence[Inputs]) -> Runner:
        import graphwright as gw

        data = {"calibration": list(calibration)} if self.recipe == "int8" else {}
        return _Optimized(gw.optimize(model, inputs, self.recipe, **data))

    def details(self, run: Runner) -> dict[str, Any]:
        """The verdict of its own side-by-side timing, the share of time per backend, ops per decision, phases."""
        assert isinstance(run, _Optimized)
        report = run.model.report
        return {
            "verdict": report.verdict,
            "own_speedup": report.speedup,
            "decisions": report.decisions(),
            "backend_shares": {name: round(share, 4) for name, share in report.backend_shares().items()},
            "seconds": {name: round(seconds, 3) for name, seconds in report.seconds.items()},
        }


class _Optimized:
    """A callable that keeps the optimized model within reach of `details`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, inputs: Inputs) -> object:
        with torch.no_grad():
            return call(self.model, inputs)


PEERS: tuple[Peer, ...] = (
    Eager("eager", "float32"),
    Eager("eager-bf16", "bf16"),
    Inductor("inductor", "float32"),
    Inductor("inductor-bf16", "bf16"),
    TorchAO("torchao-int8", "int8", ("torchao", "torchao.quantization.pt2e")),
    OnnxRuntime("ort", "float32", ("onnx", "onnxscript", "onnxruntime")),
    OnnxRuntime("ort-int8", "int8", ("onnx", "onnxscript", "onnxruntime")),
    OpenVINO("openvino", "float32", ("openvino",)),
    OpenVINO("openvino-bf16", "bf16", ("openvino",)),
    OpenVINO("openvino-int8", "int8", ("openvino", "nncf")),
    Graphwright("graphwright", "float32", ("graphwright",)),
    Graphwright("graphwright-bf16", "bf16", ("graphwright",), "bf16"),
    Graphwright("graphwright-int8", "int8", ("graphwright",), "int8"),
    Graphwright("graphwright-int8-dynamic", "int8", ("graphwright",), "int8-dynamic"),
)


def get(name: str) -> Peer:
    """The peer called `name`; KeyError with the known names otherwise."""
    for peer in PEERS:
        if peer.name == name:
            return peer
    raise KeyError(f"no peer {name!r}; known: {', '.join(p.name for p in PEERS)}")
