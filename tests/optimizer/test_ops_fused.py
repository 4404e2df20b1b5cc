"""Our own ops: what they compute, on any input, and their gradients; activations there and back."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphwright.errors import InternalError
from graphwright.ir import normalise
from graphwright.ops import fused
from graphwright.ops.fused import ACTIVATIONS, activate, activation_call, activation_of

g = torch.ops.graphwright
SCALARS = {"hardtanh": (-0.5, 2.0), "leaky_relu": (0.3,), "elu": (0.7,), "softplus": (2.0, 5.0)}
REAL = [a for a in ACTIVATIONS if a != "none"]


def r(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype)


# -- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_activation_is_its_aten_op_there_and_back(name: str) -> None:
    scalars = SCALARS.get(name, ())
    target, options = activation_call(name, scalars)
    x = r(3, 4, 5, dtype=torch.float64) * 3
    torch.testing.assert_close(activate(x, name, scalars), target(x, **options))
    args, kwargs = normalise(target, (x,), options)
    names = [a.name for a in target._schema.arguments]
    assert activation_of(target, {**dict(zip(names, args, strict=False)), **kwargs}) == (name, scalars)


@pytest.mark.parametrize(("target", "args", "wanted"), [
    (torch.ops.aten.relu6.default, {}, ("hardtanh", (0.0, 6.0))),
    (torch.ops.aten.clamp.default, {"min": 0, "max": 6}, ("hardtanh", (0.0, 6.0))),
    (torch.ops.aten.clamp.default, {"min": 0, "max": None}, ("relu", ())),
    (torch.ops.aten.clamp_min.default, {"min": 0}, ("relu", ())),
    (torch.ops.aten.clamp_min.default, {"min": 1}, None),
    (torch.ops.aten.clamp.default, {"min": None, "max": 6}, None),
    (torch.ops.aten.elu.default, {"alpha": 1.0, "scale": 2.0, "input_scale": 1}, None),
    (torch.ops.aten.gelu.default, {"approximate": "tanh"}, ("gelu_tanh", ())),
    (torch.ops.aten.sin.default, {}, None),
    (torch.ops.aten.clone.default, {"memory_format": None}, None),
    (len, {}, None),
])  # fmt: skip
def test_which_calls_are_activations(target: Any, args: dict[str, Any], wanted: Any) -> None:
    assert activation_of(target, args) == wanted


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(InternalError, match="no activation 'swoosh'"):
        g.linear(r(2, 4), r(3, 4), None, None, "swoosh", [])


# -- contractions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_fused_linear_is_the_chain(name: str, dtype: torch.dtype) -> None:
    x, w, b, other = r(2, 3, 4, dtype=dtype), r(5, 4, dtype=dtype), r(5, dtype=dtype), r(2, 3, 5, dtype=dtype)
    scalars = SCALARS.get(name, ())
    got = g.linear(x, w, b, other, name, scalars)
    assert got.dtype == dtype and torch.equal(got, activate(F.linear(x, w, b) + other, name, scalars))


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_fused_convolution_is_the_chain(spatial: int) -> None:
    conv = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    x, w, b = r(2, 4, *[5] * spatial), r(6, 2, *[3] * spatial), r(6)
    step = [2] * spatial
    wanted = conv(x, w, b, step, [1] * spatial, [1] * spatial, 2)
    got = g.conv(x, w, b, step, [1] * spatial, [1] * spatial, 2, torch.ones_like(wanted), "relu", [])
    assert torch.equal(got, torch.relu(wanted + 1))


def test_convolution_of_a_wrong_rank_is_refused() -> None:
    with pytest.raises(InternalError, match="2 axes"):
        g.conv(r(2, 4), r(6, 4), None, [], [], [], 1, None, "none", [])


def test_fused_ops_obey_the_rules_of_custom_ops() -> None:
    """Schema, fake and autograd registration; tracing is for the test with dynamic sizes."""
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    x, w, b = (t.requires_grad_() for t in (r(2, 4), r(3, 4), r(3)))
    check(g.linear.default, (x, w, b, None, "gelu", []))
    check(g.linear.default, (x, w, None, r(2, 3), "none", []))
    check(g.conv.default, (r(2, 4, 5, 5), r(6, 2, 3, 3), r(6), [1, 1], [1, 1], [1, 1], 2, None, "silu", []))
    check(g.quantize.default, (r(3, 4), 0.1, 3, -128, 127, torch.int8))
    check(g.dequantize.default, (torch.ones(3, dtype=torch.int8), 0.1, 3, torch.float32))
    check(g.quantize_channel.default, (r(3, 4), torch.ones(3), None, 0, -128, 127, torch.int8))


def test_gradient_of_a_fused_op_is_the_chains() -> None:
    def run(function: Any) -> list[Tensor]:
        leaves = [t.requires_grad_() for t in (r(2, 3, 4), r(5, 4), r(5), r(2, 3, 5))]
        function(*leaves).square().sum().backward()
        return [t.grad for t in leaves]  # type: ignore[misc]

    got = run(lambda x, w, b, o: g.linear(x, w, b, o, "gelu", []))
    wanted = run(lambda x, w, b, o: F.gelu(F.linear(x, w, b) + o))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_fused_ops_export_with_dynamic_sizes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(r(6, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = g.conv(x, self.w, None, [1, 1], [1, 1], [1, 1], 1, None, "relu", [])
            return g.dequantize(g.quantize(y, 0.1, 0, 0, 255, torch.uint8), 0.1, 0, torch.float32)

    model = Model()
    exported = torch.export.export(model, (r(2, 4, 8, 8),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    x = r(5, 4, 8, 8)
    assert torch.equal(exported(x), model(x))


# -- quantize / dequantize -------------------------------------------------------------------------------------------


def test_rounding_is_half_to_even_and_saturates() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 200.0, -200.0])
    assert g.quantize(x, 1.0, 0, -128, 127, torch.int8).tolist() == [0, 2, 2, 0, -2, 127, -128]
    assert g.quantize(x, 1.0, 10, 0, 255, torch.uint8).tolist() == [10, 12, 12, 10, 8, 210, 0]


def test_nan_is_the_zero_point_and_infinities_saturate() -> None:
    x = torch.tensor([float("nan"), float("inf"), float("-inf")])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        q = g.quantize(x.to(dtype), 0.1, 7, -100, 100, torch.int8)
        assert q.tolist() == [7, 100, -100]
        assert g.dequantize(q, 0.1, 7, torch.float32)[0] == 0


def test_round_trip_is_within_half_a_step() -> None:
    x = r(100).clamp(-3, 3)
    scale, point = 6 / 255, 128
    back = g.dequantize(g.quantize(x, scale, point, 0, 255, torch.uint8), scale, point, torch.float32)
    assert (back - x).abs().max() <= scale / 2 * 1.01


def test_wide_grids_are_exact() -> None:
    """int32, as biases and accumulators use it: float32 could not hold these."""
    x = torch.tensor([2.0**31, -(2.0**31), 16777217.0, 3.0], dtype=torch.float64)
    q = g.quantize(x, 1.0, 0, -(2**31), 2**31 - 1, torch.int32)
    assert q.tolist() == [2**31 - 1, -(2**31), 16777217, 3]
    assert g.dequantize(q, 1.0, 16777216, torch.float64).tolist()[2] == 1.0


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_have_their_own_scale(axis: int) -> None:
    w = r(3, 4, 5)
    scales = torch.rand(w.shape[axis]) + 0.01
    points = torch.arange(w.shape[axis], dtype=torch.int32)
    got = g.quantize_channel(w, scales, points, axis, -128, 127, torch.int8)
    back = g.dequantize_channel(got, scales, points, axis, torch.float32)
    for k in range(w.shape[axis]):
        one = w.select(axis, k)
        wanted = g.quantize(one, float(scales[k]), k, -128, 127, torch.int8)
        assert torch.equal(got.select(axis, k), wanted)
        torch.testing.assert_close(back.select(axis, k), g.dequantize(wanted, float(scales[k]), k, torch.float32))


def test_blocks_have_their_own_scale() -> None:
    w, scales = r(2, 6), torch.rand(2, 3) + 0.1
    got = g.quantize_channel(w, scales, None, 0, -8, 7, torch.int8)
    wanted = torch.round(w.reshape(2, 3, 2) / scales.unsqueeze(-1)).clamp(-8, 7).reshape(2, 6).to(torch.int8)
    assert torch.equal(got, wanted)
    back = g.dequantize_channel(got, scales, None, 0, torch.bfloat16)
    assert back.dtype == torch.bfloat16 and (back.float() - w).abs().max() < 2


def test_scales_of_a_wrong_rank_are_refused() -> None:
    with pytest.raises(InternalError, match="scales have 2 axes"):
        g.quantize_channel(r(2, 3, 4), torch.ones(2, 3), None, 0, -8, 7, torch.int8)


def test_gradient_passes_straight_through_unless_saturated() -> None:
    x = torch.tensor([0.04, -0.26, 5.0, -5.0], requires_grad=True)
    q = g.quantize(x, 0.1, 0, -8, 7, torch.float32)
    g.dequantize(q, 0.1, 0, torch.float32).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_integers_have_no_gradient() -> None:
    assert not g.quantize(r(3).requires_grad_(), 0.1, 0, -8, 7, torch.int8).requires_grad


def test_floating_grid_holds_the_same_numbers() -> None:
    x = r(50) * 3
    whole, held = (g.quantize(x, 0.05, 3, -128, 127, d) for d in (torch.int8, torch.float32))
    assert torch.equal(whole.float(), held)
    back = [g.dequantize(q, 0.05, 3, torch.float32) for q in (whole, held)]
    assert torch.equal(*back)


def test_scales_learn() -> None:
    """The gradient of a step size: round(w / s) - w / s inside, the bound outside."""
    w, scales = torch.tensor([[0.26, 9.0]]), torch.tensor([0.1], requires_grad=True)
    q = g.quantize_channel(w, scales, None, 0, -8, 7, torch.float32)
    g.dequantize_channel(q, scales, None, 0, torch.float32).sum().backward()
    torch.testing.assert_close(scales.grad, torch.tensor([(3 - 2.6) + 7.0]))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_empty_and_scalar_tensors(shape: tuple[int, ...]) -> None:
    q = g.quantize(torch.zeros(shape), 0.1, 1, 0, 255, torch.uint8)
    assert q.shape == shape and g.dequantize(q, 0.1, 1, torch.float32).shape == shape


@pytest.mark.parametrize("layout", ["plain", "permuted", "channels last", "sliced", "expanded", "empty", "scalar"])
@pytest.mark.parametrize("name", ["quantize", "dequantize"])
def test_shape_rules_of_their_own_give_what_the_bodies_give(name: str, layout: str) -> None:
    plain = torch.randint(-9, 9, (2, 6, 4, 5)).to(torch.float32 if name == "quantize" else torch.int8)
    x = {
        "plain": plain, "permuted": plain.permute(3, 1, 0, 2), "sliced": plain[:, ::2, 1:3],
        "channels last": plain.contiguous(memory_format=torch.channels_last),
        "expanded": plain[:, :1].expand(2, 6, 4, 5), "empty": plain[:0], "scalar": plain[0, 0, 0, 0],
    }[layout]  # fmt: skip
    args = (0.1, 3, -128, 127, torch.int8) if name == "quantize" else (0.1, 3, torch.float32)
    body = getattr(fused, name)(x, *args)
    with FakeTensorMode() as mode:
        rule = getattr(torch.ops.graphwright, name)(mode.from_tensor(x), *args)
    assert (rule.shape, rule.stride(), rule.dtype, rule.device) == (body.shape, body.stride(), body.dtype, body.device)
