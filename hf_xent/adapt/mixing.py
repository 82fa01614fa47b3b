"""Mixed features as further training rows of prompts: of an input with its name, and of a class with no class.

    cross-modal          v = norm(share f + (1 - share) t_y)        t_y: the text feature of the same label; label y
    cross-distribution   v = norm(share f_i + (1 - share) f_j)      one of i, j in a class, the other a negative label
                         label: w on the negatives, w = min(1, beta share); (1 - w) (share y_i + (1 - share) y_j)

Source: Zhang et al., LAPT. Their code puts w on one column, the last negative label, whichever word that is; here the
negative labels have equal parts of it, so that their order does not matter.
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


def cross_distribution(
    features: Tensor, targets: Tensor, partner: Tensor, share: float, beta: float, classes: int
) -> tuple[Tensor, Tensor]:
    """Rows mixed with their partners of the other side, and their soft labels.

    Args:
        features: [B, D].
        targets: The labels as probabilities [B, C + M], negatives last.
        partner: The indices that `partners` returns [B].
        share: The share of the row itself, in [0, 1].
        beta: How much of it goes to the negatives.
        classes: C.

    Returns:
        The mixed features [B, D], of unit length, and labels [B, C + M] whose rows sum to 1.
    """
    weight = min(1.0, beta * share)
    negative = torch.zeros_like(targets)
    negative[:, classes:] = 1 / (targets.shape[1] - classes)
    mixed = F.normalize(share * features + (1 - share) * features[partner], dim=-1)
    return mixed, weight * negative + (1 - weight) * (share * targets + (1 - share) * targets[partner])
