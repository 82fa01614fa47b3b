"""A distillation loss against several teachers: the weighted sum of its losses against each."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..ops import Head, Stats
from ..ops.request import Request
from .base import Loss
from .targets import Several


def per_token(
    loss: Loss, hidden: Tensor, head: Head, labels: Tensor, weight: Tensor, teacher: Several, request: Request
) -> tuple[Tensor, Stats]:
    """As `Loss.per_token`, with a visit of the student for each teacher whose weight is above 0."""
    used = [(part, share) for part, share in zip(teacher.parts, teacher.weights, strict=True) if share]
    total, stats = hidden.new_zeros(()), None
    for part, share in used:
        asked = request if stats is None else replace(request, observe=())
        value, found = loss.per_token(hidden, head, labels, weight, part, asked)
        total = total + share * value
        losses = share * found.loss
        if stats is None:
            stats = found
        else:
            losses = stats.loss + losses
        stats.values["loss"] = losses
    assert stats is not None  # the weights have a sum of 1
    return total, stats
