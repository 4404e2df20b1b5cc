"""PyTorch's own Python functions for ATen's ops: the same op, called in half the time.

``torch.ops.aten.mul.Tensor(x, y)`` wraps every argument for the dispatcher in a way that serves any op; ``torch.mul(x, y)`` was
generated for this one. The difference is 1.5 to 5 µs a call, and small models have hundreds of calls. Listed here are functions
that take the op's arguments in the schema's order and under its names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_NAMESAKES = """
add.Tensor sub.Tensor mul.Tensor div.Tensor neg abs exp log log1p sqrt rsqrt reciprocal square sin cos
tanh sigmoid relu erf floor ceil round isnan sign pow.Tensor_Scalar pow.Tensor_Tensor where.self maximum minimum clamp clamp_min clamp_max eq.Tensor eq.Scalar
ne.Tensor ne.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar ge.Tensor ge.Scalar logical_and logical_or logical_not
bitwise_and.Tensor bitwise_or.Tensor bitwise_not masked_fill.Scalar masked_fill.Tensor cat stack softmax.int log_softmax.int mean.dim sum.dim_IntList
amax amin cumsum layer_norm rms_norm group_norm matmul mm bmm addmm baddbmm embedding permute transpose.int reshape flatten.using_ints
unsqueeze squeeze.dim select.int unbind.int chunk split_with_sizes index_select gather roll flip clone conv1d conv2d conv3d max_pool2d
tril triu outer argmax
"""  # fmt: skip
_NEURAL = """
linear silu gelu hardswish hardsigmoid hardtanh leaky_relu elu mish softplus relu6 adaptive_avg_pool2d avg_pool2d scaled_dot_product_attention
"""


@functools.cache
def _functions() -> dict[Any, Callable[..., Any]]:
    found: dict[Any, Callable[..., Any]] = {}
    for home, names in ((torch._C._VariableFunctions, _NAMESAKES), (torch._C._nn, _NEURAL)):
        for spelled in names.split():
            name, _, overload = spelled.partition(".")
            packet, function = getattr(torch.ops.aten, name, None), getattr(home, name, None)
            if function is not None and packet is not None and (overload or "default") in packet.overloads():
                found[getattr(packet, overload or "default")] = function
    return found


def direct(target: Any) -> Callable[..., Any]:
    """The function for an op, or the op itself where there is none."""
    return _functions().get(target, target)


def without_defaults(target: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments that say something: those left out have the schema's own value."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return kwargs
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {k: v for k, v in kwargs.items() if not (k in defaults and type(v) is type(defaults[k]) and v == defaults[k])}
