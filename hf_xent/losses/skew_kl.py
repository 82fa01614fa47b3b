"""Skewed KL distillation: a KL divergence whose second distribution has a share of the first, so that it is bounded.

    loss = T^2 KL(p || m)      m = alpha p + (1 - alpha) q
    with `reverse`: T^2 KL(q || m)      m = (1 - alpha) p + alpha q

p is the teacher, q the student, both at temperature T. No ratio exceeds 1 / alpha: the loss is at most
log(1 / alpha) times T^2, and its gradient is bounded too, where that of a KL explodes on tokens that the second
distribution finds all but impossible. alpha -> 0 is ForwardKL, or with `reverse` ReverseKL.

Source: Ko et al. 2024, DistiLLM: Towards Streamlined Distillation for Large Language Models, arXiv:2402.03898.
Statistics: none (whole rows).
Relations: JSD is the sum of two skewed KLs: beta of that with alpha = beta, and 1 - beta of the reverse one with
alpha = 1 - beta.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..options.ranges import check_flag, check_number
from .distillation import Distillation


@dataclass(frozen=True)
class SkewKL(Distillation):
    """`T^2 KL(teacher || m)` per token, m the student with a share alpha of the teacher; or the reverse.

    Raises:
        ValueError: A field is out of its range.
    """

    uses = ()

    alpha: float = 0.1
    """alpha in (0, 1): the share of the first distribution in the second."""
    reverse: bool = False
    """Compare the student with the teacher that has a share of it, KL(q || (1 - alpha) p + alpha q)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "alpha", "(0, 1)", "choose a share in (0, 1), or the forward_kl and reverse_kl losses for 0")
        check_flag(self, "reverse")

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL of the first to the mixture; a banned token (-inf) adds nothing."""
        logp, logq = teacher.clamp(min=-1e4), student.clamp(min=-1e4)
        first, logm = logq if self.reverse else logp, _log(self._mixture(logq.exp(), logp.exp()))
        return torch.linalg.vecdot(first.exp(), first - logm)

    def slope(self, q: Tensor, logq: Tensor, p: Tensor, logp: Tensor) -> Tensor:
        """q (g - sum q g): g is -(1 - alpha) p / m, or for the reverse log q - log m - alpha q / m."""
        mixture = self._mixture(q, p).clamp_(min=torch.finfo(q.dtype).tiny)
        if self.reverse:
            share = torch.div(q, mixture, out=p)
            value = torch.linalg.vecdot(q, logq.sub_(mixture.log_()))
            logq.sub_(share, alpha=self.alpha).sub_(torch.linalg.vecdot(q, logq)[:, None]).mul_(q)
            return value
        torch.div(q, mixture, out=logq)  # at most 1 / (1 - alpha), where p / m times q could be infinite times 0
        value = torch.linalg.vecdot(p, logp.sub_(mixture.log_()))
        weighted = logq.mul_(p).mul_(self.alpha - 1)
        weighted.sub_(torch.mul(q, weighted.sum(-1, keepdim=True), out=p))
        return value

    def _mixture(self, q: Tensor, p: Tensor) -> Tensor:
        return torch.lerp(p, q, self.alpha) if self.reverse else torch.lerp(q, p, self.alpha)

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """The definition on dense probabilities of both models."""
        p, q = (second["teacher"].detach() / self.temperature).softmax(-1), (logits / self.temperature).softmax(-1)
        if self.reverse:
            loss = (q * (q / ((1 - self.alpha) * p + self.alpha * q)).log()).sum(-1)
        else:
            loss = (p * (p / (self.alpha * p + (1 - self.alpha) * q)).log()).sum(-1)
        return self.dense(loss, logits, labels)


def _log(mixture: Tensor) -> Tensor:
    return mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log()
