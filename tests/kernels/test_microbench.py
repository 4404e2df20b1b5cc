"""The kernel benchmark: what it times, what it refuses to time, beside whom, what it writes."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import list_mode_options

from graphwright import kernels, microbench, ops
from graphwright.backends import inductor
from graphwright.errors import InputError
from graphwright.kernel import Kernel, Sample
from graphwright.microbench import cases, clock, peers, results, run, shapes
from graphwright.testing.kernels import disagreement

ALONE = microbench.Plan(rounds=3, peers=frozenset())


@pytest.fixture
def dequantize(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(clock, "copy_bandwidth", lambda device="cpu": 10.0)
    monkeypatch.setattr(clock, "peak", lambda unit, device="cpu": 100.0)
    return kernels.load()["graphwright.dequantize"][0]


def test_a_right_kernel_is_timed(dequantize: Kernel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, table = tmp_path / "kernels.json", tmp_path / "kernels.csv"
    assert microbench.main(["dequantize", "--device", "cpu", "--json", str(file), "--csv", str(table), "--rounds", "3"]) == 0
    record = json.loads(file.read_text())
    (result,) = [r for r in record["results"] if r["op"] == "graphwright.dequantize"]
    assert result["verdict"] == "ok" and result["bytes"] == 1024 * 1536 * 5
    assert result["gb_per_s"] == pytest.approx(result["bytes"] / result["times"]["p50"] / 1e6)
    assert result["of_copy"] == pytest.approx(result["gb_per_s"] / 10.0) and result["of_peak"] == pytest.approx(result["gop_per_s"] / 100.0)
    assert result["times"]["least"] <= result["times"]["p20"] <= result["times"]["p50"] <= result["times"]["p80"]
    assert [p["name"] for p in result["peers"]] == ["eager"] and result["peers"][0]["ratio"] > 0
    assert "1024x1536" in capsys.readouterr().out
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == len(record["results"]) and all(float(r["eager_p50_ms"]) > 0 for r in rows)


@pytest.mark.parametrize(("spoil", "word"), [
    (lambda out: out + 0.01, "RMS error"),
    (lambda out: out.double(), "float64"),
    (lambda out: out.t().contiguous().t(), "strides"),
    (lambda out: out.index_fill(0, torch.tensor(0), torch.nan), "finite"),
])  # fmt: skip
def test_a_wrong_kernel_is_not_timed(dequantize: Kernel, spoil: Any, word: str) -> None:
    wrong = dataclasses.replace(dequantize, run=lambda *args: spoil(dequantize.run(*args)))
    sample = next(s for s in dequantize.samples() if s.bench)
    result = microbench.bench(wrong, sample, ALONE)
    assert word in result.verdict and result.times is None and "NOT TIMED" in results.line(result)


def test_integers_may_differ_rarely_and_by_one() -> None:
    kernel = kernels.load()["graphwright.quantize"][0]
    sample = Sample("4096", lambda g: (torch.randn(4096, generator=g), 0.05, 0, -128, 127, torch.int8))

    def off(count: int, by: int) -> str | None:
        def run(*args: Any) -> torch.Tensor:
            out = kernel.run(*args)
            out[:count] += by
            return out

        return disagreement(dataclasses.replace(kernel, run=run), sample)

    assert off(0, 0) is None and off(3, 1) is None
    assert "steps off" in (off(1, 3) or "") and "elements differ" in (off(400, 1) or "")


def test_overwritten_arguments_are_noticed() -> None:
    kernel = kernels.load()["graphwright.softmax"][0]
    sample = Sample("3x5", lambda g: (torch.randn(3, 5, generator=g), None, 1.0, False))
    wrong = dataclasses.replace(kernel, run=lambda x, *rest: kernel.run(x, *rest, x))
    assert disagreement(wrong, sample) == "an argument was overwritten"


def test_a_kernel_that_fails_is_a_row_of_the_table() -> None:
    kernel = kernels.load()["graphwright.quantize"][0]
    sample = Sample("64", lambda g: (torch.randn(64, generator=g), 0.05, 0, -128, 127, torch.int8))

    def broken(*args: Any) -> torch.Tensor:
        raise MemoryError("no room")

    result = run.bench(dataclasses.replace(kernel, run=broken), sample)
    assert result.verdict == "MemoryError: no room" and result.times is None


def test_unknown_names_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert microbench.main(["no-such-kernel", "--device", "cpu"]) == 2
    assert "graphwright.softmax" in capsys.readouterr().err


SMALL = shapes.Shapes(((5, 64, 96),), ((1, 8, 9, 7, 16, 3, 1),), ((6, 40),), ((1, 4, 2, 9, 32, 1),))


def test_every_case_is_right_for_its_op_and_its_kernels() -> None:
    """The arguments of a layer: the op takes them, and every CPU kernel that serves them agrees with its reference."""
    loaded = kernels.load()
    for case in cases.CASES:
        if case.op not in {r.name for r in ops.rows()}:
            continue
        for sample, _ in cases.samples_for(case.op, SMALL):
            args = sample.args(torch.Generator().manual_seed(0))
            for kernel in loaded.get(case.op, ()):
                if kernel.device == "cpu" and kernel.supports(*args) is None:
                    assert disagreement(kernel, sample) is None, (case.op, sample.name)


def test_kernels_with_packed_weights_give_the_same() -> None:
    for several in kernels.load().values():
        for kernel in several:
            if kernel.device == "cpu" and kernel.ready is not None:
                sample = next(s for s in kernel.samples() if not s.bench)
                args = sample.args(torch.Generator().manual_seed(0))
                assert torch.equal(kernel.prepared(*args)(), kernel.run(*args)), kernel.op


def test_peers_compute_the_same_or_say_why_not(dequantize: Kernel) -> None:
    """On small layers: whatever peer runs here reaches the floor, and the rest have reasons of their own."""
    plan = microbench.Plan(rounds=3, peers=frozenset(peers.NAMES) - peers.COMPILED)
    ran = set()
    for op in ("graphwright.linear_int8", "graphwright.linear_w8", "graphwright.conv2d_int8", "graphwright.norm_quantize", "graphwright.attention_int8"):
        kernel = next(k for k in kernels.load()[op] if k.device == "cpu")
        if kernel.supports(*next(iter(kernel.samples())).args(torch.Generator())) is not None:
            pytest.skip("this machine has none of the instructions that the int8 kernels need")
        for sample, _ in cases.samples_for(op, SMALL):
            result = run.bench(kernel, sample, plan)
            assert result.verdict == "ok"
            for peer in result.peers:
                assert "dB" not in peer.reason, (op, sample.name, peer)
                assert (peer.times is None) == bool(peer.reason)
                ran |= {(op, peer.name)} if peer.times else set()
    assert {("graphwright.linear_int8", "float"), ("graphwright.linear_int8", "int_mm"), ("graphwright.attention_int8", "sdpa"), ("graphwright.norm_quantize", "eager")} <= ran


@functools.cache
def inductor_fails() -> str | None:
    """None, or why Inductor makes nothing of the simplest layer here, as it is or tuned: no compiler, no headers of Python."""
    if inductor.reason() is not None:
        return inductor.reason()
    try:
        with torch.no_grad():
            for options in ({}, {**list_mode_options("max-autotune-no-cudagraphs"), "freezing": True}):
                torch._dynamo.reset()
                torch.compile(torch.nn.Linear(32, 32).eval(), options=options)(torch.randn(8, 32))
    except Exception as error:  # noqa: BLE001 - whatever it raises is the reason
        return f"Inductor does not work here: {type(error).__name__}: {str(error)[-300:]}"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("op", ["linear_w8", "linear_w8_groups", "linear_w4", "linear_sparse24", "conv2d_winograd", "attention"])
def test_what_inductor_makes_of_an_op_computes_the_same(op: str, dequantize: Kernel) -> None:
    """As it is, and with the weights frozen."""
    if (why := inductor_fails()) is not None:
        pytest.skip(why)
    sample, _ = next(cases.samples_for(f"graphwright.{op}", SMALL))
    kernel = next(k for k in kernels.load()[f"graphwright.{op}"] if k.device == "cpu")
    result = run.bench(kernel, sample, microbench.Plan(rounds=3, peers=frozenset({"inductor", "autotuned"})))
    assert [(p.name, p.reason) for p in result.peers] == [("inductor", ""), ("autotuned", "")]


def test_a_layer_of_8_bit_floats_has_its_scales_as_a_float_layer_too() -> None:
    sample, _ = next(cases.samples_for("graphwright.linear_fp8", SMALL))
    named = dict(zip(next(r for r in ops.rows() if r.name == "graphwright.linear_fp8").params, sample.args(torch.Generator().manual_seed(0)), strict=False))
    wanted = named["x"] @ (named["weight"].float() * named["weight_scales"][:, None]).t() + named["bias"]
    assert torch.allclose(peers.linear_float(named, "cpu")(), wanted, rtol=1e-4, atol=1e-3)


def test_a_wrong_peer_is_left_out(dequantize: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kernels.load()["graphwright.softmax"][0]
    monkeypatch.setattr(run, "peers_of", lambda op: {"wrong": lambda a, device: lambda: torch.zeros_like(a["x"]), "broken": lambda a, device: 1 / 0})
    result = run.bench(kernel, Sample("3x5", lambda g: (torch.randn(3, 5, generator=g), None, 1.0, False)), microbench.Plan(rounds=3))
    assert [p.times for p in result.peers] == [None, None] and "dB" in result.peers[0].reason and "ZeroDivisionError" in result.peers[1].reason
    assert any("ZeroDivisionError" in text for text in results.notes([result]))


def test_a_shape_file(tmp_path: Path, dequantize: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"rows": [[3, 17], [4, 64]]}')
    assert microbench.main(["--op", "graphwright.softmax", "--shapes", str(file), "--device", "cpu", "--rounds", "3", "--no-peers"]) == 0
    printed = capsys.readouterr().out
    assert "3x17" in printed and "4x64" in printed


def test_a_layer_that_a_kernel_refuses_is_no_failure(tmp_path: Path, dequantize: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"conv": [[1, 8, 5, 5, 8, 3, 1]]}')
    assert microbench.main(["--op", "conv2d_int8", "--shapes", str(file), "--device", "cpu", "--rounds", "3", "--no-peers"]) == 0
    assert "NOT TIMED: refused" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "word"), [
    ("[1, 2]", "object with the keys"), ('{"rows": [[1]]}', "is no shape"), ('{"rows": [[1, -2]]}', "is no shape"), ("{", "can't be read"), ('{"lines": []}', "keys"),
])  # fmt: skip
def test_a_bad_shape_file_says_what_is_wrong(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(InputError, match=word):
        shapes.shapes_of(str(file))


def test_a_missing_shape_file_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert microbench.main(["--shapes", "no-such-set", "--device", "cpu"]) == 2
    assert "llama" in capsys.readouterr().err


def test_times_are_percentiles() -> None:
    found = clock.Times.of([0.005, 0.001, 0.003, 0.002, 0.004])
    assert (found.least, found.p50) == (1.0, 3.0) and 1.0 < found.p20 < 2.5 and 3.5 < found.p80 < 5.0


def test_the_roofline_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one = results.Result("graphwright.softmax", "llvm", "3x5", "ok", 100, 1000, "f32", clock.Times(1, 1, 1, 1), gb_per_s=1.0, gop_per_s=2.0, of_copy=0.1, of_peak=0.1)
    results.plot([one], 10.0, {"f32": 100.0}, tmp_path / "roof.svg")
    assert "softmax" in (tmp_path / "roof.svg").read_text()


def test_a_summary_tells_wins_and_losses_alike() -> None:
    def result(ratio: float) -> results.Result:
        peers_ = (results.Peer("slow", clock.Times(9, 9, 9, 9), 9.0), results.Peer("best", clock.Times(1, 1, 1, 1), ratio), results.Peer("absent", reason="no"))
        return results.Result("graphwright.softmax", "llvm", "3x5", "ok", 100, 1000, "f32", clock.Times(1, 1, 1, 1), None, peers_, 1.0, 2.0, 0.5, 0.25)

    wrong = results.Result("graphwright.softmax", "llvm", "3x5", "an element is off")
    record = {"results": [results.plain(r) for r in (result(0.5), result(0.98), result(3.0), wrong)]}
    assert results.summary(record)[2:] == ["| `softmax` | 3 | 2 | 0.50, 0.98, 3.00 | 25 % | 50 % |"]
