"""Loss against that of the lower-cased text: a memorized text loses more when its letters change."""

from __future__ import annotations

from torch import Tensor

from ...ops import Stats
from .base import score
from .likelihood import loss


@score(higher_is="positive")
def lowercase(stats: Stats, lowered: Stats) -> Tensor:
    """Loss of the lower-cased text over the loss.

        loss(lower-cased text) / loss

    Source: Carlini et al. 2021, arXiv:2012.07805.
    """
    return loss(lowered) / loss(stats)
