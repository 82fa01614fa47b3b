"""Binoculars: how surprising a text is, relative to how surprising one model's predictions are to another."""

from __future__ import annotations

from torch import Tensor

from ...ops import Stats
from .base import mean, score
from .likelihood import loss


@score(higher_is="negative")
def binoculars(stats: Stats, cross_payload: Stats) -> Tensor:
    """Loss divided by the cross-entropy of the model under the reference model, the observer.

        loss / mean_i -sum_v p_reference(v) log p(v)

    Source: Hans et al. 2024, arXiv:2401.12070.
    """
    return loss(stats) / mean(stats.lse - cross_payload.payload, stats.mask)
