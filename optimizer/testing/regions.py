"""Regions for generated kernels: some by hand, and any at random.

    fragment = region([(4, 8), (8,)], [("add.Tensor", [v(0), v(1)]), ("silu.default", [v(2)])])
    @given(fragments())                      # needs hypothesis
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from graphwright.backends.inductor import Fragment

F = "float32"


def v(n: int) -> dict[str, int]:
    """A value of a region by its number: the inputs first, then what the steps give."""
    return {"value": n}


def inputs_of(fragment: Fragment, seed: int = 0) -> list[Tensor]:
    """Normally distributed floats, and whole numbers of 0 and 1, of the fragment's shapes and strides."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for dtype, shape, strides in fragment.inputs:
        x = torch.empty_strided(shape, strides, dtype=getattr(torch, dtype))
        made.append(x.copy_(torch.randn(shape, generator=g) if x.is_floating_point() else torch.randint(0, 2, shape, generator=g)))
    return made


def dense(*shape: int) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return torch.empty(shape, device="meta").stride()


def region(inputs: Sequence[Any], steps: Sequence[Any], *outputs: int) -> Fragment:
    """A fragment of contiguous float32 inputs by shape, of others as (dtype, shape) or whole records.

    Args:
        steps: each an op of ATen's with its overload, its arguments, and perhaps keyword arguments.
        outputs: numbers of the results; without any, the last step's.
    """
    records = tuple((F, tuple(i), dense(*i)) if not isinstance(i[0], str) else (i[0], tuple(i[1]), dense(*i[1])) if len(i) == 2 else i for i in inputs)
    said = tuple((f"aten.{op}", args, kwargs[0] if kwargs else {}) for op, args, *kwargs in steps)
    return Fragment(records, said, outputs or (len(records) + len(steps) - 1,))


_UNARY = ["neg.default", "relu.default", "tanh.default", "sigmoid.default", "abs.default", "square.default", "silu.default", "erf.default", "sin.default",
          "expm1.default", "log1p.default", "sign.default", "softplus.default", "round.default"]


@st.composite
def fragments(draw: Any, dtypes: Sequence[str] = (F,), beside: bool = False) -> Fragment:
    """Regions over one space: inputs of every kind of broadcast and stride, elementwise ops, reductions along any axes, glued halves.

    The first input is a float; the others are of any of the dtypes.

    Args:
        beside: nothing is reduced along the last axis, and the first input is contiguous: rows lie beside each other.
    """
    rank = draw(st.integers(1 + beside, 4))
    shape = [draw(st.integers(1, 6)) for _ in range(rank - 1)] + [draw(st.sampled_from([2, 6, 16, 34, 600]))]
    floats = [d for d in dtypes if "float" in d]
    records, kinds = [], []  # kinds: "full" or "row" (one number per row)
    for _ in range(draw(st.integers(1, 4))):
        keep = [True] * rank if beside and not records else [draw(st.booleans()) or draw(st.booleans()) for _ in shape]
        size = [n if k else 1 for n, k in zip(shape, keep, strict=True)]
        order = range(rank)[::-1] if beside and not records else draw(st.permutations(range(rank)))
        strides, reach = [0] * rank, draw(st.sampled_from([1, 1, 2]))
        for a in order:
            strides[a], reach = reach, reach * size[a]
        records.append((draw(st.sampled_from(dtypes if records else floats)), tuple(size), tuple(strides)))
        kinds.append(size)
    sizes, steps = list(kinds), []

    def push(op: str, args: list[Any], size: Any, **kwargs: Any) -> int:
        steps.append((op, args, kwargs))
        sizes.append(size)
        return len(sizes) - 1

    full = [0]
    zero = push("add.Tensor", [v(0), v(draw(st.integers(0, len(records) - 1)))], None, alpha=1)
    sizes[zero] = [max(a, b) for a, b in zip(sizes[0], sizes[steps[-1][1][1]["value"]], strict=True)]
    for k in range(1, len(records)):
        zero = push("add.Tensor", [v(zero), v(k)], [max(a, b) for a, b in zip(sizes[zero], sizes[k], strict=True)], alpha=1)
    dropped: list[int] = []
    full, rows, space = [zero], [], sizes[zero]
    axes = sorted(draw(st.sets(st.integers(0, rank - 2), min_size=1) if beside else st.one_of(st.just([rank - 1]), st.sets(st.integers(0, rank - 1), min_size=1))))
    longer, last = math.prod(space[a] for a in axes) > 1, axes == [rank - 1]
    kept = [1 if a in axes else n for a, n in enumerate(space)]
    for _ in range(draw(st.integers(2, 10))):
        x = draw(st.sampled_from(full[-4:]))
        match draw(st.sampled_from(["unary", "binary", "row", "norm", "reduce", "drop", "glue", "choose"])):
            case "unary":
                full.append(push(draw(st.sampled_from(_UNARY)), [v(x)], space))
            case "binary":
                y = draw(st.sampled_from([*full, *range(len(records))]))
                minus = ["sub.Tensor"] * (y >= len(records) or records[y][0] != "bool")  # torch takes no truth value from a number
                full.append(push(draw(st.sampled_from(["add.Tensor", "mul.Tensor", "maximum.default", *minus])), [v(x), v(y)], space))
            case "row" if rows:
                full.append(push("mul.Tensor", [v(x), v(draw(st.sampled_from(rows)))], space))
            case "reduce" if longer:
                op = draw(st.sampled_from(["mean.dim", "amax.default", "amin.default", "sum.dim_IntList"]))
                rows.append(push(op, [v(x), [a - rank for a in axes], True], kept))
                rows.append(push("sigmoid.default", [v(rows[-1])], kept))
            case "drop" if longer:
                op = draw(st.sampled_from(["mean.dim", "amax.default", "sum.dim_IntList"]))
                dropped.append(push("tanh.default", [v(push(op, [v(x), axes], None))], None))
            case "norm" if longer and len(axes) == 1:
                full.append(push("softmax.int", [v(x), axes[0], None], space))
            case "glue" if last and space[-1] % 2 == 0 and x < len(records):
                half = space[-1] // 2
                a = push("slice.Tensor", [v(0), rank - 1, 0, half, 1], None)
                b = push("neg.default", [v(a)], None)
                full.append(push("cat.default", [[v(b), v(a)], -1], space))
            case "choose":
                test = push("gt.Scalar", [v(x), 0.1], space)
                full.append(push("where.self", [v(test), v(x), v(draw(st.sampled_from(full)))], space))
    outputs = {full[-1], draw(st.sampled_from(full)), *(rows[-1:] if draw(st.booleans()) else []), *dropped[-1:]}
    said = tuple((f"aten.{op}", args, kwargs) for op, args, kwargs in steps)
    return Fragment(tuple(records), said, tuple(sorted(outputs)))
