"""What would be done to a model, told without optimizing it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import graphwright as gw
from graphwright.cli import app


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return {"scores": y, "order": y.argsort(-1)}


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.last = Net(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)["scores"]
        if y.sum().item() > 0:
            y = y * 2
        return self.last(y)


X = torch.randn(2, 3, 8, 8)


@pytest.fixture(scope="module")
def told() -> gw.Explanation:
    return gw.explain(Net().eval(), X)


def test_it_tells_of_capture_passes_and_kernels(told):
    assert told.whole and told.captured == 6 and told.left == len(told.ops) == 4
    assert told.fired()["fold-batch-norm"] == [("norm", "batch norm folded into conv2d conv")]
    by_op = {r.op: r for r in told.ops}
    assert by_op["graphwright.conv"].sites == ("conv", "norm", "relu") and "onednn.f32" in by_op["graphwright.conv"].candidates
    assert by_op["aten.argsort"].candidates == () and "i64" in by_op["aten.argsort"].reason
    text = told.text(width=140)
    for words in ("Captured whole: 6 ops, 4 after the passes", "relu drawn into conv", "nothing to do for", "it gives i64"):
        assert words in text
    assert str(told) and max(map(len, told.text(width=80).splitlines())) <= 80


def test_nothing_is_timed_or_built(monkeypatch):
    monkeypatch.setattr("graphwright.lower.stopwatch.Stopwatch.work", lambda *a: pytest.fail("timed"))
    monkeypatch.setattr("graphwright.lower.runner.emit", lambda *a, **k: pytest.fail("built"))
    model = Net().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    told = gw.explain(model, X, "int8")
    assert "quantize" in told.fired() and any("ranges come from the example" in n for n in told.notes)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_pattern_narrows_it(told):
    part = told["no*"]
    assert [r.op for r in part.ops] == ["graphwright.conv"] and set(part.fired()) == {"fold-batch-norm", "fuse-epilogue"}
    assert part.text(width=120).count("kernels") == 1 and "relu drawn into conv" in str(part)
    assert gw.explain(Net().eval(), X, site="no*").ops == part.ops
    with pytest.raises(gw.SiteError, match="matches no site\n.*did you mean 'conv'"):
        told["convv"]
    with pytest.raises(gw.SiteError, match="no site pattern"):
        told[3]


def test_a_site_that_is_gone_has_its_story():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.lin(x)) * 1.0

    told = gw.explain(Dropped().eval(), torch.randn(2, 4))
    assert "canonicalize" in str(told["drop"])


def test_json_is_plain_data(told):
    data = json.loads(told["conv"].to_json())
    assert data["site"] == "conv" and data["ops"][0]["op"] == "graphwright.conv"
    assert {p["name"] for p in data["passes"]} >= {"canonicalize", "fuse-epilogue"}


def test_what_capture_refuses_is_told_with_its_line():
    told = gw.explain(Branching().eval(), X)
    assert not told.whole and told.pieces == ("net", "last")
    (refused,) = told.refused
    assert "test_explaining.py:" in refused.where
    assert refused.source == "if y.sum().item() > 0:" and "values of tensors" in refused.reason
    assert {r.sites[0] for r in told.ops} == {"net.conv", "net.mean", "net.head", "net.argsort", "last"}
    assert refused.source in str(told) and "in 2 pieces" in str(told)
    assert told["net.*"].fired()["fold-batch-norm"]


def test_ops_without_a_row_are_opaque():
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.trapezoid(torch.special.modified_bessel_i0(x))

    told = gw.explain(Odd(), torch.rand(3, 4))
    assert told.opaque, [r.op for r in told.ops]
    assert all(not r.candidates and "no row in the op table" in r.reason for r in told.ops if r.opaque)
    assert "Opaque" in str(told)


def test_declined_sites_have_reasons():
    torch.manual_seed(0)
    told = gw.explain(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)).eval(), X)
    assert told.declined() and all(reason for _, reason, _ in told.grouped_refusals())
    assert "Passes that declined" in str(told)


def test_sizes_may_vary_and_calibration_be_given():
    told = gw.explain(Net().eval(), {"x": X}, "int8", dynamic="auto", calibration=[{"x": X}, {"x": 2 * X}])
    assert "s" in told["conv"].ops[0].shape.partition("[")[2] and not any("from the example" in n for n in told.notes)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("model", X), "the original nn.Module is wanted"),
        ((Net().eval(), None), "example inputs are missing"),
        ((Net().eval(), torch.randn(2, 5, 8, 8)), "the model rejects the example inputs"),
        ((Net().eval(), X, "int9"), "did you mean 'int8'"),
        ((Net().eval(), X, [gw.Quantize(include="nowhere")]), "matches no site"),
    ],
)
def test_bad_arguments(arguments, says):
    with pytest.raises(gw.InputError, match=says):
        gw.explain(*arguments)


def test_a_pass_that_breaks_the_program_is_named():
    class Lost(gw.Pass):
        """Lose a value."""

        name = "lost"

        def run(self, program: gw.Program) -> gw.PassResult:
            del program.nodes[0].meta["val"]
            return gw.PassResult(touched=True)

    with pytest.raises(gw.PassError, match=r"pass lost.*gw\.bisect"):
        gw.explain(Net().eval(), X, [Lost()])


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU()).eval()\n"
        "def both():\n    return build(), torch.ones(3, 16)\n"
    )
    run = lambda *words: CliRunner().invoke(app, ["explain", *words])
    done = run("net.py:build", "--inputs", "5x16", "--json", "told.json")
    assert done.exit_code == 0 and "Captured whole: 2 ops, 1 after the passes" in done.stdout and "capturing" in done.stderr
    assert json.loads(Path("told.json").read_text())["whole"] is True
    done = run("net.py:both", "--site", "0", "--recipe", "int8", "-q")
    assert done.exit_code == 0 and "quantize" in done.stdout and done.stderr == ""
    for words, says in ((["net.py:build"], "no example inputs"), (["net.py:both", "--site", "9"], "matches no site")):
        done = run(*words, "-q")
        assert done.exit_code == 2 and says in done.stderr and "Traceback" not in done.stderr
