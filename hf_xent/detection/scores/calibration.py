"""Loss compared with that of a reference model, which measures how hard a text is for a model that has not seen it."""

from __future__ import annotations

from torch import Tensor

from ...ops import Stats
from .base import score
from .likelihood import loss


@score(higher_is="negative")
def reference(stats: Stats, reference: Stats) -> Tensor:
    """Loss divided by the loss under a reference model, the ratio that DC-PDD's paper compares with.

        loss / loss under the reference model

    Source: Carlini et al. 2021, arXiv:2012.07805.
    """
    return loss(stats) / loss(reference)


@score(higher_is="positive")
def reference_gap(stats: Stats, reference: Stats) -> Tensor:
    """Loss under a reference model minus the loss, which ranks texts differently from the ratio.

        loss under the reference model - loss

    Source: Carlini et al. 2021, arXiv:2012.07805.
    """
    return loss(reference) - loss(stats)
