"""Logits of genres by a linear head on a sentence encoder, and of passes of the encoder with dropout.

    found = logits("genres:brown:package@minilm", seed, folder)     {"validation": (scores, labels, views), "test": ...}

Six genres of the Brown corpus (genres.py), 60 paragraphs of each for the head, and up to 200 for validation and test,
from other documents. Features are the mean of the encoder's last states and stay as they are, so they are computed
once; a seed draws two thirds of the rows for the head, a logistic regression, and half of the others for validation.
Views: four passes with the dropout of the encoder's training, a tenth of its states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from genres import GENRES, paragraphs
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer

from hf_xent.system.files import replace_atomically

PASSES, TRAIN, TEST, SPLITS = 4, 60, 200, ("validation", "test")


@torch.no_grad()
def features(encoder: str, texts: list[str], passes: int) -> torch.Tensor:
    """Mean states [1 + passes, N, D]: without dropout, and with it."""
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.empty(1 + passes, len(texts), model.config.hidden_size)
    for index in range(1 + passes):
        model.train(index > 0)
        torch.manual_seed(index)
        for part in (order[i : i + 32] for i in range(0, len(order), 32)):
            batch = tokenizer(
                [texts[i] for i in part], padding=True, truncation=True, max_length=96, return_tensors="pt"
            )
            mask = batch["attention_mask"][..., None]
            found[index, part] = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    return found


def logits(source: str, seed: int, folder: Path) -> dict[str, Any]:
    """Scores [M, K], labels [M] and views [V, M, K] of every split; features are kept in a file."""
    file, (corpus, _, encoder) = folder / "features.pt", source.partition(":")[2].rpartition("@")
    if not file.exists():
        parts = paragraphs(corpus, TRAIN, TEST)
        found = [
            (features(encoder, rows["text"][:], k), rows["labels"][:])
            for rows, k in zip(parts, (0, PASSES), strict=True)
        ]
        replace_atomically(file, lambda draft: torch.save(found, draft))
    (train, train_labels), (states, labels) = torch.load(file)
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(len(train_labels))[: len(train_labels) * 2 // 3]
    head = LogisticRegression(C=100.0, max_iter=2000).fit(train[0, chosen].numpy(), np.array(train_labels)[chosen])
    assert list(head.classes_) == list(range(len(GENRES)))
    z = torch.stack([torch.from_numpy(head.decision_function(part.numpy())) for part in states])
    halves = np.array_split(draw.permutation(len(labels)), 2)
    return {
        name: (z[0, rows], torch.tensor(labels)[rows], z[1:, rows]) for name, rows in zip(SPLITS, halves, strict=True)
    }
