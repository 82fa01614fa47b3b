"""Binary cross-entropy of single rows: the baseline, which does not rank.

    loss = mean -w y log h - (1 - y) log(1 - h)

h = sigmoid(logit); w is `pos_weight`. It needs no pairs, so a batch of a single class contributes too.

Source: the logarithmic score (Good 1952, Rational Decisions), weighted as by `torch.nn.BCEWithLogitsLoss`.
Relations: the other losses compare positives with negatives, and do not depend on the level of the scores.
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
    """w, the weight of positives; the number of negatives over that of positives balances the classes."""
    ranges: ClassVar[dict[str, str]] = {"pos_weight": "(0, inf)"}
    both: ClassVar[bool] = False

    def step(self, pos: Tensor, neg: Tensor, state: State) -> tuple[Tensor, State]:
        """The loss; there is no state."""
        count = max(1, len(pos) + len(neg))  # the loss of no rows is 0
        return (self.pos_weight * F.softplus(-pos).sum() + F.softplus(neg).sum()) / count, state
