"""PGD: projected gradient ascent on the cross-entropy of the label, from a random point of the ball.

    x' <- project(x' + size sign(d CE(z(x'), y) / d x')),  size = 2.5 epsilon / steps

Source: Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv:1706.06083.
Relations: `pma` ascends on the margin of probabilities instead, with steps that shrink.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from .ascent import Found, ascend
from .ball import Ball
from .base import Attack, flipped, generators
from .inputs import Target


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient ascent on cross-entropy; see the module's docstring."""

    size: float = 2.5
    """The size of all steps together, as a multiple of epsilon."""
    ranges: ClassVar[dict[str, str]] = {"size": "(0, inf)"}

    def find(self, target: Target, ball: Ball, steps: int, seed: int) -> Found:
        """As `Attack.find`."""

        def objective(step: int, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            logits, labels = target.logits(x, rows), target.labels[rows]
            return F.cross_entropy(logits, labels, reduction="none"), flipped(logits.detach(), labels)

        x = target.center()
        start = ball.start(x, generators(x, seed))
        return ascend(objective, x, ball, [self.size * ball.radius / steps] * steps, start, leave=self.leave)
