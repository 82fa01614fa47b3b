"""Generalized Jensen-Shannon distillation: from covering the teacher (beta -> 0) to seeking its modes (beta -> 1).

    loss = T^2 (beta KL(p || m) + (1 - beta) KL(q || m))          m = beta p + (1 - beta) q

p is the teacher, q the student, both at temperature T. loss / beta -> KL(teacher || student) as beta -> 0 and
loss / (1 - beta) -> KL(student || teacher) as beta -> 1; symmetric at 1/2. The mixture is not a moment of either
softmax: rows of both are held for a chunk of tokens at a time, and turned into the gradient in place.

Source: Agarwal et al. 2024, On-Policy Distillation of Language Models, arXiv:2306.13649.
Statistics: none (whole rows).
Relations: ForwardKL and ReverseKL are its limits, and cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..options.ranges import check_number
from .distillation import Distillation


@dataclass(frozen=True)
class JSD(Distillation):
    """`T^2 (beta KL(teacher || m) + (1 - beta) KL(student || m))` per token, m the mixture with beta of the teacher.

    Raises:
        ValueError: A field is out of its range.
    """

    uses = ()

    beta: float = 0.5
    """beta in (0, 1): the teacher's share of the mixture."""

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "choose a share in (0, 1), or the forward_kl and reverse_kl losses for its ends"
        check_number(self, "beta", "(0, 1)", remedy)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """beta KL(p || m) + (1 - beta) KL(q || m); a banned token (-inf) adds nothing."""
        logp, logq = teacher.clamp(min=-1e4), student.clamp(min=-1e4)
        p, q = logp.exp(), logq.exp()
        logm = torch.lerp(q, p, self.beta).clamp(min=torch.finfo(p.dtype).tiny).log()
        forward, reverse = torch.linalg.vecdot(p, logp - logm), torch.linalg.vecdot(q, logq - logm)
        return self.beta * forward + (1 - self.beta) * reverse

    def slope(self, q: Tensor, logq: Tensor, p: Tensor, logp: Tensor) -> Tensor:
        """(1 - beta) q (log q - log m - KL(q || m))."""
        logm = torch.lerp(q, p, self.beta).clamp_(min=torch.finfo(q.dtype).tiny).log_()
        forward, reverse = torch.linalg.vecdot(p, logp.sub_(logm)), torch.linalg.vecdot(q, logq.sub_(logm))
        logq.sub_(reverse[:, None]).mul_(q).mul_(1 - self.beta)
        return self.beta * forward + (1 - self.beta) * reverse

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """The definition on dense probabilities of both models."""
        p, q = (second["teacher"].detach() / self.temperature).softmax(-1), (logits / self.temperature).softmax(-1)
        m = self.beta * p + (1 - self.beta) * q
        loss = self.beta * (p * (p / m).log()).sum(-1) + (1 - self.beta) * (q * (q / m).log()).sum(-1)
        return self.dense(loss, logits, labels)
