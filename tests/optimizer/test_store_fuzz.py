"""Files that nobody vouches for: whatever stands in them, loading gives the same result or a LoadError."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from graphwright import store
from graphwright.errors import LoadError
from graphwright.ir import Program, Signature, Span
from graphwright.store import Archive, Variant
from graphwright.structure import flatten

aten = torch.ops.aten
UNHURRIED: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "database": None,
    "derandomize": True,
}


def program() -> Program:
    """Small, and with one of everything: a symbolic size, tied data, odd arguments, a scalar function."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    x, graph = torch.randn(4, 3), fx.Graph()
    node = graph.placeholder("x")
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    node.meta["val"] = mode.from_tensor(x, source=ConstantSource("x"), symbolic_context=context)
    graph.output((node,))
    made = Program(fx.GraphModule(nn.Module(), graph), Signature(flatten((x,))[1], flatten((x, x))[1]), mode)
    made.signature.symbols = {str(node.meta["val"].shape[0]): Span(1, 64)}
    weight = made.add_tensor("fc.weight", torch.randn(3, 3), trainable=True)
    turned = made.add_tensor("fc.turned", made.tensor("fc.weight").detach().t())
    with made.graph.inserting_before(made.output):
        node = made.placeholders[0]
        linear = made.call(aten.linear.default, node, weight, sites=["fc"])
        size = made.call(aten.sym_size.int, node, 0, sites=["n"])
        view = made.call(aten.view.default, linear, [size, 3, 1], sites=["view"])
        clamp = made.call(aten.clamp.default, view, -math.inf, 6.0, sites=["clamp"])
        parts = made.call(aten.split.Tensor, turned, 2, sites=["split"])
        first = made.graph.call_function(store.graph.SCALAR_FUNCTIONS["operator.getitem"], (parts, 0))
        first.meta.update(sites=("split",), val=made.infer(first))
    made.output.args = ((clamp, first),)
    made.recompile()
    made.verify()
    return made


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "m.gw"
    store.save(
        path,
        Archive([Variant(program(), {"fc": ["onednn", 1]}, [[[4, 3], "float32"]])], {"recipe": "int8", "x": math.inf}),
    )
    return path


def shown(archive: Archive) -> Any:
    """Everything in an archive, as something that compares."""
    return [
        (
            v.program.text(),
            repr(v.plan),
            repr(v.example),
            v.program.signature,
            {n: t.tolist() for n, t in v.program.tensors().items()},
        )
        for v in archive.variants
    ], repr(archive.meta)


def body_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    return json.loads(header["__metadata__"]["graphwright"].split(" ", 2)[2])


def forge(source: Path, target: Path, body: Any, version: str = "1") -> Path:
    """A file whose checksums are right although ``body`` is not what ``save`` wrote."""
    text = body if isinstance(body, str) else json.dumps(body)
    save_file(
        load_file(source), target, {"graphwright": f"{version} {hashlib.sha256(text.encode()).hexdigest()} {text}"}
    )
    return target


# -- damaged files ---------------------------------------------------------------------------------------------------


@settings(max_examples=150, **UNHURRIED)
@given(data=st.data())
def test_damaged_bytes(good: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    raw = bytearray(good.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "append", "blank", "insert"]))
    at = data.draw(st.integers(0, len(raw) - 1))
    if kind == "flip":
        raw[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        raw = raw[:at]
    elif kind == "append":
        raw += data.draw(st.binary(min_size=1, max_size=50))
    elif kind == "insert":
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        raw[at : at + 64] = bytes(len(raw[at : at + 64]))
    path = tmp_path_factory.getbasetemp() / "damaged.gw"
    path.write_bytes(raw)
    try:
        found = shown(store.load(path))
    except LoadError as error:
        assert len(str(error)) < 2_000
    else:
        assert (
            repr(found[0][0][:3]) == repr(shown(store.load(good))[0][0][:3]) and found[1] == shown(store.load(good))[1]
        )
        assert found[0][0][4] == shown(store.load(good))[0][0][4]


def test_every_header_byte_counts_or_changes_nothing(good: Path, tmp_path: Path) -> None:
    """Each byte of the safetensors index, outside the sealed graph, one at a time."""
    raw = good.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    seal_end = raw.rindex(b'"}', 0, 8 + length - 200 if length > 400 else 8 + length)
    wanted = repr(shown(store.load(good)))
    for at in [*range(12), *range(max(12, 8 + length - 250), min(8 + length, len(raw)))]:
        path = tmp_path / "m.gw"
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        try:
            assert repr(shown(store.load(path))) == wanted
        except LoadError:
            pass
    assert seal_end > 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        b"PK\x03\x04" + bytes(100),
        bytes(4096),
        b"\xff" * 4096,
        b"\x80\x02}q\x00.",
        struct.pack("<Q", 2**62) + b'{"a":1}',
        struct.pack("<Q", 20) + b'{"a":',
    ],
)
def test_foreign_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gw"
    path.write_bytes(content)
    with pytest.raises(LoadError, match="m.gw"):
        store.load(path)


def test_other_formats(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("../../escape", "x")
    for name in ("a.pt", "a.safetensors", "a.zip"):
        with pytest.raises(LoadError, match="not a Graphwright file"):
            store.load(tmp_path / name)


# -- well-formed files that lie --------------------------------------------------------------------------------------

BAD = [
    None,
    True,
    0,
    1,
    -1,
    2**70,
    1e300,
    "",
    "x",
    "__class__",
    "\n",
    [],
    {},
    [[]],
    {"node": "x"},
    {"node": "later"},
    ["sym", "s1"],
    ["Pow", 9, 99999],
    {"float": "nan"},
    {"dtype": "float32"},
    {"tuple": [1]},
    2**62,
    "cuda:7",
    ["sym"],
    {"$float": "inf"},
]


def paths_in(value: Any, here: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for k, v in items for p in [(*here, k), *paths_in(v, (*here, k))]]


def changed(body: Any, path: tuple, change: Callable[[Any, Any], None]) -> Any:
    copy = json.loads(json.dumps(body))
    owner = copy
    for step in path[:-1]:
        owner = owner[step]
    change(owner, path[-1])
    return copy


@settings(max_examples=120, **UNHURRIED)
@given(data=st.data())
def test_any_entry_replaced(good: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    body = body_of(good)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(paths_in(body)))
        kind = data.draw(st.sampled_from(["set", "set", "drop", "swap"]))
        if kind == "drop":
            body = changed(body, path, lambda o, k: o.pop(k))
        elif kind == "set":
            value = data.draw(st.sampled_from(BAD))
            body = changed(body, path, lambda o, k, v=value: o.__setitem__(k, v))
        else:
            other = data.draw(st.sampled_from(paths_in(body)))
            value = body
            for step in other:
                value = value[step]
            body = changed(body, path, lambda o, k, v=value: o.__setitem__(k, v))
    forged = forge(good, tmp_path_factory.getbasetemp() / "forged.gw", body)
    try:
        archive = store.load(forged)
    except LoadError as error:
        assert len(str(error)) < 2_000
    else:
        for variant in archive.variants:
            variant.program.text()


def call(name: str, target: str, args: list[Any], value: Any, kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "op": "call",
        "target": target,
        "args": args,
        "kwargs": kwargs or {},
        "value": value,
        "sites": [],
        "trace": None,
    }


F32 = {"dtype": "float32", "shape": [4], "stride": [1], "device": "cpu"}
HUGE = {"dtype": "float32", "shape": [2**40], "stride": [1], "device": "cpu"}
LIES = {
    "unknown op": (call("n", "aten.no_such_op", [], F32), "no op 'aten.no_such_op'"),
    "python import": (call("n", "os.system", ["true"], 0), "no op 'os.system'"),
    "attribute walk": (call("n", "aten.__class__.__base__", [], 0), "no op"),
    "reads files": (call("n", "aten.from_file", ["/etc/passwd", None, 4, None, None, None, None], F32), "refused"),
    "pickles": (call("n", "aten.save", [1, "/tmp/x"], None), "refused"),
    "writes in place": (call("n", "aten.relu_", [{"node": "x"}], F32), "writes into its arguments"),
    "list bomb": (call("n", "operator.mul", [[0], 2**60], 0), "takes numbers"),
    "power bomb": (call("n", "operator.pow", [9, 10**12], 0), "power"),
    "number grows": (call("n", "operator.mul", [2**62, 2**62], 0), "out of range"),
    "split bomb": (
        call("n", "aten.split.Tensor", [{"node": "big"}, 1, 0], {"list": [F32]}),
        "another number of tensors",
    ),
    "unbind bomb": (call("n", "aten.unbind.int", [{"node": "big"}, 0], {"list": []}), "another number of tensors"),
    "chunk bomb": (call("n", "aten.chunk", [{"node": "big"}, 2**40, 0], {"list": []}), "another number of tensors"),
    "wrong shape": (call("n", "aten.relu", [{"node": "big"}], F32), "another shape"),
    "missing argument": (call("n", "aten.relu", [], F32), "does not fit|missing"),
    "unknown keyword": (
        call("n", "aten.relu", [{"node": "big"}], HUGE, {"__import__('os')": 1}),
        "does not fit|unknown",
    ),
    "code in a name": ({**call("n", "aten.relu", [{"node": "big"}], HUGE), "name": "a;import os"}, "unusable name"),
    "keyword as name": ({**call("n", "aten.relu", [{"node": "big"}], HUGE), "name": "lambda"}, "unusable name"),
    "name twice": ({**call("n", "aten.relu", [{"node": "big"}], HUGE), "name": "x"}, "unusable name"),
    "reads itself": (call("n", "aten.relu", [{"node": "n"}], HUGE), "does not stand before"),
    "attribute of a module": ({"name": "n", "op": "tensor", "tensor": "__class__"}, "not in the file"),
}


@pytest.mark.parametrize("case", LIES)
def test_lies_in_the_graph(good: Path, tmp_path: Path, case: str) -> None:
    entry, message = LIES[case]
    body = body_of(good)
    nodes = body["variants"][0]["program"]["nodes"]
    nodes.append(call("big", "aten.zeros", [[2**40]], HUGE, dict.fromkeys(["dtype", "layout", "device", "pin_memory"])))
    store.load(forge(good, tmp_path / "big.gw", body))  # 4 TiB that nothing allocates
    nodes.append(entry)
    with pytest.raises(LoadError, match=message):
        store.load(forge(good, tmp_path / "m.gw", body))


def test_lies_about_tensors(good: Path, tmp_path: Path) -> None:
    body = body_of(good)
    at = body["variants"][0]["program"]["tensors"]["fc.weight"]["at"]
    for key, value in [
        ("shape", [3, 4]),
        ("shape", [2**40, 2**40]),
        ("stride", [3, 2]),
        ("offset", 4),
        ("offset", 2),
        ("offset", -4),
        ("stride", [-3, 1]),
        ("run", "../../etc/passwd"),
        ("dtype", "float64"),
        ("device", "cuda"),
        ("device", "meta"),
        ("shape", [0, 3]),
        ("shape", [1] * 100),
    ]:
        kept, at[key] = at[key], value
        with pytest.raises(LoadError, match="fc.weight"):
            store.load(forge(good, tmp_path / "m.gw", body))
        at[key] = kept
    store.load(forge(good, tmp_path / "m.gw", body))


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        '{"meta": NaN}',
        "[" * 100_000,
        '{"meta":{},"variants":[],"runs":{},"more":1}',
        "{}",
        "",
        '{"meta":{"k":' + "9" * 5000 + '},"variants":[],"runs":{}}',
        '{"meta":{"k":1,"k":2},"variants":[],"runs":{}}',
    ],
    ids=["twice", "nan", "deep", "unknown", "empty", "none", "long", "twice-inside"],
)
def test_json_tricks(good: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(LoadError):
        store.load(forge(good, tmp_path / "m.gw", text))


@pytest.mark.parametrize("version", ["2", "0", "", "1.0", "x" * 10_000])
def test_other_versions(good: Path, tmp_path: Path, version: str) -> None:
    with pytest.raises(LoadError, match="format version"):
        store.load(forge(good, tmp_path / "m.gw", body_of(good), version))


def test_a_changed_weight_is_named(good: Path, tmp_path: Path) -> None:
    raw = bytearray(good.read_bytes())
    raw[-1] ^= 1
    (tmp_path / "m.gw").write_bytes(raw)
    with pytest.raises(LoadError, match="'fc.weight' were altered"):
        store.load(tmp_path / "m.gw")


def test_strides_that_overlap_are_not_believed(good: Path, tmp_path: Path) -> None:
    body = body_of(good)
    entry = next(n for n in body["variants"][0]["program"]["nodes"] if n.get("target") == "aten.clamp")
    entry["value"]["stride"] = [0, 0, 0]
    (variant,) = store.load(forge(good, tmp_path / "m.gw", body)).variants
    node = next(n for n in variant.program.nodes if n.name == entry["name"])
    assert node.meta["val"].stride() == (3, 1, 1)


def test_sizes_of_every_node_are_checked_without_memory(good: Path, tmp_path: Path) -> None:
    """Whatever size the file claims for a node, it is refused unless the op gives it."""
    body = body_of(good)
    for entry in body["variants"][0]["program"]["nodes"]:
        if entry["op"] != "call" or "shape" not in entry["value"]:
            continue
        kept = entry["value"]["shape"]
        for wrong in ([*kept, 1], kept[:-1], [7, *kept[1:]], [2**40, *kept[1:]], [["sym", "u0"], *kept[1:]]):
            entry["value"]["shape"] = wrong
            with pytest.raises(LoadError):
                store.load(forge(good, tmp_path / "m.gw", body))
        entry["value"]["shape"] = kept
    store.load(forge(good, tmp_path / "m.gw", body))
