"""Universal logit distillation: the sorted probabilities of two models, whatever tokens these are of.

    loss = T^2 sum_i |p_(i) - q_(i)|          p_(1) >= p_(2) >= ...

p is the teacher, q the student, both at temperature T; the shorter of the two is filled up with zeros. Only how sure
the models are is compared, not of what: the loss needs no map of tokens, and would not notice a wrong one. It is the
Wasserstein distance of two distributions whose tokens cost the same to exchange. Rows of both models are sorted for a
chunk of tokens at a time. Over one vocabulary it is at most twice the total variation.

With a target that has `spans`, all probabilities of a position are multiplied by those of the other tokens of its group
before the comparison, as in TRL's GOLD.

Source: Boizard et al. 2024, Towards Cross-Tokenizer Distillation, arXiv:2402.12030, eq. 4, without its cross-entropy.
Statistics: none (whole rows).
Relations: GOLD compares shared tokens one by one and sorts the others; TotalVariation knows the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..ops import Head, Stats
from ..ops.request import Request
from .distillation import Distillation
from .other_vocabulary import OtherVocabulary
from .targets import TopK


@dataclass(frozen=True)
class UniversalLogit(Distillation):
    """`T^2 sum_i |p_(i) - q_(i)|` per token between the sorted probabilities of teacher and student.

    The teacher is (hidden, head) with a head of any size, or an `OtherVocabulary`, whose lists of tokens are not read.

    Raises:
        ValueError: A field is out of its range.
    """

    uses = ()

    def per_token(
        self, hidden: Tensor, head: Head, labels: Tensor, weight: Tensor, teacher: Any, request: Request
    ) -> tuple[Tensor, Stats]:
        """By rows of both models; statistics are the student's at temperature 1."""
        if isinstance(teacher, TopK):
            raise ValueError(
                f"the teacher is a TopK, but {type(self).__name__} sorts all probabilities: pass hidden states and head"
            )
        target = OtherVocabulary(*teacher) if isinstance(teacher, tuple) else teacher
        return super().per_token(hidden, head, labels, weight, target, request)

    def across(self, target: OtherVocabulary, head: Head) -> Callable[..., Tensor]:
        """The distance of rows of logits of both models; see `merged` for their factors."""

        def loss(logits: Tensor, second: Tensor, *factors: Tensor) -> Tensor:
            return distance(*(logp.exp() for logp in merged((logits, second), factors)))

        return loss

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """The definition on dense probabilities of both models, filled up with zeros."""
        p, q = (second["teacher"].detach() / self.temperature).softmax(-1), (logits / self.temperature).softmax(-1)
        size = max(p.shape[-1], q.shape[-1])
        p, q = (F.pad(x, (0, size - x.shape[-1])).sort(-1).values for x in (p, q))
        return self.dense((p - q).abs().sum(-1), logits, labels)


def merged(logits: tuple[Tensor, Tensor], factors: tuple[Tensor, ...]) -> list[Tensor]:
    """Log-probabilities [n, V] of student and teacher, each plus what its group adds [n], if there are groups."""
    logp = [x.log_softmax(-1) for x in logits]
    return [x + f[:, None] for x, f in zip(logp, factors, strict=True)] if factors else logp


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum of absolute differences [n] of sorted rows [n, V] and [n, V2], none negative; missing ones are 0."""
    ours, theirs = (x.sort(-1, descending=True).values for x in (student, teacher))
    both = min(ours.shape[1], theirs.shape[1])
    return (ours[:, :both] - theirs[:, :both]).abs().sum(-1) + ours[:, both:].sum(-1) + theirs[:, both:].sum(-1)
