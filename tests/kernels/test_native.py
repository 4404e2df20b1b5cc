"""The host side of the kernels: cache folder, threads, missing llvmlite, misuse."""

from __future__ import annotations

import concurrent.futures
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from graphwright import kernels, ops
from graphwright.kernel import Kernel, Sample
from graphwright.kernels import attention, disk, embed_norm, native, norm, pointwise, pool, softmax
from graphwright.ops import lowered

ALL = [(k, s) for found in kernels.load().values() for k in found if k.backend == "llvm" for s in k.samples()]
FIRST = [next((k, s) for k, s in ALL if k.op == op and not s.bench) for op in {k.op: None for k, _ in ALL}]


def _name(pair: tuple[Kernel, Sample]) -> str:
    return f"{pair[0].op}: {pair[1].name}"


def _run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_llvmlite_everything_imports_and_says_why_not() -> None:
    out = _run(
        "import sys; sys.modules['llvmlite'] = None\n"
        "import torch\n"
        "from graphwright import kernels\n"
        "k = kernels.load()['graphwright.softmax'][0]\n"
        "kernels.warm(['graphwright.softmax'])\n"
        "print(k.supports(torch.ones(2, 3), None, 1.0, False))"
    )
    assert "llvmlite cannot be imported" in out and "pip install llvmlite" in out


def test_package_import_is_light() -> None:
    out = _run("import sys, graphwright.kernels; print([m for m in ('torch', 'llvmlite', 'triton') if m in sys.modules])")
    assert "llvmlite" not in out and "triton" not in out


@pytest.mark.slow
def test_cache_is_private_filled_and_survives_damage(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from graphwright.kernels import pool, native\n"
        "x = torch.arange(8.0).reshape(1, 2, 2, 2)\n"
        "print(pool.mean_pool(x, 1.0, 0, False, 1.0, 0, 0, 0, None).tolist(), native.cache_folder())"
    )
    first = _run(code, XDG_CACHE_HOME=str(tmp_path))
    assert first.startswith("[[1.5, 5.5]]")
    folder = Path(first.split("]] ")[1])
    assert folder.is_relative_to(tmp_path)
    for path in (folder, folder.parent, folder.parent.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert files
    for f in files:
        f.write_bytes(b"not what was here")
    assert _run(code, XDG_CACHE_HOME=str(tmp_path)) == first


def test_a_kernel_is_read_from_disk_only_when_all_of_it_is_right(tmp_path: Path) -> None:
    softmax._NATIVE.warm()
    folder = native.cache_folder()
    assert folder is not None
    whole = disk.place(folder, "softmax._softmax").read_bytes()
    line, _, parts = whole.partition(b"\n")
    head = json.loads(line)
    path = tmp_path / "kernel"

    def read(data: bytes) -> Any:
        path.write_bytes(data)
        return disk.read(path, "softmax")

    assert read(whole)[1]
    assert disk.read(tmp_path / "none", "softmax") is None
    assert read(b"") is None and read(line) is None and read(whole[:-1]) is None
    assert read(line + b"\n" + parts[:100] + bytes([parts[100] ^ 1]) + parts[101:]) is None
    for wrong in ({"version": 0}, {"sha256": "0"}):
        assert read(json.dumps(head | wrong).encode() + b"\n" + parts) is None, wrong
    path.write_bytes(whole)
    assert disk.read(path, "another") is None


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    native.cache_folder.cache_clear()
    try:
        assert native.cache_folder() is None
    finally:
        native.cache_folder.cache_clear()


def test_threads_are_those_of_torch() -> None:
    assert native.threads_for(10) == 1
    assert native.threads_for(10**9) == torch.get_num_threads()
    omp = native.openmp()
    if omp is None:
        pytest.skip("this PyTorch has no OpenMP library with GNU entry points")


def test_concurrent_callers() -> None:
    """Kernels release the GIL and share no state: callers at the same time get what one caller gets."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, 64, 64, generator=g)
    q = torch.randn(2, 4, 96, 32, generator=g)
    want = softmax.run(x, None, 0.3, True), attention.run(q, q, q, None, None, False, True, 1.0, 0, 0, 0, None)

    def one(_: int) -> bool:
        return torch.equal(softmax.run(x, None, 0.3, True), want[0]) and torch.equal(
            attention.run(q, q, q, None, None, False, True, 1.0, 0, 0, 0, None), want[1]
        )

    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        assert all(executor.map(one, range(40)))


def test_forked_child_can_run_on_one_thread() -> None:
    """As with PyTorch itself, a forked child must not start the parent's threads again; one thread works."""
    x = torch.randn(200, 400)
    want = norm.run(x, None, None, None, 1e-5, False, False, True, 1.0, 0, 0, 0, None)[0]
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        got = norm.run(x, None, None, None, 1e-5, False, False, True, 1.0, 0, 0, 0, None)[0]
        os._exit(0 if torch.equal(got, want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("pair", FIRST, ids=_name)
def test_supports_takes_fake_tensors_and_the_row_gives_the_shape(pair: tuple[Kernel, Sample]) -> None:
    kernel, sample = pair
    args = sample.args(torch.Generator().manual_seed(0))
    row = next(r for r in ops.rows() if r.name == kernel.op)
    with FakeTensorMode() as mode:
        fakes = pytree.tree_map(lambda a: mode.from_tensor(a) if isinstance(a, Tensor) else a, args)
        assert kernel.supports(*fakes) is None
        shapes = pytree.tree_map(lambda t: (t.shape, t.dtype, t.stride()), pytree.tree_leaves(row.overload(*fakes)))
    got = [(t.shape, t.dtype, t.stride()) for t in pytree.tree_leaves(kernel.run(*args))]
    assert pytree.tree_leaves(shapes) == pytree.tree_leaves(got)


@pytest.mark.parametrize("pair", FIRST, ids=_name)
def test_rows_are_proper_custom_ops(pair: tuple[Kernel, Sample]) -> None:
    kernel, sample = pair
    row = next(r for r in ops.rows() if r.name == kernel.op)
    if row.reference.__module__ == lowered.__name__:
        args = sample.args(torch.Generator().manual_seed(0))
        torch.library.opcheck(row.overload, args, test_utils=("test_schema", "test_faketensor"))


GRID: tuple[Any, ...] = (0.1, 0, -128, 127, torch.int8)


@pytest.mark.parametrize(("reason", "call"), [
    ("float64", lambda: norm.KERNEL.supports(torch.ones(2, 3).double(), None, None, None, 1e-5, False, False, True, *GRID)),
    ("not broadcast", lambda: norm.KERNEL.supports(torch.ones(2, 3), torch.ones(3), None, None, 1e-5, False, False, True, *GRID)),
    ("weight", lambda: norm.KERNEL.supports(torch.ones(2, 3), None, torch.ones(4), None, 1e-5, False, False, True, *GRID)),
    ("16384", lambda: norm.KERNEL.supports(torch.ones(1, 20000), None, None, None, 1e-5, False, False, True, *GRID)),
    ("softplus", lambda: pointwise.KERNELS[0].supports(torch.ones(2), None, None, "softplus", [1.0, 20.0], *GRID)),
    ("broadcast", lambda: pointwise.KERNELS[0].supports(torch.ones(2, 3), torch.ones(2), None, "none", [], *GRID)),
    ("four axes", lambda: pointwise.KERNELS[0].supports(
        torch.ones(2, 2, 2, 2, 2).permute(4, 3, 2, 1, 0), None, None, "none", [], *GRID)),
    ("int64", lambda: softmax.KERNEL.supports(torch.ones(2, 3), torch.ones(3, dtype=torch.int64), 1.0, False)),
    ("does not broadcast", lambda: softmax.KERNEL.supports(torch.ones(2, 3), torch.ones(2), 1.0, False)),
    ("belong together", lambda: attention.KERNEL.supports(
        torch.ones(1, 3, 4, 5), torch.ones(1, 2, 4, 5), torch.ones(1, 2, 4, 5), None, None, False, True, *GRID)),
    ("does not fit", lambda: pool.KERNELS[0].supports(torch.ones(1, 1, 2, 2), [3, 3], [1, 1], [0, 0], [1, 1], False)),
    ("empty plane", lambda: pool.KERNELS[1].supports(torch.ones(1, 1, 0, 2), 1.0, 0, True, *GRID)),
])  # fmt: skip
def test_refusals_name_the_reason(reason: str, call: Any) -> None:
    assert reason in (call() or "")


@pytest.mark.parametrize("bad", [-1, 3])
def test_embedding_index_out_of_range(bad: int) -> None:
    indices, tables = [torch.tensor([[0, 1]]), torch.tensor([[2, bad]])], [torch.ones(2, 4), torch.ones(3, 4)]
    with pytest.raises(IndexError, match=f"embedding 1: index {bad} .* 3 rows"):
        embed_norm.run(indices, tables, None, None, 1e-5, False, False, True, *GRID)


def test_softmax_in_place() -> None:
    x = torch.randn(3, 5, 70)
    want = torch.softmax(x * 0.3, -1)
    out = softmax.run(x, None, 0.3, False, x)
    assert out is x
    torch.testing.assert_close(x, want)


def test_empty_inputs() -> None:
    assert norm.run(torch.empty(0, 8), None, None, None, 1e-5, False, True, True, *GRID)[2].shape == (0, 8)
    assert softmax.run(torch.empty(3, 0), None, 1.0, False).shape == (3, 0)
    assert pointwise.activate_quantize(torch.empty(0, 3), None, None, "gelu", [], *GRID).dtype == torch.int8
    empty = torch.empty(1, 2, 0, 4)
    assert attention.run(empty, empty, empty, None, None, False, True, *GRID).shape == (1, 0, 8)
    no_keys = attention.run(torch.ones(1, 2, 3, 4), empty, empty, None, None, False, True, 0.1, 7, 0, 255, torch.uint8)
    assert no_keys.shape == (1, 3, 8) and bool((no_keys == 7).all())
    assert pool.max_pool2d(torch.empty(0, 3, 4, 4), [2, 2], [2, 2], [0, 0], [1, 1], False).shape == (0, 3, 2, 2)


def test_norm_passes_nan_on_in_its_own_row_only() -> None:
    x = torch.randn(3, 40)
    x[1, 7] = torch.nan
    out, q = norm.run(x, None, None, None, 1e-5, False, False, True, 0.1, 9, 0, 255, torch.uint8)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()
    assert bool((q[1] == 9).all())
