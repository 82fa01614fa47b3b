"""Digits with wrong labels: 3,000 of MNIST, and a Vision Transformer of 100,000 parameters from random weights.

A share of the labels for training, and of those for validation, is replaced by another digit, drawn evenly; those of
the 1,000 test rows are right. The learning rate is chosen by the accuracy of validation rows, wrong labels included.
For GCE q is 0.7, as in Zhang and Sabuncu 2018. The teacher of symmetric CE is a moving average of 50 steps.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from hf_xent import data

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
TRAINING = {"num_train_epochs": 5, "per_device_train_batch_size": 64, "per_device_eval_batch_size": 500}
TRAIN, VALIDATION = 3000, 1000
CLASSES = 10


@cache
def images(split: str) -> tuple[torch.Tensor, np.ndarray]:
    """Pixels from -1 to 1 [N, 1, 28, 28], and labels [N]."""
    rows = data.load("mnist", split=split)
    pixels = np.stack([np.asarray(image, np.float32) for image in rows["image"]])
    return torch.tensor(pixels / 127.5 - 1)[:, None], np.array(rows["label"])


def rows(source: str, seed: int) -> list[list[dict[str, Any]]]:
    """Rows for training and validation, with `source` % of wrong labels, and for the test."""
    pixels, labels = images("train")
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(labels))[: TRAIN + VALIDATION]
    wrong = draw.random(len(order)) < int(source) / 100
    noisy = (labels[order] + wrong * draw.integers(1, CLASSES, len(order))) % CLASSES
    parts = (pixels[order][:TRAIN], noisy[:TRAIN]), (pixels[order][TRAIN:], noisy[TRAIN:]), images("test")
    return [[{"pixel_values": x, "labels": int(y)} for x, y in zip(*part, strict=True)] for part in parts]


def model(source: str) -> tuple[Any, None]:
    """The classifier, from random weights; batches are the trainer's."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    config = ViTConfig(**sizes, image_size=28, patch_size=7, num_channels=1, num_labels=CLASSES)
    return ViTForImageClassification(config), None


def measured(loss: Any, validation: Any, test: Any) -> dict[str, float]:
    """Accuracies, and the mean -log p_y where the loss has probabilities."""
    accuracy, seen = ((loss.predict(z) == y).double().mean().item() for z, y in (test, validation))
    found = {"accuracy": accuracy, "validation": seen}
    p = loss.scores(test[0]).double()
    if torch.allclose(p.sum(-1), torch.ones(len(p), dtype=p.dtype), atol=1e-4):
        found["NLL"] = F.nll_loss(p.clamp(min=1e-12).log(), test[1]).item()
    return found
