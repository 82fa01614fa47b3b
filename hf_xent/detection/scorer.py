"""From texts to scores: one forward pass per batch for all scores, without logits, and independent of padding.

    scorer = TextScorer(model, tokenizer, ("loss", "min_k_pp", "dc_pdd:a=0.1"))
    values = scorer(texts)                                 # {"loss": [N], "min_k_pp": [N], "dc_pdd:a=0.1": [N]}
    score("dc_pdd", model, tokenizer, texts)               # one array, for a single use

Texts are tokenized without special tokens and read after the tokenizer's BOS (its EOS if it has none), so that all
their tokens are scored, as in DC-PDD's paper; its code scores all but the first: `start=False`. A text is cut at
`max_tokens`, or earlier if the model has fewer positions (GPT-2: 1024, start token included).

Texts of similar lengths share a batch and are padded on the right, which no token of a causal model attends to. A model
that is not patched is patched while texts are scored; a second model (`reference`) serves as reference, as
Fast-DetectGPT's sampling model and as Binoculars' observer, with `model` as the performer. It needs the same tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from ..lazy import LazyLogits, next_token_labels
from ..models.anatomy import positions
from ..models.contexts import eval_mode
from ..models.fingerprints import fingerprint_model, fingerprint_tokenizer
from ..ops import Head, Stats, dense_stats, map_logits, vocab_stats
from ..options.ranges import check_count
from ..patching import head_of, patched
from ..system.progress import tracked
from .counts import CountedText, frequencies
from .scores import SECOND_MODEL, get

DEFAULT = ("loss", "zlib", "min_k", "min_k_pp", "dc_pdd")


@dataclass
class TextScorer:
    """Callable: texts -> {score: its value for each text}; see the module's docstring.

    Args:
        model: A causal language model of transformers, patched or not; it is not changed.
        tokenizer: The model's tokenizer.
        scores: Names in `SCORES` with options; `detection.get(name).higher_is` is the direction of each.
        reference: A second model of the same vocabulary, for scores that compare with one.
        frequencies: DC-PDD's q [V], or the texts to count it on: the default needs no download but is small, so name a
            large corpus in the texts' language.
        batch_size: Number of texts in a forward pass.
        max_tokens: Number of tokens of a text that are scored; further ones are cut off, see `length`.
        start: Whether texts are read after a start token.
        progress: Whether a progress bar is shown.

    Raises:
        ValueError: For unknown scores or options, or a score that needs a second model if `reference` is None.
    """

    model: Any
    tokenizer: Any
    scores: Sequence[str] = DEFAULT
    reference: Any = None
    frequencies: Tensor | CountedText | str = "pydoc"
    batch_size: int = 16
    max_tokens: int = 512
    start: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_tokens"):
            check_count(name, getattr(self, name), 1)
        if isinstance(self.scores, str) or not self.scores:
            raise ValueError(f"scores is {self.scores!r}: pass a tuple of names, at least one")
        self.parsed = {name: get(name) for name in self.scores}
        needs = {need: name for name, score in self.parsed.items() for need in score.needs}
        if self.reference is None and (second := sorted(needs.keys() & set(SECOND_MODEL))):
            raise ValueError(f"score {needs[second[0]]!r} compares with a second model: pass reference=...")
        self.outputs = ("lse", "target", *{name for score in self.parsed.values() for name in score.uses})
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        self.prefix = [i for i in ids if i is not None][:1] if self.start else []

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Every score of every text.

        Args:
            texts: Strings; None and NaN count as empty.

        Returns:
            Score -> float64 [N] in the order of the texts; NaN for a text without a scored token, such as an empty one.

        Raises:
            ValueError: For texts that are not strings, models of two vocabularies, or ids that a model cannot read.
        """
        rows = self.tokenize(texts)
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i][1]))
        values = {name: np.full(len(rows), np.nan) for name in self.parsed}
        models = [model for model in (self.model, self.reference) if model is not None]
        batches = range(0, len(rows), self.batch_size)
        bar = tracked(batches, "scoring", console=Console(stderr=True), disable=not self.progress)
        with lazy(*models), bar as starts:
            for start in starts:
                indices = by_length[start : start + self.batch_size]
                batch = Batch(self, [rows[i] for i in indices])
                for name, score in self.parsed.items():
                    needed = {need: getattr(batch, need) for need in score.needs}
                    values[name][indices] = score(batch.stats, **needed).numpy()
        return values

    def tokenize(self, texts: Sequence[str]) -> list[tuple[str, list[int]]]:
        """Texts as they are scored, cut at `length`, each with its ids. Raises: ValueError for anything else."""
        if not len(texts):
            return []
        uncut = _strings(texts)
        rows = self.tokenizer(uncut, add_special_tokens=False, verbose=False)["input_ids"]
        length = self.length
        return [
            (text if len(ids) <= length else self.tokenizer.decode(ids[:length]), [*self.prefix, *ids[:length]])
            for text, ids in zip(uncut, rows, strict=True)
        ]

    @property
    def length(self) -> int:
        """The largest number of scored tokens of a text: `max_tokens`, or fewer if a model has fewer positions."""
        limits = [positions(model) for model in (self.model, self.reference) if model is not None]
        return min([self.max_tokens, *(limit - len(self.prefix) for limit in limits if limit is not None)])

    def fingerprint(self) -> str:
        """A hash that is equal for scorers of equal models, tokenizers, frequencies and options, by their contents."""
        state: dict[str, Any] = {
            "models": [fingerprint_model(model) for model in (self.model, self.reference) if model is not None],
            "tokenizer": fingerprint_tokenizer(self.tokenizer),
            "scores": list(self.scores),
            "length": self.length,
            "prefix": self.prefix,
        }
        if any("frequencies" in score.needs for score in self.parsed.values()):
            state["frequencies"] = hashlib.sha256(self.token_frequencies.numpy().tobytes()).hexdigest()
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    @cached_property
    def token_frequencies(self) -> Tensor:
        """DC-PDD's q [V]. Raises: ValueError for a tensor of another size than the vocabulary, or not in (0, 1]."""
        vocabulary = max(len(self.tokenizer), head_of(self.model).out_features)
        if isinstance(self.frequencies, Tensor):
            if self.frequencies.ndim != 1 or len(self.frequencies) < len(self.tokenizer):
                shape = tuple(self.frequencies.shape)
                raise ValueError(f"frequencies has shape {shape}: pass one number for each of {vocabulary} tokens")
            if not ((self.frequencies > 0) & (self.frequencies <= 1)).all():
                raise ValueError("frequencies has values that are not in (0, 1]: smooth counts, as `frequencies` does")
            return self.frequencies.cpu()
        return frequencies(self.tokenizer, self.frequencies, vocabulary=vocabulary, progress=self.progress)


class Batch:
    """A batch of texts; its attributes are the inputs that scores need by these names, computed at first use."""

    def __init__(self, scorer: TextScorer, rows: list[tuple[str, list[int]]]):
        self.scorer = scorer
        self.texts = [text for text, _ in rows]
        length = max(2, *(len(ids) for _, ids in rows))  # at least two tokens: one is read, one predicted
        self.ids = torch.tensor([ids + [0] * (length - len(ids)) for _, ids in rows])
        self.mask = torch.arange(length) < torch.tensor([[len(ids)] for _, ids in rows])
        self.labels = next_token_labels(torch.where(self.mask, self.ids, -100))  # what each position predicts, [B, T]

    @cached_property
    def logits(self) -> Tensor:
        """The model's logits, lazy unless the model computes with them itself."""
        return self._forward(self.scorer.model)

    @cached_property
    def reference_logits(self) -> Tensor:
        """The second model's logits."""
        return self._forward(self.scorer.reference)

    @cached_property
    def stats(self) -> Stats:
        """Statistics of the tokens under the model."""
        return self._statistics(self.logits, self.scorer.outputs)

    @cached_property
    def lowered(self) -> Stats:
        """Statistics of the lower-cased texts under the model."""
        lowered = Batch(self.scorer, self.scorer.tokenize([text.lower() for text in self.texts]))
        return lowered._statistics(lowered.logits, ("lse", "target"))

    @cached_property
    def reference(self) -> Stats:
        """Statistics of the tokens under the second model."""
        return self._statistics(self.reference_logits, ("lse", "target"))

    @cached_property
    def cross_payload(self) -> Stats:
        """Statistics under the second model with its expectation of the model's logits as payload."""

        def compute(hidden: Tensor, head: Head, *model: Any) -> Stats:
            return vocab_stats(hidden, head, self.labels.to(hidden.device), outputs=("payload",), payload=model)

        return self._compare(compute).to("cpu")

    @cached_property
    def cross_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the model's log-probabilities under the second model's softmax, [B, T] each."""
        scored = self.labels != -100

        def compute(second: Tensor, head: Head, hidden: Tensor, first: Head) -> Tensor:
            def moments(z: Tensor, hidden: Tensor) -> Tensor:
                p, logp = z.softmax(-1), first.logits(hidden).log_softmax(-1).clamp(min=-1e4)  # banned tokens: -inf
                expected = (p * logp).sum(-1, keepdim=True)
                return torch.cat([expected, (p * (logp - expected).square()).sum(-1, keepdim=True)], -1)

            rows = scored.to(second.device)
            return map_logits(moments, second[rows], head, hidden[rows])

        pairs = self._compare(compute).cpu()
        expected, variance = (
            torch.zeros(scored.shape, dtype=pairs.dtype).masked_scatter(scored, x) for x in pairs.T.contiguous()
        )
        return expected, variance

    @property
    def frequencies(self) -> Tensor:
        """Frequencies of the vocabulary's tokens, [V]."""
        return self.scorer.token_frequencies

    def _forward(self, model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        ids, mask = self.ids.to(device), self.mask.long().to(device)
        try:
            return model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        except IndexError as error:  # ids of another tokenizer, or positions that `positions` does not know of
            raise ValueError(
                f"the model cannot read {ids.shape[1]} tokens with ids up to {int(ids.max())} ({error}): choose a"
                f" smaller max_tokens than {self.scorer.max_tokens}, or the model's own tokenizer"
            ) from error

    def _statistics(self, logits: Tensor, outputs: tuple[str, ...]) -> Stats:
        if isinstance(logits, LazyLogits):
            return logits.stats(self.labels, outputs=outputs).to("cpu")
        return dense_stats(logits.cpu(), self.labels, outputs=outputs)  # the model computes with its logits itself

    def _compare(self, compute: Callable[..., Any]) -> Any:
        """A function of the second model's hidden states and head, and the model's. Raises: ValueError without them."""
        logits, reference = self.logits, self.reference_logits
        if not (isinstance(logits, LazyLogits) and isinstance(reference, LazyLogits)):
            raise ValueError(
                "model or reference computes with its logits itself, but scores of two models need lazy logits of both:"
                " choose another model"
            )
        if logits.shape[-1] != reference.shape[-1]:
            raise ValueError(
                f"model has {logits.shape[-1]} tokens but reference {reference.shape[-1]}: choose two models of one"
                " vocabulary"
            )
        return logits.with_head(lambda *model: reference.with_head(lambda *second: compute(*second, *model)))


def score(name: str, model: Any, tokenizer: Any, texts: Sequence[str], **options: Any) -> np.ndarray:
    """One score of every text, for a single use; `TextScorer` computes several.

    Args:
        name: A name in `SCORES`, with options if any.
        model: A causal language model of transformers, patched or not.
        tokenizer: The model's tokenizer.
        texts: Strings; None and NaN count as empty.
        **options: Those of `TextScorer`, such as frequencies="allenai/c4:en".

    Returns:
        Float64 [N]; NaN for a text without a scored token.

    Raises:
        ValueError: As `TextScorer` does.
    """
    return TextScorer(model, tokenizer, (name,), **options)(texts)[name]


def _strings(texts: Sequence[Any]) -> list[str]:
    """The texts, with an empty one for None and NaN. Raises: ValueError for anything else than text."""
    if isinstance(texts, str):
        raise ValueError(f"texts is the string {texts[:20]!r}...: pass a list of texts")
    filled = ["" if text is None or (isinstance(text, float) and text != text) else text for text in texts]
    if wrong := [(i, text) for i, text in enumerate(filled) if not isinstance(text, str)]:
        index, text = wrong[0]
        raise ValueError(f"texts has {text!r} at {index}, which is {type(text).__name__}, not text: pass strings")
    return filled


@contextmanager
def lazy(*models: nn.Module) -> Iterator[None]:
    """Makes the models return lazy logits, in evaluation mode and without gradients, until the context ends."""
    with torch.no_grad(), ExitStack() as stack:
        for model in models:
            stack.enter_context(eval_mode(model))
            stack.enter_context(patched(model, always=True))
        yield
