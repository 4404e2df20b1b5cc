"""ATen rows: normalisation, softmax, attention, dropout."""

from __future__ import annotations

import math
from math import prod
from typing import Any

import torch
from torch import Tensor

from graphwright.ops.reduce import kept_whole
from graphwright.ops.registry import CONTRACTION, LAYOUT_FREE, NORM, RANDOM, SOFTMAX, op

# -- normalisation ---------------------------------------------------------------------------------------------------


def _standard(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x with mean 0 and variance 1 over the axes; the mean; 1 / deviation."""
    mean = torch.mean(x, dims, True)
    inverse = 1 / torch.sqrt(torch.mean((x - mean) ** 2, dims, True) + eps)
    return (x - mean) * inverse, mean, inverse


def _wide(x: Tensor) -> Tensor:
    """Reduced floats as float32, in which statistics are taken."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(dtype)


def _last(x: Tensor, shape: Any) -> list[int]:
    return list(range(x.ndim - len(shape), x.ndim))


def _layer_axes(**args: Any) -> str:
    inner = " ".join(f"d{k}" for k in range(len(args["normalized_shape"])))
    whole = inner.replace("d", "[d").replace(" ", "] ") + "]"
    operands = [f"* {whole}", inner, inner][: 2 if "bias" not in args else 3]
    return f"{', '.join(operands)} -> * {inner}"


def _layer_axes_three(**args: Any) -> str:
    spelled = _layer_axes(**args)
    ones = " ".join(["1"] * len(args["normalized_shape"]))
    return f"{spelled}, * {ones}, * {ones}"


@op("aten.layer_norm", axes=_layer_axes, traits={NORM})
def layer_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
               eps: float = 1e-5, cudnn_enable: bool = True) -> Tensor:  # fmt: skip
    """Layer norm: mean 0 and variance 1 over the last axes, then ``* weight + bias``."""
    y, _, _ = _standard(_wide(input), _last(input, normalized_shape), eps)
    return _affine(y, weight, bias, input.dtype)


@op("aten.native_layer_norm", axes=_layer_axes_three, traits={NORM})
def native_layer_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None, bias: Tensor | None,
                      eps: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Layer norm, with the mean and 1 / deviation that it used."""
    y, mean, inverse = _standard(_wide(input), _last(input, normalized_shape), eps)
    return _affine(y, weight, bias, input.dtype), mean, inverse


@op("aten.rms_norm", axes=_layer_axes, traits={NORM})
def rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """RMS norm: ``x / sqrt(mean(x^2) + eps) * weight`` over the last axes; eps is the dtype's own by default."""
    x = _wide(input)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = x / torch.sqrt(torch.mean(x * x, _last(x, normalized_shape), True) + eps)
    return _affine(y, weight, None, input.dtype)


@op("aten.group_norm", axes="n (g [c]) [*], (g c), (g c) -> n (g c) *", traits={NORM})
def group_norm(input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
               eps: float = 1e-5, cudnn_enabled: bool = True) -> Tensor:  # fmt: skip
    """Group norm: mean 0 and variance 1 over each group of channels and space, then ``* weight + bias`` per channel."""
    x = _wide(input).reshape(input.shape[0], num_groups, -1)
    y = _standard(x, [2], eps)[0].reshape(input.shape)
    per = [None if p is None else p.reshape(-1, *[1] * (input.ndim - 2)) for p in (weight, bias)]
    return _affine(y, per[0], per[1], input.dtype)


def _per_channel(p: Tensor | None, x: Tensor) -> Tensor | None:
    return None if p is None else p.reshape(-1, *[1] * (x.ndim - 2))


@op("aten.instance_norm", axes="n c [*], c, c, c, c -> n c *", traits={NORM})
def instance_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
                  running_var: Tensor | None, use_input_stats: bool, momentum: float, eps: float,
                  cudnn_enabled: bool) -> Tensor:  # fmt: skip
    """Instance norm: statistics over space for each example and channel (or the running ones), then the affine part."""
    if not use_input_stats:
        return batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps, cudnn_enabled)
    y, _, _ = _standard(_wide(input), list(range(2, input.ndim)), eps)
    return _affine(y, _per_channel(weight, y), _per_channel(bias, y), input.dtype)


def _batch_axes(**args: Any) -> str:
    x = "[n] c [*]" if args["training"] else "n c *"
    return f"{x}, c, c, c, c -> n c *"


@op("aten.batch_norm", axes=_batch_axes, traits={NORM, LAYOUT_FREE})
def batch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
               running_var: Tensor | None, training: bool, momentum: float, eps: float,
               cudnn_enabled: bool) -> Tensor:  # fmt: skip
    """Batch norm: per channel, with the running statistics, or in training the batch's; changes none."""
    x = _wide(input)
    if training or running_mean is None or running_var is None:
        y, _, _ = _standard(x, [0, *range(2, x.ndim)], eps)
    else:
        mean, var = _per_channel(running_mean, x), _per_channel(running_var, x)
        y = (x - mean) / torch.sqrt(var + eps)  # type: ignore[operator]
    return _affine(y, _per_channel(weight, x), _per_channel(bias, x), input.dtype)


@op(
    "aten._native_batch_norm_legit_functional",
    axes=lambda **args: f"{_batch_axes(**args)}, {'c, c' if args['training'] else '0, 0'}, c, c",
    traits={NORM},
)
def batch_norm_functional(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
    training: bool, momentum: float, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Batch norm that gives new running statistics: result, mean, 1 / deviation, running mean, running variance."""
    y = batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, False)
    if not training:
        nothing = _wide(input).new_empty(0)
        return y, nothing, nothing.clone(), running_mean.clone(), running_var.clone()
    x = _wide(input)
    dims = [0, *range(2, x.ndim)]
    _, mean, inverse = _standard(x, dims, eps)
    mean, inverse = mean.reshape(-1), inverse.reshape(-1)
    var = torch.var(x, dims)
    new_mean = (1 - momentum) * running_mean + momentum * mean
    return y, mean, inverse, new_mean, (1 - momentum) * running_var + momentum * var


@op("aten._native_batch_norm_legit_no_training", axes="n c *, c, c, c, c -> n c *, 0, 0", traits={NORM})
def batch_norm_frozen(input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor,
                      running_var: Tensor, momentum: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Batch norm with running statistics; two empty tensors follow the result."""
    y = batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps, False)
    nothing = _wide(input).new_empty(0)
    return y, nothing, nothing.clone()


@op("aten._weight_norm", axes=None)
def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Weight norm: ``g * v / |v|``, the length over every axis but one (over all with -1)."""
    over = [k for k in range(v.ndim) if dim == -1 or k != dim % v.ndim]
    return v * (g / torch.sqrt(torch.sum(v * v, over, True)))


# -- softmax ---------------------------------------------------------------------------------------------------------


def _softmax_axes(**args: Any) -> str:
    return kept_whole(args["self"].ndim, args["dim"])


@op("aten.softmax", axes=_softmax_axes, traits={SOFTMAX}, overloads=("int",))
def softmax(self: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax along an axis."""
    x = _wide(self if dtype is None else self.to(dtype))
    e = torch.exp(x - torch.amax(x, dim, True))
    return (e / torch.sum(e, dim, True)).to(dtype or self.dtype)


@op("aten.log_softmax", axes=_softmax_axes, traits={SOFTMAX}, overloads=("int",))
def log_softmax(self: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Logarithm of the softmax along an axis."""
    x = _wide(self if dtype is None else self.to(dtype))
    x = x - torch.amax(x, dim, True)
    return (x - torch.log(torch.sum(torch.exp(x), dim, True))).to(dtype or self.dtype)


def _halved(self: Tensor, dim: int, half_to_float: bool, body: Any) -> Tensor:
    return body(self, dim, torch.float32 if half_to_float else None)


@op("aten._softmax", axes=_softmax_axes, traits={SOFTMAX})
def softmax_(self: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """Softmax along an axis."""
    return _halved(self, dim, half_to_float, softmax)


@op("aten._log_softmax", axes=_softmax_axes, traits={SOFTMAX})
def log_softmax_(self: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """Logarithm of the softmax along an axis."""
    return _halved(self, dim, half_to_float, log_softmax)


@op("aten._safe_softmax", axes=_softmax_axes, traits={SOFTMAX})
def safe_softmax(self: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax along an axis; a row of nothing but -inf gives zeros."""
    masked = torch.all(self == float("-inf"), dim, True)
    return torch.where(masked, 0.0, softmax(self, dim, dtype))


# -- attention -------------------------------------------------------------------------------------------------------


def _attention_axes(**args: Any) -> str:
    query, key, mask = args["query"], args["key"], args["attn_mask"]
    masked = "" if mask is None else "* q k" if mask.ndim > 1 else "k"
    if args["enable_gqa"] and query.ndim > 2 and query.shape[-3] != key.shape[-3]:
        masked = "" if mask is None else " ".join(["*"] * (mask.ndim > 3) + ["(h r)", "q", "k"][-min(mask.ndim, 3) :])
        masked = masked.replace("(h r)", "1") if mask is not None and mask.ndim > 2 and mask.shape[-3] == 1 else masked
        return f"* (h r) q d, * h k d, * h k e, {masked} -> * (h r) q e"
    return f"* q d, * k d, * k e, {masked} -> * q e"


def attention_flops(args: Any, out: Any) -> Any:
    """The two products; with a causal mask too, as kernels that skip nothing do."""
    query, key = args["query"], args["key"]
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + args["value"].shape[-1])


@op("aten.scaled_dot_product_attention", axes=_attention_axes, traits={CONTRACTION}, flops=attention_flops)
def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
              is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """Attention: ``softmax(query @ key.T * scale + mask) @ value``; scale is 1 / sqrt(d) by default.

    ``query [*, q, d]``, ``key [*, k, d]``, ``value [*, k, e]``; a bool mask says who takes part, a float one is added;
    with ``enable_gqa`` each head of key and value serves several of the query's. A query that no key may answer
    gets zeros.
    """
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = (x.unsqueeze(-3).expand(*x.shape[:-2], times, *x.shape[-2:]).flatten(-4, -3) for x in (key, value))
    q, k, v = _wide(query), _wide(key), _wide(value)
    scores = torch.matmul(q, k.transpose(-2, -1)) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        row, column = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
        scores = torch.where(column <= row.unsqueeze(1), scores, float("-inf"))
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = torch.where(attn_mask, scores, float("-inf")) if boolean else scores + attn_mask
    weights = torch.dropout(safe_softmax(scores, -1), dropout_p, dropout_p > 0)
    return torch.matmul(weights, v).to(query.dtype)


# -- dropout ---------------------------------------------------------------------------------------------------------


@op("aten.dropout", axes="* -> *", traits={RANDOM, LAYOUT_FREE}, overloads=("default",))
def dropout(input: Tensor, p: float, train: bool) -> Tensor:
    """In training, zero with probability p and scale the rest by 1 / (1 - p); else the input."""
    if not train:
        return input.clone()
    return input * torch.bernoulli(torch.full_like(input, 1 - p)) / (1 - p) if p < 1 else torch.zeros_like(input)


def _channel_dropout(input: Tensor, p: float, train: bool) -> Tensor:
    """Dropout of whole channels."""
    if not train:
        return input.clone()
    noise = torch.bernoulli(input.new_full((*input.shape[:2], *[1] * (input.ndim - 2)), 1 - p))
    return input * noise / (1 - p) if p < 1 else torch.zeros_like(input)


op("aten.feature_dropout", axes="n c * -> n c *", traits={RANDOM, LAYOUT_FREE})(_channel_dropout)


@op("aten.alpha_dropout", axes="* -> *", traits={RANDOM, LAYOUT_FREE})
def alpha_dropout(input: Tensor, p: float, train: bool) -> Tensor:
    """Dropout that keeps mean and variance behind a SELU; the input where not in training."""
    return torch.alpha_dropout(input, p, True) if train else input.clone()


@op("aten.native_dropout", axes="* -> *, *", traits={RANDOM})
def native_dropout(input: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """Dropout, and which elements stayed."""
    if train is False:
        return input.clone(), torch.ones_like(input, dtype=torch.bool)
    kept = torch.bernoulli(torch.full_like(input, 1 - p)).to(torch.bool)
    return input * kept / (1 - p), kept
