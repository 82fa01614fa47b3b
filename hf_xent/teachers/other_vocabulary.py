"""A teacher with another tokenizer: it reads the text of the student's tokens in its own, and its answers are put where
both have read the same.

    student   <s>  The  fox  jum  ps  over          positions before fox, jum and over have an answer: after `jum`
    teacher   The  fox  jumps  over                 the teacher is within a token, and has nothing to say there

A position's answer is the teacher's hidden state after the same bytes, for the token that follows; shared tokens are
compared (`hf_xent.losses.other_vocabulary`), or sorted probabilities (`universal_logit`). `coverage` is the share of
predicted tokens that got an answer.

`spans` merges the probabilities of a group of tokens, as TRL's GOLD does, for losses of sorted probabilities:

    observed   the distribution of the group's first token, times the probabilities of its later tokens
    bayesian   the distribution of its last token, times the probabilities of its earlier tokens

Without it (the default) both are distributions of one token after the same text, and so they are under `observed`, up
to the factors. Under `bayesian` the two models have read parts of the group of different lengths. TRL takes the logits
of `observed` from one position later than the token they should predict; here both predict it.

Each sequence is a text of its own: rows are cut by the attention mask, and packed ones where position ids begin again.
Chat templates are not rendered again: a student's markers become the teacher's where it has the same special tokens,
or else letters (`hf_xent.models.translation`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..losses.other_vocabulary import OTHERS, OtherVocabulary, Spans
from ..models.alignment import groups
from ..models.padding import padded
from ..models.translation import Translated, Translation
from ..models.vocabularies import same_vocabulary, shared_tokens
from ..ops import Head
from .base import Teacher

SPANS = ("observed", "bayesian")
"""How the probabilities of a group's tokens are merged."""
IGNORED = -100


@dataclass
class Pairs:
    """Positions of the student's batch and of the teacher's, flattened: `student[i]` has its answer in `teacher[i]`.

    The other lists are those of `Spans`, with positions of the teacher's in place of its hidden states.
    """

    student: list[int] = field(default_factory=list)
    teacher: list[int] = field(default_factory=list)
    student_others: list[tuple[int, int, int]] = field(default_factory=list)  # (position, token, owner)
    teacher_others: list[tuple[int, int, int]] = field(default_factory=list)


class OtherVocabularyTeacher:
    """A teacher of hidden states that is asked in its own tokens; see the module's docstring.

    Attributes:
        counts: Over all batches: `positions`, tokens to predict (those with a label, if there are labels), and how many
            of them are `covered`; `sequences`, and how many of them are `untold`, without an exact translation.

    Args:
        teacher: A teacher that answers with (hidden states, head), such as a local model.
        tokenizer: The teacher's tokenizer.
        student_tokenizer: The student's.
        spans: None, or a name of `SPANS`, for the losses of sorted probabilities.
        others: What becomes of tokens that are not shared, 'class' or 'ignore'.

    Raises:
        ValueError: An option has another value, a tokenizer does not spell the text, or no token is shared.
    """

    def __init__(
        self,
        teacher: Teacher,
        tokenizer: Any,
        student_tokenizer: Any,
        *,
        spans: str | None = None,
        others: str = "class",
    ):
        if spans is not None and spans not in SPANS:
            raise ValueError(f"spans is {spans!r}: choose {' or '.join(map(repr, SPANS))}, or None")
        if others not in OTHERS:
            raise ValueError(f"others is {others!r}: choose {' or '.join(map(repr, OTHERS))}")
        self.teacher, self.spans, self.others = teacher, spans, others
        self.student_ids, self.teacher_ids = shared_tokens(student_tokenizer, tokenizer)
        self.translation = Translation(student_tokenizer, tokenizer)
        self.counts = dict.fromkeys(("positions", "covered", "sequences", "untold"), 0)

    @property
    def name(self) -> str:
        """The name of the teacher that is asked."""
        return getattr(self.teacher, "name", type(self.teacher).__name__)

    @property
    def coverage(self) -> float:
        """The share of predicted tokens, of all batches so far, about which the teacher had something to say."""
        return self.counts["covered"] / max(1, self.counts["positions"])

    def targets(self, batch: Mapping[str, Any]) -> OtherVocabulary:
        """The teacher's hidden states where student and teacher have read the same text, and the shared tokens.

        Args:
            batch: The student's inputs; `input_ids`, `attention_mask`, `position_ids` and `labels` are read.
        """
        ids: Tensor = batch["input_ids"]
        found = sequences(batch)
        rows = ids.flatten().tolist()
        told = self.translation([[rows[k] for k in positions] for positions in found])
        asked = [translated.teacher_ids for translated in told if translated is not None]
        teacher_ids, attention_mask = padded(asked or [[0]], device=ids.device)
        hidden, head = self.teacher.targets({"input_ids": teacher_ids, "attention_mask": attention_mask})
        pairs, row = Pairs(), 0
        for positions, translated in zip(found, told, strict=True):
            if translated is not None:
                first = row * teacher_ids.shape[1]
                self._align(pairs, [(k, rows[k]) for k in positions], translated, first)
                row += 1
        self._count(batch, found, told, pairs)
        return self._target(pairs, hidden, head, ids)

    def _align(self, pairs: Pairs, student: Sequence[tuple[int, int]], translated: Translated, first: int) -> None:
        """Adds the pairs of one sequence: the student's (position, token), and its translation at row `first`."""
        teacher = list(enumerate(translated.teacher_ids, first))
        for ours, theirs in groups(translated.student_lengths, translated.teacher_lengths):
            if not (ours[0] and theirs[0]):  # nothing predicts the first token of a sequence
                continue
            at = -1 if self.spans == "bayesian" else 0
            owner = student[ours[at] - 1][0]
            pairs.student.append(owner)
            pairs.teacher.append(teacher[theirs[at] - 1][0])
            for which, group, tokens in (
                (pairs.student_others, ours, student),
                (pairs.teacher_others, theirs, teacher),
            ):
                others = group[:-1] if at else group[1:]
                which += [(tokens[k - 1][0], tokens[k][1], owner) for k in others]

    def _target(self, pairs: Pairs, hidden: Tensor, head: Head, ids: Tensor) -> OtherVocabulary:
        """The pairs in the layout of the student's ids."""
        flat, device = hidden.flatten(0, 1), hidden.device
        student, teacher = (torch.tensor(x, dtype=torch.long, device=device) for x in (pairs.student, pairs.teacher))
        answers = flat.new_zeros(ids.numel(), flat.shape[-1]).index_copy(0, student, flat.index_select(0, teacher))
        mask = torch.zeros(ids.numel(), dtype=torch.bool, device=device).index_fill(0, student, True)
        spans = self._spans(pairs, flat) if self.spans is not None else None
        kept = self.teacher_ids < head.vocabulary  # a tokenizer may have tokens that no head knows
        ours, theirs = (x[kept].to(device) for x in (self.student_ids, self.teacher_ids))
        answers, mask = answers.reshape(*ids.shape, -1), mask.reshape(ids.shape)
        return OtherVocabulary(answers, head, ours, theirs, mask, self.others, spans)

    @staticmethod
    def _spans(pairs: Pairs, flat: Tensor) -> Spans:
        """The other tokens of all groups, with the teacher's hidden states [B2 * T2, D2] that predict its own."""
        row, token, owner = _columns(pairs.student_others, flat.device)
        at, teacher_token, teacher_owner = _columns(pairs.teacher_others, flat.device)
        return Spans(row, token, owner, flat.index_select(0, at), teacher_token, teacher_owner)

    def _count(
        self, batch: Mapping[str, Any], found: list[list[int]], told: list[Translated | None], pairs: Pairs
    ) -> None:
        labels = batch.get("labels")
        flat = None if labels is None else labels.flatten().tolist()
        predicting = {
            before
            for positions in found
            for before, after in pairwise(positions)
            if flat is None or flat[after] != IGNORED
        }
        self.counts["positions"] += len(predicting)
        self.counts["covered"] += len(predicting.intersection(pairs.student))
        self.counts["sequences"] += len(found)
        self.counts["untold"] += sum(translated is None for translated in told)


def _columns(rows: list[tuple[int, int, int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors [K] of a list of K triples."""
    one, two, three = torch.tensor(rows, dtype=torch.long, device=device).reshape(-1, 3).unbind(1)
    return one, two, three


class PaddedTeacher:
    """A teacher with the student's tokens, whose head may have another number of rows: Qwen's have 151936 or 152064.

    Args:
        teacher: A teacher that answers with (hidden states, head).
    """

    def __init__(self, teacher: Teacher):
        self.teacher = teacher

    @property
    def name(self) -> str:
        """The name of the teacher that is asked."""
        return getattr(self.teacher, "name", type(self.teacher).__name__)

    def targets(self, batch: Mapping[str, Any]) -> OtherVocabulary:
        """The teacher's answer, over the rows that both heads have."""
        hidden, head = self.teacher.targets(batch)
        return OtherVocabulary(hidden, head, others="ignore")


def for_student(
    teacher: Teacher, tokenizer: Any, student_tokenizer: Any, **options: Any
) -> OtherVocabularyTeacher | PaddedTeacher:
    """A teacher for a student whose tokenizer, or whose head, may be another one.

    Args:
        teacher: A teacher that answers with (hidden states, head).
        tokenizer: Its tokenizer.
        student_tokenizer: The student's.
        **options: Those of `OtherVocabularyTeacher`.

    Returns:
        A teacher over the common rows of the heads if the tokenizers have the same tokens, else one that reads text.

    Raises:
        ValueError: As `OtherVocabularyTeacher`; or an option has no effect, since the tokenizers are alike.
    """
    if not same_vocabulary(student_tokenizer, tokenizer):
        return OtherVocabularyTeacher(teacher, tokenizer, student_tokenizer, **options)
    padded = PaddedTeacher(teacher)
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} is {value!r}, but {padded.name} has the student's vocabulary: leave it out")
    return padded


def sequences(batch: Mapping[str, Any]) -> list[list[int]]:
    """The positions of each sequence of a batch, in the flattened ids [B * T].

    Args:
        batch: `input_ids` [B, T], with `attention_mask` [B, T], 0 for padding, and `position_ids` [B, T], which begin
            again with every sequence of a packed row; without both, each row is a sequence.
    """
    rows, length = batch["input_ids"].shape
    mask, steps = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None and mask.ndim != 2:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}: pass one [B, T] of 0 and 1")
    kept = [[1] * length] * rows if mask is None else mask.tolist()
    counted = None if steps is None else steps.expand(rows, length).tolist()
    found: list[list[int]] = []
    for row in range(rows):
        last = None
        for t in range(length):
            if not kept[row][t]:
                continue
            if last is None or (counted is not None and counted[row][t] != counted[row][last] + 1):
                found.append([])
            found[-1].append(row * length + t)
            last = t
    return found
