"""One-way partial AUC over FPR <= beta, exactly: the mean over the largest share beta of each positive's l_ij.

    p_ij = 1[l_ij > s_i] / beta,  then  s_i <- s_i - eta (1 - E_j 1[l_ij > s_i] / beta)

Source: SOPA of Zhu et al. 2022, When AUC meets DRO, ICML, arXiv:2203.00176.
Relations: PAUCDRO weighs the largest l_ij smoothly, without a threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Pairwise, State


@dataclass(frozen=True)
class PAUCCVaR(Pairwise):
    """The conditional value at risk of each positive's pairs."""

    beta: float = 0.2
    """The largest FPR of the area: the share of the negatives that count."""
    eta: float = 0.1
    """Step size of the thresholds s_i."""
    ranges: ClassVar[dict[str, str]] = Pairwise.ranges | {"beta": "(0, 1]", "eta": "(0, inf)"}

    def state(self, rows: int) -> State:
        """s, the threshold of each positive."""
        return {"s": torch.zeros(rows)}

    def step(self, pos: Tensor, neg: Tensor, state: State) -> tuple[Tensor, State]:
        """The loss at the old thresholds."""
        losses = self.pairs(pos, neg)
        over = (losses.detach() > state["s"][:, None]).to(losses.dtype)
        return (over * losses).mean() / self.beta, {"s": state["s"] - self.eta * (1 - over.mean(1) / self.beta)}
