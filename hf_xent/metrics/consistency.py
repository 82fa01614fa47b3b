"""How consistently a model answers items that are asked in K formats, and how correctly.

A model that always gives one answer agrees perfectly with itself, so `Consistency` reports agreement beside accuracy,
the label marginals, and the results of the best constant predictor.

Source: observed agreement as in Fleiss 1971, with the metrics that Hejabi et al. 2025, arXiv:2510.14242, report.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from sklearn.metrics import f1_score


@dataclass(frozen=True)
class Consistency:
    """Measures of the predictions of N items in K formats; all are shares in [0, 1]."""

    agreement: float  # mean over items of the share of agreeing pairs of formats (Fleiss' observed agreement)
    f1: float  # mean over formats: F1 of label 1 if there are two labels, else macro F1
    f1_spread: float  # population standard deviation of F1 over formats
    accuracy: float  # mean over formats
    vote_accuracy: float  # of the most common prediction for each item; ties go to the lower label
    marginals: tuple[float, ...]  # share of predictions with each label
    constant_f1: float  # of the constant predictor with the best accuracy; its agreement is 1
    constant_accuracy: float

    def as_dict(self) -> dict[str, float]:
        """A flat dictionary for logs, with the marginals as predicted_0, predicted_1, ..."""
        shares = {k: v for k, v in asdict(self).items() if k != "marginals"}
        return shares | {f"predicted_{i}": share for i, share in enumerate(self.marginals)}


def consistency(predictions: np.ndarray, gold: np.ndarray, choices: int) -> Consistency:
    """How consistent predictions are over formats, and how correct.

    Args:
        predictions: Predicted labels [N, K] of N items in K formats.
        gold: True labels [N].
        choices: The number of labels.

    Returns:
        Agreement, F1 and accuracy, and the results of a constant predictor.

    Raises:
        ValueError: There is a single format or no item, or labels are not integers in [0, choices).
    """
    predictions, gold = np.asarray(predictions), np.asarray(gold)
    if predictions.ndim != 2 or gold.shape != predictions.shape[:1] or not len(gold):
        raise ValueError(
            f"predictions has shape {predictions.shape} and gold {gold.shape}: pass the predicted labels of N items in"
            " K formats, [N, K], and their true labels, [N], with at least one item"
        )
    count, formats = predictions.shape
    if formats < 2:
        raise ValueError(f"predictions has {formats} format: agreement needs at least two")
    for name, labels in (("predictions", predictions), ("gold", gold)):
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= choices:
            raise ValueError(
                f"{name} is {labels.dtype} in [{labels.min()}, {labels.max()}]: pass integers in [0, {choices - 1}]"
            )
    predictions, gold = predictions.astype(np.int64), gold.astype(np.int64)
    votes = np.stack([(predictions == label).sum(1) for label in range(choices)], 1)  # [N, C]
    scores = [f1(gold, column, choices) for column in predictions.T]
    constant = int(np.bincount(gold, minlength=choices).argmax())
    return Consistency(
        agreement=float(((votes**2).sum(1) - formats).mean() / (formats * (formats - 1))),
        f1=float(np.mean(scores)),
        f1_spread=float(np.std(scores)),
        accuracy=float((predictions == gold[:, None]).mean()),
        vote_accuracy=float((votes.argmax(1) == gold).mean()),
        marginals=tuple(float(share) for share in votes.sum(0) / (count * formats)),
        constant_f1=f1(gold, np.full(count, constant), choices),
        constant_accuracy=float((gold == constant).mean()),
    )


def f1(gold: np.ndarray, predicted: np.ndarray, choices: int) -> float:
    """F1 of label 1 for two choices, macro F1 for more.

    Args:
        gold: True labels [N].
        predicted: Predicted labels [N].
        choices: The number of labels.

    Returns:
        F1 in [0, 1], 0 where it is undefined.
    """
    average = "binary" if choices == 2 else "macro"
    return float(f1_score(gold, predicted, average=average, labels=list(range(choices)), zero_division=0))
