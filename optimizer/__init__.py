"""Graphwright: a compiler-style optimizer for PyTorch models.

    import graphwright as gw
    fast = gw.optimize(model, example_inputs)

Importing this package imports nothing but the errors; everything else comes when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graphwright.errors import (
    CalibrationError,
    CaptureError,
    CheckError,
    CoverageError,
    GraphwrightError,
    InputError,
    InternalError,
    LoadError,
    PassError,
    RecipeError,
    SaveError,
    SiteError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from graphwright.api import load, optimize
    from graphwright.bisecting import bisect
    from graphwright.calibrate import Calibration
    from graphwright.comparing import compare
    from graphwright.decode.build import optimize_decoder
    from graphwright.decode.decoder import Decoder, Generation
    from graphwright.explaining import explain
    from graphwright.ir import Program
    from graphwright.kernel import Kernel, Sample
    from graphwright.kernel_registry import register_kernel
    from graphwright.manager import Pass, PassResult, Pipeline
    from graphwright.numerics import Exact, Lossy
    from graphwright.ops import op, register_op
    from graphwright.optimized import Optimized
    from graphwright.passes.allow_half import AllowHalf
    from graphwright.passes.pipeline import default_recipe, register_pass
    from graphwright.passes.quantize import Quantize
    from graphwright.report import Comparison, Explanation, Report
    from graphwright.repro import Repro, load_repro
    from graphwright.rewrite import RewritePass
    from graphwright.search import Goal
    from graphwright.structure import Output

__version__ = "0.1.0"

_HOMES = {
    "load": "api", "optimize": "api", "optimize_decoder": "decode.build", "Decoder": "decode.decoder", "Generation": "decode.decoder", "Calibration": "calibrate", "Program": "ir", "Pass": "manager", "PassResult": "manager",
    "Pipeline": "manager", "Exact": "numerics", "Lossy": "numerics", "op": "ops", "Optimized": "optimized",
    "bisect": "bisecting", "load_repro": "repro", "Repro": "repro", "default_recipe": "passes.pipeline", "register_pass": "passes.pipeline",
    "AllowHalf": "passes.allow_half", "Quantize": "passes.quantize", "explain": "explaining", "compare": "comparing", "Comparison": "report", "Explanation": "report", "Report": "report", "RewritePass": "rewrite", "Goal": "search", "Output": "structure",
    "register_op": "ops", "register_kernel": "kernel_registry", "Kernel": "kernel", "Sample": "kernel",
}  # fmt: skip

__all__ = [
    "AllowHalf", "Calibration", "CalibrationError", "CaptureError", "CheckError", "Comparison", "CoverageError", "Decoder", "Exact",
    "Explanation", "Generation", "Goal", "GraphwrightError", "InputError", "InternalError", "Kernel", "LoadError",
    "Lossy", "Optimized", "Output", "Pass", "PassError", "PassResult", "Pipeline", "Program", "Quantize", "RecipeError",
    "Report", "Repro", "RewritePass", "Sample", "SaveError", "SiteError", "UnsupportedError", "__version__", "bisect",
    "compare", "default_recipe", "explain", "load", "load_repro", "op", "optimize", "optimize_decoder",
    "register_kernel", "register_op", "register_pass",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "testing":  # a module of its own; whoever asks for it wants what is in it
        from importlib import import_module

        return import_module("graphwright.testing")
    if name not in _HOMES:
        raise AttributeError(f"module 'graphwright' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"graphwright.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
