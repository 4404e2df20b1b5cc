"""A program's Python: it reads well, and run it gives the program's own bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import graphwright as gw
from graphwright.capture import capture
from graphwright.ir import Mutation, Program, Signature, op_name
from graphwright.source import _Writer

aten = torch.ops.aten


def captured(model: nn.Module, *inputs: Any, **options: Any) -> Program:
    found = capture(model.eval(), inputs, **options).program
    assert found is not None
    return found


def executed(program: Program) -> Any:
    names: dict[str, Any] = {}
    exec(program.code(), names)  # noqa: S102  what is tested
    return names["forward"]


def assert_same_bits(program: Program, *leaves: torch.Tensor) -> None:
    forward = executed(program)
    with torch.no_grad(), program.preserved(leaves):
        torch.manual_seed(0)
        wanted = [t.clone() for t in program(*leaves)]
        written = {m.buffer: program.tensor(m.buffer).clone() for m in program.signature.mutations if m.buffer}
    with torch.no_grad(), program.preserved(leaves):
        torch.manual_seed(0)
        got = forward(program.tensors(), *leaves)
        for name, value in written.items():
            assert torch.equal(program.tensor(name), value)
        assert isinstance(got, tuple) and len(got) == len(wanted)
        for w, g in zip(wanted, got, strict=True):
            assert w.dtype == g.dtype and w.shape == g.shape and torch.equal(w.nan_to_num(), g.nan_to_num())
            assert not w.is_floating_point() or torch.equal(w.isnan(), g.isnan())


def test_the_text_of_a_small_model():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    assert str(captured(model, torch.randn(2, 4))) == (
        "# 2 ops, 2 tensors of 6e-05 MB\n"
        "import torch\n"
        "\n"
        "aten = torch.ops.aten\n"
        "\n"
        "\n"
        "def forward(\n"
        "    tensors,\n"
        "    input_1,  # f32[2, 4]\n"
        "):\n"
        "    _0_weight = tensors['0.weight']  # f32[3, 4]\n"
        "    _0_bias = tensors['0.bias']  # f32[3]\n"
        "    linear_default = aten.linear.default(input_1, _0_weight, _0_bias)  # f32[2, 3]  0\n"
        "    relu_default = aten.relu.default(linear_default)  # f32[2, 3]  1\n"
        "    return (relu_default,)  # the model's own: tensor\n"
    )


class Odd(nn.Module):
    """Several outputs, nested ones, infinities, dtypes, slices, memory formats, an op with several results, none of it in f32 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.randn(3, 4, 5, 5))

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> dict[str, Any]:
        self.count += 1
        y = x.masked_fill(mask, -math.inf)[:, 1::2].to(torch.float64).contiguous(memory_format=torch.channels_last)
        values, places = y.flatten(1).topk(3)
        left, right = x.chunk(2, dim=1)
        return {"top": (values, [places]), "sum": left.to(torch.bfloat16) + right.to(torch.bfloat16), "again": self.table + x.clamp(max=math.inf),
                "made": torch.full((2,), math.nan) + self.count, "empty": None, "const": 3}  # fmt: skip


def test_odd_values_and_mutations():
    x = torch.randn(3, 4, 5, 5)
    program = capture(Odd().eval(), (x,), {"mask": x > 0}).program
    assert program is not None
    assert "tensors['count'].copy_(" in program.code() and 'float("-inf")' in program.code() and "[1]  # " in program.code()
    assert_same_bits(program, x, x > 0)


class Keywords(nn.Module):
    def forward(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        return given["class"] + given["lambda"] * given["print"]


def test_inputs_named_like_keywords():
    named = {name: torch.randn(2, 3) for name in ("class", "lambda", "print")}
    program = capture(Keywords().eval(), (named,)).program
    assert program is not None
    assert_same_bits(program, *named.values())


def _bare(names: list[str]) -> Program:
    """A chain of adds whose nodes bear these names."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(2)
    for name in names:
        x = graph.call_function(aten.add.Tensor, (x, 1), {"alpha": 1})
        x.name, x.meta = name, {"val": torch.zeros(2), "sites": (f"at {name}",)}
    graph.output((x,))
    return Program(fx.GraphModule(nn.Module(), graph), Signature(), None)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=12), st.sampled_from(["class", "torch", "tensors", "aten", "x", "é", "ﬁ", "fi", "v", "v_2", "None", "forward", "0"])), max_size=6))
def test_no_name_breaks_the_text(names):
    program = _bare(names)
    (got,) = executed(program)({}, torch.zeros(2))
    assert torch.equal(got, torch.full((2,), float(len(names))))


def test_a_site_cannot_end_its_comment():
    program = _bare(["a"])
    for end in "\n\r\x0b\x0c\x00\x1c\x85\u2028":
        program.nodes[0].meta["sites"] = (f"a{end}    raise SystemExit",)
        executed(program)({}, torch.zeros(2))


PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(),
              st.sampled_from([torch.float16, torch.bool, torch.device("cpu"), torch.device("cuda:1"), torch.strided, torch.channels_last, ..., slice(None, 3, None)])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.tuples(inner), st.tuples(inner, inner)), max_leaves=8,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(PLAIN)
def test_every_value_is_spelled_so_that_python_reads_it_back(value):
    assert repr(eval(_Writer(_bare([]))._value(value), {"torch": torch})) == repr(value)


def test_what_has_no_spelling_is_refused():
    with pytest.raises(gw.UnsupportedError, match="Generator has no spelling in Python"):
        _Writer(_bare([]))._value(torch.Generator())


def test_defaults_are_left_out_where_they_say_nothing():
    text = _bare(["a"]).code()
    assert "aten.add.Tensor(x, 1)  #" in text
    program = _bare(["a"])
    program.nodes[0].kwargs = {"alpha": 1.0}  # a float is no int: the op may promote
    assert "alpha=1.0" in program.code()


def test_a_buffer_that_is_only_written():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(2)
    graph.output((x, x))
    root = nn.Module()
    root.register_buffer("held", torch.zeros(2))
    program = Program(fx.GraphModule(root, graph), Signature(mutations=(Mutation(buffer="held"),)), None)
    program.graph_module.register_buffer("held", torch.zeros(2))
    assert_same_bits(program, torch.ones(2))


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.nn.functional.silu(self.norm(self.conv(x)))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), Block(8), Block(8), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), nn.Softmax(-1)).eval()


@pytest.mark.parametrize("recipe", ["default", "int8", "w8"])
def test_optimized_programs(recipe, tmp_path):
    x = torch.randn(2, 3, 17, 17)
    fast = gw.optimize(cnn(), x, recipe, calibration=[x] if recipe == "int8" else None, goal=gw.Goal(size_mb=1000))
    assert_same_bits(fast.program, x)
    fast.save(tmp_path / "m.gw")
    again = gw.load(tmp_path / "m.gw").program
    assert again.code() == fast.program.code()
    assert_same_bits(again, x)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def bert(transformers: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=32)
    return transformers.BertModel(config).eval()


def gpt2(transformers: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=1)).eval()


def test_bert_with_open_sizes(transformers):
    ids, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    fast = gw.optimize(bert(transformers), {"input_ids": ids, "attention_mask": mask}, "int8-dynamic", dynamic="auto")
    program = fast.program
    assert program.signature.symbols and all(f"<= {name}" in program.code() for name in program.signature.symbols)
    for batch, length in ((2, 9), (3, 4), (1, 17)):
        ids = torch.randint(0, 50, (batch, length))
        assert_same_bits(program, *_in_order(program, input_ids=ids, attention_mask=torch.ones_like(ids)))


def _in_order(program: Program, **named: torch.Tensor) -> list[torch.Tensor]:
    return [named[n.name] for n in program.placeholders]


def test_gpt2_gives_its_nested_cache(transformers):
    model, ids = gpt2(transformers), torch.randint(0, 50, (2, 7))
    program = captured(model, ids)
    assert "past_key_values=" in program.code()
    assert_same_bits(program, ids)
    assert_same_bits(captured(gpt2(transformers), ids, dynamic="auto"), ids[:, :5])


def test_the_text_grows_with_the_program():
    lines = [len(_bare([f"n{k}" for k in range(count)]).code().splitlines()) for count in (100, 200, 300)]
    assert lines[1] - lines[0] == lines[2] - lines[1] == 100


def test_every_op_of_the_table_has_a_spelling():
    from graphwright import ops

    writer = _Writer(_bare([]))
    for row in ops.rows():
        spaces = {row.overload.namespace: getattr(torch.ops, row.overload.namespace)}
        assert eval(writer._function(row.overload), spaces) is row.overload, op_name(row.overload)
