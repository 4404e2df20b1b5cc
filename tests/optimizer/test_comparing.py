"""A result's values against the original's, site by site."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.capture.rehearse import untouched
from graphwright.meters import Meter, arranged
from graphwright.numerics import sqnr_db


class Net(nn.Module):
    """Convolutions, a norm, a residual sum; a dict with a tuple in it."""

    def __init__(self):
        super().__init__()
        self.c1, self.b1, self.c2 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(16, 10)
        self.b1.running_mean.normal_()
        self.b1.running_var.uniform_(0.5, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, object]:
        self.calls += 1
        y = torch.relu(self.b1(self.c1(x)))
        z = self.pool(torch.relu(self.c2(y) + y)).mean((2, 3))
        scores = self.head(z) if scale is None else self.head(z) * scale
        return {"scores": scores, "more": (z, [scores.argmax(-1)])}


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def _images(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 12, 12, generator=generator) for n in sizes]


@pytest.fixture(scope="module")
def int8(net: Net) -> gw.Optimized:
    return gw.optimize(net, _images(4)[0], "int8", calibration=_images(4, 4), goal=gw.Goal(size_mb=1))


@pytest.fixture(scope="module")
def told(net: Net, int8: gw.Optimized) -> gw.Comparison:
    return gw.compare(net, int8, _images(4, 4, 4))


def test_every_output_is_compared(net, int8, told):
    assert told.inputs == 3 and [o.path for o in told.outputs] == ["['scores']", "['more'][0]", "['more'][1][0]"]
    images = _images(4, 4, 4)
    with torch.no_grad(), untouched(net):
        wanted, got = (torch.cat([m(x)["scores"] for x in images]) for m in (net, int8))
    assert told.outputs[0].error.sqnr_db == pytest.approx(sqnr_db(wanted, got), abs=0.01)
    assert told.outputs[0].error.max_abs == pytest.approx(float((wanted - got).abs().max()), rel=1e-5)
    assert told.outputs[0].shape == "f32[4, 10]" and told.outputs[2].count == 12


def test_sites_are_told_worst_first_with_where_the_error_arises(told):
    dbs = [d.as_it_runs.sqnr_db for d in told.sites]
    assert dbs == sorted(dbs) and 20 < dbs[0] < 70
    by_site = {d.site: d for d in told.sites}
    first = by_site["c1"]
    assert first.sites == ("c1", "b1", "relu") and first.shape == "f32[4, 16, 12, 12]"
    assert first.arises == "here" and first.as_it_runs.sqnr_db == pytest.approx(first.alone.sqnr_db, abs=1e-6), "nothing is before it"
    head = by_site["head"]
    assert head.alone.sqnr_db > head.as_it_runs.sqnr_db and all(0.9 < d.as_it_runs.cosine <= 1 for d in told.sites if d.as_it_runs.cosine)


def test_errors_are_those_of_the_values_themselves(net, int8, told):
    """The first convolution: its kernel's value against the original's, computed here by hand."""
    kept: list[Tensor] = []
    handle = net.b1.register_forward_hook(lambda module, args, out: kept.append(torch.relu(out)))
    with torch.no_grad(), untouched(net):
        for x in _images(4, 4, 4):
            net(x)
    handle.remove()
    meter = Meter()
    for k, (image, truth) in enumerate(zip(_images(4, 4, 4), kept, strict=True)):
        values: dict[str, Tensor] = {}
        lowered = int8._variants[-1].built.lowered
        steps = lambda step, reads, values=values: values.setdefault(step.site + step.name, step.call(*reads))
        lowered.runner.step_through([image], steps)
        value, *_ = [v for n, v in values.items() if n.startswith("c1")]
        params = next(w.qparams for w in lowered.analysis.works if w.site == "c1")
        if value.dtype in (torch.uint8, torch.int8):
            value = (value.float() - params.zero_point) * params.scale
        meter.add(truth, value, k)
    assert meter.error().sqnr_db == pytest.approx(next(d for d in told.sites if d.site == "c1").as_it_runs.sqnr_db, abs=0.5)


def test_a_fault_at_one_site_is_seen_there(net, int8, monkeypatch):
    """A kernel that is off by a third: its own row says so, later ones say that they inherited it."""
    from graphwright.comparing import emit as put_together

    lowered = int8._variants[-1].built.lowered
    place = next(k for k, w in enumerate(lowered.analysis.works) if w.site == "c2")

    def emit(analysis, chosen, **options):
        candidate, call = chosen[place]
        spoiled = list(chosen)
        spoiled[place] = candidate, lambda *reads: (call(*reads).float() / 1.5).to(call(*reads).dtype)
        return put_together(analysis, spoiled, **options)

    monkeypatch.setattr("graphwright.comparing.emit", emit)
    told = gw.compare(net, int8, _images(4))
    rows = {d.site: d for d in told.sites}
    assert rows["c2"].arises == "here" and rows["c2"].as_it_runs.sqnr_db < 15
    assert rows["head"].arises == "before" and rows["head"].alone.sqnr_db > rows["head"].as_it_runs.sqnr_db + 10


def test_exact_results_agree_to_rounding(net):
    fast = gw.optimize(net, {"x": _images(2)[0], "scale": torch.tensor(2.0)}, dynamic="auto")
    told = gw.compare(net, fast, ({"x": x, "scale": torch.tensor(3.0)} for x in _images(2, 3, 5)))
    assert told.inputs == 3 and len(told.sites) >= 6
    assert min(d.as_it_runs.sqnr_db for d in told.sites) > 100 and told.outputs[0].count == 100
    assert "f32[s" in told.text(width=160) or told.sites[0].shape.startswith("f32[")


def test_inputs_of_other_shapes_are_captured_anew(net):
    fast = gw.optimize(net, _images(2)[0])
    told = gw.compare(net, fast, [*_images(2), torch.randn(3, 3, 8, 8)])
    assert told.outputs[0].count == 50 and min(d.as_it_runs.sqnr_db for d in told.sites) > 100


def test_a_loaded_result_is_compared_alike(net, int8, told, tmp_path):
    int8.save(tmp_path / "net.gw")
    again = gw.compare(net, gw.load(tmp_path / "net.gw"), _images(4, 4, 4))
    rows = lambda c: [(d.site, d.as_it_runs, d.alone) for d in c.sites if d.site != "add"]  # the result has counted its calls
    assert rows(again) == rows(told) and {d.site for d in again.sites} == {d.site for d in told.sites}
    with pytest.raises(gw.CoverageError):
        gw.compare(net, gw.load(tmp_path / "net.gw"), torch.randn(3, 3, 9, 9))


def test_neither_side_is_changed(net, int8):
    before = {n: t.clone() for n, t in net.state_dict().items()}
    counted = int8._variants[-1].built.running.tensor("calls").clone()
    gw.compare(net, int8, _images(4))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert torch.equal(int8._variants[-1].built.running.tensor("calls"), counted)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        heads = lambda t: t.unflatten(-1, (4, 8)).transpose(1, 2)
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        p = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8), -1)
        return self.norm(x + self.out((p @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("recipe", ["default", "int8", "w8"])
def test_merged_and_rearranged_values_are_found(recipe):
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 7, 32)
    told = gw.compare(model, gw.optimize(model, x, recipe, calibration=[x], goal=gw.Goal(size_mb=1)), x)
    floor = 100 if recipe == "default" else 20
    rows = {s: d for d in told.sites for s in d.sites}
    assert {"q", "k", "v", "out", "norm"} <= rows.keys()
    assert all(d.as_it_runs.sqnr_db > floor for d in told.sites), told.text(full=True)
    assert all(d.alone is not None for d in told.sites)


def test_a_model_in_pieces_is_compared_piece_by_piece(net):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.last = net, nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)["scores"]
            if y.sum().item() > 0:
                y = y * 2
            return self.last(y)

    model, x = Branching().eval(), _images(4)[0]
    fast = gw.optimize(model, x, "int8", calibration=[x])
    told = gw.compare(model, fast, x)
    assert [o.path for o in told.outputs] == ["output"]
    if "not faster" not in fast.report.verdict:
        assert {"net.c1", "net.head", "last"} <= {s for d in told.sites for s in d.sites}
        assert next(d for d in told.sites if d.site == "net.c1").arises == "here"
    else:
        assert any("original's own code" in n for n in told.notes)


def test_another_model_than_the_result_was_made_from_is_told():
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    fast = gw.optimize(nn.Sequential(nn.Linear(16, 8), nn.ReLU()).eval(), x)
    told = gw.compare(nn.Sequential(nn.Linear(16, 8), nn.ReLU()).eval(), fast, x)
    assert told.outputs[0].error.sqnr_db < 20 and any("not the model that the result was made from" in n for n in told.notes)
    wide = gw.compare(nn.Sequential(nn.Linear(16, 9), nn.ReLU()).eval(), fast, x)
    assert wide.outputs[0].error.sqnr_db == -math.inf and wide.outputs[0].differing == wide.outputs[0].count == 36
    assert any("f32[4, 8] instead of f32[4, 9]" in n for n in wide.notes) and json.loads(wide.to_json())
    assert any("no site in common" in n for n in gw.compare(nn.Linear(16, 8).eval(), fast, x).notes)


def test_state_that_moved_on_is_told(net):
    fast = gw.optimize(net, _images(2)[0])
    assert not any("state" in n for n in gw.compare(net, fast, _images(2)).notes)
    fast(_images(2)[0])
    assert any("state is no longer the original's (calls)" in n for n in gw.compare(net, fast, _images(2)).notes)


# -- showing ---------------------------------------------------------------------------------------------------------


def test_text_and_patterns(told):
    text = told.text(width=120)
    assert "against the original on 3 inputs" in text and "['scores']" in text and "arises" in text
    assert max(map(len, told.text(width=80).splitlines())) <= 80
    part = told["c*"]
    assert {d.site for d in part.sites} == {"c1", "c2"} and "sites c*" in str(part)
    with pytest.raises(gw.SiteError, match="matches no site\n"):
        told["conv9"]


def test_json_and_html(told, int8, tmp_path):
    data = json.loads(told.to_json())
    assert data["sites"][0]["as_it_runs"]["sqnr_db"] == told.sites[0].as_it_runs.sqnr_db and data["sites"][0]["arises"] in ("here", "before", "both", "")
    page = told.to_html(tmp_path / "c.html")
    assert (tmp_path / "c.html").read_text() == page and page.startswith("<!doctype html>") and page.count("<circle") >= len(told.sites)
    whole = int8.report.to_html(comparison=told)
    assert "error by site" in whole and "error by site" not in int8.report.to_html() and "c1" in whole
    with pytest.raises(gw.SaveError):
        told.to_html(tmp_path / "no" / "c.html")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (lambda net, fast: ("net", fast, _images(4)), "the original nn.Module is wanted"),
        (lambda net, fast: (fast, net, _images(4)), "the original nn.Module is wanted"),
        (lambda net, fast: (net, net, _images(4)), r"compare\(original, result, inputs\)"),
        (lambda net, fast: (net, fast, []), "no input to compare on"),
        (lambda net, fast: (net, fast, 3), "inputs is a int"),
        (lambda net, fast: (net, fast, "x"), "inputs is a str"),
        (lambda net, fast: (net, fast, torch.randn(4, 5, 12, 12)), "the model rejects an input"),
    ],
)
def test_bad_arguments(net, int8, arguments, says):
    with pytest.raises(gw.InputError, match=says):
        gw.compare(*arguments(net, int8))


# -- parts -----------------------------------------------------------------------------------------------------------


def test_meters_add_up_over_inputs_and_leave_out_what_is_infinite_in_both():
    a, b = torch.tensor([1.0, 2.0, -math.inf]), torch.tensor([1.0, 2.5, -math.inf])
    meter = Meter()
    meter.add(a, a, 0)
    assert meter.error().sqnr_db == math.inf
    meter.add(a, b, 1)
    assert meter.error().sqnr_db == pytest.approx(10 * math.log10(10 / 0.25)) and meter.error().max_abs == 0.5
    assert (meter.differing, meter.count, meter.worst[1]) == (1, 6, 1)
    meter.add(a, torch.tensor([1.0, math.nan, -math.inf]), 2)
    assert meter.error().sqnr_db == -math.inf and meter.worst == (-math.inf, 2)


def test_a_value_held_otherwise_is_recognized():
    x = torch.randn(2, 6, 6)
    found, words = arranged(x, x.transpose(1, 2) + 1e-3)
    assert torch.equal(found, x.transpose(1, 2)) and "[0, 2, 1]" in words
    assert arranged(x, x + 0.01)[1] == ""
    assert torch.equal(arranged(x, x.reshape(12, 6))[0], x.reshape(12, 6))
    assert arranged(x, torch.randn(6, 12)) is None and arranged(x, torch.randn(3)) is None
    assert arranged(x, torch.randn(2, 6, 6))[1] == "", "noise is no other order"
