"""Caches that grow in place: the rewrite, its refusals, and the memory that the kernel writes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.backends.room import append, reserve
from graphwright.lower import lower
from graphwright.passes.append_cache import AppendCache


def test_golden(captured, run, body):
    grow = lambda m, past, x: (torch.cat([past, torch.relu(x)], dim=-2),)
    after, result = run(captured(grow, torch.randn(2, 3, 4, 5), torch.randn(2, 3, 1, 5)), AppendCache())
    assert body(after) == (
        "relu_default: f32[2, 3, 1, 5] = aten.relu(input_1)  # relu\n"
        "cache_append_default: f32[2, 3, 5, 5] = graphwright.cache_append(input_0, relu_default)  # cat\n"
        "return (cache_append_default)"
    )
    assert result.changes == [("cat", "appended to input_0")] and not result.refusals


@pytest.mark.parametrize(
    "grow,past,said",
    [
        (lambda m, past, x: torch.cat([past, x.relu()], 1), (2, 3, 4), "3 axes"),
        (lambda m, past, x: torch.cat([past, x.relu()], 3), (2, 3, 4, 5), "along axis 3"),
        (lambda m, past, x: torch.cat([past, x], 2), (2, 3, 4, 5), "with an input"),
        (lambda m, past, x: (torch.cat([past, x.relu()], 2), torch.cat([past, x.exp()], 2)), (2, 3, 4, 5), "same place"),
    ],
)
def test_refusals(captured, run, grow, past, said):
    x = torch.randn(2, 1, 4) if len(past) == 3 else torch.randn(2, 3, 4, 1) if "axis 3" in said else torch.randn(2, 3, 1, 5)
    _, result = run(captured(grow, torch.randn(past), x), AppendCache())
    assert len(result.refusals) == 1 and said in result.refusals[0][1]


def test_what_is_no_cache_is_left_alone(captured, run):
    inner = lambda m, past, x: torch.cat([past, x.relu()], 2).sum()  # not returned
    front = lambda m, past, x: torch.cat([x.relu(), past], 2)
    for model in (inner, front):
        _, result = run(captured(model, torch.randn(2, 3, 4, 5), torch.randn(2, 3, 1, 5)), AppendCache())
        assert not result.changes and not result.refusals


def test_a_program_writes_behind_its_input_and_leaves_the_input_alone(captured, run):
    grow = lambda m, past, x: (torch.cat([past, torch.relu(x)], 2), past.sum())
    past, x = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 1, 5)
    program, _ = run(captured(grow, past, x), AppendCache())
    runner = lower(program, plan={}).runner
    expected = torch.cat([past, x.relu()], 2)
    assert torch.equal(runner(past, x)[0], expected)
    buffer = reserve(past, 9).fill_(7.0)
    buffer[:, :, 2:6] = past
    got, total = runner(buffer.narrow(2, 2, 4), x)
    torch.testing.assert_close(total, past.sum())
    assert torch.equal(got, expected) and got.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert bool((buffer[:, :, :2] == 7).all()) and bool((buffer[:, :, 7:] == 7).all())


SIZES = {"batch": st.integers(1, 3), "heads": st.integers(1, 3), "size": st.integers(1, 4), "slots": st.integers(1, 8), "start": st.integers(0, 8),
         "tokens": st.integers(0, 8), "more": st.integers(0, 3)}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(**SIZES)
def test_append_is_cat_and_writes_the_slots_behind_a_window_alone(batch, heads, size, slots, start, tokens, more):
    buffer = reserve(torch.empty(batch, heads, 1, size), slots).copy_(torch.rand(batch, heads, slots, size))
    start, before = min(start, slots), buffer.clone()
    past, new = buffer[:, :, start : start + tokens], -1.0 - torch.rand(batch, heads, more, size)
    expected = torch.cat([past, new], 2)
    got, end = append(past, new), start + past.shape[2]
    assert torch.equal(got, expected) and torch.equal(buffer[:, :, :end], before[:, :, :end])
    if 0 < more <= slots - end:
        assert got.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr() and torch.equal(buffer[:, :, end : end + more], new)
        before[:, :, end : end + more] = new
    assert torch.equal(buffer, before)


@settings(max_examples=150, deadline=None)
@given(**SIZES, kind=st.sampled_from(["window", "swapped", "half", "sliced", "offset"]))
def test_nothing_is_written_into_memory_of_others(batch, heads, size, slots, start, tokens, more, kind):
    shape = {"half": (batch, 2 * heads, slots, size), "sliced": (batch, heads, slots, 2 * size), "swapped": (batch, slots, heads, size)}.get(kind, (batch, heads, slots, size))
    offset = 3 * (kind == "offset")
    store = torch.arange(float(torch.Size(shape).numel() + offset))
    whole = store[offset:].view(shape)
    whole = {"half": lambda: whole[:, ::2], "sliced": lambda: whole[..., :size], "swapped": lambda: whole.transpose(1, 2)}.get(kind, lambda: whole)()
    start = min(start, slots)
    past, new = whole[:, :, start : start + tokens], -1.0 - torch.rand(batch, heads, more, size)
    before, expected = store.clone(), torch.cat([past, new], 2)
    assert torch.equal(append(past, new), expected) and torch.equal(store, before)


def test_a_window_with_room_is_not_copied():
    buffer = reserve(torch.empty(2, 3, 1, 4), 8).zero_()
    view = buffer.narrow(2, 0, 3)
    for k in range(5):
        view = append(view, torch.full((2, 3, 1, 4), k + 1.0))
    assert view.data_ptr() == buffer.data_ptr() and torch.equal(buffer[0, 0, 3:, 0], torch.arange(1.0, 6.0))
    full = append(view, torch.ones(2, 3, 1, 4))
    assert full.shape[2] == 9 and full.data_ptr() != buffer.data_ptr()
