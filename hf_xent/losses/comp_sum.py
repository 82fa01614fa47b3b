"""Comp-sum losses: a family with the sum-exponential loss, cross-entropy, generalized cross-entropy and MAE.

    loss = (p_y^(tau - 1) - 1) / (1 - tau)

| tau | loss |
|---|---|
| 0 | sum-exponential, 1 / p_y - 1 |
| 1 | cross-entropy, -log p_y (the limit) |
| 1 < tau < 2 | generalized cross-entropy, (1 - p_y^q) / q with q = tau - 1 |
| 2 | 1 - p_y, half the mean absolute error |

Computed as expm1((1 - tau) nll) / (1 - tau). For tau < 1 this overflows float32 at (1 - tau) nll = 88; from 60 on it is
replaced by its tangent, so that very improbable tokens have a finite loss and a factor e^60 in place of inf and NaN.
For tau > 1 the gradient of a token is p_y^(tau - 1) times that of cross-entropy: almost 0 in an untrained model.

Source: Mao, Mohri, Zhong 2023, Cross-Entropy Loss Functions: Theoretical Analysis and Applications, arXiv:2304.07288;
generalized cross-entropy: Zhang, Sabuncu 2018, arXiv:1805.07836.
Statistics: lse, target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import Stats
from ..options.ranges import check_number
from .base import Loss

TANGENT_FROM = 60.0  # e^60 is twelve orders of magnitude below the largest float32, so that many tokens can be summed


@dataclass(frozen=True)
class CompSum(Loss):
    """`(p_y^(tau - 1) - 1) / (1 - tau)` per token; tau = 1 is cross-entropy.

    Raises:
        ValueError: A field is out of its range.
    """

    tau: float = 1.5
    """tau >= 0: 1 is cross-entropy, above it noisy labels weigh less, below it hard tokens weigh more."""

    uses = ("lse", "target")

    def __post_init__(self) -> None:
        check_number(self, "tau", "[0, inf)", "choose a finite number >= 0 (1 is cross-entropy)")

    def of(self, stats: Stats) -> Tensor:
        """Per-token loss [N]."""
        if self.tau == 1:
            return stats.nll
        exponent = (1 - self.tau) * stats.nll
        inside = torch.expm1(exponent.clamp(max=TANGENT_FROM))
        beyond = math.exp(TANGENT_FROM) * (exponent - TANGENT_FROM).clamp(min=0)
        return (inside + beyond) / (1 - self.tau)

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """Phi^tau of u = sum_{y' != y} exp(z_y' - z_y).

        Phi^tau(u) = ((1 + u)^(1 - tau) - 1) / (1 - tau), and log(1 + u) for tau = 1.
        """
        z_y = logits.gather(-1, labels[:, None])
        u = (logits - z_y).exp().sum(-1) - 1
        return u.log1p() if self.tau == 1 else ((1 + u) ** (1 - self.tau) - 1) / (1 - self.tau)
