"""int8 convolutions of every kind by our own kernels: offered, checked, and right where they are chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphwright import backends
from graphwright.backends import llvm_int8
from graphwright.capture import capture
from graphwright.lower import lower
from graphwright.lower.graph import analyse
from graphwright.lower.stopwatch import Stopwatch
from graphwright.manager import Pipeline
from graphwright.numerics import run_pure, sqnr_db
from graphwright.passes.pipeline import resolve

needs_vnni = pytest.mark.skipif(llvm_int8.reason() is not None, reason=str(llvm_int8.reason()))


class Mobile(nn.Module):
    """An inverted residual, a dilated one and one in groups."""

    def __init__(self):
        super().__init__()
        self.stem, self.alone, self.back = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.Conv2d(32, 32, 1)
        self.apart, self.few = nn.Conv2d(32, 48, 3, padding=2, dilation=2), nn.Conv2d(48, 48, 3, 2, 1, groups=4)

    def forward(self, x):
        x = nn.functional.relu6(self.stem(x))
        x = x + self.back(nn.functional.relu6(self.alone(x)))
        return self.few(torch.relu(self.apart(x)))


@needs_vnni
def test_convolutions_of_every_kind() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 21, 18)
    program = capture(Mobile().eval(), (x,)).program
    program.example, program.calibration = (x,), [(x,), (torch.randn_like(x),)]
    program = Pipeline(resolve("int8")).run(program)[0]
    convs = [w for w in analyse(program).works if "conv" in w.op]
    assert len(convs) == 5
    watch = Stopwatch(0, fresh=True)
    for work in convs:
        own = [c for c in backends.candidates(work, frozenset({"f32", "int8"})) if c.name == "aten.native" or c.name.startswith("llvm.int8")]
        assert len(own) > 1, work.site
        assert not [f for f in watch.work(work, own) if isinstance(f, str)]
    plan = {w.node.name: "llvm.int8-q" if w.qparams is not None else "llvm.int8-f32" for w in convs}
    lowered = lower(program, allowed={"int8"}, plan=plan)
    assert sum(s.name.startswith("llvm.int8") for s in lowered.runner.steps) == 5
    assert sqnr_db(run_pure(program, (x,))[0], lowered.runner(x)[0]) > 35
