"""One-way partial AUC, smooth: a small lambda weighs only the largest l_ij of a positive, a large one all of them.

    u_i <- (1 - gamma) u_i + gamma E_j exp(l_ij / lambda),  p_ij = exp(l_ij / lambda) / u_i

Source: SOPA-s of Zhu et al. 2022, When AUC meets DRO, ICML, arXiv:2203.00176.
Relations: PAUCCVaR is the hard form; TPAUCKL weights the positives too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Pairwise, State, logmeanexp, moving_average


@dataclass(frozen=True)
class PAUCDRO(Pairwise):
    """`E_i lambda log E_j exp(l_ij / lambda)`."""

    lam: float = 1.0
    """lambda: temperature over a positive's pairs."""
    gamma: float = 0.9
    """Weight of a batch in the moving averages u_i, in (0, 1]."""
    first_touch: bool = False
    """Whether u_i (and w) start at their first value instead of 0."""
    ranges: ClassVar[dict[str, str]] = Pairwise.ranges | {"lam": "(0, inf)", "gamma": "(0, 1]"}

    def state(self, rows: int) -> State:
        """log u of each positive."""
        return {"log_u": torch.full((rows,), -torch.inf)}

    def step(self, pos: Tensor, neg: Tensor, state: State) -> tuple[Tensor, State]:
        """The loss at the new state."""
        losses = self.pairs(pos, neg)
        tilted = losses.detach() / self.lam
        log_u = moving_average(state["log_u"], logmeanexp(tilted), self.gamma, self.first_touch)
        return ((tilted - log_u[:, None]).exp() * losses).mean(), {"log_u": log_u}
