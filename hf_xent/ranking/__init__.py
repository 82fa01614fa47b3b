"""Floor 1: ranking losses, of areas under ROC and precision-recall curves, their state, and batches of both classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..registry import Registry

if TYPE_CHECKING:  # loaded on first access, as the losses are: a list of their names needs no torch
    from .base import RankingLoss
    from .objective import Objective as Objective
    from .sampler import DualSampler as DualSampler

LOSSES: Registry[type[RankingLoss]] = Registry(
    "loss",
    {
        "bce": "bce:BCE",
        "aucm": "aucm:AUCM",
        "pauc_cvar": "pauc_cvar:PAUCCVaR",
        "pauc_dro": "pauc_dro:PAUCDRO",
        "tpauc_kl": "tpauc_kl:TPAUCKL",
        "ap": "ap:AP",
    },
    package=__name__,
)
"""Name -> loss."""

_HOMES = {"DualSampler": "sampler", "Objective": "objective", "RankingLoss": "base"}


def get(loss: str | RankingLoss, **options: Any) -> RankingLoss:
    """A ranking loss by name.

    Args:
        loss: A name of `LOSSES`, with options if any: 'tpauc_kl', 'pauc_cvar:beta=0.1'; a `RankingLoss` is returned
            unchanged.
        options: Further options of the loss.

    Returns:
        The loss, for an `Objective`.

    Raises:
        ValueError: The name is unknown, or the loss does not have or does not accept an option.
    """
    from .base import RankingLoss

    return loss if isinstance(loss, RankingLoss) else LOSSES.build(loss, **options)


__all__ = sorted(("LOSSES", *LOSSES.exported, *_HOMES, "get"))


def __getattr__(name: str) -> Any:
    return LOSSES.attribute(name, _HOMES)
