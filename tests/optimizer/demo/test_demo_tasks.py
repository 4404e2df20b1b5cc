"""The demo tasks' own code, on small made-up files; their real scores are in tests/system."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from graphwright.demo import cnn, load_task, minilm
from graphwright.errors import InputError


@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (1, 2), (1, 1)])
def test_conv_pads_like_tensorflow(kernel, stride):
    """Output i reads inputs from i*stride - before, where before is half of the padding, rounded down."""
    torch.manual_seed(0)
    conv = cnn.Conv(2, 3, kernel, stride)
    x = torch.randn(1, 2, 8, 8)
    total = max(kernel - stride, 0) if 8 % stride == 0 else kernel - 1
    before, after = total // 2, total - total // 2
    want = F.conv2d(F.pad(x, (before, after, before, after)), conv.weight, conv.bias, stride)
    torch.testing.assert_close(conv(x), want)
    assert want.shape[-1] == 8 // stride


def test_resnet8_has_the_published_size():
    parameters = sum(p.numel() for p in cnn.ResNet8().parameters())
    statistics = sum(b.numel() for n, b in cnn.ResNet8().named_buffers() if "running" in n)
    assert parameters + statistics == 78_666


def test_images_are_rows_of_a_picture(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    rows = np.random.default_rng(0).integers(0, 256, (4, 32 * 32, 3), dtype=np.uint8)
    Image.fromarray(rows).save(tmp_path / "x.png")
    (tmp_path / "y.json").write_text(json.dumps([3, 1, 4, 1, 5]))
    pixels, labels = cnn.images(tmp_path / "x.png", tmp_path / "y.json")
    assert pixels.shape == (4, 3, 32, 32) and labels.tolist() == [3, 1, 4, 1]
    assert pixels[2, 1, 5, 7] == (float(rows[2, 5 * 32 + 7, 1]) - 128) / 128


@pytest.fixture
def tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers

    words = tokenizers.Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    return {"tokenizer.json": tmp_path / "tokenizer.json"}


def test_every_batch_has_the_same_shape(tokenizer):
    made = minilm.batches(tokenizer, ["a", "a b a b a b", "b ?", "b", "a b"], 2, 4)
    assert [b["input_ids"].shape for b in made] == [(2, 4)] * 3
    assert made[0]["input_ids"].tolist() == [[2, 0, 0, 0], [2, 3, 2, 3]]
    assert made[0]["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert torch.equal(made[2]["input_ids"][0], made[2]["input_ids"][1])  # the last text, repeated
    assert made[1]["input_ids"].dtype == torch.int64


def test_embeddings_average_the_real_tokens_only():
    class Model(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            hidden = torch.stack([input_ids, input_ids**2], -1).float()
            return type("Out", (), {"last_hidden_state": hidden})

    batch = {
        "input_ids": torch.tensor([[1, 3, 99], [2, 99, 99]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
    }
    want = F.normalize(torch.tensor([[2.0, 5.0], [2.0, 4.0]]), dim=1)
    torch.testing.assert_close(minilm.embed(Model(), [batch]), want)


def test_an_unknown_demo_names_the_known_ones():
    with pytest.raises(InputError, match=r"'minilmm'; there are minilm, cnn(?s:.*)did you mean 'minilm'"):
        load_task("minilmm")


def test_a_missing_package_is_named_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr("graphwright.demo.find_spec", lambda name: None if name == "tokenizers" else object())
    monkeypatch.setattr(minilm, "fetch", lambda *args: pytest.fail("fetched"))
    with pytest.raises(InputError, match=r"needs tokenizers\n.*graphwright\[demo\]"):
        load_task("minilm")


@pytest.mark.parametrize("batch", [0, 7, -5])
def test_a_batch_that_leaves_a_rest_is_refused(batch):
    with pytest.raises(InputError, match="batch"):
        cnn.task(batch=batch)
