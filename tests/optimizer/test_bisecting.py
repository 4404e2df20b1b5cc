"""Which pass, which site, which kernel breaks the numbers; and the small program that shows it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphwright as gw
from graphwright.backends import llvm
from graphwright.ir import sites_of
from graphwright.lower.stopwatch import Stopwatch
from graphwright.passes.bisection import smallest
from graphwright.passes.fold_batch_norm import FoldBatchNorm


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.lin(x))
        return x + self.norm(y * y)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(6)), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"y": self.head(x)}


@dataclass(frozen=True)
class Square(gw.RewritePass):
    """relu(x) * relu(x) as a square; at the sites named in ``wrong``, of x itself."""

    name = "square"
    wrong: tuple[str, ...] = ("blocks.3",)

    def pattern(self, op, x):
        return op.relu(x) * op.relu(x)

    def check(self, match):
        object.__setattr__(self, "at", match.sites[0])

    def replace(self, op, x):
        return op.square(x if self.at.startswith(self.wrong) else op.relu(x))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1))


def _saved(found, tmp_path):
    """The repro, once more from its file, with the same story."""
    path = tmp_path / "bug.gw"
    found.save(path)
    again = gw.load_repro(path)
    assert (again.name, again.site, again.stage, str(again)) == (found.repro.name, found.site, found.stage, str(found.repro))
    assert all(torch.equal(a, b) for a, b in zip(again.inputs, found.repro.inputs, strict=True))
    return again


def test_a_rewrite_of_ones_own_that_is_wrong_at_one_site(net, x, tmp_path):
    found = gw.bisect(net, x, ["canonicalize", Square()])
    assert (found.name, found.index, found.kind, found.site, found.sites) == ("square", 1, "numbers", "blocks.3.mul", ("blocks.3.mul",))
    assert [n.meta["sites"][0] for n in found.repro.before.nodes] == ["blocks.3.relu", "blocks.3.mul"]
    assert found.narrowed.text().count("aten.square") == 1 and found.after.text().count("aten.square") == 6
    replay = found.repro.replay()
    assert replay.reproduced and str(_saved(found, tmp_path).replay()) == str(replay)
    _, before, after, wide = replay.outputs[0].worst[0]
    assert before == 0.0 == wide and after > 0 and replay.outputs[0].problem.startswith("RMS error")
    assert not found.repro.replay(Square(wrong=("nowhere",))).reproduced, "a pass that is mended"
    (value,) = found.repro.inputs  # what the relu reads in the model
    assert torch.equal(torch.relu(value), _relu_of(net, x, 3))


def _relu_of(net: Net, x: Tensor, k: int) -> Tensor:
    with torch.no_grad():
        for block in net.blocks[:k]:
            x = block(x)
        return torch.relu(net.blocks[k].lin(x))


def test_the_first_of_several_wrong_sites(net, x):
    assert gw.bisect(net, x, [Square(wrong=("blocks.5", "blocks.2", "blocks.4"))]).site == "blocks.2.mul"
    assert gw.bisect(net, x, [Square(wrong=("blocks.5", "blocks.2"), exclude=("blocks.2.*",))]).site == "blocks.5.mul"
    assert gw.bisect(net, x, [Square(wrong=("nowhere",))]) is None


@dataclass(frozen=True)
class Together(gw.Pass):
    """Scale by 3 at each linear but the last, and back where two are done: wrong where an odd number is."""

    name = "together"
    needs: tuple[str, ...] = ("blocks.1.lin", "blocks.4.lin")

    def run(self, program: gw.Program) -> gw.PassResult:
        result, done = gw.PassResult(), []
        for node in program.nodes:
            if str(node.target) == "aten.linear.default" and not self.refused(result, node):
                done.append(node)
        if {sites_of(n)[0] for n in done} >= set(self.needs):
            node = done[-1]
            with program.graph.inserting_after(node):
                new = program.call(torch.ops.aten.neg.default, node, like=node)
            node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
            result.change(sites_of(node)[0], "negated")
        return result


def test_sites_that_break_it_only_together(net, x):
    found = gw.bisect(net, x, [Together()])
    assert found.site == "blocks.4.lin" and set(found.sites) == {"blocks.1.lin", "blocks.4.lin"} and "2 sites" in found.how
    assert found.repro.replay().reproduced


def test_a_faulty_built_in_pass(monkeypatch, tmp_path):
    whole = FoldBatchNorm.run

    def run(self, program):
        result = whole(self, program)
        for node in program.nodes:
            if "b2" in sites_of(node) and "conv2d" in str(node.target):
                node.update_arg(1, program.add_tensor("off", program.constant(node.args[1]) * 1.01))
        program.tidy()
        return result

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.c1, self.b1, self.c2, self.b2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8)
            for norm in (self.b1, self.b2):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.b2(self.c2(torch.relu(self.b1(self.c1(x))))).mean((2, 3)),)

    torch.manual_seed(0)
    model, image = Stack().eval(), torch.randn(1, 3, 12, 12)
    assert gw.bisect(model, image, kernels=False) is None
    monkeypatch.setattr(FoldBatchNorm, "run", run)
    found = gw.bisect(model, {"x": image})
    assert (found.name, found.site) == ("fold-batch-norm", "b2")
    assert [str(n.target) for n in found.repro.before.nodes] == ["aten.conv2d.default", "aten.batch_norm.default"]
    assert [str(n.target) for n in found.repro.after.nodes] == ["aten.conv2d.default"]
    again = _saved(found, tmp_path)
    assert again.replay().reproduced and 35 < again.replay().outputs[0].sqnr_db < 60
    monkeypatch.setattr(FoldBatchNorm, "run", whole)
    assert not again.replay(FoldBatchNorm()).reproduced


@dataclass(frozen=True)
class Coarse(gw.Pass):
    """Round weights, too coarsely at two sites."""

    name = "coarse"
    numerics = gw.Lossy(30.0)

    def run(self, program: gw.Program) -> gw.PassResult:
        result = gw.PassResult()
        for node in program.nodes:
            if str(node.target) == "aten.linear.default" and not self.refused(result, node):
                steps = 3 if sites_of(node)[0] in ("blocks.1.lin", "blocks.4.lin") else 5000
                weight = torch.round(program.constant(node.args[1]) * steps) / steps
                node.update_arg(1, program.add_tensor(f"{node.args[1].target}_rounded", weight))
                result.change(sites_of(node)[0], "rounded")
        program.tidy()
        return result


def test_a_lossy_pass_below_its_floor(net, x, tmp_path):
    found = gw.bisect(net, x, ["canonicalize", Coarse(), "dead-code"])
    assert (found.name, found.site) == ("coarse", "blocks.1.lin") and "lies below 30.0 dB" in found.problem
    assert [str(n.target) for n in found.repro.before.nodes] == ["aten.linear.default"]
    again = _saved(found, tmp_path)
    assert isinstance(again.numerics, gw.Lossy) and again.numerics.floor_db == 30.0 and again.replay().reproduced


def test_exact_passes_are_held_to_theirs_beside_lossy_ones(net, x):
    """One lenient promise in the recipe does not excuse the others."""

    @dataclass(frozen=True)
    class Bit(Coarse):
        """Round weights and call it exact."""

        name = "bit"
        numerics = gw.Exact()

    found = gw.bisect(net, x, [Bit(include=("head",)), Coarse(include=("head",))])
    assert (found.name, found.site) == ("bit", "head")


@dataclass(frozen=True)
class Raises(Square):
    """Raise at one site."""

    name = "raises"

    def check(self, match):
        if match.sites[0].startswith("blocks.4"):
            raise ValueError("no such thing")

    def replace(self, op, x):
        return op.square(op.relu(x))


def test_a_pass_that_raises(net, x, tmp_path):
    found = gw.bisect(net, x, ["canonicalize", Raises()])
    assert (found.kind, found.site) == ("raised", "blocks.4.mul") and "ValueError: no such thing (" in found.problem
    assert "test_bisecting.py:" in found.problem
    assert len(found.repro.before.nodes) <= 3 and found.repro.replay().reproduced
    again = _saved(found, tmp_path)
    with pytest.raises(gw.InputError, match=r"no pass of that name is known here\n.*repro\.replay\(MyPass\(\)\)"):
        again.replay()
    assert again.replay(Raises()).problem == found.problem and not again.replay(Square(wrong=("-",))).reproduced


@dataclass(frozen=True)
class Breaks(gw.Pass):
    """Write a wrong shape at one site."""

    name = "breaks"

    def run(self, program: gw.Program) -> gw.PassResult:
        result = gw.PassResult()
        for node in program.nodes:
            if "relu" in str(node.target) and not self.refused(result, node) and sites_of(node)[0].startswith("blocks.2"):
                node.meta["val"] = node.meta["val"].new_empty(3)
                result.change(sites_of(node)[0], "broken")
        return result


def test_a_pass_that_breaks_an_invariant(net, x, tmp_path):
    found = gw.bisect(net, x, [Breaks()])
    assert (found.kind, found.site) == ("invariant", "blocks.2.relu") and "says f32[3]" in found.problem
    assert len(found.repro.before.nodes) == 1 and found.repro.after is None and found.repro.replay().reproduced
    assert _saved(found, tmp_path).replay(Breaks()).reproduced


def test_a_pass_that_hides_what_it_does(net, x):
    @dataclass(frozen=True)
    class Silent(Square):
        """Say nothing."""

        name = "silent"

        def run(self, program):
            super().run(program)
            return gw.PassResult()

    found = gw.bisect(net, x, [Silent(wrong=())])
    assert found.kind == "report" and "does not say so" in found.problem and found.site == "blocks.0.mul"


def test_changes_that_cannot_be_told_apart(net, x):
    @dataclass(frozen=True)
    class Deaf(gw.Pass):
        """Scale every norm but pay no heed to include."""

        name = "deaf"

        def run(self, program):
            result = gw.PassResult()
            for node in [n for n in program.nodes if "layer_norm" in str(n.target) and not sites_of(n)[0].startswith("blocks.0")]:
                with program.graph.inserting_after(node):
                    new = program.call(torch.ops.aten.mul.Tensor, node, 1.5, like=node)
                node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
                result.change(sites_of(node)[0], "scaled")
            return result

    found = gw.bisect(net, x, [Deaf()])
    assert "can't be told apart: it does not heed include / exclude" in found.how and found.narrowed is None
    assert found.site == "blocks.1.norm" and found.repro.replay().reproduced
    assert len(found.repro.before.nodes) <= 2


def test_a_check_of_ones_own_finds_the_site(net, x):
    found = gw.bisect(net, x, ["canonicalize", Square(wrong=())], check=lambda p: "five are left" if p.text().count("aten.square") > 4 else None)
    assert found.name == "square" and found.problem == "five are left" and len(found.sites) == 5
    assert found.repro is not None and "keeps its promise" in found.repro.note


# -- kernels ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def off(monkeypatch):
    """A norm kernel that is wrong for one weight only; kernels are always preferred to the op's own."""
    given = llvm.kernel

    def kernel(op: str):
        run = given(op)
        if op != "graphwright.norm_quantize" or run is None:
            return run

        def wrong(x, other, weight, *rest):
            out = run(x, other, weight, *rest)
            return tuple(o * 3 if o is not None and o.is_floating_point() else o for o in out) if abs(float(weight[0]) - 1.5) < 1e-6 else out

        return wrong

    if llvm.reason():
        pytest.skip(llvm.reason())
    monkeypatch.setattr(llvm, "kernel", kernel)
    monkeypatch.setattr(Stopwatch, "work", lambda self, work, options: [1.0 if c.name == "aten.native" else 0.1 + k / 100 for k, c in enumerate(options)])


@pytest.mark.parametrize("recipe", ["default", "int8"])
def test_a_kernel_that_is_off(net, x, off, recipe, tmp_path):
    assert gw.bisect(net, x, recipe) is None
    with torch.no_grad():
        net.blocks[3].norm.weight[0] = 1.5
    found = gw.bisect(net, x, recipe)
    assert (found.stage, found.site) == ("kernel", "blocks.3.norm") and found.name.startswith("llvm.norm")
    assert "aten.layer_norm.default" in [str(n.target) for n in found.repro.before.nodes] and len(found.repro.before.nodes) <= 3
    again = _saved(found, tmp_path)
    assert again.replay().reproduced and again.kernels == found.repro.kernels
    assert gw.bisect(net, x, recipe, kernels=False) is None


def test_a_kernel_that_raises(net, x, off, monkeypatch):
    given = llvm.kernel

    def kernel(op: str):
        def raises(*args):
            raise RuntimeError("out of luck")

        return raises if op == "graphwright.norm_quantize" else given(op)

    monkeypatch.setattr(llvm, "kernel", kernel)
    found = gw.bisect(net, x)
    assert found.site == "blocks.0.norm" and "RuntimeError: out of luck" in found.problem and found.repro.replay().reproduced


# -- bad input, odd models -------------------------------------------------------------------------------------------


def test_bad_arguments(net, x, tmp_path):
    with pytest.raises(gw.InputError, match="an nn.Module is wanted"):
        gw.bisect("net", x)
    with pytest.raises(gw.RecipeError):
        gw.bisect(net, x, "int9")
    with pytest.raises(gw.SiteError, match="matches no site"):
        gw.bisect(net, x, [Square(include=("nowhere",))])
    with pytest.raises(gw.LoadError):
        gw.load_repro(tmp_path / "none.gw")
    found = gw.bisect(net, x, [Square()])
    found.save(tmp_path / "bug.gw")
    with pytest.raises(gw.LoadError, match=r"holds no optimized model\n.*gw.load_repro"):
        gw.load(tmp_path / "bug.gw")
    with pytest.raises(gw.SaveError):
        found.save(tmp_path / "no" / "bug.gw")
    blob = bytearray((tmp_path / "bug.gw").read_bytes())
    blob[-5] ^= 1
    (tmp_path / "bug.gw").write_bytes(blob)
    with pytest.raises(gw.LoadError, match="altered"):
        gw.load_repro(tmp_path / "bug.gw")


def test_a_saved_model_is_no_repro(tmp_path):
    fast = gw.optimize(nn.Linear(4, 4).eval(), torch.randn(2, 4))
    fast.save(tmp_path / "net.gw")
    with pytest.raises(gw.LoadError, match=r"holds no repro\n.*gw.load"):
        gw.load_repro(tmp_path / "net.gw")


def test_a_model_in_pieces_is_gone_through_piece_by_piece(net, x, tmp_path):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.net = nn.Linear(16, 16), net

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.net(y * 2 if y.sum().item() > 0 else y)["y"]

    model = Branching().eval()
    assert gw.bisect(model, x, ["canonicalize", Square(wrong=("-",))]) is None
    found = gw.bisect(model, x, ["canonicalize", Square(wrong=("net.blocks.3",), exclude=("net.blocks.5.*",))])
    assert (found.index, found.site) == (1, "net.blocks.3.mul") and _saved(found, tmp_path).replay().reproduced

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum().item() > 0 else x

    with pytest.raises(gw.InputError, match=r"nothing of the model could be captured: .*values of tensors"):
        gw.bisect(Nothing(), x)


def test_sizes_buffers_and_several_outputs(tmp_path):
    """A running count, integers beside floats, splits: the cut holds whatever the site reads."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            self.count += 1
            left, right = self.lin(x).chunk(2, -1)
            y = torch.relu(left)[index]
            return y * y + self.count, right.argmax(-1)

    model = Odd().eval()
    found = gw.bisect(model, (torch.randn(4, 8), torch.tensor([0, 2, 3])), ["canonicalize", SquareOfIndexed()])
    assert found.site == "mul" and float(model.count) == 0
    assert _saved(found, tmp_path).replay().reproduced


@dataclass(frozen=True)
class SquareOfIndexed(gw.RewritePass):
    """x * x as x + x."""

    name = "square-of-indexed"

    def pattern(self, op, x):
        return op.mul(x, x)

    def replace(self, op, x):
        return op.add(x, x)


@given(st.integers(1, 40), st.sets(st.integers(0, 39), min_size=1, max_size=3))
def test_smallest_finds_a_minimal_set(size, wanted):
    wanted = {w % size for w in wanted}
    found = smallest(range(size), lambda some: wanted <= set(some))
    assert set(found) == wanted and found[-1] == max(wanted)
