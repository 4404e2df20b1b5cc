"""Int8: quantize/dequantize pairs around matrix ops with constant weights and around what flows between them; 4 bits for weights alone.

A quantized op reads ``op(dequantize(quantize(x)), dequantize_channel(weight_int8), bias, ...)``. Every value has at most
one pair, read by all quantized readers; float readers keep reading the value itself. Weights of 4 bits are read through
``dequantize_packed``, two numbers a byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from graphwright.calibrate import missing, observe
from graphwright.errors import RecipeError, nearest
from graphwright.ir import Program, args_by_name, op_name, site_of
from graphwright.manager import Pass, PassResult
from graphwright.numerics import Lossy
from graphwright.passes.observers import Grid, Histogram, Rule, grid, rule
from graphwright.passes.quantize_plan import (
    Anchor,
    Plan,
    attention_unfit,
    find_anchor,
    float_inputs,
    groups,
    is_attention,
    is_matrix_op,
    is_table,
    pair_of,
    plan,
)
from graphwright.passes.quantize_weights import ChannelMean
from graphwright.passes.quantize_write import ByGroups, Writer, site_errors

#: Operands of a concatenation share its scale unless that would cost one of them more than this factor in resolution.
_COARSER = 4.0

_CHOICES = {
    "mode": ("static", "dynamic", "weight-only"),
    "activations": ("uint8", "int8"),
    "residual": ("auto", "float", "int8"),
    "bits": (8, 4),
    "symmetric": (None, True, False),
    "embedding_bits": (8, 4),
}
#: Inputs that share a scale where weights have 4 bits and nothing else is said.
_GROUP = 128


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantize matrix ops and what flows between them to int8, or weights alone to 8 or 4 bits.

    Args:
        mode: ``"static"``: activations by ranges seen during calibration. ``"dynamic"``: by ranges computed at run
            time, per row for linears and per tensor for convolutions. ``"weight-only"``: weights alone.
        activations: ``"uint8"`` with a zero point, or ``"int8"`` without. Rows whose ranges are found at run time are int8 on a GPU.
        observer: ``"min-max"``, ``"percentile"``, ``"mse"``, a rule of ``graphwright.passes.observers`` with its
            parameters (``Percentile(99.9)``), or ``"auto"``: mse between convolutions, min-max elsewhere. The few
            large numbers in a transformer carry meaning, and clipping them costs ten times the error of min-max.
        per_channel: a scale for each output channel of a weight, or one for all.
        residual: how adds and products read operands that exist as int8: ``"auto"`` (as int8 between convolutions, as
            float elsewhere), ``"float"`` or ``"int8"``.
        bias_correction: where there are calibration data, take the mean error that rounding the weights causes back
            out of the bias.
        attention: round queries, keys, values and probabilities inside attention to int8 too (not when weight-only), with
            scales found at run time. Such a program can't be trained.
        embeddings: store the tables of look-ups as int8 too, a scale per row: smaller files, the same speed.
        bits: of the weights of linears, 8 or 4 (``"weight-only"``, and ``"dynamic"`` with inputs as int8 about zero). What 4 bits can't
            serve (convolutions, a weight that a look-up reads too) has 8 and a scale per channel; the report says where.
        group: how many neighbouring inputs of an output channel share a scale (``"weight-only"``, or 4 bits). Kernels read groups of 32, 64, 128 and
            other multiples of 8 up to 512, and all of the inputs; None: a scale per channel, with 4 bits 128. With 8 bits a layer whose
            inputs are no multiple has a scale per channel.
        symmetric: of weights with groups: 0 in the middle of the numbers, or where each group wants it (a zero point for each); None:
            the first with 8 bits, the second with 4, where a wasted number counts.
        embedding_bits: 4: the tables of look-ups as the weights of linears.
    """

    name: ClassVar[str] = "quantize"
    numerics: ClassVar[Lossy] = Lossy(floor_db=5.0)

    mode: str = "static"
    activations: str = "uint8"
    observer: str | Rule = "auto"
    per_channel: bool = True
    residual: str = "auto"
    bias_correction: bool = True
    attention: bool = True
    embeddings: bool = False
    bits: int = 8
    group: int | None = None
    symmetric: bool | None = None
    embedding_bits: int = 8

    def __post_init__(self) -> None:
        for option, known in _CHOICES.items():
            value = getattr(self, option)
            if value not in known:
                raise RecipeError(f"Quantize({option}={value!r}): there are {', '.join(map(repr, known))}",
                                  hint=nearest(str(value), known) or None)  # fmt: skip
        if self.observer != "auto":
            rule(self.observer)
        if self.group is not None and (isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 1):
            raise RecipeError(f"Quantize(group={self.group!r}): a group is some number of inputs", hint="Write group=128.")
        if self.mode == "static" and self._by_groups is not None:
            raise RecipeError('Quantize(mode="static"): no product takes 4 bits or groups with inputs under one scale', hint='Write mode="weight-only", or "dynamic".')
        if self.mode == "dynamic" and self._by_groups is not None and self.bits == 8:
            raise RecipeError('Quantize(mode="dynamic", group=...): groups of 8 bits are for weights alone', hint='Write mode="weight-only", or bits=4.')
        if self._by_groups is None and (self.symmetric is False or self.embedding_bits == 4):
            raise RecipeError("Quantize: zero points of weights and 4-bit embeddings belong to groups", hint="Write bits=4, or group=128.")
        if self._by_groups is not None and not self.per_channel:
            raise RecipeError("Quantize(per_channel=False): groups are finer than channels", hint="Leave one of the two out.")
        if self.embedding_bits == 4 and (self.bits == 8 or not self.embeddings):
            raise RecipeError("Quantize(embedding_bits=4) belongs to bits=4 and embeddings=True", hint="Write both, or leave it out.")

    @property
    def _by_groups(self) -> ByGroups | None:
        """How linears store their weights, where that is by groups."""
        if self.bits == 8 and self.group is None:
            return None
        symmetric = self.bits == 8 if self.symmetric is None else self.symmetric
        return ByGroups(self.bits, self.group or _GROUP, symmetric, self.embedding_bits == 4)

    @property
    def needs_calibration(self) -> bool:
        """Whether ``program.calibration`` must hold batches."""
        return self.mode == "static"

    def run(self, program: Program) -> PassResult:
        """See the class.

        Raises:
            CalibrationError: static, and ``program.calibration`` is empty.
        """
        result = PassResult()
        anchors = self._anchors(program, result)
        attentions = self._attentions(program, result)
        if not anchors and not attentions:
            result.notes.append("no matrix op with a constant weight is left to quantize")
            return result
        every, anchors = anchors, [a for a in anchors if not a.table]
        if self.needs_calibration and not program.calibration:
            raise missing("static int8")
        before = program.copy()
        twins = dict(zip(program.nodes, before.nodes, strict=True))
        ranges = _Ranges(plan(anchors, program.graph.nodes, self.residual) if self.mode == "static" else Plan(anchors))
        writer = Writer(program, ranges.observe(program, [a for a in anchors if self.bias_correction]))
        if self.mode == "static":
            anchors = self._static(program, anchors, ranges, writer, result)
        elif self.mode == "dynamic":
            writer.dynamic(anchors, symmetric=self.activations == "int8" or self.bits == 4)
        anchors = [a for a in every if a.table or a in anchors]  # in graph order: the first reader comes first
        writer.weights(anchors, per_channel=self.per_channel, by_groups=self._by_groups)
        rounded = {node: writer.attention(node) for node in attentions}
        program.tidy()
        batch = next(iter(program.calibration), program.example)
        stand_for = {twins[a.node]: a.node for a in anchors} | {twins[old]: new for old, new in rounded.items()}
        errors = site_errors(before, program, stand_for, batch)
        for new in rounded.values():
            said = f", SQNR {errors[new]:.1f} dB" if new in errors else ""
            result.change(site_of(new), "queries, keys, values and probabilities as int8, scales at run time" + said)
        for a in sorted(anchors, key=lambda a: errors.get(a.node, 0.0)):
            said = writer.describe(a) + (f", SQNR {errors[a.node]:.1f} dB" if a.node in errors else "")
            result.change(site_of(a.node), said)
        return result

    # -- what ----------------------------------------------------------------------------------------------------

    def _anchors(self, program: Program, result: PassResult) -> list[Anchor]:
        found = []
        for node in program.nodes:
            wanted = is_matrix_op(node) or (self.embeddings and is_table(node))
            if not wanted or self.refused(result, node):
                continue
            anchor = find_anchor(program, node)
            if isinstance(anchor, str):
                result.refuse(site_of(node), anchor)
            else:
                found.append(anchor)
        return found

    def _attentions(self, program: Program, result: PassResult) -> list[fx.Node]:
        """Attention ops whose products are to be rounded; those that can't be are refused."""
        found: list[fx.Node] = []
        if not self.attention or self.mode == "weight-only":
            return found
        for node in program.nodes:
            if not is_attention(node) or self.refused(result, node):
                continue
            reason = attention_unfit(node)
            if reason:
                result.refuse(site_of(node), reason)
            else:
                found.append(node)
        return found

    def _static(self, program: Program, anchors: list[Anchor], ranges: _Ranges, writer: Writer,
                result: PassResult) -> list[Anchor]:  # fmt: skip
        """Decide and insert the activations' pairs; gives the anchors that are left."""
        kept = []
        for a in anchors:
            reason = ranges.trouble(a.source)
            if reason:
                result.refuse(site_of(a.node), f"its input {reason}")
            else:
                kept.append(a)
        barred = {v for v in ranges.plan.values if ranges.trouble(v)}
        found = plan(kept, program.graph.nodes, self.residual, barred)
        writer.static(found, ranges.grids(found, self.observer, self.activations == "int8"))
        return kept


def _input_axis(a: Anchor) -> int | None:
    """The axis of an anchor's input over which it sums, from the end; None where this file does not know it."""
    name = op_name(a.node.target)
    if "transpose" in name or args_by_name(a.node).get("transposed"):
        return None
    return -1 if "linear" in name else -(a.weight.meta["val"].ndim - 1) if a.conv else None


@dataclass
class _Ranges:
    """What calibration shows of the values of a plan."""

    plan: Plan
    seen: dict[fx.Node, Histogram] = field(default_factory=dict)

    def observe(self, program: Program, corrected: Iterable[Anchor]) -> dict[Anchor, ChannelMean]:
        """Watch the values of the plan, as far as they are no copies of others.

        Args:
            corrected: anchors for which the mean of their input per channel is wanted.

        Returns:
            Those means; none without calibration data.
        """
        if not program.calibration:
            return {}
        derived = {n for _, n in self.plan.shared}
        self.seen = {v: Histogram() for v in self.plan.values if v not in derived}
        watchers: dict[fx.Node, list[Any]] = {v: [h] for v, h in self.seen.items()}
        means = {a: ChannelMean(axis) for a in corrected if (axis := _input_axis(a)) is not None}
        for a, mean in means.items():
            watchers.setdefault(a.source, []).append(mean)
        hooks = {v: (lambda x, ws=tuple(ws): [w.update(x) for w in ws]) for v, ws in watchers.items()}
        observe(program, program.calibration, hooks)  # type: ignore[arg-type]
        return {a: m for a, m in means.items() if m.count}

    def of(self, value: fx.Node) -> Histogram:
        """What was seen of a value, or of the values that it copies."""
        if value in self.seen:
            return self.seen[value]
        return _merged(self.of(s) for s in float_inputs(value))

    def trouble(self, value: fx.Node) -> str | None:
        """Why no scale can be had for a value."""
        seen = self.of(value)
        if seen.bad:
            return f"held {seen.bad} NaN or infinite values during calibration"
        if not seen.seen:
            return "was empty during calibration"
        return "was zero throughout calibration" if seen.low == seen.high == 0 else None

    def grids(self, found: Plan, observer: str | Rule, symmetric: bool) -> dict[fx.Node, Grid]:
        """A grid per value; those that share are given the same object."""
        grids: dict[fx.Node, Grid] = {}
        for members in groups(found.values, (p for p in found.shared if self._may_share(*p))):
            there = next((p for m in members if (p := pair_of(m)) is not None), None)
            if there is not None:  # an earlier run decided
                grids.update(dict.fromkeys(members, Grid(*there[0].args[1:])))  # type: ignore[arg-type]
                continue
            watched = [m for m in members if m in self.seen] or members
            seen = _merged(self.of(m) for m in watched)
            auto = "mse" if all(m in found.conv for m in members) else "min-max"
            how = rule(auto if observer == "auto" else observer)
            chosen = grid(*how.range(seen, symmetric), symmetric=symmetric)
            grids.update(dict.fromkeys(members, chosen))
        return grids

    def _may_share(self, source: fx.Node, copy: fx.Node) -> bool:
        if len(float_inputs(copy)) == 1:
            return True
        spans = [max(h.high, 0.0) - min(h.low, 0.0) for h in (self.of(source), self.of(copy))]
        return spans[1] <= _COARSER * spans[0]


def _merged(histograms: Iterable[Histogram]) -> Histogram:
    total = Histogram()
    for h in histograms:
        total = total.merged(h)
    return total
