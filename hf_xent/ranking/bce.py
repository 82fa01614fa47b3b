"""Binary cross-entropy of single rows: no ranking, the baseline.

    loss = mean -w y log h - (1 - y) log(1 - h)

h = sigmoid(logit); w is `pos_weight`. A batch needs no pairs, so one of a single class is learned from too.

Source: the logarithmic score (Good 1952, Rational Decisions), weighted as by `torch.nn.BCEWithLogitsLoss`.
Relations: the others compare positives with negatives, and leave the level of the scores free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from .base import RankingLoss, State


@dataclass(frozen=True)
class BCE(RankingLoss):
    """`mean -w y log h - (1 - y) log(1 - h)` of the logits."""

    pos_weight: float = 1.0
    """w, of positives; the number of negatives over that of positives balances them."""
    ranges: ClassVar[dict[str, str]] = {"pos_weight": "(0, inf)"}
    both: ClassVar[bool] = False

    def step(self, pos: Tensor, neg: Tensor, state: State) -> tuple[Tensor, State]:
        """Without state."""
        count = max(1, len(pos) + len(neg))  # no row is a zero loss
        return (self.pos_weight * F.softplus(-pos).sum() + F.softplus(neg).sum()) / count, state
