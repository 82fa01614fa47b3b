"""Severities and thresholds under which the scores are likeliest when units come from a normal distribution.

    max over delta, alpha, tau, m, s  of  sum_n log int N(theta | m, s^2) prod_cells P(x | theta) d theta

The integrals are sums over Gauss-Hermite nodes around each unit's own mode, as wide as its curvature there says
(adaptive quadrature), so that a few nodes serve units with many scores, too. Newton's method has Louis' second
derivatives: those of complete data, less the variance of the score over the nodes. theta is the posterior mean, and its
standard error the posterior standard deviation.

Source: Bock and Aitkin 1981, Marginal maximum likelihood estimation of item parameters; Louis 1982, Finding the
observed information matrix when using the EM algorithm; Pinheiro and Bates 1995 for the nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.polynomial.hermite import hermgauss
from scipy import sparse

from .cells import Cells
from .modal import STEPS, Estimate, moments_at, solve
from .moments import information, moments, threshold_cells

FLOOR = -7.0
"""The lowest log s, a deviation of 0.001: units that do not differ more have no maximum above it."""


class Nodes(NamedTuple):
    """Quadrature of the posterior of every unit."""

    theta: np.ndarray  # [N, Q]
    share: np.ndarray  # [N, Q], posterior probabilities; rows sum to 1
    log_likelihood: float


def fit_marginal(cells: Cells, tolerance: float, nodes: int) -> Estimate:
    """The estimate by 'marginal'.

    Raises:
        ValueError: It does not converge.
    """
    width = sum(cells.counts)
    x = np.zeros(width + 2)  # facets, thresholds, m, log s
    modes = np.zeros(len(cells.unit.names))
    at, modes = posterior(cells, x, modes, nodes)
    for _ in range(STEPS):
        gradient, complete, lost = derivatives(cells, x, at)
        count = len(x) - bool(x[-1] <= FLOOR and gradient[-1] <= 0)  # at the floor s is not moved
        part, step = np.ix_(range(count), range(count)), np.zeros(len(x))
        try:
            step[:count] = solve((complete - lost)[part], gradient[:count])
        except ValueError:  # far from the maximum: complete data's are positive definite everywhere
            step[:count] = solve(complete[part], gradient[:count])
        size = min(1.0, 2 / max(np.abs(step).max(), 1e-12))
        while True:
            tried = x + size * step
            tried[-1] = max(tried[-1], FLOOR)
            new, modes = posterior(cells, tried, modes, nodes)
            if new.log_likelihood >= at.log_likelihood - 1e-9 * abs(at.log_likelihood) or size < 1e-6:
                break
            size /= 2
        x, at = tried, new
        if size * np.abs(step).max() < tolerance:
            break
    else:
        raise ValueError(
            f"the marginal likelihood still rises after {STEPS} steps: some severity or threshold has no finite"
            " estimate; leave out levels with few scores"
        )
    _, complete, lost = derivatives(cells, x, at)
    count = len(x) - bool(x[-1] <= FLOOR)
    covariance = solve((complete - lost)[:count, :count], np.eye(count))[:width, :width]
    theta = (at.share * at.theta).sum(1)
    se = np.sqrt((at.share * (at.theta - theta[:, None]) ** 2).sum(1))
    return Estimate(theta, se, x[:width], covariance, float(x[-2]), float(np.exp(x[-1])), at.log_likelihood)


def posterior(cells: Cells, x: np.ndarray, modes: np.ndarray, nodes: int) -> tuple[Nodes, np.ndarray]:
    """The nodes and posterior of all units at the parameters x, and the modes, found from earlier ones."""
    free, mean, weight = x[:-2], x[-2], np.exp(-2 * x[-1])
    curve = np.full(len(modes), weight)
    for _ in range(STEPS):
        at = moments_at(cells, modes, free)
        curve = cells.by_unit(at.variance) + weight
        move = np.clip((cells.by_unit(at.error) - weight * (modes - mean)) / curve, -1, 1)
        modes = modes + move
        if np.abs(move).max() < 1e-6:
            break
    points, logs = hermgauss(nodes)
    theta = modes[:, None] + np.sqrt(2 / curve)[:, None] * points
    facets = cells.counts[0]
    other, sums = cells.design @ free[:facets], cells.sums(free[facets:])
    scores = [
        cells.by_unit(moments(cells, column[cells.unit.codes] + other, sums).log_p)
        for column in np.ascontiguousarray(theta.T)
    ]
    log = np.stack(scores, 1) - weight * (theta - mean) ** 2 / 2 - x[-1] - np.log(2 * np.pi) / 2
    log += points**2 + np.log(logs) + np.log(2 / curve)[:, None] / 2  # the density and the step of the nodes
    top = log.max(1, keepdims=True)
    share = np.exp(log - top)
    total = share.sum(1, keepdims=True)
    return Nodes(theta, share / total, float((top + np.log(total)).sum())), modes


def derivatives(cells: Cells, x: np.ndarray, at: Nodes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradient of the marginal log-likelihood, and minus second derivatives: of complete data, and what is lost."""
    facets = cells.counts[0]
    other, sums = cells.design @ x[:facets], cells.sums(x[facets:-2])
    weight, units = np.exp(-2 * x[-1]), len(cells.unit.names)
    rows, k, places = threshold_cells(cells)
    complete, second = np.zeros((len(x), len(x))), np.zeros((len(x), len(x)))
    first = np.zeros((units, len(x)))  # the mean over nodes of every unit's score
    for theta, share in zip(at.theta.T, at.share.T, strict=True):
        node = moments(cells, theta[cells.unit.codes] + other, sums)
        complete[:-2, :-2] += information(cells, node, cells.design, share[cells.unit.codes])[1]
        gap = theta - x[-2]
        parts = (rows, places)
        steps = sparse.csr_matrix(
            (node.p[rows, k] - (cells.score[rows] == k), parts), (len(cells.raw), cells.counts[1])
        )
        by_facet = (cells.of_units @ sparse.diags(node.error) @ cells.design).toarray()
        prior = np.stack([weight * gap, weight * gap**2 - 1], 1)
        score = np.hstack([by_facet, (cells.of_units @ steps).toarray(), prior])  # [N, F + P + 2]
        first += share[:, None] * score
        second += score.T @ (share[:, None] * score)
        mixed = 2 * weight * (share @ gap)
        complete[-2:, -2:] += [[weight * share.sum(), mixed], [mixed, 2 * weight * (share @ gap**2)]]
    return first.sum(0), complete, second - first.T @ first
