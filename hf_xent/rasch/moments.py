"""First and second derivatives of the log-likelihood of cells, by moments of their categories.

d log P(x) / d eta = x - E        d log P(x) / d T_k = P(k) - 1[x = k]
- second derivatives:  V  for eta twice,  -P(k) (k - E)  for eta and T_k,  P(k) (1[j = k] - P(j))  for T_j and T_k
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

from .categories import log_probabilities, mean_and_variance
from .cells import Cells


class Moments(NamedTuple):
    """What the probabilities of cells say of their scores."""

    log_p: np.ndarray  # [O], of the score that was given
    error: np.ndarray  # [O], x - E
    variance: np.ndarray  # [O]
    p: np.ndarray  # [O, K]


def moments(cells: Cells, eta: np.ndarray, sums: np.ndarray) -> Moments:
    """Moments of cells at eta [O] and T [G, K]."""
    log_p = log_probabilities(eta, sums[cells.group])
    p = np.exp(log_p)
    mean, variance = mean_and_variance(p)
    return Moments(log_p[np.arange(len(eta)), cells.score], cells.score - mean, variance, p)


def threshold_gradient(cells: Cells, at: Moments, weight: np.ndarray) -> np.ndarray:
    """The gradient of sum w log P by the free thresholds."""
    rows, k, places = threshold_cells(cells)
    given = cells.score[rows] == k
    return np.bincount(places, weight[rows] * (at.p[rows, k] - given), cells.counts[1])


def threshold_cells(cells: Cells) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cell, category, place of its T among the free ones) of every free threshold that a cell has."""
    places = cells.index[cells.group]
    rows, steps = np.nonzero(places >= 0)
    return rows, steps + 1, places[rows, steps]


def information(
    cells: Cells, at: Moments, design: sparse.csr_matrix, weight: np.ndarray
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Minus the second derivatives of sum w log P, of eta = (what has no derivative here) + design @ b.

    Args:
        cells: The cells.
        at: Their moments.
        design: [O, Q].
        weight: w [O].

    Returns:
        [O, Q + P], by eta of a cell and by (b, free thresholds); and [Q + P, Q + P], by the latter alone.
    """
    rows, k, places = threshold_cells(cells)
    mean = cells.score - at.error
    shape = (len(weight), cells.counts[1])
    mixed = sparse.csr_matrix((-weight[rows] * at.p[rows, k] * (k - mean[rows]), (rows, places)), shape)
    one = sparse.csr_matrix((np.sqrt(weight[rows]) * at.p[rows, k], (rows, places)), shape)
    own = np.diag(np.bincount(places, weight[rows] * at.p[rows, k], shape[1])) - (one.T @ one).toarray()
    scaled = sparse.diags(weight * at.variance) @ design
    cross = (design.T @ mixed).toarray()
    both = np.block([[(design.T @ scaled).toarray(), cross], [cross.T, own]])
    return sparse.hstack([scaled, mixed], format="csr"), both
