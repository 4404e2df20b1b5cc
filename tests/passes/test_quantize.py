"""Quantize: what stands in the IR afterwards, what shares a scale, what is refused, and how large the error is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphwright.errors import CalibrationError, RecipeError, SiteError
from graphwright.ir import Program, arg, op_name
from graphwright.manager import PassResult, Pipeline
from graphwright.numerics import sqnr_db
from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.fold_batch_norm import FoldBatchNorm
from graphwright.passes.fuse_epilogue import FuseEpilogue
from graphwright.passes.observers import Percentile
from graphwright.passes.quantize import Quantize
from graphwright.passes.raise_linear import RaiseLinear

EXACT = (Canonicalize(), RaiseLinear(), FoldBatchNorm(), FuseEpilogue())

Prepare = Callable[..., Program]


@pytest.fixture
def fused(captured: Any) -> Prepare:
    """``fused(model, *args, batches=4)``: the program after the exact passes, with random calibration data."""

    def make(model: Any, *args: Tensor, batches: int = 4, **tensors: Tensor) -> Program:
        program, _ = Pipeline(EXACT, strict=True).run(captured(model, *args, **tensors))
        program.example = args
        torch.manual_seed(1)
        fresh = [tuple(torch.randn_like(a) if a.is_floating_point() else a for a in args) for _ in range(batches)]
        program.calibration = [args, *fresh]
        return program

    return make


def pairs(program: Program) -> dict[str, tuple[Any, ...]]:
    """By name of the quantized value: scale, zero point, lowest and highest integer, dtype."""
    found = [n for n in program.nodes if op_name(n.target) == "graphwright.quantize"]
    assert len({n.args[0] for n in found}) == len(found), "one pair per value"
    return {n.args[0].name: tuple(n.args[1:]) for n in found}


def behind_pair(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "call_function" and op_name(value.target) == "graphwright.dequantize"


def node(program: Program, name: str, which: int = 0) -> fx.Node:
    return [n for n in program.nodes if op_name(n.target).startswith(name)][which]


def renumbered(text: str) -> str:
    """Names of nodes numbered in order of appearance: what earlier passes created and erased no longer shows."""
    names: dict[str, str] = {}
    counts: dict[str, int] = {}

    def name(found: re.Match[str]) -> str:
        if found[0] not in names:
            k = counts[found[1]] = counts.get(found[1], -1) + 1
            names[found[0]] = f"{found[1]}_{k}"
        return names[found[0]]

    return re.sub(r"\b([a-z_0-9]+?)_default(?:_\d+)?\b", name, text)


class Small(nn.Module):
    """Two convolutions with a residual, pooling and a linear: what ResNets are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = F.relu(x + self.conv2(F.relu(self.conv1(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_golden_linear(fused: Prepare, run: Any, body: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2))
    program = fused(model, torch.linspace(-1, 1, 8).reshape(2, 4), batches=0)
    after, result = run(program, Quantize(bias_correction=False))
    numbers = pairs(after)
    x, hidden = (numbers[k] for k in numbers)
    assert x[0] == pytest.approx(2 / 255) and x[1] in (127, 128) and x[2:] == (0, 255, torch.uint8)
    assert renumbered(body(after)) == f"""\
quantize_0: u8[2, 4] = graphwright.quantize(input_1, {x[0]}, {x[1]}, 0, 255, torch.uint8)  # 0, 1
dequantize_0: f32[2, 4] = graphwright.dequantize(quantize_0, {x[0]}, {x[1]}, torch.float32)  # 0, 1
dequantize_channel_0: f32[3, 4] = graphwright.dequantize_channel(_0_weight_int8, _0_weight_scale, None, 0, torch.float32)  # 0, 1
linear_0: f32[2, 3] = graphwright.linear(dequantize_0, dequantize_channel_0, _0_bias, None, 'gelu', [])  # 0, 1
quantize_1: u8[2, 3] = graphwright.quantize(linear_0, {hidden[0]}, {hidden[1]}, 0, 255, torch.uint8)  # 0, 1
dequantize_1: f32[2, 3] = graphwright.dequantize(quantize_1, {hidden[0]}, {hidden[1]}, torch.float32)  # 0, 1
dequantize_channel_1: f32[2, 3] = graphwright.dequantize_channel(_2_weight_int8, _2_weight_scale, None, 0, torch.float32)  # 2
linear_1: f32[2, 2] = graphwright.linear(dequantize_1, dequantize_channel_1, _2_bias, None, 'none', [])  # 2
return (linear_1)"""
    assert [s for s, _ in result.changes] == sorted(["0", "2"], key=lambda s: node(after, "graphwright.linear", s == "2").meta["sqnr_db"])


def test_golden_convolutions(fused: Prepare, run: Any, body: Any) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 1, 1))
    program = fused(model, torch.linspace(0, 1, 16).reshape(1, 1, 4, 4), batches=0)
    after, _ = run(program, Quantize())
    (x, zero, *_), (h, *_), (pooled, *_) = pairs(after).values()
    assert zero == 0 and pooled == h
    assert renumbered(body(after)) == f"""\
quantize_0: u8[1, 1, 4, 4] = graphwright.quantize(input_1, {x}, 0, 0, 255, torch.uint8)  # 0, 1
dequantize_0: f32[1, 1, 4, 4] = graphwright.dequantize(quantize_0, {x}, 0, torch.float32)  # 0, 1
dequantize_channel_0: f32[2, 1, 1, 1] = graphwright.dequantize_channel(_0_weight_int8, _0_weight_scale, None, 0, torch.float32)  # 0, 1
conv_0: f32[1, 2, 4, 4] = graphwright.conv(dequantize_0, dequantize_channel_0, _0_bias_corrected, [1, 1], [0, 0], [1, 1], 1, None, 'relu', [])  # 0, 1
quantize_1: u8[1, 2, 4, 4] = graphwright.quantize(conv_0, {h}, 0, 0, 255, torch.uint8)  # 0, 1
dequantize_1: f32[1, 2, 4, 4] = graphwright.dequantize(quantize_1, {h}, 0, torch.float32)  # 0, 1
max_pool2d_0: f32[1, 2, 2, 2] = aten.max_pool2d(dequantize_1, [2, 2], [2, 2], [0, 0], [1, 1], False)  # 2
quantize_2: u8[1, 2, 2, 2] = graphwright.quantize(max_pool2d_0, {h}, 0, 0, 255, torch.uint8)  # 2
dequantize_2: f32[1, 2, 2, 2] = graphwright.dequantize(quantize_2, {h}, 0, torch.float32)  # 2
dequantize_channel_1: f32[1, 2, 1, 1] = graphwright.dequantize_channel(_3_weight_int8, _3_weight_scale, None, 0, torch.float32)  # 3
conv_1: f32[1, 1, 2, 2] = graphwright.conv(dequantize_2, dequantize_channel_1, _3_bias_corrected, [1, 1], [0, 0], [1, 1], 1, None, 'none', [])  # 3
return (conv_1)"""


def test_integers_flow_through_a_residual_network(fused: Prepare, run: Any, ops: Any) -> None:
    after, result = run(fused(Small(), torch.randn(4, 3, 16, 16)), Quantize())
    assert not result.refusals and len(result.changes) == 4
    numbers = pairs(after)
    pool, mean, head = node(after, "aten.max_pool2d"), node(after, "aten.adaptive_avg_pool2d"), node(after, "graphwright.linear")
    convs = [n for n in after.nodes if op_name(n.target) == "graphwright.conv"]
    assert behind_pair(head.args[0])
    flat = head.args[0].args[0].args[0]
    for reader in (pool, mean, *convs, flat):
        assert behind_pair(reader.args[0]), f"{reader.name} reads {reader.args[0]}"
    assert behind_pair(arg(convs[2], "other")) and arg(convs[2], "activation") == "relu"
    assert numbers[pool.name] == numbers[convs[0].name], "pooling keeps the scale"
    assert numbers[pool.name] != numbers[convs[1].name]
    assert all(zero == 0 for _, zero, *_ in (numbers[c.name] for c in convs)), "relu is folded into the zero point"


def test_weights_shrink_and_their_origin_is_kept(fused: Prepare, run: Any) -> None:
    program = fused(Small(), torch.randn(4, 3, 16, 16))
    after, _ = run(program, Quantize())
    stored = {k: t for k, t in after.tensors().items() if t.dtype == torch.int8}
    assert {k.split(".")[0] for k in stored} == {"stem", "conv1", "conv2", "head"}
    assert all(int(t.min()) >= -127 and int(t.abs().max()) <= 127 for t in stored.values())
    assert after.size_bytes() < 0.5 * program.size_bytes()
    assert not any(t.dtype == torch.float32 and t.ndim > 1 for t in after.tensors().values())
    assert all("conv1.weight" in after.provenance[k] for k in stored if k.startswith("conv1"))


@pytest.mark.parametrize("options", [
    {}, {"activations": "int8"}, {"observer": "min-max"}, {"observer": "mse"}, {"observer": Percentile(99.99)},
    {"per_channel": False}, {"residual": "float"}, {"residual": "int8"}, {"bias_correction": False},
    {"mode": "dynamic"}, {"mode": "dynamic", "activations": "int8"}, {"mode": "weight-only"},
])  # fmt: skip
def test_every_option_stays_close_to_float(options: dict[str, Any], fused: Prepare, run: Any) -> None:
    torch.manual_seed(0)
    program = fused(Small(), torch.randn(4, 3, 16, 16))
    after, result = run(program, Quantize(**options))
    x = torch.randn(4, 3, 16, 16)
    got = sqnr_db(program(x)[0], after(x)[0])
    assert got > (40 if options.get("mode") == "weight-only" else 22), f"{got:.1f} dB"
    assert math.isfinite(got), "quantized numbers differ from the float ones"
    assert len(result.changes) == 4


def test_bias_correction_removes_the_mean_error(fused: Prepare, run: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 16, 3, bias=False))
    x = torch.rand(8, 6, 12, 12) + 1.0  # a large mean makes rounding errors of the weights add up
    program = fused(model, x, batches=0)

    def bias_of_error(**options: Any) -> float:
        after, _ = run(program, Quantize(observer="min-max", **options))
        return float((after(x)[0] - program(x)[0]).detach().mean((0, 2, 3)).abs().max())

    assert bias_of_error() < 0.2 * bias_of_error(bias_correction=False)
    assert bias_of_error(mode="weight-only") < 0.1 * bias_of_error(mode="weight-only", bias_correction=False)
    program.calibration = []
    uncorrected, _ = run(program, Quantize(mode="weight-only"))
    assert "0.bias_corrected" not in uncorrected.tensors()


def test_bias_correction_of_groups_and_unbatched_inputs(fused: Prepare, run: Any) -> None:
    for model, x in ((nn.Conv1d(6, 12, 3, groups=3), torch.rand(4, 6, 20) + 1), (nn.Conv2d(4, 4, 1, groups=2), torch.rand(4, 9, 9) + 1)):
        after, result = run(fused(model, x, batches=0), Quantize())
        assert "bias corrected" in result.changes[0][1]
        assert sqnr_db(model(x), after(x)[0]) > 30


def test_one_pair_serves_all_readers_and_float_readers_keep_the_float(fused: Prepare, run: Any) -> None:
    def function(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.layer_norm(x, (8,))
        return F.linear(h, m.a) + h.exp(), F.linear(F.relu(h), m.b) * 2

    after, _ = run(fused(function, torch.randn(5, 8), a=torch.randn(8, 8), b=torch.randn(8, 8)), Quantize())
    norm = node(after, "aten.layer_norm")
    readers = sorted(op_name(u.target) for u in norm.users)
    assert readers.count("graphwright.quantize") == 1
    assert "aten.exp" in readers and "aten.relu" in readers


def test_the_residual_of_a_linear_stays_float_unless_asked(fused: Prepare, run: Any) -> None:
    def block(m: Any, x: Tensor) -> Tensor:
        h = F.layer_norm(x, (8,))
        h = F.layer_norm(h + F.linear(F.gelu(F.linear(h, m.up)), m.down), (8,))
        return F.linear(h, m.out)

    weights = {"up": torch.randn(16, 8) / 3, "down": torch.randn(8, 16) / 3, "out": torch.randn(4, 8)}
    for residual, quantized in (("auto", False), ("float", False), ("int8", True)):
        after, _ = run(fused(block, torch.randn(5, 8), **weights), Quantize(residual=residual))
        down = next(n for n in after.nodes if op_name(n.target) == "graphwright.linear" and arg(n, "other") is not None)
        assert behind_pair(arg(down, "other")) == quantized
        assert behind_pair(down.args[0])


def test_concatenation_shares_a_scale_unless_ranges_are_far_apart(fused: Prepare, run: Any) -> None:
    class Branches(nn.Module):
        def __init__(self, gain: float) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)
            self.b.weight.data.mul_(gain)
            self.b.bias.data.mul_(gain)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.pad(torch.cat([self.a(x), self.b(x)], 1), (1, 1, 1, 1)))

    for gain, shared in ((1.5, True), (100.0, False)):
        torch.manual_seed(0)
        after, _ = run(fused(Branches(gain), torch.randn(2, 3, 8, 8)), Quantize())
        numbers = pairs(after)
        cat = node(after, "aten.cat")
        a, b = (q.args[0].args[0].name for q in cat.args[0])  # through dequantize and quantize to the value
        assert (numbers[a] == numbers[cat.name]) == shared
        assert numbers[b] == numbers[cat.name]
        padded = node(after, "aten.pad") if any("pad" in op_name(n.target) for n in after.nodes) else cat
        assert numbers.get(padded.name, numbers[cat.name]) == numbers[cat.name]


def test_gates_and_separate_activations_between_convolutions(fused: Prepare, run: Any) -> None:
    def block(m: Any, x: Tensor) -> Tensor:
        h = F.silu(F.conv2d(x, m.a))
        gate = torch.sigmoid(F.conv2d(F.relu(F.conv2d(h.mean((2, 3), keepdim=True), m.squeeze)), m.excite))
        return F.conv2d(F.relu6(h * gate + h), m.b)

    weights = {"a": torch.randn(6, 3, 1, 1), "squeeze": torch.randn(2, 6, 1, 1), "excite": torch.randn(6, 2, 1, 1), "b": torch.randn(4, 6, 1, 1)}
    program = fused(block, torch.randn(2, 3, 8, 8), **weights)
    after, _ = run(program, Quantize())
    for name in ("aten.mean", "aten.mul", "aten.add"):
        reader = node(after, name)
        assert all(behind_pair(v) for v in reader.all_input_nodes), reader.format_node()
    floats, _ = run(program, Quantize(residual="float"))
    assert not any(behind_pair(v) for v in node(floats, "aten.mul").all_input_nodes)
    assert len(pairs(floats)) < len(pairs(after))


def test_padding_with_another_number_takes_no_integers(fused: Prepare, run: Any) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(F.conv2d(x, m.a), (1, 1, 1, 1), value=2.5), m.b)

    after, _ = run(fused(function, torch.randn(2, 3, 8, 8), a=torch.randn(4, 3, 1, 1), b=torch.randn(2, 4, 3, 3)), Quantize())
    pad = node(after, "aten.pad") if any(op_name(n.target) == "aten.pad" for n in after.nodes) else node(after, "aten.constant_pad_nd")
    assert not behind_pair(pad.args[0])


def test_what_comes_from_float_is_quantized_behind_the_view(fused: Prepare, run: Any) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return F.linear(torch.softmax(x, -1).transpose(1, 2).reshape(2, -1), m.w)

    after, _ = run(fused(function, torch.randn(2, 3, 4), w=torch.randn(5, 12)), Quantize())
    assert list(pairs(after)) == [node(after, "graphwright.linear").args[0].args[0].args[0].name]
    assert "softmax" not in next(iter(pairs(after)))


def test_transposed_and_tied_and_embedded_weights(fused: Prepare, run: Any) -> None:
    model = nn.ConvTranspose2d(3, 6, 3, stride=2)
    after, result = run(fused(model, torch.randn(2, 3, 5, 5)), Quantize())
    assert next(n for n in after.nodes if "channel" in op_name(n.target)).args[3] == 1, "scales lie along the output channels"
    assert after.tensors()["weight_scale"].shape == (6,)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix = nn.Embedding(11, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.mix(self.mix(self.table(ids))), self.table.weight)

    after, result = run(fused(Tied(), torch.arange(11)), Quantize())
    assert sorted(k for k, t in after.tensors().items() if t.dtype == torch.int8) == ["mix.weight_int8", "table.weight_int8"]
    assert after.tensors()["table.weight"].dtype == torch.float32
    assert any("the float weight stays for table" in said for _, said in result.changes)


def test_embeddings_are_stored_as_int8_on_request(fused: Prepare, run: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix = nn.Embedding(50, 16), nn.Linear(16, 16)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.mix(self.table(ids)), self.table.weight)

    program = fused(Tied(), torch.arange(50))
    for mode in ("static", "weight-only"):
        after, result = run(program, Quantize(mode=mode, embeddings=True))
        assert sorted(s for s, _ in result.changes)[:1] == ["linear"] and len(result.changes) == 3
        assert not any(t.dtype == torch.float32 and t.ndim > 1 for t in after.tensors().values()), "one copy serves both"
        assert after.tensors()["table.weight_scale"].shape == (50,)
        assert sqnr_db(program(torch.arange(50))[0], after(torch.arange(50))[0]) > 25
    only, result = run(fused(nn.Embedding(9, 4), torch.arange(9)), Quantize(mode="weight-only", embeddings=True))
    assert "as int8" in result.changes[0][1] and only.size_bytes() == 9 * 4 + 9 * 4


REFUSED = {
    "both operands": (lambda m, x: x @ x.transpose(1, 2), {}, "both operands are computed at run time"),
    "computed weight": (lambda m, x: F.linear(x, m.w * x.mean()), {"w": torch.randn(5, 4)}, "weight is computed at run time"),
    "zero input": (lambda m, x: F.linear(x * 0, m.w), {"w": torch.randn(5, 4)}, "its input was zero throughout calibration"),
    "nan inside": (lambda m, x: F.linear((x - 100).sqrt(), m.w), {"w": torch.randn(5, 4)}, "its input held .* NaN or infinite values"),
    "nan weight": (lambda m, x: F.linear(x, m.w), {"w": torch.full((5, 4), math.nan)}, "its weight holds NaN"),
    "empty input": (lambda m, x: F.linear(x[:0], m.w), {"w": torch.randn(5, 4)}, "its input was empty during calibration"),
    "float64": (lambda m, x: F.linear(x.double(), m.w), {"w": torch.randn(5, 4).double()}, "dtype is torch.float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_have_reasons(case: str, captured: Any, fused: Prepare) -> None:
    function, tensors, reason = REFUSED[case]
    program = fused(function, torch.randn(2, 3, 4), **tensors) if case != "nan weight" else captured(function, torch.randn(2, 3, 4), **tensors)
    program.calibration = [(torch.randn(2, 3, 4),)]
    after, (record,) = Pipeline((Quantize(),)).run(program)
    assert not record.result.changes and after.text() == program.text()
    assert any(re.search(reason, said) for _, said in record.result.refusals), record.result.refusals


def test_one_refused_site_leaves_the_rest_quantized(fused: Prepare, run: Any) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        dead = F.conv2d(x * 0, m.a)
        return F.conv2d(torch.cat([F.conv2d(x, m.a), dead], 1), m.b)

    program = fused(function, torch.randn(2, 3, 8, 8), a=torch.randn(4, 3, 1, 1), b=torch.randn(2, 8, 1, 1))
    after, result = run(program, Quantize())
    assert len(result.changes) == 2 and [r for _, r in result.refusals] == ["its input was zero throughout calibration"]
    assert not any(behind_pair(v) for v in node(after, "aten.cat").args[0]), "one operand is float: the op reads float"


@pytest.mark.parametrize("fill", [0.0, math.nan])
def test_an_operand_without_a_range_stays_float(fill: float, fused: Prepare, captured: Any) -> None:
    def function(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.conv2d(F.relu(F.conv2d(x, m.a) + F.conv2d(y, m.a)), m.b)

    x = torch.randn(2, 3, 8, 8)
    program = fused(function, x, x.clone(), a=torch.randn(4, 3, 1, 1), b=torch.randn(2, 4, 1, 1))
    program.calibration = [(x, torch.full_like(x, fill))]
    after, _ = Pipeline((Quantize(),)).run(program)
    kinds = [behind_pair(arg(n, "other")) for n in after.nodes if op_name(n.target) == "graphwright.conv" and arg(n, "other") is not None]
    assert kinds == [False]


def test_include_exclude_and_second_run(fused: Prepare, run: Any) -> None:
    program = fused(Small(), torch.randn(4, 3, 16, 16))
    after, result = run(program, Quantize(exclude=("head",)))
    assert [s for s, r in result.refusals] == ["head"] and arg(node(after, "graphwright.linear"), "weight").op == "get_attr"
    _, result = run(program, Quantize(include=("conv*",)))
    assert sorted(s for s, _ in result.changes) == ["conv1", "conv2"]
    with pytest.raises(SiteError, match="matches no site"):
        run(program, Quantize(exclude=("haed",)))
    again, result = run(after, Quantize(exclude=("head",)))
    assert not result.modified and {r for _, r in result.refusals} == {"its weight is quantized already", "left out by include / exclude"}
    assert again.text() == after.text()


def test_several_runs_with_their_own_options_agree_on_values(fused: Prepare, run: Any) -> None:
    program = fused(Small(), torch.randn(4, 3, 16, 16))
    whole, _ = run(program, Quantize(observer="min-max"))
    after, result = run(program, Quantize(observer="min-max", exclude=("conv1",)), Quantize(observer="mse", include=("conv1",)))
    assert [s for s, _ in result.changes] == ["conv1"]
    assert set(pairs(after)) == set(pairs(whole))
    stem = node(after, "aten.max_pool2d")
    assert pairs(after)[stem.name] == pairs(whole)[stem.name], "the value has one pair, the first run's"
    assert all(behind_pair(n.args[0]) for n in after.nodes if op_name(n.target) in ("graphwright.conv", "graphwright.linear"))


def test_missing_calibration_and_wrong_options(captured: Any) -> None:
    program = captured(nn.Linear(4, 3), torch.randn(2, 4))
    with pytest.raises(CalibrationError, match="needs calibration data"):
        Quantize().run(program)
    for mode in ("dynamic", "weight-only"):
        assert not Quantize(mode=mode).needs_calibration
        Pipeline((Quantize(mode=mode),), strict=True).run(program)
    with pytest.raises(RecipeError, match="mode='statik'.*\n.*did you mean 'static'"):
        Quantize(mode="statik")
    with pytest.raises(RecipeError, match="observer"):
        Quantize(observer="average")
    assert Quantize.summary() and "observer" in Quantize().options()


def test_nothing_to_quantize_is_said(captured: Any, run: Any) -> None:
    _, result = run(captured(nn.ReLU(), torch.randn(3)), Quantize())
    assert not result.modified and result.notes


def test_dead_channels_and_constant_inputs_stay_finite(fused: Prepare, run: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model[0].weight.data[1] = 0
    model[0].bias.data[1] = 0
    model[0].weight.data[2] = 1e-30
    x = torch.full((2, 3, 4, 4), 0.7)
    after, _ = run(fused(model, x, batches=0), Quantize())
    assert after.tensors()["0.weight_scale"].isfinite().all() and (after.tensors()["0.weight_scale"] > 0).all()
    assert torch.allclose(after(x)[0], model(x), atol=0.02)


def test_bfloat16_values_get_bfloat16_back(fused: Prepare, run: Any) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).bfloat16()
    x = torch.randn(4, 16).bfloat16()
    after, result = run(fused(model, x), Quantize())
    assert len(result.changes) == 2 and after(x)[0].dtype == torch.bfloat16
    assert sqnr_db(model(x), after(x)[0]) > 20


def test_dynamic_sizes(captured: Any, run: Any) -> None:
    program = captured(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 8), dynamic="auto")
    program.calibration = [(torch.randn(k, 8),) for k in (2, 5, 9)]
    after, result = run(program, *EXACT, Quantize())
    assert len(result.changes) == 2
    for k in (2, 7):
        x = torch.randn(k, 8)
        assert sqnr_db(program(x)[0], after(x)[0]) > 25


def test_errors_per_site_worst_first(fused: Prepare, run: Any) -> None:
    torch.manual_seed(0)
    program = fused(Small(), torch.randn(4, 3, 16, 16))
    after, result = run(program, Quantize())
    said = [float(text.rsplit("SQNR ", 1)[1].removesuffix(" dB")) for _, text in result.changes]
    assert said == sorted(said)
    kept = {n.meta["sites"][0]: n.meta["sqnr_db"] for n in after.nodes if "sqnr_db" in n.meta}
    assert [round(kept[s], 1) for s, _ in result.changes] == said
    # The head's error is that of the output: the same batch through both programs.
    batch = program.calibration[0]
    assert kept["head"] == pytest.approx(sqnr_db(program(*batch)[0], after(*batch)[0]))


def test_the_dynamic_form(fused: Prepare, run: Any, ops: Any) -> None:
    program = fused(nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)), torch.randn(4, 6))
    after, _ = run(program, Quantize(mode="dynamic"))
    whole = node(after, "graphwright.quantize_dynamic")
    q, scales, points = whole.meta["val"]
    assert (q.dtype, tuple(scales.shape), points.dtype) == (torch.uint8, (4, 1), torch.int32)
    x = torch.randn(4, 6)
    x[1] *= 1000  # a scale per row: one large row costs the others nothing
    x[2] = 0
    got, want = after(x)[0], program(x)[0]
    assert all(sqnr_db(want[k], got[k]) > 25 for k in range(4))


def test_the_result_is_a_pass_result_with_truth(fused: Prepare) -> None:
    program = fused(Small(), torch.randn(4, 3, 16, 16))
    before = {k: t.clone() for k, t in program.tensors().items()}
    twin = program.copy()
    result = Quantize().run(twin)
    assert isinstance(result, PassResult) and result.modified
    assert all(program.tensor(k).equal(t) for k, t in before.items()), "passes never write into a tensor"


# -- attention -------------------------------------------------------------------------------------------------------


class Attend(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_attention_multiplies_integers_too(mode: str, fused: Prepare, run: Any, ops: Any) -> None:
    program = fused(Attend(), torch.randn(2, 9, 32))
    before = program.copy()
    after, result = run(program, Quantize(mode=mode))
    assert "attention_int8" in ops(after) and "scaled_dot_product_attention" not in ops(after)
    new = node(after, "graphwright.attention_int8")
    assert arg(new, "causal") is True and arg(new, "merge") is False and arg(new, "dtype") is None
    said = next(c.text if hasattr(c, "text") else str(c) for c in result.changes if "queries" in str(c))
    assert re.search(r"SQNR [2-9]\d\.\d dB", said)
    x = program.example
    assert sqnr_db(before(*x)[0], after(*x)[0]) > 25


@pytest.mark.parametrize("options", [{"attention": False}, {"mode": "weight-only"}])
def test_attention_stays_float_where_it_is_not_asked_for(options: dict[str, Any], fused: Prepare, run: Any, ops: Any) -> None:
    after, _ = run(fused(Attend(), torch.randn(2, 9, 32)), Quantize(**options))
    assert "scaled_dot_product_attention" in ops(after)


def test_attention_is_refused_with_a_reason(fused: Prepare, run: Any, captured: Any) -> None:
    dropping = captured(Attend(dropout=0.5).train(), torch.randn(2, 9, 32), train=True)
    dropping.calibration = [dropping.example]
    result = Quantize().run(dropping)
    assert any("at random" in str(r) for r in result.refusals)
    bare = captured(lambda m, q: F.scaled_dot_product_attention(q, q, q), torch.randn(2, 9, 32))
    bare.calibration = [bare.example]
    assert any("4 axes" in str(r) for r in Quantize().run(bare).refusals)
