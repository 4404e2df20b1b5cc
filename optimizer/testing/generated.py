"""Regions that stand for what programs have, for the checks of generated Triton kernels.

    TRITON_INTERPRET=1 python -m graphwright.testing.generated                     numbers, under every config
    python -m graphwright.testing.generated --machine-code [--target sm_90]        ahead-of-time compilation, under every config
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright.backends.inductor import Fragment, FragmentModule
from graphwright.kernels import gpu
from graphwright.kernels.gpu.generated import Generated
from graphwright.kernels.gpu.launch import Config
from graphwright.lower import spaces
from graphwright.numerics import Exact, rms
from graphwright.testing.regions import F, inputs_of, region, v

H, B = "float16", "bfloat16"
_END = 2**63 - 1


def regions(small: bool) -> Iterator[tuple[str, Fragment]]:
    """Regions by name, at sizes for the interpreter (small, ragged) or of models."""
    n, d = (5, 70) if small else (4096, 1024)
    yield "gelu-bias-residual", region(
        [(H, (n, d)), (H, (d,)), (H, (n, d))],
        [("add.Tensor", [v(0), v(1)]), ("gelu.default", [v(3)], {"approximate": "none"}), ("add.Tensor", [v(4), v(2)])])
    yield "exponentials", region([(n, d)], [("exp.default", [v(0)]), ("tanh.default", [v(1)]), ("clamp.default", [v(2), -0.5, None])])
    n, d = (7, 100) if small else (8192, 4096)
    yield "rms-norm", region(
        [(B, (n, d)), (B, (d,))],
        [("_to_copy.default", [v(0)], {"dtype": {"dtype": F}}), ("pow.Tensor_Scalar", [v(2), 2]), ("mean.dim", [v(3), [-1], True]), ("add.Tensor", [v(4), 1e-6]),
         ("rsqrt.default", [v(5)]), ("mul.Tensor", [v(2), v(6)]), ("_to_copy.default", [v(7)], {"dtype": {"dtype": B}}), ("mul.Tensor", [v(1), v(8)])])
    n, d = (5, 48) if small else (8192, 768)
    yield "layer-norm", region(
        [(H, (n, d)), (H, (n, d)), (H, (d,)), (H, (d,))],
        [("add.Tensor", [v(0), v(1)]), ("layer_norm.default", [v(4), [d], v(2), v(3), 1e-5, False])], 4, 5)
    h, q, k = (2, 5, 33) if small else (12, 512, 512)
    yield "softmax-mask", region(
        [(H, (2, h, q, k)), ("bool", (2, 1, 1, k))],
        [("mul.Tensor", [v(0), 0.125]), ("masked_fill.Scalar", [v(2), v(1), -1e4]), ("softmax.int", [v(3), -1, None])])
    h, t, d = (3, 9, 16) if small else (32, 2048, 128)
    yield "rotary", region(
        [(H, (2, h, t, d), (h * t * d, d, h * d, 1)), (H, (1, 1, t, d)), (H, (1, 1, t, d))],
        [("mul.Tensor", [v(0), v(1)]), ("slice.Tensor", [v(0), 3, 0, d // 2, 1]), ("slice.Tensor", [v(0), 3, d // 2, _END, 1]),
         ("neg.default", [v(5)]), ("cat.default", [[v(6), v(4)], -1]), ("mul.Tensor", [v(7), v(2)]), ("add.Tensor", [v(3), v(8)])])
    n, d = (6, 50) if small else (4096, 11008)
    yield "swiglu", region([(B, (n, 2 * d))], [("slice.Tensor", [v(0), 1, 0, d, 1]), ("slice.Tensor", [v(0), 1, d, _END, 1]), ("silu.default", [v(1)]),
                                               ("mul.Tensor", [v(3), v(2)])])
    c, w = (3, 6) if small else (256, 56)
    yield "broadcasts", region(
        [(2, c, w, w), (1, c, 1, 1), (2, 1, w, w), (1, 1, 1, w)],
        [("mul.Tensor", [v(0), v(1)]), ("add.Tensor", [v(4), v(2)]), ("sub.Tensor", [v(5), v(3)]), ("hardswish.default", [v(6)])])
    yield "transposed", region([(F, (2, c, w, w), (c * w * w, 1, w * c, c)), (2, c, w, w)], [("add.Tensor", [v(0), v(1)]), ("relu.default", [v(2)])])
    n, d = (4, 60) if small else (4096, 512)
    yield "mixed", region(
        [(H, (n, d)), (B, (1, d)), (n, 1), ("int64", (n, d)), ("bool", (n, 1)), ("int8", (n, d))],
        [("add.Tensor", [v(0), v(1)]), ("mul.Tensor", [v(6), v(2)]), ("gt.Scalar", [v(3), 0]), ("logical_and.default", [v(8), v(4)]), ("where.self", [v(9), v(7), v(0)]),
         ("add.Tensor", [v(3), 3], {"alpha": 2}), ("mul.Tensor", [v(5), v(10)]), ("logical_not.default", [v(9)])], 9, 10, 11, 12, 13)
    n, c, w = (2, 20, 5) if small else (32, 256, 56)
    channels_last = (F, (n, c, w, w), (c * w * w, 1, w * c, c))
    norm = [("mean.dim", [v(0), [1], True]), ("sub.Tensor", [v(0), v(2)]), ("square.default", [v(3)]), ("mean.dim", [v(4), [1], True]), ("add.Tensor", [v(5), 1e-6]),
            ("rsqrt.default", [v(6)]), ("mul.Tensor", [v(3), v(7)]), ("mul.Tensor", [v(8), v(1)])]
    yield "norm-of-channels", region([(n, c, w, w), (c, 1, 1)], norm)
    yield "norm-of-channels-last", region([channels_last, (c, 1, 1)], norm)
    pooled = [("hardswish.default", [v(0)]), ("mean.dim", [v(1), [2, 3]]), ("sigmoid.default", [v(2)])]
    yield "pooled", region([(n, c, w, w)], pooled)
    yield "pooled-channels-last", region([channels_last], pooled)
    g = c // 4
    yield "norm-of-groups", region(
        [(H, (n, 4, g, w, w)), (H, (4, g, 1, 1))],
        [("var.correction", [v(0), [2, 3, 4]], {"correction": 0, "keepdim": True}), ("mean.dim", [v(0), [2, 3, 4], True]), ("sub.Tensor", [v(0), v(3)]),
         ("add.Tensor", [v(2), 1e-5]), ("rsqrt.default", [v(5)]), ("mul.Tensor", [v(4), v(6)]), ("mul.Tensor", [v(7), v(1)])])
    b, t, d = (2, 37, 24) if small else (16, 512, 768)
    yield "mean-of-tokens", region([(H, (b, t, d)), (H, (b, t, 1))], [("mul.Tensor", [v(0), v(1)]), ("sum.dim_IntList", [v(2), [1]]), ("div.Tensor", [v(3), 7.0])])
    yield "softmax-of-tokens", region([(b, t, d)], [("mul.Tensor", [v(0), 0.3]), ("softmax.int", [v(1), 1, None])])
    yield "angles", region([(t, 1), (1, d)], [("mul.Tensor", [v(0), v(1)]), ("sin.default", [v(2)]), ("cos.default", [v(2)])], 3, 4)
    n, d = (3, 4100) if small else (4096, 32000)
    yield "long-rows", region([(H, (n, d))], [("mul.Tensor", [v(0), 0.5]), ("amax.default", [v(1), [-1], True]), ("sub.Tensor", [v(1), v(2)]),
                                              ("softmax.int", [v(3), -1, None]), ("var.correction", [v(1), [-1]], {"correction": 1, "keepdim": True})], 2, 4, 5)
    n, d = (4, 90) if small else (2048, 8192)
    yield "log-softmax", region([(B, (n, d))], [("div.Tensor", [v(0), 0.7]), ("log_softmax.int", [v(1), -1, None])])
    yield "one-row", region([(1, 300), (300,)], [("add.Tensor", [v(0), v(1)]), ("softmax.int", [v(2), -1, None]), ("sum.dim_IntList", [v(3), [-1], True])], 3, 4)


def made_of(fragment: Fragment) -> Generated:
    """The Triton kernel of a region.

    Raises:
        Unfit: there can be none.
    """
    return spaces.make(fragment, "triton")  # type: ignore[return-value]


def check(fragment: Fragment, config: Config | None = None, inputs: Sequence[Tensor] | None = None, slack: float = 0.0) -> str | None:
    """None, or where the kernel's numbers break the rule for exact transformations.

    Args:
        config: None for the one that a call takes.
        inputs: None for random ones.
        slack: so many times the rounding unit more, where chains amplify what is rounded first.
    """
    made, inputs = made_of(fragment), inputs_of(fragment) if inputs is None else inputs
    with torch.no_grad():
        reference, before = FragmentModule(fragment, double=True)(*inputs), FragmentModule(fragment)(*inputs)
        after = made(inputs) if config is None else made.family.under(config, *inputs)
    for ref, old, new in zip(reference, before, after, strict=True):
        problem = Exact().failure(ref, old, new)
        if problem and not (slack and new.is_floating_point() and rms(new.double() - ref) <= slack * torch.finfo(torch.float32).eps * rms(ref)):
            return problem
        if old.stride() != new.stride() and old.is_contiguous() != new.is_contiguous():
            return f"strides {new.stride()} instead of {old.stride()}"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line per region and config; 1 where one fails."""
    parser = argparse.ArgumentParser(prog="graphwright.testing.generated", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("regions", nargs="*", help="only these")
    parser.add_argument("--machine-code", action="store_true", help="compile ahead of time instead of checking numbers")
    parser.add_argument("--target", action="append", default=[], help="only for this one")
    parser.add_argument("--first", type=int, default=10**9, help="only so many configs of each")
    options = parser.parse_args(argv)
    if not options.machine_code and not gpu.wanted():
        parser.error(gpu.unavailable() or "there is no GPU; set TRITON_INTERPRET=1 to run in the interpreter")
    failures = count = 0
    for name, fragment in regions(small=not options.machine_code):
        if options.regions and name not in options.regions:
            continue
        for what, problem in _compiled(fragment, options) if options.machine_code else _numbers(fragment, options):
            print(f"{name}: {what}{': ' + problem if problem else ''}", flush=True)
            failures, count = failures + bool(problem), count + 1
    print(f"{count} trials, {failures} failures")
    return int(bool(failures) or not count)


def _numbers(fragment: Fragment, options: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    for config in [*_few(made_of(fragment).family.configs, options.first), *small(fragment)]:
        begin = time.perf_counter()
        problem = check(fragment, config)
        yield f"{config} ({time.perf_counter() - begin:.1f} s)", problem


def small(fragment: Fragment) -> list[Config]:
    """Configs with many small tiles, such that loops turn and ends are ragged."""
    match made_of(fragment).source.form:
        case "flat":
            return [Config.of(BLOCK=64, warps=1)]
        case "tiles":
            return [Config.of(ROWS=2, BLOCK=16, warps=1)]
    rows = 2 if made_of(fragment).source.rows > 1 else 1
    return [Config.of(LONG=1, ROWS=rows, BLOCK=256 if made_of(fragment).source.columns > 2048 else 16, warps=1)]


def _compiled(fragment: Fragment, options: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    from graphwright.kernels.gpu import ahead

    made = made_of(fragment)
    inputs = fragment.zeros("meta")
    for config in _few(made.family.configs, options.first):
        for launch in made.family.plan(*inputs, config=config).launches:
            for target in options.target or ahead.TARGETS:
                built = ahead.compile_launch(launch, target)
                yield f"{config} {target} regs {built.registers} spills {built.spills} shared {built.shared} code {built.instructions}", None if _angles(made, built) else built.problem or None


def _angles(made: Generated, built: Any) -> bool:
    """Whether what lies in local memory is the table that the library's sine keeps there for huge angles."""
    return ("tl.sin(" in made.source.text or "tl.cos(" in made.source.text) and built.problem == f"{built.spills} spilled" and built.spills <= 64


def _few(configs: Sequence[Config], most: int) -> Sequence[Config]:
    """So many configs, the ends of the list among them."""
    return configs if len(configs) <= most else [configs[round(k * (len(configs) - 1) / max(most - 1, 1))] for k in range(most)]


__all__ = ["check", "made_of", "regions", "small"]

if __name__ == "__main__":
    sys.exit(main())
