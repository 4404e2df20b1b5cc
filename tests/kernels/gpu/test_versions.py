"""The record of machine code and the evidence for other versions of Triton: what they say is sound, and a stale row is found. Nothing is compiled."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from graphwright.kernels import gpu
from graphwright.kernels.gpu import ahead, versions
from graphwright.kernels.gpu.ahead import Built

GOOD = Built("abc", registers=100, shared=1024, instructions=500, matrix=(("IGMMA", 4),))


def row(built: Built) -> dict[str, object]:
    return {**asdict(built), "matrix": dict(built.matrix)}


def test_a_row_that_this_code_did_not_make_is_found() -> None:
    """Equal sources and another number anywhere: compiled with other options, or by other code."""
    assert ahead.differs(GOOD, row(GOOD)) is None
    for other in (replace(GOOD, registers=64), replace(GOOD, instructions=501), replace(GOOD, shared=0), replace(GOOD, matrix=(("IGMMA", 2),))):
        assert "stale" in (ahead.differs(other, row(GOOD)) or "")
    assert ahead.differs(replace(GOOD, source="def", registers=101), row(GOOD)) is None  # other code, nothing worse
    assert ahead.differs(replace(GOOD, registers=150), row(GOOD), same_compiler=False) is None


def test_digest_covers_all_options() -> None:
    family = gpu.families()["quantize_rows"]
    _, args = next(iter(family.ahead()))
    launch = family.plan(*args, config=family.configs[0]).launches[0]
    marks = {ahead.digest(launch, "sm_90")}
    for name in ("warps", "stages"):
        other = replace(launch, config=replace(launch.config, **{name: getattr(launch.config, name) + 1}))
        assert ahead.options_of(other) != ahead.options_of(launch)
        marks.add(ahead.digest(other, "sm_90"))
    assert len(marks) == 3


def test_rows_are_summed_up_written_and_read(tmp_path: Path) -> None:
    made = {"quantize_rows | case | A=1 | 0 | sm_90": GOOD, "quantize_rows | case | A=2 | 0 | sm_90": replace(GOOD, spills=8, problem="8 spilled")}
    summed = versions.summed_up("quantize_rows", "sm_90", 5, made, "2026-01-02")
    assert (summed["builds"], summed["compiled"], summed["good"], summed["spilled"]) == (5, 2, 1, 1)
    assert summed["refused"] == {"case | A=2 | 0": "8 spilled"}
    assert versions.unexpected("quantize_rows", "sm_90", summed) == ["case | A=2 | 0"]
    assert versions.stands(summed, "quantize_rows", "sm_90", 2)
    assert not versions.stands(summed, "quantize_rows", "sm_90", 3)  # fewer than wanted
    assert not versions.stands({**summed, "of": "0"}, "quantize_rows", "sm_90", 2)  # about other code
    rows = {"quantize_rows": {"3.6.0": {"sm_90": summed, "sm_80": summed}}, "linear_w4": {"3.9.0": {"sm_90": summed}}}
    versions.write(rows, tmp_path / "v.json")
    assert versions.read(tmp_path / "v.json") == rows
    assert any("worse than on record: case | A=2 | 0: 8 spilled" in line for line in versions.listed(rows))


def test_what_a_version_refuses_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    config = gpu.families()["quantize_rows"].configs[0]
    assert ahead.pruned("quantize_rows", config, "sm_90") is None
    monkeypatch.setattr(versions, "problems", lambda name: {(str(config), "sm_90"): "8 spilled"})
    assert ahead.pruned("quantize_rows", config, "sm_90") == "8 spilled"
    assert ahead.pruned("quantize_rows", config, "sm_80") is None


def test_evidence_for_other_versions() -> None:
    """Rows add up and are about kernels that there are; nothing that was compiled is worse than on record but what is named here, and left out there."""
    known = {("linear_w4", "3.9.0", "sm_80"): "BM=128 BN=128 SPLIT=1 warps=8 stages=3"}  # spills 32 bytes
    rows = versions.read()
    assert rows and set(rows) <= set(gpu.families())
    for name, found in rows.items():
        for version, by_target in found.items():
            for target, row in by_target.items():
                assert row["compiled"] == row["good"] + len(row["refused"]) and 0 < row["compiled"] <= row["builds"]
                worse = {short.split(" | ")[1] for short in versions.unexpected(name, target, row)}
                assert worse <= {known.get((name, version, target))}, (name, version, target)
                assert all((config, target) in versions.problems(name, version) for config in worse)
