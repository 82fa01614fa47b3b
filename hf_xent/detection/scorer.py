"""From texts to scores: one forward a batch for all of them, no logits, no matter how texts are padded.

    scorer = TextScorer(model, tokenizer, ("loss", "min_k_pp", "dc_pdd:a=0.1"))
    found = scorer(texts)                                  # {"loss": [N], "min_k_pp": [N], "dc_pdd:a=0.1": [N]}
    score("dc_pdd", model, tokenizer, texts)               # one array, for the one-off

Texts are tokenized without special tokens and read after the tokenizer's BOS (its EOS if it has none), so that all
their tokens are scored, as DC-PDD's paper has it; its code scores all but the first: `start=False`. Texts of about one
length share a batch and are padded on the right, where nothing of a causal model looks back at it. A model that is not
patched is patched meanwhile; a second model (`reference`) serves as reference, Fast-DetectGPT's sampling model and
Binoculars' observer, `model` then being the performer. It needs the same tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ..lazy import LazyLogits, next_token_labels
from ..mode import evaluating
from ..ops import Stats, dense_stats, map_logits, vocab_stats
from ..patching import head_of, lazily, patch, seam_of, unpatch
from . import scores as registry
from .corpus import Corpus, frequencies

DEFAULT = ("loss", "zlib", "min_k", "min_k_pp", "dc_pdd")
SECOND = ("reference", "observed", "crossed")  # what a score can need that takes a second model


@dataclass
class TextScorer:
    """Callable: texts -> {score: float64 array, one number a text}; see the module's docstring.

    `scores` are registry names with options; `detection.get(name)` tells each one's direction. `frequencies` is
    DC-PDD's q [V], or the corpus to count it on: the default is always there but small, name a large one in the texts'
    language. A text without a scored token (an empty one) has NaN.

    Raises: ValueError for unknown scores or options, or one that needs the second model where none is given.
    """

    model: Any
    tokenizer: Any
    scores: Sequence[str] = DEFAULT
    reference: Any = None
    frequencies: Tensor | Corpus | str = "pydoc"
    batch_size: int = 16
    max_tokens: int = 512  # of a text; the rest is cut off
    start: bool = True  # read texts after a start token
    progress: bool = True

    def __post_init__(self) -> None:
        self.parsed = {name: registry.get(name) for name in self.scores}
        needs = {need: name for name, score in self.parsed.items() for need in score.needs}
        if self.reference is None and (second := sorted(needs.keys() & set(SECOND))):
            raise ValueError(f"score {needs[second[0]]!r} compares with a second model: pass reference=...")
        self.outputs = ("lse", "target", *{name for score in self.parsed.values() for name in score.uses})
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        self.prefix = [i for i in ids if i is not None][:1] if self.start else []

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Every score of every text, in their order."""
        rows = self.tokenize(texts)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][1]))
        found = {name: np.full(len(rows), np.nan) for name in self.parsed}
        batches = range(0, len(rows), self.batch_size)
        with lazy(self.model, *([] if self.reference is None else [self.reference])):
            for i in track(batches, "scoring", console=Console(stderr=True), disable=not self.progress):
                places = order[i : i + self.batch_size]
                batch = Batch(self, [rows[place] for place in places])
                for name, score in self.parsed.items():
                    needed = {need: getattr(batch, need) for need in score.needs}
                    found[name][places] = score(batch.stats, **needed).numpy()
        return found

    def tokenize(self, texts: Sequence[str]) -> list[tuple[str, list[int]]]:
        """Texts as they are scored, cut at `max_tokens`, and their ids after the start token."""
        if not len(texts):
            return []
        rows = self.tokenizer([text or "" for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
        cut = [
            text or "" if len(ids) <= self.max_tokens else self.tokenizer.decode(ids[: self.max_tokens])
            for text, ids in zip(texts, rows, strict=True)
        ]
        return [(text, [*self.prefix, *ids[: self.max_tokens]]) for text, ids in zip(cut, rows, strict=True)]

    @cached_property
    def q(self) -> Tensor:
        """Token frequencies [V] for DC-PDD."""
        if isinstance(self.frequencies, Tensor):
            return self.frequencies
        vocabulary = max(len(self.tokenizer), head_of(self.model).weight.shape[0])
        return frequencies(self.tokenizer, self.frequencies, vocabulary=vocabulary, progress=self.progress)


class Batch:
    """A few texts; what scores need of them is an attribute of that name, made when the first asks."""

    def __init__(self, scorer: TextScorer, rows: list[tuple[str, list[int]]]):
        self.scorer = scorer
        self.texts = [text for text, _ in rows]
        length = max(2, *(len(ids) for _, ids in rows))  # two tokens at least: one is read, one predicted
        self.ids = torch.tensor([ids + [0] * (length - len(ids)) for _, ids in rows])
        self.mask = torch.arange(length) < torch.tensor([[len(ids)] for _, ids in rows])

    @cached_property
    def labels(self) -> Tensor:
        """What each position has to predict, [B, T]."""
        return next_token_labels(torch.where(self.mask, self.ids, -100))

    @cached_property
    def logits(self) -> Tensor:
        """The model's, not multiplied."""
        return self._forward(self.scorer.model)

    @cached_property
    def theirs(self) -> Tensor:
        """The second model's."""
        return self._forward(self.scorer.reference)

    @cached_property
    def stats(self) -> Stats:
        """Under the model."""
        return self._statistics(self.logits, self.scorer.outputs)

    @cached_property
    def lowered(self) -> Stats:
        """Of the lower-cased texts, under the model."""
        again = Batch(self.scorer, self.scorer.tokenize([text.lower() for text in self.texts]))
        return again._statistics(again.logits, ("lse", "target"))

    @cached_property
    def reference(self) -> Stats:
        """Under the second model."""
        return self._statistics(self.theirs, ("lse", "target"))

    @cached_property
    def observed(self) -> Stats:
        """Under the second model, with the expectation of the model's logits as payload."""
        ours, theirs = self._pair()
        labels = self.labels.to(theirs.hidden.device)
        return vocab_stats(
            theirs.hidden, theirs.head, labels, outputs=("payload",), payload=(ours.hidden, ours.head)
        ).to("cpu")

    @cached_property
    def crossed(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the model's log-probabilities under the second model's softmax, [B, T] each."""
        ours, theirs = self._pair()

        def moments(z: Tensor, hidden: Tensor) -> Tensor:
            p, logp = z.softmax(-1), ours.head.logits(hidden).log_softmax(-1).clamp(min=-1e4)  # banned tokens: -inf
            expected = (p * logp).sum(-1, keepdim=True)
            return torch.cat([expected, (p * (logp - expected).square()).sum(-1, keepdim=True)], -1)

        scored = self.labels != -100
        rows = scored.to(theirs.hidden.device)
        found = map_logits(moments, theirs.hidden[rows], theirs.head, ours.hidden[rows]).cpu()
        expected, variance = (
            torch.zeros(scored.shape, dtype=found.dtype).masked_scatter(scored, x) for x in found.T.contiguous()
        )
        return expected, variance

    @property
    def frequencies(self) -> Tensor:
        """Of tokens in the corpus, [V]."""
        return self.scorer.q

    def _forward(self, model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        return model(input_ids=self.ids.to(device), attention_mask=self.mask.long().to(device), use_cache=False).logits

    def _statistics(self, logits: Tensor, outputs: tuple[str, ...]) -> Stats:
        if isinstance(logits, LazyLogits):
            return logits.stats(self.labels, outputs=outputs).to("cpu")
        return dense_stats(logits.cpu(), self.labels, outputs=outputs)  # a model that touches its logits

    def _pair(self) -> tuple[LazyLogits, LazyLogits]:
        ours, theirs = self.logits, self.theirs
        if not (isinstance(ours, LazyLogits) and isinstance(theirs, LazyLogits)):
            raise ValueError("one of the models makes its logits itself: scores of two models need both to be lazy")
        if ours.head.vocabulary != theirs.head.vocabulary:
            raise ValueError(
                f"model has {ours.head.vocabulary} tokens but reference {theirs.head.vocabulary}: choose two models"
                " of one vocabulary"
            )
        return ours, theirs


def score(name: str, model: Any, tokenizer: Any, texts: Sequence[str], **options: Any) -> np.ndarray:
    """One score of every text, [N] in float64; options as `TextScorer`, errors too.

    hf_xent.detection.score("dc_pdd", model, tokenizer, texts, frequencies="allenai/c4:en")
    """
    return TextScorer(model, tokenizer, (name,), **options)(texts)[name]


@contextmanager
def lazy(*models: nn.Module) -> Iterator[None]:
    """Lazy logits, evaluation mode and no gradients for patched models and others, which are left as they were."""
    with torch.no_grad(), ExitStack() as stack:
        for model in models:
            try:
                seam_of(model)
            except ValueError:
                patch(model)
                stack.callback(unpatch, model)
            stack.enter_context(evaluating(model))
            stack.enter_context(lazily(model))
        yield
