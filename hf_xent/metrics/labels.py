"""Measures of predicted labels: of classes, of numbers, and of an order."""

from __future__ import annotations

from typing import Any

import numpy as np


def of_classes(labels: Any, predicted: Any) -> dict[str, float]:
    """Accuracy, and the mean over classes of their F1; a class that is neither a label nor predicted is left out.

    Args:
        labels: Ids of classes, [N].
        predicted: Likewise.

    Returns:
        `accuracy` and `macro_f1`, from 0 to 1; nan without rows.
    """
    labels, predicted = np.asarray(labels, np.int64), np.asarray(predicted, np.int64)
    if not len(labels):
        return {"accuracy": float("nan"), "macro_f1": float("nan")}
    size = 1 + max(labels.max(), predicted.max())
    true, called, both = (np.bincount(x, minlength=size) for x in (labels, predicted, labels[labels == predicted]))
    there = true + called > 0
    f1 = 2 * both[there] / (true + called)[there]
    return {"accuracy": float((labels == predicted).mean()), "macro_f1": float(f1.mean())}


def of_numbers(labels: Any, predicted: Any) -> dict[str, float]:
    """Errors of numbers, and how far they go together.

    Args:
        labels: Numbers, [N].
        predicted: Likewise.

    Returns:
        `mae`, `rmse`, in the unit of the labels, and `pearson`, from -1 to 1; nan where one side does not vary.
    """
    labels, predicted = np.asarray(labels, np.float64), np.asarray(predicted, np.float64)
    errors = predicted - labels
    size = {"mae": float(np.abs(errors).mean()), "rmse": float(np.sqrt((errors**2).mean()))}
    return {**size, "pearson": _correlation(labels, predicted)}


def of_order(labels: Any, predicted: Any) -> dict[str, float]:
    """How far two orders agree.

    Args:
        labels: Numbers, [N].
        predicted: Likewise, in any unit.

    Returns:
        `spearman`, from -1 to 1: the correlation of ranks, where equal numbers share their mean rank.
    """
    return {"spearman": _correlation(_ranks(labels), _ranks(predicted))}


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / size) if size > 0 else float("nan")


def _ranks(values: Any) -> np.ndarray:
    """Ranks from 0, the mean rank for equal values."""
    _, inverse, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]
