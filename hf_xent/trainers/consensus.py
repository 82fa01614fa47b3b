"""F2C's vote over the formats of an item and its divergences, from scores and log-probabilities, without a model.

K formats, C answers, T tokens of an answer, V tokens of the vocabulary; see `hf_xent.trainers.f2c` for the method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """The result of a vote: the formats that J is taken over, and the students that align with the teachers."""

    agreeing: tuple[int, ...]
    teachers: tuple[int, ...] = ()
    students: tuple[int, ...] = ()


def consensus(scores: Tensor) -> int | None:
    """The answer that more than half of the formats give by their scores [K, C], or None; ties go to lower answers."""
    votes = scores.argmax(-1).bincount(minlength=scores.shape[1])
    label = int(votes.argmax())
    return label if 2 * int(votes[label]) > len(scores) else None


def split(scores: Tensor, label: int, threshold: float, top_k: int) -> Split:
    """Teachers and students by the margins of scores [K, C] for the consensus answer."""
    others = scores.clone()
    others[:, label] = float("-inf")
    margins = scores[:, label] - others.amax(-1)
    majority = (scores.argmax(-1) == label).nonzero().squeeze(-1)
    if len(majority) == len(scores) and float(margins.quantile(0.5)) >= threshold:
        return Split(agreeing=tuple(range(len(scores))))
    count = min(top_k, len(majority) - 1)
    if count < 2:
        return Split(agreeing=())
    order = margins[majority].sort(descending=True, stable=True).indices[:count]
    teachers = tuple(majority[order].tolist())
    students = tuple(k for k in range(len(scores)) if k not in teachers)
    return Split(agreeing=teachers, teachers=teachers, students=students)


def mixture(logp: Tensor, valid: Tensor) -> Tensor:
    """Log of the mean distribution [T, V] over formats of logp [K, T, V] that have a token there, valid [K, T]."""
    rows = logp.masked_fill(~valid[..., None], float("-inf"))
    count = valid.sum(0).clamp(min=1)[:, None]
    empty = ~valid.any(0)[:, None]
    return torch.where(empty, torch.zeros_like(logp[0]), rows.logsumexp(0)) - count.log()


def agreement(logp: Tensor, valid: Tensor) -> Tensor:
    """J over all formats of logp: the mean of 1/2 [KL(M || P_k) + KL(P_k || M)] over their valid tokens."""
    mean = mixture(logp, valid)
    divergences = ((mean.exp() - logp.exp()) * (mean - logp)).sum(-1) / 2
    return torch.where(valid, divergences, 0.0).sum() / valid.sum().clamp(min=1)


def alignment(teachers: tuple[Tensor, Tensor], students: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of KL(sg[M] || P_s) over the tokens that both sides have, and their number; each side is (logp, valid)."""
    mean = mixture(*teachers).detach()
    logp, valid = students
    valid = valid & teachers[1].any(0)
    divergences = (mean.exp() * (mean - logp)).sum(-1)
    return torch.where(valid, divergences, 0.0).sum(), valid.sum()
