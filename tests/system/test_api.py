"""The public contract: the promises, and what a result does when it is treated like any nn.Module."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright import reporting
from graphwright.measure import Timing


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = {"width": 16, "labels": ["a", "b"]}
        self.one = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.two = nn.Conv2d(16, 16, 3, padding=1, stride=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(torch.relu(self.two(torch.relu(self.norm(self.one(x))))).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(1))
DATA = [torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(k)) for k in range(2, 5)]


def always(faster: bool):
    """Stands in for the stopwatch at the end."""
    before, after = Timing(10.0, 10.0, 10.0, 3), Timing(5.0 if faster else 20.0, 5.0, 5.0, 3)
    return lambda calls, **options: [before, after]


@pytest.fixture
def faster(monkeypatch):
    monkeypatch.setattr(reporting, "interleaved", always(True))


def state(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {k: (v.data_ptr(), v._version, v.clone(), v.requires_grad) for k, v in tensors.items()}


# -- promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["default", "int8", "bf16", "w8", "w4", "int8-dynamic"])
def test_the_model_is_never_modified_and_outputs_agree(net, recipe, faster):
    kept, training = state(net), net.training
    fast = gw.optimize(net, X, recipe, calibration=DATA if recipe == "int8" else None)
    for name, (pointer, version, value, grad) in state(net).items():
        assert (pointer, version, grad) == (kept[name][0], kept[name][1], kept[name][3])
        assert torch.equal(value, kept[name][2])
    assert net.training == training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with torch.no_grad():
        wanted, got = net(X), fast(X)
    assert got.dtype == torch.float32
    assert (wanted - got).norm() < 0.2 * wanted.norm()
    if recipe == "default":
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_not_faster_is_said_and_the_captured_graph_runs(net, monkeypatch):
    monkeypatch.setattr(reporting, "interleaved", always(False))
    fast = gw.optimize(net, X, "int8", calibration=DATA)
    assert "not faster" in fast.report.verdict
    assert "unchanged" in fast.report.verdict
    with torch.no_grad():
        assert torch.equal(fast(X), net(X))
    assert "not faster" in str(fast.report)


def test_smaller_is_enough_where_size_is_the_goal(net, monkeypatch):
    monkeypatch.setattr(reporting, "interleaved", always(False))
    fast = gw.optimize(net, X, "int8", calibration=DATA, goal=gw.Goal(size_mb=1.0))
    assert fast.report.bytes_after < 0.5 * fast.report.bytes_before
    assert "unchanged" not in fast.report.verdict


def test_every_request_is_accounted_for(net, faster):
    fast = gw.optimize(net, X, [*gw.default_recipe(), gw.Quantize(exclude=("head",))], calibration=DATA)
    done = {site for p in fast.report.passes if p.name == "quantize" for site, _ in p.result.changes}
    declined = {site for p in fast.report.passes if p.name == "quantize" for site, _ in p.result.refusals}
    assert {"one", "two"} <= {s.split("#")[0] for s in done}
    assert "head" in declined
    assert "quantize" in fast.explain("head")


@pytest.mark.parametrize("recipe", ["default", "int8", "bf16", "w8", "w4", "int8-dynamic"])
def test_results_survive_the_disk_bit_for_bit(net, recipe, tmp_path, faster):
    fast = gw.optimize(net, X, recipe, calibration=DATA if recipe == "int8" else None)
    fast.save(tmp_path / "m.gw")
    torch.save({"x": X, "y": fast(X)}, tmp_path / "xy.pt")
    code = f"""
        import sys, torch, graphwright as gw
        held = torch.load({str(tmp_path / "xy.pt")!r})
        fast = gw.load({str(tmp_path / "m.gw")!r})
        assert torch.equal(fast(held["x"]), held["y"]), (fast(held["x"]) - held["y"]).abs().max()
        assert fast.config["width"] == 16 and fast.config.width == 16
        assert fast.report.recipe == {recipe!r}
        print("same bits")
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert "same bits" in ran.stdout, ran.stderr


# -- the result as a module --------------------------------------------------------------------------------------------


def test_it_is_a_snapshot(net, faster):
    fast = gw.optimize(net, X)
    before = fast(X)
    with torch.no_grad():
        net.head.weight.add_(1.0)
    assert torch.equal(fast(X), before)
    with pytest.raises(gw.CoverageError, match="edited"):
        fast(X[:3])


def test_new_shapes_are_captured_anew_and_then_left_open(net, faster):
    fast = gw.optimize(net, X)
    for n in (2, 3, 7):
        x = torch.randn(n, 3, 24, 24)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    assert len(fast._variants) == 2


def test_sizes_that_have_changed_are_left_open_whatever_they_are(net, faster):
    """Height and width of an image: equal at first, one size; of their own once they differed."""
    fast = gw.optimize(net, X)
    for h, w in ((26, 26), (30, 30), (26, 34), (34, 26), (25, 31)):
        x = torch.randn(2, 3, h, w)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    assert [v.sizes() for v in fast._variants] == [((None, 3, None, None),), ((None, 3, None, None),), ((4, 3, 24, 24),)]


def test_a_size_that_the_code_depends_on_stays_fixed_and_the_others_open(faster):
    class Branches(nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[2] == 5 else x.tanh()

    model = Branches().eval()
    fast = gw.optimize(model, torch.randn(2, 4, 5))
    for size in ((3, 4, 6), (3, 4, 7), (3, 4, 5), (7, 4, 7)):
        x = torch.randn(size)
        torch.testing.assert_close(fast(x), model(x))
    assert [v.sizes() for v in fast._variants] == [((None, 4, 5),), ((None, 4, None),), ((2, 4, 5),)]


def test_where_a_pass_can_not_bear_open_sizes_the_batch_alone_is_left_open(net, faster):
    @dataclass(frozen=True)
    class Fixed(gw.Pass):
        name = "fixed"

        def run(self, program):
            if any(not isinstance(n, int) for n in program.placeholders[0].meta["val"].shape[1:]):
                raise gw.errors.PassError("heights must be known")
            return gw.PassResult()

    fast = gw.optimize(net, X, [Fixed()])
    for size in ((4, 3, 26, 26), (2, 3, 26, 26), (2, 3, 30, 28)):
        x = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    assert [v.sizes() for v in fast._variants] == [((None, 3, 30, 28),), ((None, 3, 26, 26),), ((4, 3, 24, 24),)]
    assert "heights must be known" in " ".join(fast._variants[1].capture.notes)


def test_new_dtypes_are_captured_anew(net, faster):
    fast = gw.optimize(net.double(), X.double())
    with torch.no_grad():
        torch.testing.assert_close(fast(X.double()), net(X.double()))


def test_loaded_ones_say_what_they_cover(net, tmp_path, faster):
    gw.optimize(net, X).save(tmp_path / "m.gw")
    fast = gw.load(tmp_path / "m.gw")
    with pytest.raises(gw.CoverageError, match=r"\[4, 3, 24, 24\]"):
        fast(X[:2])
    with pytest.raises(gw.CoverageError):
        fast(x=X, y=X)


def test_dynamic_batch_after_load(net, tmp_path, faster):
    gw.optimize(net, X[:1], dynamic="auto").save(tmp_path / "m.gw")
    fast = gw.load(tmp_path / "m.gw")
    with torch.no_grad():
        for n in (1, 2, 5):
            torch.testing.assert_close(fast(torch.ones(n, 3, 24, 24)), net(torch.ones(n, 3, 24, 24)), rtol=1e-4, atol=1e-5)


def test_waiting_for_the_first_call(net, faster):
    fast = gw.optimize(net)
    assert "waiting" in repr(fast)
    with pytest.raises(gw.InputError, match="first call"):
        _ = fast.report
    with torch.no_grad():
        torch.testing.assert_close(fast(X), net(X), rtol=1e-4, atol=1e-5)
    assert fast.report.model == "Net"


def test_attributes_are_forwarded(net, faster):
    fast = gw.optimize(net, X)
    assert fast.config == net.config
    with pytest.raises(AttributeError, match="nonsense"):
        _ = fast.nonsense


def test_what_a_module_can_do_works_or_says_what_to_do(net, tmp_path, faster):
    fast = gw.optimize(net, X)
    assert fast.eval() is fast
    assert fast.to("cpu") is fast
    assert fast.to(torch.float32) is fast
    for act in (fast.train, fast.half, lambda: fast.to("meta"), lambda: torch.save(fast, tmp_path / "x"), lambda: fast.load_state_dict({})):
        with pytest.raises(gw.UnsupportedError):
            act()
    assert "head.weight" in fast.state_dict()
    twin = copy.deepcopy(fast)
    assert torch.equal(twin(X), fast(X))
    with pytest.raises(gw.UnsupportedError, match="gradients"):
        fast(X.clone().requires_grad_())


def test_report_in_every_form(net, tmp_path, faster):
    fast = gw.optimize(net, X, "int8", calibration=DATA, evaluate=lambda m: float(m(X).mean()))
    text = str(fast.report)
    assert "Net" in text
    assert "int8" in text
    data = json.loads(fast.report.to_json())
    assert data["model"] == "Net"
    page = fast.report.to_html(tmp_path / "r.html")
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "one" in fast.explain("one*")
    with pytest.raises(gw.SiteError, match="one"):
        fast.explain("onne")


def test_accuracy_budget_is_kept(net, faster):
    def evaluate(model):
        return -float((model(X) - wanted).abs().max() / wanted.abs().max())

    with torch.no_grad():
        wanted = net(X)
    fast = gw.optimize(net, X, "int8", calibration=DATA, evaluate=evaluate, goal=gw.Goal(max_drop=1e-5))
    assert fast.report.accuracy.after > -1e-5
    assert any("score drops" in line for line in (*fast.report.notes, *fast.report.log))


# -- structures --------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor | None = None


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, *, scale=None, flag: bool = True):
        y = self.linear(x["a"]) + x["b"][0]
        return {"pair": Pair(y, y * scale if scale is not None else None), "list": [y.sum(), (y, 3 if flag else 4)]}


def test_structures_go_in_and_come_out(faster, tmp_path):
    model = Several().eval()
    call = {"x": {"a": torch.randn(2, 6), "b": [torch.randn(2, 6)]}, "scale": torch.tensor(2.0)}
    fast = gw.optimize(model, call)
    with torch.no_grad():
        wanted = model(**call)
    got = fast(**call)
    assert isinstance(got["pair"], Pair)
    torch.testing.assert_close(got["pair"].right, wanted["pair"].right)
    assert got["list"][1][1] == 3
    other = fast(**{k: v for k, v in call.items() if k != "scale"}, flag=False)
    assert other["pair"].right is None
    assert other["list"][1][1] == 4


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.conv = nn.Sequential(nn.Linear(6, 6), nn.ReLU())

    def forward(self, x):
        y = self.conv(x)
        if float(y.sum()) > 0:  # data-dependent
            return self.linear(y)
        return y - 1


def test_what_cannot_be_captured_runs_and_is_named(tmp_path, faster):
    model = Branching().eval()
    x = torch.randn(3, 6)
    fast = gw.optimize(model, x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        torch.testing.assert_close(fast(-x), model(-x))
    assert fast.report.regions
    assert "test_api.py" in str([r.where for r in fast.report.regions])
    with pytest.raises(gw.SaveError, match="not captured"):
        fast.save(tmp_path / "m.gw")
    assert not (tmp_path / "m.gw").exists()


class Counting(nn.Module):
    """State that each call changes: one buffer that is read, one that is only written."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2, 4))

    def forward(self, x):
        self.calls.add_(1)
        y = self.linear(x) + self.calls
        self.last.copy_(y)
        return y


def test_state_starts_where_the_model_stood_and_moves_on(tmp_path, faster):
    model, x = Counting().eval(), torch.randn(2, 4)
    fast = gw.optimize(model, x)
    assert model.calls == 0
    fast.save(tmp_path / "m.gw")
    loaded = gw.load(tmp_path / "m.gw")
    with torch.no_grad():
        for _ in range(3):
            wanted = model(x)
            torch.testing.assert_close(fast(x), wanted)
            torch.testing.assert_close(loaded(x), wanted)
    torch.testing.assert_close(fast.state_dict()["calls"], torch.tensor(3.0))


# -- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"recipe": "int9"}, gw.RecipeError, "int8"),
    ({"recipe": "int8"}, gw.CalibrationError, "calibration="),
    ({"recipe": "int8", "calibration": []}, gw.CalibrationError, "empty|no batch"),
    ({"recipe": "int8", "calibration": [X, X * float("nan")]}, gw.CalibrationError, "1|NaN"),
    ({"recipe": "int8", "calibration": [{"y": X}]}, gw.CalibrationError, "batch|item"),
    ({"recipe": gw.Quantize(include=("hed",)), "calibration": DATA}, gw.SiteError, "head"),
    ({"example_inputs": torch.randn(4, 5, 24, 24)}, gw.InputError, "channels|reject"),
    ({"example_inputs": {"z": X}}, gw.InputError, "z"),
    ({"evaluate": 3}, gw.InputError, "callable"),
    ({"evaluate": lambda m: "good"}, gw.InputError, "number"),
    ({"backend": "cuda9"}, gw.InputError, "backend"),
    ({"model": lambda x: x}, gw.InputError, "nn.Module"),
])  # fmt: skip
def test_bad_input_is_a_clear_error(net, change, error, words, faster):
    call = {"model": net, "example_inputs": X, **change}
    with pytest.raises(error, match=words):
        gw.optimize(**call)


def test_bad_goals():
    with pytest.raises(gw.InputError, match="max_drop"):
        gw.Goal(max_drop=-1)
    with pytest.raises(gw.InputError, match="speedup"):
        gw.Goal(speedup=float("nan"))


def test_light_import():
    code = "import sys, graphwright; print(sorted({'rich', 'typer', 'scipy', 'llvmlite', 'triton', 'transformers'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
