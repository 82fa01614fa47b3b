"""Mixed features as further training rows of prompts: of an input with its name, and of a class with no class.

    cross-modal          v = norm(share f + (1 - share) t_y)        t_y: the text feature of the same label; label y
    cross-distribution   v = norm(share f_i + (1 - share) f_j)      one of i, j in a class, the other a negative label
                         label: w on any negative label, w = min(1, beta share); (1 - w) (share y_i + (1 - share) y_j)
    loss = -w log sum_{c not in ID} p_c - (1 - w) sum_c (share y_i + (1 - share) y_j)_c log p_c

Source: Zhang et al., LAPT. Their code puts w on one column, the last negative label, whichever word that is; here it is
on the sum of the probabilities of all of them, which is what the score of a row looks at, too.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def cross_modal(features: Tensor, texts: Tensor, share: float) -> Tensor:
    """Features [B, D] mixed with those of their labels' texts [B, D], of unit length."""
    return F.normalize(share * features + (1 - share) * texts, dim=-1)


def partners(labels: Tensor, classes: int, draw: np.random.Generator) -> Tensor | None:
    """A random row of the other side for each row [B]: of a negative label for rows of a class, and the other way.

    Args:
        labels: [B], below `classes` for rows of a class.
        classes: The number C of classes.
        draw: What is random about it.

    Returns:
        Indices [B]; None if a side has no row in the batch, so that there is nothing to mix.
    """
    inside = (labels < classes).cpu().numpy()
    sides = np.flatnonzero(inside), np.flatnonzero(~inside)
    if not all(map(len, sides)):
        return None
    found = np.where(inside, draw.choice(sides[1], len(inside)), draw.choice(sides[0], len(inside)))
    return torch.from_numpy(found).to(labels.device)


def cross_distribution(features: Tensor, targets: Tensor, partner: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Rows mixed with their partners of the other side, and their labels.

    Args:
        features: [B, D].
        targets: The labels as probabilities [B, C + M], negatives last.
        partner: The indices that `partners` returns [B].
        share: The share of the row itself, in [0, 1].

    Returns:
        The mixed features [B, D], of unit length, and labels [B, C + M] whose rows sum to 1.
    """
    mixed = F.normalize(share * features + (1 - share) * features[partner], dim=-1)
    return mixed, share * targets + (1 - share) * targets[partner]


def unsure_cross_entropy(logits: Tensor, targets: Tensor, weight: float, classes: int) -> Tensor:
    """Cross-entropy of labels that are any negative label with a probability, and `targets` otherwise.

    Args:
        logits: [B, C + M], negatives last.
        targets: The labels as probabilities [B, C + M].
        weight: The probability w of any negative label, in [0, 1].
        classes: C.

    Returns:
        The mean over rows, a scalar.
    """
    logp = logits.log_softmax(-1)
    return -(weight * logp[:, classes:].logsumexp(-1) + (1 - weight) * (targets * logp).sum(-1)).mean()
