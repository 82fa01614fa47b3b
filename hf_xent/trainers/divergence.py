"""Divergences between the distributions that several passes of a model predict, computed without keeping logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..losses import kl
from ..ops import Payload
from ..ops.dispatch import stream_stats
from ..ops.request import Request


def disagreement(
    passes: list[Payload], labels: Tensor, *, temperature: float = 1.0, version: str = "v1", **options: Any
) -> tuple[Tensor, Tensor]:
    """NoiseFiT's soft cross-entropy and consistency of a clean and two noisy passes, each in the shape of labels.

        soft = 1/2 sum_i KL(p_T || p_i)        consistency = KL(p_2 || p_1)

    In version 'v2' both sides of both terms have the temperature T, the terms are multiplied by T^2, and p_T and p_2
    are constants. The options are those of `vocab_stats`.
    """
    clean, *students = passes
    (hidden, head), other, factor = clean, students[1], 1.0
    teacher = hidden, head.tempered(temperature)
    if version == "v2":
        students = [(hidden, head.tempered(temperature)) for hidden, head in students]
        teacher, other = ((hidden.detach(), head.detach()) for hidden, head in (teacher, students[1]))
        factor = temperature**2
    request = Request(**options)
    first, second = (stream_stats(*student, labels, ("lse",), request).lse for student in students)
    soft = (first + second) / 2 - _expected_logit(teacher, students, labels, request)
    return factor * soft, factor * (first - _expected_logit(other, students[:1], labels, request))


def divergence(p: Payload, q: Payload, labels: Tensor, **options: Any) -> Tensor:
    """`losses.kl.divergence` of two passes, with gradients for both; the options are those of `vocab_stats`."""
    return kl.divergence(p, q, labels, Request(**options))


def _expected_logit(p: Payload, others: list[Payload], labels: Tensor, request: Request) -> Tensor:
    """The mean over the others, which share a head, of their expected logits under p."""
    head = others[0][1]
    if head.softcap is None:  # logits are linear in the hidden states: one reduction for all
        others = [(torch.stack([hidden for hidden, _ in others]).mean(0), head)]
    return torch.stack([kl.expected_logit(p, other, labels, request) for other in others]).mean(0)
