"""The example plug-in, installed by pip into a folder of its own and used by fresh processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder of packages with the plug-in in it; the sources are copied first, since building writes beside them."""
    work = tmp_path_factory.mktemp("plugin")
    shutil.copytree(SOURCE, work / "source", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", str(work / "site"), str(work / "source")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return work / "site"


def run(code: str, cwd: Path, *sites: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """A fresh process in which these folders are installed."""
    paths = [*map(str, sites), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=env, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture
def broken(site, tmp_path):
    """``broken(file, old, new)``: the plug-in with a fault."""

    def make(file: str, old: str, new: str) -> Path:
        copy = tmp_path / "broken"
        shutil.copytree(site, copy, ignore=shutil.ignore_patterns("__pycache__"))
        path = copy / "scaled_softsign" / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        return copy

    return make


PLAIN = """
import torch, graphwright as gw
class M(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x * 1.7 / (1 + x.abs()))
x = torch.randn(64, 256)
fast = gw.optimize(M().eval(), x)
torch.testing.assert_close(fast(x), M()(x))
"""


@pytest.mark.slow
def test_its_kernels_and_its_pass_keep_their_promises(site, tmp_path):
    run("""
import warnings
import graphwright as gw
from graphwright.passes.pipeline import resolve
(p,) = resolve("raise-softsign")
assert p.origin.distribution == "scaled-softsign 1.2"
import torch
from torch import nn
class M(nn.Module):
    def forward(self, x):
        return x / (1 + x.abs()), x * 2.5 / (x.abs() + 1), x * x.exp() / (1 + x.abs())
found = gw.testing.check_pass(p, (M(), torch.randn(3, 4)))
assert len(found.changed["the program"]) == 2 and any("no number" in why for _, why in found.refused["the program"]), found
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    gw.testing.check_pass(p)
assert gw.testing.check_kernel("scaled_softsign.numpy") == gw.testing.check_kernel("scaled_softsign.compiled") == 4
""", tmp_path, site)  # fmt: skip


def test_a_model_that_spells_it_out_gets_the_op_without_asking(site, tmp_path):
    done = run(PLAIN + """
(record,) = [r for r in fast.report.passes if r.name == "raise-softsign"]
assert len(record.result.changes) == 1, record
print(fast.report.warnings)
""", tmp_path, site)  # fmt: skip
    assert done.stdout.strip() == "[]"


CALLS = """
import torch, graphwright as gw
from scaled_softsign import scaled_softsign
class M(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)
    def forward(self, x):
        return scaled_softsign(self.linear(x), 1.7)
torch.manual_seed(0)
model, x = M().eval(), torch.linspace(-3, 3, 64 * 64).view(64, 64)
fast = gw.optimize(model, x)
(row,) = [r for r in fast.report.sites if r.op == "scaled_softsign.softsign"]
options = {o.name: (o.ms, o.problem) for o in row.options}
assert set(options) == {"aten.native", "scaled_softsign.numpy", "scaled_softsign.compiled"} and all(ms for ms, _ in options.values()), options
assert row.flops == 4 * 64 * 64
fast.save("m.gw")
torch.save(fast(x), "answer.pt")
"""
LOADS = """
import torch, graphwright as gw
fast = gw.load("m.gw")
x = torch.linspace(-3, 3, 64 * 64).view(64, 64)
assert torch.equal(fast(x), torch.load("answer.pt"))
print(fast.report.warnings)
"""


def test_its_kernels_race_and_a_saved_result_says_what_it_needs(site, tmp_path):
    run(CALLS, tmp_path, site)
    assert run(LOADS, tmp_path, site).stdout.strip() == "[]"  # not imported: the entry point is followed
    said = run(LOADS, tmp_path, status=1).stderr
    assert "m.gw needs the op 'scaled_softsign.softsign', which is not registered in this process" in said
    assert "First import scaled_softsign.ops (package scaled-softsign 1.2), then load the file again." in said


@pytest.mark.slow
def test_it_is_listed_and_benchmarked(site, tmp_path):
    command = "from graphwright.cli import app; app({!r}, prog_name='graphwright')"
    text = " ".join(run(command.format(["passes"]), tmp_path, site).stdout.split())
    assert "raise-softsign scaled-softsign 1.2 in the default pipeline, stage raise" in text
    assert "op scaled_softsign.softsign scaled-softsign 1.2 scale * x / (1 + |x|)." in text
    assert "kernel scaled_softsign.numpy scaled-softsign 1.2 for scaled_softsign.softsign, f32, on cpu" in text
    text = run(command.format(["bench", "kernels", "--op", "softsign", "--rounds", "3", "--device", "cpu"]), tmp_path, site).stdout
    assert text.count("scaled_softsign.softsign (scaled_softsign)") == 2 and "NOT TIMED" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("__init__.py", "from scaled_softsign.ops", "import no_such_module\nfrom scaled_softsign.ops", "plug-in 'scaled-softsign' (scaled_softsign:register) of scaled-softsign 1.2 is left out"),
        ("passes.py", 'stage="raise"', 'after="no-such-pass"', "no pass 'no-such-pass' is in the default pipeline"),
        ("passes.py", "return op.scaled_softsign", "return 1 / 0 or op.scaled_softsign", "pass raise-softsign was left out: a plug-in of scaled-softsign 1.2 that failed"),
        ("passes.py", "softsign(x, float(scale))", "softsign(x, 2 * float(scale))", "pass raise-softsign was undone"),
    ],
)
def test_a_plug_in_with_a_fault_breaks_nothing_and_is_named(file, old, new, words, broken, tmp_path):
    done = run(PLAIN + "print(fast.report.warnings)", tmp_path, broken(file, old, new))
    assert words in done.stdout + done.stderr and "scaled-softsign 1.2" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
