"""Plans are safe under CUDA graphs: they never look at a tensor's contents nor wait for the device, and calls with equal shapes launch the
same functions on the same grids with the same numbers and workspaces. No GPU: plans are made, not launched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graphwright.kernel import Sample
from graphwright.kernels import gpu
from graphwright.kernels.gpu.launch import Config, Family, Launch, Plan, tensors_of

NAMES = sorted(gpu.families()) if gpu.unavailable() is None else []

#: What a host learns contents by, or results whose shape hangs on them.
_LOOKS = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave.Tensor", "aten::histc",
}  # fmt: skip


class Blind(TorchDispatchMode):
    """No op may look at contents."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name if func._schema.overload_name in ("", "default") else f"{func._schema.name}.{func._schema.overload_name}"
        by_mask = func._schema.name in ("aten::index", "aten::index_put") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in _LOOKS or func._schema.name in _LOOKS or by_mask:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def _as_planned(value: Any) -> Any:
    return (tuple(value.shape), value.stride(), value.dtype, value.device.type) if isinstance(value, Tensor) else value


def _described(launch: Launch) -> tuple[Any, ...]:
    return (launch.fn, launch.grid, tuple(map(_as_planned, launch.args)), sorted(launch.constants.items()), launch.config, launch.scratch)


def _zeroed(x: Tensor) -> Tensor:
    """Zeros that lie as x does."""
    size = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
    return torch.zeros(size, dtype=x.dtype, device=x.device).as_strided(x.shape, x.stride())


def _configs(family: Family, args: tuple[Any, ...]) -> Iterator[Config]:
    fitting = [c for c in family.configs if family.fits(c, *args) is None]
    yield from dict.fromkeys([fitting[0], fitting[-1]])


def check(family: Family, args: tuple[Any, ...], config: Config) -> None:
    """A plan, and then blindly another of the same layer with an input of other contents: they do the same."""
    first = family.plan(*args, config=config)
    given = (_zeroed(args[0]), *args[1:]) if isinstance(args[0], Tensor) else args
    with Blind():
        second = family.plan(*given, config=config)
    assert list(map(_described, first.launches)) == list(map(_described, second.launches))
    assert [_as_planned(t) for t in tensors_of([first.result])] == [_as_planned(t) for t in tensors_of([second.result])]


@pytest.mark.parametrize("name", NAMES)
def test_plans_of_equal_shapes_are_equal(name: str) -> None:
    family = gpu.families()[name]
    small: list[Sample] = [s for s in family.samples() if not s.bench]
    assert small
    for sample in small:
        args = sample.args(torch.Generator().manual_seed(0))
        if family.supports(*args) is None:
            for config in _configs(family, args):
                check(family, args, config)


@pytest.mark.parametrize("name", NAMES)
def test_plans_need_no_contents(name: str) -> None:
    """Tensors on the meta device have none to look at."""
    family = gpu.families()[name]
    for _, args in family.ahead():
        for config in _configs(family, args):
            check(family, args, config)


def test_a_look_is_found() -> None:
    family = gpu.families()["quantize_rows"]
    args = next(s for s in family.samples() if not s.bench).args(torch.Generator().manual_seed(0))

    def looks(x: Tensor, *rest: Any, config: Config) -> Plan:
        assert float(x.abs().max()) >= 0
        return family.plan(x, *rest, config=config)

    def grows(x: Tensor, *rest: Any, config: Config) -> Plan:
        made = family.plan(x, *rest, config=config)
        return Plan(made.result, tuple(replace(launch, grid=(launch.grid[0] + x.numpy().any().item(),)) for launch in made.launches))

    with pytest.raises(AssertionError, match="waits"):
        check(replace(family, plan=looks), args, family.configs[0])
    with pytest.raises(AssertionError):
        check(replace(family, plan=grows), args, family.configs[0])
