"""What else computes an op: PyTorch's own calls, oneDNN, Inductor, torchao. Each makes a call from the op's arguments."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright import ops
from graphwright.ops import sparse, weight_only
from graphwright.ops.fused import activate

Args = dict[str, Any]
Maker = Callable[[Args, str], Callable[[], Any]]

#: Outputs of a peer must reach this against the op's reference: the peers round in other places than we do.
FLOOR_DB = 20.0


class Absent(Exception):
    """A peer can't compute this; the message says why."""


def _need(held: bool, why: str) -> None:
    if not held:
        raise Absent(why)


def _compiled(call: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], Any]:
    torch._dynamo.reset()
    made = torch.compile(call, fullgraph=True, dynamic=False, **options)
    return lambda: made(*args)


#: Inductor times its templates against libraries; without CUDA graphs, which the benchmark makes itself.
_AUTOTUNE = "max-autotune-no-cudagraphs"


def _reference(op: str) -> Callable[..., Any]:
    return next(r for r in ops.rows() if r.name == op).reference


# -- linear ----------------------------------------------------------------------------------------------------------


def _float_of(a: Args, device: str) -> torch.dtype:
    """What a layer would be computed in that is not quantized: the dtype of x; for integers float32, on a GPU the result's half or bfloat16."""
    if a["x"].is_floating_point():
        return a["x"].dtype
    halves = (torch.float16, torch.bfloat16)
    return torch.float32 if device == "cpu" else a["dtype"] if a.get("dtype") in halves else torch.bfloat16


def _float_weight(a: Args, dtype: torch.dtype) -> Tensor:
    """The weight as floats, made ahead."""
    weight = _dense_weight(a)
    if weight.is_floating_point() and weight.itemsize > 1:
        return weight.to(dtype)
    if a.get("weight_scales") is not None:
        scales = a["weight_scales"]
        return (weight.float() * scales.reshape(-1, *[1] * (weight.ndim - 1))).to(dtype)
    q, middle = (weight_only.unpack(weight), 8) if weight.dtype == torch.uint8 else (weight, 0)
    return weight_only.real_weight(q, a["scales"], a.get("zero_points"), middle, a["group"], torch.float32).to(dtype)


def _dense_weight(a: Args) -> Tensor:
    """The weight with its zeros in place."""
    if a.get("indices") is not None:
        return sparse.expand(a["weight"], a["indices"])
    if a.get("starts") is not None:
        dense = sparse.from_blocks(a["values"], a["columns"], a["starts"], a["out"] if a["transposed"] else a["x"].shape[-1])
        return dense.t() if a["transposed"] else dense
    return a["weight"]


def dense_int8(a: Args, device: str) -> Callable[[], Any]:
    """Our own int8 kernel on the weight with its zeros in place."""
    from graphwright import kernels

    _need(device == "cpu" and a["x"].dtype == torch.int8, "for int8 on the CPU")
    kernel = next(k for k in kernels.load()["graphwright.linear_int8"] if k.device == "cpu")
    row = next(r for r in ops.rows() if r.name == kernel.op)
    named = {**a, "x_scale": 1.0, "x_zero_point": 0, "weight": _dense_weight(a).contiguous(), "scale": 1.0, "zero_point": 0, "low": 0, "high": 0}
    return kernel.prepared(*(named.get(name) for name in row.params))


def torch_bsr(a: Args, device: str) -> Callable[[], Any]:
    """PyTorch's own block-sparse linear."""
    _need(a["values"].is_floating_point() and not a["transposed"], "for floats")
    x, end = a["x"], _ending(a)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse tensors are in beta
        weight = torch.sparse_bsr_tensor(a["starts"], a["columns"], a["values"], size=(a["out"], x.shape[-1]))
    return lambda: end(F.linear(x, weight, a["bias"]))


def _real_input(a: Args) -> Tensor:
    x = a["x"]
    if x.is_floating_point():
        return x
    if a.get("x_scales") is not None:
        return x.float() * a["x_scales"]
    return (x.float() - a["x_zero_point"]) * a["x_scale"]


def _ending(a: Args) -> Callable[[Tensor], Tensor]:
    """Residual and activation behind a product."""
    name, scalars, other = a["activation"], a["scalars"], a.get("other")
    if other is None:
        return lambda y: activate(y, name, scalars)
    if not other.is_floating_point():
        other = (other.float() - a["other_zero_point"]) * a["other_scale"]
    return lambda y: activate(y + other.to(y.dtype), name, scalars)


def linear_float(a: Args, device: str) -> Callable[[], Any]:
    """The layer in floating point, nothing quantized: what the model did before."""
    dtype, end = _float_of(a, device), _ending(a)
    x, weight = _real_input(a).to(dtype), _float_weight(a, dtype)
    bias = None if a["bias"] is None else a["bias"].to(dtype)
    return lambda: end(F.linear(x, weight, bias))


def _int_product(a: Args) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    x, weight, scales, bias, end = a["x"], a["weight"].t(), a["weight_scales"], a["bias"], _ending(a)
    _need(a["dtype"] is None or a["dtype"].is_floating_point, "the result is quantized")
    shift = a["weight"].sum(1, dtype=torch.int32)

    if x.is_floating_point():
        def rows(x: Tensor) -> Tensor:
            step = x.abs().amax(-1, keepdim=True).float() / 127
            y = torch._int_mm(torch.round(x.float() / step).to(torch.int8), weight).float() * step * scales
            return end(y if bias is None else y + bias).to(x.dtype)

        return rows, x
    if (steps := a.get("x_scales")) is not None:
        _need(x.dtype == torch.int8 and a.get("x_zero_points") is None, "rows with zero points")

        def scaled(x: Tensor) -> Tensor:
            y = torch._int_mm(x, weight).float() * (steps * scales)
            return end(y if bias is None else y + bias)

        return scaled, x
    scale, point = a["x_scale"], a["x_zero_point"] - 128
    signed = (x.to(torch.int16) - 128).to(torch.int8)

    def whole(x: Tensor) -> Tensor:
        y = (torch._int_mm(x, weight) - point * shift).float() * (scale * scales)
        return end(y if bias is None else y + bias)

    return whole, signed


def int_mm(a: Args, device: str) -> Callable[[], Any]:
    """``torch._int_mm`` and what follows, op by op."""
    call, x = _int_product(a)
    return lambda: call(x)


def int_mm_inductor(a: Args, device: str) -> Callable[[], Any]:
    """The same, compiled by Inductor."""
    call, x = _int_product(a)
    return _compiled(call, x)


def int_mm_autotuned(a: Args, device: str) -> Callable[[], Any]:
    """The same, with Inductor's autotuned templates."""
    call, x = _int_product(a)
    return _compiled(call, x, mode=_AUTOTUNE)


def onednn_linear(a: Args, device: str) -> Callable[[], Any]:
    """oneDNN's quantized linear, weights packed."""
    _need(device == "cpu" and a["x"].dtype == torch.uint8 and a.get("x_scales") is None, "for uint8 under one scale")
    _need(a["dtype"] in (None, torch.float32) and a["activation"] in ("none", "relu") and a["other"] is None, "for plain results")
    weight = torch.ops.onednn.qlinear_prepack(a["weight"], list(a["x"].shape))
    zeros, call = torch.zeros(a["weight"].shape[0], dtype=torch.int32), torch.ops.onednn.qlinear_pointwise.default
    return lambda: call(a["x"], a["x_scale"], a["x_zero_point"], weight, a["weight_scales"], zeros, a["bias"], 1.0, 0, torch.float32, a["activation"], [], "")


def _ao(a: Args, config: str, **options: Any) -> Callable[[], Any]:
    _need(importlib.util.find_spec("torchao") is not None, "torchao is not installed")
    _need(a["x"].is_floating_point(), "for float activations")
    from torchao import quantization

    weight = _float_weight(a, a["x"].dtype)
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=a["bias"] is not None, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if a["bias"] is not None:
            layer.bias.copy_(a["bias"])
    quantization.quantize_(layer, getattr(quantization, config)(**options))
    return _compiled(torch.nn.Sequential(layer), a["x"])


def scaled_mm(a: Args, device: str) -> Callable[[], Any]:
    """``torch._scaled_mm`` with a scale for each row, and what stands around it, op by op."""
    _need(device == "cuda" and a["by_row"], "for the GPU, a scale for each row")
    x, weight, scales, end, most = a["x"], a["weight"].t(), a["weight_scales"].float().reshape(1, -1), _ending(a), torch.finfo(a["kind"]).max

    def call() -> Tensor:
        step = x.abs().amax(-1, keepdim=True).float() / most
        y = torch._scaled_mm((x / step).to(a["kind"]), weight, step, scales, out_dtype=torch.bfloat16)
        return end(y if a["bias"] is None else y + a["bias"])

    return call


def torchao_dynamic(a: Args, device: str) -> Callable[[], Any]:
    """torchao's int8 weights and activations, rows quantized at run time, compiled as its documentation says."""
    return _ao(a, "Int8DynamicActivationInt8WeightConfig")


def torchao_w8(a: Args, device: str) -> Callable[[], Any]:
    """torchao's int8 weights, compiled."""
    return _ao(a, "Int8WeightOnlyConfig")


def aten_w8(a: Args, device: str) -> Callable[[], Any]:
    """ATen's int8 weight-only product."""
    x, weight, scales, bias, end = a["x"], a["weight"], a.get("weight_scales"), a["bias"], _ending(a)
    _need(scales is not None and weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0, "one scale per row, multiples of 16")
    half = x.to(torch.bfloat16), scales.to(torch.bfloat16)
    offset = None if bias is None else bias.to(torch.bfloat16)

    def call() -> Tensor:
        y = torch._weight_int8pack_mm(half[0], weight, half[1])
        return end(y if offset is None else y + offset)

    return call


def aten_w4(a: Args, device: str) -> Callable[[], Any]:
    """ATen's int4 weight-only product, weights packed."""
    group, x, bias, end = a["group"], a["x"].to(torch.bfloat16), a["bias"], _ending(a)
    q = weight_only.unpack(a["weight"])
    n, k = q.shape
    _need(group in (32, 64, 128, 256) and k % group == 0 and n % 16 == 0, "groups of 32 to 256, multiples of 16")
    scales, points = a["scales"].float(), a.get("zero_points")
    # its numbers are (q - 8) * scale + zero
    zeros = torch.zeros_like(scales) if points is None else (8 - points.float()) * scales
    both = torch.stack([scales.t(), zeros.t()], 2).to(torch.bfloat16).contiguous()
    offset = None if bias is None else bias.to(torch.bfloat16)
    if device == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        _need(k % 128 == 0, "multiples of 128")
        packed = torch.ops.aten._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8), 8)
        product = torch.ops.aten._weight_int4pack_mm

    def call() -> Tensor:
        y = product(x, packed, group, both)
        return end(y if offset is None else y + offset)

    return call


# -- convolution, attention, rows -----------------------------------------------------------------------------------


def conv_float(a: Args, device: str) -> Callable[[], Any]:
    """The convolution in floating point, channels last."""
    dtype, end = _float_of(a, device), _ending(a)
    x = _real_input(a).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (_float_weight(a, dtype) if a.get("weight_scales") is not None else a["weight"]).contiguous(memory_format=torch.channels_last)
    bias = None if a["bias"] is None else a["bias"].to(dtype)
    rest = a.get("stride") or 1, a["padding"], a.get("dilation") or 1, a.get("groups") or 1
    return lambda: end(F.conv2d(x, weight, bias, *rest))


def two_convolutions(a: Args, device: str) -> Callable[[], Any]:
    """One convolution after the other in floating point, channels last."""
    _need(a["other"] is None and a["inner"] in ("none", "relu"), "without a residual, activations none and relu")
    x, first, second = (t.contiguous(memory_format=torch.channels_last) for t in (a["x"], a["weight"], a["second"]))
    rest, between, end = (a["stride"], a["padding"], a["dilation"], len(first)), a["inner"] == "relu", _ending(a)

    def call() -> Tensor:
        z = F.conv2d(x, first, a["bias"], *rest)
        return end(F.conv2d(z.relu_() if between else z, second, a["second_bias"]))

    return call


def two_packed(a: Args, device: str) -> Callable[[], Any]:
    """The same through oneDNN's convolutions with weights packed and activations fused, as Inductor calls them."""
    _need(device == "cpu" and a["other"] is None and {a["inner"], a["activation"]} <= {"none", "relu"}, "on the CPU, without a residual, activations none and relu")
    ops, x = torch.ops.mkldnn, a["x"]
    stride, padding, dilation, channels = list(a["stride"]), list(a["padding"]), list(a["dilation"]), len(a["weight"])
    first = ops._reorder_convolution_weight(a["weight"], padding, stride, dilation, channels, list(x.shape))
    size = list(F.conv2d(x, a["weight"], None, stride, padding, dilation, channels).shape)
    second = ops._reorder_convolution_weight(a["second"], [0, 0], [1, 1], [1, 1], 1, size)

    def call() -> Tensor:
        z = ops._convolution_pointwise(x, first, a["bias"], padding, stride, dilation, channels, a["inner"], [], None)
        return ops._convolution_pointwise(z, second, a["second_bias"], [0, 0], [1, 1], [1, 1], 1, a["activation"], [], None)

    return call


def onednn_conv(a: Args, device: str) -> Callable[[], Any]:
    """oneDNN's quantized convolution, weights packed."""
    _need(device == "cpu" and a["x"].dtype == torch.uint8 and a["other"] is None and a["activation"] in ("none", "relu"), "for uint8, without residual")
    x, stride, padding = a["x"], list(a["stride"]), list(a["padding"])
    dilation, groups = list(a.get("dilation") or (1, 1)), a.get("groups") or 1
    weight = torch.ops.onednn.qconv_prepack(a["weight"], a["weight_scales"], a["x_scale"], a["x_zero_point"], stride, padding, dilation, groups, list(x.shape))
    zeros, call = torch.zeros(a["weight"].shape[0], dtype=torch.int32), torch.ops.onednn.qconv_pointwise.default
    return lambda: call(x, a["x_scale"], a["x_zero_point"], weight, a["weight_scales"], zeros, a["bias"], stride, padding, dilation, groups,
                        a["scale"], a["zero_point"], a["dtype"], a["activation"], [], "")  # fmt: skip


def sdpa(a: Args, device: str) -> Callable[[], Any]:
    """PyTorch's scaled dot product attention."""
    q, k, v = a["query"], a["key"], a["value"]
    _need(a["dtype"] is None or a["dtype"].is_floating_point, "the result is quantized")

    def call() -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v, a["mask"], is_causal=a["causal"], scale=a["attention_scale"], enable_gqa=k.shape[1] != q.shape[1])
        return y.transpose(1, 2).flatten(2) if a["merge"] else y

    return call


def _chain(op: str) -> Maker:
    def eager(a: Args, device: str) -> Callable[[], Any]:
        """The op's reference: a chain of ATen calls."""
        reference = _reference(op)
        return lambda: reference(**a)

    return eager


def _fused(op: str) -> Maker:
    def inductor(a: Args, device: str) -> Callable[[], Any]:
        """The op's reference, compiled by Inductor."""
        reference = _reference(op)
        return _compiled(lambda: reference(**a))

    return inductor


#: Arguments that don't change from call to call.
_FIXED = ("weight", "indices", "values", "columns", "starts", "weight_scales", "scales", "zero_points", "bias")


class _Layer(torch.nn.Module):
    """An op's reference with its weights as buffers, which Inductor may pack or compute with ahead."""

    def __init__(self, reference: Callable[..., Any], a: Args):
        super().__init__()
        self.reference, self.rest = reference, {}
        for name, value in a.items():
            if name in _FIXED and isinstance(value, Tensor):
                self.register_buffer(name, value)
            elif not isinstance(value, Tensor):
                self.rest[name] = value

    def forward(self, given: Args) -> Any:
        return self.reference(**self.rest, **given, **dict(self.named_buffers()))


def _tuned(op: str) -> Maker:
    def autotuned(a: Args, device: str) -> Callable[[], Any]:
        """The op's reference, compiled by Inductor with its templates tried and the weights frozen: what can be computed ahead is."""
        from torch._inductor import list_mode_options

        layer = _Layer(_reference(op), a).eval()
        given = {name: value for name, value in a.items() if isinstance(value, Tensor) and name not in _FIXED}
        return _compiled(layer, given, options={**list_mode_options(_AUTOTUNE), "freezing": True})

    return autotuned


def _both(op: str) -> dict[str, Maker]:
    return {"inductor": _fused(op), "autotuned": _tuned(op)}


_PRODUCT = {"float": linear_float}
_CONV = {"float": conv_float}

#: Peers by op; other ops have the chain of their reference, eager and compiled.
PEERS: dict[str, dict[str, Maker]] = {
    "graphwright.linear_int8": {**_PRODUCT, "int_mm": int_mm, "onednn": onednn_linear, "inductor": int_mm_inductor, "autotuned": int_mm_autotuned,
                                "torchao": torchao_dynamic},
    "graphwright.linear_fp8": {**_PRODUCT, "scaled_mm": scaled_mm, **_both("graphwright.linear_fp8")},
    "graphwright.linear_w8": {**_PRODUCT, "aten": aten_w8, "torchao": torchao_w8, **_both("graphwright.linear_w8")},
    "graphwright.linear_w8_groups": {**_PRODUCT, **_both("graphwright.linear_w8_groups")},
    "graphwright.linear_w4": {**_PRODUCT, "aten": aten_w4, **_both("graphwright.linear_w4")},
    "graphwright.linear_w4a8": {**_PRODUCT, **_both("graphwright.linear_w4a8")},
    "graphwright.linear_sparse24": {**_PRODUCT, **_both("graphwright.linear_sparse24")},
    "graphwright.linear_block_sparse": {**_PRODUCT, "dense_int8": dense_int8, "torch_bsr": torch_bsr, **_both("graphwright.linear_block_sparse")},
    "graphwright.conv2d_int8": {**_CONV, "onednn": onednn_conv, **_both("graphwright.conv2d_int8")},
    "graphwright.conv2d_winograd": {**_CONV, **_both("graphwright.conv2d_winograd")},
    "graphwright.conv2d_separable": {"float": two_convolutions, "packed": two_packed, **_both("graphwright.conv2d_separable")},
    "graphwright.attention": {"sdpa": sdpa, **_both("graphwright.attention")},
    "graphwright.attention_int8": {"sdpa": sdpa, **_both("graphwright.attention_int8")},
    "graphwright.attention_int8_qk": {"sdpa": sdpa, **_both("graphwright.attention_int8_qk")},
}  # fmt: skip


@functools.cache
def peers_of(op: str) -> dict[str, Maker]:
    """Peers of an op by name."""
    return PEERS.get(op) or {"eager": _chain(op), "inductor": _fused(op)}


#: All names that a peer can have.
NAMES = tuple(dict.fromkeys(["eager", "inductor", *(name for several in PEERS.values() for name in several)]))

#: Those that Inductor compiles: 10 to 40 s for each sample on a CPU.
COMPILED = frozenset({"inductor", "autotuned", "torchao"})

__all__ = ["COMPILED", "FLOOR_DB", "NAMES", "PEERS", "Absent", "peers_of"]
