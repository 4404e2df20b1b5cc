"""The default pipeline, recipes, registered passes, plug-ins, bisection."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from graphwright.bisecting import bisect
from graphwright.errors import InputError, RecipeError
from graphwright.ir import Program, site_of
from graphwright.manager import Pass, PassResult, Pipeline
from graphwright.passes import pipeline, widen
from graphwright.passes.allow_half import AllowHalf
from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.dead_code import DeadCode
from graphwright.passes.pipeline import (
    DEFAULT,
    default_recipe,
    known_passes,
    precisions,
    recipes,
    register_pass,
    resolve,
)
from graphwright.passes.quantize import Quantize

aten = torch.ops.aten


@dataclass(frozen=True)
class Mine(Pass):
    """A pass of the user's."""

    name = "mine"

    def run(self, program: Program) -> PassResult:
        return PassResult(notes=["here"])


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """No test leaves a registered pass behind."""
    yield
    registry = pipeline._registry
    registry.added.clear()
    registry.broken.clear()
    registry.packages.clear()
    registry._loaded = False


def names(passes):
    return [p.name for p in passes]


# -- recipes ---------------------------------------------------------------------------------------------------------


def test_every_pass_has_a_name_of_its_own_a_summary_and_documented_options():
    passes = known_passes()
    assert len(passes) == len({*passes.values()}) >= 17
    for name, cls in passes.items():
        assert name == cls.name and cls.__doc__ and cls.summary().endswith(".")
        own = set(cls().options()) - {"include", "exclude"}
        assert all(f"{option}:" in cls.__doc__ for option in own), f"{name}: an option is not explained"


def test_recipes():
    assert set(recipes()) == {"default", "bf16", "half", "int8", "int8-dynamic", "w8", "w4"}
    assert recipes()["default"] == DEFAULT == default_recipe()
    assert resolve("int8") == (*DEFAULT, Quantize())
    assert resolve("bf16")[-1] == AllowHalf(dtypes=("bf16",)) and resolve("half")[-1] == AllowHalf()
    assert [p.numerics for p in DEFAULT] == [Canonicalize.numerics] * len(DEFAULT)


def test_precisions_follow_from_the_passes():
    assert precisions(resolve("default")) == {"f32"}
    assert precisions(resolve("bf16")) == {"f32", "bf16"}
    assert precisions(resolve("int8")) == precisions(resolve("w8")) == {"f32", "int8"}
    assert precisions(resolve(["int8", "bf16"])) == {"f32", "int8", "bf16"}


def test_a_recipe_may_be_a_name_a_pass_or_a_sequence():
    assert resolve("dead-code") == (DeadCode(),)
    assert resolve(Mine()) == (Mine(),)
    assert resolve(["canonicalize", Mine(), ("dead-code",)]) == (Canonicalize(), Mine(), DeadCode())
    assert resolve([]) == ()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("int9", "did you mean 'int8'"),
        ("fold-batchnorm", "'fold-batch-norm'"),
        ("xyzzy", "Recipes: default, bf16, half, int8"),
        (Mine, "Write Mine()"),
        (42, "int is no recipe"),
        (["default", None], "NoneType is no recipe"),
    ],
)
def test_bad_recipes_say_what_there_is(recipe, words):
    with pytest.raises(RecipeError) as error:
        resolve(recipe)
    assert words in str(error.value)


# -- registered passes -----------------------------------------------------------------------------------------------


def test_a_registered_pass_joins_the_default_pipeline():
    assert register_pass(after="fold-batch-norm")(Mine) is Mine
    found = names(default_recipe())
    assert found[found.index("fold-batch-norm") + 1] == "mine"
    assert "mine" in names(resolve("int8")) and resolve("mine") == (Mine(),)
    assert "mine" not in names(DEFAULT)
    pipeline.unregister_pass("mine")
    assert "mine" not in names(default_recipe())


def test_several_keep_their_order_and_may_stand_before_or_behind_each_other():
    def make(label):
        return type(label, (Mine,), {"name": label, "__doc__": "One of several."})

    register_pass(make("one"), after="dead-code")
    register_pass(make("two"), after="dead-code")
    register_pass(make("first"), before="canonicalize")
    register_pass(make("between"), after="one")
    found = names(default_recipe())
    assert found[0] == "first" and found[-4:] == ["dead-code", "one", "between", "two"]


def test_registered_without_a_neighbour_it_is_known_by_name_alone():
    register_pass(Mine)
    assert "mine" not in names(default_recipe()) and resolve("mine") == (Mine(),)


def test_registering_again_replaces():
    register_pass(Mine, after="dead-code")
    other = dataclass(frozen=True)(type("Other", (Mine,), {"__doc__": "Another."}))
    register_pass(other, before="dead-code")
    assert [type(p) for p in default_recipe() if p.name == "mine"] == [other]


@dataclass(frozen=True)
class Demanding(Mine):
    """Has an option without a default.

    Args:
        what: anything.
    """

    name = "demanding"

    def __init__(self, what):
        object.__setattr__(self, "what", what)


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (Mine, {"after": "fold-batchnorm"}, "did you mean 'fold-batch-norm'"),
        (Canonicalize, {}, "the name 'canonicalize' is taken"),
        (type("Nameless", (Mine,), {"name": ""}), {}, "has no name"),
        (dict, {}, "is no Pass"),
        (Demanding, {}, "Give every option a default"),
        (Mine, {"after": "mine"}, "no pass 'mine' is in the default pipeline"),
    ],
)
def test_bad_registrations(cls, options, words):
    with pytest.raises(RecipeError) as error:
        register_pass(cls, **options)
    assert words in str(error.value)
    assert "mine" not in pipeline._registry.added


class _Point:
    value = "somewhere:thing"

    def __init__(self, name, found):
        self.name, self.found = name, found

    def load(self):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_plug_ins_are_loaded_once_and_a_broken_one_is_left_out_with_a_warning(monkeypatch):
    asked = []

    def entry_points(group):
        asked.append(group)
        return [
            _Point("good", Mine),
            _Point("broken", ImportError("no module named gone")),
            _Point("caller", lambda: asked.append("called")),
        ]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    pipeline._registry._loaded = False
    with pytest.warns(
        UserWarning, match=r"plug-in 'broken' \(somewhere:thing\) of an unknown package is left out.*ImportError: no module named gone"
    ):
        assert known_passes()["mine"] is Mine
    assert resolve("mine") == (Mine(),)
    assert asked == ["graphwright.passes", "called"]


# -- bisection -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spoil(Pass):
    """Multiply the output by something."""

    name = "spoil"
    by: float = 2.0

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        last = program.nodes[-1]
        with program.graph.inserting_after(last):
            new = program.call(aten.mul.Tensor, last, self.by, like=last)
        last.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        result.change(site_of(last), f"times {self.by}")
        return result


@pytest.mark.parametrize("place", [0, 1, 3, 6])
def test_bisect_finds_the_first_pass_that_breaks(place, captured):
    program = captured(nn.Sequential(nn.Linear(4, 3), nn.Dropout()), torch.randn(2, 4))
    passes = [Canonicalize(), DeadCode(), Mine(), Spoil(1.0), DeadCode(), Mine(), Spoil(1.0)]
    passes.insert(place, Spoil())
    found = bisect(program, recipe=passes)
    assert (found.index, found.name) == (place, "spoil")
    assert "RMS error" in found.problem and "times 2.0" in str(found)
    assert len(found.after.nodes) == len(found.before.nodes) + 1


def test_bisect_with_a_check_of_ones_own(captured):
    program = captured(nn.Sequential(nn.Linear(4, 3), nn.Dropout()), torch.randn(2, 4))
    calls = []

    def check(p: Program) -> str | None:
        calls.append(len(p.nodes))
        return "the dropout is gone" if all(n.target is not aten.dropout.default for n in p.nodes) else None

    found = bisect(program, recipe=[Mine(), Mine(), Canonicalize(), Mine(), Mine(), Mine(), Mine()], check=check)
    assert (found.index, found.problem) == (2, "the dropout is gone") and len(calls) <= 8
    assert (found.site, found.sites) == ("1", ("1",))
    assert bisect(program, recipe=[Mine()], check=check) is None
    assert bisect(program) is None


def test_bisect_names_a_pass_that_breaks_the_ir(captured):
    @dataclass(frozen=True)
    class Break(Mine):
        """Lose a value."""

        name = "break"

        def run(self, program: Program) -> PassResult:
            del program.nodes[0].meta["val"]
            return PassResult(touched=True)

    found = bisect(captured(nn.Linear(4, 3), torch.randn(2, 4)), recipe=[Mine(), Break(), Mine()])
    assert (found.index, found.name) == (1, "break") and "meta['val'] is missing" in found.problem


def test_bisect_needs_something_to_go_by(captured):
    program = captured(nn.Linear(4, 3), torch.randn(2, 4))
    with pytest.raises(InputError, match="the check fails before any pass: bad"):
        bisect(program, recipe=[Mine()], check=lambda p: "bad")
    program.example = None
    with pytest.raises(InputError, match="nothing to compare"):
        bisect(program, recipe=[Mine()])


@pytest.mark.parametrize("inputs", [torch.ones(2, 4), (torch.ones(2, 4),), {"input": torch.ones(2, 4)}])
def test_bisect_takes_a_model_and_inputs_as_optimize_does(inputs):
    model = nn.Linear(4, 3).eval()
    assert bisect(model, inputs) is None
    assert bisect(model, inputs, ["default", Spoil()]).name == "spoil"
    with pytest.raises(InputError, match="example_inputs are missing"):
        bisect(model)


# -- whole models ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(16),
            nn.ModuleList(nn.Linear(16, 16) for _ in range(3)),
            nn.Linear(16, 16),
        )
        self.up, self.down, self.drop = nn.Linear(16, 32), nn.Linear(32, 16), nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = (f(self.norm(x)).unflatten(-1, (2, 8)).transpose(1, 2) for f in self.qkv)
        y = self.drop(torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1)) @ v
        x = x + self.drop(self.out(y.transpose(1, 2).flatten(2)))
        y = self.up(self.norm(x))
        return x + self.down(0.5 * y * (1 + torch.erf(y / 2**0.5)))


def test_a_transformer_block_comes_down_to_seven_ops(captured, ops):
    after, _ = Pipeline(DEFAULT, strict=True).run(captured(Block(), torch.randn(2, 5, 16)))
    kept = [o for o in ops(after) if o not in VIEWS]
    assert kept == ["layer_norm", "linear", "attention", "linear", "layer_norm", "linear", "linear"]


def test_a_block_with_sizes_that_vary(captured):
    program = captured(Block(), torch.randn(2, 5, 16), dynamic={"x": {0: "batch", 1: "length"}})
    after, _ = Pipeline(DEFAULT, strict=True).run(program)
    for shape in ((2, 5, 16), (3, 9, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(after(x)[0], program(x)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype, captured, monkeypatch):
    monkeypatch.setattr(widen, "has_fast_bf16", lambda: True)
    program = captured(Block().to(dtype), torch.randn(2, 5, 16, dtype=dtype))
    after, records = Pipeline(DEFAULT).run(program)
    assert {n.meta["val"].dtype for n in after.nodes if isinstance(n.meta["val"], torch.Tensor)} == {dtype}
    assert not [r.undone for r in records if r.undone and dtype == torch.float64]


def test_the_pipeline_settles(captured):
    """Run again, it finds nothing more to do."""
    after, _ = Pipeline(DEFAULT, strict=True).run(captured(Block(), torch.randn(2, 5, 16)))
    again, records = Pipeline(DEFAULT, strict=True).run(after)
    assert {r.name: r.result.changes for r in records if r.result.changes} == {}
    assert again.text() == after.text()


MODELS = {
    "bert": (lambda t: t.BertModel(t.BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)), "ids"),
    "t5": (lambda t: t.T5EncoderModel(t.T5Config(vocab_size=99, d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=2)), "ids"),
    "gpt2": (lambda t: t.GPT2Model(t.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, use_cache=False, bos_token_id=0, eos_token_id=0)), "ids"),
    "llama": (lambda t: t.LlamaModel(t.LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, use_cache=False)), "ids"),
    "vit": (lambda t: t.ViTModel(t.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8)), "image"),
    "resnet": (lambda t: t.ResNetModel(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])), "image"),
    "convnext": (lambda t: t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)), "image"),
    "dinov2": (lambda t: t.Dinov2Model(t.Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8)), "image"),
}  # fmt: skip
#: What must be left of each model beside views and lookups: this is what the passes are for.
LEFT = {
    "bert": {"layer_norm", "linear", "attention", "add"},
    "t5": {"rms_norm", "linear", "attention"},
    "gpt2": {"layer_norm", "linear", "attention", "scaled_dot_product_attention", "add"},
    "llama": {"rms_norm", "linear", "attention", "silu", "mul", "add", "cat", "neg", "cos", "sin"},  # one product for gate and up
    "vit": {"layer_norm", "linear", "conv", "attention", "cat", "add"},
    "resnet": {"conv", "max_pool2d", "adaptive_avg_pool2d"},
    "convnext": {"conv", "linear", "layer_norm", "add", "mean"},
    "dinov2": {"layer_norm", "linear", "conv", "attention", "cat", "add", "upsample_bicubic2d"},
}  # fmt: skip
VIEWS = {
    "getitem",
    "permute",
    "reshape",
    "view",
    "split_with_sizes",
    "split",
    "select",
    "slice",
    "unsqueeze",
    "expand",
    "flatten",
    "embedding",
    "contiguous",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_real_architectures(name, captured, ops):
    transformers = pytest.importorskip("transformers")
    make, kind = MODELS[name]
    torch.manual_seed(0)
    model = make(transformers)
    x = torch.randint(0, 99, (2, 16)) if kind == "ids" else torch.randn(2, 3, 32, 32)
    program = captured(model, x)
    after, records = Pipeline(DEFAULT, strict=True).run(program)
    assert set(ops(after)) - VIEWS <= LEFT[name]
    assert all(r.error is None or r.error > 100 for r in records)
    assert set(program.sites()) >= set(after.sites())
