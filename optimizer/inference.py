"""What a call gives, on fake tensors; calls alike in op, arguments and the tensors' descriptions are inferred once.

Running an op on FakeTensors takes a few hundred microseconds, and a model repeats its layers: most inferences of a
program have been made before. Only descriptions are kept, never values: each answer is a fresh FakeTensor, over the
argument's memory where the op gives a view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor

from graphwright.outline import fresh, view

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class _Particular(Exception):
    """This call is one of its own: symbolic sizes, known contents, memory that is shared."""


class Inference:
    """Infers calls, and remembers those whose result depends on descriptions alone."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def __call__(self, mode: Any, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What ``target(*args, **kwargs)`` gives under ``mode``.

        Raises:
            Exception: whatever the op raises where it does not take these arguments.
        """
        try:
            key = target, torch.get_default_dtype(), _key(args), _key(kwargs) if kwargs else None
        except _Particular:
            return _run(mode, target, args, kwargs)
        if key not in self._known:
            found = _run(mode, target, args, kwargs)
            try:
                self._known[key] = _described(found, args, kwargs)
            except _Particular:
                pass
            return found
        return _made(self._known[key], mode, _tensors((args, kwargs)))


def _run(mode: Any, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    shapes = getattr(mode, "shape_env", None)
    # looking twice must not narrow what a symbol may be; ops made of others (stft) fix symbols in C++ and keep them in Python
    with mode, torch.no_grad(), enable_python_dispatcher(), shapes.suppress_guards() if shapes is not None else nullcontext():
        return target(*args, **kwargs)


def _key(value: Any) -> Any:
    if isinstance(value, FakeTensor):
        return _tensor(value)
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_key, value))
    if isinstance(value, Mapping):
        return tuple((k, _key(v)) for k, v in value.items())
    if type(value) in _PLAIN:
        return type(value), repr(value) if isinstance(value, (float, complex)) else value  # -0.0 is not 0.0, NaN is NaN
    raise _Particular


def _tensor(x: Tensor) -> tuple[Any, ...]:
    """Everything about a fake tensor that an op may look at."""
    plain = (
        type(x) is FakeTensor and x.layout is torch.strided and x.constant is None
        and not x.is_conj() and not x.is_neg() and not x.is_quantized
    )  # fmt: skip
    if not plain:
        raise _Particular
    sizes = (*x.shape, *x.stride(), x.storage_offset())
    if not all(type(s) is int for s in sizes):
        raise _Particular
    return x.ndim, sizes, x.dtype, x.device, x.requires_grad


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested arguments."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [x for v in value for x in _tensors(v)]


def _described(found: Any, args: Any, kwargs: Any) -> Any:
    """The result without its tensors: of each what ``_tensor`` says, and which argument it is a view of, if any.

    Raises:
        _Particular: it holds what no description can give back.
    """
    if not isinstance(found, (Tensor, tuple, list)):
        raise _Particular
    given = [x.untyped_storage()._cdata for x in _tensors((args, kwargs))]
    made: set[int] = set()

    def describe(x: Any) -> Any:
        if isinstance(x, (tuple, list)) and type(x) in (tuple, list):
            return type(x), [describe(v) for v in x]
        if not isinstance(x, Tensor) or x.requires_grad:
            raise _Particular
        memory = x.untyped_storage()._cdata
        source = given.index(memory) if memory in given else None
        if source is None and x.storage_offset() != 0 or memory in made or given.count(memory) > 1:
            raise _Particular  # two results share memory, or two arguments that of the result
        if source is None:
            made.add(memory)
        return _tensor(x), source

    return describe(found)


def _made(known: Any, mode: Any, given: Sequence[Tensor]) -> Any:
    if known[0] in (tuple, list):
        return known[0](_made(v, mode, given) for v in known[1])
    (ndim, sizes, dtype, device, _), source = known
    shape, stride = sizes[:ndim], sizes[ndim : 2 * ndim]
    return fresh(shape, stride, dtype, device, mode) if source is None else view(given[source], shape, stride, sizes[-1], dtype)


def fake_of(tensor: Tensor, mode: Any) -> Tensor:
    """A tensor as a FakeTensor of this mode, all sizes fixed, no gradient."""
    bare = tensor.detach()
    ordinary = (
        type(bare) is Tensor and bare.layout is torch.strided and bare.device.type == "cpu" and bare.storage_offset() == 0
        and not bare.is_conj() and not bare.is_neg() and not bare.is_quantized
        and bare.untyped_storage().nbytes() == bare.numel() * bare.element_size()
    )  # fmt: skip
    if not ordinary:
        return mode.from_tensor(bare, static_shapes=True)
    return fresh(bare.shape, bare.stride(), bare.dtype, bare.device, mode)
