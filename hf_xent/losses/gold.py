"""GOLD's hybrid: shared tokens of two vocabularies one by one, all others by their sorted probabilities.

    loss = T^2 (w (beta KL(p_S || m) + (1 - beta) KL(q_S || m)) + u sum_i |p_(i) - q_(i)|)

p is the teacher, q the student, both at temperature T; p_S and q_S are their probabilities of the shared tokens, not
normalized again, m = beta p_S + (1 - beta) q_S, and the sum is over the sorted probabilities of all others, the shorter
list filled up with zeros. Rows of both models are held for a chunk of tokens at a time.

By default w is the number of shared tokens over the teacher's vocabulary, and u = 1 - w, as in TRL. With a target that
has `spans`, all probabilities are multiplied by those of the other tokens of a group first (`universal_logit`). TRL
raises probabilities below 1e-8 to that before the logarithm; here none is changed.

Source: Patiño et al. 2025, Unlocking On-Policy Distillation for Any Model Family, as in TRL's `ULDLoss`.
Statistics: none (whole rows).
Relations: UniversalLogit sorts all tokens; JSD over shared tokens and one class of all others is a divergence, as this
    is not: p_S and q_S need not have the same mass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import Head
from ..options.ranges import check_number
from .jsd import JSD
from .other_vocabulary import OtherVocabulary, columns_of
from .universal_logit import UniversalLogit, distance, merged


@dataclass(frozen=True)
class GOLD(UniversalLogit):
    """Jensen-Shannon terms of shared tokens, and the distance of the sorted probabilities of all others.

    The teacher is an `OtherVocabulary` with the shared tokens, or (hidden, head) of the same vocabulary.

    Raises:
        ValueError: A field is out of its range.
    """

    beta: float = 0.5
    """beta in (0, 1): the teacher's share of the mixture."""
    matched_weight: float | None = None
    """w >= 0, the weight of shared tokens; None is their share of the teacher's vocabulary."""
    unmatched_weight: float | None = None
    """u >= 0, the weight of all others; None is 1 - w, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "beta", "(0, 1)", "choose a share in (0, 1)")
        for name in ("matched_weight", "unmatched_weight"):
            if getattr(self, name) is not None:
                check_number(self, name, "[0, inf)", "choose a number >= 0, or None")

    def across(self, target: OtherVocabulary, head: Head) -> Callable[..., Tensor]:
        """The loss of rows of logits of both models; see `merged` for their factors."""
        student, teacher = columns_of(target, head, type(self).__name__)
        w, u = self._weights(len(teacher.ids), target.head.vocabulary)
        jsd = JSD(beta=self.beta)

        def loss(logits: Tensor, second: Tensor, *factors: Tensor) -> Tensor:
            logq, logp = merged((logits, second), factors)
            matched = jsd.divergence(student.of(logq), teacher.of(logp))
            # zeros in the place of shared tokens are sorted behind all others, where they differ from nothing
            return w * matched + u * distance(student.without(logq.exp(), 0.0), teacher.without(logp.exp(), 0.0))

        return loss

    def _weights(self, shared: int, size: int) -> tuple[float, float]:
        """w and u."""
        w = shared / size if self.matched_weight is None else self.matched_weight
        return w, max(0.0, 1 - w) if self.unmatched_weight is None else self.unmatched_weight

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """The definition on dense probabilities of both models over one vocabulary: all tokens are shared."""
        p, q = (second["teacher"].detach() / self.temperature).softmax(-1), (logits / self.temperature).softmax(-1)
        m = torch.lerp(q, p, self.beta)
        matched = self.beta * (p * (p / m).log()).sum(-1) + (1 - self.beta) * (q * (q / m).log()).sum(-1)
        return self.dense(self._weights(p.shape[-1], p.shape[-1])[0] * matched, logits, labels)
