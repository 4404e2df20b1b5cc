"""Sizes that may vary: what is covered is right at every size, and what is not covered is said."""

import logging

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from graphwright.capture import Guard, capture, covers
from graphwright.capture.dynamic import Changed, automatic
from graphwright.errors import InputError
from graphwright.ir import Span
from graphwright.structure import flatten, flatten_call


class Encoder(nn.Module):
    """Tokens and a mask in, one vector per token out; positions go up to 16."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, 8), nn.Embedding(16, 8)
        self.q, self.k, self.v, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.register_buffer("ids", torch.arange(16)[None])

    def forward(self, input_ids, attention_mask):
        x = self.tokens(input_ids) + self.places(self.ids[:, : input_ids.shape[1]])
        keep = attention_mask[:, None, None].bool()
        heads = [f(x).view(*x.shape[:2], 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v)]
        y = F.scaled_dot_product_attention(*heads, attn_mask=keep)
        return self.norm(x + y.transpose(1, 2).flatten(2))


def call(batch, length):
    return {"input_ids": torch.randint(0, 20, (batch, length)),
            "attention_mask": (torch.arange(length) < max(1, length - 1)).long().expand(batch, -1).clone()}  # fmt: skip


def spans(found):
    return sorted(found.program.signature.symbols.values(), key=lambda s: (s.high or 0, s.low))


def agree(found, model, args=(), kwargs=None):
    """The guard covers the call and the program answers as the model does."""
    leaves, spec = flatten_call(args, kwargs or {})
    assert spec == found.program.signature.inputs
    assert Guard(found.program).check(leaves) is None
    with torch.no_grad():
        expected, got = flatten(model(*args, **(kwargs or {})))[0], found.program(*leaves)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("example", [(3, 5), (1, 5), (1, 1), (16, 16)], ids=str)
def test_batch_and_length_vary_from_any_example(example):
    torch.manual_seed(0)
    model = Encoder().eval()
    found = capture(model, (), call(*example), dynamic="auto")
    found.program.verify()
    assert found.notes == [] and spans(found) == [Span(1, None), Span(1, 16)]
    for batch, length in ((1, 1), (1, 7), (4, 1), (2, 2), (5, 16), (8, 3)):
        agree(found, model, kwargs=call(batch, length))
    guard = Guard(found.program)
    too_long = flatten_call((), call(2, 17))[0]
    assert "17" in guard.check(too_long) and "1 to 16" in guard.check(too_long)
    unequal = flatten_call((), {**call(2, 5), "attention_mask": torch.ones(3, 5).long()})[0]
    assert "input_ids has shape [2, 5]" in guard.check(unequal)


def test_static_by_default():
    model = nn.Linear(4, 3)
    found = capture(model, (torch.randn(2, 4),))
    assert found.program.signature.symbols == {}
    assert covers(found.program, [torch.randn(2, 4)]) is None
    assert "input has shape [3, 4]" in covers(found.program, [torch.randn(3, 4)])


def test_guard_names_what_differs():
    program = capture(nn.Linear(4, 3), (torch.randn(2, 4),), dynamic="auto").program
    guard, x = Guard(program), torch.randn(2, 4)
    assert guard.check([x]) is None
    assert "float64" in guard.check([x.double()])
    assert "meta" in guard.check([x.to("meta")])
    assert "[2, 5]" in guard.check([torch.randn(2, 5)])
    assert "[4]" in guard.check([torch.randn(4)])
    assert "0" in guard.check([torch.randn(0, 4)])
    assert "2 tensors given, 1 expected" in guard.check([x, x])
    assert "float32" in guard.describe() and "1 or more" in guard.describe()


def test_convolutions_and_flattening():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    found = capture(model, (torch.randn(1, 3, 8, 8),), dynamic="auto")
    for batch in (1, 2, 7):
        agree(found, model, (torch.randn(batch, 3, 8, 8),))


def test_sizes_that_become_long_expressions_end_the_attempt():
    """Windows within windows: torch would take minutes over the guards."""

    class Windows(nn.Module):
        def forward(self, x):
            for window in (3, 4, 5, 7, 9):
                x = F.pad(x, (0, -x.shape[-1] % window))
                x = x.view(*x.shape[:-1], x.shape[-1] // window, window).amax(-1).repeat_interleave(2, -1)
            return x

    model, x = Windows(), torch.randn(2, 3, 1000)
    found = capture(model, (x,), dynamic={"x": {2: "length"}})
    assert any("operations on the inputs' sizes" in n for n in found.notes)
    agree(found, model, (x,))


@pytest.mark.parametrize(("calls", "expected"), [
    ([((2, 3, 8, 8), (8,))], [None, 3, 8, 8]),  # nothing but the batch
    ([((2, 3, 6, 6), (6,))], [None, 3, "a", "a"]),
    ([((2, 3, 6, 7), (6,))], [None, 3, "a", "b"]),
    ([((2, 3, None, 8), (None,)), ((2, 3, 8, 4), (8,))], [None, 3, "a", "b"]),
    ([((2, 3, 6), (6,))], [None, 3, 8, 8]),  # of another rank: not the same call
])  # fmt: skip
def test_sizes_that_differed_between_calls(calls, expected):
    leaves = torch.randn(2, 3, 8, 8), torch.randn(8)
    plan = Changed(tuple(calls)).opened(automatic(leaves, ["x", "y"], ["x", "y"]), leaves)
    dims = {place: g for g in plan.groups for place in g.members}
    for d in range(4):
        assert (dims.get((0, d)) is None) == isinstance(expected[d], int), d
    assert (dims.get((0, 2)) is dims.get((0, 3))) == (expected[2] == expected[3] or isinstance(expected[2], int))
    if expected[2] == "a":  # equal in all calls: one size
        assert dims[0, 2] is dims[1, 0]


def test_a_model_that_answers_otherwise_for_one():
    """squeeze() drops the batch dimension of a batch of one: the program does not claim to cover that."""

    class Squeeze(nn.Module):
        def forward(self, x):
            return (x * 2).squeeze()

    model = Squeeze()
    found = capture(model, (torch.randn(3, 4),), dynamic="auto")
    assert spans(found)[0].low == 2 and any("batch of 1" in n for n in found.notes)
    agree(found, model, (torch.randn(2, 4),))
    assert Guard(found.program).check([torch.randn(1, 4)]) is not None
    found = capture(model, (torch.randn(1, 4),), dynamic="auto")  # from that very example: static
    assert found.program.signature.symbols == {} and any("varying batch" in n for n in found.notes)
    agree(found, model, (torch.randn(1, 4),))


def test_code_that_depends_on_the_length_fixes_the_length_only():
    class Branches(nn.Module):
        def forward(self, ids, x):
            if ids.shape[1] == 5:
                return x * 2 + ids.sum(1, keepdim=True)
            return x

    model = Branches()
    args = torch.randint(0, 9, (3, 5)), torch.randn(3, 4)
    found = capture(model, args, dynamic="auto")
    assert any("sequence is fixed at 5 (dimension 1 of ids)" in n for n in found.notes)
    agree(found, model, (torch.randint(0, 9, (7, 5)), torch.randn(7, 4)))
    assert Guard(found.program).check([torch.randint(0, 9, (3, 6)), torch.randn(3, 4)]) is not None


def test_bounds_and_divisibility_become_spans():
    class Pool(nn.Module):
        def forward(self, mask):
            torch._check(mask.shape[1] % 4 == 0)
            torch._check(mask.shape[1] <= 64)
            return mask.float().view(mask.shape[0], mask.shape[1] // 4, 4).mean(-1)

    model = Pool()
    found = capture(model, (torch.ones(3, 8, dtype=torch.bool),), dynamic="auto")
    found.program.verify()
    span = spans(found)[1]
    assert (span.low, span.high, span.multiple) == (8, 64, 4)
    agree(found, model, (torch.ones(2, 24, dtype=torch.bool),))
    guard = Guard(found.program)
    assert "multiple of 4" in guard.check([torch.ones(2, 10, dtype=torch.bool)])
    assert guard.check([torch.ones(2, 68, dtype=torch.bool)]) is not None


def test_excluded_sizes_end_the_span():
    class NotSeven(nn.Module):
        def forward(self, ids):
            return ids + (1 if ids.shape[1] == 7 else 2)

    found = capture(NotSeven(), (torch.zeros(2, 4, dtype=torch.long),), dynamic="auto")
    guard = Guard(found.program)
    assert guard.check([torch.zeros(2, 7, dtype=torch.long)]) is not None
    agree(found, NotSeven(), (torch.zeros(3, 6, dtype=torch.long),))


def test_sizes_the_user_names():
    class Two(nn.Module):
        def forward(self, x, y):
            return x @ y.transpose(0, 1), x.sum()

    args = torch.randn(4, 6), torch.randn(5, 6)
    model = Two()
    found = capture(model, args, dynamic={"x": {0: "rows", 1: "width"}, "y": {1: "width"}})
    agree(found, model, (torch.randn(9, 3), torch.randn(5, 3)))
    guard = Guard(found.program)
    assert guard.check([torch.randn(9, 3), torch.randn(5, 4)]) is not None  # one width for both
    assert guard.check([torch.randn(9, 3), torch.randn(6, 3)]) is not None  # y's rows are fixed
    found = capture(model, args, dynamic=({0: Dim("rows", min=2, max=9)}, None))
    assert spans(found) == [Span(2, 9)]
    found = capture(model, args, dynamic={"x": (Dim.AUTO, None)})
    agree(found, model, (torch.randn(1, 6), torch.randn(5, 6)))


@pytest.mark.parametrize("bad", [{"z": {0: "b"}}, {"x": {7: "b"}}, "automatic", 3])
def test_wrong_dynamic_is_an_error_of_the_users(bad):
    with pytest.raises(InputError, match="dynamic"):
        capture(nn.Identity(), (torch.randn(2, 3),), dynamic=bad)


def test_inputs_of_equal_size_that_need_not_be_equal():
    """Two sequences that happen to have one length in the example share a symbol: narrower, never wrong."""

    class Sums(nn.Module):
        def forward(self, a, b):
            return a.sum(1) + b.sum(1)

    args = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    found = capture(Sums(), args, dynamic="auto")
    assert Guard(found.program).check([args[0], args[1][:, :4]]) is not None
    found = capture(Sums(), (args[0], args[1][:, :4]), dynamic="auto")
    agree(found, Sums(), (torch.ones(3, 9, dtype=torch.long), torch.ones(3, 2, dtype=torch.long)))


def test_numbers_that_depend_on_sizes_are_not_frozen():
    class Returns(nn.Module):
        def forward(self, x):
            return x * 2, x.shape[0]

    model = Returns()
    found = capture(model, (torch.randn(3, 2),), dynamic="auto")
    assert found.program.signature.symbols == {} and found.run(torch.randn(3, 2))[1] == 3
    assert any("varying" in n for n in found.notes)


def test_what_torch_says_about_attempts_is_not_the_users():
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logs = [logging.getLogger(n) for n in ("torch._export.non_strict_utils", "torch._subclasses.fake_tensor")]
    for log in logs:
        log.addHandler(handler)
    try:
        capture(nn.Conv2d(3, 4, 3).eval(), (torch.zeros(0, 3, 9, 9),), dynamic="auto")
    finally:
        for log in logs:
            log.removeHandler(handler)
    assert not said
