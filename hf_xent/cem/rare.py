"""How probable a rare event is, by the cross-entropy method: draw where it is common, and weigh the draws.

    P_u(S(x) >= g) = E_v[w 1(S(x) >= g)]      w = p(x; u) / p(x; v)      about the mean over n draws from p(.; v)

That mean is unbiased for every v, and precise if draws from p(.; v) often reach g and have similar weights there. v is
found level by level, from u on:

    g_t = min(g, the (1 - rho)-quantile of S over draws from p(.; v_{t-1}))         the elites are those with S >= g_t
    v_t = argmax_v  sum over elites of  w log p(x; v)                               w = p(x; u) / p(x; v_{t-1})

The maximised sum is minus a cross-entropy: it takes p(.; v) as close as its family comes to p(x; u) given that
S >= g_t. The levels end when g_t = g; fresh draws, which no v depends on, then give the estimate.

    probability(lambda x: x.sum(1), Exponentials([1.0] * 5), 25.0)      five waiting times that add up to over 25
    estimate(model, prompt, event, tokens=20)                           an output of a language model with a property

Source: Rubinstein 1997 and 1999; Rubinstein and Kroese 2004, The Cross-Entropy Method, for the levels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..metrics.shares import wilson
from ..options.ranges import check_count, is_number

Numbers = NDArray[np.float64]
FEW = 30
"""A warning is given below this effective number of draws with the event: their largest weights may be missing yet."""
ROUNDS = 50  # the most levels of `probability`


@dataclass(frozen=True)
class RareEvent:
    """An estimated probability, and what to judge it by.

    The interval covers the sampling error alone, and only if the draws have met the event in all its likely forms: a
    form that the tilted distribution hardly ever draws is missing from the estimate and from its error.
    """

    probability: float
    """The estimate: the mean over draws of the weight of those with the event."""
    standard_error: float
    """Its standard deviation over repetitions, estimated from the draws."""
    interval: tuple[float, float]
    """95 %: Wilson's if no draw is weighted, else p exp(+-1.96 standard_error / p); 0 to 1 without an event."""
    ess: float
    """The effective number of draws with the event, (sum w)^2 / sum w^2 over them."""
    hits: int
    """The number of draws with the event."""
    draws: int
    """The number of draws of the estimate; those of the levels are not in it."""
    levels: tuple[float, ...]
    """The thresholds g_t by which the tilt was found."""
    tilt: Any
    """What the estimate was drawn under: the parameters v, or token -> additive bias of its logit."""

    @property
    def relative_error(self) -> float:
        """standard_error / probability; infinite without an event."""
        return self.standard_error / self.probability if self.probability else math.inf


class Family(Protocol):
    """Distributions p(x; v) over vectors, for `probability`."""

    nominal: Any
    """The parameters u, under which the probability is asked for."""

    def draw(self, v: Any, n: int, rng: np.random.Generator) -> Numbers:
        """n draws [n, D] from p(.; v)."""

    def log_density(self, x: Numbers, v: Any) -> Numbers:
        """log p(x; v) [n] of vectors [n, D], up to a constant that is the same for all v."""

    def fit(self, x: Numbers, weights: Numbers) -> Any:
        """argmax_v sum_i weights_i log p(x_i; v) for vectors [n, D] and weights [n], not all 0."""


class Exponentials:
    """Independent exponential variables with these means; weighted maximum likelihood is their weighted mean.

    Args:
        means: The mean of each variable [D], above 0.

    Raises:
        ValueError: No means, or one that is not a positive number.
    """

    def __init__(self, means: ArrayLike):
        self.nominal = np.asarray(means, dtype=float)
        positive = np.all((self.nominal > 0) & (self.nominal < math.inf))
        if self.nominal.ndim != 1 or not self.nominal.size or not positive:
            raise ValueError(f"means is {means!r}: give one positive number for each variable")

    def draw(self, v: Numbers, n: int, rng: np.random.Generator) -> Numbers:
        """As `Family.draw`."""
        return rng.exponential(v, (n, len(v)))

    def log_density(self, x: Numbers, v: Numbers) -> Numbers:
        """As `Family.log_density`."""
        return -(x / v + np.log(v)).sum(1)

    def fit(self, x: Numbers, weights: Numbers) -> Numbers:
        """As `Family.fit`."""
        return weights @ x / weights.sum()


def probability(
    score: Callable[[Numbers], ArrayLike],
    family: Family,
    threshold: float,
    *,
    draws: int = 20_000,
    per_level: int = 2_000,
    rho: float = 0.1,
    seed: int = 0,
) -> RareEvent:
    """The probability that the score of a random vector reaches a threshold.

    Args:
        score: The scores S [n] of vectors [n, D].
        family: The distribution of the vectors, and those it may be tilted to, such as `Exponentials`.
        threshold: The event is S >= threshold.
        draws: Draws of the estimate.
        per_level: Draws of each level.
        rho: The share of elites in a level, in (0, 1).
        seed: Of numpy's generator; numpy's global one is not used.

    Returns:
        The estimate with its error.

    Raises:
        ValueError: An argument out of range, scores of another length or that are NaN, or levels that do not rise.
    """
    check_count("draws", draws, 2)
    check_count("per_level", per_level, 2)
    rng = np.random.default_rng(seed)

    def drawn(v: Any, n: int) -> tuple[Numbers, Numbers, Numbers]:
        x = family.draw(v, n, rng)
        return x, scored(score(x), n), family.log_density(x, family.nominal) - family.log_density(x, v)

    def fitted(v: Any, x: Numbers, scores: Numbers, log_weights: Numbers, level: float) -> Any:
        elite = scores >= level
        return family.fit(x[elite], np.exp(log_weights[elite] - log_weights[elite].max()))

    v, levels = climbed(family.nominal, lambda v: drawn(v, per_level), fitted, threshold, rho)
    _, scores, log_weights = drawn(v, draws)
    return weighed(scores >= threshold, log_weights, levels, v)


def estimate(
    model: Any, prompts: Any, event: Callable[[Any], Any], threshold: float | None = None, **options: Any
) -> RareEvent:
    """The probability that an output which a language model samples has a property.

    It is that under the model's own distribution, with nothing truncated or penalised, of up to `tokens` new tokens.
    Draws are taken under biased logits (`hf_xent.cem.tilting`) and weighted by the exact ratio of probabilities. With
    several prompts it is the mean of their probabilities. torch's generators are not changed.

    Args:
        model: A causal LM of transformers, patched or not.
        prompts: Token ids of a prompt, or a list of several; with a `tokenizer`, one text or several.
        event: Whether an output has the property, or, with a threshold, its real-valued score, which lets the levels
            approach an event that no first draw has. It is given the new token ids, with the end token if there is
            one; with a `tokenizer`, their text.
        threshold: The event is score >= threshold; None if `event` is true or false.
        **options: Those of `hf_xent.cem.tilting.Tilting`: tokens, draws, bias, temperature, tokenizer ...

    Returns:
        The estimate with its error; `tilt` is token -> bias.

    Raises:
        ValueError: An option that is unknown or out of range, no draw of a level with the property, or more tokens
            than the model has positions for.
    """
    from . import tilting  # imported here: torch and transformers, which `probability` does not need

    settings = tilting.settled(options)
    goal = 1.0 if threshold is None else threshold
    with tilting.sampler(model, prompts, event, settings) as drawn:

        def fitted(tilt: Any, rows: Any, scores: Numbers, log_weights: Numbers, level: float) -> Any:
            return drawn.fitted(tilt, rows, scores >= level, log_weights)

        start: tilting.Tilt = dict(settings.bias or {})
        levels: tuple[float, ...] = ()
        if settings.levels:
            start, levels = climbed(
                start, lambda v: drawn(v, settings.per_level, "level"), fitted, goal, settings.rho, settings.levels
            )
        _, scores, log_weights = drawn(start, settings.draws, "estimate")
    return weighed(scores >= goal, log_weights, levels, start)


def scored(scores: ArrayLike, n: int) -> Numbers:
    """Scores as numbers [n]. Raises: ValueError if there are more or fewer, or one is NaN."""
    found = np.asarray(scores, dtype=float)
    if found.shape != (n,) or np.isnan(found).any():
        raise ValueError(
            f"score has shape {found.shape} and {np.isnan(found).sum()} NaN for {n} draws: return one number for each"
        )
    return found


def climbed(
    v: Any,
    draw: Callable[[Any], tuple[Any, Numbers, Numbers]],
    fit: Callable[..., Any],
    threshold: float,
    rho: float,
    most: int = ROUNDS,
) -> tuple[Any, tuple[float, ...]]:
    """The parameters to which the levels lead, and the levels.

    Args:
        v: The parameters to begin with.
        draw: Parameters -> draws, their scores [n] and the logarithms of their weights [n].
        fit: (v, draws, scores, log_weights, level) -> the parameters of weighted maximum likelihood on the elites.
        threshold: The last level, g.
        rho: The share of elites.
        most: The most levels; they end without having reached the threshold after these.

    Raises:
        ValueError: rho or threshold is out of range, or the scores of a level are all the same, below the threshold.
    """
    if not is_number(rho, "(0, 1)") or not is_number(threshold, "(-inf, inf)"):
        raise ValueError(f"rho is {rho!r}, threshold {threshold!r}: choose rho in (0, 1) and a finite threshold")
    levels: list[float] = []
    for _ in range(most):
        rows, scores, log_weights = draw(v)
        quantile = float(np.quantile(scores, 1 - rho, method="higher"))
        levels.append(level_of(scores, quantile, threshold))
        v = fit(v, rows, scores, log_weights, levels[-1])
        if quantile >= threshold:
            break
    return v, tuple(levels)


def level_of(scores: Numbers, quantile: float, threshold: float) -> float:
    """The level of these scores: their quantile, or the least score above the lowest one if that is the quantile."""
    if quantile <= scores.min() < threshold:
        above = scores[scores > scores.min()]
        if not above.size:
            raise ValueError(
                f"all {len(scores)} draws of a level have the score {scores.min():g}, below {threshold:g}: take more"
                " draws, a score with finer steps towards the event, or a tilt to begin with"
            )
        quantile = float(above.min())
    return min(quantile, threshold)


def weighed(hits: NDArray[np.bool_], log_weights: Numbers, levels: Sequence[float], tilt: Any) -> RareEvent:
    """The estimate from draws [n], with the event or without it, and their log-weights [n]; see `RareEvent`."""
    n, count = len(hits), int(hits.sum())
    log_w = np.where(hits, log_weights, -math.inf)
    top = float(log_w.max()) if count else 0.0
    w = np.exp(log_w - top)  # at most 1: sums cannot overflow
    scale = math.exp(min(top, 700.0))
    p = float(w.mean()) * scale
    error = float(w.std(ddof=1)) / n**0.5 * scale
    ess = float(w.sum() ** 2 / (w**2).sum()) if count else 0.0
    if not np.any(log_weights):
        interval = wilson(count, n)
    elif count:
        factor = math.exp(NormalDist().inv_cdf(0.975) * error / p)
        interval = (p / factor, min(1.0, p * factor))
    else:
        interval = (0.0, 1.0)
    if ess < FEW:
        warnings.warn(
            f"the estimate rests on {count} of {n} draws, as good as {ess:.0f} with equal weights: take more draws, or"
            " more draws in a level, for an error that can be trusted",
            stacklevel=3,
        )
    return RareEvent(p, error, interval, ess, count, n, tuple(levels), tilt)
