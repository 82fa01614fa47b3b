"""What a teacher says about the tokens of a batch, in each form that a distillation loss takes as its `teacher`.

    (hidden, head)     the teacher's last hidden states and its head: all of its distribution, not written down
    TopK               its k most probable tokens and the mass of all others, as a cache or a server has them
    Several            several of these, with weights
    OtherVocabulary    hidden states and head of a teacher with other tokens (`hf_xent.losses.other_vocabulary`)

All have the leading shape of the student's labels, [...], and are aligned with the student's logits: entry t is about
the token that logit t predicts. No gradient flows to any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

TAILS = ("class", "uniform", "student")
"""What becomes of the mass outside of the k tokens: one class of its own, spread uniformly, or as the student does."""


@dataclass(frozen=True, eq=False)
class TopK:
    """The k most probable tokens of a teacher at every position, and the mass of all others.

    Args:
        ids: Distinct token ids [..., k].
        logp: Their log-probabilities [..., k], at `temperature`.
        rest: The log-probability of all other tokens together [...]; -inf if there is none.
        tail: What is assumed about these others, a name of `TAILS`.
        temperature: T of the softmax that the log-probabilities are of.
        mask: Which positions the teacher has an opinion about [...]; None is all of them.
    """

    ids: Tensor
    logp: Tensor
    rest: Tensor
    tail: str = "class"
    temperature: float = 1.0
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Several:
    """What several teachers say. A token's loss is the weighted sum of its losses against each.

    Args:
        parts: The teachers' targets, in any of these forms.
        weights: One number >= 0 for each, with sum 1: a term of the loss that has no teacher is counted once then.

    Raises:
        ValueError: The weights do not fit.
    """

    parts: tuple[Any, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.parts) != len(self.weights) or not self.parts:
            raise ValueError(f"{len(self.weights)} weights are given for {len(self.parts)} parts: pass one for each")
        if min(self.weights) < 0 or abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError(f"weights are {self.weights}: choose numbers >= 0 whose sum is 1")
