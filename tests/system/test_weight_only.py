"""Weights alone in 4 and 8 bits, by groups, through the public door: a language model, its size, its file, what is said of each site."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright import reporting
from graphwright.kernels.vnni import unfit
from graphwright.lower.stopwatch import Stopwatch
from graphwright.numerics import sqnr_db


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """The optimized program stands, whatever the stopwatch says on the machine that runs the tests."""
    monkeypatch.setattr(reporting, "_declined", lambda job, variant, report: False)


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256,
                                      vocab_size=320, max_position_embeddings=64, use_cache=False)  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


IDS = {"input_ids": torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(0))}


def logits(model):
    with torch.no_grad():
        return model(**IDS)["logits"]


def test_a_language_model_in_four_bits(llama, tmp_path):
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    fast = gw.optimize(llama, IDS, "w4")
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())
    assert sqnr_db(logits(llama), logits(fast)) > 8, "plain rounding of random weights"
    (record,) = [p for p in fast.report.passes if p.name == "quantize"]
    told = dict(record.result.changes)
    # merged queries, keys and values; output; merged gates; down: two layers, and the head; the table stays int8
    assert sum("as int4" in said for said in told.values()) == 9 and not record.result.refusals
    assert all("SQNR" in said for said in told.values() if "as int4" in said)
    assert "320x128 as int8, a scale per channel" in told["model.embed_tokens"]
    matrices = sum(p.numel() for n, p in llama.named_parameters() if p.ndim == 2 and "embed" not in n)
    assert matrices * (1 / 2 + 5 / 128) + 320 * 128 <= fast.report.bytes_after < 1.03 * (matrices * (1 / 2 + 5 / 128) + 320 * 132) + 2500
    fast.save(tmp_path / "m.gw")
    assert (tmp_path / "m.gw").stat().st_size < fast.report.bytes_after + 250_000, "the file holds the graph and packed numbers"
    torch.save({"x": IDS, "y": logits(fast)}, tmp_path / "xy.pt")
    code = f"""
        import torch, graphwright as gw
        held = torch.load({str(tmp_path / "xy.pt")!r})
        fast = gw.load({str(tmp_path / "m.gw")!r})
        with torch.no_grad():
            assert torch.equal(fast(**held["x"])["logits"], held["y"])
        assert sum(t.dtype == torch.uint8 and "_int4" in n for n, t in fast.program.tensors().items()) == 9
        print("same bits")
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert "same bits" in ran.stdout, ran.stderr


def test_more_bits_and_smaller_groups_err_less(llama):
    errors = {}
    for bits, group in ((8, 128), (4, 32), (4, 128)):
        fast = gw.optimize(llama, IDS, [*gw.default_recipe(), gw.Quantize(mode="weight-only", bits=bits, group=group, exclude=("lm_head",))])
        errors[bits, group] = sqnr_db(logits(llama), logits(fast))
        assert any("left out by include / exclude" in why for p in fast.report.passes for site, why in p.result.refusals if site == "lm_head")
    assert errors[8, 128] > errors[4, 32] + 15 > errors[4, 128] + 15.5 and errors[8, 128] > 30


@pytest.mark.skipif(unfit() is not None, reason=str(unfit()))
@pytest.mark.parametrize(("options", "name"), [({"bits": 4}, "int4"), ({"group": 64}, "int8")])
def test_the_report_tells_what_runs_on_stored_integers(options, name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)).eval()
    fast = gw.optimize(model, torch.randn(1, 1024), [*gw.default_recipe(), gw.Quantize(mode="weight-only", **options)])
    rows = [r for r in fast.report.sites if "linear" in r.op]
    for r in rows:
        kernels = {o.name for o in r.options}
        assert kernels & {"llvm.w4", "llvm.w8-groups"} and kernels & {"onednn.f32", "mkl.f32", "mkl.f32-finish"}, "integers against floats, by the stopwatch"
        assert r.decision == name or r.decision == "f32" and f"{name} measured slower than float here" in r.reason


@pytest.mark.skipif(unfit() is not None, reason=str(unfit()))
def test_four_bits_by_rows_of_int8_survive_the_disk(monkeypatch, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 300), nn.GELU(), nn.Linear(300, 96)).eval(), torch.randn(7, 256)
    # the stopwatch is told what to show: that it can show this is the matter of other tests
    monkeypatch.setattr(Stopwatch, "work", lambda self, work, options: [1e-6 if c.name == "llvm.w4a8" else 100.0 for c in options])
    fast = gw.optimize(model, x, [*gw.default_recipe(), gw.Quantize(mode="dynamic", bits=4, group=64)])
    assert [r.kernel for r in fast.report.sites if "linear" in r.op] == ["llvm.w4a8"] * 2
    fast.save(tmp_path / "m.gw")
    again = gw.load(tmp_path / "m.gw")
    with torch.no_grad():
        assert torch.equal(again(x), fast(x)) and sqnr_db(model(x), fast(x)) > 12
    assert (tmp_path / "m.gw").stat().st_size < 80_000 + fast.report.bytes_after < 80_000 + fast.report.bytes_before / 5
