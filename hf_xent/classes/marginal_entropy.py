"""Cross-entropy, and a push of the batch's mean prediction towards the uniform one.

    mean_i CE_i + weight sum_c m_c log(m_c + 1e-6)   m = mean_i softmax(z_i)

The second term is minus the entropy of the mean prediction, at least -log K. It keeps a model that learns from its own
labels from sending all rows to a few classes. If the data's classes are not equally frequent it pulls to the wrong
place, and m is noise unless the batch has several times as many rows as there are classes.

It is a number of the batch: the mean prediction over all accumulated batches is not in it, only those of each;
`ClassConfig(gather=True)` takes the rows of all ranks.

Source: Long et al. 2024, Training-Free Unsupervised Prompt for Vision-Language Models, arXiv:2404.16339, whose TFUP-T
has cross-entropy of pseudo-labels, of the certain rows alone, and the second term of all rows. Here both are of the
rows with a label.
Relations: a penalty of certainty (as in label smoothing) wants every single prediction flat, this only their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from .base import ClassLoss

WITHIN = 1e-6  # the authors', within the logarithm


@dataclass(frozen=True)
class MarginalEntropy(ClassLoss):
    """Cross-entropy minus the weighted entropy of the mean prediction; see the module's docstring."""

    weight: float = 0.3
    """The weight of the entropy."""
    per_row: ClassVar[bool] = False
    ranges: ClassVar[dict[str, str]] = {"weight": "[0, inf)"}

    def __call__(self, logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        """The loss, a scalar, of logits [N, K] and labels [N]."""
        ce = F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))
        return ce + self.weight * marginal(logits)

    def reference(self, logits: Any, labels: Any, **_: Any) -> np.ndarray:
        """The formula on the softmax."""
        p = np.exp(np.asarray(logits, np.float64))
        p /= p.sum(1, keepdims=True)
        m = p.mean(0)
        return -np.log(p[np.arange(len(p)), np.asarray(labels)]).mean() + self.weight * (m * np.log(m + WITHIN)).sum()


def marginal(logits: Tensor) -> Tensor:
    """Minus the entropy of the mean softmax of logits [N, K], a scalar; 0 without rows."""
    m = logits.softmax(-1).sum(0) / max(1, len(logits))
    return (m * (m + WITHIN).log()).sum()
