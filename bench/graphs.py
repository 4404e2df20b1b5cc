"""Graphs of any size for measuring how Graphwright scales: programs built node by node, seeded, without a model.

Two forms, of the same ops (convolution, linear, norms, attention whole and written out, activations whole and written
out, elementwise, cat, split, reshape, permute; among them what the passes fuse, fold, merge and erase):

    blocks   one block of some eighty nodes after the other, each with weights of its own, as deep models are
    random   a graph in which every op reads values drawn from all that were made before it
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.ir import Program, Signature
from graphwright.structure import flatten

aten, own = torch.ops.aten, torch.ops.graphwright

FORMS = ("blocks", "random")
#: of every value in a graph: (batch, tokens, channels), and (batch, channels, side, side) where there are images
_BATCH, _TOKENS, _WIDTH, _SIDE = 2, 16, 8, 4
_HEADS = 2


def build(nodes: int, form: str, seed: int = 0) -> Program:
    """A program of about ``nodes`` ops (at most one block more), with its example inputs.

    Two inputs, float32: ``(2, 16, 8)`` and ``(2, 8, 4, 4)``; two outputs of the same shapes.

    Args:
        form: ``"blocks"`` or ``"random"``.
        seed: of weights and, for random graphs, of what reads what.
    """
    if form not in FORMS:
        raise ValueError(f"there is no form {form!r}; there are {', '.join(FORMS)}")
    return _Maker(seed).run(nodes, form)


class _Maker:
    """Builds one program; ``x`` and ``image`` in the parts are nodes of shapes (2, 16, 8) and (2, 8, 4, 4)."""

    def __init__(self, seed: int) -> None:
        self.draw, self.random = random.Random(seed), torch.Generator().manual_seed(seed)
        mode = torch._subclasses.FakeTensorMode()
        graph = fx.Graph()
        examples = [self._numbers(_BATCH, _TOKENS, _WIDTH), self._numbers(_BATCH, _WIDTH, _SIDE, _SIDE)]
        inputs = [graph.placeholder(name) for name in ("tokens", "image")]
        for node, example in zip(inputs, examples, strict=True):
            node.meta["val"] = mode.from_tensor(example, static_shapes=True)
        graph.output(tuple(inputs))
        self.inputs, outputs = inputs, flatten(tuple(examples))[1]
        self.program = Program(fx.GraphModule(nn.Module(), graph), Signature(outputs, outputs), mode)
        self.program.example = tuple(examples)
        self.count = 0
        self.place = ""

    def run(self, nodes: int, form: str) -> Program:
        program, end = self.program, self.program.output
        with program.graph.inserting_before(end):
            x, image = self._blocks(nodes) if form == "blocks" else self._scattered(nodes)
        end.args = ((x, image),)
        program.eval()
        program.recompile()
        return program

    # -- the two forms -------------------------------------------------------------------------------------------

    def _blocks(self, nodes: int) -> tuple[fx.Node, fx.Node]:
        x, image = self.inputs
        block = 0
        while self.count < nodes:
            self.place = f"blocks.{block}"
            for part in (self.attention, self.mlp, self.written_attention, self.gated, self.pieces):
                x = part(x)
            image = self.residual(image)
            image = self.inverted(image)
            block += 1
        return x, image

    def _scattered(self, nodes: int) -> tuple[fx.Node, fx.Node]:
        values, images = [self.inputs[0]], [self.inputs[1]]
        parts = 0
        while self.count < nodes - 2:
            self.place = f"parts.{parts}"
            if self.draw.random() < 0.3:
                images.append(self.draw.choice((self.residual, self.inverted, self.tail))(self._any(images)))
            else:
                part = self.draw.choice((self.attention, self.mlp, self.written_attention, self.gated, self.pieces,
                                         self.simple, self.simple, self.joined))  # fmt: skip
                values.append(part(self._any(values)))
            parts += 1
        return self._all(values), self._all(images)

    def _any(self, values: Sequence[fx.Node]) -> fx.Node:
        """A value drawn from all: mostly a late one, now and then the sum of two."""
        pick = lambda: values[-1 - min(int(self.draw.expovariate(0.3)), len(values) - 1)]
        one = pick() if self.draw.random() < 0.9 else self.draw.choice(values)
        other = pick()
        return one if other is one or self.draw.random() < 0.5 else self.call(aten.add.Tensor, one, other)

    def _all(self, values: Sequence[fx.Node]) -> fx.Node:
        """The sum of every value that nothing reads yet."""
        ends = [v for v in values if not v.users]
        total = ends[0]
        for value in ends[1:]:
            total = self.call(aten.add.Tensor, total, value)
        return total

    # -- parts ---------------------------------------------------------------------------------------------------

    def attention(self, x: fx.Node) -> fx.Node:
        """Layer norm, three projections, heads, attention, projection, residual: 17 nodes."""
        h = self.norm(x)
        q, k, v = (self.heads(self.linear(h, name)) for name in ("q", "k", "v"))
        mixed = self.call(aten.scaled_dot_product_attention.default, q, k, v)
        return self.call(aten.add.Tensor, x, self.linear(self.unheads(mixed), "out"))

    def written_attention(self, x: fx.Node) -> fx.Node:
        """The same with products and softmax in the place of the whole op, and dropout: 22 nodes."""
        h = self.norm(x)
        q, k, v = (self.heads(self.linear(h, name)) for name in ("query", "key", "value"))
        scores = self.call(aten.matmul.default, q, self.call(aten.transpose.int, k, -1, -2))
        scores = self.call(aten.div.Tensor, scores, math.sqrt(_WIDTH / _HEADS))
        weights = self.call(aten.softmax.int, scores, -1)
        mixed = self.call(aten.matmul.default, self.call(aten.dropout.default, weights, 0.1, False), v)
        return self.call(aten.add.Tensor, x, self.linear(self.unheads(mixed), "dense"))

    def mlp(self, x: fx.Node) -> fx.Node:
        """Layer norm, linear, gelu spelled out in five ops, linear, residual: 9 nodes."""
        h = self.linear(self.norm(x), "up", out=2 * _WIDTH)
        erf = self.call(aten.erf.default, self.call(aten.div.Tensor, h, math.sqrt(2.0)))
        half = self.call(aten.mul.Tensor, h, 0.5)
        h = self.call(aten.mul.Tensor, half, self.call(aten.add.Tensor, erf, 1.0))
        return self.call(aten.add.Tensor, x, self.linear(h, "down", into=2 * _WIDTH))

    def gated(self, x: fx.Node) -> fx.Node:
        """RMS norm spelled out, two projections, silu spelled out, product, linear, residual: 12 nodes."""
        square = self.call(aten.pow.Tensor_Scalar, x, 2)
        mean = self.call(aten.add.Tensor, self.call(aten.mean.dim, square, [-1], True), 1e-6)
        h = self.call(aten.mul.Tensor, x, self.call(aten.rsqrt.default, mean))
        h = self.call(aten.mul.Tensor, h, self.weight("scale", torch.ones(_WIDTH)))
        gate, up = self.linear(h, "gate"), self.linear(h, "wide")
        gate = self.call(aten.mul.Tensor, gate, self.call(aten.sigmoid.default, gate))
        return self.call(aten.add.Tensor, x, self.linear(self.call(aten.mul.Tensor, gate, up), "narrow"))

    def pieces(self, x: fx.Node) -> fx.Node:
        """Split, an op on each half, cat; a mean computed twice, a double transpose, casts without effect: 16 nodes."""
        both = self.call(aten.split.Tensor, x, _WIDTH // 2, -1)
        a, b = (self.call(aten.slice.Tensor, x, 2, k * _WIDTH // 2, (k + 1) * _WIDTH // 2) for k in range(2))
        del both  # read by nobody: dead
        joined = self.call(aten.cat.default, [self.call(aten.tanh.default, a), self.call(aten.relu.default, b)], -1)
        turned = self.call(aten.transpose.int, self.call(aten.transpose.int, joined, 1, 2), 1, 2)
        same = self.call(aten.contiguous.default, self.call(aten.mul.Tensor, turned, 1))
        means = [self.call(aten.mean.dim, same, [-1], True) for _ in range(2)]
        centred = self.call(aten.sub.Tensor, same, self.call(aten.add.Tensor, *means), alpha=0.5)
        scale = self.call(aten.exp.default, self.weight("log_scale", self._numbers(_WIDTH) * 0.1))
        return self.call(aten.mul.Tensor, self.call(aten.dropout.default, centred, 0.1, False), scale)

    def simple(self, x: fx.Node) -> fx.Node:
        """One elementwise op, or a reshape there and back."""
        if self.draw.random() < 0.3:
            flat = self.call(aten.view.default, x, [_BATCH * _TOKENS, _WIDTH])
            return self.call(aten.view.default, self.call(aten.relu.default, flat), [_BATCH, _TOKENS, _WIDTH])
        ops = (aten.relu, aten.tanh, aten.sigmoid, aten.gelu, aten.silu, aten.hardswish, aten.cos)
        return self.call(self.draw.choice(ops).default, x)

    def joined(self, x: fx.Node) -> fx.Node:
        """Twice as wide by cat, and back by a linear, an activation, a norm."""
        wide = self.call(aten.cat.default, [x, self.call(aten.neg.default, x)], -1)
        return self.norm(self.call(aten.relu.default, self.linear(wide, "mix", into=2 * _WIDTH)))

    def residual(self, image: fx.Node) -> fx.Node:
        """Two convolutions with batch norm, relu between, residual, relu: 7 nodes."""
        h = self.call(aten.relu.default, self.batch_norm(self.convolution(image, "conv1"), "bn1"))
        h = self.batch_norm(self.convolution(h, "conv2"), "bn2")
        return self.call(aten.relu.default, self.call(aten.add.Tensor, h, image))

    def inverted(self, image: fx.Node) -> fx.Node:
        """Depthwise and pointwise convolution behind explicit padding, hardswish, scale per channel: 6 nodes."""
        h = self.call(aten.pad.default, image, [1, 1, 1, 1])
        h = self.call(aten.hardswish.default, self.batch_norm(self.convolution(h, "deep", groups=_WIDTH, pad=0), "bn"))
        h = self.convolution(h, "point", size=1, pad=0)
        return self.call(aten.mul.Tensor, h, self.weight("gamma", torch.ones(_WIDTH, 1, 1) * 0.9))

    def tail(self, image: fx.Node) -> fx.Node:
        """One op on an image."""
        return self.call(self.draw.choice((aten.relu, aten.sigmoid, aten.hardtanh, aten.silu)).default, image)

    # -- pieces of parts -----------------------------------------------------------------------------------------

    def norm(self, x: fx.Node) -> fx.Node:
        scale, shift = self.weight("norm.weight", torch.ones(_WIDTH)), self.weight("norm.bias", torch.zeros(_WIDTH))
        return self.call(aten.layer_norm.default, x, [_WIDTH], scale, shift)

    def batch_norm(self, image: fx.Node, name: str) -> fx.Node:
        held = [self._numbers(_WIDTH).abs() + 0.5, self._numbers(_WIDTH), self._numbers(_WIDTH) * 0.1,
                self._numbers(_WIDTH).abs() + 0.5]  # fmt: skip
        names = ("weight", "bias", "running_mean", "running_var")
        tensors = [self.weight(f"{name}.{n}", t) for n, t in zip(names, held, strict=True)]
        return self.call(aten.batch_norm.default, image, *tensors, False, 0.1, 1e-5, False)

    def linear(self, x: fx.Node, name: str, *, into: int = _WIDTH, out: int = _WIDTH) -> fx.Node:
        weight = self.weight(f"{name}.weight", self._numbers(out, into) / math.sqrt(into))
        return self.call(aten.linear.default, x, weight, self.weight(f"{name}.bias", self._numbers(out) * 0.1))

    def convolution(self, image: fx.Node, name: str, *, size: int = 3, groups: int = 1, pad: int = 1) -> fx.Node:
        weight = self._numbers(_WIDTH, _WIDTH // groups, size, size) / math.sqrt(size * size * _WIDTH / groups)
        held = self.weight(f"{name}.weight", weight)
        return self.call(aten.conv2d.default, image, held, None, [1, 1], [pad, pad], [1, 1], groups)

    def heads(self, x: fx.Node) -> fx.Node:
        parts = self.call(aten.view.default, x, [_BATCH, _TOKENS, _HEADS, _WIDTH // _HEADS])
        return self.call(aten.transpose.int, parts, 1, 2)

    def unheads(self, x: fx.Node) -> fx.Node:
        rows = self.call(aten.contiguous.default, self.call(aten.transpose.int, x, 1, 2))
        return self.call(aten.reshape.default, rows, [_BATCH, _TOKENS, _WIDTH])

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        self.count += 1
        site = f"{self.place}.op{self.count}"
        return self.program.call(target, *args, sites=(site,), **kwargs)  # type: ignore[arg-type]

    def weight(self, name: str, value: Tensor) -> fx.Node:
        return self.program.add_tensor(f"{self.place}.{name}", value, trainable=True)

    def _numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)
