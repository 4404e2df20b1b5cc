"""Writes in place and shared memory: the captured graph is functional and still does what eager does."""

import copy

import pytest
import torch
from torch import nn

from graphwright.capture import Guard, capture
from graphwright.structure import flatten, flatten_call


class Fn(nn.Module):
    """A function as a model, with one buffer to write."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn
        self.register_buffer("state", torch.arange(12.0).reshape(3, 4))

    def forward(self, x, y):
        return self.fn(self, x, y)


def check(fn, x=None, y=None, *, whole=True):
    """Capture ``fn`` and compare outputs, written inputs and the written buffer with eager, twice in a row."""
    torch.manual_seed(0)
    x = torch.randn(3, 4) if x is None else x
    y = torch.randn(3, 4) if y is None else y
    model = Fn(fn).eval()
    before = copy.deepcopy(model.state_dict())
    kept = x.clone(), y.clone()
    found = capture(model, (x, y))
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1]), "capture wrote into the example"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "capture wrote into the model"
    if not whole:
        assert found.program is None and found.regions
        return found
    assert found.program is not None, found.regions
    found.program.verify()
    assert not any(n.target._schema.is_mutable for n in found.program.nodes if hasattr(n.target, "_schema"))
    eager = copy.deepcopy(model)
    for _ in range(2):
        theirs, ours = (x.clone(), y.clone()), (x.clone(), y.clone())
        with torch.no_grad():
            expected, got = eager(*theirs), found.run(*ours)
        for a, b in zip(flatten(expected)[0], flatten(got)[0], strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0)
        for a, b in zip(theirs, ours, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0)
        if any(m.buffer == "state" for m in found.program.signature.mutations):
            torch.testing.assert_close(found.program.tensor("state"), eager.state)
        else:
            assert torch.equal(eager.state, model.state)
    return found


def write_view_then_read_base(m, x, y):
    h = x * 2
    h.view(-1)[3] = 7.0
    return h


def write_base_then_read_view(m, x, y):
    h = x * 2
    row = h[1]
    column = h.t()[0]
    h.add_(y)
    return row, column, h


def two_views_of_one_base(m, x, y):
    h = x + 1
    a, b = h[:, :2], h[:, 1:3]
    a.mul_(3)
    b.add_(a[:, :1])
    a.sub_(b.sum())
    return h, a, b


def chain_of_views(m, x, y):
    h = x + 0
    v = h.t().unsqueeze(0)[:, 1:3].squeeze(0).transpose(0, 1)
    v.copy_(y[:, :2])
    return h, v


def masked_and_indexed(m, x, y):
    h = x.clone()
    h.masked_fill_(y > 0, -1.0)
    h[torch.tensor([0, 2])] = y[:2]
    h.index_copy_(1, torch.tensor([3]), y[:, :1])
    h.index_add_(0, torch.tensor([1]), y[:1])
    h.scatter_(1, torch.zeros(3, 1, dtype=torch.long), 5.0)
    return h


def boolean_assignment(m, x, y):
    h = x.clone()
    h[y > 0.5] = 0
    h[0, 1:] = 3
    h[..., -1] += 1
    return h


def zero_and_fill(m, x, y):
    h = torch.empty_like(x)
    h.zero_()
    h[1].fill_(2.5)
    h.diagonal().fill_(9)
    return h


def split_parts(m, x, y):
    h = x.clone()
    a, b = h.split([1, 3], dim=1)
    b.mul_(2)
    first, *_ = h.unbind(0)
    first.add_(10)
    c, d = h.chunk(2, dim=1)
    d.neg_()
    return h, a, b, c


def reshape_that_copies(m, x, y):
    h = x.t().clone().t()  # not contiguous: reshape copies, and the write stays in the copy
    flat = h.reshape(-1)
    flat.add_(1)
    return h, flat


def reshape_that_views(m, x, y):
    h = x.clone()
    h.reshape(-1).add_(1)
    h.flatten().mul_(2)
    return h


def contiguous_is_the_same_tensor(m, x, y):
    h = x.clone()
    h.contiguous().add_(1)
    h.to(torch.float32).mul_(2)
    return h


def input_written(m, x, y):
    x.add_(1)
    y[0] = x[1]
    return x * y


def input_written_through_view(m, x, y):
    x.view(4, 3)[2].zero_()
    return x.sum(), y


def buffer_written(m, x, y):
    old = m.state.clone()
    m.state.mul_(0.5).add_(x)
    return old, m.state + y


def buffer_assigned(m, x, y):
    m.state = m.state + 1
    return x + m.state


def buffer_slice_written(m, x, y):
    m.state[1:] = x[1:]
    return m.state * 2


def dropout_alias_in_eval(m, x, y):
    h = x * 1
    g = torch.nn.functional.dropout(h, 0.5, training=False)
    g.add_(1)
    return h, g


def activations_in_place(m, x, y):
    h = torch.nn.functional.relu(x + y, inplace=True)
    g = torch.nn.functional.hardtanh(h * 2, inplace=True)
    return torch.nn.functional.leaky_relu(g - 1, 0.1, inplace=True), h


def arithmetic_in_place(m, x, y):
    h = x.clone()
    h += y
    h -= 1
    h *= y
    h /= 3
    h.clamp_(-1, 1).exp_().sqrt_()
    h.addcmul_(x, y, value=0.1)
    return h


def integer_keeps_its_dtype(m, x, y):
    count = torch.zeros(3, 4, dtype=torch.int32)
    count += (x > 0).int()
    half = x.half()
    half.add_(y)
    return count, half


def metadata_in_place(m, x, y):
    h = x.clone()
    h.unsqueeze_(0)
    h.transpose_(1, 2)
    h.squeeze_(0)
    h.add_(1)
    return h


def written_twice_between_reads(m, x, y):
    h = x.clone()
    a = h[0] * 1
    h[0] = 5
    b = h[0] * 1
    h[0] = a
    return a, b, h


def output_is_the_input(m, x, y):
    return x, x[0], y.t()


def copy_broadcasts_and_casts(m, x, y):
    h = torch.zeros(3, 4, dtype=torch.float64)
    h.copy_(y[:1])
    h[:, 1] = x[0, 0]
    return h


def complex_parts(m, x, y):
    z = torch.view_as_complex(torch.stack([x, y], -1))
    torch.view_as_real(z)[..., 0] = 1.0
    return torch.view_as_real(z)


def clone_of_a_view_is_free(m, x, y):
    h = x.clone()
    kept = h[0].clone()
    h[0] = 1
    return kept, h


CASES = [v for v in list(globals().values()) if callable(v) and getattr(v, "__code__", None) is not None
         and v.__code__.co_varnames[:3] == ("m", "x", "y")]  # fmt: skip


@pytest.mark.parametrize("fn", CASES, ids=lambda f: f.__name__)
def test_equals_eager(fn):
    check(fn)


ACTIVATIONS = [
    nn.ReLU(True), nn.ReLU6(True), nn.LeakyReLU(0.1, True), nn.ELU(1.0, True), nn.CELU(1.0, True), nn.SELU(True),
    nn.SiLU(True), nn.Mish(True), nn.Hardswish(True), nn.Hardsigmoid(True), nn.Hardtanh(-1, 1, True), nn.Threshold(0.1, 2.0, True),
    nn.Dropout(0.5, True), nn.Dropout2d(0.5, True), nn.AlphaDropout(0.5, True), nn.FeatureAlphaDropout(0.5, True),
    nn.RReLU(inplace=True),
]  # fmt: skip


def test_every_module_with_an_inplace_switch():
    class All(nn.Module):
        def __init__(self):
            super().__init__()
            self.all = nn.ModuleList(ACTIVATIONS)

        def forward(self, x):
            results = []
            for module in self.all:
                y = x * 2
                z = y.view(-1)
                module(y)
                results += [y, z[1]]
            return results

    model, x = All().eval(), torch.randn(2, 3, 4, 4)
    found = capture(model, (x,))
    assert found.program is not None, [str(r) for r in found.regions]
    for a, b in zip(model(x), found.run(x), strict=True):
        assert torch.equal(a, b)


def test_mutations_are_named():
    found = check(buffer_written)
    assert [(m.buffer, m.input) for m in found.program.signature.mutations] == [("state", None)]
    found = check(input_written)
    assert [(m.buffer, m.input) for m in found.program.signature.mutations] == [(None, 0), (None, 1)]


def test_reading_alone_mutates_nothing():
    def read(m, x, y):
        return m.state[1:] + x.view(-1)[0]

    assert check(read).program.signature.mutations == ()


def test_inputs_that_share_memory():
    """A write to one of two inputs that are one tensor is seen through the other: not captured, never wrong."""
    x = torch.randn(3, 4)

    def write(m, x, y):
        x.add_(1)
        return x * y

    found = check(write, x, x, whole=False)
    assert "has other values" in found.regions[0].reason
    model, a = Fn(write), torch.ones(3, 4)
    b = a.clone()
    torch.testing.assert_close(found.run(a, a), model(b, b))
    assert torch.equal(a, b)


def test_one_tensor_passed_twice_is_two_inputs():
    x = torch.randn(3, 4)
    found = capture(Fn(lambda m, x, y: x - 2 * y).eval(), (x, x))
    y = torch.randn(3, 4)
    torch.testing.assert_close(found.run(x, y), x - 2 * y)


def test_guard_refuses_shared_memory_where_an_input_is_written():
    found = check(input_written)
    guard, x = Guard(found.program), torch.randn(3, 4)
    assert guard.check([x, x.clone()]) is None
    assert "shares memory" in guard.check([x, x])


def test_a_buffer_replaced_by_one_of_another_shape_is_refused():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Module()
            self.inner.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            self.inner.seen = torch.cat([self.inner.seen, x])
            return self.inner.seen * 2

    model = Growing()
    found = capture(model, (torch.ones(1),))
    assert found.program is None and "another shape" in found.regions[0].reason
    assert model.inner.seen.shape == (1,)
    assert found.run(torch.ones(1)).shape == (2,) and found.run(torch.ones(1)).shape == (3,)


def test_views_that_cannot_be_undone_are_refused_with_the_line():
    def write(m, x, y):
        h = x.clone()
        h.unfold(1, 2, 2).mul_(2)  # writes through windows
        return h

    found = check(write, whole=False)
    region = found.regions[0]
    assert "unfold" in region.reason and region.where.startswith("test_capture_alias.py:") or "unfold" in region.reason
    assert "test_capture_alias.py" in region.where
    x = torch.randn(3, 4)
    torch.testing.assert_close(found.run(x, x), Fn(write)(x, x))


def test_view_of_the_buffer_kept_by_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("whole", torch.zeros(4))
            self.register_buffer("part", self.whole[:2])

        def forward(self, x):
            self.whole.add_(x)
            return self.part + 1

    model = Model()
    found = capture(model, (torch.ones(4),))
    for run in (model, found.run):
        assert torch.equal(run(torch.ones(4)), torch.full((2,), 2.0)), run
        assert torch.equal(run(torch.ones(4)), torch.full((2,), 3.0)), run


def test_leaves_of_a_call_keep_their_order():
    leaves, spec = flatten_call((torch.zeros(1),), {"b": torch.zeros(2), "a": torch.zeros(3)})
    assert [t.numel() for t in leaves] == [1, 3, 2]
    assert spec.paths() == ["[0][0]", "[1]['a']", "[1]['b']"]
