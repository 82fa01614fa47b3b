"""Extractive question answering: rows of SQuAD's schema as windows of tokens, and the logits of windows as answers.

    rows        id, question, context, answers: {"text": [...], "answer_start": [...]}, both lists empty: no answer
    windows     a context that is too long is cut into windows of at most `max_length` tokens with the question, which
                share `stride` tokens; each is a row of the model's inputs with
                    start_positions, end_positions    the first answer's first and last token; those of the token CLS
                                                      in a window that does not have the whole answer
                    id, offsets                       whose window it is; the characters [start, end) of every token
                                                      of the context, [0, 0] for the others
    answers     of all spans of a row's windows those with the largest start_logit + end_logit, at most
                `max_answer_tokens` long; the empty answer is CLS in every window, at the least of its scores

Unlike SQuAD's script, which pairs the best 20 starts with the best 20 ends, every span is a candidate.

Source: Rajpurkar et al. 2016, arXiv:1606.05250; windows and the score of no answer as in Devlin et al. 2019,
arXiv:1810.04805.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..options.ranges import check_count

COLUMNS = ("id", "question", "context", "answers")


class Answer(NamedTuple):
    """A candidate: its text, which is empty for no answer, its first character, and the sum of its two logits."""

    text: str
    start: int
    score: float


def windows(rows: Any, tokenizer: Any, max_length: int = 384, stride: int = 128) -> Any:
    """Builds the windows of questions and contexts.

    Args:
        rows: A `datasets.Dataset` with the columns of `COLUMNS`.
        tokenizer: A fast tokenizer.
        max_length: The most tokens of a window, with the question and special tokens.
        stride: How many tokens of the context two neighboring windows share.

    Returns:
        A `datasets.Dataset` of windows in the order of the rows, not padded; the module's docstring has its columns.

    Raises:
        ValueError: A slow tokenizer, a missing column, an answer that is not where `answer_start` says, or a question
            that leaves no room for a context.
    """
    _check(tokenizer, max_length, stride)
    if missing := [name for name in COLUMNS if name not in rows.column_names]:
        raise ValueError(f"rows have no column {', '.join(missing)}, but {', '.join(rows.column_names)}: rename them")

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        parts = (dict(zip(COLUMNS, part, strict=True)) for part in zip(*(batch[name] for name in COLUMNS), strict=True))
        found = [window for part in parts for window in windows_of(part, tokenizer, max_length, stride)]
        return {name: [window[name] for window in found] for name in found[0]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names, desc="windows")


def windows_of(
    row: Mapping[str, Any], tokenizer: Any, max_length: int = 384, stride: int = 128
) -> list[dict[str, Any]]:
    """The windows of one row, a mapping with the columns of `COLUMNS`; see `windows`.

    Raises:
        ValueError: An answer that is not where it should be, or a question that leaves no room for a context.
    """
    row_id, question, context, answers = (row[name] for name in COLUMNS)
    span = _span(row_id, context, answers)
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    room -= len(tokenizer(question, add_special_tokens=False)["input_ids"])
    if room <= stride:
        raise ValueError(
            f"row {row_id!r}: its question leaves {room} of max_length {max_length} tokens to the context, but windows"
            f" share stride {stride}: raise max_length, or choose a smaller stride"
        )
    is_second = tokenizer.padding_side == "right"  # as these models were trained: padding is next to the context
    encoded = tokenizer(
        *((question, context) if is_second else (context, question)),
        truncation="only_second" if is_second else "only_first",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    inputs = [name for name in tokenizer.model_input_names if name in encoded]
    found = []
    for i, ids in enumerate(encoded["input_ids"]):
        parts = encoded.sequence_ids(i)
        offsets = [
            list(pair) if part == int(is_second) else [0, 0]
            for pair, part in zip(encoded["offset_mapping"][i], parts, strict=True)
        ]
        start, end = _tokens(offsets, span) or (cls_position(ids, tokenizer),) * 2
        window = {name: encoded[name][i] for name in inputs}
        found.append(window | {"start_positions": start, "end_positions": end, "id": row_id, "offsets": offsets})
    return found


def cls_position(ids: Sequence[int], tokenizer: Any) -> int:
    """Where a window points to if it has no answer: its token CLS, or BOS, or else its first token."""
    known = (tokenizer.cls_token_id, tokenizer.bos_token_id)
    return next((list(ids).index(token) for token in known if token is not None and token in ids), 0)


def answers_of(
    rows: Any,
    features: Any,
    logits: tuple[ArrayLike, ArrayLike],  # start and end, [N, T] each
    *,
    n_best: int = 1,
    max_answer_tokens: int = 30,
    no_answer: bool = False,
) -> dict[str, list[Answer]]:
    """Turns the logits of windows into the answers of their rows.

    Args:
        rows: The rows of the windows: `id` and `context`.
        features: The windows, as `windows` returns them, in the order of the logits.
        logits: The logits of the start and of the end, [N, T] each; what is beyond a window's length is not read.
        n_best: How many answers of a row are returned, the best one first; there may be fewer.
        max_answer_tokens: The most tokens of an answer.
        no_answer: Whether the empty answer is a candidate, as in SQuAD 2. It is taken for CLS at the first token.

    Returns:
        Row id -> its answers, each place of the context once. A row without a token of a context has the empty answer.

    Raises:
        ValueError: Logits of another number of windows, or options out of their range.
    """
    check_count("n_best", n_best, 1)
    check_count("max_answer_tokens", max_answer_tokens, 1)
    starts, ends = (np.asarray(part, dtype=np.float64) for part in logits)
    if not len(starts) == len(ends) == len(features):
        raise ValueError(f"logits are of {len(starts)} and {len(ends)} windows, but features has {len(features)}")
    contexts = dict(zip(rows["id"], rows["context"], strict=True))
    found: dict[str, list[Answer]] = {row_id: [] for row_id in contexts}
    empty: dict[str, float] = defaultdict(lambda: float("inf"))
    ids, offsets = features["id"], features["offsets"]
    for row_id, pairs, start, end in zip(ids, offsets, starts, ends, strict=True):
        spans = _best(np.asarray(pairs), start, end, n_best, max_answer_tokens)
        found[row_id] += [_answer(contexts[row_id], *span) for span in spans]
        empty[row_id] = min(empty[row_id], float(start[0] + end[0]))
    if no_answer:
        for row_id, score in empty.items():
            found[row_id].append(Answer("", 0, score))
    return {row_id: _ordered(answers)[:n_best] or [Answer("", 0, 0.0)] for row_id, answers in found.items()}


def _answer(context: str, first: int, last: int, score: float) -> Answer:
    """The answer at some characters, without the space around it that some tokenizers give to a word."""
    text = context[first:last]
    return Answer(text.strip(), first + len(text) - len(text.lstrip()), score)


def _ordered(answers: Iterable[Answer]) -> list[Answer]:
    """The best one first, each place once: neighboring windows share spans."""
    best: dict[tuple[str, int], Answer] = {}
    for answer in sorted(answers, key=lambda answer: -answer.score):
        best.setdefault((answer.text, answer.start), answer)
    return list(best.values())


def _best(
    offsets: NDArray[np.int64],  # [T', 2], not padded
    start: NDArray[np.float64],  # [T]
    end: NDArray[np.float64],  # [T]
    count: int,
    max_tokens: int,
) -> list[tuple[int, int, float]]:
    """The best spans of a window: their characters [first, last) and scores."""
    tokens = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
    first, last = np.triu_indices(len(tokens))
    first, last = first[last - first < max_tokens], last[last - first < max_tokens]
    scores = start[tokens[first]] + end[tokens[last]]
    best = np.argpartition(-scores, count - 1)[:count] if count < len(scores) else np.arange(len(scores))
    best = best[np.argsort(-scores[best], kind="stable")]
    return [(int(offsets[tokens[first[i]], 0]), int(offsets[tokens[last[i]], 1]), float(scores[i])) for i in best]


def _span(row_id: str, context: str, answers: Mapping[str, Sequence[Any]]) -> tuple[int, int] | None:
    """The characters [start, end) of the first answer; None if there is none."""
    if not answers["answer_start"]:
        return None
    start, text = answers["answer_start"][0], answers["text"][0]
    if not text or context[start : start + len(text)] != text:
        found = context[start : start + len(text)]
        raise ValueError(
            f"row {row_id!r}: its answer is {text!r}, but its context has {found!r} at answer_start {start}: fix it"
        )
    return start, start + len(text)


def _tokens(offsets: Sequence[Sequence[int]], span: tuple[int, int] | None) -> tuple[int, int] | None:
    """The first and the last token of a span of characters; None if a window does not have all of it."""
    if span is None:
        return None
    inside = [i for i, (first, last) in enumerate(offsets) if first < last]
    if not inside or offsets[inside[0]][0] > span[0] or offsets[inside[-1]][1] < span[1]:
        return None
    touched = [i for i in inside if offsets[i][0] < span[1] and offsets[i][1] > span[0]]
    return (touched[0], touched[-1]) if touched else None


def _check(tokenizer: Any, max_length: int, stride: int) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer is a {type(tokenizer).__name__}, which has no offsets: pass a fast tokenizer")
    check_count("max_length", max_length, 4)
    check_count("stride", stride, 0)
