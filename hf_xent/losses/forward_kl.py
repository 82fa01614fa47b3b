"""Forward KL distillation: the student covers everything that the teacher finds likely.

    loss = T^2 KL(teacher || student) = T^2 (lse_s - H_t - sum_j t_j z_j)

t and H_t are the teacher's softmax and entropy, z and lse_s the student's logits, all at temperature T. Its derivative
by z / T is the difference of the two softmaxes. `ce_weight` mixes cross-entropy in.

Source: Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
Statistics: none (whole rows); under torch.compile the student's lse, the teacher's entropy and payload.
Relations: ReverseKL seeks one mode of the teacher; JSD is between the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import Head, Payload, Stats
from ..ops.dispatch import stream_stats
from ..ops.request import Request
from .distillation import Distillation


@dataclass(frozen=True)
class ForwardKL(Distillation):
    """`T^2 KL(teacher || student)` per token, nats.

    Raises:
        ValueError: A field is out of its range.
    """

    uses = ("lse",)

    def of(self, stats: Stats) -> Tensor:
        """The student's part of the loss [N]."""
        return stats.lse

    def remaining_terms(self, hidden: Tensor, head: Head, labels: Tensor, teacher: Payload, request: Request) -> Tensor:
        """Minus the sum of the teacher's entropy and its expectation of the student's logits."""
        stats = stream_stats(*teacher, labels, ("entropy", "payload"), request, (hidden, head))
        return -stats.entropy - stats.payload

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """sum p (log p - log q); a banned token (-inf) adds nothing to it."""
        logp = teacher.clamp(min=-1e30)
        return torch.linalg.vecdot(logp.exp(), logp - student.clamp(min=-1e30))

    def slope(self, q: Tensor, logq: Tensor, p: Tensor, logp: Tensor) -> Tensor:
        """q - p."""
        value = torch.linalg.vecdot(p, logp.sub_(logq))
        torch.sub(q, p, out=logq)
        return value

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """The definition on dense logits of both models."""
        student = (logits / self.temperature).log_softmax(-1)
        teacher = (second["teacher"].detach() / self.temperature).log_softmax(-1)
        return self.dense((teacher.exp() * (teacher - student)).sum(-1), logits, labels)
