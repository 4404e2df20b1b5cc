"""Packed weights that programs share."""

import gc

import torch

from graphwright.backends.packs import packed, shared


class Form:
    pass


def test_outside_every_call_packs():
    weight = torch.zeros(3)
    assert packed(Form, "a", weight) is not packed(Form, "a", weight)


def test_inside_the_same_tensors_are_packed_once():
    weight, other = torch.zeros(3, 4), torch.zeros(3, 4)
    with shared():
        first = packed(Form, "a", weight, None)
        assert packed(Form, "a", weight.detach(), None) is first
        for different in (packed(Form, "b", weight, None), packed(Form, "a", other, None), packed(Form, "a", weight, other), packed(Form, "a", weight.t(), None),
                          packed(Form, "a", weight[:2], None)):  # fmt: skip
            assert different is not first
    assert packed(Form, "a", weight, None) is not first


def test_what_nobody_holds_goes_and_its_memory_is_not_mistaken():
    with shared():
        packed(Form, "a", torch.zeros(1000))
        gc.collect()
        made = []
        packed(lambda: made.append(1) or Form(), "a", torch.zeros(1000))
        assert made == [1]
        held = packed(Form, "a", torch.zeros(1000))  # its weight has no other owner
        for _ in range(20):
            assert packed(Form, "a", torch.zeros(1000)) is not held


def test_onednn_weights_are_shared_too():
    weight = torch.randn(32, 32)
    make = lambda: torch.ops.mkldnn._reorder_linear_weight(weight, 4)
    with shared():
        first = packed(make, "onednn", weight)
        assert first.is_mkldnn and packed(make, "onednn", weight) is first
