"""Grouped queries: attention reads shared keys and values where they stand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphwright.lower import lower
from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.group_queries import GroupQueries
from graphwright.passes.merge_heads import MergeHeads


def repeat(x, times):
    """As transformers spells it."""
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, times, t, d).reshape(b, h * times, t, d)


def attend(m, q, k, v, mask):
    times = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, repeat(k, times), repeat(v, times), mask)


def inputs(b=2, h=6, kv=2, s=3, t=7, d=8, dtype=torch.float32):
    torch.manual_seed(0)
    mask = torch.rand(b, 1, s, t) > 0.3
    mask[..., 0] = True
    return torch.randn(b, h, s, d, dtype=dtype), torch.randn(b, kv, t, d, dtype=dtype), torch.randn(b, kv, t, d, dtype=dtype), mask


def test_golden(captured, run, body):
    after, result = run(captured(attend, *inputs()), Canonicalize(), GroupQueries())
    assert body(after) == (
        "scaled_dot_product_attention_default_1: f32[2, 6, 3, 8] = aten.scaled_dot_product_attention"
        "(input_0, input_1, input_2, input_3, 0.0, False, scale=None, enable_gqa=True)  # scaled_dot_product_attention\n"
        "return (scaled_dot_product_attention_default_1)"
    )
    assert result.changes == [("scaled_dot_product_attention", "6 heads of queries read 2 of keys and values")]


@pytest.mark.parametrize("kv", [1, 2, 3])
def test_numbers_with_heads_merged_and_as_it_runs(captured, run, kv):
    model = lambda m, q, k, v: attend(m, q, k, v, None).permute(0, 2, 1, 3).reshape(2, 3, 48)
    q, k, v, _ = inputs(kv=kv)
    after, result = run(captured(model, q, k, v), Canonicalize(), MergeHeads(), GroupQueries())
    assert len(result.changes) == 1 and "graphwright.attention" in after.text() and "expand" not in after.text()
    torch.testing.assert_close(lower(after).runner(q, k, v)[0], model(None, q, k, v), rtol=1e-5, atol=1e-5)


def test_other_spellings(captured, run):
    interleaved = lambda m, q, k, v, mask: F.scaled_dot_product_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), mask)
    for model in (interleaved, attend):
        after, result = run(captured(model, *inputs()), Canonicalize(), GroupQueries())
        assert len(result.changes) == 1 and "enable_gqa=True" in after.text()


def test_heads_repeated_in_another_order_are_left_alone(captured, run):
    tiled = lambda m, q, k, v, mask: F.scaled_dot_product_attention(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1), mask)

    def swapped(m, q, k, v, mask):
        again = lambda x: x[:, None].expand(2, 3, 2, 7, 8).reshape(2, 6, 7, 8)  # head 0, 1, 0, 1, …
        return F.scaled_dot_product_attention(q, again(k), again(v), mask)

    for model in (tiled, swapped):
        _, result = run(captured(model, *inputs()), Canonicalize(), GroupQueries())
        assert not result.changes and not result.refusals


@pytest.mark.parametrize("which,said", [("k", "values are not"), ("v", "keys are not")])
def test_only_one_of_keys_and_values_is_repeated(captured, run, which, said):
    q, k, v, mask = inputs()
    if which == "k":
        model, given = lambda m, q, k, v, mask: F.scaled_dot_product_attention(q, repeat(k, 3), v, mask), (q, k, repeat(v, 3), mask)
    else:
        model, given = lambda m, q, k, v, mask: F.scaled_dot_product_attention(q, k, repeat(v, 3), mask), (q, repeat(k, 3), v, mask)
    _, result = run(captured(model, *given), Canonicalize(), GroupQueries())
    assert len(result.refusals) == 1 and said in result.refusals[0][1]


def test_shorter_floats_are_refused(captured, run):
    _, result = run(captured(attend, *inputs(dtype=torch.bfloat16)), Canonicalize(), GroupQueries())
    assert len(result.refusals) == 1 and "float32" in result.refusals[0][1]
