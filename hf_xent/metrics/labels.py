"""Measures of predicted labels: of classes, of numbers, and of an order."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import pearsonr, rankdata
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, root_mean_squared_error


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
    f1 = f1_score(labels, predicted, average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(labels, predicted)), "macro_f1": float(f1)}


def of_numbers(labels: Any, predicted: Any) -> dict[str, float]:
    """Errors of numbers, and how far they go together.

    Args:
        labels: Numbers, [N].
        predicted: Likewise.

    Returns:
        `mae`, `rmse`, in the unit of the labels, and `pearson`, from -1 to 1; nan where one side does not vary.
    """
    labels, predicted = np.asarray(labels, np.float64), np.asarray(predicted, np.float64)
    size = {"mae": mean_absolute_error(labels, predicted), "rmse": root_mean_squared_error(labels, predicted)}
    return {**{name: float(value) for name, value in size.items()}, "pearson": _correlation(labels, predicted)}


def of_order(labels: Any, predicted: Any) -> dict[str, float]:
    """How far two orders agree.

    Args:
        labels: Numbers, [N].
        predicted: Likewise, in any unit.

    Returns:
        `spearman`, from -1 to 1: the correlation of ranks, where equal numbers share their mean rank.
    """
    return {"spearman": _correlation(rankdata(labels), rankdata(predicted))}


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    return float(pearsonr(x, y).statistic) if varies else float("nan")
