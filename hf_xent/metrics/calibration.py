"""The expected calibration error (ECE): how far a model's confidence is from its accuracy.

    ECE = sum_b (n_b / N) |accuracy_b - confidence_b|          over bins b of the largest probability

There are 15 bins of equal width (our choice).

Source: Guo et al. 2017, On calibration of modern neural networks, arXiv:1706.04599, eq. 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


def binned(confidence: Tensor, right: Tensor) -> Tensor:
    """Sums over predictions in bins of their confidence; the results of several batches may be added.

    Args:
        confidence: The probability of the predicted class [N], in [0, 1].
        right: Whether the prediction is correct [N].

    Returns:
        [3, BINS], float64: number of predictions, number of correct ones and sum of confidences in every bin.
    """
    index = (confidence * BINS).long().clamp(max=BINS - 1)
    rows = torch.stack([torch.ones_like(confidence), right.to(confidence), confidence]).double()
    return rows.new_zeros(3, BINS).index_add_(1, index, rows)


def calibration_error(bins: Tensor) -> float:
    """The expected calibration error.

    Args:
        bins: The result of `binned`, or a sum of several [3, BINS].

    Returns:
        ECE in [0, 1].
    """
    return float((bins[1] - bins[2]).abs().sum() / bins[0].sum())
