"""Pairs of rows: predictions of the same class are drawn together and those of two classes apart, beside cross-entropy.

    mean CE + weight (mean_same [KL_ij + KL_ji] + mean_other [h(KL_ij) + h(KL_ji)])   h(x) = max(0, margin - x)

KL_ij is the divergence of row i's softmax from row j's. The means are over all pairs of the batch that have the same
label, and over all that have two; a kind of which the batch has no pair adds nothing. A batch of few rows and many
classes hardly has a pair of the first kind.

It is a number of the batch: accumulated batches and ranks have only their own pairs, for which
`ClassConfig(gather=True)` takes the rows of all ranks.

Source: Shukla et al. 2019, Primate Face Identification in the Wild, arXiv:1907.02642, whose PFID loss adds a pairwise
loss to cross-entropy. This form of the pairwise loss, its margin and its weight are this library's choice, and not
taken from the paper.
Relations: contrastive losses compare features; this compares predictions, so that what it separates is what the
classifier uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .base import ClassLoss


@dataclass(frozen=True)
class Pairs(ClassLoss):
    """Cross-entropy and divergences of pairs of predictions; see the module's docstring."""

    margin: float = 2.0
    """The divergence, in nats and each direction, from which on two classes are far enough apart."""
    weight: float = 1.0
    """The weight of the pairs."""
    per_row: ClassVar[bool] = False
    ranges: ClassVar[dict[str, str]] = {"margin": "[0, inf)", "weight": "[0, inf)"}

    def __call__(self, logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        """The loss, a scalar, of logits [N, K] and labels [N]."""
        log_p = logits.log_softmax(-1)
        ce = F.nll_loss(log_p, labels, reduction="sum") / max(1, len(labels))
        p = log_p.exp()
        # [N, N], in float64: a difference of near numbers, whose product neither autocast nor TF32 may round
        kl = ((p * log_p).double().sum(-1, keepdim=True) - p.double() @ log_p.double().T).to(p.dtype)
        same = labels[:, None] == labels
        other, same = ~same, same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        return ce + self.weight * (_of_pairs(kl, same) + _of_pairs((self.margin - kl).relu(), other))

    def reference(self, logits: Any, labels: Any, **_: Any) -> np.ndarray:
        """The formula in a loop over pairs."""
        p = np.exp(np.asarray(logits, np.float64))
        p /= p.sum(1, keepdims=True)
        same, other = [], []
        for i, j in combinations(range(len(p)), 2):
            there, back = (p[i] * np.log(p[i] / p[j])).sum(), (p[j] * np.log(p[j] / p[i])).sum()
            if labels[i] == labels[j]:
                same.append(there + back)
            else:
                other.append(max(0, self.margin - there) + max(0, self.margin - back))
        ce = -np.log(p[np.arange(len(p)), np.asarray(labels)]).mean()
        return ce + self.weight * sum(np.mean(kind) for kind in (same, other) if kind)


def _of_pairs(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean over chosen pairs of both directions' sum, from [N, N] in which a pair stands twice; 0 without pairs."""
    return 2 * torch.where(chosen, values, 0).sum() / chosen.sum().clamp(min=1)
