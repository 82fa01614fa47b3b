"""Loss compared with that of the lower-cased text: the loss of a memorized text rises more if its letters change."""

from __future__ import annotations

from torch import Tensor

from ...ops import Stats
from .base import score
from .likelihood import loss


@score(higher_is="positive")
def lowercase(stats: Stats, lowered: Stats) -> Tensor:
    """Loss of the lower-cased text divided by the loss.

        loss(lower-cased text) / loss

    Source: Carlini et al. 2021, arXiv:2012.07805.
    """
    return loss(lowered) / loss(stats)
