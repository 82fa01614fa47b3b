"""MixCE: a mixture of forward cross-entropy and an estimate of the reverse one.

    loss = -(eta + (1 - eta) sg[p_y]) log p_y

The reverse cross-entropy is approximated by weighting the target with the model's own probability, without gradient.
eta = 1 is cross-entropy; below 1, exp(loss) is not a perplexity.

Source: Zhang et al. 2023, MixCE: Training Autoregressive Language Models by Mixing Forward and Reverse Cross-Entropies,
arXiv:2305.16958.
Statistics: lse, target.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ops import Stats
from ..options.ranges import check_number
from .base import Loss


@dataclass(frozen=True)
class MixCE(Loss):
    """`-(eta + (1 - eta) sg[p_y]) log p_y` per token.

    Raises:
        ValueError: A field is out of its range.
    """

    eta: float = 0.5
    """eta in [0, 1]: share of the forward cross-entropy (the authors' best runs: 0.1, 0.3, 0.7, by data set)."""

    uses = ("lse", "target")

    def __post_init__(self) -> None:
        check_number(self, "eta", "[0, 1]", "choose a share in [0, 1]")

    def of(self, stats: Stats) -> Tensor:
        """Per-token loss [N]."""
        return (self.eta + (1 - self.eta) * stats.logp.detach().exp()) * stats.nll

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """Forward cross-entropy, plus the same times the model's probability, which gets no gradient."""
        p = logits.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
        return self.eta * -p.log() + (1 - self.eta) * p.detach() * -p.log()
