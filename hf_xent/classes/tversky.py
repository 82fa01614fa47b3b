"""Tversky loss: the dice loss with a weight for false positives and one for false negatives.

    sum_c [1 - (TP + smooth) / (TP + alpha FP + beta FN + smooth)]

TP = sum_i p y, FP = sum_i p (1 - y) and FN = sum_i (1 - p) y are sums over the batch, where p is the softmax, or the
sigmoid of one logit, and y the one-hot label, as in dice. With alpha = beta = 0.5 and half of its `smooth` it is the
plain dice loss (alpha 0, not squared); beta > alpha asks for more recall.

It is a number of the batch: what dice says about accumulated batches and ranks holds here.

Source: Li et al. 2020, Dice Loss for Data-imbalanced NLP Tasks, arXiv:1911.02855, after Tversky's index of similarity;
the authors' code has dice alone.
Relations: dice; precision and recall may also be traded by a threshold, without any training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from .dice import OneVsRest, one_vs_rest


@dataclass(frozen=True)
class Tversky(OneVsRest):
    """One minus the soft Tversky index of each class, summed; see the module's docstring."""

    alpha: float = 0.5
    """The weight of false positives."""
    beta: float = 0.5
    """The weight of false negatives."""
    smooth: float = 1.0
    """What is added above and below."""
    ranges: ClassVar[dict[str, str]] = {"alpha": "[0, inf)", "beta": "[0, inf)", "smooth": "(0, inf)"}

    def __call__(self, logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        """The loss, a scalar, of logits [N, K] and labels [N]."""
        log_p, log_rest, y = one_vs_rest(logits, labels)
        p, rest = log_p.exp(), log_rest.exp()
        hit, false, missed = (p * y).sum(0), (p * (1 - y)).sum(0), (rest * y).sum(0)
        return (1 - (hit + self.smooth) / (hit + self.alpha * false + self.beta * missed + self.smooth)).sum()

    def reference(self, logits: Any, labels: Any, **_: Any) -> np.ndarray:
        """The formula, one class after the other."""
        z, labels = np.asarray(logits, np.float64), np.asarray(labels)
        p = 1 / (1 + np.exp(-z)) if z.shape[1] == 1 else np.exp(z) / np.exp(z).sum(1, keepdims=True)
        total = 0.0
        for c in range(z.shape[1]):
            y = labels == (1 if z.shape[1] == 1 else c)
            hit, false, missed = p[y, c].sum(), p[~y, c].sum(), (1 - p[y, c]).sum()
            total += 1 - (hit + self.smooth) / (hit + self.alpha * false + self.beta * missed + self.smooth)
        return np.asarray(total)
