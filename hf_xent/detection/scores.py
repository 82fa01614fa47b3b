"""Scores of texts: a few lines each over the statistics of their tokens, and the registry that declares them.

For the scored tokens i = 1..n of a text, logp_i = log p(x_i | x_<i), H_i the entropy and s_i^2 the variance of log p
under p:

    loss         mean_i -logp_i                                          perplexity  exp(loss)
    zlib         loss / bytes of zlib(text)                              lowercase   loss(lower-cased text) / loss
    reference    loss / loss under a reference model                     reference_gap  loss under it - loss
    min_k        mean of the lowest k n logp_i                           min_k_pp    the same of (logp_i + H_i) / s_i
    dc_pdd       mean_{i first of its token} min(-p_i ln q(x_i), a)      q(v) = (count(v) + 1) / (N' + V) in a corpus
    fast_detect  sum_i (logp_i - mu_i) / sqrt(sum_i var_i)               mean and variance of log p under p, mu_i = -H_i
    fast_detect_pair   the same with mean and variance under the reference model's softmax
    binoculars   loss / mean_i -sum_v p_reference(v) log p(v)            cross-perplexity, a payload of the reference

`stats` are [B, T] with a mask, so padding may be anywhere; a score is [B] in float64, NaN for a text without a scored
token. Options are the keyword defaults; parameters without a default are what a score needs beside the statistics.
`higher_is` declares the direction: 'positive' if a larger score speaks for the positive class (member of the training
set; written by a machine), else 'negative'.

Free choices: at least one token counts in min_k and min_k_pp (the authors' int(k n) can be 0); variances are at least
1e-9; DC-PDD's cap a = 0.01 is its authors' default, and what it does depends on it more than on anything else: never
choose it on the labels it is judged by.
"""

from __future__ import annotations

import inspect
import zlib as compression
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import Stats
from ..registry import parse

FLOOR = 1e-9  # of variances, nats^2
RANGES = {
    "k": (0, 1, "a share of the tokens above 0 and up to 1, such as 0.2 for the lowest 20 %"),
    "a": (0, float("inf"), "a number above 0"),
}
"""Option of a score -> what it has to be above, what it may be at most, and that in words."""


def loss(stats: Stats) -> Tensor:
    """Mean negative log-probability of the tokens, nats. Source: Yeom et al. 2018, arXiv:1709.01604."""
    return mean(stats.nll, stats.mask)


def perplexity(stats: Stats) -> Tensor:
    """exp(loss): the order of `loss`. Source: Carlini et al. 2021, arXiv:2012.07805."""
    return loss(stats).exp()


def zlib(stats: Stats, texts: Sequence[str]) -> Tensor:
    """Loss over the bytes of the compressed text. Source: Carlini et al. 2021, arXiv:2012.07805."""
    sizes = [len(compression.compress(text.encode())) for text in texts]
    return loss(stats) / torch.tensor(sizes, dtype=torch.float64)


def lowercase(stats: Stats, lowered: Stats) -> Tensor:
    """Loss of the lower-cased text over the loss. Source: Carlini et al. 2021, arXiv:2012.07805."""
    return loss(lowered) / loss(stats)


def reference(stats: Stats, reference: Stats) -> Tensor:
    """Loss over the loss under a reference model, as DC-PDD compares. Source: Carlini et al. 2021, arXiv:2012.07805."""
    return loss(stats) / loss(reference)


def reference_gap(stats: Stats, reference: Stats) -> Tensor:
    """Loss under a reference model minus the loss; another order than the ratio. Source: as `reference`."""
    return loss(reference) - loss(stats)


def min_k(stats: Stats, k: float = 0.2) -> Tensor:
    """Mean of the lowest share k of log-probabilities. Source: Shi et al. 2024, arXiv:2310.16789."""
    return lowest(stats.logp, stats.mask, k)


def min_k_pp(stats: Stats, k: float = 0.2) -> Tensor:
    """Min-K% of standardized log-probabilities. Source: Zhang et al. 2025, Min-K%++, arXiv:2404.02936."""
    return lowest((stats.logp + stats.entropy) / stats.variance.clamp(min=FLOOR).sqrt(), stats.mask, k)


def dc_pdd(stats: Stats, frequencies: Tensor, a: float = 0.01) -> Tensor:
    """Divergence from a corpus' token frequencies q [V]. Source: Zhang et al. 2024, DC-PDD, arXiv:2409.14781."""
    in_range("a", a)
    first = first_occurrences(stats.labels, stats.mask)
    q = frequencies[torch.where(stats.mask, stats.labels, 0)]
    return mean((-stats.logp.double().exp() * q.log()).clamp(max=a), first)


def fast_detect(stats: Stats) -> Tensor:
    """Curvature of the log-probability, one model. Source: Bao et al. 2024, Fast-DetectGPT, arXiv:2310.05130."""
    return _curvature(stats, -stats.entropy, stats.variance)


def fast_detect_pair(stats: Stats, crossed: tuple[Tensor, Tensor]) -> Tensor:
    """Curvature where alternatives are drawn from a reference model. Source: as `fast_detect`."""
    return _curvature(stats, *crossed)


def binoculars(stats: Stats, observed: Stats) -> Tensor:
    """Loss over the cross-entropy from the reference, the observer. Source: Hans et al. 2024, arXiv:2401.12070."""
    return loss(stats) / mean(stats.lse - observed.payload, stats.mask)


def mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each text, [B, T] to [B], in float64."""
    return torch.where(mask, values.double(), 0.0).sum(-1) / mask.sum(-1)


def in_range(option: str, value: Any) -> Any:
    """The value of a score's option. Raises: ValueError for one outside of RANGES, or that is no number."""
    low, high, hint = RANGES[option]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
        raise ValueError(f"{option} is {value!r}: choose {hint}")
    return value


def lowest(values: Tensor, mask: Tensor, k: float) -> Tensor:
    """Mean of the int(k n) lowest values of each text, of one at least. Raises: ValueError for k outside of (0, 1]."""
    in_range("k", k)
    n = mask.sum(-1, keepdim=True)
    count = (k * n.double()).long().clamp(min=1).minimum(n)
    ranked = torch.where(mask, values.double(), float("inf")).sort(-1).values
    return mean(ranked, torch.arange(mask.shape[-1]) < count)


def first_occurrences(labels: Tensor, mask: Tensor) -> Tensor:
    """Where a text has a token for the first time, [B, T]."""
    ranked, order = torch.where(mask, labels, -1).sort(dim=-1, stable=True)  # equal tokens stay in their order
    fresh = torch.ones_like(mask)
    fresh[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    return torch.zeros_like(mask).scatter(-1, order, fresh) & mask


def _curvature(stats: Stats, expected: Tensor, variance: Tensor) -> Tensor:
    total, spread = (torch.where(stats.mask, x.double(), 0.0).sum(-1) for x in (stats.logp - expected, variance))
    return total / spread.clamp(min=FLOOR).sqrt() + 0 * loss(stats)  # NaN where nothing was scored


@dataclass(frozen=True)
class Score:
    """A registered score: its function, its direction, and the statistics it reads beside logp."""

    of: Callable[..., Tensor]  # (stats, what it needs ..., options) -> [B]
    higher_is: str  # 'positive' or 'negative'
    uses: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> tuple[str, ...]:
        """What the function takes beside the statistics: the names of its parameters without a default."""
        parameters = list(inspect.signature(self.of).parameters.values())[1:]
        return tuple(p.name for p in parameters if p.default is p.empty)

    @property
    def defaults(self) -> dict[str, Any]:
        """The function's options and their defaults."""
        parameters = inspect.signature(self.of).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    def __call__(self, stats: Stats, **needed: Any) -> Tensor:
        """The score of every text, [B] in float64."""
        return self.of(stats, **needed, **self.options)

    def oriented(self, values: Any) -> np.ndarray:
        """Values of this score turned so that larger speaks for the positive class."""
        return np.asarray(values, dtype=np.float64) * (1 if self.higher_is == "positive" else -1)


CURVED = ("entropy", "variance")
SCORES: dict[str, Score] = {
    "loss": Score(loss, "negative"),
    "perplexity": Score(perplexity, "negative"),
    "zlib": Score(zlib, "negative"),
    "lowercase": Score(lowercase, "positive"),
    "reference": Score(reference, "negative"),
    "reference_gap": Score(reference_gap, "positive"),
    "min_k": Score(min_k, "positive"),
    "min_k_pp": Score(min_k_pp, "positive", CURVED),
    "dc_pdd": Score(dc_pdd, "positive"),
    "fast_detect": Score(fast_detect, "positive", CURVED),
    "fast_detect_pair": Score(fast_detect_pair, "positive"),
    "binoculars": Score(binoculars, "negative"),
}
"""Name -> score."""


def get(score: str) -> Score:
    """A registered score by name, with options if any: 'min_k:k=0.1', 'dc_pdd:a=0.1'.

    Raises: ValueError for an unknown name, an option the score does not have, or a value outside of its range.
    """
    name, _, text = score.partition(":")
    if name not in SCORES:
        raise ValueError(f"score is {name!r}: choose one of {', '.join(SCORES)}")
    found, options = SCORES[name], parse(text)
    if unknown := sorted(options.keys() - found.defaults.keys()):
        known = ", ".join(found.defaults) or "none"
        raise ValueError(f"score {name!r} does not take {', '.join(unknown)}: its options are {known}")
    for option, value in options.items():
        in_range(option, value)
    return replace(found, options=options)


def sweep(name: str, **values: Sequence[Any]) -> list[str]:
    """One score for each value of one option: `sweep("dc_pdd", a=(0.01, 0.1))`; all of them cost one forward."""
    if len(values) != 1:
        raise ValueError(f"sweep of {name!r} is over {', '.join(values) or 'nothing'}: name one option")
    [(option, choices)] = values.items()
    return [f"{name}:{option}={choice}" for choice in choices]
