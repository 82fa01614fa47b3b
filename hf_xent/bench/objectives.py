"""What is minimized: `OBJECTIVES`, cross-entropy and others, as functions of dense logits.

They define the truth that the gate compares with, and what dense torch computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

PLAIN, CAPPED, SMOOTHED, REWARDED = "cross-entropy", "softcap", "label smoothing", "entropy bonus"
CAP = 30.0  # of Gemma 2
SMOOTHING = 0.1
BONUS = 0.1


@dataclass(frozen=True)
class Objective:
    """A loss of dense logits."""

    on_logits: Callable[[Tensor, Tensor], Tensor]
    """logits [N, V], labels [N] -> losses [N], nats."""
    about: str
    """Its description in the heading of a table."""


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _capped(logits: Tensor, labels: Tensor) -> Tensor:
    return _cross_entropy(CAP * (logits / CAP).tanh(), labels)


def _smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=SMOOTHING)


def _rewarded(logits: Tensor, labels: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return BONUS * (logp.exp() * logp).sum(-1) - logp.gather(-1, labels[:, None])[:, 0]


OBJECTIVES: dict[str, Objective] = {
    PLAIN: Objective(_cross_entropy, "cross-entropy"),
    CAPPED: Objective(_capped, f"cross-entropy of logits capped at {CAP:g}"),
    SMOOTHED: Objective(_smoothed, f"cross-entropy with label smoothing {SMOOTHING:g}"),
    REWARDED: Objective(_rewarded, f"cross-entropy less {BONUS:g} times the entropy"),
}
"""Name -> objective."""
