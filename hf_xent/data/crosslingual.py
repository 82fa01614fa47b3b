"""Cross-lingual questions (G-XLT): the question of one language over the context of another, drawn anew every epoch.

The same rows are given in several languages, SQuAD's schema in each, as XQuAD and MLQA have them. Each epoch draws for
every row an ordered pair (language of the question, language of the context), all of them equally likely; by default
the two languages differ. The answer is that of the context's language. A draw is a function of seed, epoch and row.

Source: Lewis et al. 2020, arXiv:1910.07475 (the task); Carrino et al. 2023, arXiv:2309.17134 (the sampling; their
script makes all pairs of a few languages drawn for every row, once before the training).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import torch

from ..options.ranges import check_count
from .questions import COLUMNS, windows_of


class CrossLingual(torch.utils.data.Dataset):
    """A data set of windows to train on, one for each aligned row; see the module's docstring.

    Args:
        languages: Language -> its rows, data sets with the columns of `hf_xent.data.questions.COLUMNS` and the same
            `id` in the same order. `by_language` makes it of one data set with columns such as `question_fr`.
        tokenizer: A fast tokenizer.
        max_length: The most tokens of a window. Of several windows, the first one with the answer is taken.
        stride: How many tokens neighboring windows share.
        seed: Of the draws.
        same_language: Whether a question and its context may also be in the same language.

    Raises:
        ValueError: Fewer than two languages, or rows that are not aligned.
    """

    def __init__(
        self,
        languages: Mapping[str, Any],
        tokenizer: Any,
        *,
        max_length: int = 384,
        stride: int = 128,
        seed: int = 0,
        same_language: bool = False,
    ):
        check_count("seed", seed, 0)
        _check_aligned(languages)
        self.languages, self.tokenizer = dict(languages), tokenizer
        self.max_length, self.stride, self.seed = max_length, stride, seed
        self.pairs = language_pairs(languages, same_language=same_language)
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()  # seen by workers that were started before

    def __len__(self) -> int:
        """The number of aligned rows."""
        return len(next(iter(self.languages.values())))

    def set_epoch(self, epoch: int) -> None:
        """Draws other pairs; hf_xent's trainers call this when an epoch begins."""
        self._epoch.fill_(epoch)

    def pair(self, index: int) -> tuple[str, str]:
        """The languages of a row's question and context in this epoch."""
        draw = np.random.default_rng([self.seed, int(self._epoch), index])
        return self.pairs[int(draw.integers(len(self.pairs)))]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The window of a row in this epoch: the model's inputs, and the first and last token of the answer."""
        row = mixed(self.languages, index, *self.pair(index))
        windows = windows_of(row, self.tokenizer, self.max_length, self.stride)
        answered = [w for w in windows if w["offsets"][w["start_positions"]] != [0, 0]]
        return {name: x for name, x in (answered or windows)[0].items() if name not in ("id", "offsets")}


def language_pairs(languages: Mapping[str, Any], *, same_language: bool = False) -> list[tuple[str, str]]:
    """All pairs (language of the question, language of the context), by default of two languages that differ."""
    return [(asked, read) for asked, read in product(languages, languages) if same_language or asked != read]


def mixed(languages: Mapping[str, Any], index: int, question: str, context: str) -> dict[str, Any]:
    """A row with the question of one language, and the context and answers of another.

    Args:
        languages: Language -> its aligned rows.
        index: The number of the row.
        question: The language of the question.
        context: The language of the context.

    Returns:
        The row; its `id` is that of the aligned rows, followed by the two languages.
    """
    asked, read = languages[question][index], languages[context][index]
    row = {"id": f"{read['id']}_{question}-{context}", "question": asked["question"]}
    return row | {name: read[name] for name in ("context", "answers")}


def all_pairs(languages: Mapping[str, Any], *, same_language: bool = False) -> Any:
    """Every row in every pair of languages, as evaluations need them.

    Args:
        languages: Language -> its aligned rows.
        same_language: Whether a question and its context may also be in the same language.

    Returns:
        A `datasets.Dataset` with the columns of `hf_xent.data.questions.COLUMNS`.

    Raises:
        ValueError: Fewer than two languages, or rows that are not aligned.
    """
    from datasets import Dataset  # lazy: half a second

    _check_aligned(languages)
    count = len(next(iter(languages.values())))
    pairs = language_pairs(languages, same_language=same_language)
    return Dataset.from_list([mixed(languages, i, *pair) for pair in pairs for i in range(count)])


def by_language(rows: Any, languages: list[str]) -> dict[str, Any]:
    """Splits one data set whose columns have the language at their end, such as `question_fr`, into one for each.

    Args:
        rows: A `datasets.Dataset` with `id` and, for every language, `question_LANGUAGE`, `context_LANGUAGE` and
            `answers_LANGUAGE`.
        languages: The languages.

    Returns:
        Language -> a data set with the columns of `hf_xent.data.questions.COLUMNS`.

    Raises:
        ValueError: A language has no such column.
    """
    found = {}
    for language in languages:
        names = {f"{name}_{language}": name for name in COLUMNS[1:]}
        if missing := [name for name in names if name not in rows.column_names]:
            raise ValueError(f"rows have no column {', '.join(missing)}, but {', '.join(rows.column_names)}")
        found[language] = rows.select_columns(["id", *names]).rename_columns(names)
    return found


def _check_aligned(languages: Mapping[str, Any]) -> None:
    if len(languages) < 2:
        raise ValueError(f"languages has {', '.join(languages) or 'none'}: give the same rows in two or more")
    (first, rows), *others = languages.items()
    for name, other in others:
        if list(rows["id"]) != list(other["id"]):
            raise ValueError(f"rows of {name} are not those of {first}: give the same id in the same order")
