"""Focal loss: concentrates the gradient on the tokens that the model gets wrong.

    loss = -(1 - p_y)^gamma log p_y

gamma = 0 is cross-entropy. The factor is differentiated too.

Source: Lin et al. 2017, Focal Loss for Dense Object Detection, arXiv:1708.02002, eq. 4.
Statistics: lse, target.
Relations: TaiLr and MixCE also reweight by p_y, the other way round, with a weight that carries no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import Stats
from ..options.ranges import check_number
from .base import Loss


@dataclass(frozen=True)
class Focal(Loss):
    """`-(1 - p_y)^gamma log p_y` per token, nats.

    Raises:
        ValueError: A field is out of its range.
    """

    gamma: float = 2.0
    """gamma >= 0: focusing strength; 0 is cross-entropy."""

    uses = ("lse", "target")

    def __post_init__(self) -> None:
        check_number(self, "gamma", "[0, inf)", "choose a finite number >= 0")

    def of(self, stats: Stats) -> Tensor:
        """Per-token loss [N]. At p_y = 1 the factor stops at the smallest float: its slope is infinite if gamma < 1."""
        missed = -torch.expm1(stats.logp)
        return missed.clamp(min=torch.finfo(missed.dtype).tiny) ** self.gamma * stats.nll

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """The paper's formula on dense probabilities."""
        p = logits.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
        return -((1 - p) ** self.gamma) * p.log()
