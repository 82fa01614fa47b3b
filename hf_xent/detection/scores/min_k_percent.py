"""Min-K%: a text that was not trained on has some tokens that surprise the model, so only the lowest share counts.

At least one token counts: the authors' int(k n) can be 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import Stats
from .base import VARIANCE_FLOOR, Range, mean, score

SHARE = Range("(0, 1]", "a share of the tokens above 0 and up to 1, such as 0.2 for the lowest 20 %")


@score(higher_is="positive", k=SHARE)
def min_k(stats: Stats, k: float = 0.2) -> Tensor:
    """Mean of the lowest share k of log-probabilities.

        mean of the lowest k n logp_i

    Source: Shi et al. 2024, arXiv:2310.16789.
    """
    return lowest(stats.logp, stats.mask, k)


@score(higher_is="positive", uses=("entropy", "variance"), k=SHARE)
def min_k_pp(stats: Stats, k: float = 0.2) -> Tensor:
    """Min-K% of standardized log-probabilities; variances are at least 1e-9.

        mean of the lowest k n of (logp_i + H_i) / s_i

    Source: Zhang et al. 2025, Min-K%++, arXiv:2404.02936.
    """
    return lowest((stats.logp + stats.entropy) / stats.variance.clamp(min=VARIANCE_FLOOR).sqrt(), stats.mask, k)


def lowest(values: Tensor, mask: Tensor, k: float) -> Tensor:
    """Mean of the max(1, int(k n)) lowest values of each text. Raises: ValueError for k outside of (0, 1]."""
    SHARE.check("k", k)
    n = mask.sum(-1, keepdim=True)
    count = (k * n.double()).long().clamp(min=1).minimum(n)
    ranked = torch.where(mask, values.double(), float("inf")).sort(-1).values
    return mean(ranked, torch.arange(mask.shape[-1]) < count)
