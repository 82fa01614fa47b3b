"""Generalized Jensen-Shannon distillation: from covering the teacher (beta -> 0) to seeking its modes (beta -> 1).

    loss = T^2 (beta KL(p || m) + (1 - beta) KL(q || m))          m = beta p + (1 - beta) q

p is the teacher, q the student, both at temperature T. loss / beta -> KL(teacher || student) as beta -> 0 and
loss / (1 - beta) -> KL(student || teacher) as beta -> 1; symmetric at 1/2. The mixture is not a moment of either
softmax: full rows of both are held for a chunk of tokens at a time, and recomputed in the backward.

Source: Agarwal et al. 2024, On-Policy Distillation of Language Models, arXiv:2306.13649.
Statistics: none (map_logits).
Relations: ForwardKL and ReverseKL are its limits, and cheaper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import Head, Payload, Stats, map_logits
from ..ops.request import Request
from ..options.ranges import check_number
from .base import apply_weights
from .distillation import Distillation


@dataclass(frozen=True)
class JSD(Distillation):
    """`T^2 (beta KL(teacher || m) + (1 - beta) KL(student || m))` per token, m the mixture with beta of the teacher.

    Raises:
        ValueError: A field is out of its range.
    """

    beta: float = 0.5
    """beta in (0, 1): the teacher's share of the mixture."""

    uses = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "choose a share in (0, 1), or the forward_kl and reverse_kl losses for its ends"
        check_number(self, "beta", "(0, 1)", remedy)

    def per_token(
        self, hidden: Tensor, head: Head, labels: Tensor, weight: Tensor, teacher: Payload | None, request: Request
    ) -> tuple[Tensor, Stats]:
        """Full rows of the valid tokens; statistics of the student at temperature 1, from a visit of their own."""
        stats = self.student_stats(hidden, head, labels, request)
        teacher_hidden, teacher_head = self.frozen_teacher(teacher, head)
        if teacher_hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"teacher's hidden has shape {tuple(teacher_hidden.shape)} but labels {tuple(labels.shape)}: pass one"
                " hidden state per label"
            )
        valid = stats.mask.reshape(-1).nonzero().squeeze(-1)
        rows = [x.reshape(-1, x.shape[-1]).index_select(0, valid) for x in (hidden, teacher_hidden)]

        def divergence(logits: Tensor, teacher_rows: Tensor) -> Tensor:
            return self.divergence(logits, teacher_head.logits(teacher_rows))

        tempered = head.tempered(self.temperature)
        losses = map_logits(divergence, rows[0], tempered, rows[1], memory_budget=request.memory_budget)
        losses = losses * self.temperature**2
        loss = losses.new_zeros(labels.numel()).index_copy(0, valid, losses).reshape(labels.shape)
        return apply_weights(loss, weight, stats, request)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """beta KL(p || m) + (1 - beta) KL(q || m) of logits [N, V]; a banned token (-inf) adds nothing."""
        logp, logq = teacher.log_softmax(-1).clamp(min=-1e4), student.log_softmax(-1).clamp(min=-1e4)
        logm = torch.logaddexp(logp + math.log(self.beta), logq + math.log1p(-self.beta))
        return (self.beta * logp.exp() * (logp - logm) + (1 - self.beta) * logq.exp() * (logq - logm)).sum(-1)

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """The definition on dense probabilities of both models."""
        p, q = (second["teacher"].detach() / self.temperature).softmax(-1), (logits / self.temperature).softmax(-1)
        m = self.beta * p + (1 - self.beta) * q
        loss = self.beta * (p * (p / m).log()).sum(-1) + (1 - self.beta) * (q * (q / m).log()).sum(-1)
        return self.temperature**2 * loss
