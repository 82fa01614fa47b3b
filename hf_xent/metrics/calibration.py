"""How far a model's confidence is from its accuracy.

    ECE     sum_b (n_b / N) |accuracy_b - confidence_b| over bins of the largest probability, its expected error

Bins: 15 of equal width (ours).

Source: Guo et al. 2017, On calibration of modern neural networks, arXiv:1706.04599, eq. 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


def binned(confidence: Tensor, right: Tensor) -> Tensor:
    """Predictions summed up by their confidence; sums of batches add up.

    Args:
        confidence: The probability of the predicted class [N], in [0, 1].
        right: Whether the prediction is right [N].

    Returns:
        [3, BINS], float64: predictions, right ones and summed confidence of every bin.
    """
    index = (confidence * BINS).long().clamp(max=BINS - 1)
    rows = torch.stack([torch.ones_like(confidence), right.to(confidence), confidence]).double()
    return rows.new_zeros(3, BINS).index_add_(1, index, rows)


def calibration_error(bins: Tensor) -> float:
    """The expected calibration error.

    Args:
        bins: What `binned` returns, or a sum of several [3, BINS].

    Returns:
        ECE in [0, 1].
    """
    return float((bins[1] - bins[2]).abs().sum() / bins[0].sum())
