"""Results under demanding use: state across shapes, edits behind the back, threads, inputs that the model writes."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright import reporting
from graphwright.measure import Timing


@pytest.fixture
def faster(monkeypatch):
    """The stopwatch at the end always finds the result twice as fast."""
    before, after = Timing(10.0, 10.0, 10.0, 3), Timing(5.0, 5.0, 5.0, 3)
    monkeypatch.setattr(reporting, "interleaved", lambda calls, **options: [before, after])


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x):
        self.calls += 1
        y = x + self.calls + self.last
        self.last.copy_(x.mean(0))
        return y


def test_state_goes_on_across_shapes(faster, tmp_path):
    model, other = Counter().eval(), Counter().eval()
    fast = gw.optimize(model, torch.randn(2, 4))
    for size in (2, 3, 2, 5, 3):
        x = torch.randn(size, 4)
        torch.testing.assert_close(fast(x), other(x))
    assert model.calls == 0 and not model.last.any()
    assert all(v.built is not None for v in fast._variants)
    fast.save(tmp_path / "m.gw")
    loaded, twin = gw.load(tmp_path / "m.gw"), copy.deepcopy(fast)
    for size in (5, 2, 3):
        x = torch.randn(size, 4)
        wanted = other(x)
        for result in (fast, loaded, twin):
            torch.testing.assert_close(result(x), wanted)


class Scaled(nn.Module):
    scale = 2.0

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize("edit", [lambda m: setattr(m, "scale", 5.0), lambda m: m.train()])
def test_an_edited_model_is_not_captured_anew(edit, faster):
    model, x = Scaled().eval(), torch.randn(3)
    fast = gw.optimize(model, x)
    edit(model)
    torch.testing.assert_close(fast(x), x * 2)
    with pytest.raises(gw.CoverageError, match="edited"):
        fast(torch.randn(4))


def test_the_reported_variant_is_kept(faster):
    model = nn.Linear(4, 4).eval()
    fast = gw.optimize(model, torch.randn(2, 4))
    program = fast.program
    for size in range(3, 14):
        fast(torch.randn(*[1] * size, 4))
    assert fast.program is program


def test_threads_may_bring_new_shapes(faster):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    fast = gw.optimize(model, torch.randn(2, 4))
    wrong: list[object] = []

    def work(rank: int) -> None:
        x = torch.randn(*[1] * rank, 3, 4)
        try:
            if not torch.allclose(fast(x), model(x), atol=1e-5):
                wrong.append(rank)
        except Exception as error:  # noqa: BLE001 - whatever a thread raises is the finding
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (1, 2, 3, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(fast._variants) == 4


# -- inputs ----------------------------------------------------------------------------------------------------------------


class Cached(nn.Module):
    """Appends to the list that it is given, as a decoder does to its cache."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x, past):
        past.append(self.proj(x))
        return torch.cat(past, 1).sum(1), past


def test_containers_that_the_model_fills_are_left_alone(tmp_path):
    model, x, past = Cached().eval(), torch.randn(2, 1, 4), [torch.randn(2, 3, 4)]
    kept = past[0].clone()
    fast = gw.optimize(model, (x, past))
    assert len(past) == 1 and torch.equal(past[0], kept)
    torch.testing.assert_close(fast(x, [kept])[0], model(x, [kept])[0])
    assert fast.report.sqnr_db > 100


class Writing(nn.Module):
    """Writes its input, counts, and branches on values: it cannot be captured whole."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        x.add_(1)
        y = torch.relu(self.a(x))
        return self.b(y) + self.calls if y.sum() > 0 else self.b(-y)


@pytest.mark.parametrize("fast_enough", [True, False])
def test_a_model_in_pieces_starts_where_it_stood(fast_enough, monkeypatch):
    before, after = Timing(10.0, 10.0, 10.0, 3), Timing(5.0 if fast_enough else 20.0, 5.0, 5.0, 3)
    monkeypatch.setattr(reporting, "interleaved", lambda calls, **options: [before, after])
    model, x = Writing().eval(), torch.randn(2, 8)
    given, other = x.clone(), copy.deepcopy(model)
    fast = gw.optimize(model, x, "int8", calibration=[torch.randn(2, 8), torch.randn(3, 8)])
    assert torch.equal(x, given) and model.calls == 0
    room = {"rtol": 0.05, "atol": 0.05} if fast_enough else {}
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x.clone()), other(x.clone()), **room)
    assert model.calls == 0
    assert {"a", "b"} <= {row.site for row in fast.report.sites}
    assert "1 region was not captured and runs as it was" in fast.report.verdict
    assert fast_enough or ("not faster" in fast.report.verdict and set(fast.report.decisions()) == {"left as it was"})
    assert "a" in fast.explain("a")


def test_patterns_may_match_in_any_piece(faster):
    model, data = Writing().eval(), [torch.randn(2, 8)]
    fast = gw.optimize(model, data[0], [gw.Quantize(include="a")], calibration=data)
    assert [r.site for r in fast.report.sites if r.sqnr_db is not None] == ["a"]
    with pytest.raises(gw.SiteError, match="'c' matches no site"):
        gw.optimize(model, data[0], [gw.Quantize(include=("a", "c"))], calibration=data)
    for wrong in (5, (5,)):
        with pytest.raises(gw.RecipeError, match="no site pattern"):
            gw.optimize(nn.Linear(8, 8), data[0], [gw.Quantize(include=wrong)], calibration=data)


def test_pieces_keep_the_accuracy_budget(faster):
    model, data = Writing().eval(), [torch.randn(2, 8)]
    fast = gw.optimize(model, data[0], "int8", calibration=data, evaluate=lambda m: 1.0 if m is model else 0.5, goal=gw.Goal(max_drop=0.1))
    assert "int8" not in fast.report.decisions()
    assert any("no lossy pass was kept" in note for note in fast.report.notes)


def test_calibration_of_pieces_is_checked(faster):
    model, x = Writing().eval(), torch.randn(2, 8)
    for data, words in (([x, x * float("nan")], "batch 1"), ([{"y": x}], "structure"), ([], "no batch"), ([x.double()], "float64")):
        with pytest.raises(gw.CalibrationError, match=words):
            gw.optimize(model, x, "int8", calibration=data)
    gw.optimize(model, x, "int8", calibration=gw.Calibration([(x, 1)], prepare=lambda item: item[0]))


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()


def test_calibration_data_of_another_size_still_serve(faster):
    model = convnet()
    fast = gw.optimize(model, torch.randn(2, 3, 17, 19), "int8", calibration=[torch.randn(2, 3, 17, 19), torch.randn(4, 3, 17, 19)])
    for shape in ((5, 3, 17, 19), (2, 3, 31, 37), (1, 3, 11, 11)):
        x = torch.randn(shape)
        torch.testing.assert_close(fast(x), model(x), rtol=0.05, atol=0.05)


# -- what the report says --------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x), (x * 10).long(), torch.complex(x, x)


def test_random_numbers_are_no_error():
    report = gw.optimize(Noisy(), torch.randn(3, 4)).report
    assert report.sqnr_db > 100 and not report.warnings


class Wrong(nn.Module):
    """Answers otherwise when it is not being traced: stands for any disagreement that capture does not see."""

    def __init__(self):
        super().__init__()
        self.fused = False

    def forward(self, x):
        return (x * 2, x.argmax(-1)) if torch.backends.mha.get_fastpath_enabled() else (x, x.argmin(-1))


def test_an_exact_recipe_that_is_not_exact_is_warned_about():
    report = gw.optimize(Wrong().eval(), torch.randn(3, 4)).report
    assert any("more than rounding" in w for w in report.warnings)
    assert any("output 1 (int64)" in w for w in report.warnings)


def test_values_that_are_not_finite_are_counted_not_compared():
    x = torch.randn(3, 4)
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    report = gw.optimize(nn.Tanh(), x * 2).report
    assert any("1 of 12 values that are not finite" in n for n in report.notes)
    assert not report.warnings and report.sqnr_db > 100


def test_both_sides_are_timed_as_they_are_called(monkeypatch):
    seen = []
    monkeypatch.setattr(reporting, "interleaved", lambda calls, **options: seen.append(calls) or [Timing(1.0, 1.0, 1.0, 3)] * 2)
    flat = []
    monkeypatch.setattr(gw.Optimized, "forward", lambda self, x: flat.append(x) or x)
    model = nn.Linear(4, 4).eval()
    with torch.no_grad():
        gw.optimize(model, torch.randn(2, 4))
        before = len(flat)
        seen[0][1]()
    assert len(flat) == before + 1


@pytest.mark.parametrize(("options", "words"), [
    ({"goal": gw.Goal(max_drop=0.1)}, "evaluate"),
    ({"goal": {"max_drop": 0.1}}, "gw.Goal"),
    ({"goal": 0.1}, "gw.Goal"),
    ({"progress": 5}, "progress"),
    ({"seed": "a"}, "seed"),
    ({"evaluate": lambda m: float("inf")}, "infinity"),
])  # fmt: skip
def test_unusable_arguments_are_said_at_once(options, words, faster):
    with pytest.raises(gw.InputError, match=words):
        gw.optimize(nn.Linear(4, 4), torch.randn(2, 4), **options)


def test_moving_to_where_it_is_changes_nothing(faster):
    fast = gw.optimize(nn.Linear(4, 4).eval(), torch.randn(2, 4))
    assert fast.cpu() is fast and fast.to("cpu") is fast and fast.eval() is fast
    with pytest.raises(gw.UnsupportedError):
        fast.double()


def test_a_dynamic_input_that_does_not_exist():
    with pytest.raises(gw.InputError, match=r"'y', which does not exist\n  The inputs are input\.$"):
        gw.optimize(nn.Linear(4, 4), torch.randn(2, 4), dynamic={"y": {0: "batch"}})


# -- goals -----------------------------------------------------------------------------------------------------------------


def test_a_budget_that_nothing_meets_is_said_and_no_trial_is_made_twice(faster):
    model, data = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), [torch.randn(2, 8)]
    report = gw.optimize(model, data[0], "int8", calibration=data, evaluate=lambda m: 1.0 if m is model else 0.5, goal=gw.Goal(max_drop=0.1)).report
    assert "goal missed: evaluate drops by 0.5, goal 0.1" in report.warnings
    trials = [n for n in report.notes if "sites in float" in n]
    assert trials and len(trials) == len(set(trials))


def test_smaller_and_slower_is_said_in_one_breath(monkeypatch):
    before, after = Timing(10.0, 10.0, 10.0, 3), Timing(20.0, 20.0, 20.0, 3)
    monkeypatch.setattr(reporting, "interleaved", lambda calls, **options: [before, after])
    report = gw.optimize(nn.Linear(64, 64).eval(), torch.randn(2, 64), "w8", goal=gw.Goal(size_mb=1)).report
    assert "times smaller, 2.00 times slower" in report.verdict


def test_sparse_inputs_are_another_call(faster, tmp_path):
    model, x = nn.Linear(4, 4).eval(), torch.randn(3, 4)
    fast = gw.optimize(model, x)
    torch.testing.assert_close(fast(x.to_sparse()), model(x))
    gw.optimize(model, x).save(tmp_path / "m.gw")
    with pytest.raises(gw.CoverageError, match="layout"):
        gw.load(tmp_path / "m.gw")(x.to_sparse())


def test_tensors_without_numbers_are_refused():
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    for x in (torch.randn(2, 4), torch.randn(2, 4, device="meta")):
        with pytest.raises(gw.InputError, match="meta"):
            gw.optimize(model, x)


class Listing(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, parts):
        return self.proj(parts[0]) + self.proj(parts[1])


def test_a_list_may_be_one_input(faster):
    model, parts = Listing().eval(), [torch.randn(2, 4), torch.randn(2, 4)]
    fast = gw.optimize(model, parts, "int8", calibration=[parts, parts])
    torch.testing.assert_close(fast(parts), model(parts), rtol=0.05, atol=0.05)


def test_an_op_of_another_library_runs_and_is_refused_by_save_with_a_way_out(faster, tmp_path):
    @torch.library.custom_op("usage_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    class Foreign(nn.Module):
        def forward(self, x):
            return twice(x) + 1

    fast, x = gw.optimize(Foreign().eval(), torch.randn(3)), torch.randn(3)
    torch.testing.assert_close(fast(x), x * 2 + 1)
    with pytest.raises(gw.SaveError, match="usage_test") as caught:
        fast.save(tmp_path / "m.gw")
    assert caught.value.hint and not (tmp_path / "m.gw").exists()
