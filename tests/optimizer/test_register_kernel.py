"""Kernels from outside: they race, are checked, refuse with a reason, are saved by name, and benchmarked."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright import kernel_registry
from graphwright.errors import CheckError, InputError
from graphwright.kernel import Cost
from graphwright.kernel_registry import registered, unregister_kernel
from graphwright.ops.extend import unregister_op

SAMPLES = [gw.Sample("4x8", lambda g: (torch.randn(4, 8, generator=g), 2.0)), gw.Sample("0x3", lambda g: (torch.randn(0, 3, generator=g), 1.0), bench=False)]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """A slow op: whatever else there is wins against it."""

    @gw.register_op("gwslow.softsign", traits={"elementwise"})
    def softsign(x: Tensor, scale: float = 1.0) -> Tensor:
        """A scaled softsign, after a while."""
        if not isinstance(x, torch._subclasses.FakeTensor):
            time.sleep(0.003)
        return scale * x / (1 + x.abs())

    yield
    for k in list(registered()):
        unregister_kernel(k)
    unregister_op("gwslow.softsign")


def numpy_softsign(x: Tensor, scale: float) -> Tensor:
    a = x.numpy()
    return torch.from_numpy((np.float32(scale) * a / (1 + np.abs(a))).astype(np.float32, copy=False))


def register(run=numpy_softsign, op="gwslow.softsign", **options) -> gw.Kernel:
    return gw.register_kernel(op, **{"backend": "numpy", "samples": SAMPLES, **options})(run)


class Model(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.gwslow.softsign(self.linear(x), 2.0)


def row(fast, op="gwslow.softsign"):
    return next(r for r in fast.report.sites if r.op == op)


# -- racing ----------------------------------------------------------------------------------------------------------


def test_it_wins_the_race_and_is_explained_and_saved(tmp_path):
    kernel = register()
    assert kernel.label == "numpy.softsign" and kernel.precision == "f32" and gw.testing.check_kernel(kernel) == 2
    model, x = Model().eval(), torch.randn(4, 8)
    fast = gw.optimize(model, x)
    assert row(fast).kernel == "numpy.softsign"
    assert "taken" in fast.explain(row(fast).site) and "aten.native" in fast.explain(row(fast).site)
    torch.testing.assert_close(fast(x), model(x))
    fast.save(tmp_path / "m.gw")
    assert torch.equal(gw.load(tmp_path / "m.gw")(x), fast(x))
    unregister_kernel(kernel)
    without = gw.load(tmp_path / "m.gw")
    assert any("numpy.softsign does not exist on this machine; the op runs as it is" in w for w in without.report.warnings)
    torch.testing.assert_close(without(x), model(x))


def overwrites(x, scale):
    x.numpy()[...] = 0
    return x


@pytest.mark.parametrize(
    ("run", "options", "words"),
    [
        (lambda x, scale: numpy_softsign(x, 1.0), {}, "wrong result: .* dB against the reference, 90 are asked"),
        (lambda x, scale: numpy_softsign(x, scale).double(), {}, "torch.float64 instead of torch.float32"),
        (lambda x, scale: numpy_softsign(x, scale).T, {}, "shape"),
        (lambda x, scale: x.numpy(), {}, "a ndarray instead of a tensor"),
        (overwrites, {}, "wrote into its argument 0"),
        (lambda x, scale: 1 / 0, {}, "ZeroDivisionError: division by zero"),
        (numpy_softsign, {"supports": lambda x, scale: f"{x.shape[-1]} columns; 16 are wanted" if x.shape[-1] != 16 else None}, "refused: 8 columns; 16 are wanted"),
        (numpy_softsign, {"supports": lambda x, scale: 1 / 0}, "ZeroDivisionError"),
    ],
)
def test_what_is_wrong_or_refused_is_not_taken_and_explained(run, options, words):
    register(run, **options)
    model, x = Model().eval(), torch.randn(4, 8)
    fast = gw.optimize(model, x)
    assert row(fast).kernel == "aten.native"
    (said,) = (o.problem for o in row(fast).options if o.name == "numpy.softsign")
    assert __import__("re").search(words, said), said
    assert said in fast.explain(row(fast).site)
    torch.testing.assert_close(fast(x), model(x))


def test_a_mended_kernel_is_judged_anew():
    register(lambda x, scale: x)
    x = torch.randn(4, 8)
    assert row(gw.optimize(Model().eval(), x)).kernel == "aten.native"
    register()
    assert row(gw.optimize(Model().eval(), x)).kernel == "numpy.softsign"
    assert len(list(registered("gwslow.softsign"))) == 1


def test_a_lossy_kernel_waits_for_a_recipe_that_allows_it():
    register(lambda x, scale: numpy_softsign(x, scale).bfloat16().float(), precision="bf16", tolerance=(0.01, 1))
    x = torch.randn(4, 8)
    assert not [o for o in row(gw.optimize(Model().eval(), x)).options if o.name == "numpy.softsign"]
    assert row(gw.optimize(Model().eval(), x, "bf16")).kernel == "numpy.softsign"


def test_where_sizes_vary_it_is_asked_at_each_call():
    calls = []

    def run(x, scale):
        calls.append(tuple(x.shape))
        return numpy_softsign(x, scale)

    register(run, supports=lambda x, scale: None if x.shape[0] % 2 == 0 else "odd")
    model = Model().eval()
    fast = gw.optimize(model, torch.randn(4, 8), dynamic="auto")
    assert row(fast).kernel == "numpy.softsign"
    calls.clear()
    for size in (2, 3, 6, 7):
        x = torch.randn(size, 8)
        torch.testing.assert_close(fast(x), model(x))
    assert [c[0] for c in calls] == [2, 6]


def test_a_kernel_for_an_op_of_pytorch_with_keyword_arguments_and_strides():
    seen = []

    @gw.register_kernel("aten.add.Tensor", backend="mine", samples=[gw.Sample("3", lambda g: (torch.randn(3, generator=g), torch.randn(3, generator=g), 2))])
    def add(x, y, alpha):
        seen.append((x.stride(), y.stride()))
        return torch.from_numpy(x.numpy() + alpha * y.numpy())

    assert gw.testing.check_kernel("mine.add") == 1  # by its label; Tensor is the overload
    model = type("M", (nn.Module,), {"forward": lambda self, x, y: torch.add(x.t().relu(), y, alpha=3)})()
    fast = gw.optimize(model, (torch.randn(4, 8), torch.randn(8, 4)))
    assert "mine.add" in [o.name for o in row(fast, "aten.add.Tensor").options]
    assert all(y == (4, 1) for _, y in seen if len(y) == 2)


def test_what_was_refused_is_told_also_where_nothing_was_gained():
    register(lambda *args: args[0], "graphwright.linear", name="linear", supports=lambda *args: "never on a Sunday")
    fast = gw.optimize(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(1, 4))
    assert "numpy.linear: refused: never on a Sunday" in fast.explain("0")


def test_several_results_are_all_checked():
    @gw.register_op("gwslow.pair", fake=lambda x: [torch.empty_like(x), torch.empty_like(x)])
    def pair(x: Tensor) -> list[Tensor]:
        """Twice and half, after a while."""
        time.sleep(0.003)
        return [x * 2, x / 2]

    model = type("M", (nn.Module,), {"forward": lambda self, x: tuple(torch.ops.gwslow.pair(x))})()
    x = torch.randn(4)
    register(lambda x: [x * 2, x / 3], "gwslow.pair", name="wrong", samples=[])
    register(lambda x: [x * 2], "gwslow.pair", name="short", samples=[])
    register(lambda x: (x + x, x * 0.5), "gwslow.pair", name="right", samples=[])
    fast = gw.optimize(model, x)
    problems = {o.name: o.problem for o in row(fast, "gwslow.pair").options}
    assert "dB" in problems["numpy.wrong"] and "1 results instead of 2" in problems["numpy.short"] and row(fast, "gwslow.pair").kernel == "numpy.right"
    torch.testing.assert_close(fast(x), model(x))
    unregister_op("gwslow.pair")


# -- checking --------------------------------------------------------------------------------------------------------

KEPT: list[Tensor] = []


def reuses(x, scale):
    out = numpy_softsign(x, scale)
    if KEPT and KEPT[0].shape == out.shape:
        KEPT[0].copy_(out)
        return KEPT[0]
    KEPT[:] = [out]
    return out


@pytest.mark.parametrize(
    ("run", "options", "words"),
    [
        (lambda x, scale: x, {}, r"2 of 4 checks fail\n    4x8, 1 thread: result 0: RMS error"),
        (overwrites, {}, "an argument was overwritten"),
        (reuses, {}, "the next call overwrote the result"),
        (lambda x, scale: numpy_softsign(x.t().contiguous(), scale).t(), {}, r"strides \(1, 4\) instead of \(8, 1\)"),
        (lambda x, scale: x.nothing, {}, "AttributeError"),
        (lambda x, scale: 3, {}, "a int instead of a tensor"),
        (numpy_softsign, {"supports": lambda *a: "never"}, "refused: never"),
        (numpy_softsign, {"cost": lambda *a: Cost(0, 1)}, "cost says 1 operations and 0 bytes for arguments of 128 bytes"),
        (numpy_softsign, {"samples": []}, "has no samples"),
    ],
)
def test_check_kernel_says_what_is_wrong(run, options, words):
    KEPT.clear()
    with pytest.raises(CheckError, match=words):
        gw.testing.check_kernel(register(run, **options))


def test_a_stated_tolerance_counts():
    kernel = register(lambda x, scale: numpy_softsign(x, scale) * 1.001)
    with pytest.raises(CheckError):
        gw.testing.check_kernel(kernel)
    gw.testing.check_kernel(dataclasses.replace(kernel, tolerance=(0.01, 1)))
    with pytest.raises(InputError, match=r"no kernel 'numpy.nothing' is registered\n.*numpy.softsign"):
        gw.testing.check_kernel("numpy.nothing")


def test_the_cost_follows_from_the_row_where_none_is_given():
    cost = register().cost(torch.randn(4, 8), 2.0)
    assert (cost.bytes, cost.flops) == (256, 32)
    gelu = register(lambda x, approximate: x, "aten.gelu").cost(torch.randn(4, 8), "none")
    assert gelu.bytes == 256


def test_it_is_in_the_benchmark(capsys):
    from graphwright import microbench

    register()
    register(lambda x, scale: x, name="broken")
    assert microbench.main(["gwslow", "--rounds", "3", "--no-peers", "--device", "cpu"]) == 1
    lines = [text for text in capsys.readouterr().out.splitlines()[2:] if text]
    assert len(lines) == 2 and all("gwslow.softsign (numpy)" in line for line in lines)
    assert "NOT TIMED" in lines[1] and "NOT TIMED" not in lines[0]


# -- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "options", "words"),
    [
        ("gwslow.nothing", {}, "has no row in the op table\n.*gw.register_op"),
        ("aten.softmaxx", {}, "did you mean 'aten.softmax'"),
        ("graphwright.norm_quantize", {}, "never stands in a program"),
        ("gwslow.softsign", {"backend": "llvm"}, "backend name 'llvm' is Graphwright's own"),
        ("gwslow.softsign", {"backend": ""}, "backend='' is no name"),
        ("gwslow.softsign", {"name": "a.b"}, "name='a.b' is no name"),
        ("gwslow.softsign", {"precision": "exact"}, "there is no precision 'exact'"),
        ("gwslow.softsign", {"tolerance": 0.1}, "tolerance=0.1"),
        ("gwslow.softsign", {"device": "tpu"}, "'cpu' or 'cuda'"),
        ("gwslow.softsign", {"supports": "yes"}, "supports is a str, a function is wanted"),
        (42, {}, "a int is no kernel"),
    ],
)
def test_refusals(op, options, words):
    before = dict(kernel_registry._KERNELS)
    with pytest.raises(InputError, match=words):
        register(op=op, **options)
    assert before == kernel_registry._KERNELS


def test_two_packages_need_two_names():
    register()

    def theirs(x, scale):
        return x

    theirs.__module__ = "theirs.kernels"
    with pytest.raises(InputError, match=rf"is registered already, by {__name__}"):
        register(theirs)
    assert register(theirs, name="theirs").label == "numpy.theirs"
