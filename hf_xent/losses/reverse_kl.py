"""Reverse KL distillation: the student avoids everything that the teacher finds unlikely.

    loss = T^2 KL(student || teacher) = T^2 (lse_t - H_s - sum_j s_j z_j)

s and H_s are the student's softmax and entropy, z and lse_t the teacher's logits, all at temperature T. The
full-vocabulary divergence of every token; sequence-level policy gradients are not part of it.

Source: Gu et al. 2024, MiniLLM, arXiv:2306.08543; Agarwal et al. 2024, On-Policy Distillation of Language Models,
arXiv:2306.13649.
Statistics: none (whole rows); under torch.compile the student's entropy and payload, the teacher's lse.
Relations: ForwardKL covers all modes of the teacher; JSD is between the two.
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
class ReverseKL(Distillation):
    """`T^2 KL(student || teacher)` per token, nats.

    Raises:
        ValueError: A field is out of its range.
    """

    uses = ("entropy", "payload")

    def second(self, head: Head, labels: Tensor, teacher: Payload | None) -> Payload | None:
        """The teacher, which `per_token` has tempered and frozen."""
        return teacher

    def of(self, stats: Stats) -> Tensor:
        """The student's part of the loss [N]."""
        return -stats.entropy - stats.payload

    def remaining_terms(self, hidden: Tensor, head: Head, labels: Tensor, teacher: Payload, request: Request) -> Tensor:
        """The teacher's normalizer, a constant."""
        with torch.no_grad():
            return stream_stats(*teacher, labels, ("lse",), request).lse

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """sum q (log q - log p); a banned token (-inf) adds nothing to it."""
        logq = student.clamp(min=-1e30)
        return torch.linalg.vecdot(logq.exp(), logq - teacher.clamp(min=-1e30))

    def slope(self, q: Tensor, logq: Tensor, p: Tensor, logp: Tensor) -> Tensor:
        """q (log q - log p - D)."""
        value = torch.linalg.vecdot(q, logq.sub_(logp))
        logq.sub_(value[:, None]).mul_(q)
        return value

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """The definition on dense logits of both models."""
        student = (logits / self.temperature).log_softmax(-1)
        teacher = (second["teacher"].detach() / self.temperature).log_softmax(-1)
        return self.dense((student.exp() * (student - teacher)).sum(-1), logits, labels)
