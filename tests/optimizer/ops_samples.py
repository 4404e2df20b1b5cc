"""Calls for every row of the op table: ``SAMPLES[name]`` is a list of ``maker -> (args..., [kwargs])``.

``test_ops.py`` reads this file; a row without samples fails there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Sample = Callable[["Maker"], tuple[Any, ...]]


class Maker:
    """Makes seeded tensors of one dtype."""

    def __init__(self, dtype: torch.dtype, seed: int = 0):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * 2).to(self.dtype)

    def positive(self, *shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=self.generator, dtype=torch.float64) * 3 + 1).to(self.dtype)

    def unit(self, *shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=self.generator, dtype=torch.float64) * 0.98 + 0.01).to(self.dtype)

    def index(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=self.generator)

    def mask(self, *shape: int) -> torch.Tensor:
        return torch.randint(0, 2, shape, generator=self.generator).bool()

    def special(self) -> torch.Tensor:
        if not self.dtype.is_floating_point:
            return self(5)
        return torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 2.5, -3.5], dtype=self.dtype)

    def permuted(self, shape: int | tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
        return self(*shape).permute(order)  # type: ignore[misc]

    def complex(self, *shape: int) -> torch.Tensor:
        return torch.complex(self(*shape), self(*shape))


SAMPLES: dict[str, list[Sample]] = {}


def add(names: str, *samples: Sample) -> None:
    for name in names.split():
        prefix = "" if name.startswith("graphwright.") else "aten."
        SAMPLES.setdefault(prefix + name, []).extend(samples)


def lam(body: str) -> Sample:
    """A sample from the text of its arguments; ``t`` is the maker."""
    return eval(f"lambda t: ({body},)", {"torch": torch})


def row(names: str, *bodies: str) -> None:
    add(names, *map(lam, bodies))


# -- pointwise -------------------------------------------------------------------------------------------------------

SHAPES = ("t(2, 3, 4)", "t()", "t(0, 3)", "t.permuted((4, 3, 5, 2), (0, 3, 1, 2))")
row("abs neg positive sign square exp exp2 expm1 sin cos atan sinh cosh tanh erf erfc floor ceil trunc "
    "round frac isnan isinf isfinite logical_not sigmoid log_sigmoid relu relu6 silu mish hardsigmoid "
    "hardswish gelu elu selu celu leaky_relu hardtanh softplus hardshrink softshrink nan_to_num real "
    "conj angle", *SHAPES)  # fmt: skip
row("abs sign isnan isinf isfinite relu nan_to_num exp tanh sigmoid ceil floor", "t.special()")
row("reciprocal sqrt rsqrt log log2 log10 log1p lgamma", "t.positive(2, 3, 4)", "t.positive()", "t.positive(0, 2)")
row("tan asin acos erfinv", "t.unit(2, 3, 4)", "t.unit()")
row("real imag conj abs", "t.complex(3, 4)")
SAMPLES["aten.angle"] = [lam("t.complex(3, 4)")]
row("imag", "t.complex(0)")
row("bitwise_not", "t.index(9, 3, 4)", "t.mask(5)")
row("round.decimals", "t(2, 3), {'decimals': 1}")
row("gelu", "t(2, 5), {'approximate': 'tanh'}")
row("elu", "t(3, 4), 0.5, 1.5, 2.0")
row("celu", "t(3, 4), 0.5")
row("leaky_relu hardshrink softshrink", "t(3, 4), 0.3")
row("hardtanh", "t(3, 4), -0.5, 2.0")
row("threshold", "t(3, 4), 0.1, 20.0")
row("softplus", "t(3, 4) * 20, 2.0, 5.0")
row("clamp clip", "t(3, 4), -1, 1", "t(3, 4), 0.5", "t(3, 4), None, 0.5", "t(2, 2), 1.0, -1.0", "t.special(), -1, 1")
row("clamp_min clamp_max", "t(3, 4), 0", "t(3, 4), 0.5")
row("nan_to_num", "t.special(), 1.0, 2.0, 3.0")
row("pow.Tensor_Scalar", "t(3, 4), 2", "t.positive(3, 4), -0.5", "t(3), 0")
row("pow.Scalar", "2, t(3, 4)", "0.5, t(3)")
row("prelu", "t(2, 3, 4), t(3)", "t(2, 3), t(1)", "t(4, 3), t(3)")
row("rrelu", "t(3, 4), 0.1, 0.4, False")
PAIRS = ("t(2, 3, 4), t(2, 3, 4)", "t(2, 3, 4), t(4)", "t(3, 1), t(1, 4)", "t(2, 0), t(1)", "t(), t(2)")
row("add.Tensor sub.Tensor rsub.Tensor mul.Tensor maximum minimum max.other min.other fmax fmin atan2 "
    "hypot copysign.Tensor logaddexp eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor "
    "logical_and logical_or logical_xor complex polar isclose", *PAIRS)  # fmt: skip
row("maximum minimum fmax fmin max.other eq.Tensor lt.Tensor", "t.special(), t.special().flip(0)")
row("add.Tensor sub.Tensor rsub.Tensor", "t(3), t(2, 3), {'alpha': 2}", "t(3), t.index(5, 3)",
    "t.index(5, 3), t.index(5, 3)")  # fmt: skip
row("add.Scalar sub.Scalar rsub.Scalar", "t(3, 4), 1.5", "t(3), 2, 3", "t.index(5, 3), 1.5")
row("mul.Scalar div.Scalar true_divide.Scalar eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar "
    "ge.Scalar copysign.Scalar", "t(3, 4), 1.5", "t(2), 2", "t.index(5, 3), 2")  # fmt: skip
row("div.Tensor true_divide.Tensor floor_divide remainder.Tensor fmod.Tensor",
    "t(2, 3, 4), t.positive(2, 3, 4)", "t(3, 1), t.positive(4)", "t.index(9, 4), t.index(3, 4) + 1")  # fmt: skip
row("floor_divide.Scalar remainder.Scalar fmod.Scalar", "t(3, 4), 1.5", "t.index(9, 4), 3", "t.index(9, 4) - 4, -3")
row("div.Tensor_mode", "t(3), t.positive(3), {'rounding_mode': 'floor'}",
    "t(3), t.positive(3), {'rounding_mode': 'trunc'}", "t(3), t.positive(3), {'rounding_mode': None}")  # fmt: skip
row("div.Scalar_mode", "t(3), 1.5, {'rounding_mode': 'floor'}", "t(3), 1.5, {'rounding_mode': None}")
row("pow.Tensor_Tensor", "t.positive(3, 4), t(4)", "t.positive(2), t()")
row("bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor __and__.Tensor __or__.Tensor __xor__.Tensor",
    "t.index(99, 3, 4), t.index(99, 4)", "t.mask(3), t.mask(2, 3)")  # fmt: skip
row("bitwise_and.Scalar bitwise_or.Scalar bitwise_xor.Scalar __and__.Scalar __or__.Scalar __xor__.Scalar",
    "t.index(99, 3, 4), 5")  # fmt: skip
row("bitwise_left_shift.Tensor bitwise_right_shift.Tensor", "t.index(99, 3, 4), t.index(4, 4)")
row("bitwise_left_shift.Tensor_Scalar bitwise_right_shift.Tensor_Scalar", "t.index(99, 3, 4), 2")
row("lerp.Scalar", "t(3, 4), t(4), 0.3")
row("lerp.Tensor", "t(3, 4), t(4), t.unit(3, 1)")
row("addcmul addcdiv", "t(3, 4), t(4), t.positive(3, 1)", "t(3), t(3), t.positive(3), {'value': 0.5}")
row("where.self", "t.mask(3, 1), t(3, 4), t(4)", "t.mask(3), t(), t(3)")
row("where.ScalarSelf", "t.mask(3, 4), 1.5, t(4)")
row("where.ScalarOther", "t.mask(3, 4), t(4), 0")
row("where.Scalar", "t.mask(3, 4), 1.0, 0.0")
row("masked_fill.Scalar", "t(3, 4), t.mask(3, 4), -1e4", "t(3, 4), t.mask(4), 2")
row("masked_fill.Tensor", "t(3, 4), t.mask(3, 1), t()")

# -- matrix ----------------------------------------------------------------------------------------------------------

row("linear", "t(2, 3, 4), t(5, 4), t(5)", "t(4), t(5, 4)", "t(0, 4), t(5, 4), t(5)", "t(2, 4), t(4)")
row("matmul", "t(3, 4), t(4, 5)", "t(4), t(4)", "t(4), t(4, 5)", "t(3, 4), t(4)",
    "t(2, 1, 3, 4), t(6, 4, 5)", "t(2, 3, 4), t(4)", "t(4), t(2, 4, 3)", "t(2, 0, 4), t(4, 5)")  # fmt: skip
row("mm", "t(3, 4), t(4, 5)")
row("bmm", "t(2, 3, 4), t(2, 4, 5)")
row("mv", "t(3, 4), t(4)")
row("dot", "t(4), t(4)")
row("outer", "t(3), t(4)")
row("addmm", "t(5), t(3, 4), t(4, 5)", "t(3, 5), t(3, 4), t(4, 5), {'beta': 0.5, 'alpha': 2}",
    "t(3, 1), t(3, 4), t(4, 5), {'beta': 0}")  # fmt: skip
row("baddbmm", "t(2, 3, 5), t(2, 3, 4), t(2, 4, 5)", "t(5), t(2, 3, 4), t(2, 4, 5), {'beta': 1, 'alpha': 0.5}")
row("addmv", "t(3), t(3, 4), t(4)", "t(3), t(3, 4), t(4), {'beta': 2, 'alpha': 3}")
row("bilinear", "t(2, 3), t(2, 4), t(5, 3, 4), t(5)", "t(2, 6, 3), t(2, 6, 4), t(5, 3, 4)")
row("einsum", "'bhqd,bhkd->bhqk', [t(2, 3, 4, 5), t(2, 3, 6, 5)]", "'ij,jk', [t(2, 3), t(3, 4)]",
    "'ii->i', [t(3, 3)]", "'...i,ij->...j', [t(2, 3, 4), t(4, 5)]", "'abc->ca', [t(2, 3, 4)]")  # fmt: skip
row("cdist", "t(3, 4), t(5, 4)", "t(2, 3, 4), t(2, 5, 4), 1.0", "t(3, 4), t(5, 4), float('inf')",
    "t(3, 4), t(5, 4), 0.0")  # fmt: skip
row("conv1d", "t(2, 4, 9), t(6, 4, 3), t(6)", "t(2, 4, 9), t(6, 2, 3), None, [2], [1], [2], 2", "t(4, 9), t(6, 4, 3)")
row("conv2d", "t(2, 4, 9, 8), t(6, 4, 3, 2), t(6), [2, 1], [1, 0]",
    "t(2, 4, 9, 8), t(4, 1, 3, 3), None, [1, 1], [1, 1], [2, 2], 4", "t(4, 5, 5), t(6, 4, 1, 1), t(6)",
    "t(1, 4, 7, 7), t(6, 2, 3, 3), t(6), [1, 2], [2, 0], [1, 1], 2",
    "t.permuted((2, 7, 7, 4), (0, 3, 1, 2)), t(3, 4, 3, 3)")  # fmt: skip
row("conv3d", "t(1, 2, 4, 5, 6), t(3, 2, 2, 3, 2), t(3), [1, 2, 1], [1, 1, 0]")
row("conv1d.padding", "t(2, 4, 9), t(6, 4, 4), t(6), [1], 'same'", "t(2, 4, 9), t(6, 4, 4), None, [2], 'valid'")
row("conv2d.padding", "t(2, 4, 9, 8), t(6, 2, 3, 2), t(6), [1, 1], 'same', [2, 1], 2")
row("conv3d.padding", "t(1, 2, 4, 5, 6), t(3, 2, 2, 3, 2), t(3), [1, 1, 1], 'same'")
row("conv_transpose1d", "t(2, 4, 5), t(4, 3, 3), t(3)",
    "t(2, 4, 5), t(4, 3, 3), None, [2], [1], [1], 2, [2]", "t(4, 5), t(4, 3, 3)")  # fmt: skip
row("conv_transpose2d.input", "t(2, 4, 5, 4), t(4, 3, 2, 3), t(3), [2, 3], [1, 0], [1, 1]",
    "t(2, 4, 3, 3), t(4, 3, 2, 2), t(6), [2, 2], [0, 0], [0, 0], 2")  # fmt: skip
row("conv_transpose3d.input", "t(1, 2, 3, 2, 3), t(2, 3, 2, 2, 2), t(3), [2, 1, 2]")
row("convolution", "t(2, 4, 9, 8), t(6, 2, 3, 2), t(6), [2, 1], [1, 0], [1, 1], False, [0, 0], 2",
    "t(2, 4, 5, 4), t(4, 3, 2, 3), None, [2, 3], [1, 0], [1, 1], True, [1, 1], 1")  # fmt: skip
row("graphwright.linear", "t(2, 3, 4), t(5, 4), t(5), t(2, 3, 5), 'gelu', []",
    "t(3, 4), t(5, 4), None, None, 'none', []", "t(3, 4), t(5, 4), None, t(5), 'leaky_relu', [0.1]")  # fmt: skip
row("graphwright.conv",
    "t(2, 4, 7, 8), t(6, 2, 3, 3), t(6), [2, 1], [1, 1], [1, 1], 2, t(2, 6, 4, 8), 'hardtanh', [0.0, 6.0]",
    "t(4, 9), t(6, 4, 3), None, [1], [0], [1], 1, None, 'silu', []",
    "t(1, 2, 4, 4, 4), t(3, 2, 1, 1, 1), t(3), [1, 1, 1], [0, 0, 0], [1, 1, 1], 1, t(1), 'none', []")  # fmt: skip
row("graphwright.quantize", "t(3, 4), 0.05, 3, -128, 127, torch.int8",
    "t.special(), 0.5, 100, 0, 255, torch.uint8", "t(3), 1e-6, 0, -2**31, 2**31 - 1, torch.int32",
    "t(3), 0.1, 0, -8, 7, torch.float32")  # fmt: skip
row("graphwright.dequantize", "t.index(255, 3, 4).to(torch.uint8), 0.05, 128, torch.float32",
    "t.index(9, 3).to(torch.int32), 0.5, 0, torch.float64")  # fmt: skip
row("graphwright.quantize_channel", "t(3, 4), torch.tensor([0.1, 0.2, 0.3]), None, 0, -127, 127, torch.int8",
    "t(3, 4), torch.rand(3, 2) + 0.1, torch.zeros(3, 2, dtype=torch.int32), 0, -8, 7, torch.int8",
    "t(2, 3, 4), torch.rand(4) + 0.1, torch.tensor([1, 2, 3, 4]), -1, 0, 255, torch.uint8")  # fmt: skip
row("graphwright.dequantize_channel", "t.index(9, 3, 4).to(torch.int8), torch.rand(3), None, 0, torch.float32",
    "t.index(9, 3, 4).to(torch.int8), torch.rand(3, 2), torch.ones(3, 2), 1, torch.bfloat16")  # fmt: skip
row("graphwright.dequantize_packed", "t.index(255, 3, 4).to(torch.uint8), torch.rand(3, 2), t.index(9, 3, 2), 4, torch.float32",
    "t.index(255, 2, 3, 5).to(torch.uint8), torch.rand(2, 3, 4), None, 3, torch.bfloat16", "t.index(255, 3, 4).to(torch.uint8), torch.rand(3, 1), None, 99, torch.float32")  # fmt: skip

row("graphwright.quantize_dynamic", "t(2, 3, 4), True, True, -127, 127, torch.int8",
    "t(3, 4), False, False, 0, 255, torch.uint8")  # fmt: skip
row("graphwright.dequantize_dynamic",
    "t.index(9, 3, 4).to(torch.int8), torch.rand(3, 1), torch.ones(3, 1, dtype=torch.int32),"
    " torch.float32")  # fmt: skip
row("graphwright.quantize_rows", "t(2, 3, 4)", "t.permuted((4, 1, 3), (1, 2, 0))", "t(0, 4)")
row("graphwright.norm_quantize_rows", "t(2, 3, 4), None, t(4), t(4), 1e-5, False, False, False",
    "t(3, 4), t(3, 4), t(4), None, 1e-6, True, True, True")  # fmt: skip
row("graphwright.activate_quantize_rows", "t(2, 3, 4), None, 'gelu', []", "t(3, 4), t(3, 4), 'silu', []")

# -- normalisation, softmax, attention -------------------------------------------------------------------------------

row("layer_norm", "t(2, 3, 4), [4], t(4), t(4)", "t(2, 3, 4), [3, 4], t(3, 4), None, 1e-3", "t(5, 4), [4]")
row("native_layer_norm", "t(2, 3, 4), [4], t(4), t(4), 1e-5", "t(2, 3, 4), [3, 4], None, None, 1e-5")
row("rms_norm", "t(2, 3, 4), [4], t(4), 1e-6", "t(2, 3, 4), [3, 4]")
row("group_norm", "t(2, 6, 4, 5), 3, t(6), t(6)", "t(2, 4, 3), 2", "t(2, 4), 2, t(4), None")
row("instance_norm", "t(2, 3, 4, 5), t(3), t(3), None, None, True, 0.1, 1e-5, False",
    "t(2, 3, 4), None, None, t(3), t.positive(3), False, 0.1, 1e-5, False")  # fmt: skip
row("batch_norm", "t(2, 3, 4, 5), t(3), t(3), t(3), t.positive(3), False, 0.1, 1e-5, False",
    "t(4, 3), None, None, t(3), t.positive(3), False, 0.1, 1e-3, False",
    "t(4, 3, 2), t(3), t(3), None, None, True, 0.1, 1e-5, False")  # fmt: skip
row("_native_batch_norm_legit_functional", "t(4, 3, 5), t(3), t(3), t(3), t.positive(3), True, 0.1, 1e-5")
row("_native_batch_norm_legit_no_training", "t(4, 3, 5), t(3), t(3), t(3), t.positive(3), 0.1, 1e-5")
row("_weight_norm", "t(3, 4, 5), t.positive(3, 1, 1)", "t(3, 4, 5), t.positive(1, 1, 5), 2")
row("softmax.int log_softmax.int", "t(2, 3, 4), -1", "t(2, 3, 4), 0", "t(3, 4), 1, torch.float64")
row("_softmax _log_softmax", "t(2, 3, 4), -1, False")
row("_safe_softmax", "t(2, 3, 4), -1", "torch.full((2, 3), float('-inf'), dtype=t.dtype), 1")
row("scaled_dot_product_attention", "t(2, 3, 4, 8), t(2, 3, 5, 8), t(2, 3, 5, 8)",
    "t(2, 3, 4, 8), t(2, 3, 5, 8), t(2, 3, 5, 8), t.mask(2, 1, 4, 5)",
    "t(2, 3, 4, 8), t(2, 3, 5, 8), t(2, 3, 5, 8), t(4, 5)",
    "t(2, 4, 8), t(2, 4, 8), t(2, 4, 8), None, 0.0, True, {'scale': 0.3}",
    "t(2, 4, 5, 8), t(2, 2, 5, 8), t(2, 2, 5, 6), None, 0.0, True, {'enable_gqa': True}",
    "t(1, 1, 3, 4), t(1, 1, 3, 4), t(1, 1, 3, 4),"
    "torch.tensor([[True, False, True], [False] * 3, [True] * 3])")  # fmt: skip
row("dropout alpha_dropout", "t(3, 4), 0.5, False")
row("feature_dropout", "t(2, 3, 4), 0.5, False")
row("native_dropout", "t(3, 4), 0.5, False")

# -- reductions ------------------------------------------------------------------------------------------------------

row("sum mean max min argmax argmin prod any all count_nonzero", "t(2, 3, 4)", "t(5)", "t()")
row("std var", "t(2, 3, 4)", "t(5), False")
row("sum any all", "t.mask(3, 4)")
row("sum.dim_IntList", "t(2, 3, 4), [1]", "t(2, 3, 4), [0, -1], True", "t(2, 3, 4), None",
    "t.mask(3, 4), [0]", "t(3, 0), [1]", "t(3), [0], False, {'dtype': torch.float64}")  # fmt: skip
row("mean.dim", "t(2, 3, 4), [1]", "t(2, 3, 4), [0, -1], True", "t(2, 3, 4), None",
    "t(3), [0], False, {'dtype': torch.float64}")  # fmt: skip
row("amax amin", "t(2, 3, 4)", "t(2, 3, 4), [1]", "t(2, 3, 4), [0, 2], True", "t.special(), [0]")
row("max.dim min.dim", "t(2, 3, 4), 1", "t(2, 3, 4), -1, True")
row("argmax argmin", "t(2, 3, 4), 1", "t(2, 3, 4), -1, True")
row("prod.dim_int", "t(2, 3, 4), 1", "t(2, 3, 4), -1, True")
row("any.dim all.dim", "t.mask(2, 3, 4), 1", "t.mask(2, 3), -1, True")
row("any.dims all.dims", "t.mask(2, 3, 4), [1, 2]", "t.mask(2, 3), None, True")
row("count_nonzero.dim_IntList", "t.mask(2, 3, 4), [1]")
row("std.dim var.dim", "t(2, 3, 4), [1]", "t(2, 3, 4), [1, 2], False, True", "t(2, 3, 4), None")
row("std.correction var.correction var_mean.correction", "t(2, 3, 4), [1]",
    "t(2, 3, 4), [1, 2], {'correction': 0, 'keepdim': True}", "t(2, 3), None, {'correction': 2}")  # fmt: skip
row("linalg_vector_norm", "t(2, 3, 4)", "t(2, 3, 4), 1, [1]", "t(2, 3, 4), 3.0, [1, 2], True",
    "t(2, 3), float('inf'), [1]", "t(2, 3), 0, [1]", "t(2, 3), float('-inf')")  # fmt: skip
row("norm.ScalarOpt_dim", "t(2, 3, 4), 2, [1]", "t(2, 3, 4), None, [1, 2], True")
row("norm.ScalarOpt_dim_dtype", "t(2, 3, 4), 2, [1], False, {'dtype': torch.float64}")
row("norm.Scalar", "t(2, 3)", "t(2, 3), 1")
row("cosine_similarity", "t(2, 3, 4), t(2, 3, 4)", "t(2, 3, 4), t(2, 1, 4), -1")
row("logsumexp", "t(2, 3, 4), [1]", "t(2, 3, 4), [0, 2], True", "torch.full((2,), float('-inf'), dtype=t.dtype), [0]")
row("cumsum cumprod", "t(2, 3, 4), 1", "t(3), 0", "t.index(5, 3), 0")
row("sort argsort", "t(2, 3, 4)", "t(2, 3, 4), 1, True")
row("sort.stable", "t(2, 3, 4), {'stable': True, 'dim': 1}")
row("topk", "t(2, 5), 2", "t(4, 3), 2, 0, False")
row("diff", "t(2, 5)", "t(4, 3), 2, 0", "t(2, 3), 1, -1, t(2, 1), t(2, 2)")

# -- windows ---------------------------------------------------------------------------------------------------------

for n, spatial in ((1, (9,)), (2, (9, 8)), (3, (5, 6, 4))):
    s, two, one = ", ".join(map(str, spatial)), [2] * n, [1] * n
    row(f"max_pool{n}d max_pool{n}d_with_indices", f"t(2, 3, {s}), {[3] * n}, {two}, {one}", f"t(2, 3, {s}), {two}",
        f"t(3, {s}), {two}, {two}, {[0] * n}, {one}, True",
        f"t(2, 3, {s}), {two}, {one}, {[0] * n}, {two}")  # fmt: skip
    row(f"avg_pool{n}d", f"t(2, 3, {s}), {[3] * n}, {two}, {one}", f"t(2, 3, {s}), {two}, {[3] * n}, {[0] * n}, True", 
        f"t(3, {s}), {[3] * n}, {two}, {one}, True, False")  # fmt: skip
    row(f"adaptive_avg_pool{n}d", f"t(2, 3, {s}), {[3] * n}", f"t(3, {s}), {one}")
    row(f"adaptive_max_pool{n}d", f"t(2, 3, {s}), {[3] * n}")
    row(f"reflection_pad{n}d replication_pad{n}d", f"t(2, 3, {s}), {[2, 1] * n}")
    vec = f"t(2, 3, {s}), {[7] * n}"
    row(f"upsample_nearest{n}d.vec _upsample_nearest_exact{n}d.vec", f"{vec}, None", f"t(2, 3, {s}), None, {[1.7] * n}")
    row(f"upsample_nearest{n}d _upsample_nearest_exact{n}d", vec)
    linear = ("linear1d", "bilinear2d", "trilinear3d")[n - 1]
    for name in [linear] + ["bicubic2d"] * (n == 2):
        row(f"upsample_{name}.vec", f"{vec}, False, None", f"{vec}, True, None",
            f"t(2, 3, {s}), None, False, {[2.0] * n}")  # fmt: skip
        row(f"upsample_{name}", f"{vec}, False", f"t(2, 3, {s}), {two}, True")
row("_adaptive_avg_pool2d", "t(2, 3, 9, 8), [3, 2]")
row("_adaptive_avg_pool3d", "t(2, 3, 5, 6, 4), [3, 2, 2]")
row("avg_pool2d", "t(2, 3, 9, 8), [3, 3], [2, 2], [1, 1], True, True",
    "t(2, 3, 9, 8), [3, 3], [], [0, 0], False, True, 5")  # fmt: skip
row("grid_sampler", "t(2, 3, 4, 5), t.unit(2, 6, 7, 2), 0, 0, False", "t(2, 3, 4, 5), t(2, 6, 7, 2), 1, 1, True")
row("affine_grid_generator", "t(2, 2, 3), [2, 3, 4, 5], False")
row("pad", "t(2, 3, 4), [1, 2]", "t(2, 3, 4), [1, 0, 0, 2], 'constant', 1.5", "t(2, 3, 4), [-1, 1]",
    "t(2, 3, 5), [2, 1], 'reflect'", "t(2, 3, 5), [2, 1], 'replicate'", "t(2, 3, 5), [2, 1], 'circular'",
    "t(2, 3, 5, 4), [1, 2, 3, 1], 'reflect'")  # fmt: skip
row("constant_pad_nd", "t(2, 3, 4), [1, 2, 0, 1]", "t(2, 3), [1, 2], 3")
row("pixel_shuffle", "t(2, 8, 3, 4), 2", "t(9, 2, 2), 3")
row("pixel_unshuffle", "t(2, 2, 6, 4), 2")
row("channel_shuffle", "t(2, 6, 3, 4), 3")
row("im2col", "t(2, 3, 6, 5), [2, 3], [1, 1], [1, 0], [2, 1]")
row("col2im", "t(2, 12, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]")

# -- shapes ----------------------------------------------------------------------------------------------------------

row("view _unsafe_view reshape", "t(2, 12, 5), [2, 3, 4, 5]", "t(2, 3, 4), [6, 4]", "t(2, 3, 4), [-1]",
    "t(2, 6, 4), [2, -1, 8]", "t(0, 4), [0, 2, 2]", "t(), [1, 1]", "t(1, 6, 1), [6]",
    "t(3, 8, 6), [3, 16, 3]")  # fmt: skip
row("reshape", "t(2, 3, 4).transpose(1, 2), [2, 12]")
row("view_as reshape_as", "t(2, 12), t(2, 3, 4)")
row("flatten.using_ints", "t(2, 3, 4)", "t(2, 3, 4, 5), 1, 2", "t(2, 3, 4), -2", "t()")
row("unflatten.int", "t(2, 12, 3), 1, [3, 4]", "t(2, 12), -1, [-1, 6]")
row("squeeze", "t(2, 1, 3, 1)", "t(3)")
row("squeeze.dim", "t(2, 1, 3), 1", "t(2, 1, 3), 0", "t(2, 3, 1), -1")
row("squeeze.dims", "t(1, 2, 1, 1), [0, 3]")
row("unsqueeze", "t(2, 3), 0", "t(2, 3), -1", "t(2, 3), 1", "t(), 0")
row("permute", "t(2, 3, 4), [2, 0, 1]", "t(2, 3), [-1, 0]")
row("transpose.int swapaxes swapdims", "t(2, 3, 4), 1, 2", "t(2, 3, 4), -1, 0", "t(), 0, 0")
row("t", "t(2, 3)", "t(3)")
row("numpy_T mT", "t(2, 3)")
row("mT", "t(4, 2, 3)")
row("movedim.int moveaxis.int", "t(2, 3, 4), 0, -1", "t(2, 3, 4), 2, 0")
row("movedim.intlist moveaxis.intlist", "t(2, 3, 4), [0, 1], [1, 2]")
row("expand", "t(2, 1, 3), [2, 4, 3]", "t(3), [2, 3]", "t(1, 3), [-1, -1]", "t(2, 1), [5, -1, 4]")
row("expand_as", "t(2, 1, 3), t(2, 4, 3)")
row("broadcast_to", "t(1, 3), [2, 2, 3]")
row("repeat", "t(2, 3), [2, 1]", "t(2, 3), [4, 1, 2]", "t(3), [0]", "t(3), [1]")
row("tile", "t(2, 3), [2]", "t(2, 3), [4, 1, 2]")
row("repeat_interleave.self_int", "t(2, 3), 2", "t(2, 3), 3, 0", "t(2, 3), 2, -1")
row("slice.Tensor", "t(5, 4), 0, 1, 3", "t(5, 4), 1, 0, 9223372036854775807", "t(5, 4), -1, -3, -1",
    "t(7, 2), 0, 1, None, 2", "t(5), 0, 4, 2", "t(5), 0, None, -2")  # fmt: skip
row("narrow", "t(5, 4), 0, 1, 3", "t(5, 4), 1, -2, 2")
row("select.int", "t(5, 4), 0, 2", "t(5, 4, 3), 1, -1")
row("split.Tensor", "t(7, 4), 3", "t(4, 6), 2, 1", "t(4, 6), 6, -1")
row("split.sizes split_with_sizes split_with_sizes_copy", "t(7, 4), [3, 4]", "t(4, 6), [1, 2, 3], -1")
row("chunk", "t(7, 4), 3", "t(4, 6), 2, -1", "t(2, 3), 5, 1")
row("tensor_split.sections", "t(7, 4), 3", "t(2, 8), 4, 1")
row("tensor_split.indices", "t(7, 4), [2, 5]")
row("unbind.int", "t(3, 4)", "t(3, 4), -1")
row("unfold", "t(3, 9), 1, 3, 2")
row("diagonal", "t(4, 4)", "t(2, 3, 4), 1, 1, 2")
row("cat concat", "[t(2, 3), t(4, 3)]", "[t(2, 3), t(2, 1), t(2, 2)], -1", "[t(3)]", "[t(0), t(2, 3)]")
row("graphwright.cache_append", "t(2, 3, 4, 5), t(2, 3, 1, 5)", "t(1, 1, 2, 3), t(1, 1, 2, 3)", "t(2, 3, 0, 5), t(2, 3, 1, 5)")
row("stack", "[t(2, 3), t(2, 3)]", "[t(2, 3), t(2, 3), t(2, 3)], -1")
row("flip", "t(2, 3, 4), [1]", "t(2, 3, 4), [0, -1]")
row("roll", "t(4, 5), [1], [0]", "t(4, 5), [1, -2], [0, 1]", "t(2, 3), [2]")
row("meshgrid", "[t(2), t(3)]")
row("meshgrid.indexing", "[t(2), t(3)], {'indexing': 'xy'}")
row("broadcast_tensors", "[t(2, 1), t(3)]")
row("view_as_complex", "t(3, 2)")
row("view_as_real", "t.complex(3, 4)")
row("to.dtype", "t(2, 3), torch.float64", "t(2, 3), torch.int64", "t(2, 3), torch.bfloat16",
    "t.permuted((2, 4, 5, 3), (0, 3, 1, 2)), torch.float16")  # fmt: skip
row("to.device", "t(2, 3), torch.device('cpu'), torch.float64")
row("to.dtype_layout", "t(2, 3), {'dtype': torch.float64, 'device': torch.device('cpu')}")
row("to.other", "t(2, 3), t.index(3, 2)")
row("type_as", "t(2, 3), t.index(3, 2)", "t(2, 3), t(1)")
row("_to_copy", "t(2, 3), {'dtype': torch.float64}", "t(2, 3)")
row("contiguous", "t(2, 3).T", "t(2, 3, 4, 5), {'memory_format': torch.channels_last}")
row("clone", "t(2, 3).T", "t(2, 3, 4, 5), {'memory_format': torch.channels_last}")
row("detach alias lift_fresh_copy lift_fresh", "t(2, 3)")
row("sym_size.int", "t(2, 3), 1", "t(2, 3), -1")
row("sym_numel", "t(2, 3)")
row("sym_stride.int", "t(2, 3), 0")

# -- indices ---------------------------------------------------------------------------------------------------------

row("embedding", "t(9, 4), t.index(9, 2, 3)", "t(9, 4), t.index(9, 5), 0", "t(9, 4), t.index(9)")
row("embedding_bag", "t(9, 4), t.index(9, 6), torch.tensor([0, 2, 5])")
row("embedding_bag.padding_idx", "t(9, 4), t.index(9, 6), torch.tensor([0, 2, 5]), False, 1, False, None, False, None")
row("one_hot", "t.index(5, 2, 3), 5")
row("index_select", "t(5, 4), 0, t.index(5, 3)", "t(5, 4), -1, t.index(4, 7)", "t(5), 0, t.index(5, 1)[0]")
row("index.Tensor", "t(5, 4), [t.index(5, 2, 3)]", "t(5, 4, 3), [None, t.index(4, 2)]",
    "t(5, 4, 3), [t.index(5, 2), t.index(4, 2)]", "t(5, 4, 3), [t.index(5, 2), None, t.index(3, 2)]",
    "t(5, 4), [t.mask(5)]", "t(5, 4, 3), [None, t.index(4, 2, 1), t.index(3, 6)]")  # fmt: skip
row("gather", "t(3, 4), 1, t.index(4, 2, 3)", "t(3, 4), 0, t.index(3, 5, 4)", "t(), 0, t.index(1)")
row("take_along_dim", "t(3, 4), t.index(4, 3, 2), 1", "t(3, 4), t.index(12, 5)")
row("scatter.src scatter_add", "t(3, 4), 1, torch.argsort(torch.rand(3, 4), 1)[:, :2], t(3, 2)")
row("scatter.value", "t(3, 4), 1, t.index(4, 3, 2), 1.5")
row("scatter_reduce.two", "t(3, 4), 1, t.index(4, 3, 2), t(3, 2), 'amax'")
row("index_put", "t(5, 4), [torch.tensor([0, 2])], t(2, 4)",
    "t(5, 4), [torch.tensor([0, 0])], t(2, 4), True", "t(5, 4), [t.mask(5, 4)], t()",
    "t(3, 4), [None, torch.tensor([1])], t(1)")  # fmt: skip
row("index_add index_copy", "t(5, 4), 0, torch.tensor([0, 2]), t(2, 4)")
row("index_add", "t(5, 4), 1, torch.tensor([1, 1]), t(5, 2), {'alpha': 2}")
row("index_fill.int_Scalar", "t(5, 4), 0, torch.tensor([0, 2]), 7")
row("index_fill.int_Tensor", "t(5, 4), 0, torch.tensor([0, 2]), t()")
row("select_scatter", "t(5, 4), t(4), 0, 2")
row("slice_scatter", "t(5, 4), t(2, 4), 0, 1, 3", "t(6, 4), t(3, 4), 0, 0, None, 2")
row("diagonal_scatter", "t(4, 4), t(4)")
row("bucketize.Tensor", "t(3, 4), torch.tensor([-1, 0, 1]).to(t.dtype)",
    "t(3), torch.tensor([0, 1]).to(t.dtype), {'right': True, 'out_int32': True}")  # fmt: skip
row("searchsorted.Tensor", "torch.tensor([-1, 0, 1]).to(t.dtype), t(3, 4)")
row("isin.Tensor_Tensor", "t.index(5, 3, 4), t.index(5, 2)", "t.index(5, 3), t.index(5, 2), {'invert': True}")
row("tril triu", "t(3, 4)", "t(2, 4, 3), 1", "t(3, 3), -1")
row("glu", "t(2, 6)", "t(2, 6, 4), 1")

# -- creation --------------------------------------------------------------------------------------------------------

row("zeros ones empty.memory_format rand randn", "[2, 3]", "[2, 3], {'dtype': torch.float64}", "[]")
row("zeros", "[2], {'dtype': torch.bool}")
row("full", "[2, 3], 1.5", "[2], 3", "[2], True", "[], 2, {'dtype': torch.float64}")
row("scalar_tensor", "2.5", "2, {'dtype': torch.int64}")
row("new_zeros new_ones new_empty", "t(2), [3, 4]", "t(2), [3], {'dtype': torch.int64}")
row("new_full", "t(2), [3, 4], 2")
row("zeros_like ones_like empty_like rand_like randn_like", "t.permuted((2, 4, 5, 3), (0, 3, 1, 2))")
row("zeros_like ones_like empty_like", "t(2, 3), {'dtype': torch.bool}")
row("full_like", "t(2, 3), 2.0", "t(2, 3), True, {'dtype': torch.bool}")
row("fill.Scalar", "t(2, 3), 1.5")
row("fill.Tensor", "t(2, 3), t()")
row("copy", "t(2, 3), t(3)", "t(2, 3), t.index(5, 2, 3)")
row("arange", "5", "4.5", "5, {'dtype': torch.float64}")
row("arange.start", "2, 7", "0, 3, {'dtype': torch.float32}")
row("arange.start_step", "0, 10, 3", "1.0, 2.0, 0.25", "5, 0, -2")
row("linspace", "0, 1, 5", "-1.5, 2, 4, {'dtype': torch.float64}", "3, 4, 1")
row("eye", "3", "2, {'dtype': torch.int64}")
row("eye.m", "3, 2")
row("hann_window", "8", "5, {'dtype': torch.float32}")
row("hann_window.periodic", "8, False")
row("randint", "5, [2, 3]")
row("randint.low", "2, 5, [2, 3]")
row("bernoulli", "t.unit(3, 4)")
row("multinomial", "t.unit(3, 4), 2")

# -- recurrent, signals, losses --------------------------------------------------------------------------------------


def weights(
    t: Maker, gates: int, inputs: int, hidden: int, layers: int, directions: int, biases: bool
) -> list[torch.Tensor]:
    found = []
    for layer in range(layers):
        for _ in range(directions):
            wide = inputs if layer == 0 else hidden * directions
            found += [t(gates * hidden, wide), t(gates * hidden, hidden)] + [t(gates * hidden)] * (2 * biases)
    return found


def recurrent(names: str, gates: int, states: int, layers: int, directions: int, biases: bool, first: bool) -> None:
    """One sample: 5 steps, batch 2, 3 inputs, 4 hidden."""

    def sample(t: Maker) -> tuple[Any, ...]:
        x = t(2, 5, 3) if first else t(5, 2, 3)
        state = [t(layers * directions, 2, 4) for _ in range(states)]
        hx = state if states > 1 else state[0]
        made = weights(t, gates, 3, 4, layers, directions, biases)
        return x, hx, made, biases, layers, 0.0, False, directions == 2, first

    add(names, sample)


recurrent("lstm.input", 4, 2, layers=2, directions=1, biases=True, first=False)
recurrent("lstm.input", 4, 2, layers=1, directions=2, biases=False, first=True)
recurrent("gru.input", 3, 1, layers=2, directions=2, biases=True, first=False)
recurrent("rnn_tanh.input rnn_relu.input", 1, 1, layers=1, directions=1, biases=True, first=True)
row("lstm.input",
    "t(5, 2, 3), [t(1, 2, 2), t(1, 2, 4)], [t(16, 3), t(16, 2), t(16), t(16), t(2, 4)], True, 1, 0.0, False, False, False"
)  # fmt: skip
row("lstm_cell", "t(2, 3), [t(2, 4), t(2, 4)], t(16, 3), t(16, 4), t(16), t(16)",
    "t(2, 3), [t(2, 4), t(2, 4)], t(16, 3), t(16, 4)")  # fmt: skip
row("gru_cell", "t(2, 3), t(2, 4), t(12, 3), t(12, 4), t(12), t(12)")
row("fft_fft fft_rfft fft_ifft", "t(3, 8)", "t(3, 7)", "t(4, 3), None, 0, 'ortho'", "t(3, 8), 5",
    "t(3, 4), 6, 1, 'forward'")  # fmt: skip
row("fft_fft fft_ifft", "t.complex(2, 5)")
row("fft_irfft", "t.complex(3, 5)", "t.complex(3, 4), 7", "t.complex(4, 3), None, 0, 'ortho'", "t.complex(3, 4), 4")
row("stft", "t(2, 64), 16, 4, None, t.unit(16), False, True, True", "t(40), 8, None, 6, None, True, None, False")
row("stft.center", "t(2, 64), 16, 4, None, t.unit(16), True, 'reflect', False, True, True",
    "t(40), 8, 3, 5, t.unit(5), False, 'constant', False, False, True")  # fmt: skip
row("mse_loss l1_loss smooth_l1_loss huber_loss", "t(3, 4), t(3, 4)", "t(3, 4), t(3, 4), 0", "t(3, 4), t(3, 4), 2")
row("smooth_l1_loss huber_loss", "t(3, 4), t(3, 4), 1, 0.5")
row("binary_cross_entropy", "t.unit(3, 4), t.unit(3, 4)", "t.unit(3), t.unit(3), t.unit(3), 2")
row("binary_cross_entropy_with_logits", "t(3, 4), t.unit(3, 4)", "t(3, 4), t.unit(3, 4), t.unit(4), t.unit(4), 0")
row("kl_div", "t(3, 4), t.unit(3, 4)", "t(3, 4), t(3, 4), 2, {'log_target': True}")
row("nll_loss_nd", "t(3, 4), t.index(4, 3)", "t(3, 4, 5), t.index(4, 3, 5), t.unit(4)",
    "t(3, 4), torch.tensor([1, -100, 2]), None, 2")  # fmt: skip
row("cross_entropy_loss", "t(3, 4), t.index(4, 3)", "t(3, 4, 5), t.index(4, 3, 5), t.unit(4), 0",
    "t(3, 4), t.unit(3, 4), None, 1, -100, 0.1", "t(3, 4), t.index(4, 3), t.unit(4), 1, -100, 0.1",
    "t(4), t.index(4)")  # fmt: skip
