"""Two-way partial AUC: high TPR at low FPR.

    loss = tau log E_i (E_j exp(l_ij / lambda))^(lambda / tau)

    w <- (1 - gamma_w) w + gamma_w E_i u_i^(lambda / tau),  p_ij = u_i^(lambda / tau - 1) exp(l_ij / lambda) / w

with u as in PAUCDRO; a small tau emphasizes the hardest positives.

Source: SOTA-s of Zhu et al. 2022, When AUC meets DRO, ICML, arXiv:2203.00176; the loss of DACTYL's detectors
(arXiv:2508.00619).
Relations: for tau = lambda it is one softmax over all pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import State, logmeanexp, moving_average
from .pauc_dro import PAUCDRO


@dataclass(frozen=True)
class TPAUCKL(PAUCDRO):
    """`tau log E_i (E_j exp(l_ij / lambda))^(lambda / tau)`."""

    tau: float = 1.0
    """Temperature over the positives."""
    gamma_w: float = 0.9
    """Weight of a batch in the moving average w, in (0, 1]."""
    ranges: ClassVar[dict[str, str]] = PAUCDRO.ranges | {"tau": "(0, inf)", "gamma_w": "(0, 1]"}

    def state(self, rows: int) -> State:
        """log u of each positive, and log w."""
        return {**super().state(rows), "log_w": torch.tensor(-torch.inf)}

    def step(self, pos: Tensor, neg: Tensor, state: State) -> tuple[Tensor, State]:
        """The loss at the new state."""
        losses, power = self.pairs(pos, neg), self.lam / self.tau
        tilted = losses.detach() / self.lam
        log_u = moving_average(state["log_u"], logmeanexp(tilted), self.gamma, self.first_touch)
        log_w = moving_average(state["log_w"], logmeanexp(power * log_u), self.gamma_w, self.first_touch)
        weights = ((tilted - log_u[:, None]) + (power * log_u - log_w)[:, None]).exp()  # this order avoids cancellation
        return (weights * losses).mean(), {"log_u": log_u, "log_w": log_w}
