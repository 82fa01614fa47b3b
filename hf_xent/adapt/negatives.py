"""Negative labels: words that are far from every class, which inputs of no class are compared with.

    closeness(w) = the int(q C)-th of the sorted cosines of w to the names of the C classes, q = .95
    negatives    = the words of least closeness, nouns and adjectives in proportion

    words = hf_xent.data.load("wordnet:FOLDER", split="train")
    found = NegativeLabels(words, count=1000, limit=10_000).mine(clip, tokenizer, names)        # names, features [M, D]

With fewer than 20 classes the index is that of the largest cosine. Words that equal the name of a class, in any case,
and words that stand twice, are left out; of a word that is both noun and adjective the first is kept.

Source: Jiang et al. 2024, NegLabel, arXiv:2403.20078, as Zhang et al. (LAPT) use it. There a name is compared as it is
written, so that 'Jay' stays beside the class 'jay'; here it is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ..models.embeddings import class_texts
from ..models.fingerprints import fingerprint_model, fingerprint_tokenizer
from ..options.ranges import check_count, check_number
from ..system.files import replace_atomically
from ..system.progress import tracked

TEMPLATES = {"noun": ("The nice {}.",), "adjective": ("This is a {} photo.",)}
"""Kind of words -> the texts that they are embedded in, of the published code; names of classes are nouns."""
CHUNK = 1024
"""Words whose features are kept in one file."""


@dataclass(frozen=True)
class Negatives:
    """The words that were found, the least close first within each kind."""

    names: list[str]
    kinds: list[str]
    features: Tensor
    """[M, D], of unit length."""
    closeness: Tensor
    """[M], cosines."""

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class NegativeLabels:
    """A search for negative labels among words; see the module's docstring."""

    words: Iterable[str | Mapping[str, Any]]
    """Words, as text (nouns) or as rows with `word` and `kind`, such as those of the data set 'wordnet'; every search
    reads them again."""
    count: int = 1000
    """How many are kept."""
    limit: int | None = None
    """How many words are looked at, drawn at random; all of them if it is left out."""
    quantile: float = 0.95
    """q, in [0, 1)."""
    templates: Mapping[str, Sequence[str]] = field(default_factory=lambda: dict(TEMPLATES))
    """Kind -> texts with {} for a word; names of classes have those of the first kind."""
    seed: int = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        check_count("count", self.count, 1)
        check_number(self, "quantile", "[0, 1)")
        if self.limit is not None:
            check_count("limit", self.limit, self.count)

    def candidates(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """The words that are looked at, as (word, kind), without the names of the classes and without repeated ones.

        Raises:
            ValueError: A kind without templates, or fewer words than are to be kept.
        """
        seen, found = {_plain(name) for name in names}, []
        for row in self.words:
            word, kind = (row, "noun") if isinstance(row, str) else (row["word"], row["kind"])
            if kind not in self.templates:
                raise ValueError(f"words have the kind {kind!r}: give templates for it beside {list(self.templates)}")
            if (plain := _plain(word)) and plain not in seen:
                seen.add(plain)
                found.append((word.strip(), kind))
        if len(found) < self.count:
            raise ValueError(f"count is {self.count}, but there are {len(found)} words: choose at most as many")
        if self.limit is None or self.limit >= len(found):
            return found
        drawn = np.random.default_rng(self.seed).choice(len(found), self.limit, replace=False)
        return [found[i] for i in sorted(drawn)]

    def mine(
        self, model: Any, tokenizer: Any, names: Sequence[str], *, folder: Path | None = None, batch_size: int = 64
    ) -> Negatives:
        """Look for negative labels of classes.

        Args:
            model: A two-tower model, or an encoder of texts.
            tokenizer: Its tokenizer.
            names: The names of the C classes.
            folder: Where features of words are kept, so that a stopped search resumes, and another one reuses them.
            batch_size: Texts in a forward pass.

        Returns:
            The negatives with their features.

        Raises:
            ValueError: As `candidates` does.
        """
        words = self.candidates(names)
        classes = class_texts(model, tokenizer, names, next(iter(self.templates.values())), batch_size=batch_size)
        store = None if folder is None else _Store(Path(folder), model, tokenizer)
        parts, kept = [], self._shares(words)
        for kind, count in kept.items():
            those = [word for word, of in words if of == kind]
            templates = tuple(self.templates[kind])
            found = _embedded_words(model, tokenizer, those, templates, (store, batch_size))
            near = closeness(found, classes, self.quantile)
            least = near.argsort(stable=True)[:count]
            parts.append(([those[i] for i in least.tolist()], kind, found[least], near[least]))
        return Negatives(
            [name for names, *_ in parts for name in names],
            [kind for names, kind, *_ in parts for _ in names],
            torch.cat([found for *_, found, _ in parts]),
            torch.cat([near for *_, near in parts]),
        )

    def _shares(self, words: list[tuple[str, str]]) -> dict[str, int]:
        """Kind -> how many of it are kept: in proportion, by the largest remainders."""
        kinds = [kind for kind in self.templates if any(of == kind for _, of in words)]
        exact = {kind: self.count * sum(of == kind for _, of in words) / len(words) for kind in kinds}
        shares = {kind: int(value) for kind, value in exact.items()}
        for kind in sorted(kinds, key=lambda kind: shares[kind] - exact[kind])[: self.count - sum(shares.values())]:
            shares[kind] += 1
        return {kind: share for kind, share in shares.items() if share}


def closeness(features: Tensor, classes: Tensor, quantile: float = 0.95) -> Tensor:
    """How close words are to classes: the cosine at the index int(quantile C) of the sorted ones.

    Args:
        features: Those of the words [W, D], of unit length.
        classes: Those of the names of the classes [C, D], of unit length.
        quantile: In [0, 1).

    Returns:
        [W].
    """
    return (features @ classes.T).sort(-1).values[:, int(quantile * len(classes))]


def _plain(word: str) -> str:
    return " ".join(word.casefold().replace("_", " ").split())


class _Store:
    """A folder of features of words, by what they depend on."""

    def __init__(self, folder: Path, model: Any, tokenizer: Any):
        self.folder, self.of = folder, f"{fingerprint_model(model)} {fingerprint_tokenizer(tokenizer)}"

    def file(self, words: Sequence[str], templates: Sequence[str]) -> Path:
        digest = hashlib.sha256(json.dumps([self.of, list(words), list(templates)]).encode()).hexdigest()
        return self.folder / f"words-{digest[:24]}.pt"


def _embedded_words(
    model: Any, tokenizer: Any, words: list[str], templates: tuple[str, ...], how: tuple[_Store | None, int]
) -> Tensor:
    """The features of words [W, D], chunk by chunk; those that are stored are read."""
    store, batch_size = how
    parts = []
    chunks = [words[start : start + CHUNK] for start in range(0, len(words), CHUNK)]
    with _bar(chunks) as bar:
        for chunk in bar:
            file = None if store is None else store.file(chunk, templates)
            if file is not None and file.exists():
                parts.append(torch.load(file, map_location=next(model.parameters()).device))
                continue
            parts.append(class_texts(model, tokenizer, chunk, templates, batch_size=batch_size))
            if file is not None:
                replace_atomically(file, partial(torch.save, parts[-1].cpu()))
    return torch.cat(parts)


@contextmanager
def _bar(chunks: list[list[str]]) -> Iterator[Iterable[list[str]]]:
    """A progress bar, if there is more than one chunk."""
    with tracked(chunks, "embedding words", console=Console(stderr=True), disable=len(chunks) < 2) as bar:
        yield bar
