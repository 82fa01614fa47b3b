"""Progression of diabetes in a year, in hundreds (0.25 to 3.46): as a number, and as what lists of 20 are ranked by.

A network with one hidden layer reads ten measures of 442 people, standardised by the training rows. The seed divides
them into 240 for training, 100 for validation and 100 for the test, in lists of 20. The learning rate has the best mean
absolute error of validation rows, and for the losses of lists, which give no number, the most pairs in order.
`pairs in order` are those of a list whose scores have the order of their progressions, `first three` is the mean
progression of the three highest scores in a list as a share of the largest such mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset

from hf_xent import data
from hf_xent.models.table import TableConfig, TableForSequenceClassification

RANGE = "low=0.25, high=3.46"
ARMS: dict[str, dict[str, Any]] = {
    "squared error": {"loss": "squared_error"},
    "HL-Gauss": {"loss": f"hl_gauss:{RANGE}"},
    "two-hot": {"loss": f"two_hot:{RANGE}"},
    "PA-BCE, first 6": {"loss": "pairwise_gain"},
    "PA-BCE, all": {"loss": "pairwise_gain:top=0"},
}
RATES = (3e-3, 1e-2, 3e-2)
METRICS = ("mean absolute error", "pairs in order", "first three")
TRAINING = {"num_train_epochs": 60, "per_device_train_batch_size": 40, "per_device_eval_batch_size": 100}
LIST, PARTS = 20, (240, 100, 100)


def rows(source: str, seed: int) -> list[Dataset]:
    """Rows for training, validation and test; the last two people of the seed's order are left out."""
    found = data.load("diabetes", split="train")
    order = np.random.default_rng(seed).permutation(len(found))
    values, labels = np.array(found["values"])[order], np.array(found["label"])[order] / 100
    values = (values - values[: PARTS[0]].mean(0)) / values[: PARTS[0]].std(0)
    parts, end = [], 0
    for size in PARTS:
        start, end = end, end + size
        part = {"values": values[start:end].astype(np.float32), "labels": labels[start:end].astype(np.float32)}
        parts.append(Dataset.from_dict({**part, "list_id": [i // LIST for i in range(size)]}))
    return parts


def model(source: str) -> tuple[Any, None]:
    """The network, from random weights; batches are the trainer's."""
    return TableForSequenceClassification(TableConfig(features=10, encoder="mlp", hidden_size=64, num_labels=1)), None


def measured(loss: Any, validation: Any, test: Any) -> dict[str, float]:
    """The metrics; an error only where the loss learns numbers."""
    found = ranked(loss, *test)
    if loss.columns:
        return {**found, "validation": ranked(loss, *validation)["pairs in order"]}
    error, seen = ((loss.predict(z) - y).abs().mean().item() for z, y in (test, validation))
    return {"mean absolute error": error, **found, "validation": -seen}


def ranked(loss: Any, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """How lists of 20 rows, one after the other, are ranked; a tie is half a pair in order."""
    s, y = loss.predict(logits).double().view(-1, LIST), labels.double().view(-1, LIST)
    pairs = y[:, :, None] > y[:, None]
    above = ((s[:, :, None] - s[:, None]).sign()[pairs] + 1) / 2
    first = y.gather(1, s.topk(3).indices).mean() / y.topk(3).values.mean()
    return {"pairs in order": above.mean().item(), "first three": first.item()}
