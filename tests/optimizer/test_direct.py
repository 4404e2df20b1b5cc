"""PyTorch's own functions in the place of ops: the same op, the same results."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graphwright.backends.direct import _NAMESAKES, _NEURAL, _functions, direct, without_defaults
from graphwright.ir import normalise, op_name

_TABLE = runpy.run_path(str(Path(__file__).with_name("ops_samples.py")))
FUNCTIONS = _functions()
CALLS = [(op, k) for op in FUNCTIONS for k in range(len(_TABLE["SAMPLES"][op_name(op)]))]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, len(args)))
        return func(*args, **(kwargs or {}))


def test_every_name_stands_for_an_op():
    assert len(FUNCTIONS) == len(_NAMESAKES.split()) + len(_NEURAL.split())
    assert direct(torch.ops.aten.mul.Tensor) is torch.mul
    assert direct(torch.ops.aten.nonzero.default) is torch.ops.aten.nonzero.default


@pytest.mark.parametrize(("op", "k"), CALLS, ids=lambda v: v if isinstance(v, int) else op_name(v))
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_the_same_op_is_reached(op, k, dtype):
    """With the op's complete arguments both ways of calling do the same ops and give the same bits, or fail alike."""
    found = []
    for call, tidy in ((op, lambda kwargs: kwargs), (FUNCTIONS[op], lambda kwargs: without_defaults(op, kwargs))):
        try:
            given = list(_TABLE["SAMPLES"][op_name(op)][k](_TABLE["Maker"](dtype, seed=k)))
        except RuntimeError:
            pytest.skip(f"no such sample in {dtype}")
        given, kwargs = normalise(op, given[:-1] if isinstance(given[-1], dict) else given, given[-1] if isinstance(given[-1], dict) else {})
        with torch.no_grad(), Seen() as seen:
            try:
                result = call(*given, **tidy(kwargs))
            except (RuntimeError, IndexError):
                result = "failed"
        found.append((seen.calls, result))
    (calls, want), (others, got) = found
    assert calls == others
    for a, b in zip(tree_leaves(want), tree_leaves(got), strict=True):
        if not isinstance(a, torch.Tensor):
            assert a == b
            continue
        assert a.dtype == b.dtype and a.stride() == b.stride()
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_what_says_nothing_is_left_out():
    op = torch.ops.aten.add.Tensor
    assert without_defaults(op, {"alpha": 1}) == {}
    assert without_defaults(op, {"alpha": 2}) == {"alpha": 2}
    assert without_defaults(op, {"alpha": True}) == {"alpha": True}
    assert without_defaults(torch.ops.aten.clone.default, {"memory_format": None}) == {}
