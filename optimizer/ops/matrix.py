"""ATen rows: products of matrices and convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ops.axes import names
from graphwright.ops.registry import CONTRACTION, op

# -- products --------------------------------------------------------------------------------------------------------


def _linear_axes(**args: Any) -> str:
    return "* i, o i, o -> * o" if args["weight"].ndim == 2 else "* i, i -> *"


@op("aten.linear", axes=_linear_axes, traits={CONTRACTION})
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear: ``input @ weight.T + bias``; a weight without its first axis gives a result without its last."""
    y = torch.matmul(input, weight.transpose(0, 1) if weight.ndim == 2 else weight)
    return y if bias is None else y + bias


def _matmul_axes(**args: Any) -> str:
    a, b = args["self"], args.get("other", args.get("vec", args.get("tensor")))
    left = "i" if a.ndim == 1 else "* m i"
    right = "i" if b.ndim == 1 else "* i o"
    result = " ".join(["*"][: a.ndim > 2 or b.ndim > 2] + ["m"][: a.ndim > 1] + ["o"][: b.ndim > 1])
    return f"{left}, {right} -> {result}"


@op("aten.matmul", axes=_matmul_axes, traits={CONTRACTION})
def matmul(self: Tensor, other: Tensor) -> Tensor:
    """Product of two matrices, matrix and vector, or stacks of matrices, broadcast over their leading axes."""
    a = self if self.ndim > 1 else self.unsqueeze(0)
    b = other if other.ndim > 1 else other.unsqueeze(1)
    y = torch.einsum("...mi,...io->...mo", a, b)
    y = y if self.ndim > 1 else y.squeeze(-2)
    return y if other.ndim > 1 else y.squeeze(-1)


@op("aten.mm", axes="m i, i o -> m o", traits={CONTRACTION})
def mm(self: Tensor, mat2: Tensor) -> Tensor:
    """Product of two matrices."""
    return torch.einsum("mi,io->mo", self, mat2)


@op("aten.bmm", axes="b m i, b i o -> b m o", traits={CONTRACTION})
def bmm(self: Tensor, mat2: Tensor) -> Tensor:
    """Product of two stacks of matrices of the same length."""
    return torch.einsum("bmi,bio->bmo", self, mat2)


@op("aten.mv", axes=_matmul_axes, traits={CONTRACTION})
def mv(self: Tensor, vec: Tensor) -> Tensor:
    """Product of a matrix and a vector."""
    return torch.einsum("mi,i->m", self, vec)


@op("aten.dot", axes=_matmul_axes, traits={CONTRACTION})
def dot(self: Tensor, tensor: Tensor) -> Tensor:
    """Inner product of two vectors."""
    return torch.einsum("i,i->", self, tensor)


def _scaled(beta: Any, base: Tensor, alpha: Any, y: Tensor) -> Tensor:
    dtype, y = y.dtype, y if alpha == 1 else y * alpha
    return (y if beta == 0 else y + (base if beta == 1 else base * beta)).to(dtype)


def _added_axes(product: str) -> Any:
    """The rule of a product with a first operand that is broadcast to the result and added."""
    words = product.split(" -> ")[1].split()
    return lambda **args: f"{' '.join(words[len(words) - args['self'].ndim :])}, {product}"


@op("aten.addmm", axes=_added_axes("m i, i o -> m o"), traits={CONTRACTION})
def addmm(self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """``beta * self + alpha * (mat1 @ mat2)``; with beta 0, self is not even read."""
    return _scaled(beta, self, alpha, mm(mat1, mat2))


@op("aten.baddbmm", axes=_added_axes("b m i, b i o -> b m o"), traits={CONTRACTION})
def baddbmm(self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """``beta * self + alpha * (batch1 @ batch2)`` for stacks of matrices."""
    return _scaled(beta, self, alpha, bmm(batch1, batch2))


@op("aten.addmv", axes=_added_axes("m i, i -> m"), traits={CONTRACTION})
def addmv(self: Tensor, mat: Tensor, vec: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """``beta * self + alpha * (mat @ vec)``."""
    return _scaled(beta, self, alpha, mv(mat, vec))


@op("aten.outer", axes="m, o -> m o", traits={CONTRACTION})
def outer(self: Tensor, vec2: Tensor) -> Tensor:
    """Outer product of two vectors."""
    return self.unsqueeze(1) * vec2.unsqueeze(0)


@op("aten.bilinear", axes="* i, * j, o i j, o -> * o", traits={CONTRACTION})
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Bilinear: ``sum over i, j of input1[i] weight[o, i, j] input2[j]``, plus bias."""
    y = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return y if bias is None else y + bias


def _einsum_axes(**args: Any) -> str | None:
    equation: str = args["equation"].replace(" ", "")
    left, arrow, right = equation.partition("->")
    if "." in left:
        return None
    operands = left.split(",")
    if any(len(set(o)) != len(o) for o in operands):
        return None  # a diagonal
    if not arrow:
        right = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    return f"{', '.join(' '.join(o) for o in operands)} -> {' '.join(right)}"


@op("aten.einsum", axes=_einsum_axes, traits={CONTRACTION})
def einsum(equation: str, tensors: Sequence[Tensor], *, path: Sequence[int] | None = None) -> Tensor:
    """Einstein summation."""
    return torch.einsum(equation, *tensors)


def _cdist_flops(args: Any, out: Any) -> Any:
    return 3 * prod(out.shape) * args["x1"].shape[-1]


@op("aten.cdist", axes="* m i, * n i -> * m n", flops=_cdist_flops)
def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """Distance in p-norm between each row of x1 and each row of x2."""
    gap = (x1.unsqueeze(-2) - x2.unsqueeze(-3)).abs()
    if p == 0:
        return (gap != 0).sum(-1).to(x1.dtype)
    return gap.amax(-1) if p == float("inf") else gap.pow(p).sum(-1).pow(1 / p)


# -- convolution -----------------------------------------------------------------------------------------------------


def conv_axes(spatial: int, batched: bool, grouped: bool, transposed: bool = False) -> str:
    """The spelling of a convolution over so many spatial axes: input, weight and bias to result."""
    lead = "n " if batched else ""
    at, kernel = " ".join(names(spatial, "s")), " ".join(names(spatial, "k"))
    i, o = ("(g i)", "(g o)") if grouped else ("i", "o")
    weight = f"{i} o" if transposed else f"{o} i"
    return f"{lead}{i} {at}, {weight} {kernel}, {o} -> {lead}{o} " + " ".join(f"{s}'" for s in names(spatial, "s"))


def _conv_axes(**args: Any) -> str:
    spatial = args["weight"].ndim - 2
    transposed = args.get("transposed", "output_padding" in args)
    return conv_axes(spatial, args["input"].ndim == spatial + 2, args["groups"] != 1, transposed)


def _per_axis(value: Any, spatial: int) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * spatial if len(values) == 1 else values


def _correlate(x: Tensor, weight: Tensor, stride: list[Any], dilation: list[Any], groups: int) -> Tensor:
    """Correlation of padded ``x [n, g*i, *s]`` with ``weight [g*o, i, *k]``, by windows and a sum of products."""
    spatial = weight.ndim - 2
    kernel = weight.shape[2:]
    x = x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    for k in range(spatial):
        x = x.unfold(3 + k, (kernel[k] - 1) * dilation[k] + 1, stride[k])[..., :: dilation[k]]
    weight = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    at, taps = "uvw"[:spatial], "xyz"[:spatial]
    y = torch.einsum(f"ngi{at}{taps},goi{taps}->ngo{at}", x, weight)
    return y.flatten(1, 2)


def _convolve(input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, pads: list[tuple[Any, Any]],
              dilation: Any, groups: int) -> Tensor:  # fmt: skip
    spatial = weight.ndim - 2
    batched = input.ndim == spatial + 2
    x = F.pad(input if batched else input.unsqueeze(0), [p for pair in reversed(pads) for p in pair])
    y = _correlate(x, weight, _per_axis(stride, spatial), _per_axis(dilation, spatial), groups)
    y = y if bias is None else y + bias.reshape(-1, *[1] * spatial)
    return y if batched else y.squeeze(0)


def _both_sides(padding: Any, spatial: int) -> list[tuple[Any, Any]]:
    return [(p, p) for p in _per_axis(padding, spatial)]


def _named_padding(name: str, weight: Tensor, dilation: Any) -> list[tuple[Any, Any]]:
    """``"valid"``: none; ``"same"``: as much as keeps the size, the odd one at the end."""
    totals = [0 if name == "valid" else d * (k - 1)
              for d, k in zip(_per_axis(dilation, weight.ndim - 2), weight.shape[2:], strict=True)]  # fmt: skip
    return [(t // 2, t - t // 2) for t in totals]


def _conv(input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
          groups: int = 1) -> Tensor:  # fmt: skip
    """Convolution: ``input [n, g*i, *s]``, ``weight [g*o, i, *k]``; padding is a number per axis, "same" or "valid"."""
    named = isinstance(padding, str)
    pads = _named_padding(padding, weight, dilation) if named else _both_sides(padding, weight.ndim - 2)
    return _convolve(input, weight, bias, stride, pads, dilation, groups)


def _conv_transpose(input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
                    output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Tensor:  # fmt: skip
    """Transposed convolution: ``input [n, g*i, *s]``, ``weight [g*i, o, *k]``; zeros go between."""
    spatial = weight.ndim - 2
    batched = input.ndim == spatial + 2
    x = input if batched else input.unsqueeze(0)
    stride, dilation = _per_axis(stride, spatial), _per_axis(dilation, spatial)
    for k in range(spatial):
        x = x.unsqueeze(3 + k)
        x = F.pad(x, [0, 0] * (x.ndim - 4 - k) + [0, stride[k] - 1]).flatten(2 + k, 3 + k)
        x = x.narrow(2 + k, 0, x.shape[2 + k] - stride[k] + 1)
    full = [d * (n - 1) for d, n in zip(dilation, weight.shape[2:], strict=True)]
    pads = [(f - p, f - p + extra) for f, p, extra in
            zip(full, _per_axis(padding, spatial), _per_axis(output_padding, spatial), strict=True)]  # fmt: skip
    turned = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    y = _convolve(x, turned.flip(list(range(2, weight.ndim))), bias, 1, pads, dilation, groups)
    return y if batched else y.squeeze(0)


def _transpose_flops(args: Any, out: Any) -> Any:
    spatial = args["weight"].ndim - 2
    batch = args["input"].shape[0] if args["input"].ndim == spatial + 2 else 1
    return 2 * batch * prod(args["input"].shape[-spatial:]) * prod(args["weight"].shape)


for _rank in (1, 2, 3):
    op(f"aten.conv{_rank}d", axes=_conv_axes, traits={CONTRACTION}, overloads=("default", "padding"))(_conv)
    op(f"aten.conv_transpose{_rank}d", axes=_conv_axes, traits={CONTRACTION}, flops=_transpose_flops,
       overloads=("default",) if _rank == 1 else ("input",))(_conv_transpose)  # fmt: skip


def _convolution_flops(args: Any, out: Any) -> Any:
    if args["transposed"]:
        return _transpose_flops(args, out)
    return 2 * prod(out.shape) * prod(args["weight"].shape[1:])


@op("aten.convolution", axes=_conv_axes, traits={CONTRACTION}, flops=_convolution_flops)
def convolution(input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
                transposed: bool, output_padding: Any, groups: int) -> Tensor:  # fmt: skip
    """Convolution, transposed or not, of any rank."""
    if transposed:
        return _conv_transpose(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return _conv(input, weight, bias, stride, padding, dilation, groups)
