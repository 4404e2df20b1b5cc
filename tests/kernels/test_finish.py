"""What follows a product in its own memory: right for every activation and shape, offered for linears, and right where it is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphwright import backends
from graphwright.backends import llvm
from graphwright.capture import capture
from graphwright.kernels.activations import CODE
from graphwright.kernels.finish import Finish, unfit
from graphwright.lower import lower
from graphwright.lower.graph import analyse
from graphwright.manager import Pipeline
from graphwright.numerics import Exact, run_double
from graphwright.ops.fused import activate
from graphwright.passes.pipeline import resolve

NAME = "mkl.f32-finish"
SCALARS = {"hardtanh": (-0.5, 1.25), "leaky_relu": (0.1,), "elu": (0.7,)}
needs_llvm = pytest.mark.skipif(llvm.reason() is not None, reason=str(llvm.reason()))
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this build of torch has no MKL")


@needs_llvm
@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 1030), (1, 2049), (70, 1025)])
def test_every_activation_with_bias_and_residual(name: str, shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    for bias in (None, torch.randn(shape[-1], generator=draw)):
        for other in (None, torch.randn(shape, generator=draw), torch.randn(shape[-1], generator=draw), torch.randn(*shape[:-1], 1, generator=draw)):
            y = 3 * torch.randn(shape, generator=draw)
            total = [y, *(t for t in (bias, other) if t is not None)]
            wanted = activate(sum(t.double() for t in total), name, SCALARS.get(name, ()))
            before = activate(sum(total[1:], y.clone()), name, SCALARS.get(name, ()))
            kept = None if other is None else other.clone()
            got = Finish(bias, name, SCALARS.get(name, ()))(y, other)
            assert got is y and (other is None or torch.equal(other, kept))
            assert not Exact().failure(wanted, before, got), (name, shape)


@needs_llvm
def test_nothing_infinite_or_undefined_is_lost() -> None:
    y = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0]])
    got = Finish(torch.zeros(4), "relu")(y)
    assert got[0, 0].isnan() and got[0, 1:].tolist() == [float("inf"), 0.0, 0.0]


def test_no_rows() -> None:
    assert Finish(torch.ones(4), "gelu")(torch.empty(0, 4)).shape == (0, 4)


@needs_llvm
def test_an_activation_without_vector_form_is_refused() -> None:
    assert "softplus" in str(unfit("softplus"))


class Layers(nn.Module):
    """Linears with a bias alone, with an activation, with a residual, and with nothing."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.bare, self.last = nn.Linear(24, 70), nn.Linear(70, 24), nn.Linear(24, 24, bias=False), nn.Linear(24, 3)

    def forward(self, x):
        x = x + self.down(nn.functional.gelu(self.up(x), approximate="tanh"))
        return self.last(torch.sin(self.bare(x)))


@needs_llvm
@needs_mkl
def test_linears_agree_where_it_is_chosen() -> None:
    torch.manual_seed(0)
    model, x = Layers().eval(), torch.randn(2, 19, 24)
    captured = capture(model, (x,)).program
    captured.example = (x,)
    program = Pipeline(resolve("default")).run(captured)[0]
    offers = {w.node.name: NAME for w in analyse(program).works if any(c.name == NAME for c in backends.candidates(w, frozenset({"f32"})))}
    assert len(offers) == 3, "all but the one with nothing to finish"
    plan = {c.work.node.name: c.name for c in lower(program).choices} | offers
    lowered = lower(program, plan=plan)
    assert {c.name for c in lowered.choices if c.work.node.name in offers} == {NAME}
    (got,), (wanted,) = lowered.runner(x), run_double(captured, [x])
    assert not Exact().failure(wanted, model(x), got)
    assert torch.equal(lowered.runner(x)[0], got), "earlier results stay, and calls agree"
