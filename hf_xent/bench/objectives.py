"""What is minimized: `OBJECTIVES`, cross-entropy and others, as functions of dense logits.

They define the truth that the gate compares with, and what dense torch computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PLAIN, CAPPED, SMOOTHED, REWARDED = "cross-entropy", "softcap", "label smoothing", "entropy bonus"
FORWARD_KL, REVERSE_KL, SYMMETRIC = DIVERGENCES = ("forward kl", "reverse kl", "jsd")
CAP = 30.0  # of Gemma 2
SMOOTHING = 0.1
BONUS = 0.1
MATMULS = "(whose matmuls are four, and TRL's kernel its fused divergence)"


@dataclass(frozen=True)
class Objective:
    """A loss of dense logits, of one model or of a student and a teacher."""

    on_logits: Callable[..., Tensor]
    """logits [N, V], labels [N], and the teacher's logits [N, V] if there is one -> losses [N], nats."""
    about: str
    """Its description in the heading of a table."""
    with_teacher: bool = False
    """Whether it compares with a second model."""


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _capped(logits: Tensor, labels: Tensor) -> Tensor:
    return _cross_entropy(CAP * (logits / CAP).tanh(), labels)


def _smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=SMOOTHING)


def _rewarded(logits: Tensor, labels: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return BONUS * (logp.exp() * logp).sum(-1) - logp.gather(-1, labels[:, None])[:, 0]


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL of the first to the second, of log-probabilities."""
    return F.kl_div(second, first, log_target=True, reduction="none").sum(-1)


def _forward_kl(logits: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    return _divergence(teacher.log_softmax(-1), logits.log_softmax(-1))


def _reverse_kl(logits: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    return _divergence(logits.log_softmax(-1), teacher.log_softmax(-1))


def _jsd(logits: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    q, p = logits.log_softmax(-1), teacher.log_softmax(-1)
    mixture = torch.logaddexp(q, p) - math.log(2)
    return (_divergence(p, mixture) + _divergence(q, mixture)) / 2


OBJECTIVES: dict[str, Objective] = {
    PLAIN: Objective(_cross_entropy, "cross-entropy"),
    CAPPED: Objective(_capped, f"cross-entropy of logits capped at {CAP:g}"),
    SMOOTHED: Objective(_smoothed, f"cross-entropy with label smoothing {SMOOTHING:g}"),
    REWARDED: Objective(_rewarded, f"cross-entropy less {BONUS:g} times the entropy"),
    FORWARD_KL: Objective(_forward_kl, f"KL of the teacher to the student {MATMULS}", with_teacher=True),
    REVERSE_KL: Objective(_reverse_kl, f"KL of the student to the teacher {MATMULS}", with_teacher=True),
    SYMMETRIC: Objective(_jsd, f"Jensen-Shannon divergence of student and teacher {MATMULS}", with_teacher=True),
}
"""Name -> objective."""
