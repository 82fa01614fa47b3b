"""Generalized Jensen-Shannon distillation: from covering the teacher (beta -> 0) to seeking its modes (beta -> 1).

    loss = T^2 (beta KL(p || m) + (1 - beta) KL(q || m))          m = beta p + (1 - beta) q

p is the teacher, q the student, both at temperature T. loss / beta -> KL(teacher || student) as beta -> 0 and
loss / (1 - beta) -> KL(student || teacher) as beta -> 1; symmetric at 1/2. The mixture is not a moment of either
softmax: full rows of both are held for a chunk of tokens at a time, and recomputed in the backward.

Source: Agarwal et al. 2024, On-Policy Distillation of Language Models, arXiv:2306.13649.
Statistics: none (map_logits).
Relations: ForwardKL and ReverseKL are its ends, and cheaper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import Head, Payload, Stats, map_logits
from ..options.ranges import check_number
from .distillation import Distillation


@dataclass(frozen=True)
class JSD(Distillation):
    """`T^2 (beta KL(teacher || m) + (1 - beta) KL(student || m))` per token, m the mixture with beta of the teacher."""

    beta: float = 0.5
    """beta in (0, 1): the teacher's share of the mixture."""

    uses = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = "choose a share in (0, 1), or the forward_kl and reverse_kl losses for its ends"
        check_number(self, "beta", "(0, 1)", ends)

    def per_token(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        weight: Tensor,
        teacher: Payload | None,
        observe: tuple[str, ...],
        unreduced: bool,
        options: dict[str, Any],
    ) -> tuple[Tensor, Stats]:
        """Full rows of the valid tokens; statistics of the student as it is, from a forward of their own."""
        stats = self.seen(hidden, head, labels, observe, options)
        other, teacher_head = self.frozen(teacher, head)
        if other.shape[:-1] != labels.shape:
            raise ValueError(
                f"teacher's hidden has shape {tuple(other.shape)}: its rows must be labels', {tuple(labels.shape)}"
            )
        valid = stats.mask.reshape(-1).nonzero().squeeze(-1)
        rows = [x.reshape(-1, x.shape[-1]).index_select(0, valid) for x in (hidden, other)]

        def fn(logits: Tensor, other: Tensor) -> Tensor:
            return self.divergence(logits, teacher_head.logits(other))

        own = head.tempered(self.temperature)
        found = map_logits(fn, rows[0], own, rows[1], memory_budget=options["memory_budget"])
        loss = found.new_zeros(labels.numel()).index_copy(0, valid, found * self.temperature**2).reshape(labels.shape)
        return self._weighted(loss, weight, stats, unreduced)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """beta KL(p || m) + (1 - beta) KL(q || m) of logits [N, V]; a banned token (-inf) adds nothing."""
        logp, logq = teacher.log_softmax(-1).clamp(min=-1e4), student.log_softmax(-1).clamp(min=-1e4)
        logm = torch.logaddexp(logp + math.log(self.beta), logq + math.log1p(-self.beta))
        return (self.beta * logp.exp() * (logp - logm) + (1 - self.beta) * logq.exp() * (logq - logm)).sum(-1)

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """The definition on dense probabilities of both."""
        p, q = (second["teacher"].detach() / self.temperature).softmax(-1), (logits / self.temperature).softmax(-1)
        m = self.beta * p + (1 - self.beta) * q
        loss = self.beta * (p * (p / m).log()).sum(-1) + (1 - self.beta) * (q * (q / m).log()).sum(-1)
        return self.temperature**2 * loss
