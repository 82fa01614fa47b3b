"""Average precision, the area under the precision-recall curve; u_i, v_i are averages of l_ij over the batch.

    p_ij = (v_i - u_i 1[y_j = 1]) / u_i^2

j runs over all rows of a batch; u_i averages E_j l_ij, and v_i the same over the batch's positives alone. On a batch
that repeats, the value of the loss is 0 but its gradient is not: to measure progress, log the AP itself.

Source: SOAP of Qi et al. 2021, Stochastic Optimization of Areas Under Precision-Recall Curves with Provable
Convergence, NeurIPS, arXiv:2104.08736.
Relations: the losses of AUC weigh a pair regardless of its positive's rank; AP emphasizes the top of the ranking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Pairwise, State


@dataclass(frozen=True)
class AP(Pairwise):
    """A surrogate of the area under the precision-recall curve."""

    gamma: float = 0.9
    """Weight of a batch in the moving averages u_i and v_i, in (0, 1]."""
    ranges: ClassVar[dict[str, str]] = Pairwise.ranges | {"gamma": "(0, 1]"}

    def state(self, rows: int) -> State:
        """u and v of each positive."""
        return {"u": torch.zeros(rows), "v": torch.zeros(rows)}

    def step(self, pos: Tensor, neg: Tensor, state: State) -> tuple[Tensor, State]:
        """The loss at the new state."""
        losses = self.pairs(pos, torch.cat([pos, neg]))
        positive = torch.arange(losses.shape[1], device=losses.device) < len(pos)
        fixed = losses.detach()
        u = state["u"].lerp(fixed.mean(1).to(state["u"]), self.gamma)  # never 0: l_ii is the surrogate of t = 0
        v = state["v"].lerp((fixed * positive).mean(1).to(state["v"]), self.gamma)
        weights = ((v / u)[:, None] - positive.to(u.dtype)) / u[:, None]  # not over u^2, which overflows sooner
        return (weights * losses).mean(), {"u": u, "v": v}
