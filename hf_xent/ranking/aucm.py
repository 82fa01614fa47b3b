"""AUC margin loss: squared distances within the classes, and a margin between their means.

    loss = E_i (h_i - a)^2 + E_j (h_j - b)^2 + 2 alpha (m + E_j h_j - E_i h_i) - alpha^2

It is minimized over a and b and maximized over alpha >= 0; a, b, alpha are the state. After a batch,
`a <- (1 - gamma) a + gamma E_i h_i`, b likewise, `alpha <- (1 - gamma) alpha + gamma (m + b - a)`, at least 0.

Source: Yuan et al. 2021, Large-scale Robust Deep AUC Maximization, ICCV, arXiv:2012.03173; the updates are plain PESG
steps with learning rate gamma / 2.
Relations: at its saddle point it is the variances of the classes plus a squared hinge of the margin and the distance
of their means; it is the only loss of AUC without state for each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Bounded, State


@dataclass(frozen=True)
class AUCM(Bounded):
    """The saddle-point form of the area under the ROC curve."""

    gamma: float = 0.2
    """Weight of a batch in the moving averages, in (0, 1]."""
    ranges: ClassVar[dict[str, str]] = Bounded.ranges | {"gamma": "(0, 1]"}

    def state(self, rows: int) -> State:
        """The scalars a, b and alpha."""
        return {"a": torch.zeros(()), "b": torch.zeros(()), "alpha": torch.zeros(())}

    def step(self, pos: Tensor, neg: Tensor, state: State) -> tuple[Tensor, State]:
        """The loss at the old state."""
        a, b, alpha = state["a"], state["b"], state["alpha"]
        gap = self.margin + neg.mean() - pos.mean()
        loss = (pos - a).square().mean() + (neg - b).square().mean() + 2 * alpha * gap - alpha**2
        a, b = a.lerp(pos.detach().mean().to(a), self.gamma), b.lerp(neg.detach().mean().to(b), self.gamma)
        return loss, {"a": a, "b": b, "alpha": alpha.lerp(self.margin + b - a, self.gamma).clamp(min=0)}
