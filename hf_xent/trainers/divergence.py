"""Divergences between the distributions of passes of a model, as statistics of hidden states: no logits are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import Payload, vocab_stats


def disagreement(
    passes: list[Payload], labels: Tensor, *, temperature: float = 1.0, version: str = "v1", **options: Any
) -> tuple[Tensor, Tensor]:
    """NoiseFiT's soft cross-entropy and consistency of a clean and two noisy passes, in the shape of labels.

        soft = 1/2 sum_i KL(p_T || p_i)        consistency = KL(p_2 || p_1)

    Of version 'v2', both at the temperature on both sides, times T^2, with p_T and p_2 constant. Options as
    `vocab_stats`.
    """
    clean, *students = passes
    (hidden, head), other, factor = clean, students[1], 1.0
    teacher = hidden, head.tempered(temperature)
    if version == "v2":
        students = [(hidden, head.tempered(temperature)) for hidden, head in students]
        teacher, other = ((hidden.detach(), head.detach()) for hidden, head in (teacher, students[1]))
        factor = temperature**2
    first, second = (vocab_stats(*student, labels, outputs=("lse",), **options).lse for student in students)
    soft = (first + second) / 2 - _expected_logit(teacher, students, labels, **options)
    return factor * soft, factor * (first - _expected_logit(other, students[:1], labels, **options))


def divergence(p: Payload, q: Payload, labels: Tensor, **options: Any) -> Tensor:
    """KL(softmax of p's logits || softmax of q's) in the shape of labels, nats, 0 at ignored positions; no logits.

        KL = lse_q - (H_p + sum_j p_j z_qj)

    `p` and `q` are (hidden [..., D], head) over one vocabulary, differentiated both; options as `vocab_stats`.
    """
    return vocab_stats(*q, labels, outputs=("lse",), **options).lse - _expected_logit(p, [q], labels, **options)


def _expected_logit(p: Payload, others: list[Payload], labels: Tensor, **options: Any) -> Tensor:
    """H_p + the mean over the others q, which share a head, of sum_j p_j z_qj."""
    head = others[0][1]
    if head.softcap is None:  # logits are linear in the hidden states: one reduction for all
        others = [(torch.stack([hidden for hidden, _ in others]).mean(0), head)]
    outputs = ("entropy", "payload")
    moments = [vocab_stats(*p, labels, outputs=outputs, payload=other, **options) for other in others]
    return torch.stack([stats.entropy + stats.payload for stats in moments]).mean(0)
