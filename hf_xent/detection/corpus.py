"""How often each token occurs in a corpus, for DC-PDD: counted as a stream, smoothed, kept in the cache.

    q(v) = (count(v) + 1) / (N' + V)         N' = sum of counts, V the model's vocabulary

Every occurrence counts (not every document), of the tokens of the text alone (no BOS or EOS). Counts are cached by
tokenizer, corpus, revision, split, column and limits, so that a change of any of them counts anew. Never count on the
texts that are judged: that leaks their words into the score.

Source: Zhang et al. 2024, DC-PDD, arXiv:2409.14781, which counts 15 files of C4, documents cut at 1,024 tokens.
Data: a column of text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from .. import data, embedded

BATCH = 256  # documents tokenized at a time


@dataclass(frozen=True)
class Corpus:
    """Where tokens are counted: a name of `hf_xent.data`, a local file or folder, or a Hub id, which is streamed.

    `revision` is a Hub id's commit; without one, counts of whatever its main branch was are kept.
    """

    source: str = "pydoc"
    split: str | None = None
    column: str = "text"
    revision: str | None = None
    documents: int | None = None  # the first so many; None for all
    max_tokens: int = 1024  # of a document

    def open(self) -> tuple[Iterable[dict[str, Any]], str]:
        """Rows, and what tells their content from another: a fingerprint, or a Hub id's revision."""
        if self.source.partition(":")[0] in data.DATASETS or Path(self.source).expanduser().exists():
            rows = data.load_text(self.source, self.split, self.column)
            return rows, rows._fingerprint  # datasets has no public name for it
        from datasets import load_dataset  # lazy: half a second

        name, _, config = self.source.partition(":")
        split = self.split or "train"
        rows = load_dataset(name, config or None, split=split, revision=self.revision, streaming=True)
        return rows, self.revision or "main"


def frequencies(tokenizer: Any, corpus: Corpus | str = "pydoc", *, vocabulary: int, progress: bool = True) -> Tensor:
    """Smoothed frequencies q [V] of tokens in a corpus, float64, summing to 1; counted once, then read from the cache.

    `vocabulary` is the model's number of logits, which can exceed the tokenizer's. Raises: ValueError for a corpus
    that does not open, or a tokenizer with ids outside of the vocabulary.
    """
    corpus = Corpus(corpus) if isinstance(corpus, str) else corpus
    rows, content = corpus.open()
    about = {**asdict(corpus), "content": content, "tokenizer": fingerprint(tokenizer), "vocabulary": vocabulary}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    folder = embedded.cache_folder() / "frequencies" / key

    def write(draft: Path) -> None:
        documents = track(
            (row[corpus.column] or "" for row in islice(rows, corpus.documents)),
            description=f"counting tokens of {corpus.source}",
            total=corpus.documents,
            console=Console(stderr=True),
            disable=not progress,
        )
        np.save(draft / "counts.npy", count(documents, tokenizer, vocabulary, corpus.max_tokens))
        (draft / "about.json").write_text(json.dumps(about, indent=1))

    if not folder.is_dir():
        embedded.publish(folder, write)
    return smoothed(np.load(folder / "counts.npy"))


def count(texts: Iterable[str], tokenizer: Any, vocabulary: int, max_tokens: int = 1024) -> np.ndarray:
    """Occurrences of every token id [V] in texts, each cut at `max_tokens`; a batch of texts is held at a time."""
    total = np.zeros(vocabulary, dtype=np.int64)
    for ids in _tokenized(texts, tokenizer, max_tokens):
        found = np.bincount(ids, minlength=vocabulary)
        if len(found) > vocabulary:
            raise ValueError(f"vocabulary is {vocabulary} but the tokenizer gave id {len(found) - 1}: pass the model's")
        total += found
    return total


def smoothed(counts: np.ndarray) -> Tensor:
    """Laplace's (count + 1) / (N' + V), float64 [V]."""
    return torch.from_numpy((counts + 1.0) / (counts.sum() + len(counts)))


def fingerprint(tokenizer: Any) -> str:
    """Equal for tokenizers that give equal ids; settings of the last call (truncation, padding) do not matter."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state |= {"truncation": None, "padding": None}
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _tokenized(texts: Iterable[str], tokenizer: Any, max_tokens: int) -> Iterator[np.ndarray]:
    stream = iter(texts)
    while batch := list(islice(stream, BATCH)):
        rows = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        yield np.concatenate([np.asarray(row[:max_tokens], dtype=np.int64) for row in rows])
