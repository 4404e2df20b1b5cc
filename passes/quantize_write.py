"""Writing a quantization plan into the program, and measuring what it did to each site."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.calibrate import observe
from graphwright.ir import Program, arg, args_by_name, set_arg, site_of, sites_of
from graphwright.numerics import sqnr_db
from graphwright.passes._nodes import renew
from graphwright.passes.observers import Grid
from graphwright.passes.quantize_plan import Anchor, Plan, pair_of
from graphwright.passes.quantize_weights import (
    ChannelMean,
    GroupedWeight,
    Int8Weight,
    mean_error,
    quantize_groups,
    quantize_weight,
)

_OPS = torch.ops.graphwright


class Writer:
    """Inserts quantize/dequantize pairs and int8 weights.

    Args:
        means: per anchor the mean of its input per channel; those anchors get their bias corrected.
    """

    def __init__(self, program: Program, means: Mapping[Anchor, ChannelMean]):
        self.program, self.means = program, means
        self._grids: Mapping[fx.Node, Grid] = {}
        self._weights: dict[tuple[str, int | None], tuple[fx.Node, Int8Weight | GroupedWeight]] = {}
        self._about: dict[Anchor, list[str]] = {}

    def describe(self, a: Anchor) -> str:
        """What was done at an anchor, in words."""
        return ", ".join(self._about[a])

    # -- activations -----------------------------------------------------------------------------------------------

    def static(self, found: Plan, grids: Mapping[fx.Node, Grid]) -> None:
        """A pair for every value of the plan, read by everything that the plan quantizes."""
        pairs = {v: self._pair(v, g) for v, g in grids.items()}
        for a in found.anchors:
            set_arg(a.node, a.reads, pairs[a.source])
            g = grids[a.source]
            self._about[a] = [f"input as {_short(g.dtype)}, scale {g.scale:.3g}, zero point {g.zero_point}"]
        for a in found.others:
            set_arg(a.node, str(a.other), pairs[arg(a.node, str(a.other))])
        for node in found.flow:
            node.args = fx.node.map_arg(node.args, lambda n: pairs.get(n, n))
            node.kwargs = fx.node.map_arg(node.kwargs, lambda n: pairs.get(n, n))

    def _pair(self, value: fx.Node, g: Grid) -> fx.Node:
        """The dequantized value behind a new pair, or behind the one that is there."""
        there = pair_of(value)
        if there is not None:
            return there[1]
        sites = sites_of(value) or sites_of(next(iter(value.users)))
        with self._after(value):
            q = self.program.call(_OPS.quantize.default, value, g.scale, g.zero_point, g.low, g.high, g.dtype, sites=sites)
            dtype = value.meta["val"].dtype
            return self.program.call(_OPS.dequantize.default, q, g.scale, g.zero_point, dtype, sites=sites)

    def _after(self, value: fx.Node) -> AbstractContextManager[Any]:
        """Right after an op; for inputs and constants, before the first op."""
        if value.op == "call_function":
            return self.program.graph.inserting_before(value.next)
        return self.program.graph.inserting_before(self.program.nodes[0])

    def dynamic(self, anchors: list[Anchor], *, symmetric: bool) -> None:
        """Every anchor reads its input through a pair whose scales are computed at run time; rows on a GPU about zero, as its kernels take them."""
        pairs: dict[tuple[fx.Node, bool], fx.Node] = {}
        for a in anchors:
            rows = not a.conv
            even = symmetric or rows and a.source.meta["val"].device.type == "cuda"
            if (a.source, rows) not in pairs:
                pairs[a.source, rows] = self._dynamic_pair(a, rows, even)
            set_arg(a.node, a.reads, pairs[a.source, rows])
            dtype = "int8" if even else "uint8"
            self._about[a] = [f"input as {dtype}, a scale per {'row' if rows else 'tensor'} at run time"]

    def _dynamic_pair(self, a: Anchor, rows: bool, symmetric: bool) -> fx.Node:
        low, high, dtype = (-128, 127, torch.int8) if symmetric else (0, 255, torch.uint8)
        sites = sites_of(a.source) or sites_of(a.node)
        with self._after(a.source):
            whole = self.program.call(_OPS.quantize_dynamic.default, a.source, rows, symmetric, low, high, dtype, sites=sites)
            parts = [self._item(whole, k) for k in range(3)]
            wanted = a.source.meta["val"].dtype
            return self.program.call(_OPS.dequantize_dynamic.default, *parts, wanted, sites=sites)

    def _item(self, whole: fx.Node, k: int) -> fx.Node:
        node = self.program.graph.call_function(operator.getitem, (whole, k))
        node.meta["sites"], node.meta["val"] = sites_of(whole), whole.meta["val"][k]
        return node

    def attention(self, node: fx.Node) -> fx.Node:
        """The op with int8 products in the place of an attention op."""
        a = args_by_name(node)
        if node.target is torch.ops.graphwright.attention.default:
            args = tuple(a.values())
        else:
            args = (a["query"], a["key"], a["value"], a["attn_mask"], a["scale"], a["is_causal"], False, 1.0, 0, 0, 0, None if a["query"].meta["val"].dtype == torch.float32 else a["query"].meta["val"].dtype)
        with self.program.graph.inserting_before(node):
            new = self.program.call(_OPS.attention_int8.default, *args, sites=sites_of(node))
        self.program.replace(node, new)
        renew(self.program, [new])  # ATen's op gives other strides than this one
        return new

    # -- weights ---------------------------------------------------------------------------------------------------

    def weights(self, anchors: Iterable[Anchor], *, per_channel: bool, by_groups: ByGroups | None = None) -> None:
        """Let anchors read their weights as integers; those with the same weight read the same integers.

        Args:
            by_groups: how linears store theirs where they are to have scales by groups.
        """
        anchors = list(anchors)
        quantized = {a.node for a in anchors}
        tables = {str(a.weight.target) for a in anchors if a.table}
        for a in anchors:
            key = (str(a.weight.target), a.axis if per_channel else None)
            others = [n for n in a.weight.users if n not in quantized]
            unfit = None if by_groups is None else by_groups.unfit(a, key[0] in tables)
            if key not in self._weights:
                self._weights[key] = self._store(a, key[1]) if by_groups is None or unfit is not None else self._store_groups(a, by_groups)
            real, stored = self._weights[key]
            set_arg(a.node, "weight", real)
            said = self._about.setdefault(a, [])
            said.insert(0, f"weight {'x'.join(map(str, a.weight.meta['val'].shape))} as {_spelled(stored)}" + (f" ({unfit})" if unfit else ""))
            if others:
                size = stored.values.numel() * stored.values.element_size() / 1e6
                said.append(f"the float weight stays for {site_of(others[0])}: the integers add {size:.2f} MB")
            if a in self.means and self._correct_bias(a, stored, self.means[a].mean):
                said.append("bias corrected")

    def _store(self, a: Anchor, axis: int | None) -> tuple[fx.Node, Int8Weight]:
        name, dtype = str(a.weight.target), a.weight.meta["val"].dtype
        stored = quantize_weight(self.program.tensor(name), axis)
        values = self.program.add_tensor(f"{name}_int8", stored.values, origin=[name])
        sites = sites_of(a.node)
        if axis is None:
            with self.program.graph.inserting_before(a.node):
                return self.program.call(_OPS.dequantize.default, values, float(stored.scales), 0, dtype, sites=sites), stored
        scales = self.program.add_tensor(f"{name}_scale", stored.scales, origin=[name])
        with self.program.graph.inserting_before(a.node):
            real = self.program.call(_OPS.dequantize_channel.default, values, scales, None, axis, dtype, sites=sites)
        return real, stored

    def _store_groups(self, a: Anchor, how: ByGroups) -> tuple[fx.Node, GroupedWeight]:
        name, dtype, sites = str(a.weight.target), a.weight.meta["val"].dtype, sites_of(a.node)
        stored = quantize_groups(self.program.tensor(name), how.bits, how.group, how.symmetric)
        values = self.program.add_tensor(f"{name}_int{how.bits}", stored.values, origin=[name])
        scales = self.program.add_tensor(f"{name}_scale", stored.scales, origin=[name])
        points = None if stored.zero_points is None else self.program.add_tensor(f"{name}_zero_point", stored.zero_points, origin=[name])
        with self.program.graph.inserting_before(a.node):
            if how.bits == 4:
                return self.program.call(_OPS.dequantize_packed.default, values, scales, points, how.group, dtype, sites=sites), stored
            return self.program.call(_OPS.dequantize_channel.default, values, scales, points, a.axis, dtype, sites=sites), stored

    def _correct_bias(self, a: Anchor, stored: Int8Weight | GroupedWeight, mean: Tensor) -> bool:
        args, weight = args_by_name(a.node), self.program.tensor(str(a.weight.target))
        error = mean_error(weight, stored, mean, args.get("groups", 1))
        node, name = args["bias"], str(a.weight.target).rpartition(".")[0] + ".bias"
        old = self.program.constant(node) if node is not None else None
        if node is not None and old is None:
            return False  # the bias is computed at run time
        if not bool(torch.isfinite(error).all()):
            return False  # what was seen was not finite
        base = error.new_zeros(error.shape) if old is None else old.double()
        name = (name if node is None else str(node.target)) + "_corrected"
        corrected = self.program.add_tensor(name.removeprefix("."), (base - error).to(weight.dtype),
                                            origin=[str(a.weight.target)] + ([] if node is None else [str(node.target)]))  # fmt: skip
        set_arg(a.node, "bias", corrected)
        return True


@dataclass(frozen=True)
class ByGroups:
    """How linears store their weights: ``bits`` (8 or 4), inputs of a ``group``, 0 in the middle or a zero point for each group; and whether
    ``tables`` of look-ups do so too."""

    bits: int
    group: int
    symmetric: bool
    tables: bool = False

    def unfit(self, a: Anchor, looked_up: bool) -> str | None:
        """Why an anchor's weight is stored as int8 with a scale per channel instead, "" where that goes without saying; None: it is not."""
        shape = tuple(a.weight.meta["val"].shape)
        if looked_up and not self.tables:
            return "" if a.table else "a look-up reads it too"
        if a.conv or a.axis != 0 or len(shape) != 2:
            return "groups are for linears"
        if self.bits == 4 and shape[1] % 2:
            return f"4-bit numbers go in pairs, and it has {shape[1]} inputs"
        if self.bits == 4 or self.group == shape[1] and not self.symmetric:
            return None
        if self.group >= shape[1]:
            return ""
        return f"its {shape[1]} inputs are no multiple of {self.group}" if shape[1] % self.group else None


def _spelled(stored: Int8Weight | GroupedWeight) -> str:
    """What a weight is stored as, in words."""
    if isinstance(stored, Int8Weight):
        return f"int8, a scale per {'tensor' if stored.axis is None else 'channel'}"
    width = stored.values.shape[1] * 8 // stored.bits
    per = "channel" if stored.group >= width else f"{stored.group} inputs"
    return f"int{stored.bits}, a scale{'' if stored.zero_points is None else ' and a zero point'} per {per}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- diagnosis -------------------------------------------------------------------------------------------------------


def site_errors(before: Program, after: Program, twins: Mapping[fx.Node, fx.Node],
                batch: tuple[Tensor, ...] | None) -> dict[fx.Node, float]:  # fmt: skip
    """SQNR in dB at each node of ``after``, everything before it quantized too; kept in ``meta["sqnr_db"]`` as well.

    Args:
        twins: nodes of ``before`` (the float program) and those of ``after`` that stand for them.
        batch: one batch of flat inputs; None: nothing can be said.
    """
    if batch is None:
        return {}
    reference: dict[fx.Node, Tensor] = {}
    errors: dict[fx.Node, float] = {}

    def keep(node: fx.Node) -> Any:
        return lambda value: reference.__setitem__(node, value)

    def compare(old: fx.Node, new: fx.Node) -> Any:
        def seen(value: Tensor) -> None:
            errors[new] = new.meta["sqnr_db"] = sqnr_db(reference.pop(old), value)

        return seen

    observe(before, [batch], {old: keep(old) for old in twins})
    observe(after, [batch], {new: compare(old, new) for old, new in twins.items()})
    return errors
