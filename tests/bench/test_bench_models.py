"""The zoo: seeded, in eval mode, apart from the global generator; and what peers make of outputs and inputs."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch

from bench import models, peers

SMALL = ["tiny", "resnet8"]


@pytest.mark.parametrize("name", SMALL)
def test_equal_seeds_give_equal_models_and_other_seeds_others(name: str):
    entry = models.get(name)
    before = torch.random.get_rng_state()
    one, same, other = entry.model(), entry.model(), entry.model(seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    for key, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[key])
    assert any(not torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    assert not any(module.training for module in one.modules())
    assert not any(p.requires_grad for p in one.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_weights_look_trained(name: str):
    entry = models.get(name)
    model = entry.model()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.weight.std() > 0 and module.bias.std() > 0
            assert module.running_mean.abs().max() > 1e-3
            assert module.momentum == 0.1
    first, second = (model(*x) for x in entry.checks())
    assert (first - second).abs().max() > 1e-2 * first.abs().max()  # the outputs depend on the inputs


@pytest.mark.parametrize("entry", models.ZOO, ids=lambda e: e.name)
def test_inputs_are_seeded_and_those_of_calibration_differ_from_the_example(entry: models.Entry):
    example, again = models.tensors(entry.example()), models.tensors(entry.example())
    assert all(torch.equal(a, b) for a, b in zip(example, again, strict=True))
    batches = entry.calibration(3)
    assert len(batches) == 3
    for batch in [*batches, entry.checks()[1]]:
        assert type(batch) is type(entry.example())
        for a, b in zip(example, models.tensors(batch), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert not torch.equal(example[0], models.tensors(batch)[0])
    assert torch.equal(models.tensors(entry.checks()[0])[0], example[0])


def test_padded_tokens_have_a_full_first_row_and_shorter_ones():
    mask = models.get("minilm").example()["attention_mask"]
    assert mask.shape == (8, 128) and mask[0].all() and not mask.all()
    assert (mask.diff(dim=1) <= 0).all()


def test_unknown_names_list_the_known_ones():
    with pytest.raises(KeyError, match="known: resnet50, minilm"):
        models.get("resnet99")
    with pytest.raises(ValueError, match="expected float32, bf16 or int8"):
        models.Tolerance().floor("int4")


def test_names_are_unique():
    for names in ([e.name for e in models.ZOO], [p.name for p in peers.PEERS]):
        assert not [name for name, count in collections.Counter(names).items() if count > 1]


def test_cast_leaves_integers_alone():
    inputs = {"x": torch.ones(2), "ids": torch.ones(2, dtype=torch.int64)}
    got = models.cast(inputs, torch.bfloat16)
    assert (got["x"].dtype, got["ids"].dtype) == (torch.bfloat16, torch.int64)
    assert models.cast((torch.ones(1),), torch.float64)[0].dtype == torch.float64


def test_arrays_flatten_what_models_and_runtimes_give():
    outputs = {"a": torch.ones(2, dtype=torch.bfloat16), "b": None, "c": (np.zeros(1, np.float16), [torch.arange(3)])}
    found = peers.arrays(outputs)
    assert [(a.dtype.name, a.shape) for a in found] == [("float32", (2,)), ("float32", (1,)), ("int64", (3,))]


def test_a_missing_package_is_a_reason_of_one_line():
    reason = peers.OnnxRuntime("x", "int8", ("no_such_package_at_all",)).available()
    assert reason == "no_such_package_at_all: ModuleNotFoundError: No module named 'no_such_package_at_all'"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("\n\n  a \nb"), "RuntimeError: a"),
        (KeyError(), "KeyError"),
        (ValueError("x" * 999), "ValueError: " + "x" * 288),
    ],
)
def test_first_line(error: Exception, line: str):
    assert peers.first_line(error) == line


def test_bf16_peers_compute_in_bf16():
    entry = models.get("tiny")
    answer = peers.get("eager-bf16").prepare(entry.model(), entry.example(), [])(entry.example())
    assert answer.dtype == torch.bfloat16
