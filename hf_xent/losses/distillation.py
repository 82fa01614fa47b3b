"""Base of the losses with a teacher: a frozen second model over the same vocabulary, and a temperature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops import Head, Payload, Stats
from ..ops.dispatch import stream_stats
from ..ops.divergences import stream_divergence
from ..ops.request import Request
from ..ops.row_loss import RowLoss
from ..options.ranges import check_number
from . import other_vocabulary, several, top_k
from .base import Loss, apply_weights
from .other_vocabulary import OtherVocabulary
from .targets import Several, TopK


@dataclass(frozen=True)
class Distillation(Loss):
    """Base of the divergences between a student p = softmax(z / T) and a teacher, times T^2.

    Labels only select the positions that count. A subclass splits its loss into `of`, a function of the student's
    statistics, and `remaining_terms`. The teacher may have any hidden size and gets no gradient.
    """

    temperature: float = field(default=1.0, kw_only=True)
    """T > 0: both softmaxes are of z / T, and the loss is multiplied by T^2 (Hinton et al. 2015, arXiv:1503.02531)."""

    needs_teacher = True

    def __post_init__(self) -> None:
        check_number(self, "temperature", "(0, inf)", "choose a positive number")

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The divergence [N], a sum over columns of log-probabilities [N, V], differentiable by the student's."""
        raise NotImplementedError

    def across(self, target: OtherVocabulary, head: Head) -> Callable[..., Tensor]:
        """The loss [n] of rows of logits of both models, [n, V] and [n, V2], of a teacher with another vocabulary."""
        return other_vocabulary.on_shared_tokens(self, target, head)

    def remaining_terms(self, hidden: Tensor, head: Head, labels: Tensor, teacher: Payload, request: Request) -> Tensor:
        """The terms that `of` does not have, in the shape of labels, 0 at ignored positions; heads are tempered."""
        raise NotImplementedError

    def per_token(
        self, hidden: Tensor, head: Head, labels: Tensor, weight: Tensor, teacher: Any, request: Request
    ) -> tuple[Tensor, Stats]:
        """`of` from one visit of the student, plus the terms that remain; statistics are those at temperature 1."""
        if isinstance(teacher, TopK):
            return top_k.per_token(self, hidden, head, labels, weight, teacher, request)
        if isinstance(teacher, Several):
            return several.per_token(self, hidden, head, labels, weight, teacher, request)
        if isinstance(teacher, OtherVocabulary):
            return other_vocabulary.per_token(self, hidden, head, labels, weight, teacher, request)
        tempered, teacher = head.tempered(self.temperature), self.frozen_teacher(teacher, head)
        weight = weight * self.temperature**2
        total, stats = super().per_token(hidden, tempered, labels, weight, teacher, request)
        terms = self.remaining_terms(hidden, tempered, labels, teacher, request)
        loss = (stats.loss + terms.detach()) * self.temperature**2
        if self.temperature != 1:
            stats = self.student_stats(hidden, head, labels, request)
        terms, _ = apply_weights(terms, weight, stats, request)
        stats.values["loss"] = loss
        return total + terms, stats

    def frozen_teacher(self, teacher: Payload | None, head: Head) -> Payload:
        """The teacher with its vocabulary checked, tempered and without gradient."""
        assert teacher is not None  # `reduced` has checked it
        hidden, teacher_head = teacher
        if teacher_head.vocabulary != head.vocabulary:
            raise ValueError(
                f"the teacher's head has {teacher_head.vocabulary} tokens but the student's {head.vocabulary}:"
                " choose a teacher with the same vocabulary, or pass a losses.other_vocabulary.OtherVocabulary"
            )
        return hidden.detach(), teacher_head.detach().tempered(self.temperature)

    @staticmethod
    def student_stats(hidden: Tensor, head: Head, labels: Tensor, request: Request) -> Stats:
        """Detached statistics of the student at temperature 1."""
        with torch.no_grad():
            return stream_stats(hidden, head, labels, ("lse", "target", *request.observe), request)


@dataclass(frozen=True)
class RowDivergence(Distillation):
    """Base of the divergences that need whole rows of both models' softmaxes: `divergence` is all that differs."""

    uses = ()

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The divergence [N], a sum over columns of log-probabilities [N, V], differentiable by the student's.

        Banned tokens (-inf) add nothing. If the vocabulary is split over ranks, the columns are those of one rank.
        """
        raise NotImplementedError

    def per_token(
        self, hidden: Tensor, head: Head, labels: Tensor, weight: Tensor, teacher: Any, request: Request
    ) -> tuple[Tensor, Stats]:
        """One visit of both models; statistics are the student's at temperature 1."""
        if isinstance(teacher, TopK):
            return top_k.per_token(self, hidden, head, labels, weight, teacher, request)
        if isinstance(teacher, Several):
            return several.per_token(self, hidden, head, labels, weight, teacher, request)
        if isinstance(teacher, OtherVocabulary):
            return other_vocabulary.per_token(self, hidden, head, labels, weight, teacher, request)

        def sums(_: Tensor, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
            return {"loss": self.temperature**2 * self.divergence(student, teacher)}

        loss = RowLoss(sums, ((0, self.temperature), (1, 1.0)))  # the teacher's head is tempered
        return stream_divergence(loss, [hidden], head, labels, request, weight, self.frozen_teacher(teacher, head))
