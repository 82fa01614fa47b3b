"""Digits with wrong labels: 3,000 of MNIST, and a Vision Transformer of 100,000 parameters from random weights.

A share of the labels for training, and of those for validation, is replaced by another digit, drawn evenly; those of
the 1,000 test rows are right. The learning rate is chosen by the accuracy of validation rows, wrong labels included.
For GCE q is 0.7, as in Zhang and Sabuncu 2018. The teacher of symmetric CE is a moving average of 50 steps.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import tiny_vit
import torch
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

ARMS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"loss": "cross_entropy"},
    "label smoothing": {"loss": "cross_entropy:label_smoothing=0.1"},
    "focal": {"loss": "focal"},
    "GCE": {"loss": "comp_sum:tau=1.7"},
    "TaiLr": {"loss": "tailr:gamma=0.5"},
    "bias": {"loss": "bias"},
    "L2-SVM": {"loss": "svm"},
    "pairs": {"loss": "pairs"},
    "Core-tuning": {"loss": "core_tuning"},
    "symmetric CE": {"loss": "symmetric_ce", "momentum": 0.98},
}
RATES = (3e-4, 1e-3, 3e-3)
METRICS = ("accuracy", "NLL")
TRAINING = {"num_train_epochs": 8, "per_device_train_batch_size": 64, "per_device_eval_batch_size": 500}
TRAIN, VALIDATION = 3000, 1000
CLASSES = 10


@cache
def images(split: str, seed: int) -> list[dict[str, Any]]:
    """Pixels and label of every digit, in an order of the seed."""
    return tiny_vit.images("mnist", split, seed)


def rows(source: str, seed: int) -> list[list[dict[str, Any]]]:
    """Rows for training and validation, with `source` % of wrong labels, and for the test."""
    draw = np.random.default_rng(seed)
    noisy = []
    for row in images("train", seed)[: TRAIN + VALIDATION]:
        wrong = draw.integers(1, CLASSES) if draw.random() < int(source) / 100 else 0
        noisy.append({**row, "labels": int(row["labels"] + wrong) % CLASSES})
    return [noisy[:TRAIN], noisy[TRAIN:], images("test", 0)]


def model(source: str) -> tuple[Any, None]:
    """The classifier, from random weights; batches are the trainer's."""
    config = ViTConfig(image_size=tiny_vit.SIDE, patch_size=7, num_channels=1, num_labels=CLASSES, **tiny_vit.SHAPE)
    return ViTForImageClassification(config), None


def measured(loss: Any, validation: Any, test: Any) -> dict[str, float]:
    """Accuracies, and the mean -log p_y where the loss has probabilities."""
    accuracy, seen = ((loss.predict(z) == y).double().mean().item() for z, y in (test, validation))
    found = {"accuracy": accuracy, "validation": seen}
    p = loss.scores(test[0]).double()
    if torch.allclose(p.sum(-1), torch.ones(len(p), dtype=p.dtype), atol=1e-4):
        found["NLL"] = F.nll_loss(p.clamp(min=1e-12).log(), test[1]).item()
    return found
