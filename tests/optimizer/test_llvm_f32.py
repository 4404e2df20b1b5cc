"""The Winograd candidate: offered where it may pay, right where it is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphwright import backends
from graphwright.backends import llvm_f32
from graphwright.capture import capture
from graphwright.lower import lower
from graphwright.lower.graph import analyse
from graphwright.lower.stopwatch import Stopwatch
from graphwright.manager import Pipeline
from graphwright.numerics import Exact, run_double, run_pure
from graphwright.passes.pipeline import resolve

NAME = "llvm.winograd-last"
needs_avx512 = pytest.mark.skipif(llvm_f32.reason() is not None, reason=str(llvm_f32.reason()))


class Net(nn.Module):
    """A residual network in small: a stem, two blocks of 3x3 convolutions, a branch that ends in SiLU."""

    def __init__(self, width: int = 24):
        super().__init__()
        conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o))
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.one, self.two, self.three, self.four = (conv(width, width) for _ in range(4))
        self.last, self.head = nn.Conv2d(width, 40, 3), nn.Linear(40, 5)
        for p in self.parameters():
            nn.init.normal_(p, 0.0, 0.2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.two(torch.relu(self.one(x))) + x)
        x = torch.relu(self.four(nn.functional.relu6(self.three(x))) + x)
        return self.head(nn.functional.silu(self.last(x)).mean((2, 3)))


def _program(model: nn.Module, *x: torch.Tensor):
    captured = capture(model.eval(), x).program
    captured.example = x
    return captured, Pipeline(resolve("default")).run(captured)[0]


def _names(model: nn.Module, *x: torch.Tensor) -> set[str]:
    _, program = _program(model, *x)
    return {c.name for w in analyse(program).works for c in backends.candidates(w, frozenset({"f32"}))}


@needs_avx512
@pytest.mark.parametrize("size", [(2, 3, 37, 42), (1, 3, 20, 20)])
def test_a_network_agrees_where_it_is_chosen(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(size)
    captured, program = _program(Net(), x)
    offered = [w for w in analyse(program).works if any(c.name == NAME for c in backends.candidates(w, frozenset({"f32"})))]
    assert len(offered) == 5  # all but the stem
    watch = Stopwatch(0, fresh=True)
    for work in offered:
        assert not [f for f in watch.work(work, list(backends.candidates(work, frozenset({"f32"})))) if isinstance(f, str)]
    lowered = lower(program, plan={w.node.name: NAME for w in offered})
    assert sum(s.name == NAME for s in lowered.runner.steps) == 5 and not [n for n in lowered.notes if "does not exist" in n]
    for far, near, got in zip(run_double(captured, (x,)), run_pure(captured, (x,)), lowered.runner(x), strict=True):
        assert Exact().failure(far, near, got) is None


@needs_avx512
@pytest.mark.parametrize(("conv", "offered"), [
    (nn.Conv2d(16, 16, 3, padding=1), True),
    (nn.Conv2d(33, 20, 3, padding=(0, 2)), True),
    (nn.Conv2d(16, 16, 3, stride=2), False),
    (nn.Conv2d(16, 16, 3, stride=(1, 2)), False),
    (nn.Conv2d(16, 16, 3, dilation=2), False),
    (nn.Conv2d(32, 32, 3, groups=2), False),
    (nn.Conv2d(16, 16, (3, 1)), False),
    (nn.Conv2d(16, 16, 5), False),
    (nn.Conv2d(8, 16, 3), False),
    (nn.Conv2d(16, 8, 3), False),
])  # fmt: skip
def test_it_is_offered_where_the_windows_fit(conv: nn.Conv2d, offered: bool) -> None:
    assert (NAME in _names(conv, torch.randn(1, conv.in_channels, 14, 13))) is offered


@needs_avx512
def test_open_batch_sizes_are_served() -> None:
    torch.manual_seed(1)
    model, x = Net().eval(), torch.randn(3, 3, 24, 20)
    program = capture(model, (x,), dynamic="auto").program
    program.example = (x,)
    program = Pipeline(resolve("default")).run(program)[0]
    works = [w for w in analyse(program).works if any(c.name == NAME for c in backends.candidates(w, frozenset({"f32"})))]
    assert len(works) == 5 and not any(w.static for w in works)
    runner = lower(program, plan={w.node.name: NAME for w in works}).runner
    for batch in (3, 2, 7):
        x = torch.randn(batch, 3, 24, 20)
        torch.testing.assert_close(runner(x)[0], model(x), rtol=1e-4, atol=1e-4)


@needs_avx512
def test_it_is_not_offered_for_pictures_of_a_pixel() -> None:
    assert NAME not in _names(nn.Conv2d(16, 16, 3, padding=1), torch.randn(4, 16, 1, 1))
    assert NAME in _names(nn.Conv2d(16, 16, 3, padding=1), torch.randn(4, 16, 2, 2))


def test_without_avx512_it_is_not_offered_and_says_why(monkeypatch) -> None:
    monkeypatch.setattr(llvm_f32, "machine", lambda: {"flags": ["avx2"]})
    monkeypatch.setattr(llvm_f32.llvm, "reason", lambda: None)
    llvm_f32.reason.cache_clear()
    try:
        assert NAME not in _names(nn.Conv2d(16, 16, 3, padding=1), torch.randn(1, 16, 8, 8))
        assert "AVX-512" in backends.reasons()["llvm_f32"]
    finally:
        monkeypatch.undo()
        llvm_f32.reason.cache_clear()


class Mobile(nn.Module):
    """Inverted residuals in small: windows of each channel by itself, steps of two behind padding on one side."""

    def __init__(self, act: type[nn.Module] = nn.ReLU6):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, stride=2, groups=24)
        self.three, self.four = nn.Conv2d(24, 48, 1, bias=False), nn.Conv2d(48, 48, 5, padding=2, groups=48)
        self.five, self.act = nn.Conv2d(48, 17, (1, 3), padding=(0, 2), dilation=2), act()
        self.last = nn.Conv2d(17, 17, 3, groups=17)

    def forward(self, x):
        x = self.act(self.two(nn.functional.pad(self.act(self.one(x)), (0, 1, 0, 1))))
        return self.last(self.five(self.act(self.four(self.three(x)))))


@needs_avx512
@pytest.mark.parametrize("act", [nn.ReLU6, nn.SiLU, nn.Hardswish])
@pytest.mark.parametrize("size", [(1, 3, 16, 22), (2, 3, 13, 9)])
def test_channels_by_themselves(size: tuple[int, ...], act: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(size)
    captured, program = _program(Mobile(act), x)
    assert not any("pad" in str(n.target) for n in program.nodes if n.op == "call_function")
    works = analyse(program).works
    offered = [w for w in works if any(c.name == "llvm.depthwise-last" for c in backends.candidates(w, frozenset({"f32"})))]
    assert len(offered) == 3
    lowered = lower(program, plan={w.node.name: "llvm.depthwise-last" for w in offered})
    assert sum(s.name == "llvm.depthwise-last" for s in lowered.runner.steps) == 3
    assert Exact().failure(run_double(captured, (x,))[0], run_pure(captured, (x,))[0], lowered.runner(x)[0]) is None


@needs_avx512
def test_zeros_at_a_windows_edge_meet_no_infinity() -> None:
    conv = nn.Conv2d(16, 16, 3, stride=2, groups=16)
    x = torch.randn(1, 16, 8, 8)
    x[0, :, 2, 2] = torch.inf
    model = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv)
    _, program = _program(model, x)
    (work,) = [w for w in analyse(program).works if w.op.endswith("conv") or "conv2d" in w.op]
    lowered = lower(program, plan={work.node.name: "llvm.depthwise-last"})
    torch.testing.assert_close(lowered.runner(x)[0], model(x), equal_nan=True)


class Turned(nn.Module):
    """A depthwise convolution, and a linear over the channels of what it gives."""

    def __init__(self):
        super().__init__()
        self.mix, self.up = nn.Conv2d(20, 20, 7, padding=3, groups=20), nn.Linear(20, 9)

    def forward(self, x):
        return self.up(self.mix(x).permute(0, 2, 3, 1))


@needs_avx512
def test_a_transpose_reads_channels_last_as_it_lies() -> None:
    torch.manual_seed(2)
    model, x = Turned(), torch.randn(2, 20, 9, 11)
    captured, program = _program(model, x)
    conv, turn = (next(n for n in program.nodes if op in str(n.target)) for op in ("conv", "permute"))
    lowered = lower(program, plan={conv.name: "llvm.depthwise-last", turn.name: "aten.from-last"})
    names = [s.name for s in lowered.runner.steps]
    at = names.index("llvm.depthwise-last")
    assert not any("last→" in n for n in names[at:]) and not [n for n in lowered.notes if "does not exist" in n]
    for far, near, got in zip(run_double(captured, (x,)), run_pure(captured, (x,)), lowered.runner(x), strict=True):
        assert Exact().failure(far, near, got) is None
