"""Arguments of ``graphwright.attention_int8_qk`` for the tests and the benchmark of its kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphwright.kernel import Sample


def make(name: str, b: int, h: int, s: int, t: int, d: int, e: int | None = None, *, groups: int | None = None, kind: torch.dtype = torch.float16, mask: str = "",
         factor: float | None = None, causal: bool = False, merge: bool = False, dtype: Any = torch.float16, laid: str = "", bench: bool = False) -> Sample:  # fmt: skip
    """A sample of ``graphwright.attention_int8_qk``: heads of queries and (``groups``) of keys, s queries, t keys, widths d and e."""

    def args(g: torch.Generator) -> tuple[Any, ...]:
        def heads(count: int, rows: int, width: int, shift: float = 0.0) -> Tensor:
            if laid == "merged":  # as three slices of one product leave them
                x = torch.randn(b, rows, count, 3 * width, generator=g)[..., width : 2 * width].transpose(1, 2)
            elif laid == "odd":
                x = torch.randn(b, count, width, rows, generator=g).transpose(2, 3)
            else:
                x = torch.randn(b, count, rows, width, generator=g)
            return (x + shift).to(kind)

        n = groups or h
        made = {
            "": lambda: None,
            "keys": lambda: torch.rand(b, 1, 1, t, generator=g) < 0.7,
            "bool": lambda: (torch.rand(b, h, s, t, generator=g) < 0.6) & (torch.arange(s)[:, None] > 2),  # the first queries see nothing
            "float": lambda: torch.randn(s, t, generator=g).to(kind),
            "least": lambda: torch.where(torch.rand(b, 1, s, t, generator=g) < 0.5, 0.0, torch.finfo(torch.float32).min),
            "infinite": lambda: torch.where(torch.rand(1, h, s, t, generator=g) < 0.5, 0.0, -torch.inf).to(kind),
        }[mask]()
        points = (0.01, 120, 0, 255) if dtype == torch.uint8 else (0.01, 0, -127, 127)
        return heads(h, s, d), heads(n, t, d, 3.0), heads(n, t, e or d), made, factor, causal, merge, *points, dtype

    return Sample(name, args, bench)
