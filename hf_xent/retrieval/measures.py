"""How well a ranking finds the right items, per query, with intervals over queries.

    recall@k = 1 if a right item is among the first k, else 0            also called hit rate; several may be right
    AP@k     = 1 / min(k, R) * sum_{i <= k} [item i is right] (right ones among the first i) / i      of R right items

Ties are broken against the ranking: of equal numbers, wrong items come first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..metrics.ranking import Interval
from ..options.ranges import check_count, is_number


def recall_at(scores: ArrayLike, right: ArrayLike, k: int = 1) -> np.ndarray:
    """Whether a right item is among the first k.

    Args:
        scores: What items are ranked by [Q, G], smaller for better ones, as `rank` returns it.
        right: Whether each item is right for each query [Q, G].
        k: How many items are looked at.

    Returns:
        1 or 0 for each query [Q]; the mean is recall@k.

    Raises:
        ValueError: Shapes that differ, a query without a right item, scores that are not finite, or k below 1.
    """
    found = _ranked(scores, right, k)[0][:, :k]
    return np.asarray(found.any(1), dtype=np.float64)


def average_precision_at(scores: ArrayLike, right: ArrayLike, k: int = 10) -> np.ndarray:
    """The average precision of the first k items.

    Args:
        scores: What items are ranked by [Q, G], smaller for better ones, as `rank` returns it.
        right: Whether each item is right for each query [Q, G].
        k: How many items are looked at.

    Returns:
        A number in [0, 1] for each query [Q]; the mean is mAP@k.

    Raises:
        ValueError: As for `recall_at`.
    """
    ordered, count = _ranked(scores, right, k)
    found = ordered[:, :k]
    precision = found.cumsum(1) / np.arange(1, found.shape[1] + 1)
    return (precision * found).sum(1) / np.minimum(k, count)


def interval(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A mean over queries and its bootstrap interval: queries are drawn anew, what they search in stays.

    For a paired difference of two rankings, pass the differences of their values.

    Args:
        values: One number for each query [Q].
        weights: What each query counts [Q]; the mean is sum(weights * values) / sum(weights). None counts all alike.
        resamples: Number of resamples.
        level: The share of the resamples within the interval, in (0, 1).
        seed: Seed of the resampling.

    Returns:
        The mean, and the percentiles of the resampled ones.

    Raises:
        ValueError: No query, numbers that are not finite, shapes that differ, or options out of range.
    """
    check_count("resamples", resamples, 1)
    if not is_number(level, "(0, 1)"):
        raise ValueError(f"level is {level!r}: choose a number in (0, 1)")
    numbers = np.asarray(values, dtype=np.float64)
    counts = np.ones_like(numbers) if weights is None else np.asarray(weights, dtype=np.float64)
    if numbers.ndim != 1 or not numbers.size or not np.isfinite(numbers).all() or counts.shape != numbers.shape:
        raise ValueError(
            f"values has shape {numbers.shape}, weights {counts.shape}: pass one finite number for each query"
        )
    drawn = np.random.default_rng(seed).integers(len(numbers), size=(resamples, len(numbers)))
    means = (numbers * counts)[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.average(numbers, weights=counts)), float(low), float(high))


def _ranked(scores: ArrayLike, right: ArrayLike, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether the item at each rank is right [Q, G], and the number of right items [Q]."""
    check_count("k", k, 1)
    numbers, truth = np.asarray(scores, dtype=np.float64), np.asarray(right)
    if numbers.ndim != 2 or truth.shape != numbers.shape or truth.dtype != bool:
        raise ValueError(f"scores has shape {numbers.shape}, right {truth.shape}: pass [Q, G] each, right of bool")
    if not np.isfinite(numbers).all():
        raise ValueError("scores has numbers that are not finite: leave those items out")
    count = truth.sum(1)
    if not count.all():
        raise ValueError(f"query {int(count.argmin())} has no right item: leave it out")
    order = np.lexsort((truth, numbers), axis=1)  # by the number, then wrong items first
    return np.take_along_axis(truth, order, axis=1), count
