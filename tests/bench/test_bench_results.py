"""Statistics, the check of outputs, the schema, the table."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from bench import results, table


def test_latency_is_over_all_calls_of_all_rounds():
    assert results.latency([[1.0, 9.0], [2.0, 3.0], [4.0]]) == {
        "median_ms": 3.0,
        "min_ms": 1.0,
        "p95_ms": 8.0,
        "calls": 5,
    }


def test_latency_without_a_call_is_an_error():
    with pytest.raises(ValueError, match="no timed call"):
        results.latency([[]])


def test_speedup_pairs_rounds_so_that_a_slow_spell_hits_both_sides():
    base = [[10.0], [10.0], [100.0], [10.0]]  # the machine was ten times slower in round 3
    other = [[5.0], [5.0], [50.0], [5.0]]
    assert results.speedup(base, other) == {"median": 2.0, "low": 2.0, "high": 2.0, "of_minima": 2.0}


def test_speedup_takes_the_median_within_a_round_and_quartiles_over_rounds():
    found = results.speedup([[8.0, 8.0, 80.0]] * 5, [[1.0], [2.0], [4.0], [8.0], [16.0]])
    assert found == {"median": 2.0, "low": 1.0, "high": 4.0, "of_minima": 8.0}


def test_speedup_of_unequal_rounds_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        results.speedup([[1.0]], [[1.0], [1.0]])


def test_sqnr_of_a_known_error():
    signal = np.ones(1000, np.float32)
    assert results.sqnr_db(signal, signal * np.float32(1.01)) == pytest.approx(40.0, abs=0.01)
    assert results.sqnr_db(signal, signal) == results.HIGHEST_DB
    assert results.sqnr_db(signal * 0, signal) == -results.HIGHEST_DB


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_sqnr_of_a_value_that_is_not_finite_is_the_lowest(bad: float):
    value = np.ones(8, np.float32)
    value[3] = bad
    assert results.sqnr_db(np.ones(8), value) == -results.HIGHEST_DB


def test_check_names_the_worst_output():
    good, noisy = np.ones((2, 3)), np.ones((2, 3)) * 1.5
    worst, reason = results.check([[good, good], [good, good]], [[good, good], [good, noisy]], 20.0)
    assert worst == pytest.approx(6.02, abs=0.01)
    assert reason == "output 1 for check input 1: SQNR 6.0 dB is below the bound of 20 dB"
    assert results.check([[good]], [[noisy]], 6.0)[1] is None


@pytest.mark.parametrize(
    ("got", "words"),
    [
        ([[np.ones(3)]], "shape \\(3,\\) instead of \\(2, 3\\)"),
        ([[np.ones((2, 3)), np.ones(1)]], "2 outputs instead of 1"),
        ([[]], "0 outputs instead of 1"),
    ],
)
def test_check_refuses_other_structures(got: list[list[np.ndarray]], words: str):
    worst, reason = results.check([[np.ones((2, 3))]], got, -1000.0)
    assert worst == -results.HIGHEST_DB
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(reason)


def test_check_wants_integers_equal():
    want = np.arange(100)
    have = want.copy()
    have[7] += 1  # 51 dB, but another token
    assert "must be equal" in str(results.check([[want]], [[have]], 20.0)[1])
    assert results.check([[want]], [[want.copy()]], 20.0)[1] is None


def peer(name: str, **changes: object) -> dict:
    row = {
        "peer": name,
        "precision": "float32",
        "status": "ok",
        "reason": None,
        "sqnr_db": 120.0,
        "floor_db": 60.0,
        "prepare_s": 1.25,
        "memory_mb": 300.0,
        "peak_memory_mb": 400.0,
        "latency": {"median_ms": 12.5, "min_ms": 12.0, "p95_ms": 13.0, "calls": 6},
        "speedup": {"median": 1.5, "low": 1.4, "high": 1.6, "of_minima": 1.5},
        "rounds_ms": [12.5, 12.4],
        "details": {},
    }
    return row | changes


def failed(name: str, status: str, reason: str) -> dict:
    return peer(
        name,
        status=status,
        reason=reason,
        latency=None,
        speedup=None,
        rounds_ms=[],
        sqnr_db=None,
        prepare_s=None,
        memory_mb=None,
        peak_memory_mb=None,
    )


@pytest.fixture
def record() -> dict:
    model = {
        "model": "m",
        "description": "a model",
        "inputs": {"0": "1x3 float32"},
        "parameters": 1_500_000,
        "reference": "float64",
        "peers": [peer("eager"), failed("ort", "skipped", "onnx: missing | really")],
    }
    return {
        "schema": results.SCHEMA,
        "date": results.now(),
        "commit": {"hash": "0123456789abcdef", "dirty": True},
        "command": "python bench/run.py",
        "machine": results.machine(),
        "versions": results.versions(),
        "settings": {"rounds": 2, "calls": 3, "threads": 2},
        "models": [model],
    }


def test_a_record_survives_the_disk(record: dict, tmp_path: Path):
    path = tmp_path / "new folder" / "x.json"
    results.save(record, path)
    assert results.load(path) == record
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_failed_save_leaves_the_old_file(record: dict, tmp_path: Path):
    path = tmp_path / "x.json"
    results.save(record, path)
    before = path.read_bytes()
    record["models"][0]["peers"][0]["latency"]["median_ms"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.save(record, path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def broken(record: dict, change: str) -> dict:
    record = copy.deepcopy(record)
    row = record["models"][0]["peers"][0]
    match change:
        case "timed but wrong":
            row.update(status="wrong", reason="3 dB")
        case "ok without a time":
            row["latency"] = None
        case "skipped without a reason":
            row.update(status="skipped", latency=None)
        case "unknown status":
            row.update(status="fine")
        case "missing field":
            del row["sqnr_db"]
        case "extra field":
            row["colour"] = "blue"
        case "wrong type":
            record["models"] = {}
        case "other schema":
            record["schema"] = "graphwright-bench/999"
    return record


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("timed but wrong", "m, eager: a latency stands exactly where"),
        ("ok without a time", "a latency stands exactly"),
        ("skipped without a reason", "a reason stands"),
        ("unknown status", "unknown status 'fine'"),
        ("missing field", "missing fields \\['sqnr_db'\\]"),
        ("extra field", "unknown fields \\['colour'\\]"),
        ("wrong type", "models is a dict"),
        ("other schema", "graphwright-bench/999"),
    ],
)
def test_what_breaks_the_schema_is_refused(record: dict, change: str, words: str):
    results.validate(record)
    with pytest.raises(ValueError, match=words):
        results.validate(broken(record, change))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"schema": "x"}', "null"])
def test_a_foreign_file_is_refused_by_name(text: str, tmp_path: Path):
    path = tmp_path / "foreign.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="foreign.json"):
        results.load(path)


def test_machine_and_versions_tell_what_a_reader_needs():
    machine = results.machine()
    assert 1 <= machine["physical_cores"] <= machine["logical_cores"]
    assert set(machine["flags"]) <= set(results.FLAGS)
    assert json.dumps(machine)
    versions = results.versions()
    assert versions["torch"] and set(results.LIBRARIES) < set(versions)


def test_no_commit_outside_a_repository(tmp_path: Path):
    assert results.commit(tmp_path) is None


def test_the_table_shows_what_was_timed_and_why_the_rest_was_not(record: dict):
    text = table.table(record)
    assert "| eager | 12.5 | 12.0 | 13.0 | 1.50 | 120.0 | 1.25 | 400 |" in text
    assert "- ort: skipped: onnx: missing | really" in text
    assert "commit 0123456789 with changes" in text
    assert "1.5 M parameters" in text


def test_the_table_shows_the_share_of_time_per_backend(record: dict):
    record["models"][0]["peers"].append(
        peer("graphwright", details={"backend_shares": {"onednn": 0.75, "llvm": 0.251}})
    )
    assert "- graphwright: time by backend: onednn 75%, llvm 25%" in table.table(record)


def test_the_summary_has_a_row_per_model_and_a_column_per_peer(record: dict):
    second = copy.deepcopy(record["models"][0])
    second.update(model="n", peers=[failed("eager", "failed", "it fell"), peer("openvino", speedup=None)])
    record["models"].append(second)
    lines = table.summary(record).splitlines()
    assert "| model | eager | ort | openvino |" in lines
    assert "| m | 12.5 (1.50×) | skipped |  |" in lines
    assert "| n | failed |  | 12.5 |" in lines


def test_every_committed_result_follows_the_schema():
    folder = Path(results.__file__).parent / "results"
    for path in folder.glob("*.json"):
        if json.loads(path.read_text()).get("schema", "").startswith("graphwright-bench/"):
            assert table.table(results.load(path))
