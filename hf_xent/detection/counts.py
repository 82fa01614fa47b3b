"""How often each token occurs in a corpus, for DC-PDD: counted in a stream, smoothed, and kept in the cache.

    q(v) = (count(v) + 1) / (N' + V)         N' = sum of counts, V the model's vocabulary

All occurrences in a document count, of the tokens of the text alone (no BOS or EOS). Counts are cached by tokenizer,
corpus, revision, split, column and limits, so that they are counted again if any of these changes. Never count on the
texts that are scored: that leaks their words into the score.

Source: Zhang et al. 2024, DC-PDD, arXiv:2409.14781, which counts 15 files of C4, documents cut at 1,024 tokens.
Data: a column of text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ..data import DATASETS
from ..data.files import BUILDERS, expanded_path, first_line, suffix_of
from ..data.text import Opened, opened
from ..models.cache import cache_folder
from ..models.fingerprints import fingerprint_tokenizer
from ..options.ranges import check_count
from ..system import renamed
from ..system.files import write_atomically
from ..system.progress import tracked

BATCH = 256  # the number of documents that are tokenized at a time


@dataclass(frozen=True)
class CountedText:
    """The texts on which tokens are counted.

    Args:
        source: A name in `hf_xent.data.DATASETS`, a local file or folder, or a Hub id, which is streamed.
        split: As for `datasets`; None for 'train'.
        column: The column that holds the text.
        revision: A commit of a Hub id; without it, counts of the main branch are kept even if the branch changes.
        documents: The number of rows that are counted, from the first; None for all.
        max_tokens: The number of tokens of a row that are counted.

    Raises:
        ValueError: For `documents` or `max_tokens` that is below 1, or not a whole number.
    """

    source: str = "pydoc"
    split: str | None = None
    column: str = "text"
    revision: str | None = None
    documents: int | None = None
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        for name, least in (("documents", 1), ("max_tokens", 1)):
            if (value := getattr(self, name)) is not None:
                check_count(name, value, least)

    def open(self) -> Opened:
        """The rows, which are read when they are counted, and an identifier of their content (a Hub id's revision)."""
        path = expanded_path(self.source)
        if self.source.partition(":")[0] in DATASETS or os.path.exists(path) or suffix_of(path) in BUILDERS:
            return opened(self.source, self.split, self.column)
        return Opened(self.revision or "main", self._streamed)

    def _streamed(self) -> Iterable[dict[str, Any]]:
        from datasets import load_dataset  # lazy: half a second

        name, _, config = self.source.partition(":")
        try:
            return load_dataset(
                name, config or None, split=self.split or "train", revision=self.revision, streaming=True
            )
        except (OSError, ValueError) as error:  # every error of the Hub and of `datasets` is one of these
            raise ValueError(f"corpus is {self.source!r}, which does not load: {first_line(error)}") from error

    def texts(self, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
        """The texts that are counted. Raises: ValueError for rows without the column, or with something else in it."""
        for row in islice(rows, self.documents):
            if self.column not in row:
                raise ValueError(f"{self.source} has no column {self.column!r}: choose one of {', '.join(row)}")
            text = row[self.column]
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"{self.source} holds {type(text).__name__}, not text, in its column {self.column!r}: choose"
                    " another"
                )
            yield text or ""


def frequencies(
    tokenizer: Any, corpus: CountedText | str = "pydoc", *, vocabulary: int, progress: bool = True
) -> Tensor:
    """Smoothed frequencies of tokens in a corpus, counted once and then read from the cache.

        q(v) = (count(v) + 1) / (N' + V)

    Args:
        tokenizer: The model's tokenizer.
        corpus: The texts to count, or their `source`.
        vocabulary: The model's number of logits, which can exceed the size of the tokenizer's vocabulary.
        progress: Whether a progress bar is shown.

    Returns:
        q, float64 [V], which sums to 1.

    Raises:
        ValueError: For a corpus that does not open, or a tokenizer with ids outside of the vocabulary.
    """
    corpus = CountedText(corpus) if isinstance(corpus, str) else corpus
    content, rows = corpus.open()
    identity = {"content": content, "tokenizer": fingerprint_tokenizer(tokenizer), "vocabulary": vocabulary}
    about = {**asdict(corpus), **identity}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_folder() / "frequencies" / key

    def write(draft: Path) -> None:
        bar = {"total": corpus.documents, "console": Console(stderr=True), "disable": not progress}
        with tracked(corpus.texts(rows()), f"counting tokens of {corpus.source}", **bar) as documents:
            np.save(draft / "counts.npy", count(documents, tokenizer, vocabulary, corpus.max_tokens))
        (draft / "about.json").write_text(json.dumps(about, indent=1))

    if not folder.is_dir():
        write_atomically(folder, write)
    return smoothed(np.load(folder / "counts.npy"))


def count(texts: Iterable[str], tokenizer: Any, vocabulary: int, max_tokens: int = 1024) -> np.ndarray:
    """Occurrences of every token id [V] in texts, each cut at `max_tokens`; it keeps one batch of texts at a time."""
    total = np.zeros(vocabulary, dtype=np.int64)
    for ids in _tokenized(texts, tokenizer, max_tokens):
        counts = np.bincount(ids, minlength=vocabulary)
        if len(counts) > vocabulary:
            raise ValueError(
                f"vocabulary is {vocabulary} but the tokenizer returned id {len(counts) - 1}: pass the model's"
            )
        total += counts
    return total


def smoothed(counts: np.ndarray) -> Tensor:
    """Laplace's (count + 1) / (N' + V), float64 [V]."""
    return torch.from_numpy((counts + 1.0) / (counts.sum() + len(counts)))


def _tokenized(texts: Iterable[str], tokenizer: Any, max_tokens: int) -> Iterator[np.ndarray]:
    stream = iter(texts)
    while batch := list(islice(stream, BATCH)):
        rows = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        yield np.concatenate([np.asarray(row[:max_tokens], dtype=np.int64) for row in rows])


def __getattr__(name: str) -> Any:
    return renamed.attribute(__name__, name)
