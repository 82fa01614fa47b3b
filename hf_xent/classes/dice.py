"""Dice loss: the overlap of the probabilities of each class with its rows, over the whole batch, as F1 counts it.

    sum_c [1 - (2 sum_i w_ic y_ic + smooth) / (sum_i w_ic^2 + sum_i y_ic + smooth)]   w = (1 - p)^alpha p

y_ic is 1 if row i is of class c. With one logit p is its sigmoid, the labels are 0 and 1, and only class 1 has a term;
with several, p is the softmax. Without `squared` the denominator has sum_i w_ic. Rows that are correct and certain
weigh less for alpha > 0, so that even a perfect prediction has a loss then; with alpha 0 it has none. `hard_negatives`
leaves out the easy rows of the other classes: a class keeps its own rows and, of the others, those of its largest p, so
many times the number of its own (rounded up; none if it has none).

It is a number of the batch and no sum over rows. The mean over accumulated batches, or over ranks, is a mean of dice
losses and not the dice loss of all rows; `ClassConfig(gather=True)` computes that of all ranks' rows.

The authors' code has these sums for one logit. For several classes its sums run over an axis of one entry, which makes
it a mean over rows, and its choice of negatives compares with the wrong operands; here both are as for one logit.

Source: Li et al. 2020, Dice Loss for Data-imbalanced NLP Tasks, arXiv:1911.02855; the defaults are those of the
authors' scripts, github.com/ShannonAI/dice_loss_for_NLP.
Relations: Tversky weighs the two kinds of errors apart; focal also turns away from certain rows. Any F1 beside another
loss's needs a threshold that was chosen for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .base import ClassLoss


class OneVsRest(ClassLoss):
    """A loss of each class against the rest, summed over classes; one logit stands for class 1 of two."""

    per_row: ClassVar[bool] = False
    least_classes: ClassVar[int] = 1

    def scores(self, logits: Tensor) -> Tensor:
        """The probabilities of the classes [..., K]; two, of labels 0 and 1, from one logit."""
        return _of_every_class(logits).softmax(-1)


@dataclass(frozen=True)
class Dice(OneVsRest):
    """One minus the soft dice coefficient of each class, summed; see the module's docstring."""

    smooth: float = 1.0
    """What is added above and below: the smaller, the more a class with few rows in the batch weighs."""
    alpha: float = 0.01
    """How much less certain rows weigh; 0 is the plain dice loss."""
    squared: bool = True
    """Whether the denominator has squares."""
    hard_negatives: float = 0.0
    """How many rows of the other classes are kept for each row of the class, the hardest ones; 0 keeps all."""
    ranges: ClassVar[dict[str, str]] = {
        "smooth": "(0, inf)", "alpha": "[0, inf)", "hard_negatives": "[0, inf)",
    }  # fmt: skip

    def __call__(self, logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        """The loss, a scalar, of logits [N, K] and labels [N]."""
        log_p, log_rest, y = one_vs_rest(logits, labels)
        w = (log_p + self.alpha * log_rest).exp()
        if self.hard_negatives:
            rank = log_p.masked_fill(y > 0, -torch.inf).argsort(0, descending=True).argsort(0)
            w = torch.where((y > 0) | (rank < (self.hard_negatives * y.sum(0)).ceil()), w, 0)
        below = (w.square() if self.squared else w).sum(0) + y.sum(0)
        return (1 - (2 * (w * y).sum(0) + self.smooth) / (below + self.smooth)).sum()

    def reference(self, logits: Any, labels: Any, **_: Any) -> np.ndarray:
        """The formula, one class after the other."""
        z, labels = np.asarray(logits, np.float64), np.asarray(labels)
        p = 1 / (1 + np.exp(-z)) if z.shape[1] == 1 else np.exp(z) / np.exp(z).sum(1, keepdims=True)
        total = 0.0
        for c in range(z.shape[1]):
            own = labels == (1 if z.shape[1] == 1 else c)
            mine, others = p[own, c], np.sort(p[~own, c])[::-1]
            if self.hard_negatives:
                others = others[: int(np.ceil(self.hard_negatives * len(mine)))]
            mine, others = ((1 - q) ** self.alpha * q for q in (mine, others))
            power = 2 if self.squared else 1
            below = (mine**power).sum() + (others**power).sum() + len(mine)
            total += 1 - (2 * mine.sum() + self.smooth) / (below + self.smooth)
        return np.asarray(total)


def one_vs_rest(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p, log(1 - p) and y, each [N, K], of logits [N, K] and labels [N]; [N, 1] of one logit and labels 0 and 1."""
    z = _of_every_class(logits)
    log_p, classes = z.log_softmax(-1), z.shape[-1]
    # 1 - p of the largest class is 0 in floating point long before its logarithm is: it comes from the other logits
    largest = F.one_hot(z.argmax(-1), classes).bool()
    log_others = z.masked_fill(largest, -torch.inf).logsumexp(-1, keepdim=True) - z.logsumexp(-1, keepdim=True)
    log_rest = torch.where(largest, log_others, torch.log1p(-log_p.masked_fill(largest, -1.0).exp()))
    y = F.one_hot(labels, classes).to(z.dtype)
    first = classes - logits.shape[-1]
    return log_p[:, first:], log_rest[:, first:], y[:, first:]


def _of_every_class(logits: Tensor) -> Tensor:
    """The logits, with that of class 0, which is 0, before a single one."""
    return logits if logits.shape[-1] > 1 else torch.cat([torch.zeros_like(logits), logits], -1)
