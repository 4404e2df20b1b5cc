"""Recorded launches, on a GPU that is none: the order of what is asked of it, copies, state, and what falls back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphwright.capture import capture
from graphwright.lower import lower
from graphwright.lower.replay import Replay, unfit
from graphwright.testing.pretend import Pretend


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return torch.relu(self.fc(x)) + x


class Counting(nn.Module):
    """Writes a buffer at each call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen.add_(1.0)
        return x * self.seen


class Writing(nn.Module):
    """Writes into its input, and hands it back."""

    def forward(self, x, y):
        x.mul_(2.0)
        return x + y, y


def replayed(model, *args, cuda=None, dynamic=None):
    """A runner whose launches are recorded by a pretended GPU, and that GPU."""
    program = capture(model.eval(), args, dynamic=dynamic).program
    program.example = tuple(x.clone() for x in args)
    runner = lower(program, plan={}).runner
    cuda = cuda or Pretend()
    runner.replay = Replay(runner.launched, program, cuda)
    return runner, cuda


def test_the_first_call_records_and_later_ones_replay():
    model, x = Net(), torch.randn(4, 8)
    runner, cuda = replayed(model, x)
    first = runner(x)[0]
    assert cuda.log == ["aside", "back", "wait", "record", "replay", "wait", "replay", "mark"]
    cuda.log.clear()
    other = torch.randn(4, 8)
    second = runner(other)[0]
    assert cuda.log == ["order", "replay", "mark"]
    assert torch.allclose(first, model(x)) and torch.allclose(second, model(other))  # the second call left the first's result alone
    assert runner.replay.shapes == 1 and runner.replay.held == 2**20 and "1.0 MB" in runner.replay.told()


def test_inference_mode_at_the_first_call_hinders_no_later_one():
    model, x = Net(), torch.randn(4, 8)
    runner, _ = replayed(model, x)
    with torch.inference_mode():
        runner(x)
    assert runner.replay.reason is None
    assert torch.allclose(runner(x + 1)[0], model(x + 1))


def test_buffers_are_written_once_per_call():
    x = torch.ones(3)
    runner, _ = replayed(Counting(), x)
    assert [float(runner(x)[0][0]) for _ in range(3)] == [1.0, 2.0, 3.0]
    assert float(runner.program.tensor("seen")) == 3.0


def test_written_inputs_reach_the_caller_and_inputs_come_back_as_themselves():
    y = torch.full((3,), 5.0)
    runner, cuda = replayed(Writing(), torch.ones(3), y)
    held = [torch.ones(3) for _ in range(3)]
    for mine in held:  # other memory each time: nothing to record
        total, same = runner(mine, y)
        assert same is y and torch.equal(mine, torch.full((3,), 2.0)) and torch.equal(total, mine + y)
    assert runner.replay.shapes == 0 and "record" not in cuda.log
    for k in range(1, 4):  # one cache, written where it lies
        total, same = runner(held[0], y)
        assert same is y and torch.equal(held[0], torch.full((3,), 2.0 ** (k + 1))) and torch.equal(total, held[0] + y)
    assert runner.replay.shapes == 1 and cuda.log.count("record") == 1


@pytest.mark.parametrize("model", [Net(), Counting()])
def test_what_cannot_be_recorded_is_launched_with_the_reason(model):
    x = torch.randn(4, 8)
    runner, cuda = replayed(model, x, cuda=Pretend(refuses=RuntimeError("operation not permitted when stream is capturing\nmore")))
    plain = lower(runner.program, plan={}).runner
    got = runner(x)[0]
    if isinstance(model, Counting):
        assert float(runner.program.tensor("seen")) == 1.0  # attempts leave no trace
    else:
        assert torch.equal(got, plain(x)[0])
    assert "no CUDA graph: RuntimeError: operation not permitted" in runner.replay.told() and "one by one" in runner.replay.told()
    cuda.log.clear()
    runner(x)
    assert cuda.log == []


def test_a_replay_with_other_numbers_is_not_used():
    model, x = Net(), torch.randn(4, 8)
    runner, _ = replayed(model, x, cuda=Pretend(spoils=0.5))
    assert torch.allclose(runner(x)[0], model(x)) and "output 0 is not what the launches gave" in runner.replay.reason


def test_within_another_recording_all_is_launched():
    runner, cuda = replayed(Net(), x := torch.randn(4, 8))
    cuda.busy = True
    runner(x)
    assert cuda.log == [] and runner.replay.shapes == 0


def test_open_sizes_are_recorded_when_they_come_again_and_no_more_than_a_few():
    model = Net()
    runner, cuda = replayed(model, torch.randn(4, 8), dynamic={"x": {0: "batch"}})
    for n in range(2, 14):
        x = torch.randn(n, 8)
        assert torch.allclose(runner(x)[0], model(x), atol=1e-6)
    assert cuda.log == []  # each came once: a growing cache would be recorded for nothing
    for n in range(2, 14):
        x = torch.randn(n, 8)
        assert torch.allclose(runner(x)[0], model(x), atol=1e-6)
    assert runner.replay.shapes == 8 and cuda.log.count("record") == 8


def test_host_work_is_told_ahead():
    program = capture(Net().eval(), (torch.randn(4, 8),)).program
    assert unfit(program, torch.device("cpu")) is None
    assert unfit(program, torch.device("cuda", 0)) == "input x is on cpu"


class Sizing(nn.Module):
    def forward(self, x):
        return torch.nonzero(x > 0)


def test_sizes_that_depend_on_numbers_are_not_recorded():
    found = capture(Sizing().eval(), (torch.randn(4, 8),)).program
    assert found is None or "depends on numbers" in str(unfit(found, torch.device("cpu")))
