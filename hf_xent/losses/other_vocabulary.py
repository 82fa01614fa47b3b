"""A teacher with another vocabulary: the tokens that both have, compared one by one, and all others as one class.

    D(teacher, student) over S + 1 classes: the shared tokens, and each model's other tokens together

This is exact for the classes, equals the divergence of the vocabularies where they are equal, and is at most that of
any pairing of their tokens otherwise (data processing inequality: merging classes lowers no f-divergence). That a
shared token is as likely in two models that split text differently is an assumption, of this and of every such loss.

Only positions before which both models have read the same text have an opinion (`hf_xent.models.alignment`). Rows of
both models are held for a chunk of tokens at a time, and computed again in the backward. If a head is split over ranks,
the rows of a chunk are gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import Head, Stats
from ..ops.dispatch import stream_stats
from ..ops.functional import map_rows, rows_in
from ..ops.request import Request
from ..ops.rows import Rows, autocast_for, autocast_head
from .base import apply_weights

OTHERS = ("class", "ignore")
"""What becomes of tokens that are not shared: one class of their own, or both softmaxes are over shared ones alone."""
BANNED = -1e30  # a log-probability of nothing, small enough for any dtype of statistics, whose gradients are no nan


@dataclass(frozen=True, eq=False)
class Spans:
    """Tokens whose probabilities multiply the distribution of a position: those of a group except one.

    `owner` are positions in the flattened labels. `hf_xent.teachers.other_vocabulary` makes them.

    Args:
        student_rows: Which of the student's positions predict its tokens [K], in the flattened labels.
        student_tokens: These tokens [K].
        student_owner: The positions that they multiply [K].
        teacher_hidden: The teacher's hidden states that predict its tokens [K2, D2].
        teacher_tokens: These tokens, ids of the teacher's [K2].
        teacher_owner: The positions that they multiply [K2].
    """

    student_rows: Tensor
    student_tokens: Tensor
    student_owner: Tensor
    teacher_hidden: Tensor
    teacher_tokens: Tensor
    teacher_owner: Tensor


@dataclass(frozen=True, eq=False)
class OtherVocabulary:
    """What a teacher with another vocabulary says about the tokens of a batch, a form of `hf_xent.losses.targets`.

    Args:
        hidden: The teacher's hidden states [..., D2], in the leading shape of the student's labels.
        head: Its head.
        student_ids: The shared tokens [S], ids of the student's without repetition; None if both heads have the same
            tokens, or for `universal_logit`, which reads none. With `others='ignore'` one of the heads may then have
            more rows, which pad it and are no tokens.
        teacher_ids: The same tokens as ids of the teacher's [S].
        mask: Which positions the teacher has an opinion about [...]; None is all of them.
        others: What becomes of the tokens that are not shared, a name of `OTHERS`.
        spans: For losses that merge the probabilities of groups of tokens; None for distributions of the next token.

    Raises:
        ValueError: One of the two lists of tokens is missing, they differ in length, or `others` has another value.
    """

    hidden: Tensor
    head: Head
    student_ids: Tensor | None = None
    teacher_ids: Tensor | None = None
    mask: Tensor | None = None
    others: str = "class"
    spans: Spans | None = None

    def __post_init__(self) -> None:
        if self.others not in OTHERS:
            raise ValueError(f"others is {self.others!r}: choose {' or '.join(map(repr, OTHERS))}")
        sizes = [None if ids is None else tuple(ids.shape) for ids in (self.student_ids, self.teacher_ids)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"student_ids has shape {sizes[0]} but teacher_ids {sizes[1]}: pass the same tokens twice")


def per_token(
    objective: Any,
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    weight: Tensor,
    target: OtherVocabulary,
    request: Request,
) -> tuple[Tensor, Stats]:
    """`Loss.per_token` of a `Distillation` with such a target; `objective.across` has the loss of rows."""
    if _is_plain(target, head):
        plain: tuple[Tensor, Stats] = objective.per_token(
            hidden, head, labels, weight, (target.hidden, target.head), request
        )
        return plain
    divergence = _losses(objective, hidden, head, labels, target, request)
    with torch.set_grad_enabled(torch.is_grad_enabled() and objective.ce_weight > 0):
        stats = stream_stats(hidden, head, labels, ("lse", "target", *request.observe), request)
    losses = objective.with_cross_entropy(divergence, -stats.logp)  # 0 at ignored positions, too
    return apply_weights(losses, weight, stats, request)


def _is_plain(target: OtherVocabulary, head: Head) -> bool:
    """Whether it is a teacher of the same tokens whose head turns out to have no other padding."""
    same_rows = target.student_ids is None and target.head.vocabulary == head.vocabulary
    return same_rows and target.others == "ignore" and target.mask is None and target.spans is None


def _losses(
    objective: Any, hidden: Tensor, head: Head, labels: Tensor, target: OtherVocabulary, request: Request
) -> Tensor:
    """The divergence of every position, at the objective's temperature, in the shape of labels; 0 without opinion."""
    compare = objective.across(target, head)
    ignored = request.ignore_index
    opinions = labels if target.mask is None else torch.where(target.mask.to(labels.device), labels, ignored)
    ours, theirs = head.tempered(objective.temperature), target.head.detach().tempered(objective.temperature)
    rows = Rows(hidden, ours, opinions, ignored)
    second = autocast_for(theirs, rows.select(target.hidden.detach(), trailing=1))
    theirs = autocast_head(theirs, target.hidden)
    factors = () if target.spans is None else _factors(target.spans, hidden, (ours, theirs), labels, request)
    width = ours.vocabulary + theirs.vocabulary
    step = rows_in(_budget(rows, (ours, theirs), request), width, rows.hidden.dtype)

    def of(logits: Tensor, second: Tensor, *factors: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = theirs.logits(second).to(logits.dtype)
        found: Tensor = compare(logits, teacher, *factors)
        return found

    with torch.autocast(labels.device.type, enabled=False):
        losses = map_rows(of, rows.hidden, rows.head, (second, *map(rows.select, factors)), step)
    return rows.scatter({"loss": losses}).loss


def _budget(rows: Rows, heads: tuple[Head, Head], request: Request) -> int:
    """Bytes of rows in memory at a time: as many as were asked for, or what either head has by default."""
    budgets = [request.budget(head, len(rows.flat), rows.hidden.element_size()) for head in heads]
    return sum(budgets) if request.memory_budget is None else budgets[0]


def _factors(
    spans: Spans, hidden: Tensor, heads: tuple[Head, Head], labels: Tensor, request: Request
) -> tuple[Tensor, Tensor]:
    """The logarithm of what multiplies the student's probabilities at each position, and of the teacher's: [...]."""

    def total(rows: Tensor, head: Head, tokens: Tensor, owner: Tensor) -> Tensor:
        logp = stream_stats(rows, head, tokens, ("lse", "target"), request).logp
        return logp.new_zeros(labels.numel()).index_add(0, owner, logp).reshape(labels.shape)

    student = hidden.flatten(0, -2).index_select(0, spans.student_rows)
    ours = total(student, heads[0], spans.student_tokens, spans.student_owner)
    with torch.no_grad():
        theirs = total(spans.teacher_hidden, heads[1], spans.teacher_tokens, spans.teacher_owner)
    return ours, theirs


class Columns:
    """The shared tokens of one model's vocabulary, and whether it has others."""

    def __init__(self, ids: Tensor, size: int, whose: str):
        low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, -1)
        if low < 0 or high >= size:
            raise ValueError(
                f"{whose}_ids range over [{low}, {high}] but the {whose}'s head has {size} tokens: pass ids in"
                f" [0, {size - 1}]"
            )
        if len(ids.unique()) != len(ids):
            raise ValueError(f"{whose}_ids has a token twice: pass every shared token once")
        self.ids, self.has_others = ids, len(ids) < size
        self.is_first = bool((ids == torch.arange(len(ids), device=ids.device)).all())

    def of(self, x: Tensor) -> Tensor:
        """The shared columns of x [n, V], in order: [n, S]."""
        return x[:, : len(self.ids)] if self.is_first else x.index_select(1, self.ids)

    def without(self, x: Tensor, value: float) -> Tensor:
        """x [n, V] with another value in the shared columns."""
        return x.index_fill(1, self.ids, value)

    def log_probs(self, logits: Tensor, others: bool) -> Tensor:
        """Log-probabilities of the shared tokens, and of all others together if they are asked for, [n, S (+ 1)]."""
        classes = self.of(logits)
        if others:
            classes = torch.cat([classes, self.without(logits, BANNED).logsumexp(-1, keepdim=True)], 1)
        return classes.log_softmax(-1).clamp(min=BANNED)


def columns_of(target: OtherVocabulary, head: Head, loss: str) -> tuple[Columns, Columns]:
    """The shared tokens in student and teacher. Raises: ValueError if they are missing or not of these heads."""
    sizes, device = (head.vocabulary, target.head.vocabulary), head.weight.device
    ours, theirs = target.student_ids, target.teacher_ids
    if ours is None or theirs is None:
        if sizes[0] != sizes[1] and target.others != "ignore":
            raise ValueError(
                f"student_ids is None, but the teacher's head has {sizes[1]} tokens, the student's {sizes[0]}, and"
                f" {loss} compares shared ones: pass those of hf_xent.models.vocabularies.shared_tokens"
            )
        ours = theirs = torch.arange(min(sizes), device=device)
    return Columns(ours.to(device), sizes[0], "student"), Columns(theirs.to(device), sizes[1], "teacher")


def on_shared_tokens(objective: Any, target: OtherVocabulary, head: Head) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of rows of logits of both models [n, V] and [n, V2]: the objective's divergence over shared tokens.

    Raises: ValueError for a target that does not fit the heads, or whose divergence is infinite.
    """
    name = type(objective).__name__
    if target.spans is not None:
        raise ValueError(
            f"spans is set, but {name} compares distributions of one token: pass spans=None, or choose the loss"
            " universal_logit"
        )
    student, teacher = columns_of(target, head, name)
    others = target.others == "class" and (student.has_others or teacher.has_others)
    if others and student.has_others != teacher.has_others:
        certain, even = torch.tensor([[0.0, BANNED]]), torch.tensor([[0.5, 0.5]]).log()
        pair = (even, certain) if student.has_others else (certain, even)
        if not objective.divergence(*pair) < 1e9:
            whose = "teacher" if student.has_others else "student"
            raise ValueError(
                f"others is 'class', but the {whose}'s head has shared tokens only, so {name} is infinite: pass"
                " others='ignore'"
            )

    def loss(logits: Tensor, second: Tensor) -> Tensor:
        found: Tensor = objective.divergence(student.log_probs(logits, others), teacher.log_probs(second, others))
        return found

    return loss
