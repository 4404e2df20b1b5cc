"""Triton's interpreter, mended: without this it is silently wrong in bfloat16 and fp8 (seen with 3.6 to 3.9).

As it comes, it multiplies the raw bits of bfloat16 operands, truncates instead of rounding to bfloat16 and fp8, and wraps fp8
that overflow. Conversions and products go through torch here instead.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch


@functools.cache
def mend() -> None:
    """Replace what is wrong. Once per process, before the first kernel runs."""
    import triton.language as tl
    from triton.runtime import interpreter

    held = {
        tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32, tl.float64: torch.float64,
        tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2, tl.float8e4b8: torch.float8_e4m3fnuz, tl.float8e5b16: torch.float8_e5m2fnuz,
    }  # fmt: skip
    integers = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 8: (torch.int64, np.uint64)}

    def tensor_of(array: np.ndarray[Any, Any], kind: Any) -> torch.Tensor:
        """The numbers that the interpreter holds: narrow floats lie in integers of their width."""
        array = np.ascontiguousarray(array)
        if array.dtype.kind in "ui" and kind in held:
            signed = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[array.dtype.itemsize]
            return torch.from_numpy(array.view(signed).copy()).view(held[kind])
        return torch.from_numpy(array)

    before = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source not in held or target not in held:
            return before(data, source, target, rounding)
        numbers, wanted = tensor_of(data, source).double(), held[target]
        if target not in (tl.float16, tl.bfloat16, tl.float32, tl.float64):  # fp8 saturates
            most = torch.finfo(wanted).max
            numbers = torch.where(numbers.isnan(), numbers, numbers.clamp(-most, most))
        out = numbers.to(wanted)
        bits, kind = integers[out.element_size()]
        return out.contiguous().view(bits).numpy().view(kind).reshape(data.shape)

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        def wide(handle: Any) -> torch.Tensor:
            return tensor_of(handle.data, getattr(handle.dtype, "scalar", handle.dtype)).double()  # exact for int8

        product = (wide(a) @ wide(b)).numpy()
        return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    patch = interpreter._patch_lang_core

    def patch_all(lang: Any, *scope: Any) -> None:
        """As it comes, it doesn't know gfx942's fp8 by name."""
        patch(lang, *scope)
        inner = lang.dtype.to_ir
        lang.dtype.to_ir = lambda kind, builder: builder.get_fp8e4b8_ty() if kind.name == "fp8e4b8" else inner(kind, builder)

    interpreter._patch_lang_core = patch_all
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
