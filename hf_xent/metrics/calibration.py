"""How far a model's confidence is from its accuracy: the expected calibration error, and the same without bins.

    ECE = sum_b (n_b / N) |accuracy_b - confidence_b|          over bins b of the largest probability
    KS  = max_k |sum_{i <= k} (confidence_i - c_i)| / N        over predictions in the order of their confidence

c_i is 1 if prediction i is correct, else 0. There are 15 bins of equal width if nothing else is said (our choice).

Source: Guo et al. 2017, On calibration of modern neural networks, arXiv:1706.04599, eq. 3, for ECE; the statistic of
Kolmogorov and Smirnov between the two cumulative sums for KS, where predictions of equal confidence count as one step.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


def binned(confidence: Tensor, right: Tensor, bins: int = BINS, *, closed: str = "left") -> Tensor:
    """Sums over predictions in bins of their confidence; the results of several batches may be added.

    Args:
        confidence: The probability of the predicted class [N], in [0, 1].
        right: Whether the prediction is correct [N].
        bins: The number of bins.
        closed: Which edge belongs to a bin: 'left' for [low, high), 'right' for (low, high]; the outermost bins have
            both.

    Returns:
        [3, bins], float64: number of predictions, number of correct ones and sum of confidences in every bin.

    Raises:
        ValueError: An unknown edge.
    """
    if closed not in ("left", "right"):
        raise ValueError(f"closed is {closed!r}: choose 'left' or 'right'")
    if closed == "left":
        index = (confidence * bins).long().clamp(max=bins - 1)
    else:  # compared with the edges themselves: 0.28 * 25 is above 7
        edges = torch.arange(1, bins, dtype=torch.float64, device=confidence.device) / bins
        index = torch.bucketize(confidence.double(), edges)
    rows = torch.stack([torch.ones_like(confidence), right.to(confidence), confidence]).double()
    return rows.new_zeros(3, bins).index_add_(1, index, rows)


def calibration_error(bins: Tensor) -> float:
    """The expected calibration error.

    Args:
        bins: The result of `binned`, or a sum of several [3, B].

    Returns:
        ECE in [0, 1].
    """
    return float((bins[1] - bins[2]).abs().sum() / bins[0].sum())


def cumulative_error(confidence: Tensor, right: Tensor) -> float:
    """The calibration error without bins, KS of the module's docstring.

    Args:
        confidence: The probability of the predicted class [N], in [0, 1].
        right: Whether the prediction is correct [N].

    Returns:
        KS in [0, 1].
    """
    ordered, order = confidence.double().sort()
    gaps = (ordered - right.double()[order]).cumsum(0).abs()
    last = torch.ones_like(gaps, dtype=torch.bool)
    last[:-1] = ordered[1:] > ordered[:-1]  # of equal confidences, whose order says nothing
    return float(gaps[last].max() / len(gaps))
