"""What the losses with a teacher share: a frozen second model over the same vocabulary, and a temperature."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops import Head, Payload, Stats, vocab_stats
from ..options.ranges import check_number
from .base import Loss


@dataclass(frozen=True)
class Distillation(Loss):
    """Base of the divergences between a student p = softmax(z / T) and a teacher, times T^2.

    Labels only say which positions count. A subclass splits its loss into `of`, a function of the student's statistics,
    and `rest`; the teacher, any hidden size, gets no gradient.
    """

    temperature: float = field(default=1.0, kw_only=True)
    """T > 0: both softmaxes are of z / T, and the loss is multiplied by T^2 (Hinton et al. 2015, arXiv:1503.02531)."""

    needs_teacher = True

    def __post_init__(self) -> None:
        check_number(self, "temperature", "(0, inf)", "choose a positive number")

    def rest(self, hidden: Tensor, head: Head, labels: Tensor, teacher: Payload, options: dict[str, Any]) -> Tensor:
        """What the loss is beyond `of`, in the shape of labels and 0 at ignored positions; heads are tempered."""
        raise NotImplementedError

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
        """`of` from one visit of the student, plus `rest`; statistics are the student's at temperature 1."""
        own, teacher = head.tempered(self.temperature), self.frozen(teacher, head)
        weight = weight * self.temperature**2
        total, stats = super().per_token(hidden, own, labels, weight, teacher, observe, unreduced, options)
        rest = self.rest(hidden, own, labels, teacher, options)
        loss = (stats.loss + rest.detach()) * self.temperature**2
        if self.temperature != 1:
            stats = self.seen(hidden, head, labels, observe, options)
        rest, _ = self._weighted(rest, weight, stats, unreduced)
        stats.values["loss"] = loss
        return total + rest, stats

    def frozen(self, teacher: Payload | None, head: Head) -> Payload:
        """The teacher, checked, tempered and without gradient."""
        assert teacher is not None  # `compute` refused
        hidden, other = teacher
        if other.vocabulary != head.vocabulary:
            raise ValueError(
                f"the teacher's head has {other.vocabulary} tokens but the student's {head.vocabulary}: share one"
                " vocabulary"
            )
        return hidden.detach(), other.detach().tempered(self.temperature)

    @staticmethod
    @torch.no_grad()
    def seen(hidden: Tensor, head: Head, labels: Tensor, observe: tuple[str, ...], options: dict[str, Any]) -> Stats:
        """Detached statistics of the student as it is."""
        return vocab_stats(hidden, head, labels, outputs=("lse", "target", *observe), **options)
