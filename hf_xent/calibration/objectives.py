"""What a calibrator may be fitted to: a loss of each row, from calibrated logits and the labels.

    ca       (max_k p_k - c)^2             c = 1 if the largest class is the label, else 0
    ce       -log p_y                      with one temperature and without balance: temperature scaling
    brier    sum_k (p_k - 1[k = y])^2      over all classes

For a wrong prediction `ce` raises p_y and may raise the wrong class's probability with it, as the temperature falls;
`ca` can only lower the confidence. `balanced` weights correct rows by the share of wrong ones and wrong rows by that of
correct ones, so both count the same:

    L = sum_i w_i loss_i / sum_i w_i       w_i = 1 - accuracy if row i is correct, else accuracy

The balanced `ca` of one confidence g for all rows is [(1 - g)^2 + g^2] / 2, which is least at g = 1/2 whatever the
accuracy is: where a calibrator cannot tell correct rows from wrong ones, balance moves confidence away from accuracy.

Source: Liu et al. 2024, Optimizing Calibration by Gaining Aware of Prediction Correctness, arXiv:2404.13016, for `ca`;
the balance is in the authors' code alone. Guo et al. 2017, arXiv:1706.04599, for one temperature fitted by `ce`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Objective = Callable[[Tensor, Tensor], Tensor]
"""A function of calibrated logits [M, K] and labels [M] that returns the loss of each row [M]."""


def correctness(logits: Tensor, labels: Tensor) -> Tensor:
    """The squared distance of the confidence from 1 for correct rows, and from 0 for wrong ones [M]."""
    return (logits.softmax(-1).amax(-1) - correct(logits, labels).to(logits)).square()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The negative log-probability of the label [M], nats."""
    return F.cross_entropy(logits, labels, reduction="none")


def brier(logits: Tensor, labels: Tensor) -> Tensor:
    """The squared distance of the probabilities from the label's [M]."""
    return (logits.softmax(-1) - F.one_hot(labels, logits.shape[-1])).square().sum(-1)


OBJECTIVES: dict[str, Objective] = {"ca": correctness, "ce": cross_entropy, "brier": brier}
"""Name -> objective; `fit` takes any other function of this kind, too."""


def correct(scores: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest class is the label [M]; of equal ones the first counts, whatever the temperature."""
    return scores.argmax(-1) == labels


def row_weights(right: Tensor, balanced: bool) -> Tensor:
    """The weights of rows by whether they are correct [M], float64: equal ones, or balanced over correctness.

    Rows that are all correct, or all wrong, have balanced weights of 0: they get equal ones instead.
    """
    right = right.double()
    accuracy = right.mean()
    if not balanced or accuracy in (0, 1):
        return torch.ones_like(right)
    return right * (1 - accuracy) + (1 - right) * accuracy


def mean_loss(rows: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of the losses of rows."""
    return (rows * weights).sum() / weights.sum()
