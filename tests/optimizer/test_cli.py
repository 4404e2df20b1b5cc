"""The command line, called in this process; files are made by a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from graphwright.cli import app
from graphwright.errors import InternalError

SOURCE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()

def both():
    return build(), torch.ones(3, 16)

def other():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()

def loader():
    torch.manual_seed(2)
    return [torch.randn(5, 16) for _ in range(4)]

def wide():
    return torch.ones(5, 17)

def score(model):
    return float(model(torch.ones(5, 16)).sum())

def broken_score(model):
    return {}["accuracy"]

def broken_loader():
    yield torch.ones(5, 16)
    raise OSError("the disk is gone")
"""


@pytest.fixture
def file(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(SOURCE)
    return "net.py"


def _run(*words: str, status: int = 0):
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == status, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def saved(file) -> str:
    _run("optimize", f"{file}:build", "--inputs", "5x16", "--out", "net.gw", "--quiet")
    return "net.gw"


def test_help_names_every_command():
    text = _run("--help").output
    for command in ("demo", "optimize", "inspect", "passes", "bench", "verify"):
        assert re.search(rf"^\W*{command}\b", text, re.MULTILINE)
        assert len(_run(command, "--help").output) > 200


def test_version():
    assert re.fullmatch(r"graphwright \d+\.\d+\.\d+\n", _run("--version").output)


def test_optimize_int8_writes_everything(file):
    result = _run(
        "optimize", f"{file}:build", "--inputs", "5x16", "--recipe", "int8", "--calibrate", f"{file}:loader",
        "--evaluate", f"{file}:score", "--max-drop", "0.5", "--explain", "0*",
        "--out", "net.gw", "--html", "net.html", "--json", "net.json",
    )  # fmt: skip
    assert "saved: net.gw" in result.stdout
    assert "capturing the model" in result.stderr and "capturing" not in result.stdout
    assert json.loads(Path("net.json").read_text())["recipe"] == "int8"
    assert Path("net.html").read_text().lstrip().lower().startswith("<!doctype html")


def test_quiet_has_no_progress(file):
    result = _run("optimize", f"{file}:both", "--quiet")
    assert result.stderr == "" and "recipe default" in result.stdout


def test_inputs_of_the_factory_serve_when_none_are_given(file):
    _run("optimize", f"{file}:both", "--out", "net.gw", "-q")
    import graphwright as gw

    assert gw.load("net.gw")(torch.ones(3, 16)).shape == (3, 4)


@pytest.mark.parametrize(
    "words, says",
    [
        (["net.py:build"], "no example inputs"),
        (["net.py:missing", "--inputs", "5x16"], "has no 'missing'"),
        (["net.py:build", "--inputs", "5xx"], "neither a shape nor"),
        (["net.py:build", "--inputs", "5x17"], "error: "),
        (["net.py:build", "--inputs", "net.py:wide"], "error: "),
        (["net.py:build", "--inputs", "5x16", "--recipe", "int9"], "did you mean 'int8'"),
        (["net.py:build", "--inputs", "5x16", "--recipe", "int8"], "calibration"),
        (["net.py:build", "--inputs", "5x16", "--max-drop", "-1"], "finite number"),
        (["net.py:both", "--out", "no/such/folder/net.gw"], "cannot be written"),
        (["net.py:both", "--html", "no/such/folder/net.html"], "cannot be written"),
        (["net.py:both", "--json", "no/such/folder/net.json"], "cannot be written"),
        (["net.py:both", "--explain", "nowhere.*"], "matches no site"),
        (["net.py:both", "--evaluate", "net.py:broken_score"], "net.py:27: net.py:broken_score raised KeyError"),
        (["net.py:both", "--evaluate", "net.py:SIZE"], "has no 'SIZE'"),
        (["net.py:both", "--recipe", "int8", "--calibrate", "net.py:broken_loader"], "net.py:31: net.py:broken_loader raised OSError"),
    ],
)
def test_what_a_user_can_mend_ends_with_status_2(file, words, says):
    assert says in _run("optimize", *words, "-q", status=2).stderr


def test_a_folder_that_is_missing_is_told_before_the_model_is_built(file, monkeypatch):
    monkeypatch.setattr("graphwright.userfile.model_of", lambda target: pytest.fail("built"))
    _run("optimize", f"{file}:both", "--out", "no/such/folder/net.gw", status=2)


def test_our_own_defects_are_not_dressed_as_the_users(monkeypatch):
    def broken(name):
        raise InternalError("an invariant is broken")

    monkeypatch.setattr("graphwright.listing.listing", broken)
    result = CliRunner().invoke(app, ["passes"])
    assert result.exit_code == 1 and isinstance(result.exception, InternalError)


def test_inspect(saved):
    text = _run("inspect", saved).stdout
    assert "recipe default" in text and f"{saved}: 0.0" in text
    assert "linear" in _run("inspect", saved, "--full").stdout
    assert "linear" in _run("inspect", saved, "--graph").stdout
    assert "captured" in _run("inspect", saved, "--sites", "0*").stdout
    assert "matches no site" in _run("inspect", saved, "--sites", "nowhere*", status=2).stderr


@pytest.mark.parametrize("command", ["inspect", "verify", "bench"])
def test_files_that_are_none(command, file):
    assert "error: " in _run(command, "nothing.gw", status=2).stderr
    Path("foreign.gw").write_bytes(b"PK\x03\x04 something else" * 9)
    assert "error: " in _run(command, "foreign.gw", status=2).stderr


def test_verify(saved, file):
    assert all(line.startswith("ok  ") for line in _run("verify", saved, "-q").stdout.splitlines())
    assert "ok    original: " in _run("verify", saved, "--against", f"{file}:build", "-q").stdout
    assert "FAIL  original: " in _run("verify", saved, "--against", f"{file}:other", "-q", status=1).stdout
    assert "no program covers these inputs" in _run("verify", saved, "--inputs", "6x16", "-q", status=2).stderr


def test_verify_finds_a_damaged_file(saved):
    data = bytearray(Path(saved).read_bytes())
    data[-5] ^= 1
    Path(saved).write_bytes(data)
    assert "error: " in _run("verify", saved, "-q", status=2).stderr


def test_verify_finds_a_wrong_kernel(saved, monkeypatch):
    from graphwright.lower.runner import Runner

    right = Runner.__call__
    monkeypatch.setattr(Runner, "__call__", lambda self, *leaves: tuple(x * 1.001 for x in right(self, *leaves)))
    assert "FAIL  kernels: RMS error" in _run("verify", saved, "-q", status=1).stdout


def test_verify_of_a_quantized_result(file, monkeypatch):
    """Inputs drawn at random lie far outside the calibrated range; kernels still do what the graph says."""
    from graphwright.lower.runner import Runner

    _run("optimize", f"{file}:build", "--inputs", "5x16", "--recipe", "int8", "--calibrate", f"{file}:loader",
         "--out", "net.gw", "-q")  # fmt: skip
    assert "FAIL" not in _run("verify", "net.gw", "-q").stdout
    right = Runner.__call__
    monkeypatch.setattr(Runner, "__call__", lambda self, *leaves: tuple(x * 1.5 for x in right(self, *leaves)))
    assert "FAIL  kernels: " in _run("verify", "net.gw", "-q", status=1).stdout


def test_bench(saved, file):
    alone = _run("bench", saved, "--rounds", "3", "-q").stdout
    assert "5x16" in alone and "1.00 x" in alone
    both = _run("bench", saved, "--against", f"{file}:both", "--inputs", "5x16", "--rounds", "3", "-q").stdout
    assert "original" in both and "net.gw" in both
    assert "FILE.gw" in _run("bench", status=2).stderr


def test_bench_kernels():
    assert "quantize" in _run("bench", "kernels", "--op", "graphwright.quantize", "--rounds", "3", "--no-peers", "--device", "cpu").stdout


def test_passes():
    from graphwright.passes.pipeline import DEFAULT, RECIPES

    text = _run("passes").stdout
    assert all(p.name in text for p in DEFAULT) and all(name in text for name in RECIPES)
    assert "max_bytes=1048576" in text
    one = _run("passes", "quantize").stdout
    assert "bias_correction" in one and "fold-batch-norm" not in one
    assert "fold-batch-norm" in _run("passes", "int8").stdout
    assert "did you mean 'quantize'" in _run("passes", "quantise", status=2).stderr
