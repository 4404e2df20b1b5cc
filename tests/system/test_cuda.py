"""On a GPU: the first thing to run where there is one.

    pytest tests/system/test_cuda.py

Recipes from end to end, the kernels behind the custom ops, CUDA graphs, half precision, files.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.kernels import gpu
from graphwright.numerics import sqnr_db

pytestmark = pytest.mark.gpu


class Block(nn.Module):
    """A transformer's block with what kernels must serve: norms, attention, an activation, residuals."""

    def __init__(self, width: int = 128, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        n, s, w = x.shape
        q, k, v = self.qkv(self.before(x)).view(n, s, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, s, w))
        return x + self.down(nn.functional.gelu(self.up(self.after(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(128, 96)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.one, self.norm, self.two = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.two(torch.relu(self.norm(self.one(x)))) + x)
        return self.head(x.mean((2, 3)))


def net(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = Net().eval().to("cuda", dtype)
    return model, torch.randn(2, 64, 128, device="cuda", dtype=dtype), [torch.randn(2, 64, 128, device="cuda", dtype=dtype) for _ in range(4)]


#: keeps a result that is smaller though it may not be faster: what is tested here are its numbers
KEEP = gw.Goal(size_mb=1e6)
#: least SQNR of the outputs against the model's own, in dB
FLOORS = {"default": 45.0, "bf16": 30.0, "int8": 15.0, "int8-dynamic": 20.0, "w8": 25.0, "w4": 8.0}
HALVES = {torch.float32: FLOORS["default"], torch.float16: 40.0, torch.bfloat16: 25.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", list(FLOORS))
def test_recipes(recipe, dtype):
    model, x, batches = net(dtype)
    before = copy.deepcopy(model.state_dict())
    fast = gw.optimize(model, x, recipe, calibration=batches if recipe == "int8" else None, goal=KEEP)
    with torch.no_grad():
        got, wanted = fast(x), model(x)
    assert got.dtype == wanted.dtype and got.device == wanted.device
    assert sqnr_db(wanted.float(), got.float()) >= min(FLOORS[recipe], HALVES[dtype]), fast.report
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert fast.report.machine["gpu"] == torch.cuda.get_device_name()
    assert any("CUDA graphs: launches are recorded" in n for n in fast.report.notes), fast.report.notes
    assert any("for the CPU, and the model is on cuda" in n for n in fast.report.notes)


@pytest.mark.parametrize("recipe, kernels", [("int8", {"linear_int8"}), ("int8-dynamic", {"linear_int8"}), ("w8", {"linear_w8", "linear_w8_groups"}), ("w4", {"linear_w4"})])
def test_our_kernels_run_where_they_are_asked_for(recipe, kernels):
    if not kernels & {f.op.partition(".")[2] for f in gpu.families().values()}:
        pytest.skip(f"no Triton kernel for {', '.join(sorted(kernels))}")
    model, x, batches = net(torch.float16)
    fast = gw.optimize(model, x, recipe, calibration=batches if recipe == "int8" else None, backend="triton")
    ours = [row for row in fast.report.sites if row.backend == "triton"]
    assert ours, fast.explain()
    with torch.no_grad():
        assert sqnr_db(model(x).float(), fast(x).float()) >= FLOORS[recipe]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_convolutions(dtype):
    torch.manual_seed(0)
    model = Images().eval().to("cuda", dtype)
    batches = [torch.randn(4, 3, 64, 64, device="cuda", dtype=dtype) for _ in range(3)]
    for recipe, floor in (("default", min(40.0, HALVES[dtype])), ("int8", 15.0)):
        fast = gw.optimize(model, batches[0], recipe, calibration=batches if recipe == "int8" else None, goal=KEEP)
        with torch.no_grad():
            assert sqnr_db(model(batches[0]).float(), fast(batches[0]).float()) >= floor, fast.report


# -- graphs ------------------------------------------------------------------------------------------------------------------


def runner(fast):
    return fast._variants[-1].built.lowered.runner


def test_results_are_the_callers_own_on_every_stream():
    model, x, batches = net()
    fast = gw.optimize(model, x, goal=KEEP)
    first = fast(x)
    kept = first.clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        others = [fast(b) for b in batches]
    torch.cuda.synchronize()
    assert torch.equal(first, kept)
    with torch.no_grad():
        for b, other in zip(batches, others, strict=True):
            assert sqnr_db(model(b), other) >= FLOORS["default"]
    assert runner(fast).replay.reason is None and runner(fast).replay.shapes == 1


def test_what_waits_for_the_device_is_launched_with_the_reason():
    class Waiting(nn.Module):
        def forward(self, x):
            return torch.nonzero(x > 0)

    x = torch.randn(8, 8, device="cuda")
    fast = gw.optimize(Waiting(), x)
    assert torch.equal(fast(x), torch.nonzero(x > 0))
    if fast._variants[-1].built is not None:
        assert any("no CUDA graph" in n for n in fast.report.notes), fast.report.notes


def test_open_sizes():
    model, x, _ = net()
    fast = gw.optimize(model, x, dynamic="auto", goal=KEEP)
    with torch.no_grad():
        for size in (1, 3, 5, 3, 5):
            y = torch.randn(size, 64, 128, device="cuda")
            assert sqnr_db(model(y), fast(y)) >= FLOORS["default"]


def test_a_result_may_stand_in_somebody_elses_graph():
    model, x, _ = net()
    fast = gw.optimize(model, x, goal=KEEP)
    fast(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = fast(x)
    graph.replay()
    torch.cuda.synchronize()
    with torch.no_grad():
        assert sqnr_db(model(x), out) >= FLOORS["default"]


def test_buffers_are_written_once_per_call():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen.add_(1.0)
            return x * self.seen

    model, x = Counting().cuda().eval(), torch.ones(64, device="cuda")
    fast = gw.optimize(model, x)
    start = float(fast(x)[0])
    assert [float(fast(x)[0]) - start for _ in range(3)] == [1.0, 2.0, 3.0]


# -- where things lie --------------------------------------------------------------------------------------------------------


def test_inputs_elsewhere_are_named():
    model, x, _ = net()
    with pytest.raises(gw.InputError, match=r"input 0 lies on cpu, the model on cuda:0: pass x\.to\('cuda:0'\)"):
        gw.optimize(model, x.cpu())


def test_calibration_data_may_lie_on_the_cpu():
    model, x, batches = net()
    assert gw.optimize(model, x, "int8", calibration=[b.cpu() for b in batches], goal=KEEP)(x).device == x.device


def test_moves():
    model, x, _ = net()
    fast = gw.optimize(model, x, goal=KEEP)
    assert fast.to("cuda") is fast and fast.cuda() is fast and fast.cuda(0) is fast
    with pytest.raises(gw.UnsupportedError, match="can't be moved"):
        fast.cpu()


@pytest.mark.parametrize("recipe", ["default", "int8-dynamic"])
def test_files(recipe, tmp_path):
    model, x, _ = net(torch.float16)
    fast = gw.optimize(model, x, recipe, goal=KEEP)
    fast.save(tmp_path / "net.gw")
    again = gw.load(tmp_path / "net.gw")
    assert again._variants[-1].built.lowered.plan == fast._variants[-1].built.lowered.plan
    assert torch.equal(again(x), fast(x))


# -- ops ---------------------------------------------------------------------------------------------------------------------


def test_custom_ops_run_the_kernels():
    from graphwright.kernels.gpu import serving

    serving.register()
    x = torch.randn(64, 512, device="cuda", dtype=torch.float16)
    q, scales = torch.ops.graphwright.quantize_rows(x)
    family = gpu.families()["quantize_rows"]
    mine, mine_scales = family.run(x)
    assert torch.equal(q, mine) and torch.equal(scales, mine_scales)
    wide = torch.randn(2, 40_000, device="cuda")  # wider than a program holds: plain torch serves
    assert family.refuses(wide) is not None and torch.ops.graphwright.quantize_rows(wide)[0].dtype == torch.int8


@pytest.mark.parametrize("name", sorted(gpu.families()) if gpu.unavailable() is None else [])
def test_kernels_are_right_here(name):
    from graphwright.testing import gpu as numbers

    problems = [(sample.name, str(config), why) for sample, config in numbers.trials(gpu.families()[name])
                if (why := numbers.check(gpu.families()[name], sample, config))]  # fmt: skip
    assert problems == []
