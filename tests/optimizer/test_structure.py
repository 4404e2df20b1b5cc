"""Structures: taken apart and put together again, as data, with the user's types or without them."""

import collections
import dataclasses
import enum
import json
import subprocess
import sys
import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.errors import InputError, LoadError
from graphwright.output import CacheOutput, NamedOutput, Output
from graphwright.structure import Spec, flatten, flatten_call


class Pair(typing.NamedTuple):
    left: torch.Tensor
    right: typing.Any


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    loss: torch.Tensor | None = None
    extra: typing.Any = dataclasses.field(default=None, init=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: torch.Tensor

    def __post_init__(self):
        raise AssertionError("rebuilding runs no code of the user's")


class Mode(enum.Enum):
    SUM = "sum"


def t(*shape):
    return torch.randn(*shape)


def same(a, b):
    """Equality of nested values by type and content; tensors by identity."""
    assert type(a) is type(b), (a, b)
    if isinstance(a, torch.Tensor):
        assert a is b
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for k in a:
            same(a[k], b[k])
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif dataclasses.is_dataclass(a):
        for f in dataclasses.fields(a):
            same(getattr(a, f.name), getattr(b, f.name))
    else:
        assert a == b


leaf = st.sampled_from([None, True, 1, 1.5, float("inf"), "x", torch.float16, torch.device("cpu"), Mode.SUM]) | st.builds(
    lambda n: torch.zeros(n), st.integers(0, 3)
)
key = st.text(max_size=3) | st.integers(-2, 2) | st.booleans()
value = st.recursive(
    leaf,
    lambda inner: st.lists(inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    | st.builds(Pair, inner, inner)
    | st.builds(Answer, inner, inner),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(value)
def test_round_trip(nested):
    leaves, spec = flatten(nested)
    assert all(isinstance(x, torch.Tensor) for x in leaves) and spec.count == len(leaves)
    same(spec.unflatten(leaves), nested)
    again = Spec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec and hash(again) == hash(spec)
    same(again.unflatten(leaves), nested)
    assert len(spec.paths()) == len(leaves) and isinstance(spec.describe(), str)


def test_paths_read_like_python():
    _, spec = flatten((t(1), {"past": [Pair(t(1), None), Pair(t(2), (t(3),))], 3: Answer(t(1))}))
    assert spec.paths() == ["[0]", "[1]['past'][0].left", "[1]['past'][1].left", "[1]['past'][1].right[0]",
                            "[1][3].logits"]  # fmt: skip


def test_constants_differ_by_type():
    specs = {flatten((v,))[1] for v in (True, 1, 1.0, "1", None)}
    assert len(specs) == 5


def test_describe():
    _, spec = flatten({"x": t(1), "more": (t(1), None, 3)})
    assert spec.describe() == "{'x': tensor, 'more': (tensor, None, 3)}"
    assert flatten((t(1),))[1].describe() == "(tensor,)"
    assert flatten(Pair(t(1), None))[1].describe() == "Pair(left=tensor, right=None)"


def test_order_of_keywords_does_not_matter():
    a, b = t(1), t(2)
    one, two = flatten_call((), {"a": a, "b": b}), flatten_call((), {"b": b, "a": a})
    assert one[1] == two[1] and all(x is y for x, y in zip(one[0], two[0], strict=True))


def test_containers_of_the_standard_library():
    ordered = collections.OrderedDict(z=t(1), a=t(2))
    leaves, spec = flatten(ordered)
    same(spec.unflatten(leaves), ordered)
    user = collections.UserDict(a=t(1))
    leaves, spec = flatten(user)
    built = spec.unflatten(leaves)
    assert type(built) is collections.UserDict and built["a"] is user["a"]
    size = torch.Size([2, 3])
    assert flatten(size)[1].unflatten([]) == size


def test_torch_return_types():
    found = torch.max(t(3, 4), dim=1)
    leaves, spec = flatten(found)
    again = spec.unflatten(leaves)
    assert type(again) is type(found) and again.values is leaves[0] and again.indices is leaves[1]


def test_frozen_slotted_dataclass_without_running_its_code():
    made = object.__new__(Frozen)
    object.__setattr__(made, "x", t(1))
    leaves, spec = flatten(made)
    assert spec.unflatten(leaves).x is made.x


@pytest.mark.parametrize("bad", [object(), {1, 2}, b"bytes", lambda: None])
def test_unknown_leaf_names_its_path(bad):
    with pytest.raises(InputError, match=r"argument 0\['deep'\]\[1\].*" + type(bad).__name__):
        flatten_call(({"deep": [t(1), bad]},), {})


def test_wrong_number_of_leaves():
    _, spec = flatten((t(1), t(1)))
    with pytest.raises(InputError, match="1 tensors given for a structure of 2"):
        spec.unflatten([t(1)])


def test_without_the_users_type_an_output_takes_its_place():
    leaves, spec = flatten(Answer(t(2), None))
    data = json.loads(json.dumps(spec.to_json()).replace(f"{__name__}:Answer", "not_loaded_here:Answer"))
    built = Spec.from_json(data).unflatten(leaves)
    assert type(built) is Output
    assert built.logits is built["logits"] is built[0] and built.loss is None
    assert list(built) == ["logits"] and built.to_tuple() == (built.logits,) and "Answer(" in repr(built)
    with pytest.raises(AttributeError, match="no field 'nothing'"):
        built.nothing  # noqa: B018
    leaves, spec = flatten(Pair(t(1), 3))
    data = json.loads(json.dumps(spec.to_json()).replace(f"{__name__}:Pair", "gone:Pair"))
    left, right = built = Spec.from_json(data).unflatten(leaves)
    assert type(built) is NamedOutput and built.left is left and built.right == right == 3
    assert flatten(built)[1].keys == ("left", "right")


def test_a_file_cannot_name_other_types():
    """A type that is loaded but of another kind is never instantiated, and nothing is imported."""
    leaves = [t(1)]
    for name in ("subprocess:Popen", "torch.nn:Linear", "builtins:dict", "antigravity:x", "json:JSONDecoder"):
        data = {"kind": "dataclass", "type": name, "keys": ["args"], "children": [{"kind": "tensor"}]}
        assert type(Spec.from_json(data).unflatten(leaves)) is Output
        assert isinstance(Spec.from_json({**data, "kind": "namedtuple"}).unflatten(leaves), (NamedOutput, tuple))
        cache = {"kind": "cache", "type": name, "children": [
            {"kind": "cache-layer", "type": name, "keys": ["keys", "values"], "children": [{"kind": "tensor"}] * 2}]}
        assert isinstance(Spec.from_json(cache).unflatten([t(1), t(1)]), CacheOutput)
    assert "antigravity" not in sys.modules


BAD = [
    3, {"kind": "object"}, {"kind": "const", "type": "eval", "value": "1"}, {"kind": "const", "type": "int", "value": "1"},
    {"kind": "dataclass", "keys": ["__class__"], "children": [{"kind": "tensor"}]},
    {"kind": "dict", "keys": ["a"], "children": []}, {"kind": "tuple", "children": {"kind": "tensor"}},
    {"kind": "const", "type": "dtype", "value": "load"}, {"kind": "namedtuple", "keys": ["a b"], "children": [{"kind": "none"}]},
    {"kind": "cache-layer", "keys": ["keys"], "children": [{"kind": "tensor"}]}, {"kind": "tuple", "type": 3},
    {"kind": "dict", "keys": [["list", 1]], "children": [{"kind": "none"}]},
]  # fmt: skip


@pytest.mark.parametrize("data", BAD, ids=range(len(BAD)))
def test_malformed_data_are_refused(data):
    with pytest.raises(LoadError):
        Spec.from_json(data)


def test_too_deep_is_refused():
    data = {"kind": "none"}
    for _ in range(500):
        data = {"kind": "tuple", "children": [data]}
    with pytest.raises(LoadError):
        Spec.from_json(data)


def cache_of(layers, window=None):
    cache_utils = pytest.importorskip("transformers.cache_utils")
    cache = cache_utils.DynamicCache()
    for k in range(layers):
        if window is not None:
            cache.layers.append(cache_utils.DynamicSlidingWindowLayer(sliding_window=window))
        cache.update(t(2, 3, 5, 4), t(2, 3, 5, 4), k)
    return cache


def test_cache_is_its_keys_and_values():
    cache = cache_of(2)
    leaves, spec = flatten({"past": cache})
    assert spec.paths() == [f"['past'][{k}].{n}" for k in (0, 1) for n in ("keys", "values")]
    built = Spec.from_json(json.loads(json.dumps(spec.to_json()))).unflatten(leaves)["past"]
    assert type(built) is type(cache) and built.get_seq_length() == 5 and built.layers[1].values is leaves[3]
    built.update(t(2, 3, 1, 4), t(2, 3, 1, 4), 0)
    assert built.get_seq_length() == 6
    built.update(t(2, 3, 1, 4), t(2, 3, 1, 4), 2)  # a layer that was not there yet
    assert cache.get_seq_length() == 5 and len(cache.layers) == 2


def test_empty_cache():
    leaves, spec = flatten(cache_of(0))
    assert leaves == [] and spec.unflatten([]).get_seq_length() == 0


def test_sliding_window_cache():
    cache = cache_of(1, window=4)  # 5 tokens seen, 3 kept
    leaves, spec = flatten(cache)
    built = spec.unflatten(leaves)
    assert built.layers[0].sliding_window == 4 and built.get_seq_length() == 5 and built.layers[0].keys.shape[-2] == 3


def test_structures_without_transformers():
    """In a process that never loaded transformers, a model output and its cache come back as ``Output``."""
    outputs = pytest.importorskip("transformers.modeling_outputs")
    made = outputs.CausalLMOutputWithPast(logits=t(2, 2), past_key_values=cache_of(2))
    leaves, spec = flatten(made)
    same_type = spec.unflatten(leaves)
    assert type(same_type) is type(made) and same_type[0] is made.logits and same_type["logits"] is made.logits
    assert same_type.loss is None and list(same_type.keys()) == ["logits", "past_key_values"]
    script = f"""
import json, sys, torch
from graphwright.structure import Spec, flatten
spec = Spec.from_json(json.loads({json.dumps(spec.to_json())!r}))
leaves = [torch.zeros(2, 2), *(torch.zeros(2, 3, 5, 4) for _ in range(4))]
out = spec.unflatten(leaves)
assert out.logits is leaves[0] and out[0] is leaves[0] and out["logits"] is leaves[0] and out.loss is None
assert out.past_key_values.get_seq_length() == 5 and out.past_key_values.layers[1].values is leaves[4]
again, same = flatten(out)
assert same == spec and all(a is b for a, b in zip(again, leaves, strict=True))  # fed back, it is what it was
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_calls_with_tensors_alone_share_one_structure():
    x, y = torch.zeros(2), torch.ones(3)
    leaves, spec = flatten_call((x,), {"b": y, "a": x})
    assert [id(t) for t in leaves] == [id(x), id(x), id(y)]
    assert flatten_call((y,), {"a": y, "b": x})[1] is spec
    assert spec == Spec.from_json(spec.to_json()) and spec != flatten_call((x,), {"b": y})[1]
    args, kwargs = spec.unflatten(leaves)
    assert args == (x,) and kwargs["a"] is x and kwargs["b"] is y
