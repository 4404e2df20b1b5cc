"""Fold a scale and a shift per channel into the contraction before or after them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphwright.ir import Program, arg, args_by_name, set_arg, site_of
from graphwright.passes._nodes import base, only_user, rank, readers, trainable

CONVOLUTIONS = {"aten.conv1d": 1, "aten.conv2d": 2, "aten.conv3d": 3}
TRANSPOSED = {"aten.conv_transpose1d": 1, "aten.conv_transpose2d": 2, "aten.conv_transpose3d": 3}


def spatial_axes(node: fx.Node) -> int | None:
    """How many spatial axes a convolution has, transposed ones included; None for other nodes."""
    return {**CONVOLUTIONS, **TRANSPOSED}.get(base(node))


def is_contraction(node: object) -> bool:
    return base(node) == "aten.linear" or (isinstance(node, fx.Node) and spatial_axes(node) is not None)


def channel_axis(node: fx.Node) -> int:
    """The axis of a contraction's output, counted from the front, along which its weight's output channels lie."""
    spatial = spatial_axes(node)
    return rank(node) - 1 if spatial is None else rank(node) - 1 - spatial


@dataclass(frozen=True)
class Folded:
    """A contraction's new weight and bias, in the dtype of the old ones."""

    weight: Tensor
    bias: Tensor | None


def fits(program: Program, node: fx.Node, reader: fx.Node) -> str | None:
    """None, or why nothing can be folded into contraction ``node``, which ``reader`` reads."""
    if only_user(node) is not reader:
        return f"{site_of(node)} is read by {readers(node, [reader]) or 'it twice'} too"
    return constant_parts(program, node)


def constant_parts(program: Program, node: fx.Node) -> str | None:
    weight, bias = program.constant(arg(node, "weight")), arg(node, "bias")
    if weight is None:
        return f"the weight of {site_of(node)} is no constant"
    if bias is not None and program.constant(bias) is None:
        return f"the bias of {site_of(node)} is no constant"
    return None if weight.is_floating_point() else f"the weight of {site_of(node)} is {weight.dtype}"


def _parts(program: Program, node: fx.Node) -> tuple[Tensor, Tensor | None]:
    bias = arg(node, "bias")
    return program.tensor(str(arg(node, "weight").target)), None if bias is None else program.tensor(str(bias.target))


def after(program: Program, node: fx.Node, scale: Tensor, shift: Tensor | None) -> Folded | str:
    """Weights of ``scale * node(x) + shift``; ``scale`` and ``shift`` are float64, one number per output channel."""
    weight, bias = _parts(program, node)
    groups = args_by_name(node).get("groups", 1)
    wide = weight.detach().double()
    if base(node) in TRANSPOSED:  # [i, o / groups, *kernel]
        split = wide.reshape(groups, wide.shape[0] // groups, *wide.shape[1:])
        new = (split * _spread(scale.reshape(groups, 1, -1), split)).reshape(wide.shape)
    else:
        new = wide * _spread(scale, wide)
    moved = None if bias is None else bias.detach().double() * scale
    if shift is not None:
        moved = shift if moved is None else moved + shift
    return _narrow(weight, new, moved)


def before(program: Program, node: fx.Node, scale: Tensor, shift: Tensor | None) -> Folded | str:
    """Weights of ``node(scale * x + shift)``, one number per input channel; with a shift, ``node`` must not pad nor be transposed."""
    weight, bias = _parts(program, node)
    wide, held = weight.detach().double(), None if bias is None else bias.detach().double()
    if base(node) in TRANSPOSED:  # [i, o / groups, *kernel]
        if shift is not None:
            return f"{site_of(node)} is transposed"
        return _narrow(weight, wide * _spread(scale, wide), held)
    groups = args_by_name(node).get("groups", 1)
    split = wide.reshape(groups, wide.shape[0] // groups, *wide.shape[1:])
    new = (split * _spread(scale.reshape(groups, 1, -1), split)).reshape(wide.shape)
    if shift is None:
        return _narrow(weight, new, held)
    moved = (split * _spread(shift.reshape(groups, 1, -1), split)).reshape(wide.shape[0], -1).sum(1)
    return _narrow(weight, new, moved if held is None else moved + held)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))


def _narrow(old: Tensor, weight: Tensor, bias: Tensor | None) -> Folded | str:
    """Back to the old dtype, unless that loses more than rounding does."""
    kept = []
    for what, wide in (("weight", weight), ("bias", bias)):
        narrow = None if wide is None else wide.to(old.dtype)
        kept.append(narrow)
        if wide is None or narrow is None or not wide.numel():
            continue
        info, largest = torch.finfo(old.dtype), float(narrow.abs().max())
        if not math.isfinite(largest):
            return f"the folded {what} would not be finite in {old.dtype}"
        # Below the smallest normal number precision fades; it matters where the largest entries come near it.
        if largest < info.tiny / info.eps and float((narrow.double() - wide).norm()) > info.eps * float(wide.norm()):
            return f"the folded {what} is too small for {old.dtype}"
    return Folded(kept[0], kept[1])  # type: ignore[arg-type]


def install(
    program: Program, node: fx.Node, folded: Folded, origin: Sequence[fx.Node], sites: Sequence[str], suffix: str
) -> None:
    """Give ``node`` its folded weight and bias, under new names: other nodes may read the old ones."""
    weight, bias = arg(node, "weight"), arg(node, "bias")
    was = program.tensor(str(weight.target))
    names = [str(n.target) for n in origin]
    stem = str(weight.target)
    if not torch.equal(folded.weight, was):
        made = program.add_tensor(f"{stem}_{suffix}", folded.weight, origin=[stem, *names], trainable=trainable([was]))
        set_arg(node, "weight", made)
    if folded.bias is not None and (bias is None or not torch.equal(folded.bias, program.tensor(str(bias.target)))):
        source = [str(bias.target)] if bias is not None else []
        name = (
            source[0]
            if source
            else (f"{stem.removesuffix('weight')}bias" if stem.endswith("weight") else f"{stem}_bias")
        )
        set_arg(
            node,
            "bias",
            program.add_tensor(f"{name}_{suffix}", folded.bias, origin=[*source, *names], trainable=trainable([was])),
        )
    node.meta["sites"] = tuple(dict.fromkeys([*node.meta["sites"], *sites]))


def cancels(scale: Tensor, mean: Tensor, spread: Tensor) -> float:
    """How much larger what a fold subtracts is than what is left: RMS over channels of ``scale * mean`` over ``spread``."""
    left = float(spread.pow(2).mean().sqrt())
    return float((scale * mean).pow(2).mean().sqrt()) / left if left > 0 else float("inf")
