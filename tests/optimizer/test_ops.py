"""The op table: every row against its op, under fake tensors, and its traits and axes against what the op does."""

from __future__ import annotations

import runpy
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from graphwright import ops
from graphwright.ir import normalise, op_name
from graphwright.ops import facts, registry
from graphwright.ops.axes import Axes, Dim, total

warnings.filterwarnings("ignore", module="torch")
_TABLE = runpy.run_path(str(Path(__file__).with_name("ops_samples.py")))
SAMPLES, Maker = _TABLE["SAMPLES"], _TABLE["Maker"]
ROWS = {op_name(r.overload): r for r in ops.rows()}
TESTED = [name for name in ROWS if name in SAMPLES]
CALLS = [(name, k) for name in TESTED for k in range(len(SAMPLES[name]))]

# Not defined in the same way by the op for these dtypes: scalars cut to integers, statistics' dtype by device.
UNEQUAL = {(n, torch.int64) for n in ("aten.addmm", "aten.baddbmm", "aten.addcmul", "aten.affine_grid_generator")}
UNEQUAL |= {(n, torch.bfloat16) for n in ("aten.native_layer_norm", "aten._native_batch_norm_legit_functional",
                                          "aten._native_batch_norm_legit_no_training")}  # fmt: skip
DATA_DEPENDENT = {("aten.index.Tensor", 4)}


def arguments(name: str, k: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(k)
    args = list(SAMPLES[name][k](Maker(dtype, seed=k)))
    kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
    return normalise(ROWS[name].overload, args, kwargs)


def run(name: str, k: int, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    args, kwargs = arguments(name, k, dtype)
    return args, kwargs, ROWS[name].overload(*args, **kwargs)


def is_random(name: str) -> bool:
    """Random in the samples too: the dropouts and rrelu are sampled with training off."""
    return registry.RANDOM in ROWS[name].traits and "drop" not in name and "rrelu" not in name


def assert_same(got: Any, wanted: Any, values: bool = True, loose: bool = False) -> None:
    got, wanted = tree_leaves(got), tree_leaves(wanted)
    assert len(got) == len(wanted)
    for g, w in zip(got, wanted, strict=True):
        if not isinstance(w, Tensor):
            assert g == w
            continue
        assert (tuple(g.shape), g.dtype) == (tuple(w.shape), w.dtype)
        if not values or not w.numel():
            continue
        tolerance = {torch.float64: 1e-10, torch.complex128: 1e-10}.get(w.dtype, 1e-5)
        if loose and w.dtype == torch.bfloat16:
            finite = torch.isfinite(w)
            assert torch.equal(finite, torch.isfinite(g))
            error = (g - w)[finite].double().norm() / w[finite].double().norm().clamp(min=1)
            assert error < 0.05, f"relative error {error}"
        else:
            torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance * 10, equal_nan=True)


# -- the table itself ------------------------------------------------------------------------------------------------


def test_every_row_has_samples() -> None:
    from graphwright import kernels
    from graphwright.kernels import gpu

    elsewhere = set(kernels.load()) | {f.op for f in gpu.families().values()}  # ops that only lowering emits are tested with their kernels' samples
    assert not [name for name in ROWS if name not in SAMPLES and name not in elsewhere]
    assert not [name for name in SAMPLES if name not in ROWS]


# -- references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TESTED)
def test_reference_agrees_with_the_op(name: str) -> None:
    """The same numbers, and under fake tensors the same shapes and dtypes."""
    reference = ROWS[name].reference
    for k in range(len(SAMPLES[name])):
        for dtype in (torch.float64, torch.float32):
            args, kwargs, wanted = run(name, k, dtype)
            assert_same(reference(*args, **kwargs), wanted, values=not is_random(name))
        if (name, k) not in DATA_DEPENDENT:
            with FakeTensorMode() as mode:
                fakes = tree_map(lambda v, m=mode: m.from_tensor(v) if isinstance(v, Tensor) else v, (args, kwargs))
                assert_same(reference(*fakes[0], **fakes[1]), wanted, values=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64], ids=str)
def test_reference_agrees_in_other_dtypes(dtype: torch.dtype) -> None:
    """Whatever the op itself accepts of integers and half-precision floats."""
    tried = 0
    for name, k in CALLS:
        if (name, dtype) in UNEQUAL or is_random(name):
            continue
        try:
            args, kwargs, wanted = run(name, k, dtype)
        except (RuntimeError, NotImplementedError, IndexError, TypeError):
            continue
        tried += 1
        try:
            loose = dtype == torch.bfloat16 and not name.startswith("aten.lstm")
            assert_same(
                ROWS[name].reference(*args, **kwargs), wanted, loose=loose, values=dtype == torch.int64 or loose
            )
        except Exception as error:
            raise AssertionError(f"{name}, sample {k}: {error}") from error
    assert tried > 300


# -- traits ----------------------------------------------------------------------------------------------------------


def test_elementwise_rows_see_one_position_alone() -> None:
    """Shuffling the (broadcast) positions of all inputs shuffles the result and does nothing else."""
    tried = set()
    for name, k in CALLS:
        row = ROWS[name]
        if registry.ELEMENTWISE not in row.traits or name in ("aten.prelu", "aten.rrelu"):
            continue
        args, kwargs, wanted = run(name, k, torch.float64)
        if not isinstance(wanted, Tensor) or not wanted.ndim:
            continue
        order = torch.randperm(wanted.numel())
        args = [torch.broadcast_to(a, wanted.shape).reshape(-1)[order] if isinstance(a, Tensor) and a.ndim else a
                for a in args]  # fmt: skip
        got = row.overload(*args, **kwargs)
        torch.testing.assert_close(got, wanted.reshape(-1)[order], equal_nan=True, rtol=1e-12, atol=1e-14)
        tried.add(name)
    assert tried >= {n for n in TESTED if registry.ELEMENTWISE in ROWS[n].traits} - {"aten.prelu", "aten.rrelu"}


def test_commutative_rows_commute() -> None:
    tried = 0
    for name, k in CALLS:
        if registry.COMMUTATIVE not in ROWS[name].traits:
            continue
        args, kwargs = arguments(name, k, torch.float64)
        if kwargs.get("alpha", 1) != 1:
            continue
        op = ROWS[name].overload
        assert_same(op(args[1], args[0], *args[2:], **kwargs), op(*args, **kwargs))
        tried += 1
    assert tried > 50


def test_layout_free_rows_keep_the_layout() -> None:
    for name in TESTED:
        if registry.LAYOUT_FREE not in ROWS[name].traits:
            continue
        args, kwargs = arguments(name, 0, torch.float32)
        shape = (2, 3, 4, 5)
        least = (
            0 if registry.ELEMENTWISE in ROWS[name].traits and name != "aten.prelu" else 1
        )  # a norm's vectors stay vectors
        relaid = [_channels_last(a, shape) if isinstance(a, Tensor) and a.ndim > least else a for a in args]
        plain = [a.contiguous() if isinstance(a, Tensor) else a for a in relaid]
        got, wanted = ROWS[name].overload(*relaid, **kwargs), ROWS[name].overload(*plain, **kwargs)
        if isinstance(got, Tensor) and got.ndim == 4:
            assert got.is_contiguous(memory_format=torch.channels_last), name
            assert_same(got, wanted, values=not is_random(name))


def _channels_last(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    if like.is_floating_point() or like.is_complex():
        fresh = torch.rand(shape, dtype=torch.float64).add(1).to(like.dtype)
    else:
        fresh = torch.randint(0, 2, shape).to(like.dtype)
    return fresh.to(memory_format=torch.channels_last)


# -- axes ------------------------------------------------------------------------------------------------------------


@cache
def node_of(name: str, k: int, dtype: torch.dtype = torch.float64) -> tuple[fx.Node, list[Tensor], Any]:
    """A graph of one node, whose ``meta["val"]`` are the real tensors; its tensor arguments; its result."""
    args, kwargs, result = run(name, k, dtype)  # nothing writes into them: the nodes are shared by the tests
    graph = fx.Graph()

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder("x")
        node.meta["val"] = value
        return node

    new_args, new_kwargs = tree_map(placed, (tuple(args), kwargs))
    node = graph.call_function(ROWS[name].overload, new_args, new_kwargs)
    node.meta["val"] = result
    return node, [o.value for o in facts.operands(node) if o is not None], result


def spelled() -> list[tuple[str, int]]:
    return [c for c in CALLS if ROWS[c[0]].axes is not None]


def test_spellings_fit_every_sample() -> None:
    """As many operands as the op has, ranks that fit, sizes without contradiction, and the result's shape from them."""
    exact = 0
    for name, k in spelled():
        node, _, _ = node_of(name, k)
        try:
            found = facts.axes_of(node)
            if found is None:
                continue
            known = facts.sizes_of(node)
            for result, dims in zip(facts.results(node), found.outputs, strict=True):
                got = [total(d, known) for d in dims]
                exact += None not in got
                assert all(g in (None, n) for g, n in zip(got, result.value.shape, strict=True))
        except Exception as error:
            raise AssertionError(f"{name}, sample {k}: {error}") from error
    assert exact > 600


PRODUCTS = ("linear", "matmul", "mm", "bmm", "mv", "dot", "outer", "einsum", "bilinear")


def _atoms(tensor: Tensor, dims: tuple[Dim, ...], known: dict[str, int]) -> tuple[Tensor, list[str]]:
    """A tensor with one axis per atom, size-1 (broadcast and literal) axes dropped."""
    shape = [
        1 if n == 1 else known[a] for d, n in zip(dims, tensor.shape, strict=True) for a in d.atoms if not a.isdigit()
    ]
    named = [a for d in dims for a in d.atoms if not a.isdigit()]
    tensor = tensor.reshape(shape)
    for k in reversed(range(len(named))):
        if shape[k] == 1:
            tensor = tensor.squeeze(k)
            del named[k]
    return tensor, named


def test_products_are_what_their_axes_say() -> None:
    """An einsum over the spelled axes gives the result."""
    tried = 0
    for name, k in spelled():
        node, tensors, result = node_of(name, k)
        found = facts.axes_of(node)
        if name.removeprefix("aten.") not in PRODUCTS or found is None:
            continue
        if any(o is not None and o.name == "bias" for o in facts.operands(node)):
            continue
        known = facts.sizes_of(node)
        letters = {a: chr(97 + n) for n, a in enumerate(sorted(found.named((*found.inputs, *found.outputs))))}
        pairs = [_atoms(t, d, known) for t, d in zip(tensors, [i for i in found.inputs if i is not None], strict=True)]
        target = [d.atoms[0] for d, n in zip(found.outputs[0], result.shape, strict=True) if n != 1]
        text = ",".join("".join(letters[a] for a in n) for _, n in pairs) + "->" + "".join(letters[a] for a in target)
        torch.testing.assert_close(torch.einsum(text, *(t for t, _ in pairs)).reshape(result.shape), result)
        tried += 1
    assert tried > 15


def test_views_are_what_their_axes_say() -> None:
    """Cutting the input into atoms and putting them together in the result's order gives the result."""
    tried = 0
    for name, k in spelled():
        if registry.VIEW not in ROWS[name].traits:
            continue
        node, tensors, result = node_of(name, k)
        found = facts.axes_of(node)
        if (
            found is None
            or len(tensors) != 1
            or not isinstance(result, Tensor)
            or not result.numel()
            or not _only_regroups(found)
        ):
            continue
        known = facts.sizes_of(node)
        x, given = _atoms(tensors[0], found.inputs[0] or (), known)
        wanted = [a for d in found.outputs[0] for a in d.atoms if not a.isdigit() and known[a] != 1]
        kept = [a for a in wanted if a in given]
        assert sorted(kept) == sorted(given), name
        x = x.permute([given.index(a) for a in kept])
        x = x.reshape([known[a] if a in given else 1 for a in wanted]).expand([known[a] for a in wanted])
        torch.testing.assert_close(x.reshape(result.shape), result)
        tried += 1
    assert tried > 50


def _only_regroups(axes: Axes) -> bool:
    plain = not axes.whole and not any(d.joined for dims in (*axes.inputs, *axes.outputs) for d in dims or ())
    atoms = [a for dims in (*axes.inputs, *axes.outputs) for d in dims or () for a in d.atoms]
    return plain and not any(a.endswith("'") or (a.isdigit() and a != "1") for a in atoms)


def test_joined_axes_are_what_they_say() -> None:
    """cat, split, slice, pad: the part of the longer tensor at an atom's offset is the shorter tensor."""
    tried = set()
    for name, k in spelled():
        node, tensors, result = node_of(name, k)
        found = facts.axes_of(node)
        if found is None:
            continue
        known = facts.sizes_of(node)
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        inputs = list(zip(tensors, found.inputs, strict=False))
        outputs = list(zip(results, found.outputs, strict=True))
        sides = [(a, b) for a in inputs for b in outputs] + [(b, a) for a in inputs for b in outputs]
        for (whole, dims), (part, short) in sides:
            if (
                dims is None
                or short is None
                or len(dims) != len(short)
                or not any(d.joined for d in dims)
                or any(d.joined for d in short)
            ):
                continue
            for at, (d, s) in enumerate(zip(dims, short, strict=True)):
                if d.joined:
                    before = d.atoms[: d.atoms.index(s.atoms[0])]
                    whole = whole.narrow(
                        at, sum(int(a) if a.isdigit() else known[a] for a in before), known[s.atoms[0]]
                    )
            torch.testing.assert_close(whole, part)
            tried.add(name.split(".")[1])
    assert tried >= {
        "cat",
        "concat",
        "split",
        "split_with_sizes",
        "chunk",
        "tensor_split",
        "slice",
        "narrow",
        "pad",
        "constant_pad_nd",
    }


# -- work ------------------------------------------------------------------------------------------------------------

COUNTED = [
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "outer", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d", "convolution", "scaled_dot_product_attention",
]  # fmt: skip


def test_flops_agree_with_pytorchs_counter() -> None:
    tried = 0
    for name, k in CALLS:
        if not name.startswith("aten.") or name.split(".")[1] not in COUNTED:
            continue
        node, _, _ = node_of(name, k)
        args, kwargs = arguments(name, k, torch.float64)
        with FlopCounterMode(display=False) as counter:
            ROWS[name].overload(*args, **kwargs)
        if counter.get_total_flops():  # products of vectors are not counted by PyTorch
            assert facts.flops(node) == counter.get_total_flops(), (name, k)
            tried += 1
    assert tried > 25


def test_flops_of_fused_ops_are_their_contractions() -> None:
    linear, bare, _ = (facts.flops(node_of("graphwright.linear", k)[0]) for k in range(3))
    assert (linear, bare) == (2 * 6 * 4 * 5, 2 * 3 * 4 * 5)
    grouped, plain, deep = (facts.flops(node_of("graphwright.conv", k)[0]) for k in range(3))
    assert (grouped, plain, deep) == (2 * 2 * 6 * 32 * 18, 2 * 6 * 7 * 12, 2 * 3 * 64 * 2)


def test_flops_and_traffic_of_every_row_are_numbers() -> None:
    for name, k in CALLS:
        node, tensors, _ = node_of(name, k)
        if registry.SHAPE in ROWS[name].traits:
            assert facts.flops(node) == 0 and facts.traffic(node).total == 0
            continue
        work, moved = facts.flops(node), facts.traffic(node)
        assert isinstance(work, int) and work >= 0, (name, k, work)
        assert moved.written <= sum(facts.size_in_bytes(r.value) for r in facts.results(node))
        assert sum(moved.read.values()) <= sum(map(facts.size_in_bytes, tensors))
