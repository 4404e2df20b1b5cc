"""Capturing whole models: what the program is, what it is called, and what stays as it was."""

import copy
import dataclasses
import re
import typing
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphwright.capture import capture, key, weights_fingerprint
from graphwright.errors import InputError
from graphwright.ir import sites_of
from graphwright.structure import flatten, flatten_call


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def check(model, *args, dynamic=None, **kwargs):
    """Capture, verify, and compare with eager, bit for bit."""
    found = capture(model, args, kwargs, dynamic=dynamic)
    assert found.program is not None, [str(r) for r in found.regions]
    found.program.verify()
    with torch.no_grad():
        expected, got = model(*args, **kwargs), found.run(*args, **kwargs)
    a, spec = flatten(expected)
    b, other = flatten(got)
    assert spec == other
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=0)
    return found


class Attention(nn.Module):
    def __init__(self, width=8, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, s, c = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, s, c))


class Mixed(nn.Module):
    """Convolution, linear and attention, in one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.norm, self.attention = nn.LayerNorm(8), Attention()
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(8, 5)

    def forward(self, image):
        x = self.stem(image).flatten(2).transpose(1, 2)
        x = x + self.drop(self.attention(self.norm(x)))
        return self.head(x.mean(1))


def sites(found):
    return [s for n in found.program.nodes for s in sites_of(n)]


def test_mixed_model_keeps_composite_ops_names_and_sites():
    model = Mixed().eval()
    found = check(model, torch.randn(2, 3, 9, 9))
    program = found.program
    ops = {n.target._schema.name for n in program.nodes if hasattr(n.target, "_schema")}
    assert {"aten::conv2d", "aten::batch_norm", "aten::layer_norm", "aten::linear", "aten::dropout",
            "aten::scaled_dot_product_attention"} <= ops  # fmt: skip
    names = {n for n, _ in [*model.named_parameters(), *model.named_buffers()]} - {"stem.1.num_batches_tracked"}
    assert set(program.tensors()) == names
    assert set(dict(program.graph_module.named_parameters())) == set(dict(model.named_parameters()))
    assert {"stem.0", "stem.1", "stem.2", "norm", "attention.qkv", "attention.out", "drop", "head", "add", "flatten",
            "attention.scaled_dot_product_attention"} <= set(sites(found))  # fmt: skip
    assert len(set(sites(found))) == len(sites(found))
    assert [n.name for n in program.placeholders] == ["image"]


def test_source_lines_are_the_users():
    found = check(Mixed().eval(), torch.randn(2, 3, 9, 9))
    lines = {s: n.meta["trace"] for n in found.program.nodes for s in sites_of(n)}
    text = Path(__file__).read_text().splitlines()
    for site, code in (("head", "self.head(x.mean(1))"), ("attention.qkv", "self.qkv(x)"), ("stem.0", "self.stem(image)")):
        file, number = lines[site].rsplit(":", 1)
        assert file.endswith("test_capture.py") and code in text[int(number) - 1]


def test_repeated_modules_and_ops_are_numbered():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return torch.relu(self.a(torch.relu(self.a(x)))) + 1

    assert sites(check(Twice().eval(), torch.randn(2, 4))) == ["a", "relu", "a#2", "relu#2", "add"]


def test_leaf_modules_with_several_ops():
    class Norm(nn.Module):
        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.pad = Norm(), nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular")
            self.act = nn.GELU()

        def forward(self, x):
            return self.act(self.pad(self.norm(x)))

    assert sites(check(Model().eval(), torch.randn(2, 3, 4))) == [
        "norm.pow", "norm.mean", "norm.add", "norm.rsqrt", "norm.mul", "pad.pad", "pad", "act"]  # fmt: skip


def test_a_bare_layer_is_a_model():
    assert sites(check(nn.Linear(3, 4), torch.randn(2, 3))) == ["linear"]


def test_the_users_model_is_left_alone():
    model = Mixed().train()
    model.stem[1].eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    mark, attributes = weights_fingerprint(model), {n: set(vars(m)) for n, m in model.named_modules()}
    found = capture(model, (torch.randn(2, 3, 9, 9),), dynamic="auto")
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert [m.training for m in model.modules()] == modes
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert weights_fingerprint(model)[1] == mark[1]
    with torch.no_grad():  # and nothing is shared: training one leaves the other alone
        for t in found.program.graph_module.parameters():
            t.zero_()
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_the_random_state_is_left_alone():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train(), torch.randn(2, 4)
    before = torch.get_rng_state()
    capture(model, (x,))
    assert torch.equal(before, torch.get_rng_state())


def test_tied_parameters_are_stored_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, i):
            return self.out(self.embed(i))

    found = check(Tied(), torch.randint(0, 11, (2, 3)))
    assert list(found.program.tensors()) == ["embed.weight"] and found.program.size_bytes() == 11 * 4 * 4


def test_views_of_one_storage_share_the_copy():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.randn(4, 4)
            self.register_buffer("top", whole[:2])
            self.register_buffer("turned", whole.t())

        def forward(self, x):
            return x @ self.turned + (x[:, :2] @ self.top)

    program = check(Views(), torch.randn(3, 4)).program
    a, b = program.tensor("top"), program.tensor("turned")
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and b.stride() == (1, 4)


def test_captures_may_share_weights():
    model, storage = Mixed().eval(), {}
    one = capture(model, (torch.randn(2, 3, 9, 9),), storage=storage).program
    two = capture(model, (torch.randn(1, 3, 12, 12),), storage=storage).program
    assert one.tensor("head.weight").data_ptr() == two.tensor("head.weight").data_ptr()
    assert one.tensor("head.weight").data_ptr() != model.head.weight.data_ptr()


class Answer(typing.NamedTuple):
    logits: torch.Tensor
    nothing: None


@dataclasses.dataclass
class Out:
    x: torch.Tensor
    inner: dict
    flag: bool = True


def test_structures_of_inputs_and_outputs():
    class Model(nn.Module):
        def forward(self, x, *rest, scale=1, more=None, mask):
            y = x * scale + more["deep"][0]
            total = sum(r.sum() for r in rest)
            return {"a": (y, None), "b": [total, Out(y.masked_fill(mask, 0), {"t": x, 1: None})], "c": Answer(y, None), "d": 3}

    x = torch.randn(2, 3)
    found = check(Model(), x, torch.ones(1), torch.ones(2), scale=2.5, more={"deep": (x, None)}, mask=x > 0)
    got = found.run(x, torch.ones(1), torch.ones(2), mask=x > 0, more={"deep": (x, None)}, scale=2.5)
    assert isinstance(got["c"], Answer) and got["b"][1].flag is True and got["b"][1].inner[1] is None and got["d"] == 3
    names = [n.name for n in found.program.placeholders]
    assert names == ["x", "input_1", "input_2", "mask", "more_deep_0"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    check(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU()).to(dtype).eval(), torch.randn(3, 4).to(dtype))


@pytest.mark.parametrize("shape", [(1, 4), (0, 4), (2, 0, 3, 4), (4,)])
def test_odd_shapes(shape):
    check(nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1)).eval(), torch.randn(shape))


def test_channels_last_and_strided_inputs():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 4, 3)).eval()
    found = check(model, torch.randn(2, 4, 4, 4).to(memory_format=torch.channels_last))
    for x in (torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 8)[..., ::2], torch.randn(4, 4, 4, 2).permute(3, 0, 1, 2)):
        torch.testing.assert_close(found.run(x), model(x))


def test_views_of_inputs_work_on_any_strides():
    class View(nn.Module):
        def forward(self, x):
            return x.view(-1) * 2

    found = check(View(), torch.randn(3, 4))
    assert torch.equal(found.run(torch.ones(4, 3).t()), torch.full((12,), 2.0))


def test_recurrent_and_transformer_layers():
    check(nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True).eval(), torch.randn(2, 3, 4))
    check(nn.GRU(4, 5).eval(), torch.randn(3, 2, 4))
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    found = capture(nn.TransformerEncoder(layer, 2).eval(), (torch.randn(2, 5, 8),))
    assert "aten::linear" in {n.target._schema.name for n in found.program.nodes if hasattr(n.target, "_schema")}


def test_fused_attention_that_answers_otherwise_is_noted():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    mask = torch.tensor([[False, False, True], [False, False, False]])
    found = capture(model, (torch.randn(2, 3, 8),), {"src_key_padding_mask": mask})
    assert found.program is not None and any("fused attention" in n for n in found.notes)


def test_autocast_inside_and_around():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = torch.softmax(self.a(x), -1)
                with torch.autocast("cpu", enabled=False):
                    z = self.b(x)
                return y @ y.t(), z, torch.cat([y, self.b(y)])

    x = torch.randn(3, 4)
    check(Cast().eval(), x)
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval()
    with torch.autocast("cpu", torch.bfloat16):
        program = capture(model, (x,)).program
        expected = model(x)
    assert program(x)[0].dtype == torch.bfloat16  # the casts are part of the program
    torch.testing.assert_close(program(x)[0], expected, rtol=0, atol=0)


def test_gradients_stop_where_the_model_stops_them():
    class Stops(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            with torch.no_grad():
                y = self.a(x)
            return self.b(y) + self.b(x).detach()

    model, x = Stops(), torch.randn(2, 3)
    program = check(model, x).program
    model(x).sum().backward()
    program(x)[0].sum().backward()
    for name, p in model.named_parameters():
        ours = program.tensor(name).grad
        assert (p.grad is None) == (ours is None), name
        assert p.grad is None or torch.allclose(p.grad, ours)


def test_train_mode_is_captured_as_what_it_does():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.BatchNorm2d(3, momentum=0.3)).train()
    found = capture(model, (torch.randn(4, 2, 3, 3),))
    assert any("train mode" in n for n in found.notes) and found.program.training
    twin, x = copy.deepcopy(model), torch.randn(4, 2, 3, 3)
    for _ in range(2):
        torch.manual_seed(1)
        expected = twin(x)
        torch.manual_seed(1)
        torch.testing.assert_close(found.run(x), expected)
    for name, b in twin.named_buffers():
        torch.testing.assert_close(found.program.tensor(name), b)
    assert model[1].num_batches_tracked == 0


def test_inference_mode_around_the_capture_or_the_example():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True)).eval()
    with torch.inference_mode():
        x = torch.randn(2, 3, 8, 8)
        inside = capture(model, (x,), dynamic="auto")
    outside = capture(model, (x,))
    for found in (inside, outside):
        assert found.program is not None, [str(r) for r in found.regions]
        with torch.inference_mode():
            torch.testing.assert_close(found.run(x), model(x))


def test_hooks_run_while_tracing_and_are_noted():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval()
    model[0].register_forward_hook(lambda m, a, out: out * 2)
    found = check(model, torch.randn(2, 3))
    assert any("hooks on 0 " in n for n in found.notes)


def test_stashed_attributes_are_put_back_and_noted():
    class Stash(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.calls, self.log = None, 0, []

        def forward(self, x):
            self.seen, self.calls = x * 2, self.calls + 1
            self.log.append(self.seen)
            return self.seen

    model = Stash()
    found = check(model, torch.randn(2))
    assert model.calls == 1 and len(model.log) == 1 and type(model.seen) is torch.Tensor  # one call of check's own
    assert any("sets seen, calls" in n or "calls" in n for n in found.notes)


def test_wrong_inputs_are_the_models_own_words_and_line():
    with pytest.raises(InputError, match=r"test_capture\.py:\d+: .*RuntimeError: .*") as caught:
        capture(Mixed().eval(), (torch.randn(2, 4, 9, 9),))
    line = int(re.search(r"test_capture\.py:(\d+)", str(caught.value))[1])
    assert "self.stem(image)" in Path(__file__).read_text().splitlines()[line - 1]
    assert "full traceback" in caught.value.hint
    with pytest.raises(InputError, match="TypeError.*missing 1 required"):
        capture(Mixed().eval(), ())


def test_mixed_devices_are_named():
    with pytest.raises(InputError, match=r"cpu, meta.* input 0 lies on cpu, the model on meta: pass x\.to\('meta'\)"):
        capture(nn.Linear(3, 3, device="meta"), (torch.randn(2, 3),))


def test_lazy_modules_are_refused():
    with pytest.raises(InputError, match="lazy"):
        capture(nn.LazyLinear(3), (torch.randn(2, 3),))


def test_models_behind_torch_compile():
    model = nn.Linear(3, 4).eval()
    assert set(capture(torch.compile(model), (torch.randn(2, 3),)).program.tensors()) == {"weight", "bias"}


def test_fingerprint_sees_edits():
    model = Mixed().eval()
    before = weights_fingerprint(model)
    assert weights_fingerprint(model) == before
    with torch.no_grad():
        model.head.bias.add_(1)
    edited = weights_fingerprint(model)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    replaced = weights_fingerprint(model)
    model.train()
    assert len({before, edited, replaced, weights_fingerprint(model)}) == 4


def test_hooks_that_a_library_puts_into_its_own_models_are_no_edit():
    model, seen = Mixed().eval(), []
    before = weights_fingerprint(model)

    def hook(module, args, output):
        seen.append(module)

    hook.__module__ = "transformers.utils.output_capturing"
    model.head.register_forward_hook(hook)
    assert weights_fingerprint(model) == before
    hook.__module__ = "users.own"
    assert weights_fingerprint(model) != before


def test_key_tells_calls_apart():
    def of(*args, **kwargs):
        return key(*flatten_call(args, kwargs))

    x = torch.zeros(2, 3)
    assert of(x) == of(x + 1) and hash(of(x)) == hash(of(x + 1))
    assert len({of(x), of(x.double()), of(x[:1]), of(x, None), of(x, flag=True), of(x, flag=1)}) == 6


def test_hooks_that_the_first_call_installs_are_taken_off_again():
    """Some models (transformers' output recorders) hook their modules when they first run."""

    class Recording(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.hooked = False

        def forward(self, x):
            seen = []
            if not self.hooked:
                self.inner.register_forward_hook(lambda module, args, out: out * 2)
                self.hooked = True
            seen.append(self.inner(x))
            return seen[0]

    model, x = Recording().eval(), torch.randn(2, 4)
    capture(model, (x,), {})
    assert not model.hooked
    assert not model.inner._forward_hooks
    with torch.no_grad():
        torch.testing.assert_close(model(x), 2 * torch.nn.functional.linear(x, model.inner.weight, model.inner.bias))
