"""How much a context says about a text: the model's loss without it less that with it, beside a shuffled context.

    I        = (sum_i S_i(alone) - sum_i S_i(context_i)) / sum_i |c_i|      nats per token: mutual information
    infogain = I / L,     L = sum_i S_i(alone) / sum_i |c_i|                the share of the text's loss

The difference of two losses estimates mutual information only as far as the model's distributions are right; it can be
negative. As a control, each text gets the context of another one: what such a context gives is not about the text.

Source: Henighan et al. 2020, Scaling Laws for Autoregressive Generative Modeling, arXiv:2010.14701, for image and text.
The shuffled contexts and the intervals are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..metrics.ranking import Interval
from .measures import interval


@dataclass(frozen=True)
class Information:
    """What contexts say about texts.

    Args:
        alone: The loss of the texts alone, nats per token.
        given: The loss given their contexts, nats per token.
        mutual: Mutual information, nats per token, with its interval over texts.
        share: The infogain: mutual information as a share of `alone`.
    """

    alone: float
    given: float
    mutual: Interval
    share: float

    def __str__(self) -> str:
        return (
            f"{self.given:.3f} nats per token, {self.alone:.3f} without; information {self.mutual}, infogain"
            f" {self.share:.3f}"
        )


@dataclass(frozen=True)
class Informed:
    """Contexts and their control.

    Args:
        contexts: Of each text's own context.
        shuffled: Of the context of another text.
        difference: The loss given another context less that given its own, nats per token, with its interval.
    """

    contexts: Information
    shuffled: Information
    difference: Interval


def infogain(given: ArrayLike, alone: ArrayLike, tokens: ArrayLike, *, seed: int = 0) -> Information:
    """Mutual information and infogain from sums of losses.

    Args:
        given: Each text's sum of losses given its context [N], nats.
        alone: Its sum without a context [N], nats.
        tokens: Its number of tokens [N].
        seed: Seed of the bootstrap.

    Returns:
        The information of the contexts.

    Raises:
        ValueError: Shapes that differ, or numbers that are not finite.
    """
    counts = np.asarray(tokens, dtype=np.float64)
    with_it, without = (np.asarray(x, dtype=np.float64) for x in (given, alone))
    if not with_it.shape == without.shape == counts.shape:
        raise ValueError(
            f"given has shape {with_it.shape}, alone {without.shape}, tokens {counts.shape}: pass one number a text"
        )
    mutual = interval((without - with_it) / counts, counts, seed=seed)
    loss = float(without.sum() / counts.sum())
    return Information(loss, float(with_it.sum() / counts.sum()), mutual, mutual.value / loss)


def informed(given: ArrayLike, shuffled: ArrayLike, alone: ArrayLike, tokens: ArrayLike, *, seed: int = 0) -> Informed:
    """The information of contexts, of shuffled ones, and the difference.

    Args:
        given: Each text's sum of losses given its context [N], nats.
        shuffled: Its sum given the context of another text [N].
        alone: Its sum without a context [N].
        tokens: Its number of tokens [N].
        seed: Seed of the bootstrap.

    Returns:
        Both, and their difference.

    Raises:
        ValueError: As for `infogain`.
    """
    counts = np.asarray(tokens, dtype=np.float64)
    own, other = infogain(given, alone, counts, seed=seed), infogain(shuffled, alone, counts, seed=seed)
    gaps = (np.asarray(shuffled, dtype=np.float64) - np.asarray(given, dtype=np.float64)) / counts
    return Informed(own, other, interval(gaps, counts, seed=seed))


def others(count: int, seed: int = 0) -> np.ndarray:
    """A random order [N] in which nothing stays at its place (Sattolo's algorithm).

    Args:
        count: N, at least 2.
        seed: Its seed.

    Returns:
        The place that each one is sent to.

    Raises:
        ValueError: There are fewer than two.
    """
    if count < 2:
        raise ValueError(f"count is {count}: the context of another text needs at least two texts")
    rng, order = np.random.default_rng(seed), np.arange(count)
    for i in range(count - 1, 0, -1):
        j = int(rng.integers(i))
        order[[i, j]] = order[[j, i]]
    return order


def mutual_information(
    model: Any,
    processor: Any,
    targets: Sequence[Any],
    contexts: Sequence[Any],
    *,
    empty: Any = "",
    seed: int = 0,
    **options: Any,
) -> Informed:
    """What contexts tell a model about texts; three losses a text: alone, with its context and with another one's.

    Args:
        model: A model with a language-modeling head, patched or not.
        processor: Its tokenizer, or its processor.
        targets: N texts, or tokens.
        contexts: N texts, or inputs of one example each, as `scores` takes them.
        empty: The context that stands for none: text under the template, or inputs. For images and recordings, use the
            inputs of a silent or grey one, or of the prompt alone.
        seed: Seed of the shuffling and of the bootstrap.
        **options: Those of `GridScorer`, such as template="French: {}\\nEnglish:".

    Returns:
        The information of the contexts, and the control.

    Raises:
        ValueError: As `GridScorer`; or fewer than two texts, or as many contexts.
    """
    from .grid import GridScorer

    if len(targets) != len(contexts):
        raise ValueError(f"targets has {len(targets)} entries, contexts {len(contexts)}: pass one context a text")
    order = others(len(targets), seed)
    scorer = GridScorer(model, processor, **options)
    shown = [*contexts, *(contexts[i] for i in order)]
    sums = scorer.pairs(shown, [*targets, *targets])
    alone = scorer([empty], targets)
    given, shuffled = np.split(sums, 2)
    return informed(given, shuffled, alone.sums[0], alone.tokens, seed=seed)
