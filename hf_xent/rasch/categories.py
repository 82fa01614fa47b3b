"""Probabilities of ordered categories, by how far a unit is above what it is measured against.

    log P(k) / P(k - 1) = eta - tau_k,  k = 1 .. K - 1        P = softmax over k of  k eta - (tau_1 + ... + tau_k)

So the loss of a score is a cross-entropy of K classes whose logits have one free number. Of two categories it is
logistic regression.

Source: Andrich 1978, A rating formulation for ordered response categories; Masters 1982, A Rasch model for partial
credit scoring.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def probabilities(eta: Any, thresholds: Any) -> np.ndarray:
    """The probability of every category.

    Args:
        eta: [...], a unit's place less those of the item, the rater and any other facet, in logits.
        thresholds: tau [..., K - 1], in logits; its leading axes are those of eta, or none.

    Returns:
        [..., K], float64.
    """
    return np.exp(log_probabilities(np.asarray(eta, np.float64), cumulative(thresholds)))


def expected(eta: Any, thresholds: Any) -> np.ndarray:
    """The expected category sum_k k P(k), from 0 to K - 1; arguments are those of `probabilities`."""
    return mean_and_variance(probabilities(eta, thresholds))[0]


def variance(eta: Any, thresholds: Any) -> np.ndarray:
    """The variance of the category, which is the information of one score on eta; see `probabilities`."""
    return mean_and_variance(probabilities(eta, thresholds))[1]


def cumulative(thresholds: Any) -> np.ndarray:
    """T_k = tau_1 + ... + tau_k [..., K] of thresholds [..., K - 1]; T_0 is 0."""
    sums = np.cumsum(np.asarray(thresholds, np.float64), -1)
    return np.concatenate([np.zeros((*sums.shape[:-1], 1)), sums], -1)


def log_probabilities(eta: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """log P [..., K] of eta [...] and T [..., K]; a category whose T is infinite has the probability 0."""
    logits = np.arange(sums.shape[-1]) * eta[..., None] - sums
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def mean_and_variance(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E [...] and V [...] of the category under probabilities [..., K]."""
    k = np.arange(p.shape[-1])
    mean = p @ k
    return mean, (p * (k - mean[..., None]) ** 2).sum(-1)
