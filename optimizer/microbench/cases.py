"""Arguments of each op for a layer of a given shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from graphwright import ops
from graphwright.kernel import Sample
from graphwright.microbench.shapes import Shapes
from graphwright.ops import sparse

Args = dict[str, Any]

#: Weights under one scale and zero point come in groups of so many inputs.
GROUP = 128

#: Side of the blocks of a block-sparse weight.
SIDE = 32

_FLOAT_OUT = {"scale": 1.0, "zero_point": 0, "low": 0, "high": 0, "dtype": None}
_UINT8_OUT = {"scale": 0.05, "zero_point": 128, "low": 0, "high": 255, "dtype": torch.uint8}


@dataclass(frozen=True)
class Case:
    """How an op meets a kind of layer.

    Attributes:
        op: row of the op table.
        kind: attribute of ``Shapes``.
        make: ``(shape, dtype of floats, generator) -> arguments by name``; those left out are None.
        variant: a word for the table where an op has several.
        fits: which shapes make sense.
    """

    op: str
    kind: str
    make: Callable[[tuple[int, ...], torch.dtype, Generator], Args]
    variant: str = ""
    fits: Callable[[tuple[int, ...]], bool] = lambda shape: True


def _bytes(*shape: int, g: Generator, dtype: torch.dtype = torch.int8) -> Tensor:
    low, high = (0, 256) if dtype == torch.uint8 else (-127, 128)
    return torch.randint(low, high, shape, generator=g, dtype=torch.int16).to(dtype)


def _scales(*shape: int, g: Generator) -> Tensor:
    return torch.rand(*shape, generator=g) * 0.01 + 0.001


def _tail(n: int, g: Generator) -> Args:
    return {"bias": torch.randn(n, generator=g), "activation": "none", "scalars": ()}


def _linear_int8(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    m, k, n = shape
    return {"x": _bytes(m, k, g=g, dtype=torch.uint8), "x_scale": 0.02, "x_zero_point": 128, "weight": _bytes(n, k, g=g), "weight_scales": _scales(n, g=g),
            **_tail(n, g), **_FLOAT_OUT}  # fmt: skip


def _linear_int8_rows(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    return {**_linear_int8(shape, dtype, g), "x": torch.randn(*shape[:2], generator=g).to(dtype), "x_scale": 1.0, "x_zero_point": 0}


def _linear_int8_scales(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    return {**_linear_int8(shape, dtype, g), "x": _bytes(*shape[:2], g=g), "x_scale": 1.0, "x_zero_point": 0, "x_scales": _scales(shape[0], 1, g=g)}


def _linear_fp8(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    m, k, n = shape
    weight = (torch.randn(n, k, generator=g) * 40).to(torch.float8_e4m3fn)
    return {"x": torch.randn(m, k, generator=g).to(dtype), "weight": weight, "weight_scales": _scales(n, g=g), "by_row": True,
            "kind": torch.float8_e4m3fn, "dtype": dtype, **_tail(n, g)}  # fmt: skip


def _linear_w8(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    m, k, n = shape
    return {"x": torch.randn(m, k, generator=g).to(dtype), "weight": _bytes(n, k, g=g), "weight_scales": _scales(n, g=g), **_tail(n, g)}


def _groups(k: int) -> int:
    return -(-k // GROUP)


def _linear_w8_groups(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    m, k, n = shape
    return {"x": torch.randn(m, k, generator=g).to(dtype), "weight": _bytes(n, k, g=g), "scales": _scales(n, _groups(k), g=g), "group": GROUP, **_tail(n, g)}


def _linear_w4(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    m, k, n = shape
    return {"x": torch.randn(m, k, generator=g).to(dtype), "weight": _bytes(n, k // 2, g=g, dtype=torch.uint8), "scales": _scales(n, _groups(k), g=g),
            "group": GROUP, **_tail(n, g)}  # fmt: skip


def _linear_w4a8(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    m, k, _ = shape
    return {**_linear_w4(shape, dtype, g), "x": _bytes(m, k, g=g), "x_scales": _scales(m, 1, g=g)}


def _sparse24(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    """Two weights of every four, the largest."""
    m, k, n = shape
    fours = torch.randn(n, k // 4, 4, generator=g) / k**0.5
    kept = fours.abs().argsort(-1) >= 2
    weight, indices = sparse.compress((fours * kept).reshape(n, k).to(dtype))
    return {"x": torch.randn(m, k, generator=g).to(dtype), "weight": weight, "indices": indices, **_tail(n, g)}


def _blocks(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    """Half of the blocks of 32x32 are there."""
    m, k, n = shape
    kept = torch.rand(n // SIDE, k // SIDE, generator=g) < 0.5
    weight = torch.randn(n, k, generator=g) / k**0.5 * kept.repeat_interleave(SIDE, 0).repeat_interleave(SIDE, 1)
    values, columns, starts = sparse.to_blocks(weight.to(dtype), SIDE, kept)
    return {"x": torch.randn(m, k, generator=g).to(dtype), "values": values, "columns": columns, "starts": starts, "out": n, "transposed": False, **_tail(n, g)}


def _blocks_int8(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    m, k, n = shape
    made = _blocks(shape, torch.float32, g)
    return {**made, "values": _bytes(*made["values"].shape, g=g), "weight_scales": _scales(n, g=g), "x": _bytes(m, k, g=g), "x_scales": _scales(m, 1, g=g)}


def _conv2d_int8(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    n, c, h, w, o, window, stride = shape
    x = _bytes(n, c, h, w, g=g, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    return {"x": x, "x_scale": 0.02, "x_zero_point": 0, "weight": _bytes(o, c, window, window, g=g), "weight_scales": _scales(o, g=g),
            "stride": (stride, stride), "padding": (window // 2, window // 2), "dilation": (1, 1), "groups": 1, "other_scale": 1.0, "other_zero_point": 0,
            **_tail(o, g), "activation": "relu", **_UINT8_OUT, "zero_point": 0, "scale": 0.03 * (c * window * window) ** 0.5}  # fmt: skip


def _conv2d_float(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    n, c, h, w, o, window, _ = shape
    x = torch.randn(n, c, h, w, generator=g).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(o, c, window, window, generator=g) / (c * window * window) ** 0.5
    return {"x": x, "weight": weight, "padding": (window // 2, window // 2), **_tail(o, g), "activation": "relu"}


def _separable(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    n, c, h, w, o, window, stride = shape
    x = torch.randn(n, c, h, w, generator=g).contiguous(memory_format=torch.channels_last)
    first, second = torch.randn(c, 1, window, window, generator=g) / window, torch.randn(o, c, 1, 1, generator=g) / c**0.5
    return {"x": x, "weight": first, "bias": torch.randn(c, generator=g), "stride": (stride, stride), "padding": (window // 2, window // 2), "dilation": (1, 1),
            "inner": "relu", "inner_scalars": (), "second": second, "second_bias": torch.randn(o, generator=g), "activation": "relu", "scalars": ()}  # fmt: skip


def _norm(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    x, residual = (torch.randn(*shape, generator=g).to(dtype) for _ in range(2))
    weight, bias = torch.randn(2, shape[1], generator=g)
    return {"x": x, "residual": residual, "weight": weight, "bias": bias, "eps": 1e-6, "rms": False, "want_sum": True, "want_float": False}


def _activate(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    return {"x": torch.randn(*shape, generator=g).to(dtype), "activation": "gelu", "scalars": ()}


def _gated(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    x, gate = (torch.randn(*shape, generator=g).to(dtype) for _ in range(2))
    return {"x": x, "gate": gate, "activation": "silu", "scalars": ()}


def _attention(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    b, heads, fewer, length, width, causal = shape
    query, key, value = (torch.randn(b, h, length, width, generator=g).to(dtype) for h in (heads, fewer, fewer))
    return {"query": query, "key": key, "value": value, "causal": bool(causal), "merge": True, **_FLOAT_OUT}


def _rows(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Args:
    return {"x": torch.randn(*shape, generator=g).to(dtype), "scale": 1.0, "causal": False}


CASES = (
    Case("graphwright.linear_int8", "linear", _linear_int8, "u8"),
    Case("graphwright.linear_int8", "linear", _linear_int8_rows, "rows"),
    Case("graphwright.linear_int8", "linear", _linear_int8_scales, "i8"),
    Case("graphwright.linear_fp8", "linear", _linear_fp8),
    Case("graphwright.linear_w8", "linear", _linear_w8),
    Case("graphwright.linear_w8_groups", "linear", _linear_w8_groups),
    Case("graphwright.linear_w4", "linear", _linear_w4, fits=lambda s: s[1] % 2 == 0),
    Case("graphwright.linear_w4a8", "linear", _linear_w4a8, fits=lambda s: s[1] % 2 == 0),
    Case("graphwright.linear_sparse24", "linear", _sparse24, fits=lambda s: s[1] % 8 == 0),
    Case("graphwright.linear_block_sparse", "linear", _blocks, "half", lambda s: s[1] % SIDE == s[2] % SIDE == 0),
    Case("graphwright.linear_block_sparse", "linear", _blocks_int8, "half int8", lambda s: s[1] % SIDE == s[2] % SIDE == 0),
    Case("graphwright.conv2d_int8", "conv", _conv2d_int8),
    Case("graphwright.conv2d_winograd", "conv", _conv2d_float, fits=lambda s: s[5:] == (3, 1)),
    Case("graphwright.conv2d_separable", "separable", _separable),
    Case("graphwright.norm_quantize", "rows", lambda s, d, g: {**_norm(s, d, g), **_UINT8_OUT}),
    Case("graphwright.norm_quantize_rows", "rows", _norm),
    Case("graphwright.activate_quantize", "rows", lambda s, d, g: {**_activate(s, d, g), **_UINT8_OUT}),
    Case("graphwright.activate_quantize_rows", "rows", _gated),
    Case("graphwright.quantize_rows", "rows", _rows),
    Case("graphwright.softmax", "rows", _rows),
    Case("graphwright.attention", "attention", _attention),
    Case("graphwright.attention_int8", "attention", _attention),
    Case("graphwright.attention_int8_qk", "attention", _attention),
)


def samples_for(op: str, shapes: Shapes, device: str = "cpu") -> Iterator[tuple[Sample, str]]:
    """A sample, and its variant, for every layer of the shapes that the op can stand in."""
    row = next((r for r in ops.rows() if r.name == op), None)
    dtype = torch.float32 if device == "cpu" else torch.float16
    for case in CASES if row is not None else ():
        for shape in getattr(shapes, case.kind) if case.op == op else ():
            if case.fits(shape):
                yield _sample(case, shape, dtype, row), case.variant


def _sample(case: Case, shape: tuple[int, ...], dtype: torch.dtype, row: Any) -> Sample:
    def args(g: Generator) -> tuple[Any, ...]:
        named = case.make(shape, dtype, g)
        return tuple(named.get(name) for name in row.params)

    return Sample(f"{'x'.join(map(str, shape))}{f' {case.variant}' if case.variant else ''}", args)


__all__ = ["CASES", "Case", "samples_for"]
