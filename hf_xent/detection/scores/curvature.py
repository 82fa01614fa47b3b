"""Curvature of the log-probability: a model's text is more probable than alternatives that the model would sample.

The variance of a text is at least 1e-9.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import Stats
from .base import VARIANCE_FLOOR, score
from .likelihood import loss


@score(higher_is="positive", uses=("entropy", "variance"))
def fast_detect(stats: Stats) -> Tensor:
    """Curvature of the log-probability under one model, whose mean is mu_i = -H_i and whose variance is s_i^2.

        sum_i (logp_i - mu_i) / sqrt(sum_i s_i^2)

    Source: Bao et al. 2024, Fast-DetectGPT, arXiv:2310.05130.
    """
    return _curvature(stats, -stats.entropy, stats.variance)


@score(higher_is="positive")
def fast_detect_pair(stats: Stats, cross_moments: tuple[Tensor, Tensor]) -> Tensor:
    """Curvature with alternatives that are sampled from a reference model.

        sum_i (logp_i - mu_i) / sqrt(sum_i s_i^2)          mu_i, s_i^2 of log p under the reference model's softmax

    Source: Bao et al. 2024, Fast-DetectGPT, arXiv:2310.05130.
    """
    return _curvature(stats, *cross_moments)


def _curvature(stats: Stats, expected: Tensor, variance: Tensor) -> Tensor:
    total, spread = (torch.where(stats.mask, x.double(), 0.0).sum(-1) for x in (stats.logp - expected, variance))
    return total / spread.clamp(min=VARIANCE_FLOOR).sqrt() + 0 * loss(stats)  # NaN where nothing was scored
