"""One demo: a pretrained model, real inputs to calibrate on, and a score against labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphwright.demo.assets import Asset


@dataclass(frozen=True)
class DemoTask:
    """What the demo, the benchmarks and the system tests share.

    Attributes:
        name: as on the command line.
        title: model and data, for a heading.
        model: in eval mode, float32, on the CPU.
        example_inputs: a tuple (positional) or a dict (keyword) of tensors; `calibration` and `evaluate` use the
            same shapes.
        calibration: inputs like `example_inputs`; none of them is scored by `evaluate`.
        evaluate: score of a model that is called like `model`.
        metric: what `evaluate` returns.
        digits: how many of its digits behind the point mean something.
        higher_is_better: direction of the metric.
        sources: the packages that weights and data came from.
    """

    name: str
    title: str
    model: nn.Module
    example_inputs: Any
    calibration: Sequence[Any]
    evaluate: Callable[[nn.Module], float]
    metric: str
    digits: int
    higher_is_better: bool
    sources: tuple[Asset, ...]
