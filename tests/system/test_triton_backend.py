"""Our Triton kernels within whole runs, by Triton's interpreter: what a GPU would be offered, on tensors of the CPU.

Each run in a process of its own: whether kernels are interpreted is settled when they are first imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from graphwright.kernels import gpu

_RUN = '''
import json, sys, tempfile
import torch
from torch import nn
import graphwright as gw
from graphwright.numerics import sqnr_db

class Block(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 48), nn.Linear(48, width)
    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
    def forward(self, x):
        return self.two(torch.relu(self.one(x)))

class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
    def forward(self, x):
        q, k, v = self.qkv(x).view(1, 8, 3, 2, 16).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

recipe, dtype, kind = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
model, shape = {"block": (Block(), (5, 32)), "images": (Images(), (1, 3, 6, 6)), "attention": (Attending(), (1, 8, 32))}[kind]
model = model.eval().to(dtype)
batches = [torch.randn(*shape).to(dtype) for _ in range(3)]
fast = gw.optimize(model, batches[0], recipe, calibration=batches if recipe == "int8" else None, backend="triton")
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    fast.save(folder + "/x.gw")
    again = gw.load(folder + "/x.gw")
    got, wanted = fast(batches[0]), model(batches[0])
    same = torch.equal(again(batches[0]), got) and again._variants[0].built.lowered.plan == fast._variants[0].built.lowered.plan
print(json.dumps({
    "kernels": {row.site: row.kernel for row in fast.report.sites}, "db": sqnr_db(wanted.float(), got.float()),
    "dtype": str(got.dtype) == str(dtype), "same": same, "verdict": fast.report.verdict, "text": fast.explain(),
    "steps": [s.name for s in fast._variants[0].built.lowered.runner.steps],
}))
'''


def ops_with_kernels() -> set[str]:
    return {f.op for f in gpu.families().values()} if gpu.unavailable() is None else set()


def run(recipe: str, dtype: str = "float32", kind: str = "block") -> dict:
    done = subprocess.run([sys.executable, "-c", _RUN, recipe, dtype, kind], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"}, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def needs(*names: str) -> pytest.MarkDecorator:
    missing = sorted({f"graphwright.{n}" for n in names} - ops_with_kernels())
    return pytest.mark.skipif(bool(missing), reason=f"no Triton kernel for {', '.join(missing)}")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
@needs("linear_int8", "quantize_rows")
def test_dynamic_int8(dtype):
    found = run("int8-dynamic", dtype)
    assert found["kernels"]["up"].startswith("triton.linear-int8") and "rows" in found["kernels"]["up"], found["text"]
    assert found["kernels"]["down"].startswith("triton.linear-int8"), found["text"]
    assert found["db"] > 25 and found["dtype"] and found["same"]
    assert "times" in found["verdict"], "a backend that was asked for stands, and the report says what it costs"


@pytest.mark.slow
@needs("norm_quantize_rows", "linear_int8")
def test_a_norm_hands_integers_to_the_product_after_it():
    found = run("int8-dynamic")
    assert found["kernels"]["norm"].startswith("triton.norm-quantize-rows"), found["text"]
    assert not any("native→rows" in s for s in found["steps"][:2]), found["steps"]


@pytest.mark.slow
@needs("linear_int8")
def test_static_int8():
    found = run("int8")
    assert found["kernels"]["up"].startswith("triton.linear-int8") and "static" in found["kernels"]["up"], found["text"]
    assert found["db"] > 20 and found["same"]


@pytest.mark.slow
@needs("conv2d_int8")
def test_static_int8_of_convolutions():
    found = run("int8", kind="images")
    assert found["kernels"]["two"].startswith("triton.conv2d-int8"), found["text"]
    assert found["db"] > 20 and found["same"]


@pytest.mark.slow
@needs("attention_int8_qk", "linear_int8")
def test_attention():
    found = run("int8-dynamic", kind="attention")
    assert any(k.startswith("triton.attention-int8") for k in found["kernels"].values()), found["text"]
    assert found["db"] > 20 and found["same"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@needs("linear_w8_groups")
def test_weights_alone(dtype):
    found = run("w8", dtype)
    assert found["kernels"]["up"].startswith("triton.linear-w8"), found["text"]
    assert found["db"] > 30 and found["dtype"] and found["same"]


@pytest.mark.slow
@needs("linear_w4")
def test_four_bits():
    found = run("w4", "float16")
    assert found["kernels"]["up"].startswith("triton.linear-w4"), found["text"]
    assert found["db"] > 15 and found["dtype"] and found["same"]


@pytest.mark.slow
@needs("quantize_rows", "norm_quantize_rows")
def test_kernels_that_are_not_there_are_not_offered():
    """A recipe runs with what there is: every site has a kernel, and the numbers hold."""
    found = run("int8-dynamic", "bfloat16")
    assert set(found["kernels"]) >= {"norm", "up", "down"} and found["db"] > 20 and found["dtype"] and found["same"]


_REGIONS = '''
import json, tempfile
import torch
from torch import nn
import graphwright as gw
from graphwright import search
from graphwright.lower import regions
from graphwright.numerics import sqnr_db

regions.race = lambda calls, reads: [1.0, 0.5, *[1.0] * len(calls[2:])][: len(calls)]
real = regions.interleaved
regions.interleaved = lambda calls, **k: sorted(real(calls, **k), key=lambda t: -t.minimum)
regions._WORTH = 0.0
search.revert = lambda built, why: built

class Gate(nn.Module):
    def forward(self, x, y):
        z = torch.tanh(x) * torch.sigmoid(y) + x * 2
        return torch.softmax(z / 3 + y, -1) * x

x, y = torch.randn(5, 24).half(), torch.randn(5, 24).half()
fast = gw.optimize(Gate().eval(), (x, y), dynamic=None)
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    fast.save(folder + "/x.gw")
    again = gw.load(folder + "/x.gw")
    got = fast(x, y)
    print(json.dumps({"names": [f.name for f in fast._variants[0].built.lowered.fused], "notes": [str(n) for n in fast.report.notes],
        "again": [f.name for f in again._variants[0].built.lowered.fused], "same": torch.equal(again(x, y), got),
        "db": sqnr_db(Gate()(x.double(), y.double()), got), "dtype": str(got.dtype)}))
'''


def test_regions_of_halves_become_triton_kernels():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _REGIONS], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["names"] == found["again"] == ["triton.region1"], found
    assert found["same"] and found["db"] > 60 and found["dtype"] == "torch.float16", found


_HALVES = _RUN.split("recipe, dtype, kind = sys.argv")[0] + '''
from graphwright import backends
from graphwright.lower.graph import analyse
from graphwright.lower.stopwatch import Stopwatch
from graphwright.manager import Pipeline
from graphwright.passes.pipeline import precisions, resolve
from graphwright.testing.models import program_of

kind, recipes = sys.argv[1], sys.argv[2:]
torch.manual_seed(0)
model, shape = {"block": (Block(), (5, 32)), "images": (Images(), (1, 3, 6, 6)), "attention": (Attending(), (1, 8, 32))}[kind]
found = {}
for recipe in recipes:
    program = program_of(model.eval(), (torch.randn(*shape),))
    program.calibration = ((torch.randn(*shape),),)
    passes = (*resolve(recipe), gw.AllowHalf(("fp16",)))
    after, _ = Pipeline(passes, strict=True).run(program)
    watch = Stopwatch(0, fresh=True)
    for work in analyse(after).works:
        options = [c for c in backends.candidates(work, precisions(passes)) if c.name == "aten.native" or c.halves and c.backend == "triton"]
        found |= {f"{recipe} {c.name}": t for c, t in zip(options, watch.work(work, options))}
print(json.dumps(found))
'''


@pytest.mark.parametrize(("kind", "recipes", "wanted"), [
    ("block", ["w8"], ["w8 triton.linear-w8-groups-fp16", "w8 triton.norm-quantize-f-fp16"]),
    pytest.param("block", ["w4", "int8-dynamic", "int8"], ["w4 triton.linear-w4-fp16", "int8-dynamic triton.norm-quantize-rows-both-fp16",
        "int8-dynamic triton.linear-int8-rows-f-fp16", "int8 triton.linear-int8-static-f-fp16", "int8 triton.norm-quantize-q-fp16"], marks=pytest.mark.slow),
    pytest.param("images", ["int8"], ["int8 triton.conv2d-int8-f-fp16"], marks=pytest.mark.slow),
    pytest.param("attention", ["int8-dynamic"], ["int8-dynamic triton.attention-int8-qk-f-fp16"], marks=pytest.mark.slow),
])  # fmt: skip
@needs("linear_w8_groups", "linear_int8", "norm_quantize")
def test_kernels_read_and_write_half_precision_where_it_is_allowed(kind, recipes, wanted):
    """A float32 program: each candidate that holds values in float16 passes the check that timing demands."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _HALVES, kind, *recipes], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"}, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not [f"{k}: {v}" for k, v in found.items() if isinstance(v, str) and not v.startswith("refused: ")]
    assert all(isinstance(found.get(name), float) for name in wanted), found
