"""Rankings of a grid of losses: each makes the losses of different items comparable in its own way.

Q queries rank G items. In the direction 'candidates', a source ranks the candidates; in 'sources', a candidate ranks
the sources, and the grid is transposed. A loss is small for an item that is likely under any query, so what an item
costs on average, or without any source, is taken off.

`raw` and `pmi` look at one query. The others look at all queries of the pool at once (they are transductive): compare
them with `pmi` only where a pool is given, and say so. For losses, use sums of `Grid` or its means; `pmi` is Bayes'
rule for sums alone.

Source: Labbé, Pellegrini & Pinquier 2023, arXiv:2308.15090, whose abstract says that losses have to be normalized to
find the caption of a recording, not how; which normalizers there are is this project's choice.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .registered import RANKINGS

Array = np.ndarray
DIRECTIONS = ("candidates", "sources")
"""What is ranked: the candidates of a source, or the sources of a candidate."""


def raw(losses: Array, alone: Array | None = None) -> Array:
    """The losses themselves.

        r = C

    The item that is likely comes first, whatever the query.
    """
    return losses


def pmi(losses: Array, alone: Array) -> Array:
    """Pointwise mutual information, negated: the sum of losses less that without a source.

        r = S - S_alone = log p(c) - log p(c | a)

    By Bayes' rule, the order is that of p(a | c), the probability that the source belongs to the candidate.
    """
    return losses - alone


def centered(losses: Array, alone: Array | None = None) -> Array:
    """The loss less its mean over all queries.

        r = C - mean_q C

    With sums, the mean takes the place of the candidate's loss without a source.
    """
    return losses - losses.mean(0)


def minmax(losses: Array, alone: Array | None = None) -> Array:
    """The loss between the least and the largest that the item has for any query.

        r = (C - min_q C) / (max_q C - min_q C)

    It is 0 for an item whose losses are equal.
    """
    low, span = losses.min(0), np.ptp(losses, axis=0)
    return (losses - low) / np.where(span > 0, span, 1.0)


def zscore(losses: Array, alone: Array | None = None) -> Array:
    """The centered loss in standard deviations of the item's losses over all queries.

        r = (C - mean_q C) / sd_q C

    It is 0 for an item whose losses are equal.
    """
    constant = np.ptp(losses, axis=0) == 0  # whose standard deviation may be a rounding error
    return np.where(constant, 0.0, centered(losses) / np.where(constant, 1.0, losses.std(0)))


def rank(
    losses: ArrayLike, ranking: str = "raw", *, alone: ArrayLike | None = None, direction: str = "candidates"
) -> Array:
    """What items are ranked by, the best one first.

    Args:
        losses: The grid [A, C]: `Grid.sums`, or `Grid.means`.
        ranking: A name of `RANKINGS`.
        alone: The sums [C] of the candidates' losses without a source, for 'pmi'. It does not change the order of a
            candidate's sources, so this ranking then equals 'raw'.
        direction: 'candidates' ranks the candidates of each source, 'sources' the sources of each candidate.

    Returns:
        Numbers [Q, G], one row for each query, smaller for better items: [A, C], or [C, A] for 'sources'.

    Raises:
        ValueError: An unknown ranking or direction, losses that are not a grid of finite numbers, or `alone` where it
            is not used, missing where it is, or of another size.
    """
    grid = np.asarray(losses, dtype=np.float64)
    if grid.ndim != 2 or not grid.size or not np.isfinite(grid).all():
        raise ValueError(f"losses has shape {grid.shape}: pass a grid [A, C] of finite numbers")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}: choose one of {', '.join(DIRECTIONS)}")
    function = RANKINGS.find(ranking)
    if alone is not None and ranking != "pmi":
        raise ValueError(f"alone is given, but ranking {ranking!r} does not use it: leave it out, or choose 'pmi'")
    if alone is None and ranking == "pmi":
        raise ValueError("ranking is 'pmi', which needs the sums of the candidates without a source: pass alone=...")
    if alone is not None and np.shape(alone) != grid.shape[1:]:
        raise ValueError(f"alone has shape {np.shape(alone)}: pass one number for each of {grid.shape[1]} candidates")
    if direction == "sources":  # a constant for every source
        return function(grid.T, np.zeros(len(grid))) if ranking == "pmi" else function(grid.T)
    return function(grid, None if alone is None else np.asarray(alone, dtype=np.float64))
