"""The zoo: models with random weights that stand for real ones where only speed and error matter.

Speed does not depend on what the weights say, so nothing is downloaded. Numerical error does depend on them a
little, so the weights are made to look like trained ones: biases and norm gains are drawn at random (all-zero
biases would hide a peer that drops them), and batch norms have statistics that fit the activations they see.

    entry = get("resnet50")
    model = entry.model()            # seeded, in eval mode; the same weights in every process
    model(*entry.example())          # or model(**entry.example()) where the inputs are a dict
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...] | dict[str, Tensor]

EXAMPLE_SEED, CALIBRATION_SEED, CHECK_SEED = 1, 1_000, 2_000


@dataclass(frozen=True)
class Tolerance:
    """Lowest signal-to-noise ratio in dB, against float64 eager, at which a peer of that precision counts."""

    float32: float = 60.0
    bf16: float = 14.0
    int8: float = 8.0

    def floor(self, precision: str) -> float:
        """The bound for one precision; raises ValueError for a word that is none of the three."""
        if precision not in ("float32", "bf16", "int8"):
            raise ValueError(f"unknown precision {precision!r}: expected float32, bf16 or int8")
        return getattr(self, precision)


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    `build` makes the module (called with the random generator seeded); `sample(generator)` makes one set of
    inputs, a tuple for positional arguments or a dict for keyword arguments. `settle` says how many images to
    run through the batch norms to give them statistics that fit (0: the model has none).
    """

    name: str
    description: str
    build: Callable[[], nn.Module]
    sample: Callable[[torch.Generator], Inputs]
    tolerance: Tolerance = field(default_factory=Tolerance)
    settle: int = 0

    def model(self, seed: int = 0) -> nn.Module:
        """The module in eval mode, float32, CPU; equal weights for equal seeds. The global generator is untouched."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
            _roughen(model)
            if self.settle:
                _settle_batch_norm(model, [self._sample(seed + 3_000 + i) for i in range(self.settle)])
        return model.eval().requires_grad_(False)

    def example(self) -> Inputs:
        """The inputs that are timed."""
        return self._sample(EXAMPLE_SEED)

    def calibration(self, batches: int = 8) -> list[Inputs]:
        """Inputs for calibration, all different from the example and from the check inputs."""
        return [self._sample(CALIBRATION_SEED + i) for i in range(batches)]

    def checks(self, count: int = 2) -> list[Inputs]:
        """Inputs whose outputs are compared: the example, then others of the same shape that no peer was shown."""
        return [self.example(), *(self._sample(CHECK_SEED + i) for i in range(count - 1))]

    def _sample(self, seed: int) -> Inputs:
        return self.sample(torch.Generator().manual_seed(seed))


def call(model: Callable[..., object], inputs: Inputs) -> object:
    """`model` called the way `inputs` says: a tuple positionally, a dict by keyword."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def tensors(inputs: Inputs) -> list[Tensor]:
    """The tensors of `inputs` in order."""
    return list(inputs.values() if isinstance(inputs, dict) else inputs)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """`inputs` with every floating-point tensor converted to `dtype`; token ids and masks stay."""

    def one(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    if isinstance(inputs, dict):
        return {name: one(t) for name, t in inputs.items()}
    return tuple(one(t) for t in inputs)


def get(name: str) -> Entry:
    """The entry called `name`; KeyError with the known names otherwise."""
    for entry in ZOO:
        if entry.name == name:
            return entry
    raise KeyError(f"no model {name!r} in the zoo; known: {', '.join(e.name for e in ZOO)}")


# -- weights that look trained ---------------------------------------------------------------------------------


def _roughen(model: nn.Module) -> None:
    """Add noise to every vector parameter (biases, norm gains), which start as exact zeros and ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


def _settle_batch_norm(model: nn.Module, samples: list[Inputs]) -> None:
    """Set running mean and variance to the averages over `samples`; other modules stay in eval mode."""
    norms = [m for m in model.eval().modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = None  # cumulative average instead of an exponential one
        norm.reset_running_stats()
    with torch.no_grad():
        call(model, _concatenated(samples))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _concatenated(samples: list[Inputs]) -> Inputs:
    return tuple(torch.cat(parts) for parts in zip(*map(tensors, samples), strict=True))


# -- inputs ----------------------------------------------------------------------------------------------------


def _image(*shape: int) -> Callable[[torch.Generator], Inputs]:
    """Images with large soft shapes and fine noise, about zero mean and unit variance, float32 [N, C, H, W]."""

    def sample(generator: torch.Generator) -> Inputs:
        n, c, h, w = shape
        coarse = torch.randn(n, c, max(h // 16, 2), max(w // 16, 2), generator=generator)
        soft = nn.functional.interpolate(coarse, size=(h, w), mode="bilinear", align_corners=False)
        return (1.2 * soft + 0.5 * torch.randn(shape, generator=generator),)

    return sample


def _tokens(batch: int, length: int, vocabulary: int, padded: bool) -> Callable[[torch.Generator], Inputs]:
    """Token ids and attention mask, int64 [batch, length]; `padded` gives each row a length of its own."""

    def sample(generator: torch.Generator) -> Inputs:
        ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
        lengths = torch.full((batch,), length)
        if padded:
            lengths[1:] = torch.randint(length // 4, length + 1, (batch - 1,), generator=generator)
        return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}

    return sample


# -- models (transformers is imported where used: the harness and its tests run without it) -----------------------


def _resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=1000))


def _bert(hidden: int, layers: int, heads: int, intermediate: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import BertConfig, BertModel

        return BertModel(
            BertConfig(
                hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=intermediate
            )
        )

    return build


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    )


def _causal_lm() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    # Prompt processing only. Set `model.config.use_cache = True` to get the past keys and values as well.
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            use_cache=False,
        )
    )


def _from_config(model: str, config: str, **settings: object) -> Callable[[], nn.Module]:
    """A model of transformers' by the names of its class and of its configuration's."""

    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return build


def _sound(batch: int, samples: int) -> Callable[[torch.Generator], Inputs]:
    """Noise of zero mean and unit variance, smoothed a little, float32 [batch, samples]."""

    def sample(generator: torch.Generator) -> Inputs:
        noise = torch.randn(batch, 1, samples + 4, generator=generator)
        smooth = nn.functional.avg_pool1d(noise, 5, 1)[:, 0]
        return ((smooth - smooth.mean(-1, keepdim=True)) / smooth.std(-1, keepdim=True),)

    return sample


_LLAMA = {"vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
          "num_key_value_heads": 4, "max_position_embeddings": 512, "use_cache": False}  # fmt: skip
_GPT2 = {"vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
_DEBERTA = {"vocab_size": 8192, "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 3072,
            "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0}  # fmt: skip
_T5 = {"vocab_size": 8192, "d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
_B0 = {"image_size": 224, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}


class _SamePad(nn.Conv2d):
    """A convolution padded as Keras does: at stride 2 on the right and at the bottom only."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2 if stride == 1 else 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] == 2 and self.kernel_size[0] == 3:
            x = nn.functional.pad(x, (0, 1, 0, 1))
        return super().forward(x)


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _SamePad(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = _SamePad(outputs, outputs, 3, 1), nn.BatchNorm2d(outputs)
        self.shortcut = _SamePad(inputs, outputs, 1, stride) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.shortcut(x)).relu()


class ResNet8(nn.Module):
    """The residual network of MLPerf Tiny: float32 [N, 3, 32, 32] to logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = _SamePad(3, 16, 3, 1), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(_ResidualBlock(16, 16, 1), _ResidualBlock(16, 32, 2), _ResidualBlock(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.norm(self.conv(x)).relu())
        return self.head(nn.functional.avg_pool2d(x, 8).flatten(1))


def _tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


ZOO: tuple[Entry, ...] = (
    Entry("resnet50", "ResNet-50 (transformers), 1x3x224x224", _resnet50, _image(1, 3, 224, 224), settle=2),
    Entry(
        "minilm",
        "MiniLM-L6 (BertModel 384/6/12/1536), 8x128, padded",
        _bert(384, 6, 12, 1536),
        _tokens(8, 128, 30522, padded=True),
    ),
    Entry(
        "bert-base",
        "BERT-base (BertModel 768/12/12/3072), 1x128",
        _bert(768, 12, 12, 3072),
        _tokens(1, 128, 30522, padded=False),
    ),
    Entry("vit-s16", "ViT-S/16 (transformers 384/12/6/1536), 1x3x224x224", _vit, _image(1, 3, 224, 224)),
    Entry(
        "mobilenet-v2",
        "MobileNetV2 (transformers), 1x3x224x224",
        _from_config("MobileNetV2ForImageClassification", "MobileNetV2Config", num_labels=1000),
        _image(1, 3, 224, 224),
        settle=2,
    ),
    Entry(
        "efficientnet-b0",
        "EfficientNet-B0 (transformers), 1x3x224x224",
        _from_config("EfficientNetForImageClassification", "EfficientNetConfig", num_labels=1000, **_B0),
        _image(1, 3, 224, 224),
        settle=2,
    ),
    Entry(
        "convnext-t",
        "ConvNeXt-T (transformers), 1x3x224x224",
        _from_config("ConvNextForImageClassification", "ConvNextConfig", num_labels=1000),
        _image(1, 3, 224, 224),
    ),
    Entry(
        "swin-t",
        "Swin-T (transformers), 1x3x224x224",
        _from_config("SwinForImageClassification", "SwinConfig", num_labels=1000),
        _image(1, 3, 224, 224),
    ),
    Entry(
        "gpt2",
        "GPT-2 (transformers 768/12/12), prompt of 1x128",
        _from_config("GPT2LMHeadModel", "GPT2Config", **_GPT2),
        _tokens(1, 128, 8192, padded=False),
    ),
    Entry(
        "llama-768",
        "Llama 768/12/12 with 4 key-value heads, prompt of 1x128",
        _from_config("LlamaForCausalLM", "LlamaConfig", **_LLAMA),
        _tokens(1, 128, 8192, padded=False),
    ),
    Entry(
        "deberta-v3-small",
        "DeBERTa-v3-small (transformers 768/6/12/3072), 1x128",
        _from_config("DebertaV2Model", "DebertaV2Config", **_DEBERTA),
        _tokens(1, 128, 8192, padded=False),
    ),
    Entry(
        "t5-small-encoder",
        "encoder of T5-small (transformers 512/6/8/2048), 4x128, padded",
        _from_config("T5EncoderModel", "T5Config", **_T5),
        _tokens(4, 128, 8192, padded=True),
    ),
    Entry(
        "wav2vec2-base",
        "Wav2Vec2-base (transformers 768/12/12), one second of sound",
        _from_config("Wav2Vec2Model", "Wav2Vec2Config"),
        _sound(1, 16000),
    ),
    Entry("resnet8", "ResNet8 of MLPerf Tiny, 1x3x32x32", ResNet8, _image(1, 3, 32, 32), settle=16),
    Entry(
        "causal-lm",
        "Llama 256/4/8 with 4 key-value heads, prompt of 1x64",
        _causal_lm,
        _tokens(1, 64, 4096, padded=False),
    ),
    Entry(
        "tiny",
        "one convolution and one linear, 2x3x16x16: the harness's own check",
        _tiny,
        _image(2, 3, 16, 16),
        settle=4,
    ),
)
