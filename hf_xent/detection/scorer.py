"""From texts to scores: one forward a batch for all of them, no logits, no matter how texts are padded.

    scorer = TextScorer(model, tokenizer, ("loss", "min_k_pp", "dc_pdd:a=0.1"))
    found = scorer(texts)                                  # {"loss": [N], "min_k_pp": [N], "dc_pdd:a=0.1": [N]}
    score("dc_pdd", model, tokenizer, texts)               # one array, for the one-off

Texts are tokenized without special tokens and read after the tokenizer's BOS (its EOS if it has none), so that all
their tokens are scored, as DC-PDD's paper has it; its code scores all but the first: `start=False`. A text is cut at
`max_tokens`, or earlier where a model has learned no more positions (GPT-2: 1024, start token included).

Texts of about one length share a batch and are padded on the right, where nothing of a causal model looks back at it. A
model that is not patched is patched meanwhile; a second model (`reference`) serves as reference, Fast-DetectGPT's
sampling model and Binoculars' observer, `model` then being the performer. It needs the same tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from ..lazy import LazyLogits, next_token_labels
from ..models.anatomy import positions
from ..models.contexts import eval_mode
from ..ops import Stats, dense_stats, map_logits, vocab_stats
from ..options.ranges import check_count
from ..patching import head_of, patched
from . import scores as registry
from .counts import Corpus, fingerprint, frequencies, tracked

DEFAULT = ("loss", "zlib", "min_k", "min_k_pp", "dc_pdd")
SECOND = ("reference", "observed", "crossed")  # what a score can need that takes a second model


@dataclass
class TextScorer:
    """Callable: texts -> {score: float64 array, one number a text}; see the module's docstring.

    `scores` are registry names with options; `detection.get(name)` tells each one's direction. `frequencies` is
    DC-PDD's q [V], or the corpus to count it on: the default is always there but small, name a large one in the texts'
    language. A text without a scored token (an empty one) has NaN.

    Raises: ValueError for unknown scores or options, for one that needs the second model where none is given, and for
    texts that are no strings (None and NaN count as empty).
    """

    model: Any
    tokenizer: Any
    scores: Sequence[str] = DEFAULT
    reference: Any = None
    frequencies: Tensor | Corpus | str = "pydoc"
    batch_size: int = 16
    max_tokens: int = 512  # of a text; the rest is cut off, see `length`
    start: bool = True  # read texts after a start token
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_tokens"):
            check_count(name, getattr(self, name), 1)
        if isinstance(self.scores, str) or not self.scores:
            raise ValueError(f"scores is {self.scores!r}: pass a tuple of names, at least one")
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
        models = [model for model in (self.model, self.reference) if model is not None]
        shown = tracked(batches, "scoring", console=Console(stderr=True), disable=not self.progress)
        with lazy(*models), shown as starts:
            for i in starts:
                places = order[i : i + self.batch_size]
                batch = Batch(self, [rows[place] for place in places])
                for name, score in self.parsed.items():
                    needed = {need: getattr(batch, need) for need in score.needs}
                    found[name][places] = score(batch.stats, **needed).numpy()
        return found

    def tokenize(self, texts: Sequence[str]) -> list[tuple[str, list[int]]]:
        """Texts as they are scored, cut at `length`, and their ids after the start token."""
        if not len(texts):
            return []
        whole = _strings(texts)
        rows = self.tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        length = self.length
        cut = [
            text if len(ids) <= length else self.tokenizer.decode(ids[:length])
            for text, ids in zip(whole, rows, strict=True)
        ]
        return [(text, [*self.prefix, *ids[:length]]) for text, ids in zip(cut, rows, strict=True)]

    @property
    def length(self) -> int:
        """Tokens of a text that are scored, at most: `max_tokens`, or those the models have positions for."""
        rooms = [positions(model) for model in (self.model, self.reference) if model is not None]
        return min([self.max_tokens, *(room - len(self.prefix) for room in rooms if room is not None)])

    def fingerprint(self) -> str:
        """Equal for scorers of equal models, tokenizers, frequencies and options: what they hold, not where it lies."""
        models = [weights(model) for model in (self.model, self.reference) if model is not None]
        state: dict[str, Any] = {
            "models": models,
            "tokenizer": fingerprint(self.tokenizer),
            "scores": list(self.scores),
        }
        state |= {"length": self.length, "prefix": self.prefix}
        if any("frequencies" in score.needs for score in self.parsed.values()):
            state["frequencies"] = hashlib.sha256(self.q.numpy().tobytes()).hexdigest()
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    @cached_property
    def q(self) -> Tensor:
        """Token frequencies [V] for DC-PDD. Raises: ValueError for a tensor that is none of the tokenizer's."""
        vocabulary = max(len(self.tokenizer), head_of(self.model).weight.shape[0])
        if isinstance(self.frequencies, Tensor):
            if self.frequencies.ndim != 1 or len(self.frequencies) < len(self.tokenizer):
                shape = tuple(self.frequencies.shape)
                raise ValueError(f"frequencies has shape {shape}: pass one number for each of {vocabulary} tokens")
            if not ((self.frequencies > 0) & (self.frequencies <= 1)).all():
                raise ValueError("frequencies has values that are not in (0, 1]: smooth counts, as `frequencies` does")
            return self.frequencies.cpu()
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


def weights(model: Any) -> str:
    """Equal for models of equal configurations, parameters and buffers: what they hold, not where it lies."""
    config = model.config.to_dict()
    told = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    found = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:  # offloaded: it lies on the disk
            found.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return found.hexdigest()


def _strings(texts: Sequence[Any]) -> list[str]:
    """Texts with those that are missing (None, NaN) as empty ones. Raises: ValueError for anything else."""
    if isinstance(texts, str):
        raise ValueError(f"texts is the string {texts[:20]!r}...: pass a list of texts")
    found = ["" if text is None or (isinstance(text, float) and text != text) else text for text in texts]
    if wrong := [(i, text) for i, text in enumerate(found) if not isinstance(text, str)]:
        place, text = wrong[0]
        raise ValueError(f"texts has {text!r} at {place}, which is {type(text).__name__}, not text: pass strings")
    return found


@contextmanager
def lazy(*models: nn.Module) -> Iterator[None]:
    """Lazy logits, evaluation mode and no gradients for patched models and others, which are left as they were."""
    with torch.no_grad(), ExitStack() as stack:
        for model in models:
            stack.enter_context(eval_mode(model))
            stack.enter_context(patched(model, always=True))
        yield
