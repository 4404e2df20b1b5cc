"""The torch.compile backend: right in every mode that Dynamo has, and out of the way where it can't help."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright import dynamo, search
from graphwright.measure import Timing
from graphwright.numerics import Exact


def stopwatch(faster: bool):
    """Stands in for the race at the end; both sides run once, as in a real one."""

    def race(calls, **options):
        for call in calls:
            call()
        return [Timing(10.0, 10.0, 10.0, 3), Timing(*([5.0] * 3 if faster else [20.0] * 3), 3)]

    return race


@pytest.fixture(autouse=True)
def fragments(monkeypatch):
    """Every graph that the backend was given in the test, in order; each test starts with an empty Dynamo."""
    found: list[dynamo.Fragment] = []
    make = dynamo.Fragment

    def recorded(*args):
        found.append(make(*args))
        return found[-1]

    monkeypatch.setattr(dynamo, "Fragment", recorded)
    monkeypatch.setattr(dynamo, "interleaved", stopwatch(True))
    torch.compiler.reset()
    dynamo._once.cache_clear()
    torch.manual_seed(0)
    with torch.no_grad():
        yield found
    torch.compiler.reset()


def compiled(model, **options):
    return torch.compile(model, backend="graphwright", **options)


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in flat(v)]
    return [t for v in value for t in flat(v)] if isinstance(value, (tuple, list)) else []


def exact(model, fast, *args, **kwargs):
    """Two calls of ``fast``: the rule for exact results holds against a float64 run, on copies of the inputs."""

    def run(f, double=False):
        given = [a.double() if double and isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        return flat(f(*[a.clone() if isinstance(a, torch.Tensor) else a for a in given], **kwargs))

    wide = copy.deepcopy(model).double() if isinstance(model, nn.Module) else model
    reference, before = run(wide, double=True), run(model)
    for _ in range(2):
        after = run(fast)
        assert len(after) == len(before)
        for r, b, a in zip(reference, before, after, strict=True):
            assert Exact().failure(r, b, a) is None
            assert a.stride() == b.stride()


def form_of(fragment):
    """The form for the one set of weights that a graph knows."""
    gc.collect()  # those of tensors that were replaced go with them
    (state,) = fragment.states.values()
    return state.form


def net():
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)).eval()


# -- models ----------------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.norm.running_mean.uniform_(-1, 1)

    def forward(self, x):
        y = torch.relu(self.norm(self.one(x)))
        return {"map": y, "pooled": y.mean((2, 3)), "none": None}


class Broken(nn.Module):
    """Python decides in the middle: two graphs or three."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = torch.tanh(self.one(x))
        if y.sum().item() > 1e6:
            return y
        return self.two(y) + x


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.table(ids)))


MODELS = {
    "mlp": (net, (torch.randn(8, 16),), 1),
    "conv": (lambda: Conv().eval(), (torch.randn(2, 3, 9, 7),), 1),
    "graph break": (Broken, (torch.randn(3, 8),), 2),
    "tied": (Tied, (torch.tensor([[1, 2, 10]]),), 1),
    "function": (lambda: lambda x, y: torch.softmax(x @ y.T, -1) @ y, (torch.randn(5, 6), torch.randn(7, 6)), 1),
    "integers": (lambda: lambda i: (i * 2 + 1, i // 3, i > 4, i.sum()), (torch.arange(10),), 1),
    "no elements": (lambda: lambda x: (x @ x.T).sum(0), (torch.randn(0, 4),), 1),
    "no dimensions": (lambda: lambda x: x * 2 + 1, (torch.tensor(1.5),), 1),
    "transposed": (lambda: lambda x: torch.relu(x) @ x, (torch.randn(5, 5).t(),), 1),
    "views": (lambda: lambda x: (x[1:], (x * 2).chunk(2), (x + 1).view(-1)), (torch.randn(4, 4),), 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_numbers(name, fragments):
    make, args, graphs = MODELS[name]
    model = make()
    exact(model, compiled(model), *args)
    assert [f.verdict for f in fragments] == ["optimized"] * graphs


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=lambda m: m.__name__)
def test_whole_graph_in_either_mode(mode, fragments):
    model, x = net(), torch.randn(8, 16)
    with mode():
        fast = compiled(model, fullgraph=True)
        exact(model, fast, x)
        assert fast(x).is_inference() == (mode is torch.inference_mode)
    with torch.no_grad():
        exact(model, fast, x)
    assert {f.verdict for f in fragments} == {"optimized"}


def test_parameters_become_constants_under_their_own_names(fragments):
    model, x = net(), torch.randn(8, 16)
    compiled(model)(x)
    assert {"0.weight", "1.running_mean", "3.bias"} <= {i.name for i in fragments[0].inputs}
    form = form_of(fragments[0])
    assert len(form.free) == 1 and len(form.constants.slots) == 8
    assert not any("batch_norm" in str(n.target) for n in form.runner.program.nodes)  # folded: that takes constants


class Values(nn.Module):
    """A transformers model that gives its outputs as a tuple."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids, mask):
        return tuple(self.inner(input_ids=ids, attention_mask=mask).values())


@pytest.mark.slow
def test_tiny_bert(fragments):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100)
    model = transformers.BertModel(config).eval()
    fast = compiled(model)
    for batch, length in ((2, 7), (3, 11), (5, 19)):  # fixed sizes first, then one graph for all
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, -2:] = 0
        ids = torch.randint(3, 100, (batch, length))
        assert type(fast(input_ids=ids, attention_mask=mask)) is type(model(input_ids=ids))
        exact(Values(model), Values(fast), ids, mask)
    assert [f.verdict for f in fragments] == ["optimized"] * 2
    assert not any(f._uncovered for f in fragments)


@pytest.mark.slow
def test_tiny_resnet(fragments):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=3)
    model = transformers.ResNetForImageClassification(config).eval()

    class Logits(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x).logits

    exact(Logits(model), Logits(compiled(model)), torch.randn(2, 3, 32, 32))
    assert [f.verdict for f in fragments] == ["optimized"]


# -- sizes and numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_sizes_vary(dynamic, fragments):
    model = nn.Sequential(nn.Linear(16, 8), nn.Softmax(-1))
    fast = compiled(model, dynamic=dynamic)
    for n in (4, 9, 6, 1, 30):
        exact(model, fast, torch.randn(n, 16))
    assert all(f.verdict == "optimized" and not f._uncovered for f in fragments)
    assert len(fragments) == {None: 3, True: 2, False: 5}[dynamic]  # a size of 1 is a graph of its own to Dynamo


def test_sizes_among_the_outputs(fragments):
    def f(x):
        return x.relu(), x.shape[0] * 3 + 1, x.shape[0]

    fast = compiled(f, dynamic=True)
    for n in (4, 7):
        x = torch.randn(n, 2)
        for _ in range(2):
            assert fast(x)[1:] == (3 * n + 1, n)
            assert torch.equal(fast(x)[0], x.relu())
    assert [f.verdict for f in fragments] == ["optimized"]


def test_numbers_as_arguments_are_taken_as_they_are(fragments, caplog):
    def f(x, k, scale):
        return x * k + scale

    fast, x = compiled(f), torch.randn(4)
    for k, scale in ((2, 0.5), (3, 0.25), (4, 0.75), (5, 0.125)):
        for _ in range(2):
            torch.testing.assert_close(fast(x, k, scale), f(x, k, scale))
    assert sum("does not cover the call: an integer is 4; covered: 3" in r.message for r in caplog.records) == 1


def test_nothing_to_compute(fragments):
    x = torch.randn(3)
    assert compiled(lambda x: (x, 3, "text"))(x)[0] is x
    assert compiled(lambda: 5)() == 5
    assert fragments == []
    graph = torch.fx.Graph()
    graph.output((graph.placeholder("x"),))
    assert dynamo.backend(torch.fx.GraphModule({}, graph), [x])(x)[0] is x


# -- state -----------------------------------------------------------------------------------------------------------


def test_inputs_are_written(fragments):
    def f(x, y):
        x[:2] = y
        return x.add_(1).sum()

    fast = compiled(f)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(3):
                mine, his, y = torch.zeros(4), torch.zeros(4), torch.randn(2)
                assert torch.equal(fast(mine, y), f(his, y))
                assert torch.equal(mine, his)
    assert {f.verdict for f in fragments} == {"optimized"}


def test_a_cache_in_a_buffer(fragments):
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("kept", torch.zeros(4, 3))

        def forward(self, x, at):
            self.kept.index_copy_(0, at, self.linear(x))
            return self.kept.sum(0)

    model = Cache()
    twin, fast = copy.deepcopy(model), compiled(model)
    for _ in range(2):
        for at in (torch.tensor([0]), torch.tensor([2])):
            x = torch.randn(1, 3)
            torch.testing.assert_close(fast(x, at), twin(x, at))
            torch.testing.assert_close(model.kept, twin.kept)
    assert [f.verdict for f in fragments] == ["optimized"]


def test_batch_norm_in_train_mode_writes_its_statistics(fragments):
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)).train()
    twin, fast = copy.deepcopy(model), compiled(model)
    for _ in range(4):
        x = torch.randn(6, 5)
        torch.testing.assert_close(fast(x), twin(x))
        for a, b in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    assert [f.verdict for f in fragments] == ["optimized"]
    assert model[1].num_batches_tracked == 4


def test_random_numbers_are_those_that_eager_draws(fragments):
    def f(x):
        return nn.functional.dropout(x, 0.5, True) + torch.rand(8)

    fast, x = compiled(f), torch.randn(8, 8)
    for seed in (0, 1):
        torch.manual_seed(seed)
        got = [fast(x), fast(x), torch.rand(1)]
        torch.manual_seed(seed)
        assert all(map(torch.equal, got, [f(x), f(x), torch.rand(1)]))
    assert [f.verdict for f in fragments] == ["optimized"]


def test_outputs_are_the_callers_own(fragments):
    """Writing into an answer must reach neither the next answer nor another output of the same call."""

    def f(x):
        return x + 1, x + 1, torch.arange(3) * 2

    fast, x = compiled(f), torch.randn(4)
    for _ in range(3):
        got = fast(x)
        for g, w in zip(got, f(x), strict=True):
            assert torch.equal(g, w)
            g.add_(100)
    assert [f.verdict for f in fragments] == ["optimized"]


def test_views_among_the_outputs_stay_views(fragments):
    def f(x):
        y = x * 2
        return y, y[0], x.view(-1)

    fast, x = compiled(f), torch.randn(2, 3)
    for _ in range(2):
        y, row, whole = fast(x)
        row.fill_(7)
        whole[0] = 5
        assert y[0].tolist() == [7] * 3 and x[0, 0] == 5


# -- weights that change ---------------------------------------------------------------------------------------------

EDITS = {
    "in place": lambda m: m[0].weight.mul_(1.5),
    "through .data": lambda m: m[0].weight.data.add_(0.1),
    "data +=": lambda m: m[0].weight.__setattr__("data", m[0].weight.data.add_(0.1)),
    "new data": lambda m: setattr(m[3].weight, "data", torch.randn(4, 32)),
    "new parameter": lambda m: setattr(m[3], "weight", nn.Parameter(torch.randn(4, 32))),
    "load_state_dict": lambda m: m.load_state_dict(net().state_dict()),
    "batch statistics": lambda m: (m.train()(torch.randn(8, 16) + 4), m.eval()),
    "buffer": lambda m: setattr(m[1], "running_mean", torch.randn(32)),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in ("data +=", "new data") else n for n in EDITS])
def test_written_weights_are_noticed(name, fragments, caplog):
    model, x = net(), torch.randn(8, 16)
    fast = compiled(model)
    exact(model, fast, x)
    EDITS[name](model)
    for _ in range(dynamo.PATIENCE + 2):
        exact(model, fast, x)
    assert [f.verdict for f in fragments] == ["optimized"]
    assert len(form_of(fragments[0]).constants.slots) == 8  # made anew, and still folded


def test_an_optimizer_step_is_noticed(fragments):
    model, x = net(), torch.randn(8, 16)
    fast = compiled(model)
    exact(model, fast, x)
    with torch.enable_grad():
        step = torch.optim.AdamW(model.parameters(), 0.1)
        model(x).square().sum().backward()
        step.step()
    exact(model, fast, x)


@pytest.mark.slow
def test_weights_that_never_stand_still_leave_dynamos_graph(fragments, caplog):
    model, x = net(), torch.randn(8, 16)
    fast = compiled(model)
    for _ in range(3 * dynamo.PATIENCE):
        model[0].weight.mul_(1.01)
        exact(model, fast, x)
    assert form_of(fragments[0]) is None
    for k in range(dynamo.CHANCES + 1):
        for _ in range(dynamo.PATIENCE):
            exact(model, fast, x)
        assert (form_of(fragments[0]) is None) == (k >= dynamo.CHANCES - 1)
        model[0].weight.mul_(1.01)
    assert "from now on" in caplog.text and caplog.text.count("weights were written") == dynamo.CHANCES
    exact(model, fast, x)


def test_a_buffer_that_changes_from_call_to_call_is_an_input(fragments):
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 4)
            self.register_buffer("offset", torch.zeros(4))

        def forward(self, x):
            return self.linear(x) + self.offset

    model, x = Biased(), torch.randn(8, 16)
    fast = compiled(model)
    for _ in range(dynamo.PATIENCE + 4):
        exact(model, fast, x)
        model.offset.add_(1)
    names = [fragments[0].inputs[k].name for k in form_of(fragments[0]).constants.slots]
    assert sorted(names) == ["linear.bias", "linear.weight"]


def test_a_dropped_model_is_freed(fragments):
    model, x = net(), torch.randn(8, 16)
    fast = compiled(model)
    fast(x)
    held = [weakref.ref(model[0].weight), weakref.ref(form_of(fragments[0]))]
    del model, fast
    gc.collect()
    assert [r() for r in held] == [None, None] and not fragments[0].states


def test_modules_of_one_class_share_a_graph(fragments):
    """Compiled layer by layer, Dynamo makes one graph for all of them; each is optimized with its own weights."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(x)))

    layers, x = nn.Sequential(*[Layer() for _ in range(3)]), torch.randn(5, 16)
    twin = copy.deepcopy(layers)
    for layer in layers:
        layer.compile(backend="graphwright")
    for _ in range(dynamo.PATIENCE + 2):
        exact(twin, layers, x)
    assert len(fragments) == 1 and len(fragments[0].states) == 3
    assert len({id(s.form) for s in fragments[0].states.values()}) == 3
    gone, *kept = fragments[0].states.values()
    gone.form.runner = None  # what fails with one set of weights leaves the others alone
    for _ in range(2):
        exact(twin, layers, x)
    assert gone.form is None and all(s.form is not None for s in kept)


# -- gradients -------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_model(fragments, caplog):
    model = net().train()
    twin, fast = copy.deepcopy(model), compiled(model)
    with torch.enable_grad():
        for _ in range(2):
            mine, his = torch.ones(8, 16, requires_grad=True), torch.ones(8, 16, requires_grad=True)
            fast(mine).square().sum().backward()
            twin(his).square().sum().backward()
            for a, b in zip([mine, *model.parameters()], [his, *twin.parameters()], strict=True):
                assert torch.equal(a.grad, b.grad)
        compiled(Broken())(torch.randn(3, 8))
    assert all("gradients" in f.verdict for f in fragments)
    told = [r.message for r in caplog.records if r.name == "graphwright.dynamo"]
    assert len(told) == 1 and "torch.no_grad()" in told[0]
    model.eval()
    exact(model, fast, torch.randn(8, 16))
    assert fragments[-1].verdict == "optimized"


def test_gradients_on_without_need(fragments):
    """A frozen model is optimized with gradients on, until something asks for one."""
    model, x = net().requires_grad_(False), torch.randn(8, 16)
    fast = compiled(model)
    with torch.enable_grad():
        exact(model, fast, x)
        assert fragments[0].verdict == "optimized"
        assert fast(x.clone().requires_grad_()).requires_grad
        assert not fast(x).requires_grad
        model.requires_grad_(True)
        assert fast(x).requires_grad
        graph = fragments[0]
        with contextlib.suppress(StopIteration):  # Dynamo's guards aside, the form itself refuses
            k = next(k for k, i in enumerate(graph.inputs) if i.name == "0.weight")
            args = [model.get_parameter(i.name) if i.name in dict(model.named_parameters()) else None for i in graph.inputs]
            assert args[k].requires_grad and not form_of(graph).covers(tuple(args))


def test_a_model_that_switches_gradients_itself(fragments):
    def inner(x):
        with torch.no_grad():
            y = x @ x
        return y * 1

    def outer(x):
        with torch.enable_grad():
            return x * x

    x = torch.randn(4, 4)
    with torch.enable_grad():
        exact(inner, compiled(inner), x)
    exact(outer, compiled(outer), x)
    assert [f.verdict for f in fragments] == ["optimized"] * 2
    leaf = x.clone().requires_grad_()
    assert compiled(outer)(leaf).requires_grad


# -- what is not optimized -------------------------------------------------------------------------------------------


def test_not_faster_is_said_and_dynamos_graph_stays(fragments, caplog, monkeypatch):
    monkeypatch.setattr(dynamo, "interleaved", stopwatch(False))
    model, x = net(), torch.randn(8, 16)
    fast = compiled(model)
    assert torch.equal(fast(x), model(x)) and torch.equal(fast(x), model(x))
    assert not fragments[0].states and "recipe default is not faster: 20 ms against 10 ms" in fragments[0].verdict
    assert caplog.text.count("not faster") == 1


def test_a_real_race_decides(fragments, monkeypatch):
    monkeypatch.undo()
    model, x = net(), torch.randn(8, 16)
    fast = compiled(model)
    exact(model, fast, x)


def test_what_capture_refuses_runs_as_dynamos_graph(fragments, caplog):
    def f(x):
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    fast = compiled(f)
    for x in (torch.ones(3), -torch.ones(3)):
        for _ in range(2):
            assert torch.equal(fast(x), f(x))
    assert "cond" in fragments[0].verdict and caplog.text.count("runs as it is") == len(fragments)


def test_what_no_program_of_ours_stands_for(fragments):
    def switches(x):
        torch.set_grad_enabled(True)
        return x * 2

    fast, x = compiled(switches), torch.randn(3)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(fast(x), x * 2) and torch.is_grad_enabled()
    assert "gradients switched" in fragments[0].verdict
    fast = compiled(lambda x, y: x.add_(y))  # its answer is its input
    for _ in range(2):
        whole = torch.ones(6)
        assert fast(whole[:3], whole[3:]).data_ptr() == whole.data_ptr()
        assert whole.tolist() == [2, 2, 2, 1, 1, 1]
    assert "shares memory" in fragments[1].verdict


@pytest.mark.parametrize(("make", "words"), [
    (lambda: torch.randn(3, 3).to_sparse(), "sparse"),
    (lambda: torch.randn(3, device="meta"), "meta"),
])  # fmt: skip
def test_tensors_that_are_not_for_us(make, words, fragments):
    fast, x = compiled(lambda x: x * 2), make()
    for _ in range(2):
        assert fast(x).shape == x.shape
    assert all(words in f.verdict.lower() for f in fragments)


def test_a_defect_of_ours_does_not_reach_the_user(fragments, caplog, monkeypatch):
    def fail(*args):
        raise RuntimeError("no kernel today")

    model, x = net(), torch.randn(8, 16)
    with monkeypatch.context() as patch:
        patch.setattr(search, "build", fail)
        assert torch.equal(compiled(model)(x), model(x))
    assert "no kernel today" in caplog.text
    torch.compiler.reset()
    fast = compiled(model)
    exact(model, fast, x)
    form_of(fragments[-1]).runner = fail
    exact(model, fast, x)
    assert "the optimized one failed" in fragments[-1].verdict and caplog.text.count("the optimized one failed") == 1


def test_inputs_of_an_unknown_kind(fragments, caplog):
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    assert torch.equal(dynamo.backend(graph, [])(torch.ones(2)), torch.full((2,), 2.0))  # one input and no example
    assert "runs as it is" in caplog.text


def test_more_sets_of_weights_than_are_kept(fragments, monkeypatch, caplog):
    monkeypatch.setattr(dynamo, "STATES", 2)

    class Layer(nn.Module):
        def __init__(self, *sizes):
            super().__init__()
            self.inner = nn.Linear(*sizes)

        def forward(self, x):
            return self.inner(x) * 2

    layers, x = [Layer(4, 4) for _ in range(4)], torch.randn(2, 4)
    for layer in layers:
        layer.compile(backend="graphwright")
    for _ in range(dynamo.PATIENCE + 2):
        for layer in layers:
            torch.testing.assert_close(layer(x), layer.forward(x))
    assert len(fragments) == 1 and len(fragments[0].states) == 2
    assert caplog.text.count("more than 2 sets of weights") == 1
    del layers[1], layer  # what waits and is seen no more makes room
    for _ in range(20):
        for layer in layers:
            torch.testing.assert_close(layer(x), layer.forward(x))
    assert len(fragments[0].states) == 2 and all(s.form is not None for s in fragments[0].states.values())


def test_the_users_own_error_stays_his(fragments):
    model = nn.Embedding(5, 3)
    fast = compiled(lambda i: model(i) * 2)
    for _ in range(2):
        with pytest.raises(IndexError):
            fast(torch.tensor([9]))
    torch.testing.assert_close(fast(torch.tensor([4])), model(torch.tensor([4])) * 2)
    torch.testing.assert_close(fast(torch.tensor([4])), model(torch.tensor([4])) * 2)
    with pytest.raises(IndexError):
        fast(torch.tensor([9]))


def test_autocast_round_the_call(fragments):
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    fast = compiled(model)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fast(x), model(x)) and fast(x).dtype == torch.bfloat16
        exact(model, fast, x)


def test_several_threads(fragments):
    model, fast = (m := net()), compiled(m)
    wrong = []

    def work():
        with torch.no_grad():
            for _ in range(5):
                x = torch.randn(8, 16)
                if not torch.allclose(fast(x), model(x), atol=1e-5):
                    wrong.append(x)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# -- options ---------------------------------------------------------------------------------------------------------


def test_recipes(fragments):
    model, x = net(), torch.randn(8, 16)
    for recipe in ("bf16", "w8", [*gw.default_recipe()]):
        torch.compiler.reset()
        fast = compiled(model, options={"recipe": recipe})
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x), rtol=0.1, atol=0.1)
        assert fragments[-1].verdict == "optimized"
    assert fragments[0].recipe == "bf16" and fragments[-1].recipe.startswith("canonicalize, ")


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"recipe": "int8"}, gw.CalibrationError, "gw.optimize(model, example_inputs, recipe, calibration=[...])"),
    ({"recipe": [gw.Quantize()]}, gw.CalibrationError, "gw.optimize"),
    ({"recipe": "bf61"}, gw.RecipeError, "'bf16'"),
    ({"receipt": "bf16"}, gw.RecipeError, "did you mean 'recipe'?"),
    ({"recipe": 3}, gw.RecipeError, "int is no recipe"),
])  # fmt: skip
def test_unusable_options(options, error, words):
    fast = compiled(net(), options=options)
    for _ in range(2):
        with pytest.raises(error) as raised:
            fast(torch.randn(8, 16))
        assert words in str(raised.value) and isinstance(raised.value, gw.GraphwrightError)


def test_a_mode_of_inductors_is_said_to_change_nothing(fragments, caplog):
    model = Broken()
    exact(model, compiled(model, mode="max-autotune"), torch.randn(3, 8))
    assert caplog.text.count("mode='max-autotune' changes nothing") == 1


def test_torch_knows_the_backend():
    assert "graphwright" in torch._dynamo.list_backends()


def test_a_gain_is_logged(fragments, caplog):
    with caplog.at_level(logging.INFO, logger="graphwright.dynamo"):
        compiled(Broken())(torch.randn(3, 8))
    assert caplog.text.count("2.00 times faster than Dynamo's graph") == 2
    assert "test_dynamo.py:" in fragments[0].label  # where the graph begins


def test_the_package_itself_does_not_import_dynamo():
    code = "import sys, graphwright; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
