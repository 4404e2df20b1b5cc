"""Calls alike are inferred once, and what is remembered is what the op gives: views are views."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from graphwright import inference
from graphwright.inference import Inference

aten = torch.ops.aten

CALLS = {
    "transpose": (aten.transpose.int, (0, 1)),
    "view": (aten.view.default, ([3, 2, 4],)),
    "reshape": (aten.reshape.default, ([24],)),
    "slice": (aten.slice.Tensor, (1, 1, 3)),
    "select": (aten.select.int, (0, 2)),
    "expand": (aten.expand.default, ([2, 6, 4],)),
    "split": (aten.split.Tensor, (2, 1)),
    "unbind": (aten.unbind.int, (0,)),
    "view as integers": (aten.view.dtype, (torch.int32,)),
    "contiguous": (aten.contiguous.default, ()),
    "relu": (aten.relu.default, ()),
    "topk": (aten.topk.default, (2,)),
    "to": (aten.to.dtype, (torch.float64,)),
}


def parts(value):
    return list(value) if isinstance(value, (tuple, list)) else [value]


def facts(value):
    return [(tuple(v.shape), v.stride(), v.storage_offset(), v.dtype, v.device) for v in parts(value)]


@pytest.mark.parametrize("name", CALLS)
def test_the_second_answer_is_the_first(name, monkeypatch):
    target, rest = CALLS[name]
    mode, infer = FakeTensorMode(), Inference()
    base = [mode.from_tensor(torch.randn(8, 4)) for _ in range(2)]
    with mode:
        inputs = [b[2:] for b in base]  # views themselves, with an offset
    first = infer(mode, target, (inputs[0], *rest), {})
    runs = []
    run = inference._run
    monkeypatch.setattr(inference, "_run", lambda *a: (runs.append(a), run(*a))[1])
    second = infer(mode, target, (inputs[1], *rest), {})
    assert not runs
    assert type(first) is type(second) and facts(first) == facts(second)

    def shares(value, source):
        return [v.untyped_storage()._cdata == source.untyped_storage()._cdata for v in parts(value)]

    assert shares(first, inputs[0]) == shares(second, inputs[1])
    assert not any(shares(second, inputs[0]))


def test_two_arguments_over_one_memory_are_inferred_each_time(monkeypatch):
    mode, infer = FakeTensorMode(), Inference()
    base = mode.from_tensor(torch.randn(4, 4))
    with mode:
        a, b = base[:2], base[:2]
    runs = []
    run = inference._run
    monkeypatch.setattr(inference, "_run", lambda *args: (runs.append(args), run(*args))[1])
    for _ in range(2):
        infer(mode, aten.expand_as.default, (a, b), {})
    assert len(runs) == 2
