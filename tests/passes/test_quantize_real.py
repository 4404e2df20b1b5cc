"""Int8 on pretrained weights and labelled data, computed from the IR: what the rounding alone costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graphwright.calibrate import collect
from graphwright.capture import capture
from graphwright.demo import load_task
from graphwright.demo.assets import AssetError
from graphwright.demo.task import DemoTask
from graphwright.errors import InputError
from graphwright.ir import Program
from graphwright.manager import Pipeline
from graphwright.passes.pipeline import default_recipe
from graphwright.passes.quantize import Quantize
from graphwright.structure import flatten_call

pytestmark = pytest.mark.slow


class Called(nn.Module):
    """A program that is called like the model it was captured from."""

    def __init__(self, program: Program):
        super().__init__()
        self.program = program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, _ = flatten_call(args, kwargs)
        return self.program.signature.outputs.unflatten(self.program(*leaves))


def fetched(name: str) -> DemoTask:
    try:
        return load_task(name)
    except (AssetError, InputError) as error:
        pytest.skip(f"the {name} task cannot be had here: {error}")


def exact(task: DemoTask) -> Program:
    given = task.example_inputs
    args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
    program = capture(task.model, args, kwargs).program
    assert program is not None
    program.example = tuple(flatten_call(args, kwargs)[0])
    program.calibration = collect(task.calibration, program.signature.inputs, program)
    return Pipeline(default_recipe(), strict=True).run(program)[0]


def test_resnet8_keeps_its_accuracy() -> None:
    task = fetched("cnn")
    program = exact(task)
    after, (record,) = Pipeline((Quantize(),), strict=True).run(program)
    assert len(record.result.changes) == 10 and not record.result.refusals
    assert record.error is not None and record.error > 20
    accuracy = task.evaluate(Called(after))
    assert accuracy >= 82.1, f"{accuracy:.2f} % of the test images; float: 82.24 %"
    assert after.size_bytes() < 0.31 * program.size_bytes()


def test_minilm_keeps_its_correlation_with_people() -> None:
    task = fetched("minilm")
    program = exact(task)
    reference = task.evaluate(task.model)
    for options in ({}, {"mode": "dynamic"}):
        after, (record,) = Pipeline((Quantize(**options),), strict=True).run(program)
        # 6 layers of 4 linears (query, key and value are one) and an attention, and the pooler
        assert len(record.result.changes) == 31
        assert abs(task.evaluate(Called(after)) - reference) <= 0.005
    ids = torch.zeros_like(task.example_inputs["input_ids"])
    assert torch.isfinite(after(*flatten_call((), {**task.example_inputs, "input_ids": ids})[0])[0]).all()
