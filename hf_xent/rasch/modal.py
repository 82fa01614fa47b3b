"""The most likely places of all units and levels at once, with or without a normal prior of the units.

    joint   max over theta, delta, alpha, tau  of  sum log P(x)
    map     the same less  sum_n (theta_n - m)^2 / (2 s^2),  m = mean theta,  s^2 = mean[(theta - m)^2 + se^2]

    se^2 = 1 / (sum V + 1 / s^2)

Newton's method: second derivatives by theta are diagonal, so a step solves one system of the size of the levels and
thresholds (a Schur complement), and the inverse of that matrix is their covariance. The prior's m and s^2 are renewed
between maximisations (EM with the curvature at the mode in place of the posterior variance), until they stand.

Source: Wright and Masters 1982, Rating Scale Analysis (joint); Mislevy 1986, Bayes modal estimation in item response
models (map). The combination with many facets is Linacre 1989.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.linalg import cho_factor, cho_solve

from .cells import Cells
from .moments import Moments, information, moments, threshold_gradient

STEPS = 100
"""Newton steps, and halvings of one, after which a fit has failed; it takes about ten."""


@dataclass
class Estimate:
    """What a method has found."""

    theta: np.ndarray  # [N]
    se: np.ndarray  # [N]
    free: np.ndarray  # [F + P], free parameters of the facets, then free thresholds
    covariance: np.ndarray  # [F + P, F + P]
    mean: float = float("nan")
    """Of the prior, as the next."""
    sd: float = float("nan")
    log_likelihood: float = float("nan")
    """Of the scores in 'marginal', of scores given theta else."""


def fit_modal(cells: Cells, tolerance: float, prior: bool) -> Estimate:
    """The estimate by 'joint' (without a prior) or 'map'."""
    theta, free = np.zeros(len(cells.unit.names)), np.zeros(sum(cells.counts))
    mean, variance = 0.0, 1.0
    for _ in range(STEPS if prior else 1):
        weight = 1 / variance if prior else 0.0
        theta, free = maximize(cells, theta, free, (mean, weight), tolerance)
        own, covariance = curvature(cells, theta, free, weight)
        found = float(theta.mean()), float(((theta - theta.mean()) ** 2 + 1 / own).mean())
        still = abs(found[0] - mean) + abs(found[1] / variance - 1)
        mean, variance = found
        if still < 1e-4:
            break
    sd = float(np.sqrt(variance)) if prior else float("nan")
    fitted = float(moments_at(cells, theta, free).log_p.sum())
    return Estimate(theta, 1 / np.sqrt(own), free, covariance, mean if prior else float("nan"), sd, fitted)


def moments_at(cells: Cells, theta: np.ndarray, free: np.ndarray) -> Moments:
    """The moments of all cells."""
    facets = cells.counts[0]
    return moments(cells, theta[cells.unit.codes] + cells.design @ free[:facets], cells.sums(free[facets:]))


def maximize(
    cells: Cells, theta: np.ndarray, free: np.ndarray, prior: tuple[float, float], tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Newton's method from a start, with halved steps where a whole one makes it worse.

    Args:
        cells: The scores.
        theta: [N].
        free: [F + P].
        prior: Its mean and precision.
        tolerance: It is done when no parameter moves by more, in logits.

    Raises:
        ValueError: It does not converge.
    """
    mean, weight = prior
    at = moments_at(cells, theta, free)
    value = at.log_p.sum() - weight * ((theta - mean) ** 2).sum() / 2
    for _ in range(STEPS):
        own, cross, both = _second(cells, at, weight)
        by_theta = cells.by_unit(at.error) - weight * (theta - mean)
        one = np.ones(len(at.error))
        by_free = np.concatenate([cells.design.T @ at.error, threshold_gradient(cells, at, one)])
        step = solve(_schur(own, cross, both), by_free - cross.T @ (by_theta / own))
        move = (by_theta - cross @ step) / own
        size = 1.0
        while True:
            tried = theta + size * move, free + size * step
            at = moments_at(cells, *tried)
            new = at.log_p.sum() - weight * ((tried[0] - mean) ** 2).sum() / 2
            if new >= value - 1e-9 * abs(value) or size < 1e-6:
                break
            size /= 2
        (theta, free), value = tried, new
        if size * max(np.abs(move).max(), np.abs(step).max(initial=0)) < tolerance:
            return theta, free
    raise ValueError(
        f"the likelihood still rises after {STEPS} steps: some severity or threshold has no finite estimate; choose"
        " method='map' or 'marginal', or leave out levels with few scores"
    )


def curvature(cells: Cells, theta: np.ndarray, free: np.ndarray, weight: float) -> tuple[np.ndarray, np.ndarray]:
    """Sum of V plus the prior's precision [N], and the covariance of the free parameters, whatever theta is."""
    own, cross, both = _second(cells, moments_at(cells, theta, free), weight)
    return own, solve(_schur(own, cross, both), np.eye(len(both)))


def solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The solution for a positive definite matrix. Raises: ValueError if it is not."""
    if not len(matrix):
        return right
    try:
        return cho_solve(cho_factor(matrix), right)
    except np.linalg.LinAlgError:
        raise ValueError(
            "the scores do not determine all severities and thresholds (those of some levels may hardly overlap): leave"
            " out levels with few or nearly constant scores, or a facet"
        ) from None


def places(cells: Cells, free: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Most likely theta and standard errors [N] for given facets and thresholds, without a prior."""
    theta = np.zeros(len(cells.unit.names))
    for _ in range(STEPS):
        at = moments_at(cells, theta, free)
        move = np.clip(cells.by_unit(at.error) / cells.by_unit(at.variance), -1, 1)
        theta = theta + move
        if np.abs(move).max() < tolerance:
            break
    return theta, 1 / np.sqrt(cells.by_unit(moments_at(cells, theta, free).variance))


def _second(cells: Cells, at: Moments, weight: float) -> tuple[np.ndarray, sparse.csr_matrix, np.ndarray]:
    """Minus second derivatives: by theta [N], mixed [N, F + P], by the others [F + P, F + P]."""
    rows, both = information(cells, at, cells.design, np.ones(len(at.error)))
    return cells.by_unit(at.variance) + weight, cells.of_units @ rows, both


def _schur(own: np.ndarray, cross: sparse.csr_matrix, both: np.ndarray) -> np.ndarray:
    return both - (cross.T @ sparse.diags(1 / own) @ cross).toarray()
