"""The survey of architectures: what the committed table says holds, and the table can say otherwise."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from bench import architectures, zoo
from graphwright.capture import capture
from graphwright.manager import Pipeline
from graphwright.passes.pipeline import default_recipe

RESULTS = Path(architectures.__file__).parent / "results"
COMMITTED = json.loads((RESULTS / "architectures.json").read_text())
ROWS = {row["name"]: row for row in COMMITTED["architectures"]}
#: One of each kind: post-norm and pre-norm, RMS norms, parallel residuals, relative bias, windows, convolutions, audio.
QUICK = ("bert", "gpt2", "gpt-j", "llama", "bloom", "t5", "swin", "resnet", "wav2vec2")
#: Where passes that come late make room for early ones.
LATE = ("cohere", "levit")


def row(**changed):
    return {"name": "m", "family": "text", "model": "M", "captured": True, "reasons": [], "nodes": [9, 4], "expected": {},
            "found": {}, "undone": [], "numerics": None, "refusals": {}, "seconds": 0.1, **changed}  # fmt: skip


def test_the_committed_table_covers_the_zoo():
    assert len(ROWS) >= 40 and list(ROWS) == [a.name for a in zoo.ARCHITECTURES]
    assert COMMITTED["schema"] == architectures.SCHEMA
    assert {r["family"] for r in ROWS.values()} == {"text", "decoder", "seq2seq", "vision", "audio", "both"}


def test_the_committed_table_holds_what_is_claimed():
    assert sum(r["captured"] for r in ROWS.values()) >= 0.9 * len(ROWS)
    assert {n: r["numerics"] for n, r in ROWS.items() if r["numerics"]} == {}
    assert {n: r["undone"] for n, r in ROWS.items() if r["undone"]} == {}
    assert {n: d for n, r in ROWS.items() if (d := architectures.differences(r))} == {}


def test_the_printed_table_is_that_of_the_committed_record():
    assert (RESULTS / "architectures.md").read_text() == architectures.table(COMMITTED)


@pytest.mark.parametrize("name", [a.name for a in zoo.ARCHITECTURES])
def test_what_is_expected_follows_from_the_configuration(name):
    import transformers

    architecture = zoo.get(name)
    config = getattr(transformers, architecture.config)(**architecture.options)
    assert architecture.expected(config) == ROWS[name]["expected"]
    assert set(architecture.expected(config)) <= set(architectures.FUSIONS)


@pytest.mark.parametrize(
    "name", [pytest.param(a.name, marks=() if a.name in QUICK else pytest.mark.soak) for a in zoo.ARCHITECTURES]
)
def test_every_fusion_fires_as_often_as_the_configuration_says(name):
    found = architectures.survey(zoo.get(name))
    assert found["captured"] == ROWS[name]["captured"], found["reasons"]
    assert (found["numerics"], found["undone"]) == (None, [])
    assert architectures.differences(found) == [], found["refusals"]


@pytest.mark.parametrize(
    "name", [pytest.param(a.name, marks=() if a.name in (*QUICK, *LATE) else pytest.mark.soak) for a in zoo.ARCHITECTURES]
)
def test_one_run_does_all_that_can_be_done(name):
    architecture = zoo.get(name)
    model = architecture.build()
    program = capture(model, (), architecture.example(model.config)).program
    if program is None:
        pytest.skip("not captured whole")
    after, _ = Pipeline(default_recipe()).run(program)
    _, records = Pipeline(default_recipe()).run(after)
    assert {r.name: r.result.changes for r in records if r.result.changes} == {}


def test_more_layers_more_fusions():
    """The formulas are no constants: another depth is found as well."""
    small = zoo.get("bert")
    deeper = zoo.Architecture(**{**vars(small), "options": {**small.options, "num_hidden_layers": 5}})
    found = architectures.survey(deeper)
    assert found["found"]["attention"] == 5 and architectures.differences(found) == []


def test_differences_name_what_is_missing_and_what_is_too_many():
    found = row(expected={"attention": 3, "norms": 7}, found={"attention": 2, "norms": 7, "softmax": 1})
    assert architectures.differences(found) == ["attention: 3 expected, 2 found", "softmax: 0 expected, 1 found"]


def test_the_table_shows_differences_and_what_is_wrong():
    rows = [row(name="good", expected={"norms": 2}, found={"norms": 2}),
            row(name="bad", expected={"norms": 2}, found={"norms": 1}, numerics="input 0, output 0: far off"),
            row(name="parts", captured=False, nodes=None, reasons=["line 3: an op"], numerics="not captured")]  # fmt: skip
    text = architectures.table(architectures.record(rows, "eager"))
    assert "Captured whole: 2 of 3. Right by the numerics rule: 1 of 3. Every count as expected: 2 of 3." in text
    lines = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert " 2 |" in lines["| good"] and "1 of 2" in lines["| bad"] and lines["| bad"].endswith("| input 0, output 0: far off |")
    assert "in parts" in lines["| parts"] and "- parts: line 3: an op" in text


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(KeyError, match="no architecture 'nope'; known: bert, "):
        zoo.get("nope")
