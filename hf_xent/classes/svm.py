"""L2-SVM: a linear support vector machine for each class against the others, in place of the softmax.

    C sum_c max(0, 1 - y_c f_c)^2 + weight / 2 |W|^2     with y_c = 1 for the row's class, -1 for the others

f are the outputs of the head. |W|^2 is that of the head's weights, without bias, and is added once a step (`penalty`).
A class whose margin y_c f_c is at least 1 has no gradient. The prediction is the largest output; the authors' code
takes the largest sign, and so the first of several positive outputs.

The authors sum over a batch of N = 256 rows, with weight 1 of the norm. A trainer takes the mean over rows, which is
their objective divided by N if the weight is 1/N: the default. The same ratio with `norm_weight=1` needs C 256 times as
large. A support vector machine on a whole data set of M rows has `norm_weight=1/M`.

Source: Agarap 2017, A Neural Network Architecture Combining GRU and SVM, arXiv:1709.03082 (C 0.5, batches of 256); Tang
2013, Deep Learning using Linear Support Vector Machines, arXiv:1306.0239.
Relations: cross-entropy never stops pushing a row that is right; this does, at margin 1, and its outputs are no
probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from .base import ClassLoss


@dataclass(frozen=True)
class SVM(ClassLoss):
    """Squared hinge of every class against the others; see the module's docstring."""

    C: float = 0.5
    """C > 0: the weight of the rows."""
    norm_weight: float = 0.00390625
    """The weight of half the squared norm of the head's weights, beside the mean over rows: 1/256 by default."""
    ranges: ClassVar[dict[str, str]] = {"C": "(0, inf)", "norm_weight": "[0, inf)"}

    def __call__(self, logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        """The loss [N] of logits [N, K] and labels [N], without the penalty."""
        sign = 2 * F.one_hot(labels, logits.shape[-1]).to(logits.dtype) - 1
        return self.C * ((1 - sign * logits).clamp(min=0) ** 2).sum(-1)

    def penalty(self, head: nn.Module) -> Tensor | None:
        """Half the squared norm of the head's weights, weighted; None if the weight is 0."""
        weight: Any = head.weight
        return self.norm_weight / 2 * weight.square().sum() if self.norm_weight else None

    def scores(self, logits: Tensor) -> Tensor:
        """The outputs themselves, which are no probabilities."""
        return logits

    def reference(self, logits: Any, labels: Any, **_: Any) -> np.ndarray:
        """C sum_c max(0, 1 - y_c f_c)^2."""
        f, labels = np.asarray(logits, np.float64), np.asarray(labels)
        y = np.where(np.arange(f.shape[1])[None] == labels[:, None], 1.0, -1.0)
        return self.C * np.square(np.maximum(0, 1 - y * f)).sum(1)
