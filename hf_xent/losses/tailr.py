"""TaiLr: likelihood training that trusts improbable targets less, from a bound on the total variation distance.

    loss = -sg[w] log p_y          w = clamp(p_y / (gamma + (1 - gamma) p_y), w_min, 1)

gamma -> 0 is cross-entropy; gamma = 1 gives w = p_y. With label smoothing eps the loss is
(1 - eps) loss - (eps / V) sum_j log p_j; the smoothing part is not weighted.

Source: Ji et al. 2023, Tailoring Language Generation Models under Total Variation Distance, arXiv:2302.13344; clamp,
smoothing and defaults as in the authors' code, github.com/thu-coai/TaiLr.
Statistics: lse, target; mean with label smoothing.
Relations: TaiLr(gamma=1, w_min=0) is MixCE(eta=0). What the EMO repository calls "tvd" is another objective.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import Stats
from ..options.ranges import check_number
from .base import Loss


@dataclass(frozen=True)
class TaiLr(Loss):
    """`-sg[w] log p_y` per token, w = clamp(p_y / (gamma + (1 - gamma) p_y), w_min, 1).

    Raises:
        ValueError: A field is out of its range.
    """

    gamma: float = 1.0
    """gamma in [0, 1]: how strongly improbable targets are discounted (the authors' runs: 1e-7, 0.1, 0.8)."""
    w_min: float = 0.0
    """w_min in [0, 1]: floor of the weight, without which an untrained model learns nothing (their runs: 0.2, 0.3)."""
    label_smoothing: float = 0.0
    """eps in [0, 1): share of the target spread evenly over the vocabulary."""

    def __post_init__(self) -> None:
        check_number(self, "gamma", "[0, 1]")
        check_number(self, "w_min", "[0, 1]")
        check_number(self, "label_smoothing", "[0, 1)", "choose a share in [0, 1)")

    @property
    def uses(self) -> tuple[str, ...]:  # type: ignore[override]  # a constant in the base, here it depends on fields
        """The statistics that it differentiates: `mean` only with label smoothing."""
        return ("lse", "target", "mean") if self.label_smoothing else ("lse", "target")

    def of(self, stats: Stats) -> Tensor:
        """Per-token loss [N]; the weight is taken in log space, so p_y may underflow."""
        logp = stats.logp.detach()
        scaled = logp + (math.log1p(-self.gamma) if self.gamma < 1 else -math.inf)
        offset = torch.full_like(logp, math.log(self.gamma) if self.gamma > 0 else -math.inf)
        weight = (logp - torch.logaddexp(offset, scaled)).exp().clamp(self.w_min, 1)
        loss = weight * stats.nll
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * (stats.lse - stats.mean)
        return loss

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """The same on dense probabilities."""
        q = logits.softmax(-1)
        p = q.gather(-1, labels[:, None]).squeeze(-1)
        weight = (p / (self.gamma + (1 - self.gamma) * p)).clamp(self.w_min, 1).detach()
        return -(1 - self.label_smoothing) * weight * p.log() - self.label_smoothing * q.log().mean(-1)
