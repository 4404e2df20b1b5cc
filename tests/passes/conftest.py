"""Captured programs, and one pass run strictly on them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.capture import capture
from graphwright.ir import Program
from graphwright.manager import Pass, PassResult, Pipeline


class Function(nn.Module):
    """A function of tensors as a module; keyword arguments become parameters (floats) and buffers."""

    def __init__(self, function: Callable[..., Any], **tensors: Tensor):
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


@pytest.fixture
def captured() -> Callable[..., Program]:
    """``captured(model_or_function, *args, dynamic=None, **tensors) -> Program`` with the arguments as its example."""

    def make(model: Any, *args: Tensor, dynamic: Any = None, train: bool = False, **tensors: Tensor) -> Program:
        torch.manual_seed(0)
        if not isinstance(model, nn.Module):
            model = Function(model, **tensors)
        program = capture(model.train(train), args, {}, dynamic=dynamic).program
        assert program is not None
        program.example = tuple(args)
        return program

    return make


@pytest.fixture
def run() -> Callable[..., tuple[Program, PassResult]]:
    """``run(program, *passes)``: the program afterwards and the last pass's result; numbers and ``modified`` are checked."""

    def apply(program: Program, *passes: Pass) -> tuple[Program, PassResult]:
        after, records = Pipeline(passes, strict=True).run(program)
        return after, records[-1].result

    return apply


@pytest.fixture
def ops() -> Callable[[Program], list[str]]:
    """The ops of a program, in order, without overloads."""
    from graphwright.passes._nodes import base

    return lambda program: [base(n).split(".")[1] for n in program.nodes]


@pytest.fixture
def body() -> Callable[[Program], str]:
    """The text of a program's ops and its outputs, without the tensors and inputs above them."""

    def text(program: Program) -> str:
        lines = program.text().splitlines()
        return "\n".join(x for x in lines if " = tensor " not in x and not x.endswith(" = input"))

    return text


@pytest.fixture(scope="session")
def random_model() -> Callable[..., tuple[nn.Module, Tensor]]:
    """``random_model(rng) -> (model, input)``, see programs.py: tests are not importable, so it is read by its path."""
    spec = importlib.util.spec_from_file_location("random_programs", Path(__file__).with_name("programs.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.random_model
