"""Floor 1: training for a ranking: losses of areas under curves, their state, and batches with both classes."""

from __future__ import annotations

from typing import Any

from ..registry import Registry
from .losses import RankingLoss
from .objective import Objective
from .sampler import DualSampler

LOSSES: Registry[type[RankingLoss]] = Registry(
    "loss",
    {
        "bce": "losses:BCE",
        "aucm": "losses:AUCM",
        "pauc_cvar": "losses:PAUCCVaR",
        "pauc_dro": "losses:PAUCDRO",
        "tpauc_kl": "losses:TPAUCKL",
        "ap": "losses:AP",
    },
    package=__name__,
)
"""Name -> loss."""


def get(loss: str | RankingLoss, **options: Any) -> RankingLoss:
    """A loss by name, with options: 'tpauc_kl', 'pauc_cvar:beta=0.1'; an object is returned as it is.

    Raises: ValueError for an unknown name, or an option that the loss does not have or does not accept.
    """
    return loss if isinstance(loss, RankingLoss) else LOSSES.build(loss, **options)


__all__ = ["LOSSES", *LOSSES.exported, "DualSampler", "Objective", "RankingLoss", "get"]


def __getattr__(name: str) -> Any:
    if name in LOSSES.exported:
        return LOSSES[LOSSES.exported[name]]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
