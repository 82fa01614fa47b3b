"""Total variation distillation: half the absolute difference of the two distributions, bounded by 1.

    loss = T^2 1/2 sum_j |p_j - q_j|

p is the teacher, q the student, both at temperature T. The gradient weighs tokens by the sign of p_j - q_j alone, so no
token dominates, however improbable one of the models finds it.

Source: Wen et al. 2023, f-Divergence Minimization for Sequence-Level Knowledge Distillation, arXiv:2307.15190.
Statistics: none (whole rows).
Relations: TaiLr bounds it from samples, without a teacher; its square is at most half of either KL (Pinsker).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .distillation import Distillation


@dataclass(frozen=True)
class TotalVariation(Distillation):
    """`T^2 1/2 sum_j |p_j - q_j|` per token between the teacher p and the student q, both at temperature T.

    Raises:
        ValueError: A field is out of its range.
    """

    uses = ()

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """1/2 sum |p - q|."""
        return (teacher.exp() - student.exp()).abs().sum(-1) / 2

    def slope(self, q: Tensor, logq: Tensor, p: Tensor, logp: Tensor) -> Tensor:
        """q (s - sum q s), with s half the sign of q - p."""
        value = torch.linalg.vector_norm(torch.sub(q, p, out=logp), 1, -1) / 2
        torch.sign(logp, out=logq)
        logq.sub_(torch.linalg.vecdot(q, logq)[:, None]).mul_(q).mul_(0.5)
        return value

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """The definition on dense probabilities of both models."""
        p, q = (second["teacher"].detach() / self.temperature).softmax(-1), (logits / self.temperature).softmax(-1)
        return self.dense((p - q).abs().sum(-1) / 2, logits, labels)
