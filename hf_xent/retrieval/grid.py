"""The losses of every candidate given every source, which retrieval, captioning and translation are judged by.

    S[a, c] = -sum_t log p(c_t | c_<t, a)        nats; a source a is read once, and its candidates share its states
    C[a, c] = S[a, c] / |c|                      nats per token

    grid = scores(model, tokenizer, french, english, template="French: {}\\nEnglish:", target=" {}\\n")
    grid.sums, grid.means                        [A, C] each

The model is patched meanwhile (`hf_xent.patch`): the loss of a token comes from streamed statistics, so neither a
candidate's logits [tokens, V] nor those of a batch exist. Sources are text, or what a processor has made of a recording
or an image; models are decoders, encoders with decoders (translation, speech), or decoders that also read images.

Source: Labbé, Pellegrini & Pinquier 2023, Killing two birds with one stone, arXiv:2308.15090, who rank audio and
captions by a captioner's loss. That a source's states and common beginnings of candidates are shared is ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ..models.contexts import eval_mode
from ..models.fingerprints import fingerprint_model
from ..options.ranges import check_count
from ..patching import patched
from ..system.progress import tracked
from .choice import chosen_way
from .inputs import Candidate, Encoder, Source
from .reading import WAYS, Reader, Unreadable
from .stored import StoredRows, key_of
from .trees import Tokens


@dataclass(frozen=True)
class Grid:
    """Losses of candidates given sources.

    Args:
        sums: The sum over each candidate's tokens [A, C], nats.
        tokens: The number of tokens [C] of each candidate, the same for every source.
    """

    sums: np.ndarray
    tokens: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """Nats per token [A, C]."""
        return self.sums / self.tokens


@dataclass
class GridScorer:
    """Callable: sources and candidates -> their `Grid`; see the module's docstring.

    Args:
        model: A model with a language-modeling head, patched or not; it is not changed.
        processor: Its tokenizer, or its processor, whose attribute `tokenizer` is used.
        template: What a source is written into, in the place of '{}'; sources that are not text have their prompt.
        target: What a candidate is written into, in the place of '{}': with its space before and its end after it.
            A candidate without an end is scored as the beginning of a text.
        batch_tokens: The most tokens of candidates in a forward pass; the source's keys and values are repeated for
            every row of it.
        way: One of `hf_xent.retrieval.WAYS`; None takes the fastest one that agrees with the model's plain forward on
            a few candidates.
        progress: Whether a progress bar is shown, on standard error.

    Raises:
        ValueError: A template without '{}', an unknown way, or batch_tokens below 1.
    """

    model: Any
    processor: Any
    template: str = "{}"
    target: str = "{}"
    batch_tokens: int = 256
    way: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_count("batch_tokens", self.batch_tokens, 1)
        if self.way is not None and self.way not in WAYS:
            raise ValueError(f"way is {self.way!r}: choose one of {', '.join(WAYS)}, or None")
        self.encoder = Encoder(self.model, self.processor, self.template, self.target)

    def __call__(
        self, sources: Sequence[Source], candidates: Sequence[Candidate], folder: str | Path | None = None
    ) -> Grid:
        """The losses of all pairs.

        Args:
            sources: A texts, or inputs of one example each, as the model's processor returns them.
            candidates: C texts, or tokens.
            folder: Where rows are kept as they are computed, to go on from; None keeps nothing.

        Returns:
            The grid, float64.

        Raises:
            ValueError: No sources or candidates, a text in the place of a list, a candidate without tokens, sequences
                that are longer than the model has positions, or a folder with the rows of another model or of other
                candidates.
        """
        tokens, inputs = self._encoded(sources, candidates)
        unique = sorted(set(tokens))
        keys = [key_of(source) for source in inputs]
        rows = StoredRows(folder, {} if folder is None else self._settings(unique))
        todo = {key: source for key, source in zip(keys, inputs, strict=True) if rows.get(key) is None}
        with self._reading(unique, list(todo.values())) as way, self._tracked(todo.items()) as items:
            reader = Reader(self.encoder, unique, way, self.batch_tokens)
            for key, source in items:
                rows.add(key, self._read(reader, source))
        place = {candidate: i for i, candidate in enumerate(unique)}
        columns = [place[candidate] for candidate in tokens]
        sums = np.stack([rows.known[key][columns] for key in keys])
        return Grid(sums, np.array([len(candidate) for candidate in tokens]))

    def pairs(self, sources: Sequence[Source], candidates: Sequence[Candidate]) -> np.ndarray:
        """The losses of N pairs alone, not of the grid; a source that stands in several pairs is read once.

        Args:
            sources: The source of each pair.
            candidates: The candidate of each pair.

        Returns:
            The sum of the losses of each pair's candidate [N], nats, float64.

        Raises:
            ValueError: As when called; or sources and candidates differ in number.
        """
        if len(sources) != len(candidates):
            raise ValueError(f"sources has {len(sources)} entries, candidates {len(candidates)}: pass pairs")
        tokens, inputs = self._encoded(sources, candidates)
        groups: dict[str, list[int]] = {}
        for i, source in enumerate(inputs):
            groups.setdefault(key_of(source), []).append(i)
        sums = np.empty(len(tokens))
        with self._reading(sorted(set(tokens)), inputs) as way, self._tracked(groups.values()) as sharing:
            for members in sharing:
                unique = sorted({tokens[i] for i in members})
                losses = self._read(Reader(self.encoder, unique, way, self.batch_tokens), inputs[members[0]])
                sums[members] = [losses[unique.index(tokens[i])] for i in members]
        return sums

    def _encoded(
        self, sources: Sequence[Source], candidates: Sequence[Candidate]
    ) -> tuple[list[Tokens], list[dict[str, Tensor]]]:
        """The tokens of candidates, and the inputs of sources."""
        for name, given in (("sources", sources), ("candidates", candidates)):
            if isinstance(given, str) or not len(given):
                raise ValueError(f"{name} is {given!r}: pass a list of at least one")
        return list(map(self.encoder.candidate, candidates)), list(map(self.encoder.source, sources))

    @contextmanager
    def _reading(self, candidates: Sequence[Tokens], sources: Sequence[dict[str, Tensor]]) -> Iterator[str]:
        """A context in which the model can be read, with the way to read it."""
        with torch.no_grad(), eval_mode(self.model), patched(self.model, always=True):
            yield self.way or (chosen_way(self.encoder, candidates, sources) if sources else WAYS[-1])

    def _read(self, reader: Reader, source: dict[str, Tensor]) -> np.ndarray:
        """The losses after one source. Raises: ValueError if the model cannot be read in the way that was asked for."""
        try:
            return reader(source).numpy()
        except Unreadable as error:
            name = type(self.model).__name__
            raise ValueError(f"way is {reader.way!r}, but model is a {name}: {error}, so pass way=None") from error

    def _tracked(self, values: Any) -> Any:
        return tracked(values, "scoring", console=Console(stderr=True), disable=not self.progress)

    def _settings(self, candidates: list[Tokens]) -> dict[str, Any]:
        return {
            "model": fingerprint_model(self.model),
            "candidates": hashlib.sha256(repr(candidates).encode()).hexdigest(),
        }


def scores(
    model: Any,
    processor: Any,
    sources: Sequence[Source],
    candidates: Sequence[Candidate],
    folder: str | Path | None = None,
    **options: Any,
) -> Grid:
    """The losses of every candidate given every source, for a single use.

    Args:
        model: A model with a language-modeling head, patched or not.
        processor: Its tokenizer, or its processor.
        sources: A texts, or inputs of one example each.
        candidates: C texts, or tokens.
        folder: Where rows are kept as they are computed, to go on from; None keeps nothing.
        **options: Those of `GridScorer`, such as template="French: {}\\nEnglish:".

    Returns:
        The grid [A, C].

    Raises:
        ValueError: As `GridScorer`.
    """
    return GridScorer(model, processor, **options)(sources, candidates, folder)
