"""Saving and loading: everything survives bit for bit, nothing is written half, and no odd tensor is lost."""

from __future__ import annotations

import math
import operator
import os
import resource
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from graphwright import store
from graphwright.errors import LoadError, SaveError
from graphwright.ir import Mutation, Program, Signature, Span
from graphwright.outline import Outline
from graphwright.store import Archive, Variant, verified
from graphwright.store.infer import Rehearsal
from graphwright.structure import flatten

aten = torch.ops.aten


def start(*examples: Tensor, dynamic: bool = False) -> Program:
    """A program that gives its inputs back; ``dynamic``: the first axis of each is symbolic."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    graph = fx.Graph()
    placeholders = []
    for k, example in enumerate(examples):
        node = graph.placeholder(f"x{k}")
        kinds = [DimDynamic.DYNAMIC if dynamic and d == 0 else DimDynamic.STATIC for d in range(example.dim())]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        node.meta["val"] = mode.from_tensor(example, source=ConstantSource(f"x{k}"), symbolic_context=context)
        placeholders.append(node)
    graph.output(tuple(placeholders))
    return Program(fx.GraphModule(nn.Module(), graph), Signature(inputs=flatten(examples)[1]), mode)


def finish(program: Program, *results: fx.Node) -> Program:
    program.output.args = (results,)
    program.recompile()
    program.verify()
    return program


def dynamic_program() -> Program:
    """A linear over a symbolic batch, with arithmetic on the size, a data-dependent shape and every odd argument."""
    x = torch.randn(6, 8)
    program = start(x, dynamic=True)
    weight = program.add_tensor("enc.layers-0.weight", torch.randn(4, 8), origin=("w",), trainable=True)
    bias = program.add_tensor("enc.layers-0.bias", torch.randn(4))
    with program.graph.inserting_before(program.output):
        node = program.placeholders[0]
        linear = program.call(aten.linear.default, node, weight, bias, sites=["enc.0", "enc.0#2"])
        linear.meta["trace"] = "model.py:12"
        size = program.call(aten.sym_size.int, node, 0, sites=["size"])
        double = program.graph.call_function(operator.mul, (size, 2))
        double.meta.update(sites=("double",), val=program.infer(double))
        view = program.call(aten.view.default, linear, [double, 2], sites=["view"])
        clamp = program.call(aten.clamp.default, view, -math.inf, 1.0, sites=["clamp"])
        half = program.call(aten.to.dtype, clamp, torch.float16, memory_format=torch.preserve_format, sites=["half"])
        ones = program.call(aten.ones.default, [2], device=torch.device("cpu"), dtype=torch.bool, sites=["ones"])
        split = program.call(aten.split.Tensor, weight, 2, sites=["split"])
        first = program.graph.call_function(operator.getitem, (split, 0))
        first.meta.update(sites=("split",), val=program.infer(first))
        where = program.call(aten.nonzero.default, clamp, sites=["nonzero"])
    (symbol,) = {str(s) for s in [node.meta["val"].shape[0]]}
    program.signature.symbols = {symbol: Span(1, 64, 2)}
    program.signature.outputs = flatten({"a": x, "b": (x, x), "c": x, "d": None, "e": x})[1]
    return finish(program, view, half, ones, first, where)


def round_trip(tmp_path: Path, program: Program) -> Program:
    store.save(tmp_path / "m.gw", Archive([Variant(program)]))
    return store.load(tmp_path / "m.gw").variants[0].program


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [t.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.stride() == b.stride() and a.shape == b.shape and torch.equal(*raw)


def test_a_program_survives(tmp_path: Path) -> None:
    program = dynamic_program()
    loaded = round_trip(tmp_path, program)
    loaded.verify()
    assert loaded.text() == program.text()
    assert loaded.signature.symbols == program.signature.symbols
    assert (loaded.signature.inputs, loaded.signature.outputs) == (program.signature.inputs, program.signature.outputs)
    assert loaded.provenance == {"enc.layers-0.weight": ("w",)}
    assert list(loaded.sites()) == list(program.sites())
    assert [n.meta.get("trace") for n in loaded.nodes] == [n.meta.get("trace") for n in program.nodes]
    assert isinstance(loaded.tensor("enc.layers-0.weight"), nn.Parameter)
    assert not isinstance(loaded.tensor("enc.layers-0.bias"), nn.Parameter)
    x = torch.randn(10, 8)
    for a, b in zip(loaded(x), program(x), strict=True):
        assert same_bits(a, b)


def test_sizes_are_symbolic_after_loading(tmp_path: Path) -> None:
    loaded = round_trip(tmp_path, dynamic_program())
    size = loaded.placeholders[0].meta["val"].shape[0]
    assert isinstance(size, torch.SymInt) and size.node.hint == 6
    env = loaded.fake_mode.shape_env
    assert env.evaluate_expr(size.node.expr % 2) == 0  # the multiple is known, not measured
    bounds = env.var_to_range[size.node.expr]
    assert int(bounds.lower) == 2


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
]


def test_a_thread_that_outlives_the_program_loads(tmp_path: Path) -> None:
    store.save(tmp_path / "a.gw", Archive([Variant(quantized_program())]))
    code = (
        "import threading, time; from graphwright import store\n"
        f"def late(): time.sleep(1.0); print(len(store.load({str(tmp_path / 'a.gw')!r}).variants))\n"
        "threading.Thread(target=late).start()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "1", done.stderr


def test_every_dtype_and_shape(tmp_path: Path) -> None:
    tensors = {}
    for dtype in DTYPES:
        for shape in [(), (0,), (3, 0, 2), (1,), (3, 5)]:
            raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
            tensors[f"{dtype}_{len(tensors)}".replace(".", "_")] = raw.view(dtype).reshape(shape)
    program = start(torch.zeros(1))
    loaded = round_trip(tmp_path, finish(program, *(program.add_tensor(n, t) for n, t in tensors.items())))
    for name, tensor in tensors.items():
        assert same_bits(loaded.tensor(name), tensor), name


def test_views_strides_and_sharing(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {
        "whole": base,
        "row": base[1],
        "transposed": base.t(),
        "strided": base[::2, 1::2],
        "as_int": base.view(torch.int32)[2],
        "expanded": torch.randn(3, 1).expand(3, 1000),
        "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "slice": torch.randn(100_000)[7:12],
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "odd": torch.arange(9, dtype=torch.uint8)[3:],
    }
    program = start(torch.zeros(1))
    program = finish(program, *(program.add_tensor(n, t) for n, t in tensors.items()))
    loaded = round_trip(tmp_path, program)
    for name, tensor in tensors.items():
        assert same_bits(loaded.tensor(name), tensor.resolve_conj()), name
    storages = {n: loaded.tensor(n).untyped_storage().data_ptr() for n in tensors}
    assert len({storages[n] for n in ("whole", "row", "transposed", "strided", "as_int")}) == 1
    assert len(set(storages.values())) == 6
    assert (tmp_path / "m.gw").stat().st_size < 20_000  # a slice does not drag the rest of its storage along


def test_tied_parameters_stay_one_object(tmp_path: Path) -> None:
    program = start(torch.zeros(1))
    shared = nn.Parameter(torch.randn(3))
    for name in ("a", "b"):
        program.graph_module.register_parameter(name, shared)
    frozen = nn.Parameter(torch.randn(3), requires_grad=False)
    program.graph_module.register_parameter("c", frozen)
    loaded = round_trip(tmp_path, finish(program, *(program._get_attr(n) for n in "abc")))
    assert loaded.tensor("a") is loaded.tensor("b")
    assert loaded.tensor("a").requires_grad and not loaded.tensor("c").requires_grad


def test_mutations_and_training_survive(tmp_path: Path) -> None:
    program = start(torch.ones(3))
    state = program.add_tensor("state", torch.zeros(3))
    program.graph_module.register_buffer("log", torch.zeros(3))  # written, never read
    with program.graph.inserting_before(program.output):
        new = program.call(aten.add.Tensor, state, program.placeholders[0], sites=["add"])
    program.signature.mutations = (Mutation(buffer="state"), Mutation(input=0), Mutation(buffer="log"))
    program = finish(program, new, new, new, new).eval()
    loaded = round_trip(tmp_path, program)
    assert loaded.signature.mutations == program.signature.mutations and not loaded.training
    x = torch.ones(3)
    loaded(x)
    loaded(x)
    assert loaded.tensor("state").tolist() == loaded.tensor("log").tolist() == x.tolist() == [2.0] * 3


def test_variants_share_tensors(tmp_path: Path) -> None:
    weight = torch.randn(50, 50)
    programs = []
    for _ in range(2):
        program = start(torch.zeros(1))
        programs.append(finish(program, program.add_tensor("w", weight)))
    meta = {"recipe": "int8", "error": math.inf, "nothing": math.nan, "$odd": {"deep": [1, (2.5, None, True)]}}
    store.save(
        tmp_path / "m.gw", Archive([Variant(p, {"node": k}, [[[1], "float32"]]) for k, p in enumerate(programs)], meta)
    )
    archive = store.load(tmp_path / "m.gw")
    assert [v.plan for v in archive.variants] == [{"node": 0}, {"node": 1}]
    assert archive.variants[1].example == [[[1], "float32"]]
    first, second = (v.program.tensor("w") for v in archive.variants)
    assert first.data_ptr() == second.data_ptr() and torch.equal(first, weight)
    assert archive.meta["$odd"] == {"deep": [1, [2.5, None, True]]}
    assert archive.meta["error"] == math.inf and math.isnan(archive.meta["nothing"])
    assert repr(store.peek(tmp_path / "m.gw")) == repr(archive.meta)


def test_saving_twice_gives_the_same_bytes_and_loading_keeps_them(tmp_path: Path) -> None:
    archive = Archive([Variant(dynamic_program(), {"b": 1, "a": 2})], {"z": 1, "a": 2})
    paths = [tmp_path / n for n in "abc"]
    store.save(paths[0], archive)
    store.save(paths[1], archive)
    store.save(paths[2], store.load(paths[0]))
    assert paths[0].read_bytes() == paths[1].read_bytes() == paths[2].read_bytes()


def test_a_new_process_gives_the_same_bits(tmp_path: Path) -> None:
    program = dynamic_program()
    store.save(tmp_path / "m.gw", Archive([Variant(program)]))
    code = (
        "import sys, torch; from graphwright import store; p = store.load(sys.argv[1]).variants[0].program;"
        "torch.manual_seed(3); torch.save([o.clone() for o in p(torch.randn(4, 8))], sys.argv[2]); print(p.text())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "m.gw", tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == program.text()
    torch.manual_seed(3)
    for a, b in zip(torch.load(tmp_path / "out"), program(torch.randn(4, 8)), strict=True):
        assert same_bits(a, b)


# -- what cannot be saved --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.empty(3, device="meta")], ids=["sparse", "meta"])
def test_odd_tensors_are_refused(tmp_path: Path, tensor: Tensor) -> None:
    program = start(torch.zeros(1))
    program.graph_module.register_buffer("t", tensor)
    node = program.graph.create_node("get_attr", "t")
    program.output.args = ((node,),)
    with pytest.raises(SaveError, match="tensor 't'"):
        store.save(tmp_path / "m.gw", Archive([Variant(program)]))
    assert not list(tmp_path.iterdir())


def test_foreign_ops_are_refused_by_name(tmp_path: Path) -> None:
    name = "graphwright_store_test::twice"
    if not hasattr(torch.ops.graphwright_store_test, "twice"):
        twice = torch.library.custom_op(name, lambda x: x * 2, mutates_args=(), schema="(Tensor x) -> Tensor")
        twice.register_fake(lambda x: x * 2)
    program = start(torch.ones(3))
    with program.graph.inserting_before(program.output):
        node = program.call(
            torch.ops.graphwright_store_test.twice.default, program.placeholders[0], sites=["head.twice"]
        )
    with pytest.raises(SaveError, match=r"head.twice: .*graphwright_store_test.twice.*op table"):
        store.save(tmp_path / "m.gw", Archive([Variant(finish(program, node))]))


@pytest.mark.parametrize(
    "meta", [{"a": object()}, {"a": {1: 2}}, {"a": [torch.ones(1)]}], ids=["object", "key", "tensor"]
)
def test_only_plain_data_is_saved(tmp_path: Path, meta: dict) -> None:
    with pytest.raises(SaveError, match=r"meta\['a'\]"):
        store.save(tmp_path / "m.gw", Archive([], meta))


def test_names_that_would_reach_generated_code_are_refused(tmp_path: Path) -> None:
    program = start(torch.ones(3))
    program.graph_module.register_buffer('a"b', torch.ones(1))
    node = program.graph.create_node("get_attr", 'a"b')
    node.meta["val"] = program.fake(torch.ones(1))
    program.output.args = ((node,),)
    with pytest.raises(SaveError, match="parameter name"):
        store.save(tmp_path / "m.gw", Archive([Variant(program)]))


# -- writing in one piece --------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    program = start(torch.zeros(1))
    archive = Archive([Variant(finish(program, program.add_tensor("w", torch.randn(300_000))))])
    store.save(tmp_path / "m.gw", Archive([], {"old": True}))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(SaveError, match="cannot be written"):
            store.save(tmp_path / "m.gw", archive)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.load(tmp_path / "m.gw").meta == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["m.gw"]


@pytest.mark.parametrize("step", ["save_file", "fsync", "replace"])
def test_errors_at_any_step_leave_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "m.gw"
    store.save(path, Archive([], {"old": True}))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr({"save_file": "safetensors.torch.save_file"}.get(step, f"os.{step}"), full)
    with pytest.raises(SaveError, match="No space left"):
        store.save(path, Archive([], {"new": True}))
    monkeypatch.undo()
    assert store.load(path).meta == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["m.gw"]


def test_bad_paths(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "m.gw", tmp_path / "folder"):
        with pytest.raises(SaveError, match="cannot be written"):
            store.save(path, Archive([]))
    assert (tmp_path / "folder").is_dir()
    for path in (tmp_path / "missing", tmp_path / "folder", "/dev/null"):
        with pytest.raises(LoadError):
            store.load(path)


def test_links_are_followed_and_permissions_kept(tmp_path: Path) -> None:
    path, link = tmp_path / "m.gw", tmp_path / "link.gw"
    store.save(path, Archive([], {"k": 1}))
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    path.chmod(0o640)
    link.symlink_to(path)
    store.save(link, Archive([], {"k": 2}))
    assert link.is_symlink() and store.load(path).meta == {"k": 2}
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


# -- quick loading ---------------------------------------------------------------------------------------------------


def quantized_program() -> Program:
    x = torch.randn(3, 8)
    program = start(x)
    weight = program.add_tensor("weight", torch.randn(4, 8))
    with program.graph.inserting_before(program.output):
        q = program.call(torch.ops.graphwright.quantize.default, program.placeholders[0], 0.1, 3, -128, 127, torch.int8, sites=["q"])
        real = program.call(torch.ops.graphwright.dequantize.default, q, 0.1, 3, torch.float32, sites=["q"])
        result = program.call(aten.linear.default, real, weight, None, sites=["linear"])
        result = program.call(aten.split.Tensor, program.call(aten.gelu.default, result, sites=["act"]), 2, -1, sites=["split"])
        second = program.graph.call_function(operator.getitem, (result, 1))
        second.meta |= {"sites": ("split",), "val": result.meta["val"][1]}
    return finish(program, second)


def values(program: Program) -> list[Any]:
    flat = [x for n in program.graph.nodes if "val" in n.meta for x in torch.utils._pytree.tree_leaves(n.meta["val"])]
    return [(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in flat]


def test_a_loaded_program_gets_its_fake_tensors_when_they_are_asked_for(tmp_path: Path) -> None:
    program = quantized_program()
    loaded = round_trip(tmp_path, program)
    held = [n.meta["val"] for n in loaded.placeholders]
    assert all(isinstance(v, Outline) for v in held)
    assert values(loaded) == values(program)
    assert held[0].sum(0).shape == (8,) and isinstance(held[0] + 1, FakeTensor)  # an op on an outline is run on fakes
    loaded.verify()
    assert not [n for n in loaded.graph.nodes for x in torch.utils._pytree.tree_leaves(n.meta.get("val")) if isinstance(x, Outline)]
    assert {n.meta["val"].fake_mode for n in loaded.placeholders} == {loaded.fake_mode}
    assert values(loaded) == values(program) and loaded.text() == program.text()
    with loaded.graph.inserting_before(loaded.output):
        assert loaded.call(aten.relu.default, loaded.placeholders[0]).meta["val"].shape == (3, 8)


def test_what_was_saved_here_loads_without_the_compiler(tmp_path: Path) -> None:
    path = tmp_path / "a.gw"
    store.save(path, Archive([Variant(quantized_program())]))
    code = (
        "import sys, torch; from graphwright import store; from graphwright.store import infer\n"
        "infer.Rehearsal._rehearse = None  # checked when it was written\n"
        f"program = store.load({str(path)!r}).variants[0].program\n"
        "print([m for m in ('torch._dynamo', 'sympy') if m in sys.modules], [tuple(n.meta['val'].shape) for n in program.placeholders])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "[] [(3, 8)]", done.stderr


def test_a_graph_that_nobody_checked_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ran = tmp_path / "a.gw", []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    store.save(path, Archive([Variant(quantized_program())]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    original = Rehearsal._rehearse
    monkeypatch.setattr(Rehearsal, "_rehearse", lambda self, *a: ran.append(1) or original(self, *a))
    assert values(store.load(path).variants[0].program) and len(ran) == 6
    assert values(store.load(path).variants[0].program) and len(ran) == 6
    monkeypatch.setattr(torch, "__version__", "2.0.0+another")
    verified._code.cache_clear()
    try:
        assert values(store.load(path).variants[0].program) and len(ran) == 12
    finally:
        verified._code.cache_clear()


def test_a_cache_that_cannot_be_kept_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert round_trip(tmp_path, quantized_program()).text() == quantized_program().text()
