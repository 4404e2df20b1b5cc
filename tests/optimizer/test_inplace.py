"""Elementwise ops over memory that nothing reads later: the same bits, less of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from graphwright.capture import capture
from graphwright.lower import lower
from graphwright.lower.liveness import run_poisoned
from graphwright.memory import peak


def runner_of(f, *xs, plan=None):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.linspace(-1, 1, xs[0].shape[-1]))

        def forward(self, *a):
            return f(*a) if f.__code__.co_argcount == len(xs) else f(self.table, *a)

    return lower(capture(Model().eval(), xs).program, plan={} if plan is None else plan).runner


def written(runner):
    return [s.site.split("#")[0].rpartition(".")[2] for s in runner.steps if s.clobbers is not None]


def agrees(runner, f, *xs):
    kept = [x.clone() for x in xs]
    with torch.no_grad():
        wanted = f(*xs)
    got = runner(*xs)
    for w, g, p in zip(wanted if isinstance(wanted, tuple) else (wanted,), got, run_poisoned(runner, xs), strict=True):
        assert torch.equal(w, g) and torch.equal(w, p)
    assert all(torch.equal(a, b) for a, b in zip(kept, xs, strict=True)), "an input was written"


X = torch.randn(512, 512)


def test_a_chain_holds_one_value():
    f = lambda x: torch.relu(torch.clamp(torch.cos(torch.sin(x) * 2.0 + 1.0), -0.5, 0.5)).square().neg()
    runner = runner_of(f, X)
    agrees(runner, f, X)
    assert len(written(runner)) >= 5
    assert peak(lambda: runner(X)).mb < 2.1  # square has no kernel that writes: two values once


def test_inputs_buffers_and_results_are_never_written():
    f = lambda table, x: (table * 2.0, x.neg(), torch.relu(x))
    runner = runner_of(f, X)
    assert written(runner) == []
    for _ in range(2):
        got = runner(X)
    assert torch.equal(got[1], -X)
    g = lambda x: (y := torch.sin(x), torch.cos(y))
    agrees(runner_of(g, X), g, X)
    assert written(runner_of(g, X)) == []


@pytest.mark.parametrize("f", [
    lambda x: (y := torch.sin(x)) + torch.cos(y),  # y is read again
    lambda x: torch.sin(x).t().neg() + torch.sin(x).t(),  # a view
    lambda x: torch.sin(x)[::2].neg(),
    lambda x: torch.sin(x[:, :1]).expand(512, 512).neg(),
    lambda x: torch.sin(x[:, :1]) * x,  # smaller than the result
    lambda x: (torch.sin(x) > 0.5).float() + torch.sin(x).to(torch.float32).neg(),  # another dtype; a cast that casts nothing
    lambda x: torch.sin(x) + torch.sin(x).t(),
    lambda x: (y := torch.exp(x)) * y,  # both arguments are one
    lambda x: torch.where(torch.sin(x) > 0, torch.cos(x), torch.sin(x)),
    lambda x: torch.nn.functional.dropout(x, 0.5, False).neg().neg(),
    lambda x: x.contiguous().neg() + x.to(torch.float32).neg(),
    lambda x: torch.sin(x).masked_fill(x > 0, 1.5).clamp(min=-0.5),
    lambda x: (torch.sin(x) * 3).to(torch.int32).abs() // 2,
    lambda x: torch.sin(x).view(256, 1024).neg().view(512, 512).neg(),
])  # fmt: skip
def test_numbers_are_the_same_to_the_bit(f):
    agrees(runner_of(f, X), f, X)


def test_open_sizes_are_compared_by_name():
    class Model(nn.Module):
        def forward(self, x):
            return torch.cos(torch.sin(x) * 2.0)

    x = torch.randn(6, 8)
    found = capture(Model(), (x,), dynamic="auto").program
    runner = lower(found, plan={}).runner
    assert len(written(runner)) == 2
    for n in (6, 3, 1, 9):
        y = torch.randn(n, 8)
        assert torch.equal(runner(y)[0], torch.cos(torch.sin(y) * 2.0))


def test_calls_from_several_threads_and_a_call_that_fails_leave_each_other_alone():
    f = lambda x: torch.relu(torch.cos(torch.sin(x) * 2.0 + 1.0)).neg()
    runner = runner_of(f, X)
    inputs = [torch.randn(512, 512) for _ in range(6)]

    def call(x):
        if x is None:
            with pytest.raises(RuntimeError):
                runner(torch.randn(3, 5, 7).to_sparse())  # fails in the middle, or at once
            return None
        return [runner(x)[0] for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(call, [*inputs, None, *inputs]))
    for x, several in zip([*inputs, None, *inputs], answers, strict=True):
        assert x is None or all(torch.equal(f(x), y) for y in several)
    outs = [runner(x)[0] for x in inputs]  # results of earlier calls are not written by later ones
    assert all(torch.equal(f(x), y) for x, y in zip(inputs, outs, strict=True))
