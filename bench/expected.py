"""How often each fusion is to be found in an architecture: formulas over its configuration, one function per kind of model.

What a layer holds times the number of layers, and what stands outside them. The names are those of
``bench.architectures.FUSIONS``; what a formula leaves out is expected nowhere. Where a model cannot have a fusion (gpt-2's
one linear for query, key and value; a norm between a linear and its residual add), the formula says so.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

Formula = Callable[[Any], Counter[str]]


def several(**numbers: int) -> Counter[str]:
    """Counts by name; underscores stand for spaces."""
    return Counter({name.replace("_", " "): n for name, n in numbers.items()})


def layers(n: int, *, norms: int = 2, residuals: int = 2, activations: int = 1, merged: int = 1, **more: int) -> Counter[str]:
    """``n`` layers of one attention and one feed-forward part each; the numbers are those of one layer."""
    return several(attention=n, raised_attention=n, heads=n, norms=n * norms, residuals=n * residuals,
                   activations=n * activations, merged=n * merged) + several(**{k: n * v for k, v in more.items()})  # fmt: skip


def depth(c: Any) -> int:
    """The number of layers under whichever name the configuration gives it."""
    return next(getattr(c, k) for k in ("num_hidden_layers", "n_layers", "n_layer", "num_layers") if hasattr(c, k))


def encoder(*, pooler: bool = True, raised_activations: int = 0, **each: int) -> Formula:
    """BERT and its kin: a norm of the embeddings (or a last one), layers, a pooler with tanh."""
    return lambda c: (layers(depth(c), raised_activations=raised_activations, **each)
                      + several(norms=1, activations=int(pooler)))  # fmt: skip


#: A gated feed-forward part: gate and up become one more merged linear, its activation a pass over their product.
GATED = {"merged": 2, "activations": 0, "gates": 1}


def decoder(*, rms: bool = False, first: int = 0, **each: int) -> Formula:
    """Layers and a last norm, RMS norms written out; ``first``: norms of the embeddings."""

    def formula(c: Any) -> Counter[str]:
        found = layers(depth(c), **each) + several(norms=1 + first)
        return found + several(raised_norms=found["norms"]) if rms else found

    return formula


def soft_capped(c: Any) -> Counter[str]:
    """Gemma 2: tanh stands between the products of its attention, and a norm before each residual add; tanh on the logits too,
    which their linear can take in where its weight is its own, since it is to be divided by the cap first."""
    n = depth(c)
    norms, capped = 4 * n + 1, int(not c.tie_word_embeddings)
    return several(norms=norms, raised_norms=norms, merged=2 * n, gates=n, activations=capped, softmax=n)


def mixed_by_fourier(c: Any) -> Counter[str]:
    """FNet: no attention, so one residual add in two follows a linear."""
    n = depth(c)
    return several(norms=2 * n + 1, residuals=n, activations=n + 1, raised_activations=n)


def squeezed(c: Any) -> Counter[str]:
    """SqueezeBERT: convolutions instead of linears, whose results come out in another order than attention's heads."""
    return encoder(merged=0)(c) - several(heads=depth(c))


def funnel(c: Any) -> Counter[str]:
    return layers(sum(c.block_sizes), raised_activations=1) + several(norms=1)


def state_space(c: Any) -> Counter[str]:
    """Mamba: one norm and one residual add a layer; silu follows a slice, softplus a product with its weight on the left."""
    n = depth(c)
    return several(norms=n + 1, raised_norms=n + 1, residuals=n)


def _pair(encoders: int, decoders: int, outside: int) -> Counter[str]:
    """Encoder and decoder; all cross-attentions read one input, four linears of them are merged at a time."""
    found = layers(encoders) + layers(decoders) + layers(decoders, norms=1, residuals=1, activations=0, merged=0)
    return found + several(norms=outside, merged=-(-2 * decoders // 4))


def t5(c: Any) -> Counter[str]:
    found = _pair(c.num_layers, c.num_decoder_layers, 2)
    n = c.num_layers + c.num_decoder_layers
    if c.is_gated_act:
        found = found + several(raised_activations=n, merged=n, gates=n) - several(activations=n)
    return found + several(raised_norms=found["norms"])


def bart(outside: int, *, convolutions: int = 0) -> Formula:
    """BART's kin: ``outside`` norms of the embeddings or after the last layer."""
    return lambda c: _pair(c.encoder_layers, c.decoder_layers, outside) + several(activations=convolutions)


# -- images ----------------------------------------------------------------------------------------------------------


def windows(*, residuals: int) -> Formula:
    """Swin: a norm of the patches, one where patches are merged, a last one; window attention ends in no linear before its add."""
    return lambda c: layers(sum(c.depths), residuals=residuals) + several(norms=2 + len(c.depths) - 1)


def pyramid(last: Callable[[int], int], ratios: str) -> Formula:
    """SegFormer, PVT: a norm of every stage's patches, one in every layer that shortens keys and values, ``last`` ones."""

    def formula(c: Any) -> Counter[str]:
        stages = len(c.depths)
        shortened = sum(n for n, r in zip(c.depths, getattr(c, ratios), strict=True) if r > 1)
        return layers(sum(c.depths)) + several(norms=stages + shortened + last(stages))

    return formula


def pooled(c: Any) -> Counter[str]:
    """PoolFormer: pooling instead of attention; both of a layer's norms are group norms."""
    n = sum(c.depths)
    return several(norms=2 * n, residuals=n, activations=n)


def cvt(c: Any) -> Counter[str]:
    """Query, key and value each come of a convolution with a batch norm, and so of no one input."""
    n = sum(c.depth)
    return layers(n, merged=0, batch_norms=3) + several(norms=len(c.depth))


def convnext(c: Any) -> Counter[str]:
    """A norm after the first convolution, in every block, before every further stage, and a last one."""
    n = sum(c.depths)
    return several(norms=1 + n + len(c.depths) - 1 + 1, activations=n)


def levit(c: Any) -> Counter[str]:
    """Attention in every layer and between stages, where queries come of fewer places; batch norm behind every linear."""
    n, between = sum(c.depths), len(c.depths) - 1
    heads = n + between
    feed_forward = n + between
    # behind the attention of a layer and behind each feed-forward part stands a residual add
    return several(attention=heads, raised_attention=heads, heads=heads, residuals=n + feed_forward,
                   activations=3 + feed_forward, batch_norms=4 + 2 * n + 3 * between + 2 * feed_forward)  # fmt: skip


def mobilevit(c: Any) -> Counter[str]:
    """Inverted residuals of three convolutions: one, three, and one before each of three stages of transformer layers."""
    transformer, inverted, stages = (2, 4, 3), 1 + 3 + 3, 3
    n = sum(transformer)
    # each stage: a convolution, one that projects back and one that fuses have norm and activation; one more has neither
    return (layers(n) + several(norms=stages, residuals=1 + 2, batch_norms=1 + 3 * inverted + 3 * stages + 1,
                                activations=1 + 2 * inverted + 3 * stages + 1))  # fmt: skip


def resnet(c: Any) -> Counter[str]:
    """Bottlenecks of three convolutions, with a projection where a stage begins."""
    n, projections = sum(c.depths), len(c.depths)
    return several(batch_norms=1 + 3 * n + projections, activations=1 + 3 * n, residuals=n)


def regnet(c: Any) -> Counter[str]:
    """As ResNet, with squeeze and excitation: two more convolutions, each with an activation."""
    return resnet(c) + several(activations=2 * sum(c.depths))


def mobilenet_v1(c: Any) -> Counter[str]:
    """A first convolution, thirteen pairs of a depthwise one and a pointwise one."""
    return several(batch_norms=27, activations=27)


def mobilenet_v2(c: Any) -> Counter[str]:
    """A stem of three convolutions, sixteen inverted residuals of three, a last one; one of three has no activation."""
    channels, strides = [16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320], {0, 2, 5, 12}
    added = sum(a == b and k not in strides for k, (a, b) in enumerate(itertools.pairwise(channels)))
    return several(batch_norms=3 + 16 * 3 + 1, activations=2 + 16 * 2 + 1, residuals=added)


def efficientnet(c: Any) -> Counter[str]:
    """A convolution before and one after blocks of: expansion (not in all), depthwise, two of squeeze and excitation, projection."""
    blocks = [math.ceil(c.depth_coefficient * n) for n in c.num_block_repeats]
    n, expanded = sum(blocks), sum(n for n, ratio in zip(blocks, c.expand_ratios, strict=True) if ratio != 1)
    return several(batch_norms=2 + 2 * n + expanded, activations=2 + 3 * n + expanded, residuals=n - len(blocks))


# -- audio, and text with images ---------------------------------------------------------------------------------------


def wav2vec2(c: Any) -> Counter[str]:
    """Norms: in the first of the convolutions, before and after the projection; the other convolutions take gelu in."""
    return layers(depth(c)) + several(norms=3, activations=len(c.conv_dim) - 1)


def wavlm(c: Any) -> Counter[str]:
    """As Wav2Vec2, but attention is that of ``torch.nn.functional``, time before batch: its heads and its linear are turned round."""
    return wav2vec2(c) - several(heads=depth(c), residuals=depth(c))


def clip(c: Any) -> Counter[str]:
    """Two encoders; the images' has norms before and after, the text's after."""
    n = c.text_config.num_hidden_layers + c.vision_config.num_hidden_layers
    return layers(n, raised_activations=1) + several(norms=3)


def siglip(c: Any) -> Counter[str]:
    """Two encoders, a norm after each; the images' ends in attention of ``torch.nn.functional`` from one learned query, and a feed-forward part."""
    n = c.text_config.num_hidden_layers + c.vision_config.num_hidden_layers
    return layers(n) + several(norms=3, attention=1, raised_attention=1, activations=1, residuals=1)
