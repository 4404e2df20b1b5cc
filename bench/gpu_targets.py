"""What kernels shall reach on a GPU, at which shapes, and what the model that ranks their configs predicts there.

    python -m bench.gpu_targets            # predictions for an H200 as a Markdown table: expectations, no measurements
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

#: Share of a matrix unit's rate that a loop of ours can ask for at best on sm_90. int8: tiles of 128 x 256 with instructions of 64 x 128 move
#: 144 bytes of shared memory for each clock's worth of products, of 128 that it can (89 %), and every turn waits for its own product (93 %).
HELD = {"int8": 0.83, "fp16": 0.93, "fp8": 0.88, "f32": 0.9}

#: Of an H200: bytes per second that a copy moves (read and written) and that the L2 cache gives (5120 a clock), int8 and fp8 operations per second.
COPY, L2, PEAK = 4.3e12, 9e12, 1979e12


@dataclass(frozen=True)
class Target:
    """A shape that matters.

    Attributes:
        kernel: the family's name.
        sample: one of its benchmark samples by name; or a layer, as ``microbench.shapes`` writes it, with a variant of ``microbench.cases``.
        of: what is asked: ``"peak"`` and ``"copy"`` (shares), ``"tops"``, or nothing.
        least: how much of it.
        ahead: and to be faster than these peers (those that ran).
    """

    kernel: str
    sample: str | tuple[str, tuple[int, ...], str]
    of: str = ""
    least: float = 0.0
    ahead: tuple[str, ...] = ()


_BIG = "8192x8192x8192 bf16"
_INT = ("int_mm", "inductor", "autotuned")

#: By importance: a session that is cut short has measured the first ones.
TARGETS = (
    Target("linear_int8_persistent", _BIG, "peak", 0.65, _INT),
    Target("linear_int8_few", "16x8192x28672", "copy", 0.8, _INT),
    Target("linear_w4", ("linear", (1, 8192, 32768), ""), "copy", 0.8, ("float",)),
    Target("conv2d_int8", ("conv", (256, 256, 14, 14, 256, 3, 1), ""), "peak", 0.5, ("float",)),
    Target("attention_int8_qk", "1x8x8192x128", "tops", 516, ("sdpa",)),
    Target("norm_quantize_rows", "16384x4096 rms, residual, sum", "copy", 0.85, ("inductor",)),
    Target("linear_block_sparse", ("linear", (2048, 4096, 4096), "half"), ahead=("float",)),
    Target("linear_int8", _BIG, "peak", 0.65, _INT),
    Target("linear_int8_few", "1x8192x28672", "copy", 0.8, ("inductor",)),
    Target("linear_int8_few", "64x8192x28672", "copy", 0.8, _INT),
    Target("linear_w4", ("linear", (16, 8192, 32768), ""), "copy", 0.7, ("float",)),
    Target("conv2d_int8", ("conv", (256, 128, 28, 28, 128, 3, 1), ""), "peak", 0.5, ("float",)),
    Target("attention_int8_qk_few", "1x32x1x8192x128, 8 groups", ahead=("sdpa",)),
    Target("attention_int8_qk_few", "16x32x1x8192x128, 8 groups, key mask", ahead=("sdpa",)),
    Target("norm_quantize", "16384x4096 rms to int8", "copy", 0.85, ("inductor",)),
    Target("linear_fp8", "8192x8192x8192", ahead=("scaled_mm",)),
    Target("linear_fp8_few", "16x8192x28672", ahead=("scaled_mm",)),
    Target("linear_block_sparse", ("linear", (2048, 4096, 4096), "half int8"), ahead=("float",)),
    Target("linear_sparse24", "16x4096x14336", ahead=("float",)),
    Target("linear_w8_groups", ("linear", (1, 8192, 28672), ""), ahead=("float",)),
    Target("linear_w4a8", ("linear", (16, 8192, 32768), ""), ahead=("float",)),
    Target("activate_quantize_rows", "4096x11008 silu * gate bf16", ahead=("inductor",)),
    Target("quantize_rows", "16384x4096 fp16", ahead=("inductor",)),
    Target("linear_int8_persistent", "4096x4096x14336 silu", ahead=_INT),
    Target("linear_int8", "512x4096x6144", ahead=_INT),
)


def sample_of(target: Target) -> Any:
    """The target's sample.

    Raises:
        KeyError: the kernel has none of that name.
    """
    from graphwright.kernels import gpu
    from graphwright.microbench.cases import samples_for
    from graphwright.microbench.shapes import Shapes

    family = gpu.families()[target.kernel]
    if isinstance(target.sample, str):
        return {s.name: s for s in family.samples()}[target.sample]
    kind, shape, variant = target.sample
    return {v: s for s, v in samples_for(family.op, Shapes(**{kind: (shape,)}), "cuda")}[variant]


@dataclass(frozen=True)
class Prediction:
    """What is expected on a GPU: the config that ranks first, seconds, shares, and what takes longest."""

    config: str
    seconds: float
    tops: float
    of_peak: float
    of_copy: float


def predict(target: Target) -> Prediction:
    """What the model says for an H200: its data sheet's rates less ``HELD``, device memory at the speed of a copy, clocks that do not drop."""
    import torch
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    from graphwright.kernels import gpu
    from graphwright.kernels.gpu import tuning
    from graphwright.kernels.gpu.machine import KNOWN

    family, found = gpu.families()[target.kernel], replace(KNOWN["H200"], dram=COPY, l2=L2)
    sample, generator = sample_of(target), torch.Generator().manual_seed(0)
    try:
        with FakeTensorMode():
            args = sample.args(generator)
    except DataDependentOutputException:  # which blocks are there is for the numbers to say
        args = sample.args(generator)

    def seconds(config: Any) -> float:
        work = family.estimate(config, *args)
        return tuning.predict(config, replace(work, ops=int(work.ops / HELD[work.unit])), found)

    cost, best = family.cost(*args), min(tuning.rank(family, args, found), key=seconds)
    spent = seconds(best)
    peak = PEAK if family.estimate(best, *args).unit in ("int8", "fp8") else PEAK / 2
    return Prediction(str(best), spent, cost.flops / spent / 1e12, cost.flops / spent / peak, cost.bytes / spent / COPY)


def asked(target: Target) -> str:
    """What is asked, in words."""
    share = {"peak": f"{target.least:.0%} of 1979 TOPS", "copy": f"{target.least:.0%} of a copy", "tops": f"{target.least:.0f} TOPS"}.get(target.of, "")
    return ", ".join(filter(None, [share, f"ahead of {', '.join(target.ahead)}" if target.ahead else ""]))


def name_of(target: Target) -> str:
    """The sample's name."""
    return target.sample if isinstance(target.sample, str) else " ".join(["x".join(map(str, target.sample[1])), target.sample[2]]).strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the predictions."""
    argparse.ArgumentParser(prog="python -m bench.gpu_targets", description=(__doc__ or "").splitlines()[0]).parse_args(argv)
    print("| kernel | shape | asked | predicted, not measured | of the peak | of a copy | config |\n|---|---|---|---:|---:|---:|---|")
    for t in TARGETS:
        p = predict(t)
        print(f"| `{t.kernel}` | {name_of(t)} | {asked(t)} | {1e6 * p.seconds:.0f} µs, {p.tops:.0f} TOPS | {p.of_peak:.0%} | {p.of_copy:.0%} | {p.config} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
