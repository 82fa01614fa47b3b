"""Floor 1: training for a ranking: losses of areas under curves, their state, and batches with both classes."""

from __future__ import annotations

from typing import Any

from ..losses import catalog
from .losses import AP, AUCM, BCE, LOSSES, PAUCDRO, TPAUCKL, PAUCCVaR, RankingLoss
from .objective import Objective
from .sampler import DualSampler


def get(loss: str | RankingLoss, **options: Any) -> RankingLoss:
    """A loss by name, with options: 'tpauc_kl', 'pauc_cvar:beta=0.1'; an object is returned as it is.

    Raises: ValueError for an unknown name, or an option that the loss does not have or does not accept.
    """
    return loss if isinstance(loss, RankingLoss) else catalog.build(LOSSES, loss, options)


__all__ = [
    "AP",
    "AUCM",
    "BCE",
    "LOSSES",
    "PAUCDRO",
    "TPAUCKL",
    "DualSampler",
    "Objective",
    "PAUCCVaR",
    "RankingLoss",
    "get",
]
