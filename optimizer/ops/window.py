"""ATen rows: pooling, resampling, padding, pixel shuffles."""

from __future__ import annotations

import math
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ops.axes import names
from graphwright.ops.matrix import _per_axis
from graphwright.ops.registry import POOL, VIEW, described, op

# -- pooling ---------------------------------------------------------------------------------------------------------


def _spatial_axes(spatial: int, results: int = 1) -> Any:
    """The spelling of an op over the last axes by windows; the axes before are untouched."""
    s = names(spatial, "s")
    result = "* " + " ".join(f"{a}'" for a in s)
    return f"* {' '.join(s)} -> {', '.join([result] * results)}"


def _windows(x: Tensor, kernel: list[Any], stride: list[Any], dilation: list[Any]) -> Tensor:
    """``[*, *out, *kernel]``: the windows over the last ``len(kernel)`` axes of ``[*, *s]``."""
    first = x.ndim - len(kernel)
    for k, size in enumerate(kernel):
        x = x.unfold(first + k, (size - 1) * dilation[k] + 1, stride[k])[..., :: dilation[k]]
    return x


def _pad_to(x: Tensor, kernel: list[Any], stride: list[Any], padding: list[Any], dilation: list[Any], ceil: bool,
            value: float) -> Tensor:  # fmt: skip
    """Pad the last axes on both sides, and at the end as far as ``ceil_mode`` lets a window begin within."""
    pads: list[Any] = []
    for k in range(len(kernel)):
        size = x.shape[k - len(kernel)]
        reach = dilation[k] * (kernel[k] - 1)
        count = _out_size(size, kernel[k], stride[k], padding[k], dilation[k], ceil)
        extra = max((count - 1) * stride[k] + reach + 1 - size - 2 * padding[k], 0) if ceil else 0
        pads = [padding[k], padding[k] + extra, *pads]
    return F.pad(x, pads, value=value)


def _out_size(size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> Any:
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (span + (stride - 1 if ceil else 0)) // stride + 1
    return count - 1 if ceil and (count - 1) * stride >= size + padding else count


def _low(dtype: torch.dtype) -> float:
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min


def _max_pool(spatial: int) -> Any:
    def pool(
        self: Tensor, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
    ) -> Tensor:
        kernel, padding, dilation = (_per_axis(v, spatial) for v in (kernel_size, padding, dilation))
        stride = _per_axis(stride, spatial) if stride else kernel
        x = _pad_to(self, kernel, stride, padding, dilation, ceil_mode, _low(self.dtype))
        return torch.amax(_windows(x, kernel, stride, dilation), list(range(-spatial, 0)))

    return pool


def _max_pool_indexed(spatial: int) -> Any:
    function = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[spatial]

    def pool(
        self: Tensor, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
    ) -> Any:
        return function(self, kernel_size, stride or None, padding, dilation, ceil_mode, return_indices=True)

    return pool


def _window_flops(spatial: int) -> Any:
    def flops(args: Any, out: Any) -> Any:
        first = out[0] if isinstance(out, (tuple, list)) else out
        return prod(first.shape) * prod(_per_axis(args["kernel_size"], spatial))

    return flops


def _avg_pool(spatial: int) -> Any:
    def pool(self: Tensor, kernel_size: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
             count_include_pad: bool = True, divisor_override: int | None = None) -> Tensor:  # fmt: skip
        kernel, padding = _per_axis(kernel_size, spatial), _per_axis(padding, spatial)
        stride, one = _per_axis(stride, spatial) if stride else kernel, [1] * spatial
        over = list(range(-spatial, 0))
        x = _pad_to(self, kernel, stride, padding, one, ceil_mode, 0)
        sums = torch.sum(_windows(x, kernel, stride, one), over)
        divide = torch.divide if self.is_floating_point() else partial(torch.div, rounding_mode="trunc")
        if divisor_override is not None:
            return divide(sums, divisor_override)
        ones = torch.ones(self.shape[-spatial:], dtype=self.dtype, device=self.device)
        if count_include_pad:  # the explicit padding counts, what ceil_mode adds does not
            ones = F.pad(ones, [p for p in reversed(padding) for _ in range(2)], value=1)
            padding = [0] * spatial
        inside = _pad_to(ones, kernel, stride, padding, one, False, 0)
        missing = [x.shape[k] - inside.shape[k] for k in range(-spatial, 0)]
        inside = F.pad(inside, [v for m in reversed(missing) for v in (0, m)])
        return divide(sums, torch.sum(_windows(inside, kernel, stride, one), over))

    return pool


def _bins(size: Any, count: Any) -> list[tuple[Any, Any]]:
    return [(k * size // count, -(-(k + 1) * size // count)) for k in range(count)]


def _adaptive(spatial: int, reduce: Any) -> Any:
    def pool(self: Tensor, output_size: Any) -> Tensor:
        wanted = _per_axis(output_size, spatial)
        for k, count in enumerate(wanted):
            axis = self.ndim - spatial + k
            parts = [reduce(self.narrow(axis, a, b - a), axis) for a, b in _bins(self.shape[axis], count)]
            self = torch.cat(parts, axis) if parts else self.narrow(axis, 0, 0)
        return self

    return pool


def _adaptive_max(spatial: int) -> Any:
    function = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}[spatial]
    return lambda self, output_size: tuple(function(self, output_size, return_indices=True))


def _input_flops(args: Any, out: Any) -> Any:
    return prod(args["self"].shape)


def _pool_rows() -> None:
    for n in (1, 2, 3):
        one, two = _spatial_axes(n), _spatial_axes(n, 2)
        kind, over = {POOL}, f"over {n} axes"
        op(f"aten.max_pool{n}d", axes=one, traits=kind, flops=_window_flops(n))(
            described(_max_pool(n), f"Maximum of windows {over}.")
        )
        op(f"aten.max_pool{n}d_with_indices", axes=two, traits=kind, flops=_window_flops(n))(
            described(_max_pool_indexed(n), f"Maximum of windows {over}, and where it is in the plane.")
        )
        op(f"aten.avg_pool{n}d", axes=one, traits=kind, flops=_window_flops(n))(
            described(_avg_pool(n), f"Mean of windows {over}.")
        )
        mean = _adaptive(n, lambda x, axis: torch.mean(x, axis, True))
        for name in (f"adaptive_avg_pool{n}d", f"_adaptive_avg_pool{n}d"):
            if n > 1 or not name.startswith("_"):
                op(f"aten.{name}", axes=one, traits=kind, flops=_input_flops)(
                    described(mean, f"Mean of so many bins {over}.")
                )
        op(f"aten.adaptive_max_pool{n}d", axes=two, traits=kind, flops=_input_flops)(
            described(_adaptive_max(n), f"Maximum of so many bins {over}, and where it is.")
        )


_pool_rows()

# -- resampling ------------------------------------------------------------------------------------------------------


def _sizes(x: Tensor, output_size: Any, scale_factors: Any) -> list[Any]:
    if output_size is not None:
        return list(output_size)
    return [math.floor(n * s) for n, s in zip(x.shape[2:], scale_factors, strict=True)]


def _source(size: Any, count: Any, scale: float | None, align_corners: bool, x: Tensor) -> Tensor:
    """Where in an axis of ``size`` each of ``count`` resampled points lies, before clamping."""
    at = torch.arange(count, dtype=x.dtype if x.dtype == torch.float64 else torch.float32, device=x.device)
    if align_corners:
        return at * ((size - 1) / (count - 1) if count > 1 else 0.0)
    return (at + 0.5) * (1 / scale if scale else size / count) - 0.5


def _resample_nearest(exact: bool) -> Any:
    def body(input: Tensor, output_size: Any, scale_factors: Any) -> Tensor:
        for k, count in enumerate(_sizes(input, output_size, scale_factors)):
            size, scale = input.shape[2 + k], scale_factors[k] if scale_factors else None
            at = torch.arange(count, dtype=torch.float32, device=input.device) + (0.5 if exact else 0)
            index = torch.floor(at * (1 / scale if scale else size / count)).to(torch.int64)
            input = torch.index_select(input, 2 + k, torch.clamp(index, max=size - 1))
        return input

    return body


def _cubic(distance: Tensor, a: float = -0.75) -> Tensor:
    d = torch.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))


def _resample(taps: int) -> Any:
    """Linear (2 taps per axis) or cubic (4) interpolation, axis after axis."""

    def body(input: Tensor, output_size: Any, align_corners: bool, scale_factors: Any) -> Tensor:
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        for k, count in enumerate(_sizes(input, output_size, scale_factors)):
            size, scale = x.shape[2 + k], scale_factors[k] if scale_factors else None
            at = _source(size, count, scale, align_corners, x)
            at = torch.clamp(at, min=0) if taps == 2 else at
            base = torch.floor(at)
            parts: Any = 0
            for tap in range(1 - taps // 2, taps // 2 + 1):
                weight = 1 - torch.abs(at - base - tap) if taps == 2 else _cubic(at - base - tap)
                index = torch.clamp(base.to(torch.int64) + tap, 0, size - 1)
                shape = [1] * x.ndim
                shape[2 + k] = count
                parts = parts + torch.index_select(x, 2 + k, index) * weight.to(x.dtype).reshape(shape)
            x = parts
        return x.to(input.dtype)

    return body


def _resample_rows() -> None:
    for n, linear in ((1, "linear1d"), (2, "bilinear2d"), (3, "trilinear3d")):
        for name, exact in ((f"upsample_nearest{n}d", False), (f"_upsample_nearest_exact{n}d", True)):
            _resampler(name, n, _resample_nearest(exact), 0, "the nearest point", aligns=False)
        _resampler(f"upsample_{linear}", n, _resample(2), 3 * n, "linear interpolation")
    _resampler("upsample_bicubic2d", 2, _resample(4), 40, "cubic interpolation")


def _resampler(name: str, spatial: int, body: Any, work: int, how: str, aligns: bool = True) -> None:
    """Both overloads: scale factors in a list, or one argument for each."""
    axes = _spatial_axes(spatial).replace("*", "n c")

    def plain(input: Tensor, output_size: Any, *rest: Any) -> Tensor:
        flags, scales = rest[:aligns], rest[aligns:]
        return body(input, output_size, *flags, None if None in scales or not scales else scales)

    for overload, function in (("vec", body), ("default", plain)):
        op(f"aten.{name}", axes=axes, overloads=(overload,), flops=lambda args, out: work * prod(out.shape))(
            described(function, f"Resample by {how}.")
        )


_resample_rows()


@op("aten.grid_sampler", axes=None, flops=lambda args, out: 12 * prod(out.shape))
def grid_sampler(
    input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Tensor:
    """Sample a picture or volume at the points of a grid."""
    modes, pads = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")
    return F.grid_sample(input, grid, modes[interpolation_mode], pads[padding_mode], align_corners)


@op("aten.affine_grid_generator", axes=None)
def affine_grid(theta: Tensor, size: Any, align_corners: bool) -> Tensor:
    """The grid that samples an affinely moved picture or volume."""
    return F.affine_grid(theta, list(size), align_corners)


# -- padding ---------------------------------------------------------------------------------------------------------


def pad_axes(ndim: int, pad: Any, fills: bool) -> str | None:
    """Spelling of a pad: constants are literal parts of a joined axis; reflected ends make it a window."""
    axes = names(ndim)
    result = list(axes)
    for k in range(len(pad) // 2):
        before, after = pad[2 * k], pad[2 * k + 1]
        if not (isinstance(before, int) and isinstance(after, int)):
            return None
        at = ndim - 1 - k
        if before == after == 0:
            continue
        parts = [str(p) for p in (before, after)]
        joined = fills and before >= 0 and after >= 0
        words = [parts[0]] * (before > 0) + [axes[at]] + [parts[1]] * (after > 0)
        result[at] = f"({' + '.join(words)})" if joined else f"{axes[at]}'"
    return f"{' '.join(axes)} -> {' '.join(result)}"


def _pad_axes(**args: Any) -> str | None:
    return pad_axes(args["self"].ndim, args.get("pad", args.get("padding")), args.get("mode", "constant") == "constant")


def _edge_axes(**args: Any) -> str | None:
    return pad_axes(args["self"].ndim, args["padding"], False)


def _edge_index(size: Any, before: Any, after: Any, mode: str, device: Any) -> Tensor:
    at = torch.arange(-before, size + after, device=device)
    if mode == "circular":
        return at % size
    if mode == "replicate":
        return torch.clamp(at, 0, size - 1)
    return size - 1 - torch.abs(torch.abs(at) - (size - 1))


def _pad(self: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:
    """Pad the last axes, a pair of numbers each, last axis first: constant, reflected, replicated or circular."""
    if mode == "constant":
        return F.pad(self, list(pad), value=value)
    for k in range(len(pad) // 2):
        axis = self.ndim - 1 - k
        self = torch.index_select(
            self, axis, _edge_index(self.shape[axis], pad[2 * k], pad[2 * k + 1], mode, self.device)
        )
    return self


op("aten.pad", axes=_pad_axes, traits={VIEW})(_pad)
op("aten.constant_pad_nd", axes=_pad_axes, traits={VIEW})(
    described(lambda self, pad, value=0: F.pad(self, list(pad), value=value), "Pad the last axes with a constant.")
)
for _rank in (1, 2, 3):
    for _kind, _mode in (("reflection", "reflect"), ("replication", "replicate")):
        op(f"aten.{_kind}_pad{_rank}d", axes=_edge_axes, traits={VIEW})(
            described(lambda self, padding, mode=_mode: _pad(self, padding, mode), f"Pad the last axes by {_kind}.")
        )

# -- pixels and columns ----------------------------------------------------------------------------------------------


@op("aten.pixel_shuffle", axes="* (c r s) y x -> * c (y r) (x s)", traits={VIEW})
def pixel_shuffle(self: Tensor, upscale_factor: int) -> Tensor:
    """``[*, c*r*r, y, x]`` to ``[*, c, y*r, x*r]``."""
    r, (c, y, x) = upscale_factor, self.shape[-3:]
    parts = self.reshape(*self.shape[:-3], c // (r * r), r, r, y, x)
    lead = list(range(self.ndim - 3))
    n = self.ndim - 3
    return parts.permute(*lead, n, n + 3, n + 1, n + 4, n + 2).reshape(*self.shape[:-3], c // (r * r), y * r, x * r)


@op("aten.pixel_unshuffle", axes="* c (y r) (x s) -> * (c r s) y x", traits={VIEW})
def pixel_unshuffle(self: Tensor, downscale_factor: int) -> Tensor:
    """``[*, c, y*r, x*r]`` to ``[*, c*r*r, y, x]``."""
    r, (c, y, x) = downscale_factor, self.shape[-3:]
    parts = self.reshape(*self.shape[:-3], c, y // r, r, x // r, r)
    n = self.ndim - 3
    return parts.permute(*range(n), n, n + 2, n + 4, n + 1, n + 3).reshape(*self.shape[:-3], c * r * r, y // r, x // r)


@op("aten.channel_shuffle", axes=lambda **a: f"n (g={a['groups']} c) * -> n (c g) *", traits={VIEW})
def channel_shuffle(self: Tensor, groups: int) -> Tensor:
    """Channels ``(g c)`` to ``(c g)``."""
    n, c, *rest = self.shape
    return self.reshape(n, groups, c // groups, *rest).transpose(1, 2).reshape(self.shape)


@op("aten.im2col", axes=None, traits={VIEW})
def im2col(self: Tensor, kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> Tensor:
    """Every window of a picture as a column: ``[n, c, y, x]`` to ``[n, c*ky*kx, windows]``."""
    x = F.pad(self, [p for p in reversed(list(padding)) for _ in range(2)])
    windows = _windows(x, list(kernel_size), list(stride), list(dilation))
    return windows.movedim((-2, -1), (-4, -3)).flatten(-5, -3).flatten(-2)


@op("aten.col2im", axes=None, flops=lambda args, out: prod(args["self"].shape))
def col2im(self: Tensor, output_size: Any, kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> Tensor:
    """The picture whose windows, where they overlap added up, are these columns."""
    return F.fold(self, list(output_size), list(kernel_size), list(dilation), list(padding), list(stride))
