"""Base of the losses with a teacher: a second model over the same vocabulary, a temperature, and a share of CE.

    loss = (1 - w) T^2 D(p, q) + w CE

p is the teacher's softmax and q the student's, both of z / T; CE is the student's cross-entropy with the label, of z.
One visit computes the products of both models, turns the student's into the gradient by the formula that each
divergence has, and multiplies it with the head and the hidden states: four matmuls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..ops import Head, Payload, Stats
from ..ops.closed_form import Memory, log_softmax_
from ..ops.dispatch import stream_stats
from ..ops.divergences import stream_divergence
from ..ops.request import Request
from ..ops.row_loss import RowLoss, at_labels
from ..options.ranges import check_number
from . import other_vocabulary, several, top_k
from .base import Loss, apply_weights
from .other_vocabulary import OtherVocabulary
from .targets import Several, TopK

FORMS: dict[type, Callable[..., tuple[Tensor, Stats]]] = {
    TopK: top_k.per_token,
    Several: several.per_token,
    OtherVocabulary: other_vocabulary.per_token,
}
"""What a teacher may say other than (hidden, head), and how its loss is computed, as by `Distillation.per_token`."""


@dataclass(frozen=True)
class Distillation(Loss):
    """Base of the divergences between a student q = softmax(z / T) and a teacher p, times T^2, with a share of CE.

    A subclass writes `divergence` and `slope`. The teacher may have any hidden size and gets no gradient. Labels select
    the positions that count, and are what the cross-entropy is of.
    """

    temperature: float = field(default=1.0, kw_only=True)
    """T > 0: both softmaxes are of z / T, and the loss is multiplied by T^2 (Hinton et al. 2015, arXiv:1503.02531)."""
    ce_weight: float = field(default=0.0, kw_only=True)
    """w in [0, 1]: the share of the cross-entropy with the labels, at temperature 1; the divergence has 1 - w."""

    needs_teacher = True

    def __post_init__(self) -> None:
        check_number(self, "temperature", "(0, inf)", "choose a positive number")
        check_number(self, "ce_weight", "[0, 1]", "choose a share in [0, 1]")

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """D [N], a sum over columns of log-probabilities [N, V], differentiable by the student's.

        Banned tokens (-inf) add nothing. If the vocabulary is split over ranks, the columns are those of one rank.
        """
        raise NotImplementedError

    def across(self, target: OtherVocabulary, head: Head) -> Callable[..., Tensor]:
        """The loss [n] of rows of logits of both models, [n, V] and [n, V2], of a teacher with another vocabulary."""
        return other_vocabulary.on_shared_tokens(self, target, head)

    def slope(self, q: Tensor, logq: Tensor, p: Tensor, logp: Tensor) -> Tensor:
        """D [n], with its derivative by z / T in place of `logq`.

        Args:
            q: The student's probabilities [n, V], which stay as they are.
            logq: Their logarithms; all are finite, those of banned tokens have a large negative number.
            p: The teacher's probabilities, which may be written over, as may `logp`.
            logp: Their logarithms.
        """
        raise NotImplementedError

    def with_cross_entropy(self, divergence: Tensor, nll: Tensor | None) -> Tensor:
        """The loss from D and the negative log-probabilities of the labels; None if these have no share in it."""
        loss = (1 - self.ce_weight) * self.temperature**2 * divergence
        return loss if nll is None or not self.ce_weight else loss + self.ce_weight * nll

    def dense(self, divergence: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of D [N], and of dense logits [N, V] with the labels, for `reference`."""
        loss = (1 - self.ce_weight) * self.temperature**2 * divergence
        if not self.ce_weight:
            return loss
        return loss + self.ce_weight * cross_entropy(logits, labels.long(), reduction="none")

    def per_token(
        self, hidden: Tensor, head: Head, labels: Tensor, weight: Tensor, teacher: Any, request: Request
    ) -> tuple[Tensor, Stats]:
        """One visit of both models; statistics are the student's at temperature 1."""
        if type(teacher) in FORMS:
            return FORMS[type(teacher)](self, hidden, head, labels, weight, teacher, request)
        teacher = self.frozen_teacher(teacher, head)
        if torch.compiler.is_compiling() and type(self).of is not Loss.of:
            return self._of_statistics(hidden, head, labels, weight, teacher, request)
        return stream_divergence(self.row_loss(), [hidden], head, labels, request, weight, teacher)

    def row_loss(self) -> RowLoss:
        """The loss of rows of both models' logits, of which the teacher's are divided by the temperature."""

        def sums(labels: Tensor, student: Tensor, teacher: Tensor, plain: Tensor | None = None) -> dict[str, Tensor]:
            nll = None if plain is None else -at_labels(plain, labels)
            return {"loss": self.with_cross_entropy(self.divergence(student, teacher), nll)}

        softmaxes = ((0, self.temperature), (1, 1.0), *([(0, 1.0)] if self.ce_weight else []))
        knows = {"lse", "target"} if self.temperature == 1 or self.ce_weight else set()
        return RowLoss(sums, softmaxes, closed=self._in_place, knows=frozenset(knows))

    def _in_place(self, labels: Tensor, z: Tensor, other: Tensor, memory: Memory) -> tuple[dict[str, Tensor], Tensor]:
        """`closed_form.Closed` of the loss: the student's logits z become its gradient."""
        temperature, w = self.temperature, self.ce_weight
        target, lse = z.gather(-1, labels[:, None]).squeeze(-1), None
        plain, p, q = None, memory.like(z, "p"), memory.like(z, "q")
        if temperature != 1:
            if w:  # of the same products, another softmax
                plain = memory.like(z, "plain")
                lse = log_softmax_(memory.like(z, "log plain").copy_(z), plain)
            z = z.div_(temperature)
            log_softmax_(z, q)
        else:
            lse, plain = log_softmax_(z, q), q
        log_softmax_(other, p)
        divergence = self.slope(q, z, p, other)
        if (factor := (1 - w) * temperature) != 1:
            z.mul_(factor)
        if w and plain is not None:
            z.add_(plain, alpha=w)
            z[torch.arange(len(z), device=z.device), labels] -= w
        if lse is None:
            return {"loss": self.with_cross_entropy(divergence, None)}, z
        return {"lse": lse, "target": target, "loss": self.with_cross_entropy(divergence, lse - target)}, z

    def remaining_terms(self, hidden: Tensor, head: Head, labels: Tensor, teacher: Payload, request: Request) -> Tensor:
        """The terms of D that `of` does not have, in the shape of labels, 0 if ignored; heads are tempered."""
        raise NotImplementedError

    def _of_statistics(
        self, hidden: Tensor, head: Head, labels: Tensor, weight: Tensor, teacher: Payload, request: Request
    ) -> tuple[Tensor, Stats]:
        """The same while torch.compile traces, which knows statistics only: `of`, the terms that remain, and CE."""
        tempered, share = head.tempered(self.temperature), (1 - self.ce_weight) * self.temperature**2
        total, stats = super().per_token(hidden, tempered, labels, weight * share, teacher, request)
        terms = self.remaining_terms(hidden, tempered, labels, teacher, request)
        loss = (stats.loss + terms.detach()) * share
        rest = share * terms
        if self.temperature != 1 or self.ce_weight:
            stats = stream_stats(hidden, head, labels, ("lse", "target", *request.observe), request)
        if self.ce_weight:
            rest = rest + self.ce_weight * stats.nll
            loss = loss + self.ce_weight * stats.nll.detach()
        rest, stats = apply_weights(rest, weight, stats, request)
        stats.values["loss"] = loss
        return total + rest, stats

    def frozen_teacher(self, teacher: Payload | None, head: Head) -> Payload:
        """The teacher with its vocabulary checked, tempered and without gradient."""
        assert teacher is not None  # `reduced` has checked it
        hidden, teacher_head = teacher
        if teacher_head.vocabulary != head.vocabulary:
            raise ValueError(
                f"the teacher's head has {teacher_head.vocabulary} tokens but the student's {head.vocabulary}:"
                " choose one with the same vocabulary, or pass it as a teachers.PaddedTeacher if the tokens are the"
                " same, as a teachers.OtherVocabularyTeacher if not"
            )
        return hidden.detach(), teacher_head.detach().tempered(self.temperature)
