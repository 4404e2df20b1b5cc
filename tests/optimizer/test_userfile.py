"""Objects and inputs that the command line names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from graphwright.errors import InputError
from graphwright.userfile import inputs_of, model_of, resolve, value_of

SOURCE = """
import beside
from torch import nn

def build():
    return nn.Linear(3, 2)

def both():
    return nn.Linear(3, 2), (1, 2)

ready = nn.ReLU()
numbers = [1, 2, 3]

def loader():
    yield from numbers

def broken():
    a = 1
    return a / 0

def not_a_model():
    return 7

class Holder:
    build = staticmethod(build)
"""


@pytest.fixture
def file(tmp_path) -> str:
    (tmp_path / "beside.py").write_text("x = 1\n")
    (tmp_path / "mine.py").write_text(SOURCE)
    return str(tmp_path / "mine.py")


def test_models(file):
    model, inputs = model_of(f"{file}:build")
    assert isinstance(model, nn.Linear) and inputs is None
    assert model_of(f"{file}:both")[1] == (1, 2)
    assert isinstance(model_of(f"{file}:ready")[0], nn.ReLU)
    assert isinstance(model_of(f"{file}:Holder.build")[0], nn.Linear)
    assert isinstance(model_of("torch.nn:Identity")[0], nn.Identity)


def test_a_file_is_imported_once_and_leaves_the_path_alone(file):
    before = list(sys.path)
    assert resolve(f"{file}:numbers", "--x") is resolve(f"{file}:numbers", "--x")
    assert sys.path == before


def test_values(file):
    assert value_of(f"{file}:numbers", "--calibrate") == [1, 2, 3]
    assert list(value_of(f"{file}:loader", "--calibrate")) == [1, 2, 3]


@pytest.mark.parametrize(
    "target, says",
    [
        ("mine.py", "does not say which object"),
        (":build", "does not say which object"),
        ("{file}:", "does not say which object"),
        ("nowhere/none.py:build", r"nowhere/none\.py is not a file"),
        ("{file}:biuld", r"has no 'biuld'(?s:.*)did you mean 'build'"),
        ("{file}:not_a_model", r"gives int, not a torch\.nn\.Module"),
        ("{file}:numbers", r"gives list, not a torch\.nn\.Module"),
        ("{file}:broken", r"mine\.py:19: .*broken raised ZeroDivisionError"),
        ("no_such_package_here:build", "raised ModuleNotFoundError"),
    ],
)
def test_wrong_targets(file, target, says):
    with pytest.raises(InputError, match=says):
        model_of(target.replace("{file}", file))


def test_a_file_that_fails_is_named_with_its_line(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("x = 1\nraise RuntimeError('no weights')\n")
    for _ in range(2):  # the failed import is not kept
        with pytest.raises(InputError, match=r"bad\.py:2: .*RuntimeError: no weights"):
            model_of(f"{bad}:build")
    syntax = tmp_path / "syntax.py"
    syntax.write_text("def f(:\n")
    with pytest.raises(InputError, match="SyntaxError"):
        model_of(f"{syntax}:f")


def test_relative_paths(file, monkeypatch):
    monkeypatch.chdir(Path(file).parent)
    assert isinstance(model_of("mine.py:build")[0], nn.Linear)


def test_shapes():
    a, b = inputs_of(["2x3", "4:int64"], seed=1)
    assert a.shape == (2, 3) and a.dtype == torch.float32 and a.std() > 0
    assert b.shape == (4,) and b.dtype == torch.int64 and set(b.tolist()) <= {0, 1}
    again = inputs_of(["2x3", "4:int64"], seed=1)
    assert torch.equal(a, again[0]) and not torch.equal(a, inputs_of(["2x3"], seed=2)[0])


def test_named_shapes():
    made = inputs_of(["ids=2x8:int64", "mask=2x8:bool", "x=3:bfloat16"])
    assert {k: (tuple(v.shape), v.dtype) for k, v in made.items()} == {
        "ids": ((2, 8), torch.int64),
        "mask": ((2, 8), torch.bool),
        "x": ((3,), torch.bfloat16),
    }


def test_inputs_from_a_file(file):
    assert inputs_of([f"{file}:numbers"]) == [1, 2, 3]


@pytest.mark.parametrize(
    "specs, says",
    [
        (["3xx4"], "neither a shape nor"),
        (["-1x3"], "neither a shape nor"),
        (["2x3", "file.py:x"], "neither a shape nor"),
        (["a=2", "3"], "some inputs have names"),
        (["a=2", "a=3"], "a name occurs twice"),
        (["2x3:flaot32"], r"no dtype is called 'flaot32'(?s:.*)did you mean 'float32'"),
    ],
)
def test_wrong_inputs(specs, says):
    with pytest.raises(InputError, match=says):
        inputs_of(specs)
