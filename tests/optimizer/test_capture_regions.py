"""Models that cannot be captured whole: what can be is, the rest runs as it was, and the report says where and why."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from graphwright.capture import capture
from graphwright.ir import sites_of
from graphwright.structure import flatten


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(x + torch.relu(self.a(x)))


class Branching(nn.Module):
    """Control flow that depends on values."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 4)

    def forward(self, x):
        y = self.gate(x)
        if y.sum() > 0:  # the line that is reported
            return y + 1
        return y - 1


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.branching, self.head = Branching(), nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return {"y": self.head(self.branching(x)), "constant": 3}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def agree(found, model, *args, **kwargs):
    with torch.no_grad():
        expected, got = model(*args, **kwargs), found.run(*args, **kwargs)
    (a, spec), (b, other) = flatten(expected), flatten(got)
    assert spec == other
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=0)


def line_of(code):
    return next(k for k, text in enumerate(Path(__file__).read_text().splitlines(), 1) if code in text)


def test_data_dependent_control_flow():
    model = Model().eval()
    state = copy.deepcopy(model.state_dict())
    found = capture(model, (torch.randn(5, 4),))
    assert found.program is None
    assert [p.site for p in found.pieces] == ["blocks.0", "blocks.1", "branching.gate", "head"]
    (region,) = found.regions
    assert region.site == "branching" and "values of tensors" in region.reason
    assert region.where.endswith(f"test_capture_regions.py:{line_of('the line that is reported')}")
    assert "branching (" in str(region)
    for piece in found.pieces:
        piece.variants[0].program.verify()
    sites = [s for p in found.pieces for n in p.variants[0].program.nodes for s in sites_of(n)]
    assert "blocks.1.a" in sites and "head.0" in sites and len(set(sites)) == len(sites)
    for batch in (5, 2):  # 2 is not covered by the pieces: they run as they were
        agree(found, model, torch.randn(batch, 4))
        agree(found, model, -torch.randn(batch, 4))
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_pieces_are_what_runs_and_can_be_replaced():
    model = Model().eval()
    found = capture(model, (torch.randn(5, 4),))
    variant = found.pieces[0].variants[0]
    calls = []
    variant.run = lambda *leaves: calls.append(1) or variant.program(*leaves)
    agree(found, model, torch.randn(5, 4))
    assert calls == [1]


def test_the_twin_is_a_snapshot():
    model = Model().eval()
    x = torch.randn(5, 4)
    expected = model(x)["y"]
    found = capture(model, (x,))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(found.run(x)["y"], expected)
    torch.testing.assert_close(found.run(x[:2])["y"].shape, torch.Size([2, 3]))


def test_weights_exist_once():
    found = capture(Model().eval(), (torch.randn(5, 4),))
    piece = found.pieces[0]
    assert piece.variants[0].program.tensor("a.weight").data_ptr() == piece.original.a.weight.data_ptr()


def test_varying_batch_in_the_pieces():
    model = Model().eval()
    found = capture(model, (torch.randn(5, 4),), dynamic="auto")
    assert all(v.program.signature.symbols for p in found.pieces for v in p.variants)
    agree(found, model, torch.randn(9, 4))


def test_code_that_leaves_torch():
    class Leaves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Block(), Block()

        def forward(self, x):
            y = self.a(x)
            y = torch.from_numpy(y.detach().numpy() * 2)
            return self.b(y).tolist() and self.b(y)

    model = Leaves().eval()
    found = capture(model, (torch.randn(3, 4),))
    assert found.program is None and [p.site for p in found.pieces] == ["a", "b"]
    assert found.regions[0].site == "" and "test_capture_regions.py" in found.regions[0].where
    agree(found, model, torch.randn(3, 4))


def test_a_submodule_called_with_several_shapes():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Block()

        def forward(self, x):
            y = self.a(x)
            if y.max() > -100:
                return self.a(y[:1]), self.a(y)
            return y, y

    model = Several().eval()
    found = capture(model, (torch.randn(3, 4),))
    assert len(found.pieces) == 1 and len(found.pieces[0].variants) == 2
    agree(found, model, torch.randn(3, 4))


def test_a_shared_submodule_is_one_piece():
    class Shared(Model):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block()])
            self.blocks.append(self.blocks[0])

    found = capture(Shared().eval(), (torch.randn(3, 4),))
    assert [p.site for p in found.pieces] == ["blocks.0", "branching.gate", "head"]


def test_answers_that_are_not_ours_to_describe():
    class Thing:
        def __init__(self, y):
            self.y = y

    class Wraps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Block()

        def forward(self, x):
            return Thing(self.inner(x))

    model, x = Wraps().eval(), torch.randn(2, 4)
    found = capture(model, (x,))
    assert found.program is None and "Thing" in found.regions[0].reason
    assert [p.site for p in found.pieces] == ["inner"]
    torch.testing.assert_close(found.run(x).y, model(x).y)


def test_nothing_can_be_captured():
    class Nothing(nn.Module):
        def forward(self, x):
            return x * float(x.sum()) if x.sum().item() > 0 else x

    model = Nothing()
    found = capture(model, (torch.ones(2),))
    assert found.program is None and found.pieces == [] and len(found.regions) == 1
    agree(found, model, torch.ones(3))


def test_control_flow_operators():
    class Cond(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (self.a(x),))

    model = Cond().eval()
    found = capture(model, (torch.randn(2, 4),))
    assert found.program is None and "cond" in found.regions[0].reason and [p.site for p in found.pieces] == ["a"]
    agree(found, model, torch.randn(2, 4))


def test_attributes_of_captured_submodules_are_still_read():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            x = x.to(self.a.weight.dtype)
            return self.a(x) * self.a.out_features if x.sum() > -1e9 else x

    model = Reads().eval()
    found = capture(model, (torch.randn(2, 4),))
    assert [p.site for p in found.pieces] == ["a"]
    agree(found, model, torch.randn(2, 4))


def test_buffers_of_the_twin_are_its_own():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Block()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.a(x) * self.calls if self.calls > 0 else x

    model, x = Counts().eval(), torch.randn(2, 4)
    found = capture(model, (x,))
    assert model.calls == 0
    for _ in range(3):
        agree(found, model, x)
    assert model.calls == 3


def test_submodules_of_a_module_that_is_never_called():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Module()
            self.inside.block = Block()

        def forward(self, x):
            y = self.inside.block(x)
            return y * 2 if y.sum() > -1e9 else y

    model = Holder().eval()
    found = capture(model, (torch.randn(2, 4),))
    assert [p.site for p in found.pieces] == ["inside.block"]
    agree(found, model, torch.randn(2, 4))


def test_script_modules_run_as_they_are():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval())
    found = capture(scripted, (torch.randn(2, 4),))
    x = torch.randn(2, 4)
    torch.testing.assert_close(found.run(x), scripted(x))
