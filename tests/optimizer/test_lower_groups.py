"""Weights by groups, lowered: what is offered, that it computes what the program says, and what is held."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from graphwright import backends
from graphwright.capture import capture
from graphwright.kernels.vnni import unfit
from graphwright.lower import lower
from graphwright.lower.graph import Analysis, analyse
from graphwright.lower.stopwatch import Stopwatch
from graphwright.manager import Pipeline
from graphwright.numerics import sqnr_db
from graphwright.passes.pipeline import default_recipe
from graphwright.passes.quantize import Quantize

pytestmark = pytest.mark.skipif(unfit() is not None, reason=str(unfit()))
BOTH = frozenset({"f32", "int8"})


class Block(nn.Module):
    """A residual and three activations; 200 inputs are no whole number of groups."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.out = nn.Linear(96, 200), nn.Linear(200, 96), nn.Linear(96, 17, bias=False)

    def forward(self, x):
        return torch.tanh(self.out(x + self.down(nn.functional.silu(self.up(x)))))


def program_of(x, dynamic=None, **options):
    torch.manual_seed(0)
    program = capture(Block().eval(), (x,), dynamic=dynamic).program
    program.example = (x,)
    return Pipeline((*default_recipe(), Quantize(**{"mode": "weight-only", **options}))).run(program)[0]


def names_of(work):
    return {c.name for c in backends.candidates(work, BOTH) if c.precision == "int8"}


CASES = {
    "four bits": ({"bits": 4, "group": 64}, {"llvm.w4", "llvm.w4-bytes"}),
    "four bits, no zero points": ({"bits": 4, "group": 32, "symmetric": True}, {"llvm.w4", "llvm.w4-bytes"}),
    "four bits, a scale per channel": ({"bits": 4, "group": 4096}, {"llvm.w4", "llvm.w4-bytes"}),
    "eight bits": ({"group": 8}, {"llvm.w8-groups"}),
    "eight bits with zero points": ({"group": 8, "symmetric": False}, {"llvm.w8-groups"}),
    "eight bits, a scale per channel": ({}, {"llvm.w8"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(1, 96), (3, 7, 96)])
def test_every_kernel_computes_what_the_program_says(case, shape):
    options, offered = CASES[case]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    program = program_of(x, **options)
    linears = [w for w in analyse(program).works if "linear" in w.op]
    assert len(linears) == 3
    for work in linears:
        assert names_of(work) == offered
        assert not [f for f in Stopwatch(0, fresh=True).work(work, list(backends.candidates(work, BOTH))) if isinstance(f, str)]
    for name in offered:
        lowered = lower(program, allowed={"int8"}, plan={w.node.name: name for w in linears})
        assert {lowered.plan[w.node.name] for w in linears} == {name}
        with torch.no_grad():
            assert sqnr_db(program(x)[0], lowered.runner(x)[0]) > 100


def test_rows_of_any_number():
    program = program_of(torch.randn(4, 96), dynamic={"x": {0: "n"}}, bits=4, group=32)
    linears = [w for w in analyse(program).works if "linear" in w.op]
    assert all(names_of(w) == {"llvm.w4", "llvm.w4-bytes"} for w in linears)
    lowered = lower(program, allowed={"int8"}, plan={w.node.name: "llvm.w4" for w in linears})
    for rows in (1, 2, 5, 30):
        x = torch.randn(rows, 96)
        with torch.no_grad():
            assert sqnr_db(program(x)[0], lowered.runner(x)[0]) > 100


def test_rows_of_int8_meet_four_bits_as_integers():
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2))
    program = program_of(x, mode="dynamic", bits=4, group=32)
    linears = [w for w in analyse(program).works if "linear" in w.op]
    for work in linears:
        assert names_of(work) - {"aten.int-mm"} == {"llvm.w4", "llvm.w4-bytes", "llvm.w4a8"}
        assert not [f for f in Stopwatch(0, fresh=True).work(work, list(backends.candidates(work, BOTH))) if isinstance(f, str)]
    lowered = lower(program, allowed={"int8"}, plan={w.node.name: "llvm.w4a8" for w in linears})
    assert {lowered.plan[w.node.name] for w in linears} == {"llvm.w4a8"}
    with torch.no_grad():
        got, said, exact = lowered.runner(x)[0], program(x)[0], program_of(x, bits=4, group=32)(x)[0]
    assert sqnr_db(said, got) > 45, "a number on the boundary may be rounded to either side"
    assert sqnr_db(exact, got) < 60, "rows were rounded"


def test_groups_that_no_kernel_reads_run_as_float():
    x = torch.randn(2, 96)
    program = program_of(x, bits=4, group=12)
    linears = [w for w in analyse(program).works if "linear" in w.op]
    assert all(not names_of(w) for w in linears)
    lowered = lower(program, allowed={"f32", "int8"}, example=(x,))
    with torch.no_grad():
        assert sqnr_db(program(x)[0], lowered.runner(x)[0]) > 100


def test_int8_products_take_plain_weights_alone():
    plain, by_groups, four = (analyse(program_of(torch.randn(2, 96), **o)).works for o in ({}, {"group": 8}, {"bits": 4, "group": 8}))
    weights = [next(w.weights["weight"] for w in works if w.weights) for works in (plain, by_groups, four)]
    assert [w.plain for w in weights] == [True, False, False] and [w.group for w in weights] == [None, 8, 8] and [w.bits for w in weights] == [8, 8, 4]


def test_no_float_copy_is_held(monkeypatch):
    copies: list[weakref.ref] = []
    let_go = Analysis.let_go

    def noted(analysis):
        copies.extend(weakref.ref(t) for t in analysis.dequantized.values())
        let_go(analysis)

    monkeypatch.setattr(Analysis, "let_go", noted)
    x = torch.randn(2, 96)
    program = program_of(x, bits=4, group=32)
    linears = [n.name for n in program.nodes if "linear" in str(n.target)]
    lowered = lower(program, allowed={"f32", "int8"}, plan=dict.fromkeys(linears, "llvm.w4"))
    gc.collect()
    assert len(copies) == 3 and all(c() is None for c in copies)
    assert lowered.runner(x)[0].shape == (2, 17)
