"""A distillation loss against the k most probable tokens of a teacher and the mass of all others (`targets.TopK`).

    loss = (1 - w) T^2 D(t, s) + w CE

t_i are the teacher's k probabilities, r is the mass of all others, s the student's probabilities, all at the loss's
temperature T. What `tail` assumes about the others decides what D compares:

    'class'      k + 1 classes, the last of which has r and the student's mass s_r of all others
    'student'    the vocabulary; the teacher's others are r s_j / s_r, which is a constant
    'uniform'    the vocabulary; the teacher's V - k others are r / (V - k) each

All divergences here are sums of a g(s_j, t_j) with g(c s, c t) = c g(s, t), so that its derivative by s depends on
t / s alone. Over the others of 'student' that is the same for all, r / s_r: their terms add up to g(s_r, r), and the
gradient is that of 'class'. So both are one computation, of k + 1 numbers a token (`ops.entries`), for every objective.

Probabilities at the teacher's temperature T0 become those at T by t^(T0 / T), normalized. Every token's are needed: the
others of 'uniform' are known, those of 'student' are r / S(T0) e^(z_j / T0), where S(T) = sum e^(z_j / T) over the
others, and come to (r / S(T0))^(T0 / T) S(T) together. A class of its own cannot be tempered.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..ops import Head, Stats
from ..ops.divergences import stream_divergence
from ..ops.entries import Entries, EntryLoss
from ..ops.request import Request
from ..ops.row_loss import RowLoss, at_ids, at_labels, with_entries
from ..ops.statistics import wide
from .targets import TAILS, TopK

LOWEST = math.log(torch.finfo(torch.float32).tiny)  # the log-probability that stands for -inf: no gradient is infinite


def per_token(
    objective: Any, hidden: Tensor, head: Head, labels: Tensor, weight: Tensor, target: TopK, request: Request
) -> tuple[Tensor, Stats]:
    """`Loss.per_token` of a `Distillation` with such a target: one visit of the student."""
    size = head.vocabulary
    _check(target, labels, size, objective.temperature)
    constants = _with_opinions(target, labels, request.ignore_index, wide(hidden.dtype))
    _check_ids(constants[0], size)
    uniform = target.tail == "uniform" and target.ids.shape[-1] < size
    loss = (_of_rows if uniform else _of_classes)(objective, target, constants, head)
    return stream_divergence(loss, [hidden], head, labels, request, weight)


def _of_classes(objective: Any, target: TopK, constants: tuple[Tensor, ...], head: Head) -> EntryLoss:
    """The loss of k + 1 numbers a token, for 'class' and 'student', and where k tokens are all there are."""
    temperature, own = objective.temperature, target.temperature
    everything = target.ids.shape[-1] == head.vocabulary

    def of(entries: Entries, logp: Tensor, rest: Tensor, opinion: Tensor) -> dict[str, Tensor]:
        others = entries.others[temperature]
        if everything:
            rest = torch.full_like(rest, LOWEST)
        elif own != temperature:  # the student's others
            with torch.no_grad():
                rest = others.detach() + own / temperature * (rest - entries.others[own].detach())
        teacher = torch.cat([logp * (own / temperature), rest[:, None]], 1).log_softmax(-1)
        student = torch.cat([entries.given / temperature, others[:, None]], 1) - entries.lse(temperature)[:, None]
        divergence = torch.where(opinion, objective.divergence(student, teacher), 0.0)
        return {"loss": objective.with_cross_entropy(divergence, entries.lse() - entries.label)}

    softmaxes = dict.fromkeys((temperature, 1.0) if objective.ce_weight else (temperature,))
    return EntryLoss(of, tuple(softmaxes), constants, () if everything or own in softmaxes else (own,))


def _of_rows(objective: Any, target: TopK, constants: tuple[Tensor, ...], head: Head) -> RowLoss:
    """The loss of whole rows of the student and one number for all of the teacher's others, for 'uniform'."""
    temperature = objective.temperature
    ids, logp, rest, opinion = constants
    count, split = head.vocabulary - ids.shape[-1], head.shard is not None
    power = target.temperature / temperature
    logp, other = logp * power, (rest - math.log(count)) * power
    lse = torch.cat([logp, other[..., None] + math.log(count)], -1).logsumexp(-1)

    def sums(labels: Tensor, *rows: Tensor) -> dict[str, Tensor]:
        student, (ids, logp, other, opinion) = rows[0], rows[-4:]
        here = (ids >= 0) & (ids < student.shape[1])
        # the divergence of equal numbers is 0
        even = with_entries(student, ids, other[:, None].expand_as(ids), split=split)
        others = objective.divergence(even, other[:, None])
        given = objective.divergence(at_ids(student, ids), torch.where(here, logp, 0.0))
        divergence = torch.where(opinion, others + given, 0.0)
        return {"loss": objective.with_cross_entropy(divergence, -at_labels(rows[-5], labels))}

    softmaxes = ((0, temperature), (0, 1.0)) if objective.ce_weight else ((0, temperature),)
    return RowLoss(sums, softmaxes, (ids, logp - lse[..., None], other - lse, opinion))


def _with_opinions(target: TopK, labels: Tensor, ignored: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Ids, logp, rest and mask; without an opinion the ids are the first k, and no number is infinite anywhere."""
    mask = torch.ones_like(labels, dtype=torch.bool) if target.mask is None else target.mask
    used = mask & (labels != ignored)
    first = torch.arange(target.ids.shape[-1], device=labels.device)
    ids = torch.where(used[..., None], target.ids.long(), first)
    logp = torch.where(used[..., None], target.logp.to(dtype), 0.0)
    rest = torch.where(used, target.rest.to(dtype), 0.0)
    logp, rest = (torch.where(x == -torch.inf, LOWEST, x) for x in (logp, rest))
    return ids, logp, rest, mask


def _check(target: TopK, labels: Tensor, size: int, temperature: float) -> None:
    """Raise a ValueError that names the remedy for a target that does not fit the labels or the loss."""
    shapes = {"ids": target.ids.shape[:-1], "logp": target.logp.shape[:-1], "rest": target.rest.shape}
    shapes |= {} if target.mask is None else {"mask": target.mask.shape}
    for name, shape in shapes.items():
        x = getattr(target, name)
        if shape != labels.shape or x.device != labels.device:
            raise ValueError(
                f"the teacher's {name} has shape {tuple(x.shape)} on {x.device} but labels {tuple(labels.shape)} on"
                f" {labels.device}: pass one row per label"
            )
    k = target.ids.shape[-1] if target.ids.ndim > labels.ndim else 0
    if target.logp.shape != target.ids.shape or not 1 <= k <= size:
        raise ValueError(
            f"the teacher's ids have shape {tuple(target.ids.shape)} and logp {tuple(target.logp.shape)}: pass two of"
            f" one shape, [..., k] with k from 1 to the head's {size} tokens"
        )
    if target.ids.is_floating_point() or target.ids.dtype == torch.bool:
        raise ValueError(f"the teacher's ids are {target.ids.dtype}: pass token ids as int64")
    if target.mask is not None and target.mask.dtype != torch.bool:
        raise ValueError(f"the teacher's mask is {target.mask.dtype}: pass one of bool")
    if target.tail not in TAILS:
        raise ValueError(f"tail is {target.tail!r}: choose {', '.join(map(repr, TAILS))}")
    if not 0 < target.temperature < math.inf:
        raise ValueError(f"the teacher's temperature is {target.temperature!r}: pass that of its log-probabilities")
    if target.tail == "class" and target.temperature != temperature and k < size:
        raise ValueError(
            f"temperature is {temperature} but the teacher's log-probabilities are at {target.temperature}, and a tail"
            " of 'class' cannot be tempered: choose tail 'uniform' or 'student', or the loss's temperature as theirs"
        )


def _check_ids(ids: Tensor, size: int) -> None:
    """Raise a ValueError that names the remedy for ids that are not k distinct tokens; a GPU is waited for once."""
    if not ids.numel():
        return
    ordered = ids.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]).sum()
    low, high, repeated = torch.stack([ordered.amin(), ordered.amax(), twice]).tolist()
    if low < 0 or high >= size:
        raise ValueError(
            f"the teacher's ids range over [{low}, {high}] but the head has {size} tokens: pass ids in [0, {size - 1}],"
            " or choose a teacher with the same vocabulary"
        )
    if repeated:
        raise ValueError("the teacher's ids name a token twice at a position: pass k distinct tokens")
