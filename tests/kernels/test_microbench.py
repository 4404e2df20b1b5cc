"""The kernel benchmark: what it times, what it refuses to time, what it writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graphwright import kernels, microbench
from graphwright.kernel import Kernel, Sample


@pytest.fixture
def dequantize(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(microbench, "copy_bandwidth", lambda device="cpu": 10.0)
    return kernels.load()["graphwright.dequantize"][0]


def test_a_right_kernel_is_timed(dequantize: Kernel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kernels.json"
    assert microbench.main(["dequantize", "--json", str(file), "--rounds", "3"]) == 0
    record = json.loads(file.read_text())
    (result,) = [r for r in record["results"] if r["op"] == "graphwright.dequantize"]
    assert result["verdict"] == "ok" and result["bytes"] == 1024 * 1536 * 5
    assert result["gb_per_s"] == pytest.approx(result["bytes"] / result["ms"] / 1e6)
    assert result["share"] == pytest.approx(result["gb_per_s"] / 10.0)
    assert "1024x1536" in capsys.readouterr().out


@pytest.mark.parametrize(("spoil", "word"), [
    (lambda out: out + 0.01, "RMS error"),
    (lambda out: out.double(), "float64"),
    (lambda out: out.t().contiguous().t(), "strides"),
    (lambda out: out.index_fill(0, torch.tensor(0), torch.nan), "finite"),
])  # fmt: skip
def test_a_wrong_kernel_is_not_timed(dequantize: Kernel, spoil: Any, word: str) -> None:
    wrong = dataclasses.replace(dequantize, run=lambda *args: spoil(dequantize.run(*args)))
    sample = next(s for s in dequantize.samples() if s.bench)
    result = microbench.bench(wrong, sample)
    assert word in result.verdict and result.ms is None and "NOT TIMED" in microbench.line(result)


def test_integers_may_differ_rarely_and_by_one() -> None:
    kernel = kernels.load()["graphwright.quantize"][0]
    sample = Sample("4096", lambda g: (torch.randn(4096, generator=g), 0.05, 0, -128, 127, torch.int8))

    def off(count: int, by: int) -> str | None:
        def run(*args: Any) -> torch.Tensor:
            out = kernel.run(*args)
            out[:count] += by
            return out

        return microbench.disagreement(dataclasses.replace(kernel, run=run), sample)

    assert off(0, 0) is None and off(3, 1) is None
    assert "steps off" in (off(1, 3) or "") and "elements differ" in (off(400, 1) or "")


def test_overwritten_arguments_are_noticed() -> None:
    kernel = kernels.load()["graphwright.softmax"][0]
    sample = Sample("3x5", lambda g: (torch.randn(3, 5, generator=g), None, 1.0, False))
    wrong = dataclasses.replace(kernel, run=lambda x, *rest: kernel.run(x, *rest, x))
    assert microbench.disagreement(wrong, sample) == "an argument was overwritten"


def test_unknown_names_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert microbench.main(["no-such-kernel"]) == 2
    assert "graphwright.softmax" in capsys.readouterr().err
